"""A training whose examples have weights: what influence is a derivative of, and what is done again
to check it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

from bilevax import check, functions, tree
from bilevax._core import numbers
from bilevax._core import optimizer as updates_of
from bilevax.base import PyTree
from bilevax.data.sources import check_arrays


class Training:
    """A training of weighted examples; made by `training`."""

    def __init__(
        self, losses: Any, optimizer: Any, params: PyTree, data: Any, order: Any, regularizer: Any
    ):
        self.losses, self.optimizer, self.params, self.data = losses, optimizer, params, data
        self.order, self.regularizer = order, regularizer
        self.examples = int(jax.tree.leaves(data)[0].shape[0])
        self.num_steps, self.batch_size = order.shape

    def __repr__(self) -> str:
        return f"training({self.examples} examples, {self.num_steps} steps of {self.batch_size})"

    def objective(self, params: PyTree, weights: jax.Array, batch: dict[str, Any]) -> jax.Array:
        """The weighted loss of a batch: ``mean(weights[index] * losses) + regularizer``, weights
        not renormalised.
        """
        return _weighted(self.losses, self.regularizer, params, weights, batch)

    def batch(self, step: int) -> dict[str, Any]:
        """The batch of a step, read on the host."""
        data, order = self._on_host
        return {"rows": jax.tree.map(lambda a: a[order[step]], data), "index": order[step]}

    @functools.cached_property
    def _on_host(self) -> tuple[PyTree, np.ndarray]:
        return jax.tree.map(np.asarray, self.data), np.asarray(self.order)

    def retrain(self, weights: Any, checkpoints: Sequence[int] | None = None) -> PyTree:
        """The parameters at the end of a training with these weights.

        Args:
          weights: a weight an example, ``[examples]``; or many such rows, for as many trainings.
          checkpoints: steps, from 1, after which the parameters are taken, for `tracin`; None for
            the end alone.

        Returns:
          Parameters, with one more axis in front for many trainings. With checkpoints a list of
          them.

        Examples:
          >>> import jax.numpy as jnp, optax, bilevax as bx
          >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
          >>> train = bx.attribution.training(
          ...     losses, optax.sgd(0.5), jnp.float32(0.0), jnp.array([1.0, 3.0]), [[0, 1]] * 20
          ... )
          >>> ends = train.retrain(
          ...     jnp.array([[1.0, 1.0], [0.0, 1.0]])
          ... )  # its step is half as long with one example
          >>> [round(w, 2) for w in ends.tolist()]
          [2.0, 2.99]
        """
        weights = jnp.asarray(weights)
        at = jnp.asarray([self.num_steps] if checkpoints is None else list(checkpoints), jnp.int32)
        kept = _retrained(
            (self.losses, self.optimizer, self.regularizer),
            self.params,
            weights,
            self.data,
            self.order,
            at,
        )
        axis = weights.ndim - 1  # behind that of the trainings
        pick = lambda i: jax.tree.map(lambda a: lax.index_in_dim(a, i, axis, keepdims=False), kept)
        return pick(0) if checkpoints is None else [pick(i) for i in range(at.shape[0])]


def _weighted(losses: Any, regularizer: Any, params: PyTree, weights: Any, batch: PyTree) -> Any:
    total = weighted_mean(weights[batch["index"]], losses(params, batch["rows"]))
    return total if regularizer is None else total + regularizer(params)


@functools.partial(
    jax.jit, static_argnums=0
)  # here, so that trainings that differ in numbers only are compiled once
def _retrained(
    functions: Any, params: PyTree, weights: Any, data: Any, order: Any, at: Any
) -> PyTree:
    """The parameters after each of the steps `at`, for one row of weights or for many."""
    if weights.ndim == 2:
        return lax.map(lambda one: _retrained(functions, params, one, data, order, at), weights)
    losses, optimizer, regularizer = functions

    def body(carry, now):
        params, state, kept = carry
        step, index = now
        batch = {"rows": jax.tree.map(lambda a: a[index], data), "index": index}
        grads = jax.grad(lambda p: _weighted(losses, regularizer, p, weights, batch))(params)
        updates, state = updates_of.update(optimizer, grads, state, params)
        params = updates_of.apply(params, updates)
        here = at == step
        kept = jax.tree.map(
            lambda k, p: jnp.where(here.reshape(-1, *[1] * p.ndim), p[None], k), kept, params
        )
        return (params, state, kept), None

    kept = jax.tree.map(lambda p: jnp.zeros((at.shape[0], *p.shape), p.dtype), params)
    start = params, updates_of.init(optimizer, params), kept
    steps = jnp.arange(1, order.shape[0] + 1, dtype=jnp.int32)
    return lax.scan(body, start, (steps, order))[0][2]


def weighted_mean(weights: jax.Array, losses: jax.Array) -> jax.Array:
    """The mean of losses ``[rows]`` or ``[rows, tokens]`` under weights of their shape, or one a
    row.
    """
    extra = losses.ndim - weights.ndim
    return jnp.mean(weights.reshape(weights.shape + (1,) * extra).astype(losses.dtype) * losses)


def training(
    losses: Callable[[PyTree, PyTree], jax.Array],
    optimizer: optax.GradientTransformation,
    params: PyTree,
    data: PyTree,
    order: Any,
    *,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
) -> Training:
    r"""A training of weighted examples, in an order of its own.

    .. math::
        y_{t+1} = U\Bigl(y_t, \nabla_y \Bigl[
        \tfrac{1}{B} \sum_{i \in \text{order}_t} w_i \ell_i(y_t) + r(y_t)\Bigr]\Bigr)

    Weights are not renormalised in a batch: leaving an example out takes its term away, and does
    not make the others weigh more.

    Args:
      losses: ``(params, rows) -> [rows]``, the loss of each row of a batch; or ``[rows, tokens]``.
      optimizer: an optax transformation.
      params: initial parameters.
      data: arrays with a common leading axis, an entry an example.
      order: integers ``[steps, batch_size]``: the rows of each step.
      regularizer: a term ``params -> scalar`` that no example's weight touches.

    Returns:
      A `Training`, with ``retrain(weights)`` and what `metagradient` differentiates.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> bx.attribution.training(
      ...     losses, optax.sgd(0.5), jnp.float32(0.0), jnp.array([1.0, 3.0]), [[0, 1]] * 20
      ... )
      training(2 examples, 20 steps of 2)
    """
    numbers.function(losses, "losses", "(params, rows) -> losses, one a row")
    if regularizer is not None:
        numbers.function(regularizer, "regularizer", "(params) -> scalar")
    check.transformation(optimizer, "optimizer")
    params = check.arrays(params, "params")
    check.params(params, "params")
    check.finite(params, "params")
    check_arrays(data, "data")
    data = jax.tree.map(jnp.asarray, data)
    if order is None or isinstance(order, dict):
        raise TypeError(f"order: got {check.describe(order)}; expected integers.")
    numbers.arrays(order, "order")
    rows = jnp.asarray(order)
    examples = int(jax.tree.leaves(data)[0].shape[0])
    if rows.ndim != 2 or not rows.size or not jnp.issubdtype(rows.dtype, jnp.integer):
        raise ValueError(
            f"order: got {check.describe(rows)}; expected integers [steps, batch_size], the rows "
            "of each step."
        )
    if int(rows.min()) < 0 or int(rows.max()) >= examples:
        raise ValueError(
            f"order: got rows {int(rows.min())} to {int(rows.max())}; expected 0 to "
            f"{examples - 1}, the examples."
        )
    check_losses(losses, params, jax.tree.map(lambda a: a[rows[0]], data))
    return Training(losses, optimizer, tree.strong(params), data, rows, regularizer)


def check_losses(
    losses: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    rows: PyTree,
    argument: str = "params",
) -> None:
    """Refuse what has no entry for each of these rows."""
    count = jax.tree.leaves(rows)[0].shape[0]
    with functions.told("losses", "(params, rows)", **{argument: params}, rows=rows):
        one = jax.eval_shape(losses, params, rows)
    if not hasattr(one, "shape") or one.shape[:1] != (count,):
        raise ValueError(
            f"losses: returned {check.describe(one)}; expected an array with an entry a row, "
            f"[{count}] or [{count}, tokens]."
        )


__all__ = ["Training", "training"]
