"""Without derivatives of the adaptation: first-order MAML, Reptile, iMAML.
`python examples/recipes/maml_cheaper.py --form imaml`

Forms: first_order (the query's gradient at the adapted point), reptile (towards the adapted point),
imaml (implicit differentiation with a proximal term). Number at the end: mean squared error on new
tasks after adaptation to ten points, beside that of the untrained network.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

RATE, STEPS, H = 0.02, 5, bx.hypergradient
COPIES, SGD = bx.task_copies(8), bx.inner.optax(optax.sgd(RATE), STEPS)


def fit(w, meta, batch):
    return jnp.mean((recipes.sine_network(w, batch[0]) - batch[1]) ** 2)


def distance(w, meta):
    return 0.5 * optax.tree.norm(optax.tree.sub(w, meta), squared=True)


def moved_along(w, meta, batch):
    """The adapted point as a constant distance from the meta-parameters: its gradient is theirs."""
    return fit(jax.tree.map(lambda a, b: jax.lax.stop_gradient(a - b) + b, w, meta), meta, batch)


def towards(w, meta, batch):
    return distance(jax.lax.stop_gradient(w), meta)


def near(w, meta, batch):
    return fit(w, meta, batch) + distance(w, meta)


ROUGH = H.implicit(bx.linear.cg(maxiter=5), max_residual=jnp.inf)
LONG = bx.inner.optax(optax.sgd(RATE), 4 * STEPS)
SUM, MEAN = bx.tasks(fit, "sum"), bx.tasks(fit)
FORMS = {
    "plain": (SUM, MEAN, SGD, H.unrolled(), COPIES),  # how the first two adapt
    "first_order": (SUM, bx.tasks(moved_along), SGD, H.one_step(), COPIES),
    "reptile": (SUM, bx.tasks(towards), SGD, H.one_step(), COPIES),
    "imaml": (bx.tasks(near, "sum"), MEAN, LONG, ROUGH, COPIES),
}


def main(form="imaml", steps=600, test=30):
    meta = recipes.sine_start(jax.random.key(0))
    return recipes.compared(form, FORMS, meta, steps, test, None if form == "imaml" else "plain")


if __name__ == "__main__":
    recipes.script(main, 3, test=2)
