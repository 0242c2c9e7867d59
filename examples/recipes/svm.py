"""A support vector machine whose kernel's widths are learned by gradient: the lower level is a
quadratic program with bounds. `python examples/recipes/svm.py`

The validation loss has several minima in the widths, so the gradient starts at nine points, all in
one program, and the best end is taken: a coarse grid that gradients refine.

Number at the end: validation loss with the learned widths, less that of the best of a grid of 21 x
21.
"""

import jax
import jax.numpy as jnp
import optax
import recipes

import bilevax as bx

PENALTY = 2.0


def points(key, many):
    """Two classes that wave along the first coordinate; the second moves slowly, one label in ten
    is wrong."""
    x = jax.random.uniform(key, (many, 2), minval=-2.0, maxval=2.0)
    sign = jnp.sign(jnp.sin(3.0 * x[:, 0]) + 0.3 * x[:, 1])
    return x, jnp.where(jax.random.uniform(jax.random.fold_in(key, 1), (many,)) < 0.1, -sign, sign)


TRAIN, VALID = points(jax.random.key(0), 60), points(jax.random.key(1), 200)


def kernel(log_widths, a, b):
    gap = (a[:, None] - b[None]) / jnp.exp(log_widths)
    return jnp.exp(-jnp.sum(gap**2, axis=-1) / 2) + 1.0  # the one stands for a bias


def dual(alpha, log_widths, batch):
    signed = alpha * batch[1]
    return (
        signed @ (kernel(log_widths, batch[0], batch[0]) @ signed) / 2
        - jnp.sum(alpha)
        + 1e-4 * alpha @ alpha
    )


def validation(alpha, log_widths, batch):
    margin = batch[1] * (kernel(log_widths, batch[0], TRAIN[0]) @ (alpha * TRAIN[1]))
    return jnp.mean(jax.nn.softplus(-margin))


def main(steps=60, across=21, starts=3):
    solver = bx.inner.qp(inequality=lambda alpha, log_widths, batch: (-alpha, alpha - PENALTY))
    loss = bx.value_and_hypergrad(
        dual, validation, solver=solver, hypergradient=bx.hypergradient.kkt()
    )
    line = jnp.linspace(-2.5, 2.0, across)
    grid = jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
    best = jnp.min(
        jax.jit(lambda w: jax.lax.map(lambda one: loss(jnp.zeros(60), one, TRAIN, VALID).value, w))(
            grid
        )
    )

    def learned(start):
        loop = bx.algorithms.double_loop(
            solver, bx.hypergradient.kkt(), optax.adam(optax.cosine_decay_schedule(0.1, steps))
        )
        out = bx.solve_bilevel(
            dual,
            validation,
            jnp.zeros(60),
            start,
            inner_data=TRAIN,
            outer_data=VALID,
            algorithm=loop,
            num_steps=steps,
        )
        return out.history["value"].min(), out.outer_params

    line = jnp.linspace(-1.5, 1.5, starts)
    values, widths = jax.jit(jax.vmap(learned))(
        jnp.stack(jnp.meshgrid(line, line), axis=-1).reshape(-1, 2)
    )
    found = jnp.argmin(values)
    first, second = map(float, jnp.exp(widths[found]))
    print(
        f"validation loss {values[found]:.4f} with learned widths {first:.2f} and {second:.2f}, "
        f"{best:.4f} with the best of the grid"
    )
    return float(values[found] - best)


if __name__ == "__main__":
    recipes.script(main, 2, across=2, starts=1)
