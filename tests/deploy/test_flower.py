"""Real SuperLink and SuperNodes on loopback, with TLS and authenticated nodes: what fails here fails in earnest."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from fedklpr_jax.deploy import certificates, loopback

pytestmark = pytest.mark.processes
pytest.importorskip("flwr", reason="Flower is not installed; pip install 'fedklpr_jax[flower]'")
ROOT = Path(__file__).resolve().parents[2]

FLAGS = (
    "--config.task.name=classification", "--config.data.source=synthetic", "--config.model.arch=cnn",
    "--config.data.count=3", "--config.data.least=20", "--config.participation=1.0", "--config.epochs=1",
    "--config.eval.every=100", "--config.checkpoint.every=1",
)  # fmt: skip


class Run:
    """A run whose server is listened to."""

    def __init__(self, net, out, *flags):
        self.said: list[str] = []
        self._process = net.run(str(ROOT / "experiments" / "fedklpr.py"), [*FLAGS, f"--config.out={out}", *flags])

    def until(self, words, seconds=240):
        """Waits for a line with these words in it."""
        ends = time.monotonic() + seconds
        for line in self._process.stdout:
            self.said.append(line.rstrip())
            if words in line:
                return line.rstrip()
            assert time.monotonic() < ends, self.said
        raise AssertionError(f"ended without {words!r}: {self.said}")

    def close(self):
        self._process.kill()
        self._process.wait()


def rounds_in(out):
    """Completed rounds by the log of a run."""
    path = out / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return [event for event in map(json.loads, lines) if event["event"] == "round"]


def wait_for(ready, seconds=240):
    ends = time.monotonic() + seconds
    while not ready():
        assert time.monotonic() < ends
        time.sleep(0.5)


def test_a_federation_outlives_its_faults(tmp_path):
    """A site comes late, one is killed and comes back, the server is killed and goes on, a stranger is refused."""
    out = tmp_path / "out"
    wanted = ("--config.rounds=5", "--config.deploy.least=2", "--config.deploy.wait=60", "--config.deploy.deadline=90")
    with loopback.loopback(tmp_path / "net", tmp_path / "sites") as net:
        for name in ("c0", "c1", "c2"):
            net.register(name)
        # Its key is as good as the others', but nobody registered it.
        certificates.make_node_key(net.folder, "stranger")
        net.start_node("stranger")
        net.start_node("c0")
        net.start_node("c1")
        run = Run(net, out, *wanted)
        run.until("2 sites are here: c0, c1")
        wait_for(lambda: len(rounds_in(out)) >= 1)
        net.start_node("c2")
        net.stop(net.nodes["c1"], number=signal.SIGKILL)
        wait_for(lambda: len(rounds_in(out)) >= 2)
        net.start_node("c1")
        net.stop(net.link, number=signal.SIGKILL)
        run.close()
        done = len(rounds_in(out))
        net.start_link()
        # A SuperNode whose line is cut while it greets the SuperLink ends.
        time.sleep(5)
        net.revive()
        again = Run(net, out, *wanted)
        again.until("continuing after round")
        again.until("checkpoints")
        again.close()
        stranger = net.log("node-stranger")
        passed = net.counter.up + net.counter.down
    summary = json.loads((out / "summary.json").read_text())
    events = rounds_in(out)
    assert [event["round"] for event in events] == list(range(5)) and 2 <= done <= 5
    assert summary["clients"].keys() == {"c0", "c1", "c2"}
    reasons = {(entry["client"], entry["round"]): entry["reason"] for entry in summary["refused"]}
    assert reasons[("c2", 0)] == "not connected"
    assert ("c1", 1) in reasons and not any(client == "c0" for client, _ in reasons)
    assert all(client in ("c1", "c2") for client, _ in reasons)
    # All three in the last round.
    assert all(row["bytes_up"] for row in events[-1]["clients"].values())
    assert "SuperNode ID" not in stranger
    # A download to a site that was dead by then stayed at the SuperLink; TLS, HTTP and Flower's own messages come on
    # top of all others.
    unread = sum(events[round_]["clients"][client]["bytes_down"] for client, round_ in reasons)
    assert passed > summary["bytes"]["total"] + summary["bytes"]["examinations"] - unread


def test_an_interrupted_federation_leaves_nothing_running_and_goes_on(tmp_path):
    folder, out = tmp_path / "net", tmp_path / "out"
    command = [
        sys.executable, "-u", "-m", "fedklpr_jax.deploy.loopback", f"--folder={folder}",
        f"--config={ROOT / 'experiments' / 'fedklpr.py'}", *FLAGS, "--config.rounds=3", f"--config.out={out}",
    ]  # fmt: skip

    def start():
        return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)

    with start() as process:
        assert any("round 1/3" in line for line in process.stdout)
        process.send_signal(signal.SIGINT)
        said = process.stdout.read()
        assert process.wait() == 130 and "everything is stopped" in said and "Traceback" not in said
    left = [each.info["cmdline"] for each in psutil.process_iter(["cmdline", "environ"])
            if str(folder) in (each.info["environ"] or {}).get("FLWR_HOME", "")]  # fmt: skip
    assert not left
    with start() as process:
        said = process.stdout.read()
        assert process.wait() == 0 and "continuing after round" in said and "connections, Flower and TLS" in said
    assert [event["round"] for event in rounds_in(out)] == [0, 1, 2]
    assert json.loads((out / "summary.json").read_text())["refused"] == []


def test_bad_settings_end_the_command_with_one_line(capsys):
    for flags, words in [
        ([], "--config: missing"),
        (["--config=experiments/fedklpr.py", "--config.data.unseen=mall"], "config.data.unseen: 'mall' is not for"),
        (["--config=experiments/fedklpr.py", "--config.rounds=0"], "config.rounds: 0 is not allowed"),
    ]:
        assert loopback.main([flag.replace("experiments", str(ROOT / "experiments")) for flag in flags]) == 2
        said = capsys.readouterr().err
        assert said.startswith("error: ") and words in said and said.count("\n") == 1
