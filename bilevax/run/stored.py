"""Leaves of a run as a checkpoint holds them: by path, plain, with a line that describes each."""

from __future__ import annotations

import json
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax.base import PyTree

RECOVERY = "recovery"  # begins the paths of what failures may go back to


def part(path: str) -> str:
    """The part of a state that a leaf belongs to, which is taken whole or not at all."""
    depth = 3 if path.startswith(".algorithm.inner.") else 2 if path.startswith(".algorithm") else 1
    return "".join(re.findall(r"\.\w+", path)[:depth]) or path


def plain(leaf: Any) -> Any:
    """A leaf as an array that can be written: PRNG keys as their data."""
    return jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf


def flat(value: PyTree) -> dict[str, Any]:
    """Leaves by path."""
    return {
        jax.tree_util.keystr(path): leaf
        for path, leaf in jax.tree_util.tree_leaves_with_path(value)
    }


def flat_state(run: PyTree, recovery: dict[Any, Any]) -> dict[str, Any]:
    """The leaves of a run and of what its failures may go back to."""
    return flat(run) | {RECOVERY + path: leaf for path, leaf in flat(recovery).items()}


def filled(like: PyTree, leaves: dict[str, Any], prefix: str = "") -> PyTree:
    """`like` with these plain leaves, placed and typed as its own were."""
    out = []
    for path, old in flat(like).items():
        new = leaves[prefix + path]
        # What was on no particular device before must not be bound to one now: the step would be
        # compiled again.
        new = new if plain(old).committed else jnp.asarray(np.asarray(new))
        keyed = jnp.issubdtype(old.dtype, jax.dtypes.prng_key)
        out.append(jax.random.wrap_key_data(new, impl=jax.random.key_impl(old)) if keyed else new)
    return jax.tree.structure(like).unflatten(out)


def place(leaf: Any) -> jax.ShapeDtypeStruct:
    """What is to be read in its place."""
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding)


def describes(leaf: Any, text: str) -> bool:
    """Whether `text` is of this leaf."""
    return leaf is not None and describe(leaf) == text


def describe(leaf: Any) -> str:
    """A leaf's dtype and shape."""
    return f"{leaf.dtype}{list(leaf.shape)}"


class Damaged(Exception):
    """A checkpoint that does not give back what was saved."""


def numbered(leaves: dict[Any, Any], rows: dict[Any, Any]) -> dict[Any, Any]:
    """Names that any storage takes, in the order of the manifest; arrays without entries are left
    out.
    """
    out = {
        f"s{i}": leaf
        for i, leaf in enumerate(leaves.values())
        if np.prod(leaf.shape, dtype=np.int64)
    }
    return out | {f"h{i}": column for i, column in enumerate(rows.values()) if column.size}


def size(text: str) -> int:
    """Bytes of what `text` describes."""
    dtype, shape = text.split("[", 1)
    return jnp.dtype(dtype).itemsize * math.prod(json.loads("[" + shape))


def empty(text: str) -> np.ndarray:
    """Zeros of what `text` describes."""
    dtype, shape = text.split("[", 1)
    return np.zeros(json.loads("[" + shape), jnp.dtype(dtype))
