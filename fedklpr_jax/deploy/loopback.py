"""A whole federation on this machine: a SuperLink and SuperNodes on loopback, with TLS and authenticated nodes.

    python -m fedklpr_jax.deploy.loopback --config=experiments/fedklpr.py --config.data.clients=plaza,arena,harbour

Makes certificates and keys in a folder of its own, starts everything, runs the federation to its end, shows what the
server says, and stops everything it started. What it does by hand on several machines is docs/deploy.md.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import datetime
import importlib.util
import ipaddress
import os
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

from fedklpr_jax.cli import parse
from fedklpr_jax.config import resolved
from fedklpr_jax.deploy.server import site_names
from fedklpr_jax.errors import InputError

APP = Path(__file__).parent / "app"
HOST = "127.0.0.1"


def free_port() -> int:
    """A port of loopback that nobody listens on."""
    with socket.socket() as found:
        found.bind((HOST, 0))
        return int(found.getsockname()[1])


def make_certificates(folder: Path) -> None:
    """Writes `ca.pem`, and `server.pem` and `server.key` for loopback signed by it: valid a week."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.x509.oid import NameOID

    now = datetime.datetime.now(datetime.UTC)
    issuer = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "fedklpr_jax loopback CA")])
    authority, own = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())

    def certificate(subject: x509.Name, key: ec.EllipticCurvePrivateKey, is_authority: bool) -> bytes:
        builder = (
            x509.CertificateBuilder()
            .subject_name(subject)
            .issuer_name(issuer)
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(hours=1))
            .not_valid_after(now + datetime.timedelta(days=7))
            .add_extension(x509.BasicConstraints(ca=is_authority, path_length=None), critical=True)
        )
        if not is_authority:
            names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address(HOST))]
            builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
        return builder.sign(authority, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)

    (folder / "ca.pem").write_bytes(certificate(issuer, authority, True))
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "localhost")])
    (folder / "server.pem").write_bytes(certificate(subject, own, False))
    private = own.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    _write_secret(folder / "server.key", private)


def make_node_key(folder: Path, name: str) -> None:
    """Writes `NAME.key` and `NAME.pub`, with which a node proves who it is."""
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP384R1())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.OpenSSH, serialization.NoEncryption()
    )
    _write_secret(folder / f"{name}.key", private)
    public = key.public_key().public_bytes(serialization.Encoding.OpenSSH, serialization.PublicFormat.OpenSSH)
    (folder / f"{name}.pub").write_bytes(public)


def _write_secret(path: Path, data: bytes) -> None:
    with open(os.open(path, os.O_CREAT | os.O_WRONLY | os.O_TRUNC, 0o600), "wb") as file:
        file.write(data)


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
      folder: certificates, keys, logs, and a folder of each site.
      port: where the SuperLink listens.
      counter: what passes between it and the SuperNodes.
    """

    folder: Path
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
        told = {"name": name, "folder": self.folder / "sites" / name, **config}
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

    def stop(self, process: subprocess.Popen[bytes] | None, number: int = signal.SIGTERM) -> None:
        """Ends a process and all it started."""
        if process is None:
            return
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            pass
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()

    def close(self) -> None:
        """Stops everything."""
        for process in [*self.nodes.values(), self.link]:
            self.stop(process)
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
def loopback(folder: Path) -> Iterator[Loopback]:
    """A running SuperLink with its certificates in `folder`; everything started is stopped in the end."""
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
    net = Loopback(folder, port, Counter(port), environment)
    try:
        net.start_link()
        yield net
    finally:
        net.close()


def main(arguments: Sequence[str] | None = None) -> int:
    """The command; returns the exit status: 0 done, 1 the run failed, 2 bad input."""
    parser = argparse.ArgumentParser(prog="python -m fedklpr_jax.deploy.loopback", description=__doc__.split("\n")[0])
    parser.add_argument("--folder", type=Path, help="where certificates, keys, logs and states go; default: deleted")
    own, flags = parser.parse_known_args(arguments)
    try:
        if importlib.util.find_spec("flwr") is None:
            raise InputError("Flower is not installed; type: pip install 'fedklpr_jax[flower]'")
        names = site_names(resolved(parse(flags)))
        config = next(flag.split("=", 1)[1] for flag in flags if flag.startswith("--config="))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    rest = [flag for flag in flags if not flag.startswith("--config=")]
    # A relative path would count from where the SuperLink's program happens to run.
    with contextlib.ExitStack() as closing:
        folder = own.folder or Path(closing.enter_context(tempfile.TemporaryDirectory(prefix="fedklpr-loopback-")))
        print("starting the SuperLink", flush=True)
        net = closing.enter_context(loopback(folder.absolute()))
        for name in names:
            net.register(name)
            net.start_node(name)
        print(f"started {len(names)} SuperNodes: {', '.join(names)}", flush=True)
        process = net.run(config, rest)
        assert process.stdout
        done = False
        for line in process.stdout:
            print(line, end="", flush=True)
            done |= line.startswith("wrote ") and line.rstrip().endswith("summary.json")
            if done and line.startswith("wrote ") and line.rstrip().endswith("checkpoints"):
                break
            if line.startswith("error: "):
                break
        process.kill()
        counter = net.counter
        print(f"through the SuperNodes' connections, Flower and TLS included: {counter.down / 1e6:.1f} MB down, "
              f"{counter.up / 1e6:.1f} MB up")
        return 0 if done else 1


if __name__ == "__main__":
    sys.exit(main())
