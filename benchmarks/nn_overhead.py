"""What bx.nn costs over functions split by hand: the same network, losses and algorithm, and the
traces of each.

python benchmarks/nn_overhead.py
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen, nnx
from harness import Case, main

import bilevax as bx


class NnxNet(nnx.Module):
    def __init__(self, features, hidden, rngs):
        self.body, self.norm = (
            nnx.Linear(features, hidden, rngs=rngs),
            nnx.BatchNorm(hidden, rngs=rngs),
        )
        self.drop, self.head = nnx.Dropout(0.1, rngs=rngs), nnx.Linear(hidden, 10, rngs=rngs)

    def __call__(self, x):
        return self.head(self.drop(nnx.relu(self.norm(self.body(x)))))


class LinenNet(linen.Module):
    hidden: int

    @linen.compact
    def __call__(self, x, train):
        x = linen.relu(linen.BatchNorm(use_running_average=not train)(linen.Dense(self.hidden)(x)))
        return linen.Dense(10)(linen.Dropout(0.1, deterministic=not train)(x))


TRACES = {}


def losses(model, batch):
    return optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"])


def counted(name):
    def loss(model, scores, batch):
        TRACES[name] = TRACES.get(name, 0) + 1
        return jnp.mean(jax.nn.sigmoid(scores) * losses(model, batch))

    return loss


def valid_loss(model, scores, batch):
    return jnp.mean(losses(model, batch))


def nnx_by_hand(features, hidden):
    graphdef, draws, params, stats = nnx.split(
        NnxNet(features, hidden, nnx.Rngs(0)), nnx.RngState, nnx.Param, ...
    )
    train_loss = counted("nnx, by hand")

    def inner(params, scores, batch, stats, *, key):
        model = nnx.merge(graphdef, draws, params, stats, copy=True)
        model.train()
        nnx.reseed(model, default=key)
        return train_loss(model, scores, batch), nnx.state(model, nnx.BatchStat)

    def outer(params, scores, batch, stats):
        model = nnx.merge(graphdef, draws, params, stats, copy=True)
        model.eval()
        return valid_loss(model, scores, batch), stats

    return (
        (bx.objective(inner, stateful=True, keyed=True), bx.objective(outer, stateful=True)),
        params,
        stats,
    )


def linen_by_hand(features, hidden):
    module = LinenNet(hidden)
    variables = module.init(jax.random.key(0), jnp.ones((1, features)), train=False)
    train_loss = counted("linen, by hand")

    def inner(params, scores, batch, stats, *, key):
        moved = {}

        def model(x):
            out, new = module.apply(
                {"params": params, **stats},
                x,
                train=True,
                rngs={"dropout": key},
                mutable=["batch_stats"],
            )
            moved.update(new)
            return out

        return train_loss(model, scores, batch), moved

    def outer(params, scores, batch, stats):
        return valid_loss(
            lambda x: module.apply({"params": params, **stats}, x, train=False), scores, batch
        ), stats

    objectives = bx.objective(inner, stateful=True, keyed=True), bx.objective(outer, stateful=True)
    return objectives, variables["params"], {"batch_stats": variables["batch_stats"]}


def by_nn(style, features, hidden, rows):
    if style == "nnx":
        net = NnxNet(features, hidden, nnx.Rngs(0))
    else:
        module = LinenNet(hidden)
        variables = module.init(jax.random.key(0), jnp.ones((1, features)), train=False)
        net = bx.nn.from_linen(
            module, variables, train={"train": True}, evaluate={"train": False}, rngs=("dropout",)
        )
    return bx.nn.bilevel(counted(f"{style}, bx.nn"), valid_loss, net, jnp.zeros(rows)).arguments


def cases(args):
    # Steps enough that what a call costs once (some milliseconds, for the checks of a model's
    # pytrees) is small beside them.
    sizes = [(16, 8, 32, 64)] if args.quick else [(16, 8, 32, 2048), (64, 128, 256, 256)]
    algorithm = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.1), 5), bx.hypergradient.unrolled(), optax.adam(0.1)
    )
    for features, hidden, rows, steps in sizes:
        rng = np.random.default_rng(0)
        parts = [
            {"x": rng.normal(size=(rows, features)), "y": rng.integers(0, 10, rows)}
            for _ in range(2)
        ]
        train, valid = (
            {"x": jnp.asarray(p["x"], jnp.float32), "y": jnp.asarray(p["y"], jnp.int32)}
            for p in parts
        )
        solve = functools.partial(
            bx.solve_bilevel,
            inner_data=train,
            outer_data=valid,
            algorithm=algorithm,
            num_steps=steps,
            key=jax.random.key(0),
        )
        for style, make in (("nnx", nnx_by_hand), ("linen", linen_by_hand)):
            (inner, outer), params, stats = make(features, hidden)
            hand = dict(
                inner_objective=inner,
                outer_objective=outer,
                inner_params=params,
                outer_params=jnp.zeros(rows),
                model_state=stats,
            )

            def run(name, arguments, solve=solve):
                solution = solve(**arguments)
                return name, solution.outer_params, solution.history["value"][-1]

            entries = {
                f"{style}, by hand": hand,
                f"{style}, bx.nn": by_nn(style, features, hidden, rows),
            }
            yield Case(
                f"{style}, {features}-{hidden}-10, {rows} rows, {steps} steps",
                {
                    name: functools.partial(run, name, arguments)
                    for name, arguments in entries.items()
                },
                f"{style}, by hand",
                lambda out: {"traces of the inner loss": TRACES[out[0]], "last value": out[2]},
            )
            TRACES.clear()


if __name__ == "__main__":
    main(
        "nn_overhead",
        "A run through bx.nn over the same run with functions split by hand: BatchNorm and "
        "Dropout, 5 inner steps, unrolled.",
        cases,
    )
