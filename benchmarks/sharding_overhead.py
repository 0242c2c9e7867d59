"""What the driver costs over a sharded loop written by hand: eight virtual devices, data parallel,
SAMA on an MLP.

python benchmarks/sharding_overhead.py
"""

import functools
import os

os.environ.setdefault("XLA_FLAGS", "--xla_force_host_platform_device_count=8")

import jax
import jax.numpy as jnp
import numpy as np
import optax
from harness import Case, main
from jax import lax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import bilevax as bx

P = PartitionSpec
RATE, OUTER_RATE = 0.1, 0.5


def logits(y, x):
    return jnp.tanh(x @ y["a"]) @ y["b"]


def inner(y, weights, batch):
    x, labels, index = batch
    return jnp.mean(
        jax.nn.sigmoid(weights[index])
        * optax.softmax_cross_entropy_with_integer_labels(logits(y, x), labels)
    )


def outer(y, weights, batch):
    x, labels = batch
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(logits(y, x), labels))


def own_means(mesh):
    """Both objectives as means over each device's own rows."""

    def mean(fn):
        def own(y, x, b):
            y, x = jax.tree.map(lambda a: lax.pcast(a, "data", to="varying"), (y, x))
            return lax.pmean(fn(y, x, b), "data")

        return jax.shard_map(own, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P())

    return mean(inner), mean(outer)


def by_hand(mesh, inner_steps, steps):
    """K steps of descent, SAMA for it (the adaptation is the rate itself) and one outer step:
    nothing of the library."""
    g, f = own_means(mesh)

    def step(carry, _, train, valid):
        y, x = carry
        y = lax.fori_loop(
            0,
            inner_steps,
            lambda i, y: jax.tree.map(lambda p, d: p - RATE * d, y, jax.grad(g)(y, x, train)),
            y,
        )
        value, w = jax.value_and_grad(f)(y, x, valid)
        norm = jnp.sqrt(sum(jnp.sum(d**2) for d in jax.tree.leaves(jax.grad(g)(y, x, train))))
        q = jax.tree.map(lambda a: RATE * a, w)
        cross = jax.jvp(lambda y: jax.grad(g, 1)(y, x, train), (y,), (q,))[1]
        return (y, x + OUTER_RATE * cross), (value, jnp.sqrt(jnp.sum(cross**2)), norm)

    @jax.jit
    def run(y, x, train, valid):
        return lax.scan(lambda c, i: step(c, i, train, valid), (y, x), length=steps)

    return run


def own_loop(mesh, solver, method, steps):
    """The library's hypergradient in a sharded loop of one's own: what is left out is the
    driver."""
    fn = bx.value_and_hypergrad(*own_means(mesh), solver=solver, hypergradient=method)
    optimizer = optax.sgd(OUTER_RATE)

    @jax.jit
    def run(y, x, train, valid):
        def step(carry, _):
            y, x, opt, state = carry
            estimate = fn(y, x, train, valid, state=state)
            updates, opt = optimizer.update(estimate.grad, opt)
            return (estimate.inner_params, optax.apply_updates(x, updates), opt, estimate.state), (
                estimate.value,
                estimate.info,
            )

        (y, x, _, _), rows = lax.scan(step, (y, x, optimizer.init(x), fn.init(y)), length=steps)
        return (y, x), rows

    return run


def cases(args):
    sizes = [(64, 128, 1024, 32)] if args.quick else [(64, 128, 1024, 256), (256, 512, 2048, 16)]
    for features, hidden, rows, steps in sizes:
        rng = np.random.default_rng(0)
        x = rng.standard_normal((2, rows, features)).astype(np.float32)
        labels = rng.integers(0, 10, (2, rows)).astype(np.int32)
        mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
        rows_split, everywhere = NamedSharding(mesh, P("data")), NamedSharding(mesh, P())
        train = jax.device_put((x[0], labels[0], np.arange(rows, dtype=np.int32)), rows_split)
        valid = jax.device_put((x[1], labels[1]), rows_split)
        y = {
            "a": 0.1 * rng.standard_normal((features, hidden)),
            "b": 0.1 * rng.standard_normal((hidden, 10)),
        }
        y, weights = jax.device_put(
            (jax.tree.map(np.float32, y), np.zeros(rows, np.float32)), everywhere
        )
        solver, method = bx.inner.optax(optax.sgd(RATE), 5), bx.hypergradient.sama()
        hand, loop = by_hand(mesh, 5, steps), own_loop(mesh, solver, method, steps)
        algorithm = bx.algorithms.double_loop(solver, method, optax.sgd(OUTER_RATE))
        sharding = bx.sharding.data_parallel(mean=True)

        def ours(
            y=y,
            weights=weights,
            train=train,
            valid=valid,
            algorithm=algorithm,
            steps=steps,
            sharding=sharding,
        ):
            out = bx.solve_bilevel(
                inner,
                outer,
                y,
                weights,
                inner_data=train,
                outer_data=valid,
                algorithm=algorithm,
                num_steps=steps,
                sharding=sharding,
                keep="last",
            )
            return out.outer_params, out.history["value"][-1]

        def theirs(run, y=y, weights=weights, train=train, valid=valid):
            (_, weights), rows = run(y, weights, train, valid)
            return weights, rows[0][-1]

        label = f"{features}-{hidden}-10, {rows} rows, {steps} steps"
        entries = {
            "value_and_hypergrad, own loop": functools.partial(theirs, loop),
            "solve_bilevel": ours,
            "all by hand": functools.partial(theirs, hand),
        }
        yield Case(
            label, entries, "value_and_hypergrad, own loop", lambda out: {"last value": out[1]}
        )


if __name__ == "__main__":
    main(
        "sharding_overhead",
        "solve_bilevel with data_parallel over the same sharded step in a loop of one's own, eight "
        "virtual devices.",
        cases,
    )
