"""Two hosts on one machine: the real command in two processes, against the same on the two devices of one process."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from fedklpr_jax import checkpoint
from fedklpr_jax.config import default_config, validate
from fedklpr_jax.deploy.loopback import free_port
from fedklpr_jax.errors import InputError

ROOT = Path(__file__).resolve().parents[1]
SUMMED = (
    "--config.task.name=classification", "--config.data.count=3", "--config.method.name=fedavg", "--config.rounds=3",
    "--config.epochs=1", "--config.eval.every=2", "--config.data.source=folder", "--config.data.test=0.5",
)  # fmt: skip


@pytest.fixture(scope="module")
def few_pictures(tmp_path_factory) -> str:
    """The setting of a folder with 120 noisy pictures of three classes."""
    random, folder = np.random.default_rng(0), tmp_path_factory.mktemp("pictures")
    labels = random.integers(0, 3, 120)
    pixels = 80 * labels[:, None, None] + random.integers(0, 90, (120, 28, 28))
    np.savez(folder / "pictures.npz", images=pixels.astype(np.uint8), labels=labels)
    return f"--config.data.root={folder}"


def arguments(out: Path, *more: str) -> list[str]:
    cache = os.environ.get("JAX_COMPILATION_CACHE_DIR", str(out.parent / "xla"))
    config = f"--config={ROOT}/experiments/fedklpr.py"
    # Tiles compile longer than these runs take.
    fixed = ("--config.model.convolution=patches", f"--config.compilation_cache={cache}")
    return ["experiments/run.py", config, f"--config.out={out}", *fixed, *more]


def start(command: list[str], devices: int = 1) -> subprocess.Popen[str]:
    """Python in a process of its own, with so many devices."""
    flags = f"--xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment
    )


def pair(out: Path, *more: str, second: tuple[str, ...] = ()) -> list[subprocess.Popen[str]]:
    """The command on both hosts; `second` is for the second one alone."""
    port = free_port()
    return [
        start(arguments(out, *more, *extra, f"--config.hosts=127.0.0.1:{port},2,{index}"))
        for index, extra in enumerate(((), second))
    ]


def ended(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """Status, output and errors of each."""
    texts = [process.communicate(timeout=300) for process in processes]
    return [(process.returncode, *text) for process, text in zip(processes, texts, strict=True)]


def final_bytes(directory: Path) -> np.ndarray:
    """Server and clients of the last checkpoint, end to end."""
    folder = directory / "checkpoints"
    record = checkpoint._read_record(folder, checkpoint.latest(folder))
    return checkpoint._read_buffer((folder / record["data"]).absolute())


def test_two_hosts_killed_once_end_as_one_with_two_devices(tmp_path, few_pictures):
    alone = start(arguments(tmp_path / "one", *SUMMED, few_pictures), devices=2)
    hosts = pair(tmp_path / "two", *SUMMED, few_pictures)
    until = time.monotonic() + 200
    while not (tmp_path / "two" / "checkpoints" / "step-00000001.json").exists():
        assert all(process.poll() is None for process in hosts), ended(hosts)
        assert time.monotonic() < until
        time.sleep(0.01)
    for process in hosts:
        process.send_signal(signal.SIGKILL)
    ended(hosts)
    (status, out, err), (second_status, second_out, second_err) = ended(pair(tmp_path / "two", *SUMMED, few_pictures))
    assert (status, second_status) == (0, 0), err + second_err
    assert "continuing after round" in out and "report.html" in out
    assert "host 1 of 2, counted from 0; host 0 writes the results" in second_out
    assert "report.html" not in second_out
    ((status, _, err),) = ended([alone])
    assert status == 0, err
    one, two = final_bytes(tmp_path / "one"), final_bytes(tmp_path / "two")
    np.testing.assert_array_equal(two, one)


def test_what_hosts_tell_each_other_and_make_together():
    port = free_port()
    alone = start(["-m", "tests.host_of_several", ""], devices=2)
    pair = [start(["-m", "tests.host_of_several", f"127.0.0.1:{port},2,{index}"]) for index in range(2)]
    (_, one, err), (_, first, first_err), (_, second, second_err) = ended([alone, *pair])
    assert one and first and second, err + first_err + second_err
    (told, refused, model), (second_told, second_refused, second_model) = (
        json.loads(out.splitlines()[-1]) for out in (first, second)
    )
    # Bit by bit, two texts.
    assert told == second_told == [True, "naïve", ""]
    data = "host 1: has other data than the first host; give every host the same"
    # The second host has its own error in full, the first as much as travels.
    assert second_refused == ["config.x: " + 600 * "ä", data]
    assert refused == ["host 1: config.x: " + 495 * "ä", data]
    assert model == second_model == json.loads(one.splitlines()[-1])


def test_hosts_with_other_settings_all_end_with_the_same_line(tmp_path, few_pictures):
    second = ("--config.optimizer.learning_rate=0.5",)
    for status, _, err in ended(pair(tmp_path / "run", *SUMMED, few_pictures, second=second)):
        assert status == 2, err
        assert "error: host 1: has other settings than the first host; give every host the same" in err
        assert "Traceback" not in err
    assert not (tmp_path / "run").exists()


def test_an_error_of_one_host_ends_all(tmp_path, few_pictures):
    done = tmp_path / "run"
    done.mkdir()
    (done / "report.html").write_text("finished")
    (status, _, err), (second_status, _, second_err) = ended(pair(done, *SUMMED, few_pictures))
    assert (status, second_status) == (2, 2)
    assert f"error: {done}: holds a finished run" in err
    assert f"error: host 0: {done}: holds a finished run" in second_err


def test_more_hosts_than_clients_are_refused(tmp_path, few_pictures):
    few = [*SUMMED, few_pictures, "--config.participation=0.33"]
    for status, _, err in ended(pair(tmp_path / "run", *few)):
        assert status == 2, err
        assert "error: config.hosts: 2 hosts for 1 clients or devices at a time" in err


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("hosts", "10.0.0.5,2,0", "config.hosts: '10.0.0.5,2,0' is not allowed"),
        ("hosts", "a:1,2,2", "config.hosts: 'a:1,2,2' is not allowed"),
        ("client_map", "loop", "config.client_map: 'loop' is for one host"),
        ("client_states", "disk", "config.client_states: 'disk' is for one host"),
    ],
)
def test_settings_for_several_hosts_are_checked(name, value, said):
    config = default_config()
    config.hosts = "a:1,2,0"
    validate(config)
    config[name] = value
    with pytest.raises(InputError, match=said):
        validate(config)
