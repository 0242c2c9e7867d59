"""Mirror descent on the simplex, as a gradient transformation."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import optax

from bilevax import tree
from bilevax._core import numbers
from bilevax.inner.tunable import tunable


def mirror(step: float) -> optax.GradientTransformation:
    r"""Exponentiated gradient: mirror descent on the simplex, each leaf's last axis a distribution.

    .. math::
        \alpha^+ \propto \alpha \, \exp(-a \nabla)

    For a player who weighs (groups, examples, experts): weights stay positive and sum to one. With
    `extragradient` it is mirror-prox, with `optimistic` optimistic mirror descent.

    Args:
      step: a.

    Returns:
      An optax transformation, which needs the parameters.

    Raises:
      TypeError, ValueError: for a step that is not a positive number.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> opt = bx.games.mirror(1.0)
      >>> weights = jnp.array([0.5, 0.5])
      >>> update, _ = opt.update(jnp.array([0.0, 1.0]), opt.init(weights), weights)
      >>> [round(float(w), 3) for w in jax.tree.map(jnp.add, weights, update)]
      [0.731, 0.269]

    Source: Nemirovski and Yudin 1983; Kivinen and Warmuth, "Exponentiated gradient versus gradient
    descent for linear predictors" (1997); for groups Sagawa et al., "Distributionally robust neural
    networks" (ICLR 2020).
    """
    return tunable(_mirror, step=numbers.positive(step, "step"))


def _mirror(step: Any) -> optax.GradientTransformation:
    def init(params):
        return ()

    def update(grads, state, params=None):
        if params is None:
            raise ValueError(
                "params: got None; expected the parameters, which mirror descent multiplies. Try "
                "update(grads, state, params)."
            )

        def leaf(g, p):
            dtype = tree.accumulator(p)
            logits = jnp.log(jnp.maximum(p.astype(dtype), jnp.finfo(dtype).tiny)) - jnp.asarray(
                step, dtype
            ) * g.astype(dtype)
            return (jax.nn.softmax(logits, axis=-1) - p.astype(dtype)).astype(p.dtype)

        return jax.tree.map(leaf, grads, params), state

    return optax.GradientTransformation(init, update)
