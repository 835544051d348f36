"""How many programs JAX has made in this process, compiled or taken from its cache.

Shapes do not change from round to round: after the first rounds the number stands still, which the log of a run shows.
"""

from __future__ import annotations

from typing import Any

import jax

# JAX reports this once for every program, also for one that it finds in the cache.
_EVENT = "/jax/core/compile/backend_compile_duration"
_made = 0


def _count(event: str, duration_secs: float, **details: Any) -> None:
    global _made
    _made += event == _EVENT


jax.monitoring.register_event_duration_secs_listener(_count)


def programs_made() -> int:
    """Programs made since this module was imported.

    >>> before = programs_made()
    >>> _ = jax.jit(lambda x: x + 1.25)(2.5), jax.jit(lambda x: x + 1.25)(3.5)
    >>> programs_made() - before
    2
    """
    return _made
