"""One cell of DARTS: which activation and which width, chosen by gradient on held-out digits.
`python examples/recipes/darts.py`

Number at the end: validation accuracy of the mixture at the end of the search.
"""

import jax
import jax.numpy as jnp
import optax
import recipes
from flax import nnx

import bilevax as bx

OPERATIONS = {"tanh": jnp.tanh, "relu": nnx.relu, "identity": lambda x: x, "zero": jnp.zeros_like}


class Cell(nnx.Module):
    def __init__(self, rngs):
        self.into = nnx.Linear(64, 32, rngs=rngs)
        self.edges = nnx.List([nnx.Linear(32, 32, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(32, 10, rngs=rngs)

    def __call__(self, x, mix):
        x = self.into(x.reshape(len(x), -1))
        for edge, weights in zip(self.edges, jax.nn.softmax(mix), strict=True):
            h = edge(x)
            x = sum(w * op(h) for w, op in zip(weights, OPERATIONS.values(), strict=True))
        return self.head(x)


def loss(model, mix, batch):
    return jnp.mean(recipes.cross_entropy(model(batch["x"], mix), batch["y"]))


def main(steps=300):
    train, valid, _ = recipes.digits((400, 400, 1))
    problem = bx.nn.bilevel(loss, loss, Cell(nnx.Rngs(0)), jnp.zeros((2, 4)))
    loop = bx.algorithms.double_loop(
        bx.inner.optax(optax.sgd(0.05, momentum=0.9), 1),
        bx.hypergradient.finite_difference(scale=0.05),
        optax.adam(3e-2),
    )
    out = bx.solve_bilevel(
        **problem.arguments, inner_data=bx.data.minibatches(train, 64),
        outer_data=bx.data.minibatches(valid, 64),
        algorithm=loop, num_steps=steps, key=jax.random.key(0), keep="last",
    )  # fmt: skip
    model, mix = problem.merge(out)
    score = float(jnp.mean(jnp.argmax(model(valid["x"], mix), -1) == valid["y"]))
    chosen = [list(OPERATIONS)[i] for i in jnp.argmax(mix, -1)]
    print(f"validation accuracy {score:.3f}, chosen {chosen}")
    return score


if __name__ == "__main__":
    recipes.script(main, 3)
