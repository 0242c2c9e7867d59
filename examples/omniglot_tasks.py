"""Omniglot as tasks of few characters, and a small network for them."""

from __future__ import annotations

import data
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

DRAWINGS, SIDE = 20, 14  # of each character; pixels, half of the original's


def characters() -> tuple[np.ndarray, np.ndarray]:
    """Characters to learn from, and others that are never seen in training: (characters, drawings,
    side, side), from 0 to 255."""
    path = data.local("omniglot_small_eval.npz")
    if path is None:
        raise data.Unavailable(
            "omniglot_small_eval.npz is not here; set BILEVAX_DATA to a folder that has it."
        )
    with np.load(path) as file:
        return tuple(
            file[name].reshape(-1, DRAWINGS, SIDE, 2, SIDE, 2).mean((3, 5)).astype(np.uint8)
            for name in ("xe", "xb")
        )


def turned(images: np.ndarray) -> np.ndarray:
    """Each character four times, a quarter turned: four characters."""
    return np.concatenate([np.rot90(images, k, (2, 3)) for k in range(4)])


def sampler(images, *, ways: int, shots: int, queries: int, tasks: int):
    """``(key, step) -> tasks``: other characters for each task, ``support`` and ``query`` of other
    drawings of them, both dicts of ``x`` and ``y`` with the task axis in front."""
    images = jnp.asarray(images)
    labels = jnp.arange(ways)

    def task(key):
        which, draw = jax.random.split(key)
        rows = lax.top_k(jax.random.uniform(which, (len(images),)), ways)[1]
        drawn = jax.random.permutation(draw, DRAWINGS)[: shots + queries]
        x = images[rows[:, None], drawn[None]].astype(jnp.float32)[..., None] / 255
        part = lambda x: {
            "x": x.reshape(-1, SIDE, SIDE, 1),
            "y": jnp.repeat(labels, x.shape[1]),
        }
        return {"support": part(x[:, :shots]), "query": part(x[:, shots:])}

    return lambda key, step: jax.vmap(task)(jax.random.split(key, tasks))


# ---- the network


def convolution(kernel, x):
    """3 x 3 with stride 2, as slices and one matrix product. Each task has kernels of its own, and
    XLA's convolution of that kind is many times slower on a CPU."""
    side = x.shape[1]
    half = -(-side // 2)
    pad = 2 * half + 1 - side
    x = jnp.pad(x, ((0, 0), (pad // 2, pad - pad // 2), (pad // 2, pad - pad // 2), (0, 0)))
    slices = [
        x[:, i : i + 2 * half - 1 : 2, j : j + 2 * half - 1 : 2] for i in range(3) for j in range(3)
    ]
    return jnp.concatenate(slices, -1) @ kernel


def features(w, x):
    """Convolutions with BatchNorm on the statistics of the batch, flat at the end."""
    for layer in w["layers"]:
        x = convolution(layer["kernel"], x)
        mean, variance = (f(x, (0, 1, 2), keepdims=True) for f in (jnp.mean, jnp.var))
        x = (x - mean) * lax.rsqrt(variance + 1e-5)
        x = jax.nn.relu(x * layer["scale"] + layer["shift"])
    return x.reshape(len(x), -1)


def scores(w, x):
    return features(w, x) @ w["head"] + w["bias"][None]


def network(key, *, ways: int, width: int, layers: int):
    """Its parameters at random."""
    keys, inputs, side, made = jax.random.split(key, layers + 1), 1, SIDE, []
    for each in keys[:-1]:
        kernel = jax.random.normal(each, (9 * inputs, width)) * (2 / (9 * inputs)) ** 0.5
        made.append(
            {
                "kernel": kernel,
                "scale": jnp.ones((1, 1, 1, width)),
                "shift": jnp.zeros((1, 1, 1, width)),
            }
        )
        inputs, side = width, -(-side // 2)
    size = side * side * width
    head = jax.random.normal(keys[-1], (size, ways)) * size**-0.5
    return {"layers": made, "head": head, "bias": jnp.zeros(ways)}


def judged(found, labels):
    """The mean loss, and the share of right answers."""
    hit = jnp.mean((jnp.argmax(found, -1) == labels).astype(jnp.float32))
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(found, labels)), hit
