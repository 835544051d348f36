"""Another library in a process of its own, which answers on request: so its calls can be timed in turn with ours."""

from __future__ import annotations

import contextlib
import json
import subprocess
from pathlib import Path
from typing import Any

SCRIPTS = Path(__file__).resolve().parent / "competitors"


class Peer:
    """A script of `competitors/` that reads and answers one JSON value a line."""

    def __init__(self, python: str, script: str, *arguments: str) -> None:
        self.script = script
        command = [python, str(SCRIPTS / f"{script}.py"), *arguments]
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, question: object) -> Any:
        """Its answer to a line.

        Raises:
          RuntimeError: it ended without one.
        """
        assert self.process.stdin and self.process.stdout
        # To a process that has ended nothing can be written; its answer is then empty.
        with contextlib.suppress(BrokenPipeError):
            print(json.dumps(question), file=self.process.stdin, flush=True)
        answer = self.process.stdout.readline()
        if not answer:
            raise RuntimeError(f"{self.script}.py ended with status {self.process.wait()}")
        return json.loads(answer)

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
