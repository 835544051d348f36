"""A method that is none of the library's in a whole run, and a run that is looked at again."""

from __future__ import annotations

import io

import jax
import numpy as np
import pytest

from fedklpr_jax import simulation, train
from fedklpr_jax.config import default_config
from fedklpr_jax.console import Console
from fedklpr_jax.errors import InputError
from fedklpr_jax.federated import Method
from tests.federations import write_shapes

pytestmark = pytest.mark.usefixtures("compiled_in_a_hurry")


def stand_still(server, uploads, context):
    return server._replace(round=server.round + 1), {}


STILL = Method("still", aggregate=stand_still)


def settings(folder):
    config = default_config()
    config.task.name, config.model.arch = "classification", "cnn"
    config.data.source, config.data.root = "folder", write_shapes(folder / "pictures")
    config.data.count, config.data.least, config.epochs, config.rounds = 2, 20, 1, 1
    config.out = str(folder / "run")
    return config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A finished run of a server that stands still, and its summary."""
    folder = tmp_path_factory.mktemp("own")
    summary = train.run(settings(folder), Console(io.StringIO()), method=STILL)
    return folder, summary


def test_a_run_is_of_the_method_given(run):
    _, summary = run
    assert summary["method"] == "still"
    # Where the server stands still, the end is the start, as it would not be for the FedKLPR that the settings name.
    assert summary["mean"]["accuracy"] == summary["start"]["mean"]["accuracy"]
    assert summary["after"]["mean"]["accuracy"] != summary["mean"]["accuracy"]


def test_a_run_looked_at_again_has_the_model_and_the_results_it_ended_with(run):
    folder, summary = run
    before = sorted(path.name for path in (folder / "run").rglob("*"))
    federation, state = train.reopen(folder / "run", Console(io.StringIO()), method=STILL)
    assert federation.engine.method is STILL and int(state.server.round) == 1
    found = simulation.examine(federation, state, "before").results["before"]
    assert {name: one.metrics["accuracy"] for name, one in found.items()} == {
        name: row["accuracy"] for name, row in summary["clients"].items()
    }
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state.server.model))
    assert sorted(path.name for path in (folder / "run").rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("fedavg", "method 'fedavg': one of the library's has this name; give it another"),
        ("a/b", "method 'a/b': its folder cannot be named so; give a name without / in it"),
        ("", "method '': its folder cannot be named so; give a name without / in it"),
    ],
)
def test_a_name_that_cannot_be_is_refused(name, told, tmp_path):
    with pytest.raises(InputError) as caught:
        train.run(settings(tmp_path), Console(io.StringIO()), method=Method(name))
    assert str(caught.value) == told and not (tmp_path / "run").exists()


def test_what_is_no_run_is_not_looked_at(run, tmp_path):
    folder, _ = run
    with pytest.raises(InputError, match="config.json: no such file; give the folder of a run"):
        train.reopen(tmp_path, Console(io.StringIO()))
    with pytest.raises(InputError, match="its run is of a method 'still'; give that one"):
        train.reopen(folder / "run", Console(io.StringIO()))
    with pytest.raises(InputError, match="its run is of a method 'still'; give that one"):
        train.reopen(folder / "run", Console(io.StringIO()), method=Method("other"))
    (tmp_path / "config.json").write_bytes((folder / "run" / "config.json").read_bytes())
    with pytest.raises(InputError, match="has no checkpoint yet; let its run finish a round"):
        train.reopen(tmp_path, Console(io.StringIO()), method=STILL)
