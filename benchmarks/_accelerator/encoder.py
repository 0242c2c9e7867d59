"""A transformer as plain functions, its layers scanned: a text classifier of BERT's shape, or a
causal language model."""

from __future__ import annotations

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Shape(NamedTuple):
    vocabulary: int
    width: int
    layers: int
    heads: int
    hidden: int
    length: int
    classes: int = 2
    causal: bool = False


BERT = Shape(30522, 768, 12, 12, 3072, 128)  # 110 million parameters with 512 positions


def init(shape: Shape, key: jax.Array) -> dict[str, Any]:
    """Random float32 weights, a leading axis for the layers."""
    d, n = shape.width, shape.layers
    keys = iter(jax.random.split(key, 8))
    normal = lambda *size: 0.02 * jax.random.normal(next(keys), size)
    scale, shift = (lambda *lead: jnp.ones((*lead, d))), (lambda *lead: jnp.zeros((*lead, d)))
    layers = {
        "qkv": normal(n, d, 3 * d), "qkv_b": jnp.zeros((n, 3 * d)), "out": normal(n, d, d),
        "out_b": shift(n),
        "up": normal(n, d, shape.hidden), "up_b": jnp.zeros((n, shape.hidden)), "down": normal(n,
        shape.hidden, d), "down_b": shift(n),
        "norm1": (scale(n), shift(n)), "norm2": (scale(n), shift(n)),
    }  # fmt: skip
    top = {
        "words": normal(shape.vocabulary, d),
        "positions": normal(512 if shape.length <= 512 else shape.length, d),
        "norm": (scale(), shift()),
    }
    head = (
        {}
        if shape.causal
        else {"head": normal(d, shape.classes), "head_b": jnp.zeros(shape.classes)}
    )
    return {"layers": layers, **top, **head}


def _norm(x, parameters):
    scale, shift = parameters
    x32 = x.astype(jnp.float32)
    mean = jnp.mean(x32, axis=-1, keepdims=True)
    centred = x32 - mean
    var = jnp.mean(centred * centred, axis=-1, keepdims=True)
    return (centred * jax.lax.rsqrt(var + 1e-6) * scale + shift).astype(x.dtype)


def encode(shape: Shape, params: dict, tokens, *, dtype=jnp.bfloat16, remat: bool = False):
    """Hidden states ``(n, t, d)``; normalisation after each block, as in BERT. `remat` keeps only
    the blocks' inputs."""
    n, t = tokens.shape
    x = _norm((params["words"][tokens] + params["positions"][:t]).astype(dtype), params["norm"])

    def block(x, p):
        cast = lambda name: p[name].astype(dtype)
        q, k, v = (
            a.reshape(n, t, shape.heads, -1)
            for a in jnp.split(x @ cast("qkv") + cast("qkv_b"), 3, axis=-1)
        )
        attended = jax.nn.dot_product_attention(q, k, v, is_causal=shape.causal).reshape(x.shape)
        x = _norm(x + attended @ cast("out") + cast("out_b"), p["norm1"])
        inside = jax.nn.gelu(x @ cast("up") + cast("up_b"))
        return _norm(x + inside @ cast("down") + cast("down_b"), p["norm2"]), None

    return jax.lax.scan(jax.checkpoint(block) if remat else block, x, params["layers"])[0]


def class_losses(shape: Shape, params: dict, tokens, labels, **options):
    """A cross entropy a text ``(n,)``, from the mean over its tokens."""
    pooled = jnp.mean(encode(shape, params, tokens, **options).astype(jnp.float32), axis=1)
    return _cross_entropy(pooled @ params["head"] + params["head_b"], labels)


def token_losses(shape: Shape, params: dict, tokens, **options):
    """The mean cross entropy of the next tokens, a text ``(n,)``; the head is the embedding's
    transpose."""
    hidden = encode(shape, params, tokens[:, :-1], **options)
    logits = (hidden @ params["words"].astype(hidden.dtype).T).astype(jnp.float32)
    return jnp.mean(_cross_entropy(logits, tokens[:, 1:]), axis=-1)


def _cross_entropy(logits, labels):
    chosen = jnp.take_along_axis(logits, labels[..., None], axis=-1)[..., 0]
    return jax.nn.logsumexp(logits, axis=-1) - chosen


def weighted(losses, logits, index):
    """Examples weighted by the logistic function of a learned number each."""
    return jnp.mean(jax.nn.sigmoid(logits[index]) * losses)


def texts(shape: Shape, key: jax.Array, rows: int, examples: int) -> dict[str, Any]:
    """Random tokens, labels and the examples' places among `examples`."""
    a, b, c = jax.random.split(key, 3)
    return {
        "tokens": jax.random.randint(a, (rows, shape.length), 0, shape.vocabulary, jnp.int32),
        "labels": jax.random.randint(b, (rows,), 0, shape.classes, jnp.int32),
        "index": jax.random.permutation(c, examples)[:rows].astype(jnp.int32),
    }


def size(params) -> int:
    return sum(leaf.size for leaf in jax.tree.leaves(params))


@partial(jax.jit, static_argnums=0)
def initial(shape: Shape, key):
    return init(shape, key)
