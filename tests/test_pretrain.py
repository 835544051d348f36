"""The trunk that unsupervised runs start from: trained once, kept, and the same again."""

from __future__ import annotations

import dataclasses
import io
import os
import subprocess
import sys
from pathlib import Path

import jax
import ml_collections
import numpy as np
import pytest

from fedklpr_jax import pretrain, weights
from fedklpr_jax.config import resolved, validate
from fedklpr_jax.console import Console
from fedklpr_jax.data import synthetic
from fedklpr_jax.errors import InputError
from tests.federations import SPECS, TINY, tiny_config

RECIPE = pretrain.Recipe(
    sites=tuple(dataclasses.replace(spec, name=f"pretraining {spec.name}") for spec in SPECS[:2]),
    seed=1,
    settings={
        **pretrain.Recipe().settings, "rounds": 2, "task.people": 4, "task.shots": 2, "data.pad": 2,
    },
)


def changed(**settings: object) -> pretrain.Recipe:
    """The tiny recipe with other settings, which do not change what is compiled."""
    return dataclasses.replace(RECIPE, settings=RECIPE.settings | settings)


def quiet() -> Console:
    return Console(file=io.StringIO())


def started(directory: Path, start: str = "synthetic", recipe: pretrain.Recipe = RECIPE, **settings: object):
    """`starting_trunk` of the tiny network, and what it said."""
    config: ml_collections.ConfigDict = resolved(tiny_config("fedavg", model__weights=start, **settings))
    said = io.StringIO()
    trunk = pretrain.starting_trunk(config, TINY, directory, Console(file=said), recipe)
    return trunk, said.getvalue()


def same(first, second) -> bool:
    return all(map(np.array_equal, jax.tree.leaves(first), jax.tree.leaves(second)))


def test_pooling_keeps_people_and_cameras_of_different_sites_apart():
    sites = synthetic.make_sites(5, height=32, width=16, specs=SPECS)
    pooled = pretrain.pool(sites, "all")
    assert len(pooled.train) == sum(len(site.train) for site in sites) and not len(pooled.query) + len(pooled.gallery)
    assert len(np.unique(pooled.train.ids)) == 14 + 10 + 10
    assert sorted({int(cam) for cam in pooled.train.cams}) == [1, 2, 3, 4, 5, 6]
    second = slice(len(sites[0].train), len(sites[0].train) + len(sites[1].train))
    np.testing.assert_array_equal(pooled.train.ids[second], sites[1].train.ids + 14)
    np.testing.assert_array_equal(pooled.train.cams[second], sites[1].train.cams + 2)
    np.testing.assert_array_equal(pooled.train.pixels[second], sites[1].train.pixels)


def test_no_client_uses_a_pretraining_site():
    names = {spec.name for spec in pretrain.PRETRAINING_SITES}
    assert not names & {spec.name for spec in synthetic.DEFAULT_SITES}
    assert len(names) == len(pretrain.PRETRAINING_SITES)
    assert {spec.style for spec in pretrain.PRETRAINING_SITES} == set(synthetic.STYLES)
    assert pretrain.Recipe().seed > 1000


def test_the_default_recipe_is_a_valid_configuration():
    config = tiny_config("fedavg")
    config.update_from_flattened_dict(dict(pretrain.Recipe().settings))
    validate(config)


def test_training_improves_retrieval_and_repeats_itself():
    recipe = changed(rounds=12)
    first = pretrain.pretrain(TINY, 32, 16, recipe, quiet())
    again = pretrain.pretrain(TINY, 32, 16, recipe, quiet())
    assert same(first.trunk, again.trunk) and first.score == again.score
    like = TINY.init(jax.random.key(0), 32, 16)
    assert jax.tree.map(np.shape, first.trunk) == jax.tree.map(np.shape, like)
    # Steps of length 0: the batch statistics move, the parameters do not.
    standing = changed(**{"rounds": 12, "optimizer.decay": 0.0, "optimizer.decay_from": 0.0})
    assert first.score > pretrain.pretrain(TINY, 32, 16, standing, quiet()).score + 0.1


