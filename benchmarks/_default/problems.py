"""Eighteen problems that people bring: penalties, weights of examples, distillation, raw units,
poor starts, networks."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from _default.data import (
    Problem,
    affine,
    apply,
    cancer,
    cross_entropy,
    diabetes,
    digits,
    flipped,
    layers,
    logistic,
    moons,
    part,
    squared_norm,
    squares,
)
from bilevax import nn

outer_logistic = lambda w, x, b: logistic(w, b)
outer_softmax = lambda w, x, b: jnp.mean(cross_entropy(b["x"] @ w, b["y"]))


def ridge(scale=1.0, positive=False):
    """A penalty a feature; in its logarithm, or by projection on the positive ones."""
    x, y = diabetes()
    halves = part(x, y, 0, 60), part(x, y, 60, 160)
    outer = lambda w, t, b: scale * squares(w, b)
    if positive:
        inner = lambda w, t, b: squares(w, b) + jnp.sum((t + 1e-4) * w * w)
        return Problem(
            inner, outer, jnp.zeros(20), jnp.ones(20), *halves, lambda t: jnp.maximum(t, 0.0)
        )
    inner = lambda w, t, b: squares(w, b) + jnp.sum(jnp.exp(t) * w * w)
    return Problem(inner, outer, jnp.zeros(20), jnp.zeros(20), *halves)


def one_penalty(x0, train, held_out):
    x, y = cancer()
    inner = lambda w, t, b: logistic(w, b) + 0.5 * jnp.exp(t) * jnp.sum(w["w"] ** 2)
    halves = part(x, y, *train), part(x, y, *held_out)
    return Problem(inner, outer_logistic, affine(30), jnp.float32(x0), *halves)


def three_penalties():
    """From inner parameters far off, nearly without a penalty."""
    x, y = cancer()
    inner = lambda w, t, b: logistic(w, b) + 0.5 * jnp.sum(jnp.repeat(jnp.exp(t), 10) * w["w"] ** 2)
    start = {"w": 3 * jnp.ones(30), "b": jnp.float32(5.0)}
    halves = part(x, y, 0, 100), part(x, y, 200, 400)
    return Problem(inner, outer_logistic, start, jnp.full(3, -8.0), *halves)


def raw_units():
    """Age in years, income and debt in dollars, as they come."""
    rng, n = np.random.RandomState(5), 400
    age, income = rng.normal(40, 12, n), np.exp(rng.normal(10.8, 0.5, n))
    years, debt = rng.uniform(0, 20, n), np.exp(rng.normal(8, 1, n))
    noise = rng.randn(n, 4)
    signal = 1.5 * (age - 40) / 12 + 2 * (income - 5e4) / 3e4 - 1.2 * (years - 10) / 6
    x = np.concatenate([np.stack([age, income, years, debt], 1), noise], 1).astype(np.float32)
    y = (signal + rng.randn(n) > 0).astype(np.float32)
    inner = lambda w, t, b: logistic(w, b) + 0.5 * jnp.sum(jnp.exp(t) * w["w"] ** 2)
    halves = part(x, y, 0, 100), part(x, y, 100, 300)
    return Problem(inner, outer_logistic, affine(8), jnp.full(8, -3.0), *halves)


def cleaning(rows, batch=None):
    """A weight an example, four labels in ten wrong, a linear model."""
    x, y = digits()
    wrong = flipped(y, 0.4, 10)
    fit = lambda w, t, b: jnp.mean(jax.nn.sigmoid(t[b["i"]]) * cross_entropy(b["x"] @ w, b["y"]))
    inner = lambda w, t, b: fit(w, t, b) + 0.005 * jnp.sum(w**2)
    train = part(x, wrong, 0, rows, numbered=True)
    if batch is None:
        held_out = part(x, y, rows, rows + 150)
        return Problem(inner, outer_softmax, jnp.zeros((64, 10)), jnp.zeros(rows), train, held_out)
    held_out, test = part(x, y, rows, rows + 200), part(x, y, rows + 200, 1797)
    return Problem(
        inner, outer_softmax, jnp.zeros((64, 10)), jnp.zeros(rows), train, held_out,
        batch=batch, network=True, test=test,
    )  # fmt: skip


def multinomial():
    x, y = digits()
    fit = lambda w, b: jnp.mean(cross_entropy(b["x"] @ w, b["y"]))
    inner = lambda w, t, b: fit(w, b) + 0.5 * jnp.sum(jnp.exp(t)[None] * w**2)
    halves = part(x, y, 0, 200), part(x, y, 200, 500)
    return Problem(inner, outer_softmax, jnp.zeros((64, 10)), jnp.full(10, -2.0), *halves)


def distillation():
    """Ten synthetic digits to train on."""
    x, y = digits()
    labels, start = jnp.arange(10), 0.1 * np.random.RandomState(7).randn(10, 64)
    inner = lambda w, s, b: jnp.mean(cross_entropy(s @ w, labels)) + 0.005 * jnp.sum(w**2)
    start = jnp.asarray(start, jnp.float32)
    return Problem(inner, outer_softmax, jnp.zeros((64, 10)), start, None, part(x, y, 0, 500))


def small_relu_weights():
    x, y = moons(400)

    def loss(p, b):
        score = apply(p, b["x"], jax.nn.relu)[:, 0]
        return jax.nn.softplus(-(2 * b["y"] - 1) * score)

    weighted = lambda p, t, b: jnp.mean(jax.nn.sigmoid(t[b["i"]]) * loss(p, b))
    inner = lambda p, t, b: weighted(p, t, b) + 1e-4 * squared_norm(p)
    train = part(x, flipped(y, 0.5, 2), 0, 100, numbered=True)
    return Problem(
        inner, lambda p, t, b: jnp.mean(loss(p, b)), layers([4, 16, 1]), jnp.zeros(100), train,
        part(x, y, 100, 150), network=True, test=part(x, y, 150, 400),
    )  # fmt: skip


def small_tanh_decay():
    x, y = digits()
    loss = lambda p, b: jnp.mean(cross_entropy(apply(p, b["x"], jnp.tanh), b["y"]))

    def inner(p, t, b):
        decay = sum(jnp.exp(t[i]) * jnp.sum(layer["w"] ** 2) for i, layer in enumerate(p))
        return loss(p, b) + 0.5 * decay

    return Problem(
        inner, lambda p, t, b: loss(p, b), layers([64, 16, 10]), jnp.full(2, -6.0),
        part(x, flipped(y, 0.2, 10), 0, 200), part(x, y, 200, 400),
        network=True, test=part(x, y, 400, 1000),
    )  # fmt: skip


def sampled_weights(act):
    """A weight an example of a network on minibatches, six labels in ten drawn anew."""
    x, y = moons(800, 1)
    loss = lambda p, b: cross_entropy(apply(p, b["x"], act), b["y"])
    inner = lambda p, t, b: jnp.mean(jax.nn.sigmoid(t[b["i"]]) * loss(p, b))
    train = part(x, flipped(y, 0.6, 2, 2), 0, 400, numbered=True)
    return Problem(
        inner, lambda p, t, b: jnp.mean(loss(p, b)), layers([4, 32, 32, 2]), jnp.zeros(400), train,
        part(x, y, 400, 500), batch=(50, 50), network=True, test=part(x, y, 500, 800),
    )  # fmt: skip


class Normalised(nnx.Module):
    """Two layers with batch normalisation between them."""

    def __init__(self, rngs):
        self.a, self.b = nnx.Linear(64, 32, rngs=rngs), nnx.Linear(32, 10, rngs=rngs)
        self.n = nnx.BatchNorm(32, rngs=rngs)

    def __call__(self, x):
        return self.b(jax.nn.relu(self.n(self.a(x))))


def smoothing_and_decay():
    net = nn.from_nnx(Normalised(nnx.Rngs(0)))

    def train(model, t, b):
        share = jax.nn.sigmoid(t["smoothing"])
        target = (1 - share) * jax.nn.one_hot(b["y"], 10) + share / 10
        size = jnp.sum(model.a.kernel[...] ** 2) + jnp.sum(model.b.kernel[...] ** 2)
        return (
            jnp.mean(optax.softmax_cross_entropy(model(b["x"]), target))
            + 0.5 * jnp.exp(t["decay"]) * size
        )

    valid = lambda model, t, b: jnp.mean(cross_entropy(model(b["x"]), b["y"]))
    x, y = digits()
    return Problem(
        nn.objective(train, inner=net), nn.objective(valid, inner=net, train=False), net.params,
        {"smoothing": jnp.float32(-3.0), "decay": jnp.float32(-7.0)},
        part(x, flipped(y, 0.3, 10), 0, 500), part(x, y, 500, 800), batch=(64, 64),
        model={"inner": net.state}, network=True, test=part(x, y, 800, 1797),
    )  # fmt: skip


def weight_network():
    """A network that weighs each example by its loss."""
    x, y = digits()
    loss = lambda p, b: cross_entropy(apply(p, b["x"], jax.nn.relu), b["y"])

    def inner(p, t, b):
        each = loss(p, b)
        weights = jax.nn.sigmoid(apply(t, jax.lax.stop_gradient(each)[:, None], jax.nn.relu)[:, 0])
        return jnp.mean(weights * each)

    return Problem(
        inner, lambda p, t, b: jnp.mean(loss(p, b)), layers([64, 32, 10]), layers([1, 16, 1], 3),
        part(x, flipped(y, 0.5, 10), 0, 600), part(x, y, 600, 800), batch=(64, 64),
        network=True, test=part(x, y, 800, 1797),
    )  # fmt: skip


# name: (problem, what is judged, its limit)
PROBLEMS = {
    "ridge, a penalty a feature": (ridge, "F", 0.4966),
    "ridge, outer scale 1e-6": (lambda: ridge(scale=1e-6), "F", 4.966e-7),
    "ridge, penalties projected": (lambda: ridge(positive=True), "F", 0.501),
    "logistic, a penalty": (lambda: one_penalty(0.0, (0, 200), (200, 400)), "F", 0.1242),
    "logistic, poor start": (lambda: one_penalty(-5.0, (0, 100), (200, 400)), "F", 0.1102),
    "logistic, a jump": (lambda: one_penalty(-5.0, (0, 285), (285, 569)), "F", 0.0885),
    "logistic, three penalties": (three_penalties, "F", 0.088),
    "logistic, raw units": (raw_units, "F", 0.2490),
    "cleaning, linear": (lambda: cleaning(300), "F", 0.640),
    "multinomial": (multinomial, "F", 0.272),
    "distillation": (distillation, "F", 0.282),
    "small relu net, weights": (small_relu_weights, "R", 0.45),
    "small tanh net, decay": (small_tanh_decay, "R", 0.82),
    "sampled cleaning, linear": (lambda: cleaning(800, (64, 64)), "RT", 0.89),
    "sampled relu net, weights": (lambda: sampled_weights(jax.nn.relu), "RT", 0.37),
    "sampled tanh net, weights": (lambda: sampled_weights(jnp.tanh), "RT", 0.33),
    "sampled BatchNorm, smoothing": (smoothing_and_decay, "RT", 1.15),
    "sampled weight network": (weight_network, "RT", 0.36),
}
