"""A learning rate a step, learned through the training that it steers.
`python examples/recipes/schedule.py`

Number at the end: validation loss after 20 steps with the learned schedule, beside the best
constant rate of a grid.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

STEPS = 20


def loss(w, outer, batch):
    return jnp.mean(recipes.cross_entropy(recipes.dense(w, batch["x"]), batch["y"]))


def schedule(outer):
    return optax.sgd(lambda count: jnp.exp(outer["log_rates"][count]), momentum=0.9)


def main(steps=60):
    train, valid, _ = recipes.digits((300, 300, 1))
    one, two = jax.random.split(jax.random.key(0))
    start = {"a": jax.random.normal(one, (64, 32)) / 8, "b": jax.random.normal(two, (32, 10)) / 6}
    solver, method = bx.inner.optax(schedule, STEPS), bx.hypergradient.unrolled()
    value = bx.value_and_hypergrad(loss, loss, solver=solver, hypergradient=method)
    at_rate = lambda rate: value(start, {"log_rates": jnp.full(STEPS, rate)}, train, valid).value
    constant = jax.jit(at_rate)
    best = min(jnp.log(jnp.array([0.03, 0.1, 0.2, 0.4, 0.8])), key=constant)
    loop = bx.algorithms.double_loop(solver, method, optax.adam(0.1))
    out = bx.solve_bilevel(
        loss, loss, start, {"log_rates": jnp.full(STEPS, best)}, inner_data=train, outer_data=valid,
        inner_init=lambda outer: start, algorithm=loop, num_steps=steps,
    )  # fmt: skip
    learned = float(out.history["value"].min())
    print(
        f"validation loss {learned:.3f} with a learned schedule, {float(constant(best)):.3f} with "
        "the best constant rate"
    )
    return learned


if __name__ == "__main__":
    recipes.script(main, 2)
