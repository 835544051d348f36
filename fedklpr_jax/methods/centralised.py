"""Centralised training: all images in one place, one model, the upper bound of every federated table.

Nothing crosses the wire of a federation because the pictures themselves have been moved, which is what federated
training exists to avoid; the ledger does not count them. `assembly.py` pools the clients' images into one client.
"""

from __future__ import annotations

from fedklpr_jax.federated import Method


def make() -> Method:
    """One client that keeps everything."""
    return Method("centralised", is_local=lambda path: True)
