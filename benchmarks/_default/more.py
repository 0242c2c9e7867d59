"""Ten further problems of the same kinds, written down before anything was tuned on them. Their
limits are the best of three long reference runs."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
from sklearn import datasets

from _default.data import (
    Problem,
    affine,
    apply,
    cancer,
    cross_entropy,
    diabetes,
    flipped,
    layers,
    logistic,
    moons,
    part,
    squared_norm,
    squares,
    standard,
)


def table(load, seed=0):
    found = load()
    order = np.random.RandomState(seed).permutation(len(found.target))
    return standard(found.data[order]).astype(np.float32), found.target[order]


def huber():
    """Regression with outliers, a penalty a feature, the loss smooth."""
    x, y = diabetes()
    y = y + 5 * (np.random.RandomState(8).rand(len(y)) < 0.1).astype(np.float32)
    loss = lambda w, b: jnp.mean(jnp.sqrt(1 + (b["x"] @ w - b["y"]) ** 2) - 1)
    inner = lambda w, t, b: loss(w, b) + jnp.sum(jnp.exp(t) * w * w)
    halves = part(x, y, 0, 80), part(x, y, 80, 200)
    return Problem(inner, lambda w, t, b: loss(w, b), jnp.zeros(20), jnp.full(20, -2.0), *halves)


def poisson():
    """Counts, from inner and outer starts far off."""
    rng = np.random.RandomState(9)
    x = rng.randn(200, 12).astype(np.float32)
    y = rng.poisson(np.exp(0.5 * x[:, :4].sum(1))).astype(np.float32)
    loss = lambda w, b: jnp.mean(jnp.exp(b["x"] @ w) - b["y"] * (b["x"] @ w))
    inner = lambda w, t, b: loss(w, b) + jnp.sum(jnp.exp(t) * w * w)
    halves = part(x, y, 0, 60), part(x, y, 60, 200)
    return Problem(inner, lambda w, t, b: loss(w, b), jnp.full(12, 2.0), jnp.full(12, 3.0), *halves)


def elastic():
    """Two penalties, of a smoothed absolute value and of the square."""
    x, y = diabetes()

    def inner(w, t, b):
        size = jnp.sum(jnp.sqrt(w * w + 1e-4))
        return squares(w, b) + jnp.exp(t[0]) * size + jnp.exp(t[1]) * jnp.sum(w * w)

    halves = part(x, y, 0, 60), part(x, y, 60, 160)
    outer = lambda w, t, b: squares(w, b)
    return Problem(inner, outer, jnp.zeros(20), jnp.asarray([-6.0, -1.0]), *halves)


def wine():
    """Three classes, a penalty a feature above a floor."""
    x, y = table(datasets.load_wine)
    loss = lambda w, b: jnp.mean(cross_entropy(b["x"] @ w["w"] + w["b"], b["y"]))
    floor = lambda t: 1e-3 + jnp.exp(t)[:, None]
    inner = lambda w, t, b: (
        loss(w, b) + 0.5 * jnp.sum(floor(t) * w["w"] ** 2) + 1e-3 * w["b"] @ w["b"]
    )
    start = {"w": jnp.zeros((13, 3)), "b": jnp.zeros(3)}
    halves = part(x, y.astype(np.int32), 0, 40), part(x, y.astype(np.int32), 40, 178)
    return Problem(inner, lambda w, t, b: loss(w, b), start, jnp.zeros(13), *halves)


def cleaning():
    """A weight an example of a logistic regression, three labels in ten wrong."""
    x, y = cancer()
    wrong = np.where(np.random.RandomState(10).rand(len(y)) < 0.3, 1 - y, y)
    each = lambda w, b: jax.nn.softplus(-(2 * b["y"] - 1) * (b["x"] @ w["w"] + w["b"]))
    weighted = lambda w, t, b: jnp.mean(jax.nn.sigmoid(t[b["i"]]) * each(w, b))
    inner = lambda w, t, b: weighted(w, t, b) + 0.01 * jnp.sum(w["w"] ** 2)
    halves = part(x, wrong, 0, 200, numbered=True), part(x, y, 200, 300)
    return Problem(inner, lambda w, t, b: logistic(w, b), affine(30), jnp.zeros(200), *halves)


def kernel():
    """Kernel ridge regression: the kernel's width and the penalty."""
    x, y = diabetes()
    train, held_out = part(x[:, :10], y, 0, 80), part(x[:, :10], y, 80, 200)

    def gram(a, b, width):
        distance = jnp.sum((a[:, None] - b[None]) ** 2, axis=-1)
        return jnp.exp(-distance / jnp.exp(width))

    def inner(c, t, b):
        k = gram(b["x"], b["x"], t[0])
        return jnp.mean((k @ c - b["y"]) ** 2) + (jnp.exp(t[1]) + 1e-4) * c @ k @ c + 1e-6 * c @ c

    outer = lambda c, t, b: jnp.mean((gram(b["x"], train["x"], t[0]) @ c - b["y"]) ** 2)
    return Problem(inner, outer, jnp.zeros(80), jnp.asarray([2.0, -4.0]), train, held_out)


