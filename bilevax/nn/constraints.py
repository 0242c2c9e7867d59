"""Feasible sets of outer parameters, as optax transformations."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import optax

from bilevax import check
from bilevax._core import numbers
from bilevax.base import Bound, PyTree


def constrained(
    projection: Callable[..., PyTree],
    wrt: Callable[[tuple[Any, ...], Any], bool] | None = None,
    **settings: Any,
) -> optax.GradientTransformation:
    """Keep parameters in a set: the last link of an optimizer's chain.

    ``u ← P(x + u) − x``

    Args:
      projection: ``array -> array``, such as those of ``optax.projections``: ``projection_box``,
        ``projection_simplex``, ``projection_non_negative``. Each leaf is projected by itself.
      wrt: a predicate ``(path, value) -> bool`` such as `paths`: the leaves that are projected.
        None: all.
      **settings: further arguments of `projection` (``lower=``, ``upper=``, ``scale=``).

    Returns:
      A ``GradientTransformation``. To be put last, as in ``optax.chain(optax.adam(1e-2),
      nn.constrained(...))``.

    Raises:
      TypeError: if `projection` is not a function. When it is run, if it is not given parameters.

    Examples:
      >>> import jax.numpy as jnp, optax
      >>> from bilevax import nn
      >>> opt = optax.chain(optax.sgd(1.0), nn.constrained(optax.projections.projection_simplex))
      >>> x = jnp.array([0.5, 0.5])
      >>> updates, _ = opt.update(jnp.array([0.2, 3.0]), opt.init(x), x)
      >>> print(optax.apply_updates(x, updates))
      [1. 0.]

    Source: Duchi et al., "Efficient projections onto the l1-ball for learning in high dimensions"
    (ICML 2008), for the simplex.
    """
    if not callable(projection):
        raise TypeError(
            f"projection: got {check.describe(projection)}; expected a function tree -> tree. Try "
            "optax.projections.projection_box."
        )
    if wrt is not None:
        numbers.function(wrt, "wrt", "(path, leaf) -> bool")
    return optax.GradientTransformation(
        Bound("constrained", _init, projection=projection),
        Bound("constrained", _update, projection=projection, wrt=wrt, settings=settings),
    )


def _init(params: PyTree, *, projection: Any) -> Any:
    return optax.EmptyState()


def _update(
    updates: Any, state: Any, params: PyTree = None, *, projection: Any, wrt: Any, settings: Any
) -> Any:
    if params is None:
        raise TypeError(
            "params: got None; expected the parameters, which a projection depends on: "
            "opt.update(grads, state, params)."
        )

    def leaf(path, u, p):
        if wrt is not None and not wrt(
            tuple(getattr(k, "key", getattr(k, "idx", getattr(k, "name", None))) for k in path), p
        ):
            return u
        return projection(p + u.astype(p.dtype), **settings) - p

    return jax.tree_util.tree_map_with_path(leaf, updates, params), state


__all__ = ["constrained"]
