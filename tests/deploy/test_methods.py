"""Every experiment that sites of their own can run, against the simulation; minutes, so by `make test-processes`."""

from pathlib import Path

import pytest

from fedklpr_jax import checkpoint, train
from fedklpr_jax.cli import parse
from fedklpr_jax.config import resolved
from fedklpr_jax.deploy import server
from fedklpr_jax.errors import InputError
from fedklpr_jax.methods import METHODS
from tests.deploy.fleets import InProcess, quiet

pytestmark = pytest.mark.processes
FOLDER = Path(__file__).resolve().parents[2] / "experiments"
# Larger networks of the same methods, and the commands.
EXPERIMENTS = sorted(
    path.stem for path in FOLDER.glob("*.py")
    if not path.stem.endswith(("_r34", "_r50")) and path.stem not in ("run", "compare", "ablate")
)  # fmt: skip
SMALL = (
    "--config.rounds=2", "--config.eval.every=100", "--config.checkpoint.every=1",
    "--config.participation=1.0", "--config.deploy.wait=1",
)  # fmt: skip
OF_TASK = {
    "reid": ("--config.data.clients=arena,harbour", "--config.data.height=32", "--config.data.width=16",
             "--config.data.pad=2"),
    "classification": ("--config.data.source=synthetic", "--config.data.count=3", "--config.data.least=20",
                       "--config.model.arch=cnn", "--config.model.norm=batch"),
}  # fmt: skip


def made(experiment, out):
    """The settings of an experiment, made small."""
    file = f"--config={FOLDER / experiment}.py"
    task = "classification" if experiment.endswith("_fmnist") else "reid"
    # One compares its epochs, the other trains a part of the network in each.
    epochs = 2 if experiment in ("subfedavg", "fedrep") else 1
    return parse([file, *SMALL, *OF_TASK[task], f"--config.epochs={epochs}", f"--config.out={out}"])


def leaves(directory):
    folder = directory / "checkpoints"
    return checkpoint.leaves(folder, checkpoint.latest(folder))


def test_every_method_has_an_experiment(tmp_path):
    assert {made(name, tmp_path).method.name for name in EXPERIMENTS} == METHODS.keys()


@pytest.mark.parametrize("experiment", EXPERIMENTS)
def test_a_deployment_ends_with_the_bits_of_the_simulation(experiment, tmp_path):
    config = made(experiment, tmp_path / "there")

    def fleet_of(enrol, names, sizes):
        return InProcess(enrol, names, tmp_path / "sites")

    if experiment == "centralised":
        with pytest.raises(InputError, match="footage stays at its site"):
            server.site_names(resolved(config))
        return
    if experiment == "fedreid_edges":
        with pytest.raises(InputError, match="a site is a client"):
            server.site_names(resolved(config))
        return
    there = server.run(config, quiet(), "again", fleet_of)
    here = made(experiment, tmp_path / "here")
    here.client_map = "loop"
    here = train.run(here, quiet())
    deployed, simulated = leaves(tmp_path / "there"), leaves(tmp_path / "here")
    of_server = [path for path in simulated if path.startswith("server")]
    assert of_server and [p for p in of_server if deployed[p].tobytes() != simulated[p].tobytes()] == []
    for key in ("clients", "mean", "after", "validation", "refused"):
        assert there[key] == here[key], key
    for way in ("up", "down", "total"):
        assert there["bytes"][way] == here["bytes"][way]