def box():
    """Weights of examples between nought and one, by projection."""
    x, y = diabetes()
    y = np.where(np.random.RandomState(11).rand(len(y)) < 0.3, -3 * y, y).astype(np.float32)
    clean = diabetes()[1]
    loss = lambda w, t, b: jnp.mean(t[b["i"]] * (b["x"] @ w - b["y"]) ** 2)
    inner = lambda w, t, b: loss(w, t, b) + 0.05 * w @ w
    halves = part(x, y, 0, 120, numbered=True), part(x, clean, 120, 200)
    outer = lambda w, t, b: squares(w, b)
    return Problem(
        inner, outer, jnp.zeros(20), jnp.full(120, 0.5), *halves, lambda t: jnp.clip(t, 0, 1)
    )


def mixed_units():
    """Features with scales from 1e-2 to 1e2, a penalty each."""
    x, y = cancer()
    x = (x * np.geomspace(1e-2, 1e2, 30)).astype(np.float32)
    inner = lambda w, t, b: logistic(w, b) + 0.5 * jnp.sum((jnp.exp(t) + 1e-4) * w["w"] ** 2)
    halves = part(x, y, 0, 150), part(x, y, 150, 400)
    outer = lambda w, t, b: logistic(w, b)
    return Problem(inner, outer, affine(30), jnp.full(30, -3.0), *halves)


def sampled_decay():
    """The decay of each layer of a network on minibatches, one label in four drawn anew."""
    x, y = moons(700, 5)
    loss = lambda p, b: jnp.mean(cross_entropy(apply(p, b["x"], jnp.tanh), b["y"]))

    def inner(p, t, b):
        decay = sum(jnp.exp(t[i]) * squared_norm(layer["w"]) for i, layer in enumerate(p))
        return loss(p, b) + 0.5 * decay

    return Problem(
        inner, lambda p, t, b: loss(p, b), layers([4, 24, 24, 2], 4), jnp.full(3, -5.0),
        part(x, flipped(y, 0.25, 2, 6), 0, 200), part(x, y, 200, 350), batch=(50, 50),
        network=True, test=part(x, y, 350, 700),
    )  # fmt: skip


def sampled_weights():
    """A weight an example of a network on minibatches of wine, half of the labels drawn anew."""
    x, y = table(datasets.load_wine, 1)
    y = y.astype(np.int32)
    loss = lambda p, b: cross_entropy(apply(p, b["x"], jax.nn.relu), b["y"])
    inner = lambda p, t, b: jnp.mean(jax.nn.sigmoid(t[b["i"]]) * loss(p, b))
    train = part(x, flipped(y, 0.5, 3, 7), 0, 80, numbered=True)
    return Problem(
        inner, lambda p, t, b: jnp.mean(loss(p, b)), layers([13, 16, 3], 5), jnp.zeros(80), train,
        part(x, y, 80, 120), batch=(20, 20), network=True, test=part(x, y, 120, 178),
    )  # fmt: skip


PROBLEMS = {
    "huber, a penalty a feature": (huber, "F"),
    "poisson, poor start": (poisson, "F"),
    "smoothed elastic net": (elastic, "F"),
    "wine, a penalty a feature": (wine, "F"),
    "cleaning, logistic": (cleaning, "F"),
    "kernel ridge": (kernel, "F"),
    "weights in a box": (box, "F"),
    "logistic, mixed units": (mixed_units, "F"),
    "sampled tanh net, decay": (sampled_decay, "RT"),
    "sampled wine net, weights": (sampled_weights, "RT"),
}
