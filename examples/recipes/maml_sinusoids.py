"""MAML and its relatives through the adaptation's steps, on sinusoids.
`python examples/recipes/maml_sinusoids.py --form anil`

Forms: maml, maml_plus_plus (a loss at every inner step), anil (the head alone adapts), meta_sgd (a
learned rate a parameter). Number at the end: mean squared error on new tasks after adaptation to
ten points, beside that of the untrained network adapted likewise.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

RATE, STEPS, EXACT = 0.02, 5, bx.hypergradient.unrolled()
COPIES, SGD = bx.task_copies(8), bx.inner.optax(optax.sgd(RATE), STEPS)


def fit(w, meta, batch):
    return jnp.mean((recipes.sine_network(w, batch[0]) - batch[1]) ** 2)


def head(w, meta, batch):
    return fit({**meta, **w}, meta, batch)


def every_step(path, meta, batch):
    """`path` has the parameters after each inner step."""
    return jnp.mean(jax.vmap(lambda w: fit(w, meta, batch))(path))


def rates(meta):
    return optax.stateless(lambda g, w: jax.tree.map(lambda r, g: -r[None] * g, meta["rates"], g))


heads = lambda meta: COPIES({"e": meta["e"]})
starts = lambda meta: COPIES(meta["start"])
SUM, MEAN = bx.tasks(fit, "sum"), bx.tasks(fit)
EVERY = bx.tasks(bx.objective(every_step, trajectory=True))
FORMS = {
    "maml": (SUM, MEAN, SGD, EXACT, COPIES),
    "maml_plus_plus": (SUM, EVERY, SGD, EXACT, COPIES),
    "anil": (bx.tasks(head, "sum"), bx.tasks(head), SGD, EXACT, heads),
    "meta_sgd": (SUM, MEAN, bx.inner.optax(rates, STEPS), EXACT, starts),
}


def main(form="maml", steps=600, test=30):
    meta = recipes.sine_start(jax.random.key(0))
    if form == "meta_sgd":
        meta = {"start": meta, "rates": jax.tree.map(lambda a: jnp.full_like(a, RATE), meta)}
    how = "maml" if form == "maml_plus_plus" else form
    return recipes.compared(form, FORMS, meta, steps, test, how)


if __name__ == "__main__":
    recipes.script(main, 3, test=2)
