"""Two penalties and label smoothing of a CNN with BatchNorm and Dropout, by Adam on minibatches,
then trained anew with what was learned. `python examples/recipes/penalties.py`

Number at the end: test accuracy of the network that was retrained.
"""

import jax
import jax.numpy as jnp
import optax
import recipes
from flax import nnx

import bilevax as bx

START = {"conv": jnp.asarray(-8.0), "head": jnp.asarray(-8.0), "smooth": jnp.asarray(-3.0)}


def train_loss(model, x, batch):
    labels = optax.smooth_labels(jax.nn.one_hot(batch["y"], 10), jax.nn.sigmoid(x["smooth"]))
    loss = jnp.mean(optax.softmax_cross_entropy(model(batch["x"]), labels))
    size = lambda layer: jnp.sum(layer.kernel[...] ** 2)
    convolutions = jnp.exp(x["conv"]) * (size(model.first) + size(model.second))
    return loss + convolutions + jnp.exp(x["head"]) * size(model.head)


def valid_loss(model, x, batch):
    return jnp.mean(recipes.cross_entropy(model(batch["x"]), batch["y"]))


def run(train, valid, learned, optimizer, steps, seed):
    problem = bx.nn.bilevel(train_loss, valid_loss, recipes.CNN(nnx.Rngs(seed), rate=0.2), learned)
    inner = bx.inner.optax(optax.adam(3e-3, eps_root=1e-8), 5)
    out = bx.solve_bilevel(
        **problem.arguments, inner_data=bx.data.minibatches(train, 64),
        outer_data=bx.data.minibatches(valid, 64),
        algorithm=bx.algorithms.double_loop(inner, bx.hypergradient.unrolled(), optimizer),
        num_steps=steps,
        key=jax.random.key(seed), keep="last",
    )  # fmt: skip
    return problem.merge(out)


def main(steps=120):
    train, valid, test = recipes.digits((300, 300, 800))
    _, learned = run(train, valid, START, optax.adam(0.1), steps, 0)
    both = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), train, valid)
    # an outer level that stands still: plain training
    model, _ = run(both, valid, learned, optax.set_to_zero(), steps, 1)
    score = recipes.accuracy(model, test)
    found = {name: round(float(v), 2) for name, v in learned.items()}
    print(f"test accuracy {score:.3f}; learned {found}")
    return score


if __name__ == "__main__":
    recipes.script(main, 3)
