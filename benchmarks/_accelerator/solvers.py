"""Stochastic algorithms on 32,768 examples of 1,000 features beside the field's common benchmark;
MAID; 1,000 small problems under vmap; EK-FAC."""

from __future__ import annotations

from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax

import bilevax as bx
from benchmarks._accelerator.common import Part, interleaved, median, ratio
from bilevax.linear.preconditioner import Point, at

A = bx.algorithms
NAMES = ("soba", "saba")


class Task(NamedTuple):
    """What `peer_solvers` reads of a problem."""

    inner: object
    outer: object
    inner_data: dict
    outer_data: dict
    y: object
    x: object
    batch: int = 64


def loss(w, x, batch):
    return jnp.mean(jax.nn.softplus(-batch["y"] * (batch["x"] @ w)))


def penalised(w, x, batch):
    return loss(w, x, batch) + 0.5 * jnp.sum(jnp.exp(x) * w * w)


def logistic(n: int, d: int) -> Task:
    keys = jax.random.split(jax.random.key(0), 5)
    truth = jax.random.normal(keys[0], (d,)) / jnp.sqrt(d)

    def draw(key, noise):
        x = jax.random.normal(key, (n, d))
        return {"x": x, "y": jnp.sign(x @ truth + jax.random.normal(noise, (n,)))}

    return Task(
        penalised,
        loss,
        draw(keys[1], keys[2]),
        draw(keys[3], keys[4]),
        jnp.zeros(d),
        jnp.full(d, -2.0),
    )


def ours(task: Task, algorithm, steps: int, full=False):
    source = bx.data.full if full else partial(bx.data.partitioned, batch_size=task.batch)
    found = bx.solve_bilevel(
        task.inner, task.outer, task.y, task.x, inner_data=source(task.inner_data),
        outer_data=source(task.outer_data), algorithm=algorithm,
        num_steps=steps, key=jax.random.key(0), keep="last", throw=False,
    )  # fmt: skip
    return found.outer_params


def many(part: Part):
    """Ridge problems of their own, each solved and differentiated: all under one vmap."""
    n, d, count = part.pick((8, 3, 8), (64, 20, 1000))
    rng = np.random.default_rng(0)
    draw = lambda: (
        jnp.asarray(rng.standard_normal((count, n, d)), jnp.float32),
        jnp.asarray(rng.standard_normal((count, n)), jnp.float32),
    )
    inner = lambda w, x, b: jnp.mean((b[0] @ w - b[1]) ** 2) + jnp.sum(jnp.exp(x) * w * w)
    outer = lambda w, x, b: jnp.mean((b[0] @ w - b[1]) ** 2)
    solver = bx.inner.optax(optax.sgd(0.1, momentum=0.8), 50)
    fn = bx.value_and_hypergrad(
        inner,
        outer,
        solver=solver,
        hypergradient=bx.hypergradient.implicit(bx.linear.cg(20), max_residual=jnp.inf),
    )
    train, valid, w, x = draw(), draw(), jnp.zeros((count, d)), jnp.full((count, d), -2.0)
    grad = lambda w, x, a, b: fn(w, x, a, b).grad
    one = jax.tree.map(lambda a: a[0], (w, x, train, valid))
    return count, partial(jax.jit(jax.vmap(grad)), w, x, train, valid), partial(jax.jit(grad), *one)


