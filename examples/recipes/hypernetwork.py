"""Self-tuning networks: a linear response of the weights to the penalty, for the best response.
`python examples/recipes/hypernetwork.py`

Number at the end: the learned log penalty, beside that of an exact implicit gradient.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

X, W = jax.random.normal(jax.random.key(0), (60, 10)), jax.random.normal(jax.random.key(1), (10,))
Y = X @ W + 2.0 * jax.random.normal(jax.random.key(2), (60,))
TRAIN, VALID, SPREAD = (X[:30], Y[:30]), (X[30:], Y[30:]), 0.5


def ridge(w, penalty, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(penalty) * jnp.sum(w**2)


def fit(w, penalty, batch):
    return jnp.mean((batch[0] @ w - batch[1]) ** 2)


def response(net, penalty, centre):
    return net["w"] + net["slope"] * (penalty - centre)


def inner(net, penalty, batch, *, key):
    """The response's own loss, over penalties around the current one."""
    centre = jax.lax.stop_gradient(penalty)
    near = centre + SPREAD * jax.random.normal(key, (8,))
    return jnp.mean(jax.vmap(lambda p: ridge(response(net, p, centre), p, batch))(near))


def outer(net, penalty, batch):
    return fit(response(net, penalty, jax.lax.stop_gradient(penalty)), penalty, batch)


def main(steps=400):
    shared = dict(
        outer_params=jnp.asarray(-3.0), inner_data=TRAIN, outer_data=VALID,
        num_steps=steps, key=jax.random.key(3), keep="last",
    )  # fmt: skip
    net, adam = {"w": jnp.zeros(10), "slope": jnp.zeros(10)}, optax.adam(2e-2)
    solver = bx.inner.optax(adam, 5)
    loop = bx.algorithms.double_loop(solver, bx.hypergradient.one_step(), adam)
    out = bx.solve_bilevel(bx.objective(inner, keyed=True), outer, net, algorithm=loop, **shared)
    exact = bx.algorithms.double_loop(bx.inner.lbfgs(), bx.hypergradient.implicit(), adam)
    right = bx.solve_bilevel(ridge, fit, jnp.zeros(10), algorithm=exact, **shared)
    learned, wanted = float(out.outer_params), float(right.outer_params)
    print(f"log penalty {learned:.2f} by the response, {wanted:.2f} by the implicit gradient")
    return learned - wanted


if __name__ == "__main__":
    recipes.script(main, 5)
