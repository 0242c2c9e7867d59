"""Rows of the history in compiled code: written together, which short steps feel."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

# Slices at a counter that is never negative, which a plain index would ask about.


def row_of(known: tuple[Any, ...], i: Any) -> tuple[Any, ...]:
    """The i-th row of each of some arrays."""
    at = jnp.asarray(i, jnp.int32)
    return jax.tree.map(
        lambda a: lax.dynamic_slice(
            a, (at, jnp.zeros_like(at)), (1, a.shape[1]), allow_negative_indices=False
        )[0],
        known,
    )


def write(buffer: Any, value: Any, i: Any) -> Any:
    """`buffer` with `value` as its i-th row."""
    return lax.dynamic_update_slice(
        buffer, value[None], (i, *[jnp.zeros_like(i)] * value.ndim), allow_negative_indices=False
    )


_WORDS = tuple(map(jnp.dtype, (jnp.float32, jnp.int32, jnp.uint32)))  # travel as integers


def _as(value: Any, dtype: Any) -> Any:
    return value if value.dtype == dtype else lax.bitcast_convert_type(value, dtype)


def packing(shapes: Any) -> tuple[Any, ...]:
    """Scalars of one size as one vector, and back: one write of the history, not one a column, and
    one array of the state from step to step, which short steps feel.
    """
    leaves, treedef = jax.tree.flatten(shapes)
    groups: dict[Any, Any] = {}
    for place, leaf in enumerate(leaves):
        if not leaf.shape and not jnp.issubdtype(leaf.dtype, jax.dtypes.extended):
            groups.setdefault(
                jnp.dtype(jnp.int32) if leaf.dtype in _WORDS else leaf.dtype, []
            ).append(place)
    rest = [
        place
        for place, leaf in enumerate(leaves)
        if not any(place in places for places in groups.values())
    ]

    def pack(row):
        row = jax.tree.leaves(row)
        return [
            jnp.stack([_as(row[place], dtype) for place in places])
            for dtype, places in groups.items()
        ], [row[place] for place in rest]

    def unpack(packed):
        out: list[Any] = [None] * len(leaves)
        for vector, places in zip(packed[0], groups.values(), strict=True):
            for i, place in enumerate(places):
                out[place] = _as(vector[i], leaves[place].dtype)
        for value, place in zip(packed[1], rest, strict=True):
            out[place] = value
        return treedef.unflatten(out)

    return pack, unpack
