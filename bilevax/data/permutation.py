"""A pseudo-random order of which any place can be reached without building it."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from bilevax._core.types import Key


def permuted(key: Key, places: jax.Array, total: int) -> jax.Array:
    """Images of `places` (uint32, below `total`) under a pseudo-random permutation of
    ``range(total)`` chosen by `key`.

    A six-round Feistel network on as many bits as `total` needs, walked along its cycle until it
    lands below `total`. It reaches any place of an epoch's order without building the order, so a
    run resumes at any step exactly and a draw costs O(batch), not O(total log total).

    Args:
      key: PRNG key.
      places: uint32 array.
      total: number of entries, at least 1.

    Returns:
      uint32 array of the same shape.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> order = permuted(jax.random.key(0), jnp.arange(10, dtype=jnp.uint32), 10)
      >>> sorted(order.tolist()) == list(range(10))
      True

    Source: Black and Rogaway, "Ciphers with arbitrary finite domains" (CT-RSA 2002), section 4,
    cycle walking.
    """
    return walk(round_keys(key), places, total)


def round_keys(key: Key) -> jax.Array:
    """The six keys of one permutation."""
    return jax.random.bits(key, (6,), jnp.uint32)


def walk(keys: jax.Array, places: jax.Array, total: int) -> jax.Array:
    """Images of `places` under the permutation of these keys."""
    bits = (total - 1).bit_length()
    widths = bits // 2, bits - bits // 2  # of the two halves, which change places in each round

    def mix(value):  # a 32-bit finaliser: every input bit reaches every output bit
        value = (value ^ (value >> jnp.uint32(16))) * jnp.uint32(0x7FEB352D)
        value = (value ^ (value >> jnp.uint32(15))) * jnp.uint32(0x846CA68B)
        return value ^ (value >> jnp.uint32(16))

    def network(place):
        left, right = place >> jnp.uint32(widths[1]), place & jnp.uint32(2 ** widths[1] - 1)
        for k in range(6):
            left, right = right, left ^ (mix(right ^ keys[k]) & jnp.uint32(2 ** widths[k % 2] - 1))
        return (left << jnp.uint32(widths[1])) | right

    limit = jnp.uint32(total)
    return jax.lax.while_loop(
        lambda p: jnp.any(p >= limit),
        lambda p: jnp.where(p >= limit, network(p), p),
        network(places),
    )
