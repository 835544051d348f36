"""Settings that must stand before JAX is imported, and what several test files share."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest

# Run by a Python that has PyTorch.
collect_ignore = ["torch_networks.py"]

os.environ["JAX_PLATFORMS"] = "cpu"
# The multi-device tests run on four virtual CPU devices.
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=4".strip()

# Compiling takes most of the suite's time. The cache holds executable code, so nobody else may write to it; without a
# home to write to, the suite runs without it.
_CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fedklpr_jax" / "tests"
with contextlib.suppress(OSError):
    _CACHE.mkdir(parents=True, exist_ok=True)
    _CACHE.chmod(0o700)
    os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(_CACHE))
    os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.5")


@pytest.fixture(scope="module")
def compiled_in_a_hurry() -> Iterator[None]:
    """For modules whose programs run for milliseconds and compile for seconds."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)
    # What was compiled like this has other last bits: no later test may meet it.
    jax.clear_caches()


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """The folder of the real data sets, which lies beside the checkout and is no part of it."""
    folder = Path(__file__).resolve().parents[1].parent / "shared" / "data"
    if not folder.is_dir():
        pytest.skip("the data sets are not here: ../shared/data beside the checkout is missing")
    return folder