def kronecker(part: Part):
    """EK-FAC's factors and its answer on a perceptron, beside a gradient and a product with the
    Hessian."""
    rows, sides = part.pick((32, (6, 5, 4)), (8192, (784, 1024, 1024, 10)))
    keys = jax.random.split(jax.random.key(0), len(sides) + 1)
    p = [
        jax.random.normal(key, shape) / jnp.sqrt(shape[0])
        for key, shape in zip(keys, pairwise(sides), strict=False)
    ]
    batch = {
        "x": jax.random.normal(keys[-2], (rows, sides[0])),
        "y": jax.random.randint(keys[-1], (rows,), 0, sides[-1]),
    }

    def network(p, batch):
        h = batch["x"]
        for w in p[:-1]:
            h = jnp.tanh(h @ w)
        return h @ p[-1]

    nll = lambda out, b: optax.softmax_cross_entropy_with_integer_labels(out, b["y"])
    value = lambda p, b: jnp.mean(nll(network(p, b), b))
    call = lambda fn, first, b, **keywords: fn(first, b, **keywords)
    point = Point(value, p, batch, call, 1e-2)
    held = at(bx.linear.ekfac((network, nll), at_once=part.pick(None, 1024)), point).preconditioner
    gradient = jax.jit(jax.grad(value))
    product = jax.jit(lambda p, v, b: jax.jvp(lambda p: jax.grad(value)(p, b), (p,), (v,))[1])
    made = jax.jit(lambda b: held.refresh(lambda v: v, held.init(b)))
    b = gradient(p, batch)
    state = jax.block_until_ready(made(b))
    entries = {
        "gradient": partial(gradient, p, batch),
        "product": partial(product, p, b, batch),
        "factors": partial(made, b),
        "answer": partial(jax.jit(held.apply), state, b),
    }
    jax.block_until_ready({name: fn() for name, fn in entries.items()})
    return sum(w.size for w in p), entries


def run(part: Part) -> None:
    task = logistic(*part.pick((128, 8), (32_768, 1000)))
    steps = part.pick(16, 8192)
    built = {"soba": A.soba(1e-3, 1e-3), "saba": A.saba(1e-3, 1e-3)}
    for name, algorithm in built.items():
        with part.recorded(f"compile {name}"):
            jax.block_until_ready(ours(task, algorithm, steps))
    maid_steps, maid = part.pick(2, 10), A.maid()
    with part.recorded("compile maid"):
        jax.block_until_ready(ours(task, maid, maid_steps, full=True))
    with part.recorded("compile many"):
        count, together, single = many(part)
        jax.block_until_ready((together(), single()))
    with part.recorded("compile EK-FAC"):
        parameters, curvature = kronecker(part)
    with part.device():
        rounds = part.pick(2, 3)

        def time_of(name):
            seconds = interleaved({name: partial(ours, task, built[name], steps)}, rounds)[name]
            part.add(algorithm=name, microseconds_a_step=1e6 * median(seconds) / steps)

        def time_of_maid():
            seconds = interleaved(
                {"maid": partial(ours, task, maid, maid_steps, full=True)}, rounds
            )["maid"]
            part.add(algorithm="maid", milliseconds_a_step=1e3 * median(seconds) / maid_steps)

        def time_of_many():
            seconds = interleaved({"together": together, "one": single}, part.pick(2, 7))
            part.add(
                problems=count,
                milliseconds=1e3 * median(seconds["together"]),
                one_alone=1e3 * median(seconds["one"]),
            )

        def time_of_curvature():
            seconds = interleaved(curvature, part.pick(2, 9))
            for name, times in seconds.items():
                part.add(
                    curvature=name,
                    parameters=parameters,
                    milliseconds=1e3 * median(times),
                    over_gradient=ratio(times, seconds["gradient"]),
                )

        part.items(
            {
                "EK-FAC": time_of_curvature,
                **{name: partial(time_of, name) for name in NAMES},
                "maid": time_of_maid,
                "many": time_of_many,
            }
        )
        part.items(
            {f"peer, {name}": partial(peer, part, task, name, steps, rounds) for name in NAMES}
        )


def peer(part: Part, task: Task, name: str, steps: int, rounds: int) -> None:
    path = part.options.get("peer")
    if path is None or not Path(path).is_dir():
        part.skip(f"peer, {name}", "--peer names no checkout")
        return
    from benchmarks import peer_solvers

    theirs = peer_solvers.load(Path(path)).make(task, name, 1e-3, 1.0, steps)
    seconds = interleaved({name: lambda: theirs.advance(theirs.start())[2]}, rounds)[name]
    part.add(algorithm=f"peer {name}", microseconds_a_step=1e6 * median(seconds) / steps)
