"""A whole federation on this machine: a SuperLink and SuperNodes on loopback, with TLS and authenticated nodes.

    python -m fedklpr_jax.deploy.loopback --config=experiments/fedklpr.py --config.data.clients=plaza,arena,harbour

Makes certificates and keys, starts everything, runs the federation to its end, shows what the server says, and stops
everything it started. The sites keep their states in `sites` in the run's directory. How the same is done by hand on
several machines says docs/deploy.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections
import psutil

from fedklpr_jax import config as settings
from fedklpr_jax.cli import parse
from fedklpr_jax.deploy.certificates import HOST, make_certificates, make_node_key
from fedklpr_jax.deploy.server import site_names
from fedklpr_jax.errors import InputError
from fedklpr_jax.train import directory_of

APP = Path(__file__).parent / "app"
# How Flower shows the line of a server that ended over a person's mistake.
_MISTAKE = re.compile(r"(\x1b\[\d+m)?ERROR\s*(\x1b\[0m)?\s*:\s+error: ")


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


class Counter:
    """Passes connections on to a port and counts the bytes both ways: what Flower and TLS really send.

    Connections lie in threads of the process; nothing is read or kept.
    """

    def __init__(self, target: int) -> None:
        self.up = self.down = 0
        self._target, self._lock = target, threading.Lock()
        self._listener = socket.create_server((HOST, 0))
        self.port = int(self._listener.getsockname()[1])
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                threading.Thread(target=self._join, args=(near,), daemon=True).start()

    def _join(self, near: socket.socket) -> None:
        """Connects to the target, which may be starting again: a line cut while they greet each other ends a node."""
        ends = time.monotonic() + 30
        while True:
            try:
                far = socket.create_connection((HOST, self._target))
                break
            except OSError:
                if time.monotonic() > ends:
                    near.close()
                    return
                time.sleep(0.2)
        threading.Thread(target=self._pass_on, args=(near, far, "up"), daemon=True).start()
        self._pass_on(far, near, "down")

    def _pass_on(self, source: socket.socket, target: socket.socket, way: str) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(1 << 16):
                target.sendall(data)
                with self._lock:
                    setattr(self, way, getattr(self, way) + len(data))
        for end in (source, target):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
            end.close()

    def close(self) -> None:
        """Takes no more connections."""
        self._listener.close()


@dataclasses.dataclass
class Loopback:
    """One SuperLink on loopback and the SuperNodes that were started for it; `loopback` makes one.

    Attributes:
      folder: certificates, keys, logs and Flower's memory.
      sites: a folder of each site, with its states.
      port: where the SuperLink listens.
      counter: what passes between it and the SuperNodes.
    """

    folder: Path
    sites: Path
    port: int
    counter: Counter
    environment: Mapping[str, str]
    link: subprocess.Popen[bytes] | None = None
    nodes: dict[str, subprocess.Popen[bytes]] = dataclasses.field(default_factory=dict)

    def start_link(self) -> None:
        """Starts the SuperLink, whose memory is in `link.db`, and waits until it listens."""
        folder = self.folder
        self.link = self._start(
            "link", "flower-superlink", "--ssl-certfile", folder / "server.pem", "--ssl-keyfile", folder / "server.key",
            "--ssl-ca-certfile", folder / "ca.pem", "--enable-supernode-auth", "--host", HOST, "--port", self.port,
            "--database", folder / "link.db", "--disable-runtime-dependency-installation",
        )  # fmt: skip
        self._wait_for(self.port, self.link, "link")

    def register(self, name: str) -> None:
        """Makes a key for a node and tells the SuperLink of it."""
        make_node_key(self.folder, name)
        self.flwr("supernode", "register", self.folder / f"{name}.pub", "local", "--name", name)

    def start_node(self, name: str, *, key: str = "", **config: str) -> None:
        """Starts the SuperNode of a site; `key` is the name of the key it shows, its own if empty."""
        told = {"name": name, "folder": self.sites / name, **config}
        self.nodes[name] = self._start(
            f"node-{name}", "flower-supernode", "--root-certificates", self.folder / "ca.pem",
            "--superlink", f"{HOST}:{self.counter.port}", "--auth-supernode-private-key",
            self.folder / f"{key or name}.key", "--node-config", " ".join(f'{k}="{v}"' for k, v in told.items()),
            "--host", HOST, "--port", free_port(),
        )  # fmt: skip

    def revive(self) -> None:
        """Starts those SuperNodes again that have ended, as a service manager does."""
        for name, process in self.nodes.items():
            if process.poll() is not None:
                self.start_node(name)

    def run(self, config: str, flags: Sequence[str]) -> subprocess.Popen[str]:
        """Starts the run and gives the process that shows what its server says."""
        told = f"config='{Path(config).absolute()}' flags='{shlex.join(flags)}'"
        command = [self._program("flwr"), "run", str(APP), "local", "--stream", "--run-config", told]
        return subprocess.Popen(
            command, env=dict(self.environment), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def flwr(self, *arguments: object) -> str:
        """Runs a `flwr` command to its end.

        Raises:
          RuntimeError: it failed.
        """
        command = [self._program("flwr"), *map(str, arguments)]
        done = subprocess.run(command, env=dict(self.environment), capture_output=True, text=True, timeout=120)
        if done.returncode:
            raise RuntimeError(f"{shlex.join(command)}: {done.stdout}{done.stderr}")
        return done.stdout

    def stop(self, *processes: subprocess.Popen[bytes] | None, number: int = signal.SIGTERM) -> None:
        """Sends processes a signal and kills what is left of them and of all that they started, sessions of their own
        too."""
        here = [process for process in processes if process and process.poll() is None]
        trees: list[psutil.Process] = []
        for process in here:
            with contextlib.suppress(psutil.NoSuchProcess):
                # Looked up before the signal: what a dead process had started can no longer be found.
                trees += [*psutil.Process(process.pid).children(recursive=True), psutil.Process(process.pid)]
        for each in trees:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.send_signal(number)
        for each in psutil.wait_procs(trees, 20)[1]:
            with contextlib.suppress(psutil.NoSuchProcess):
                each.kill()
        for process in here:
            process.wait()

    def close(self) -> None:
        """Stops everything."""
        self.stop(*self.nodes.values(), self.link)
        self.counter.close()

    def log(self, name: str) -> str:
        """What `link` or `node-NAME` has said so far."""
        return (self.folder / f"{name}.log").read_text(errors="replace")

    def _program(self, name: str) -> str:
        return str(Path(sys.executable).parent / name)

    def _start(self, name: str, program: str, *arguments: object) -> subprocess.Popen[bytes]:
        with open(self.folder / f"{name}.log", "ab") as log:
            return subprocess.Popen(
                [self._program(program), *map(str, arguments)], env=dict(self.environment), stdin=subprocess.DEVNULL,
                stdout=log, stderr=log, start_new_session=True,
            )  # fmt: skip

    def _wait_for(self, port: int, process: subprocess.Popen[bytes], name: str) -> None:
        for _ in range(600):
            if process.poll() is not None:
                raise RuntimeError(f"{name} ended with status {process.returncode}: {self.log(name)[-2000:]}")
            with contextlib.suppress(OSError), socket.create_connection((HOST, port), 1):
                return
            time.sleep(0.1)
        raise RuntimeError(f"{name} does not listen on port {port} after a minute")


@contextlib.contextmanager
def loopback(folder: Path, sites: Path) -> Iterator[Loopback]:
    """A running SuperLink; everything started is stopped in the end.

    Args:
      folder: for certificates, keys and logs; absolute, as Flower's programs take it.
      sites: for the states of the sites; absolute.
    """
    folder.mkdir(parents=True, exist_ok=True)
    make_certificates(folder)
    port, home = free_port(), folder / "flower"
    home.mkdir(exist_ok=True)
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "local"\n\n[superlink.local]\naddress = "{HOST}:{port}"\n'
        f'root-certificates = "{folder / "ca.pem"}"\n'
    )
    # Flower starts programs of its own by name, which import this very library, installed or not.
    paths = {"PATH": Path(sys.executable).parent, "PYTHONPATH": Path(__file__).parents[2]}
    found = {name: f"{first}{os.pathsep}{os.environ.get(name, '')}" for name, first in paths.items()}
    environment = {**os.environ, **found, "FLWR_HOME": str(home), "FLWR_TELEMETRY_ENABLED": "0"}
    net = Loopback(folder, sites, port, Counter(port), environment)
    try:
        net.start_link()
        yield net
    finally:
        net.close()


def federate(net: Loopback, config: ml_collections.ConfigDict, file: str, flags: Sequence[str]) -> int:
    """Starts a SuperNode for every client, runs the federation to its end and shows what its server says.

    Args:
      net: with a running SuperLink.
      config: the valid, resolved settings that `file` and `flags` amount to.
      file: the configuration file.
      flags: the other flags of `experiments/run.py`.

    Returns:
      The exit status: 0 done, 1 the run failed, 2 the server refused what it was given.
    """
    names = site_names(config)
    root = {"root": str(Path(config.data.root).absolute())} if config.data.root else {}
    for name in names:
        net.register(name)
        net.start_node(name, **root)
    print(f"started {len(names)} SuperNodes: {', '.join(names)}", flush=True)
    process, done = net.run(file, flags), False
    assert process.stdout
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            # Flower shows the log of a run long after its end.
            if _MISTAKE.match(line):
                return 2
            done |= line.startswith("wrote ") and line.rstrip().endswith("summary.json")
            if done and line.rstrip().endswith("checkpoints"):
                return 0
    finally:
        process.kill()
    return 1


@contextlib.contextmanager
def _stopping_in_good_order() -> Iterator[None]:
    """Makes the first Ctrl-C or SIGTERM a KeyboardInterrupt; a second must not cut the stopping short."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def stop(number: int, frame: Any) -> None:
        for each in numbers:
            signal.signal(each, signal.SIG_IGN)
        raise KeyboardInterrupt

    before = [signal.signal(number, stop) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            signal.signal(number, handler)


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 1 the run failed, 2 bad input, 130 interrupted."""
    parser = argparse.ArgumentParser(prog="python -m fedklpr_jax.deploy.loopback", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where certificates, keys and logs go; default: deleted")
    own, flags = parser.parse_known_args(arguments)
    try:
        if importlib.util.find_spec("flwr") is None:
            raise InputError("Flower is not installed; type: pip install 'fedklpr_jax[flower]'")
        config = parse(flags)
        settings.validate(config)
        config = settings.resolved(config)
        site_names(config)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    # As `parse` takes it: one dash or two, and the last counts.
    file = [flag.split("=", 1)[1] for flag in flags if re.match(r"--?config=", flag)][-1]
    rest = [flag for flag in flags if not re.match(r"--?config=", flag)]
    try:
        with _stopping_in_good_order(), contextlib.ExitStack() as closing:
            folder = own.folder or Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="fedklpr-loopback-")))
            print("starting the SuperLink", flush=True)
            # Beside the results, for the same command goes on from both.
            sites = (directory_of(config) / "sites").absolute()
            net = closing.enter_context(loopback(folder.absolute(), sites))
            status = federate(net, config, file, rest)
            if status == 0:
                down, up = net.counter.down / 1e6, net.counter.up / 1e6
                print(f"through the connections, Flower and TLS included: {down:.1f} MB down, {up:.1f} MB up")
    except KeyboardInterrupt:
        print("interrupted: everything is stopped; go on with the same command", flush=True)
        return 130
    return status


if __name__ == "__main__":
    sys.exit(main())
