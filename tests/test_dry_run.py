"""What a run is expected to be, against what is counted by hand and what a run then does."""

import io

import jax
import numpy as np
import pytest

from fedklpr_jax import config as settings
from fedklpr_jax import dry_run, train
from fedklpr_jax.assembly import make_federation
from fedklpr_jax.cli import main
from fedklpr_jax.console import Console
from tests.federations import tiny_config, write_shapes


def shapes(out, **more):
    config = settings.default_config()
    config.method.name, config.task.name, config.model.arch = "fedavg", "classification", "cnn"
    config.data.source, config.data.root = "folder", write_shapes(out.with_name("pictures"))
    config.data.count, config.data.least, config.out = 3, 20, str(out)
    config.rounds, config.epochs, config.eval.every, config.participation = 4, 2, 3, 1.0
    config.update_from_flattened_dict({path.replace("__", "."): value for path, value in more.items()})
    return config


def expected(config):
    return dry_run.expected(make_federation(settings.resolved(config), Console(io.StringIO())))


def test_counts_are_those_by_hand(tmp_path):
    config = shapes(tmp_path / "run")
    federation = make_federation(settings.resolved(config), Console(io.StringIO()))
    found = dry_run.expected(federation)
    # Two 5 x 5 convolutions (28 -> 24 -> 12 -> 8 -> 4), a dense layer of 512, ten classes, with biases.
    assert found.parameters == found.shared == (25 * 32 + 32) + (25 * 32 * 64 + 64) + (1024 * 512 + 512) + (5120 + 10)
    own = [federation.task.plan(config.seed, 0, client, 1).shape[1] for client in range(3)]
    # Four rounds of two epochs, and the two epochs before the last test.
    assert found.steps == (4 * 2 + 2) * sum(own)
    # Down and up in every round, and the last download.
    assert found.bytes_sent == 4 * found.parameters * (2 * 3 * 4 + 3)
    # Tests at the start, after round 3, and two at the end.
    assert found.tested == 4 * sum(len(share.test) for share in federation.dealt.shares)


def test_operations_are_those_of_one_step(tmp_path):
    federation = make_federation(settings.resolved(shapes(tmp_path / "run")), Console(io.StringIO()))
    task, found = federation.task, dry_run.expected(federation)

    def step(arrays, variables, rows, key):
        images = task.inputs(arrays, rows)

        def objective(params):
            outputs, _ = task.forward(variables | {"params": params}, images, task.clients[0], True, key)
            return task.loss(arrays, outputs, rows, task.clients[0])

        return jax.grad(objective)(variables["params"])

    shapes_of = jax.eval_shape(lambda: (task.init(jax.random.key(0)), jax.random.key(0)))
    rows = jax.ShapeDtypeStruct((found.batch,), np.int32)
    counted = jax.jit(step).lower(task.arrays, shapes_of[0], rows, shapes_of[1]).cost_analysis()["flops"]
    # What is more is the optimiser: some operations for every parameter.
    assert counted < found.flops < counted + 40 * found.parameters
    # As direct convolutions, forward and twice that backward; tiles need fewer, patches as many.
    direct = 3 * found.batch * (24**2 * 25 * 32 * 2 + 8**2 * 25 * 32 * 64 * 2 + 1024 * 512 * 2 + 5120 * 2)
    assert 0.2 * direct < found.flops < 1.2 * direct


def test_what_a_run_logs_is_what_was_expected(tmp_path):
    config = shapes(tmp_path / "run", rounds=2)
    found = expected(config)
    summary = train.run(config, Console(io.StringIO()))
    # What goes through the wire format is compressed; its dense size is not.
    assert summary["bytes"]["raw_total"] == found.bytes_sent
    assert 0.5 < summary["bytes"]["dense_total"] / found.bytes_sent < 1.1


@pytest.mark.parametrize(
    ("method", "task", "more"),
    [("fedklpr", "unsupervised", {"model__weights": "random"}), ("cahfp", "supervised", {})],
)
def test_every_kind_of_federation_can_be_estimated(method, task, more):
    config = tiny_config(method, task__name=task, data__clients="arena,harbour", **more)
    found = expected(config)
    assert found.flops > 1e6 and found.activations > 1e4 and found.steps > 10 and found.memory > 1e9
    assert (found.shared < found.parameters) == (method != "fedklpr" or config.method.bn.statistics == "local")


def test_the_command_tells_and_writes_nothing(tmp_path, capsys):
    arguments = ["--config=experiments/fedklpr.py", "--config.data.clients=arena,harbour", "--config.dry_run=True"]
    assert main([*arguments, f"--config.out={tmp_path / 'run'}"]) == 0
    said = capsys.readouterr().out
    for words in ("arena: 220 images to train on", "2 of 2 clients a round", "time: about", "memory: about", "at most"):
        assert words in said
    assert "nothing was run or written" in said and not (tmp_path / "run").exists()
