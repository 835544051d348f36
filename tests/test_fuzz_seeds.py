"""What `python -m fuzz` starts from and what it has found, played again; and that it would notice a finding."""

from __future__ import annotations

import random
import struct
import time
import zlib

import pytest

from fuzz import payloads
from fuzz.__main__ import SEEDS, TARGETS, load, seeds
from fuzz._mutation import Finding, Target, change, judge
from tests.fuzz_seeds import make

KEPT = [(name, path) for name in TARGETS for path in sorted((SEEDS / name).iterdir())]


@pytest.mark.short
@pytest.mark.parametrize(("name", "path"), KEPT, ids=[f"{name}-{path.name}" for name, path in KEPT])
def test_every_input_kept_is_read_or_refused_within_the_limits(name, path):
    accepted = judge(load(name), path.read_bytes(), traced=True)
    assert accepted or path.name.startswith("found-")


def test_the_seeds_are_those_that_the_script_makes():
    for target in TARGETS:
        there = {path.name.removeprefix("seed-") for path in (SEEDS / target).glob("seed-*")}
        assert there == make.MADE[target]().keys()


@pytest.mark.parametrize(("name", "count"), [("decode", 300), ("folder", 10), ("settings", 40)])
def test_some_mutations_are_read_or_refused_within_the_limits(name, count):
    target, kept, rng = load(name), seeds(name), random.Random(0)
    outcomes = set()
    for number in range(count):
        data = target.mutate(rng.choice(kept), rng, change)
        outcomes.add(judge(target, data, traced=number % 16 == 0))
    assert outcomes == {False, True}


@pytest.mark.short
def test_mutations_of_payloads_reach_what_lies_behind_the_checks_at_the_door():
    rng, passed = random.Random(0), 0
    for _ in range(200):
        payload = payloads.mutate(seeds("decode")[0], rng, change)[1:]
        body, seal = payload[:-4], payload[-4:]
        passed += payloads.taken_apart(payload) is not None and seal == struct.pack("<I", zlib.crc32(body))
    assert passed > 150


def busy(data: bytes) -> bool:
    until = time.process_time() + 1.05
    while time.process_time() < until:
        pass
    return True


@pytest.mark.short
@pytest.mark.parametrize(
    ("run", "said"),
    [
        (busy, r"s for 3 bytes"),
        (lambda data: bool(bytearray(1 << 21)), r"bytes of memory for 3 bytes, 1048576 beyond them allowed"),
    ],
    ids=["a hang", "too much memory"],
)
def test_what_takes_too_much_is_a_finding(run, said):
    with pytest.raises(Finding, match=said):
        judge(Target(run, payloads.mutate, 1 << 20), b"abc", traced=True)
