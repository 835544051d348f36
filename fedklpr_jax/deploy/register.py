"""What a run knows of its sites, beside its checkpoints."""

from __future__ import annotations

import dataclasses
import json
import secrets
from pathlib import Path

from fedklpr_jax.errors import InputError
from fedklpr_jax.metrics import write_json


@dataclasses.dataclass
class Register:
    """What a run knows of its sites, kept in `sites.json` of its directory: the `run`'s own number, the `sizes` of the
    sites that enrolled before its first round, on which all agree, and of those that came `late`."""

    path: Path
    run: str
    sizes: dict[str, dict[str, int]]
    late: dict[str, dict[str, int]]

    @classmethod
    def of(cls, directory: Path) -> Register:
        """That of the run in `directory`, or a new one.

        Raises:
          InputError: there is one that cannot be read.
        """
        path = directory / "sites.json"
        if not path.exists():
            return cls(path, secrets.token_hex(16), {}, {})
        try:
            found = json.loads(path.read_text(encoding="utf-8"))
            sizes, late = ({name: dict(of) for name, of in found[key].items()} for key in ("sizes", "late"))
            return cls(path, str(found["run"]), sizes, late)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{path}: no readable list of sites; put it back, or give --config.out=OTHER") from error

    def save(self) -> None:
        """Writes `sites.json`."""
        write_json(self.path, {"run": self.run, "sizes": self.sizes, "late": self.late})
