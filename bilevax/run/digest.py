"""Digests of arrays: a flipped bit anywhere changes them, and they are the same however the arrays
lie on devices.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

_PACKED = tuple(
    map(jnp.dtype, (jnp.uint8, jnp.int8, jnp.uint16, jnp.int16, jnp.bfloat16, jnp.float16))
)


def _bits(leaf: Any, packed: bool) -> Any:
    """The leaf's bits as uint32: 64-bit entries as two along a last axis, `packed` narrow ones
    together where they come out even.
    """
    if jnp.issubdtype(leaf.dtype, jnp.complexfloating):
        leaf = jnp.stack([leaf.real, leaf.imag], -1)
    if (
        packed
        and leaf.dtype in _PACKED
        and leaf.ndim
        and leaf.shape[-1] % (4 // leaf.dtype.itemsize) == 0
    ):
        together = leaf.reshape(
            *leaf.shape[:-1], -1, 4 // leaf.dtype.itemsize
        )  # a fourth or half of the work
        return lax.bitcast_convert_type(together, jnp.uint32)
    if leaf.dtype == jnp.bool_ or (
        jnp.issubdtype(leaf.dtype, jnp.integer) and leaf.dtype.itemsize < 4
    ):
        return leaf.astype(jnp.int32).astype(jnp.uint32)
    size = leaf.dtype.itemsize
    if size >= 4:
        return lax.bitcast_convert_type(leaf, jnp.uint32)
    return lax.bitcast_convert_type(leaf, {1: jnp.uint8, 2: jnp.uint16}[size]).astype(jnp.uint32)


def _mixed(value: Any, constant: int) -> Any:
    value = (value ^ (value >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
    value = (value ^ (value >> jnp.uint32(15))) * jnp.uint32(constant)
    return value ^ (value >> jnp.uint32(16))


@functools.partial(jax.jit, static_argnums=1)
def _digests(leaves: list[Any], packed: bool) -> Any:
    """Two words a leaf: wrapping sums of a bijection of each entry's bits, chosen by its place.
    Sums do not care who holds which part.
    """
    words: list[Any] = []
    for leaf in leaves:
        bits = _bits(leaf, packed)
        place = jnp.zeros(bits.shape, jnp.uint32)
        for axis, length in enumerate(bits.shape):
            place = place * jnp.uint32(length % 2**32) + lax.broadcasted_iota(
                jnp.uint32, bits.shape, axis
            )
        places = [
            (_mixed(place + jnp.uint32(1), constant), constant)
            for constant in (0x846CA68B, 0x9E3779B1)
        ]
        words += [
            jnp.sum(_mixed(bits ^ there, constant), dtype=jnp.uint32) for there, constant in places
        ]
    return words


def words(leaves: list[Any]) -> list[jax.Array]:
    """Two words a leaf as arrays, which nobody waits for."""
    return _digests(leaves, True)


def of_arrays(leaves: list[Any], packed: bool = True) -> list[int]:
    """Two words a leaf, computed where the leaves are; not `packed`, as the first formats of
    checkpoints have them.
    """
    return [int(word) for word in jax.device_get(_digests(leaves, packed))]


def of_columns(columns: dict[str, np.ndarray]) -> str:
    """One digest of named host arrays."""
    total = hashlib.blake2b(digest_size=16)
    for path, column in columns.items():
        total.update(path.encode())
        total.update(np.ascontiguousarray(column).tobytes())
    return total.hexdigest()
