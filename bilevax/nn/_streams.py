"""A check that all modules here share."""

from __future__ import annotations

from typing import Any

from flax import nnx

from bilevax import check


def streams(rngs: Any) -> Any:
    """``nnx.Rngs``, of which parameters are drawn."""
    if not isinstance(rngs, nnx.Rngs):
        raise TypeError(f"rngs: got {check.describe(rngs)}; expected nnx.Rngs. Try nnx.Rngs(0).")
    return rngs
