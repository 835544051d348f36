"""What a comparison runs: methods and data sets as the command line names them, each run with its settings."""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks._common import ROOT
from benchmarks._runs import Job, arguments, check_settings
from fedklpr_jax.cli import parse
from fedklpr_jax.config import flat, resolved, validate
from fedklpr_jax.errors import InputError
from fedklpr_jax.train import FREE

# What the options say already; `name` would only be a second name of `out`.
TAKEN = {"out": "--out", "name": "--out", "seed": "--seeds", "method.name": "--methods"}
BASELINE = "fedavg"


@dataclass(frozen=True)
class Run:
    """One run of a comparison.

    Attributes:
      data: name of its data set.
      method: name of its method.
      seed: its seed.
      job: how to make it.
      settings: every setting in effect, by its dotted path.
    """

    data: str
    method: str
    seed: int
    job: Job
    settings: Mapping[str, Any] = field(compare=False)

    @property
    def baseline(self) -> bool:
        """Whether its method is FedAvg, whatever its configuration is called."""
        return self.settings["method.name"] == BASELINE


@dataclass(frozen=True)
class Plan:
    """A comparison.

    Attributes:
      out: its folder.
      data: per data set its settings.
      methods: names, in table order.
      seeds: of every method.
      runs: all of them, a seed after the other.
    """

    out: Path
    data: Mapping[str, Sequence[str]]
    methods: Sequence[str]
    seeds: Sequence[int]
    runs: Sequence[Run]


def known_methods() -> dict[str, Path]:
    """The configurations in `experiments/` by name."""
    files = sorted((ROOT / "experiments").glob("*.py"))
    return {file.stem: file for file in files if "def get_config(" in file.read_text(encoding="utf-8")}


def chosen_methods(given: str) -> dict[str, Path]:
    """The configuration files of comma-separated names and paths, by name.

    Raises:
      InputError: no such configuration, or two files of one name.
    """
    known = known_methods()
    chosen: dict[str, Path] = {}
    for word in filter(None, given.split(",")):
        file = Path(word) if word.endswith(".py") else known.get(word)
        if file is None or not file.is_file():
            raise InputError(f"--methods: no configuration {word!r}; give paths, or names of {', '.join(known)}")
        if chosen.setdefault(file.stem, file) != file:
            raise InputError(f"--methods: {chosen[file.stem]} and {file} have one name; rename one of them")
    if not chosen:
        raise InputError(f"--methods: empty; give some of {', '.join(known)}")
    return chosen


def _settings(words: Sequence[str], option: str) -> tuple[str, ...]:
    for word in words:
        found = re.match(r"--config\.([^=]+)=", word)
        if not found:
            raise InputError(f"{option}: {word!r} is no setting; they look like --config.rounds=3")
        if found[1] in TAKEN:
            raise InputError(f"{option}: {word!r} is not allowed; {TAKEN[found[1]]} says it")
    return tuple(words)


def data_sets(given: Sequence[str]) -> dict[str, tuple[str, ...]]:
    """Settings of the data sets by name.

    Raises:
      InputError: one that is not like "NAME: --config.SETTING=VALUE ...", or a name given twice.

    >>> data_sets(["small: --config.rounds=1"])
    {'small': ('--config.rounds=1',)}
    """
    found: dict[str, tuple[str, ...]] = {}
    for text in given or ["default"]:
        name, _, rest = text.partition(":")
        if not re.fullmatch(r"\w[\w.-]*", name):
            raise InputError(f"--data: {text!r} has no name; give one like 'real: --config.data.source=folder ...'")
        if name in found:
            raise InputError(f"--data: {name!r} is there twice; give each its own name")
        try:
            found[name] = _settings(shlex.split(rest), f"--data {name}")
        except ValueError as error:
            raise InputError(f"--data {name}: {rest.strip()!r} cannot be read ({error})") from error
    return found


def seed_list(given: str) -> list[int]:
    """Comma-separated seeds.

    Raises:
      InputError: none, one that is no whole number, or one given twice.
    """
    words = given.split(",")
    if not all(word.isdecimal() for word in words) or len(set(map(int, words))) < len(words):
        raise InputError(f"--seeds: {given!r} is not allowed; give different whole numbers like 0,1,2")
    return [int(word) for word in words]


def make_plan(out: Path, methods: str, seeds: str, data: Sequence[str], extra: Sequence[str]) -> Plan:
    """The comparison that the options ask for, FedAvg added if it is not there.

    Args:
      out: folder of the runs.
      methods: comma-separated names and paths of configurations.
      seeds: comma-separated.
      data: texts like "NAME: --config.SETTING=VALUE ..."; empty for one data set without settings.
      extra: settings of every run.

    Raises:
      InputError: a bad option or setting, or a run in `out` that has other settings.
    """
    files, sets, numbers = chosen_methods(methods), data_sets(data), seed_list(seeds)
    shared = _settings(extra, "after --")

    def run(name: str, method: str, seed: int) -> Run:
        directory = out / name / f"{method}-{seed}"
        chosen = [word.replace("{seed}", str(seed)) for word in (*shared, *sets[name])]
        command = (f"--config={files[method]}", *chosen, *arguments({"seed": seed, "out": directory}))
        config = parse(command)
        validate(config)
        config = resolved(config)
        check_settings(directory, config)
        return Run(name, method, seed, Job(f"{name}: {method}, seed {seed}", directory, command), flat(config))

    first = next(iter(sets))
    if not any(run(first, method, numbers[0]).baseline for method in files):
        files[BASELINE] = known_methods()[BASELINE]
        print(f"{BASELINE} is added: FedAvg + fine-tuning belongs to every comparison", file=sys.stderr)
    runs = [run(name, method, seed) for seed in numbers for name in sets for method in files]
    return Plan(out, sets, list(files), numbers, runs)


def differences(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Per method the settings in which it differs from the first one, besides those of `method`.

    A comparison of methods is one of their settings too, where configurations bring their own.

    Args:
      runs: of one data set and one seed.
    """
    first, *others = runs
    found = {}
    for run in others:
        paths = [path for path in run.settings if path not in FREE and not path.startswith("method.")]
        other = {path: run.settings[path] for path in paths if run.settings[path] != first.settings.get(path)}
        if other:
            found[run.method] = other
    return found
