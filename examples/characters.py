"""A small character transformer and pieces of text for it, which several examples share."""

from __future__ import annotations

import functools

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

LENGTH, WIDTH, HEADS, LAYERS = 32, 48, 4, 1


def norm(x):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + 1e-5)


def logits(params, tokens, last=False):
    """Of the next characters: ``[rows, LENGTH, symbols]`` for codes ``[rows, LENGTH]`` or one more,
    which is not read; after the last of these alone, ``[rows, 1, symbols]``, if `last`."""
    x = params["embed"][tokens[:, :LENGTH]] + params["place"]
    mask = jnp.tril(jnp.ones((LENGTH, LENGTH), bool))
    for number, layer in enumerate(params["layers"], 1):
        parts = (norm(x) @ layer["qkv"]).reshape(*x.shape[:2], 3, HEADS, WIDTH // HEADS)
        query, key, value = (parts[:, :, i] for i in range(3))
        if last and number == len(params["layers"]):
            x, query, mask = x[:, -1:], query[:, -1:], mask[-1:]
        weights = jnp.einsum("bihd,bjhd->bhij", query, key) * (WIDTH // HEADS) ** -0.5
        mixed = jnp.einsum(
            "bhij,bjhd->bihd", jax.nn.softmax(jnp.where(mask, weights, -1e9), -1), value
        )
        x = x + mixed.reshape(x.shape) @ layer["out"]
        x = x + jax.nn.gelu(norm(x) @ layer["up"]) @ layer["down"]
    return norm(x) @ params["head"]


def loss(logits, tokens):
    """The mean loss of each row."""
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits, tokens[:, 1:]), -1)


def losses(params, tokens):
    """The mean loss of each row of codes, ``[rows, LENGTH + 1]``."""
    return loss(logits(params, tokens), tokens)


def transformer(key, symbols):
    keys = iter(jax.random.split(key, 3 + 4 * LAYERS))
    normal = lambda *shape: jax.random.normal(next(keys), shape) * shape[0] ** -0.5
    layer = lambda: {
        "qkv": normal(WIDTH, 3 * WIDTH),
        "out": normal(WIDTH, WIDTH),
        "up": normal(WIDTH, 4 * WIDTH),
        "down": normal(4 * WIDTH, WIDTH),
    }
    layers = [layer() for _ in range(LAYERS)]
    return {
        "embed": normal(symbols, WIDTH),
        "place": normal(LENGTH, WIDTH),
        "head": normal(WIDTH, symbols),
        "layers": layers,
    }


@functools.cache
def texts():
    return data.text_domains()


def alphabet():
    """All characters of the six kinds of text, in order."""
    return sorted(set("".join(text[:200_000] for text in texts().values())))


def pieces(kind, count, seed, skip=0):
    """The alphabet, and `count` random pieces of one kind of text as codes ``[count, LENGTH +
    1]``."""
    symbols = alphabet()
    codes = {character: code for code, character in enumerate(symbols)}
    text = texts()[kind][skip : skip + 200_000]
    rows = np.array([codes.get(character, 0) for character in text], np.int32)
    rows = rows[: len(rows) // (LENGTH + 1) * (LENGTH + 1)].reshape(-1, LENGTH + 1)
    return symbols, rows[np.random.default_rng(seed).permutation(len(rows))[:count]]
