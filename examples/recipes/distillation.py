"""Ten images and the rates at which a fresh network learns the digits from them in five steps.
`python examples/recipes/distillation.py`

Number at the end: test accuracy of networks that no step of the run has seen.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import recipes

import bilevax as bx

STEPS = 5


def network(w, x):
    return jnp.tanh(x.reshape(len(x), -1) @ w["a"]) @ w["b"]


def fresh(outer, key):
    one, two = jax.random.split(key)
    return {"a": jax.random.normal(one, (64, 64)) / 8, "b": jax.random.normal(two, (64, 10)) / 8}


def on_images(w, outer, batch):
    return jnp.mean(recipes.cross_entropy(network(w, outer["images"]), jnp.arange(10)))


def on_digits(w, outer, batch):
    return jnp.mean(recipes.cross_entropy(network(w, batch["x"]), batch["y"]))


def rates(outer):
    return optax.sgd(lambda count: jax.nn.softplus(outer["rates"][count]))


def main(steps=400):
    train, _, test = recipes.digits((600, 1, 800))
    outer = {
        "images": 0.1 * jax.random.normal(jax.random.key(2), (10, 8, 8, 1)),
        "rates": jnp.full(STEPS, -1.0),
    }
    loop = bx.algorithms.double_loop(
        bx.inner.optax(rates, STEPS), bx.hypergradient.unrolled(), optax.adam(2e-2)
    )
    out = bx.solve_bilevel(
        on_images, on_digits, fresh(outer, jax.random.key(0)), outer,
        outer_data=bx.data.minibatches(train, 128),
        inner_init=fresh, algorithm=loop, num_steps=steps, key=jax.random.key(0), keep="last",
    )  # fmt: skip

    solve = jax.jit(
        bx.value_and_hypergrad(
            on_images,
            on_digits,
            solver=bx.inner.optax(rates, STEPS),
            hypergradient=bx.hypergradient.unrolled(),
        )
    )

    def tested(key):
        w = solve(fresh(None, key), out.outer_params, None, test).inner_params
        return jnp.mean(jnp.argmax(network(w, test["x"]), -1) == test["y"])

    score = float(np.mean([tested(key) for key in jax.random.split(jax.random.key(7), 10)]))
    print(
        f"test accuracy {score:.3f}, rates "
        f"{np.round(jax.nn.softplus(out.outer_params['rates']), 2).tolist()}"
    )
    return score


if __name__ == "__main__":
    recipes.script(main, 3)
