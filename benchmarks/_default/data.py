"""Data, losses and networks that the problems are made of."""

from __future__ import annotations

import functools
import itertools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from sklearn import datasets

cross_entropy = optax.softmax_cross_entropy_with_integer_labels


class Problem(NamedTuple):
    """A bilevel problem as a user would state it; `batch` has the sizes of sampled batches, `test`
    what the returned model is judged on."""

    inner: Any
    outer: Any
    y: Any
    x: Any
    train: Any
    held_out: Any
    project: Any = None
    batch: tuple | None = None
    model: Any = None
    network: bool = False
    test: Any = None


def standard(features):
    return (features - features.mean(0)) / (features.std(0) + 1e-9)


def part(x, y, start, stop, numbered=False):
    """Rows `start` to `stop` as a batch; `numbered` rows know their index, for a weight each."""
    rows = {"x": jnp.asarray(x[start:stop]), "y": jnp.asarray(y[start:stop])}
    return rows | ({"i": jnp.arange(stop - start)} if numbered else {})


@functools.cache
def digits():
    found = datasets.load_digits()
    order = np.random.RandomState(0).permutation(len(found.target))
    return (found.data[order] / 16.0).astype(np.float32), found.target[order].astype(np.int32)


@functools.cache
def cancer():
    found = datasets.load_breast_cancer()
    order = np.random.RandomState(0).permutation(len(found.target))
    return standard(found.data[order]).astype(np.float32), found.target[order].astype(np.float32)


@functools.cache
def diabetes():
    """442 rows of ten features, and ten more of noise."""
    found, rng = datasets.load_diabetes(), np.random.RandomState(3)
    order = np.random.RandomState(0).permutation(442)
    features = np.concatenate([standard(found.data[order]), rng.randn(442, 10)], 1).astype(
        np.float32
    )
    return features, standard(found.target[order]).astype(np.float32)


def moons(n, seed=0):
    """Two moons, and two features of noise."""
    x, y = datasets.make_moons(n, noise=0.15, random_state=seed)
    return np.concatenate([x, np.random.RandomState(seed).randn(n, 2)], 1).astype(
        np.float32
    ), y.astype(np.int32)


def flipped(labels, share, classes, seed=1):
    """Labels of which a share is drawn anew."""
    rng, labels = np.random.RandomState(seed), labels.copy()
    chosen = rng.rand(len(labels)) < share
    labels[chosen] = rng.randint(0, classes, chosen.sum())
    return labels


def logistic(w, b):
    return jnp.mean(jax.nn.softplus(-(2 * b["y"] - 1) * (b["x"] @ w["w"] + w["b"])))


def squares(w, b):
    return jnp.mean((b["x"] @ w - b["y"]) ** 2)


def affine(features):
    return {"w": jnp.zeros(features), "b": jnp.zeros(())}


def layers(sizes, seed=0):
    """He's start; the last layer a little smaller."""
    rng = np.random.RandomState(seed)
    pairs = list(itertools.pairwise(sizes))
    last = [0.7 if b == sizes[-1] else 1.0 for _, b in pairs]
    return [
        {"w": jnp.asarray(rng.randn(a, b) * np.sqrt(2 / a) * s, jnp.float32), "b": jnp.zeros(b)}
        for (a, b), s in zip(pairs, last, strict=True)
    ]


def apply(params, x, act):
    for layer in params[:-1]:
        x = act(x @ layer["w"] + layer["b"])
    return x @ params[-1]["w"] + params[-1]["b"]


def squared_norm(params):
    return sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params))
