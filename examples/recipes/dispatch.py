"""Predict, then decide: power is dispatched to plants by a quadratic program from predicted costs;
the predictor is trained by what its decisions cost, and not by its error.
`python examples/recipes/dispatch.py`

Number at the end: test regret of the decisions, beside that of least squares (two stages), over
seeds.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

# (Two plants in full would meet a demand of 2: a corner with more constraints than unknowns.)
PLANTS, FEATURES, DEMAND, SMOOTH = 6, 4, 2.5, 0.2


def cost_of(plan, cost):
    return cost @ plan + SMOOTH * plan @ plan / 2


# The cheapest plan of plants between 0 and 1 that meets the demand.
PROGRAM = bx.inner.qp(
    lambda plan, cost: jnp.sum(plan) - DEMAND, lambda plan, cost: (-plan, plan - 1.0)
)
PLAN = jax.vmap(lambda cost: bx.argmin(cost_of, PROGRAM, strict=False)(jnp.zeros(PLANTS), cost))


def year(key, many, weights):
    """Features, and costs that no linear predictor meets."""
    x = jax.random.normal(key, (many, FEATURES))
    return x, (x @ weights / 2.0 + 2.0) ** 3 / 8.0 + 0.2 * jax.random.normal(
        jax.random.fold_in(key, 1), (many, PLANTS)
    )


def regret(w, batch):
    return jnp.mean(
        jax.vmap(cost_of)(PLAN(batch[0] @ w["slope"] + w["level"]), batch[1])
        - jax.vmap(cost_of)(PLAN(batch[1]), batch[1])
    )


def one(key, steps):
    """Test regret of two stages and of decisions, trained from the same predictor on."""
    weights = jax.random.bernoulli(key, 0.5, (FEATURES, PLANTS)).astype(jnp.float32)
    train, test = (
        year(jax.random.fold_in(key, 1), 60, weights),
        year(jax.random.fold_in(key, 2), 300, weights),
    )
    fitted = jnp.linalg.lstsq(jnp.concatenate([train[0], jnp.ones((60, 1))], axis=1), train[1])[0]
    w, opt = (
        {"slope": fitted[:-1], "level": fitted[-1]},
        optax.adam(optax.cosine_decay_schedule(0.03, steps)),
    )

    def step(carry, _):
        updates, state = opt.update(jax.grad(regret)(carry[0], train), carry[1])
        return (optax.apply_updates(carry[0], updates), state), None

    return regret(w, test), regret(
        jax.lax.scan(step, (w, opt.init(w)), None, length=steps)[0][0], test
    )


def main(steps=150, seeds=10):
    two, own = jax.jit(lambda keys: jax.lax.map(lambda key: one(key, steps), keys))(
        jax.random.split(jax.random.key(0), seeds)
    )
    print(
        f"test regret {jnp.mean(own):.4f} by decisions, {jnp.mean(two):.4f} in two stages; better "
        f"in {int(jnp.sum(own < two))} of {seeds}"
    )
    return float(jnp.mean(own))


if __name__ == "__main__":
    recipes.script(main, 2, seeds=1)
