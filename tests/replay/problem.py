"""A small network trained by Adam on weighted examples, and its metagradient by ``jax.grad`` of the
whole training as one scan."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import bilevax as bx

ROWS, BATCH = 24, 6


class Problem(NamedTuple):
    params: dict
    outer: dict
    data: dict  # by step
    batch: tuple
    steps: int


def make(steps=64, dtype=jnp.float64) -> Problem:
    keys = jax.random.split(jax.random.key(0), 6)
    normal = lambda key, shape: jax.random.normal(key, shape).astype(dtype)
    params = {
        "hidden": 0.5 * normal(keys[0], (3, 5)),
        "bias": jnp.zeros(5, dtype),
        "out": 0.5 * normal(keys[1], (5,)),
    }
    x, y = normal(keys[2], (ROWS, 3)), normal(keys[3], (ROWS,))
    index = jax.random.randint(
        keys[4], (steps, BATCH), 0, ROWS
    )  # rows come again within a batch, too
    outer = {
        "weight": jnp.ones(ROWS, dtype),
        "rate": jnp.full(steps, 1e-2, dtype),
        "decay": jnp.asarray(-3.0, dtype),
        "shift": 0.1 * normal(keys[5], (steps, BATCH)),
    }
    return Problem(
        params, outer, {"x": x[index], "y": y[index], "index": index}, (x[:8], y[:8] + 0.3), steps
    )


def predict(params, x):
    return jnp.tanh(x @ params["hidden"] + params["bias"][None]) @ params["out"]


def loss(params, outer, batch, *, inner_step):
    error = predict(params, batch["x"]) - batch["y"] - outer["shift"][inner_step]
    return jnp.mean(outer["weight"][batch["index"]] * error**2) + jnp.exp(outer["decay"]) * jnp.sum(
        params["hidden"] ** 2
    )


inner = bx.objective(loss, indexed=True)


def quality(params, outer, batch):
    x, y = batch
    return jnp.mean((predict(params, x) - y) ** 2) + 1e-3 * outer["decay"] ** 2


def adam(outer):
    return optax.chain(
        optax.scale_by_adam(eps_root=1e-8),
        optax.scale_by_schedule(lambda count: -outer["rate"][count]),
    )


def reader(problem):
    data = jax.tree.map(np.asarray, problem.data)
    return bx.replay.reader(lambda step: jax.tree.map(lambda a: a[step], data))


def by_scan(problem, optimizer=adam, quality=quality, at=None):
    """Value and gradients in outer and initial parameters: reverse mode through one scan."""

    def trained(outer, params):
        opt = optimizer(outer)

        def body(carry, step):
            params, state = carry
            batch = jax.tree.map(lambda a: a[step], problem.data)
            grads = jax.grad(loss)(params, outer, batch, inner_step=step)
            with jax.numpy_dtype_promotion("standard"):
                updates, state = opt.update(grads, state, params)
            params = optax.apply_updates(params, updates)
            return (params, state), params

        with jax.numpy_dtype_promotion("standard"):
            _, path = lax.scan(
                body, (params, opt.init(params)), jnp.arange(problem.steps, dtype=jnp.int32)
            )
        points = [jax.tree.map(lambda a, t=t: a[t - 1], path) for t in (at or (problem.steps,))]
        return sum(quality(p, outer, problem.batch) for p in points) / len(points)

    return jax.jit(jax.value_and_grad(trained, (0, 1)))(problem.outer, problem.params)


def distance(a, b) -> float:
    """Relative, over all leaves."""
    one, two = (
        np.concatenate([np.ravel(np.asarray(leaf, np.float64)) for leaf in jax.tree.leaves(t)])
        for t in (a, b)
    )
    return float(np.linalg.norm(one - two) / np.linalg.norm(two))
