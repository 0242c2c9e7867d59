"""A lower level that is minimized by something that is no JAX code: a combinatorial solver, a
program, a server.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from bilevax import base, tree
from bilevax._core import numbers
from bilevax.base import Objective, PyTree, Scalar


def black_box(minimizer: Callable[..., Any], *, host: bool = False) -> base.InnerSolver:
    r"""Solve a lower level that is linear in the inner parameters over a set that only `minimizer`
    knows.

    .. math::
        y^*(c) = \operatorname{argmin}_{y \in Y} \langle c, y \rangle, \qquad c = \nabla_y g(y, x)

    Args:
      minimizer: ``costs -> inner_params``, costs shaped like the inner parameters: shortest paths,
        matchings, rankings, sorting.
      host: call it on the host with numpy arrays, once for each solve (one after another under
        `vmap`). Otherwise it is traced as JAX code.

    Returns:
      An `InnerSolver` of one step, not reversible; differentiate it by ``hypergradient.black_box``
      with the same minimizer.

    Raises:
      TypeError: for a minimizer that cannot be called.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> from bilevax import base
      >>> solver = bx.inner.black_box(lambda c: jax.nn.one_hot(jnp.argmin(c), c.size))
      >>> g = bx.objective(lambda y, x, batch: jnp.sum(x * y))
      >>> state, _ = solver.step(
      ...     g, base.InnerState(jnp.zeros(3)), jnp.array([2.0, 1.0, 3.0]), base.Ctx()
      ... )
      >>> state.params.tolist()
      [0.0, 1.0, 0.0]
    """
    if not callable(minimizer):
        raise TypeError(
            f"minimizer: got {type(minimizer).__name__}; expected a function costs -> inner_params."
        )
    return base.InnerSolver(
        init=_init,
        step=base.Bound("black_box", _step, minimizer=minimizer, host=numbers.flag(host, "host")),
        steps=1,
        reversible=False,
    )


def minimize(minimizer: Callable[..., Any], host: bool, costs: PyTree) -> PyTree:
    """The minimizer's answer for these costs, in their shapes and dtypes."""
    if not host:
        return jax.tree.map(lambda y, c: jnp.asarray(y).astype(c.dtype), minimizer(costs), costs)
    shapes = jax.tree.map(lambda c: jax.ShapeDtypeStruct(c.shape, c.dtype), costs)

    def call(costs):
        return jax.tree.map(
            lambda y, s: np.asarray(y, s.dtype).reshape(s.shape),
            minimizer(jax.tree.map(np.asarray, costs)),
            shapes,
        )

    return jax.pure_callback(call, shapes, costs, vmap_method="sequential")


def _init(params: PyTree) -> Any:
    return ()


def _step(
    objective: Objective,
    state: base.InnerState,
    outer: PyTree,
    ctx: base.Ctx,
    *,
    minimizer: Any,
    host: Any,
) -> tuple[base.InnerState, dict[str, Scalar]]:
    (_, (model, _)), costs = jax.value_and_grad(objective, has_aux=True)(state.params, outer, ctx)
    params = minimize(minimizer, host, costs)
    value = tree.dot(costs, params)
    return base.InnerState(params, state.opt, model), {"value": value, "iterations": jnp.int32(1)}
