"""Runs one federation: `python experiments/run.py --config=experiments/fedklpr.py [--config.FIELD=VALUE ...]`."""

import sys
from pathlib import Path

# So that the command works from any folder of a clone, installed or not.
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from fedklpr_jax.cli import main  # noqa: E402

if __name__ == "__main__":
    sys.exit(main())
