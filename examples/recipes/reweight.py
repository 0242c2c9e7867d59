"""Learning to reweight, from zero weights: weights are one step down the clean loss.
`python examples/recipes/reweight.py`

Number at the end: test accuracy after 600 steps on labels of which 40 % are wrong.
"""

import jax
import jax.numpy as jnp
import optax
import recipes
from flax import nnx

import bilevax as bx

RATE = optax.sgd(0.1)


def weighted(model, weights, batch):
    return jnp.sum(weights * recipes.cross_entropy(model(batch["x"]), batch["y"]))


def clean_loss(model, weights, batch):
    return jnp.mean(recipes.cross_entropy(model(batch["x"]), batch["y"]))


def main(steps=600):
    noisy, clean, test = recipes.digits((600, 100, 800), noise=0.4)
    problem = bx.nn.bilevel(weighted, clean_loss, recipes.CNN(nnx.Rngs(0), rate=0.0), jnp.zeros(64))
    fn = bx.value_and_hypergrad(
        problem.inner_objective,
        problem.outer_objective,
        solver=bx.inner.optax(RATE, 1),
        hypergradient=bx.hypergradient.unrolled(),
    )

    def step(carry, key):
        params, state = carry
        rows = jax.random.choice(key, 600, (64,), replace=False)
        batch = jax.tree.map(lambda a: a[rows], noisy)
        # a step with weights of zero moves nothing
        look = fn(params, jnp.zeros(64), batch, clean, state=state, key=key)
        weights = jnp.maximum(-look.grad, 0)
        weights = weights / jnp.maximum(jnp.sum(weights), 1e-8)
        real = fn(params, weights, batch, clean, state=state, key=key)
        return (real.inner_params, real.state), real.value

    start = fn.init(problem.inner_params, problem.outer_params, model_state=problem.model_state)
    (params, state), values = jax.jit(lambda c, k: jax.lax.scan(step, c, k))(
        (problem.inner_params, start), jax.random.split(jax.random.key(0), steps)
    )
    model = problem.nets["inner"].merge(params, state.model["inner"])
    score = recipes.accuracy(model, test)
    print(f"test accuracy {score:.3f}, clean loss {values[0]:.2f} -> {values[-1]:.2f}")
    return score


if __name__ == "__main__":
    recipes.script(main, 3)
