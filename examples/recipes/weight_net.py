"""Meta-Weight-Net: a small network says from an image's loss how much it counts, for 40 % wrong
labels. `python examples/recipes/weight_net.py`

Number at the end: test accuracy with learned weights, beside that with none.
"""

import jax
import jax.numpy as jnp
import optax
import recipes
from flax import nnx

import bilevax as bx

WEIGHTS = nnx.Sequential(
    nnx.Linear(1, 32, rngs=nnx.Rngs(1)), nnx.relu, nnx.Linear(32, 1, rngs=nnx.Rngs(2))
)


def train_loss(model, weights, batch):
    losses = recipes.cross_entropy(model(batch["x"]), batch["y"])
    counted = jax.nn.sigmoid(weights(jax.lax.stop_gradient(losses)[:, None])[:, 0])
    return jnp.mean(counted * losses) / jnp.maximum(jnp.mean(jax.lax.stop_gradient(counted)), 1e-3)


def clean_loss(model, weights, batch):
    return jnp.mean(recipes.cross_entropy(model(batch["x"]), batch["y"]))


def main(steps=300):
    noisy, clean, test = recipes.digits((600, 100, 800), noise=0.4)
    scores = {}
    for name, optimizer in (("learned", optax.adam(1e-2)), ("plain", optax.set_to_zero())):
        problem = bx.nn.bilevel(train_loss, clean_loss, recipes.CNN(nnx.Rngs(0)), WEIGHTS)
        loop = bx.algorithms.double_loop(
            bx.inner.optax(optax.adam(2e-3), 2), bx.hypergradient.sama(), optimizer
        )
        out = bx.solve_bilevel(
            **problem.arguments, inner_data=bx.data.minibatches(noisy, 64),
            outer_data=bx.data.minibatches(clean, 64),
            algorithm=loop, num_steps=steps, key=jax.random.key(0), keep="last",
        )  # fmt: skip
        scores[name] = recipes.accuracy(problem.merge(out)[0], test)
    print(
        f"test accuracy {scores['learned']:.3f} with learned weights, {scores['plain']:.3f} without"
    )
    return scores["learned"]


if __name__ == "__main__":
    recipes.script(main, 3)
