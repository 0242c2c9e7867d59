"""The smallest bilevel problem with a linen model: learn how much weight decay each layer needs,
from 200 images.

    python examples/flax_linen.py

Inner level: a network with BatchNorm and Dropout, 200 digits, and a penalty a layer. Outer level:
the logarithms of the two penalties, judged on 200 other digits, which also say when to stop. Beside
it: the same training without penalties, stopped by the same digits.
"""

import time

import data
import jax
import jax.numpy as jnp
import optax
import report
from flax import linen

import bilevax as bx


class MLP(linen.Module):
    @linen.compact
    def __call__(self, x, train: bool):
        x = linen.relu(linen.BatchNorm(not train, momentum=0.9)(linen.Dense(64, name="hidden")(x)))
        return linen.Dense(10, name="out")(linen.Dropout(0.2, deterministic=not train)(x))


MODEL = MLP()


def loss(model, decay, batch):
    return jnp.mean(optax.softmax_cross_entropy_with_integer_labels(model(batch["x"]), batch["y"]))


def train_loss(model, decay, batch):
    penalties = [
        jnp.exp(decay[name]) * jnp.sum(model.params[name]["kernel"] ** 2) for name in decay
    ]
    return loss(model, decay, batch) + sum(penalties)


# With an outer optimizer that stands still, the same run is ordinary training.
INNER, METHOD = bx.inner.optax(optax.sgd(0.1, momentum=0.9), 5), bx.hypergradient.unrolled()
ALGORITHMS = {
    name: bx.algorithms.double_loop(INNER, METHOD, opt)
    for name, opt in (("learned", optax.adam(0.2)), ("none", optax.set_to_zero()))
}


def main(argv=None):
    args = report.parse(
        report.parser(__doc__, full=dict(seeds=5, steps=150), small=dict(seeds=1, steps=5)), argv
    )
    x, y = map(jnp.asarray, data.digits())
    rows, begin = {name: {"test": []} for name in ALGORITHMS}, time.perf_counter()
    for seed in range(args.seeds):
        order = jax.random.permutation(jax.random.key(seed), len(x))
        train, valid, test = (
            {"x": x[part], "y": y[part]} for part in (order[:200], order[200:400], order[400:])
        )
        for name, algorithm in ALGORITHMS.items():
            start = jnp.float32(-6.0 if name == "learned" else -40.0)  # exp(-40) is nothing
            variables = MODEL.init(jax.random.key(seed), x[:1], train=False)
            net = bx.nn.from_linen(
                MODEL,
                variables,
                train={"train": True},
                evaluate={"train": False},
                rngs=("dropout",),
            )
            problem = bx.nn.bilevel(train_loss, loss, net, {"hidden": start, "out": start})
            solution = bx.solve_bilevel(
                **problem.arguments,
                inner_data=train,
                outer_data=valid,
                algorithm=algorithm,
                num_steps=args.steps,
                key=jax.random.key(seed),
            )
            variables, decay = problem.merge(solution)
            scores = MODEL.apply(variables, test["x"], train=False)
            rows[name]["test"].append(float(jnp.mean(jnp.argmax(scores, -1) == test["y"])))
            print(
                f"seed {seed}, decay {name}: {rows[name]['test'][-1]:.3f}, logarithms "
                f"{[round(float(value), 1) for value in decay.values()]}"
            )
    print(report.table(rows, {"test": "test accuracy"}, better=("learned", "test")))
    with report.figure(args.out / "flax_linen.svg", 1, height=2.5) as (_, ax):
        report.bars(ax, rows, "test", {"learned": report.BLUE}, "test accuracy")
        ax.set_title("Weight decay a layer")
    report.save(args.out / "flax_linen.json", vars(args), rows, time.perf_counter() - begin)
    return rows


if __name__ == "__main__":
    report.run(main)
