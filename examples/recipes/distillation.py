"""Ten images and the rates at which a fresh network learns the digits from them in five steps.
`python examples/recipes/distillation.py`

Number at the end: test accuracy of networks that no step of the run has seen.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

STEPS = 5


def fresh(outer, key):
    one, two = jax.random.split(key)
    return {"a": jax.random.normal(one, (64, 64)) / 8, "b": jax.random.normal(two, (64, 10)) / 8}


def on_images(w, outer, batch):
    return jnp.mean(recipes.cross_entropy(recipes.dense(w, outer["images"]), jnp.arange(10)))


def on_digits(w, outer, batch):
    return jnp.mean(recipes.cross_entropy(recipes.dense(w, batch["x"]), batch["y"]))


def rates(outer):
    return optax.sgd(lambda count: jax.nn.softplus(outer["rates"][count]))


def main(steps=400):
    train, _, test = recipes.digits((600, 1, 800))
    images = 0.1 * jax.random.normal(jax.random.key(2), (10, 8, 8, 1))
    outer = {"images": images, "rates": jnp.full(STEPS, -1.0)}
    solver, method = bx.inner.optax(rates, STEPS), bx.hypergradient.unrolled()
    out = bx.solve_bilevel(
        on_images, on_digits, fresh(outer, jax.random.key(0)), outer, inner_init=fresh,
        outer_data=bx.data.minibatches(train, 128),
        algorithm=bx.algorithms.double_loop(solver, method, optax.adam(2e-2)),
        num_steps=steps, key=jax.random.key(0), keep="last",
    )  # fmt: skip
    solve = bx.value_and_hypergrad(on_images, on_digits, solver=solver, hypergradient=method)

    def tested(key):
        w = solve(fresh(None, key), out.outer_params, None, test).inner_params
        return jnp.mean(jnp.argmax(recipes.dense(w, test["x"]), -1) == test["y"])

    score = float(jnp.mean(jax.jit(jax.vmap(tested))(jax.random.split(jax.random.key(7), 10))))
    learned = ", ".join(f"{rate:.2f}" for rate in jax.nn.softplus(out.outer_params["rates"]))
    print(f"test accuracy {score:.3f}, rates {learned}")
    return score


if __name__ == "__main__":
    recipes.script(main, 3)