def test_random_needs_nothing(tmp_path):
    assert started(tmp_path, "random") == (None, "")
    assert not list(tmp_path.iterdir())


def test_a_trained_trunk_is_kept_and_not_trained_again(tmp_path):
    trunk, said = started(tmp_path)
    (kept,) = tmp_path.iterdir()
    assert str(kept) in said.replace("\n", "") and "round 2/2 100%" in said
    before = kept.stat().st_mtime_ns
    again, said = started(tmp_path, seed=9, data__seed=3)
    assert same(trunk, again) and said == "" and kept.stat().st_mtime_ns == before


def test_whatever_changes_the_weights_has_a_file_of_its_own(tmp_path):
    started(tmp_path)
    wider = dataclasses.replace(TINY, widths=(8, 16))
    keys = {pretrain.fingerprint(TINY, 32, 16, RECIPE)}
    for spec, height, recipe in [
        (wider, 32, RECIPE),
        (TINY, 48, RECIPE),
        (TINY, 32, dataclasses.replace(RECIPE, seed=2)),
        (TINY, 32, dataclasses.replace(RECIPE, sites=RECIPE.sites[:1])),
        (TINY, 32, changed(rounds=3)),
    ]:
        keys.add(pretrain.fingerprint(spec, height, 16, recipe))
    assert len(keys) == 6
    _, said = started(tmp_path, recipe=changed(rounds=3))
    assert "round 3/3" in said and len(list(tmp_path.iterdir())) == 2


def test_a_broken_kept_file_is_trained_anew(tmp_path):
    trunk, _ = started(tmp_path)
    (kept,) = tmp_path.iterdir()
    kept.write_bytes(kept.read_bytes()[:-100])
    again, said = started(tmp_path)
    assert "damaged" in said and same(trunk, again)
    assert same(trunk, weights.load(kept, trunk))


def test_a_weight_file_is_read_and_a_broken_one_refused(tmp_path):
    path = tmp_path / "mine.npz"
    trunk = TINY.init(jax.random.key(7), 32, 16)
    weights.save(path, trunk)
    found, said = started(tmp_path / "unused", str(path))
    assert same(found, trunk) and said == ""
    path.write_bytes(path.read_bytes()[:100])
    with pytest.raises(InputError, match="mine.npz: damaged"):
        started(tmp_path / "unused", str(path))


def command(code: str, *arguments: str, folder: Path) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *code.split(" ", 1), *arguments], cwd=folder, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])},
    )  # fmt: skip


def test_the_command_writes_a_file_that_a_run_takes(tmp_path):
    program = (
        "-c import sys, tests.test_pretrain as t\nfrom fedklpr_jax import pretrain\n"
        "t.pretrain.SPECS['thin'] = t.TINY\nsys.exit(pretrain.main(recipe=t.RECIPE))"
    )
    done = command(program, "--out", "trunk.npz", "--height", "32", "--width", "16", folder=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "round 2/2" in done.stdout
    assert "on held-out pretraining identities; wrote trunk.npz" in done.stdout
    found, _ = started(tmp_path, str(tmp_path / "trunk.npz"))
    assert same(found, pretrain.pretrain(TINY, 32, 16, RECIPE, quiet()).trunk)


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--out", "trunk.npy"], "--out: trunk.npy is not allowed; give a name ending in .npz"),
        (["--out", "nowhere/trunk.npz"], "--out: nowhere/trunk.npz is not allowed"),
        (["--out", "trunk.npz", "--height", "8"], "data.height: 8 is not allowed"),
        (["--out", "trunk.npz", "--seed", "-1"], "seed: -1 is not allowed"),
    ],
)
def test_a_mistake_is_one_line_and_exit_status_2(tmp_path, monkeypatch, capsys, arguments, words):
    monkeypatch.chdir(tmp_path)
    assert pretrain.main(arguments, RECIPE) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") and words in error and error.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_the_module_is_a_command(tmp_path):
    done = command("-m fedklpr_jax.pretrain", "--out", "trunk.txt", folder=tmp_path)
    assert done.returncode == 2 and done.stderr.startswith("error: --out: trunk.txt"), done.stderr
