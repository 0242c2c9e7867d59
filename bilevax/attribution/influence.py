"""Influence of training examples on a measured quantity: its derivative in their weights, exact or
by one of its approximations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import check, functions, replay, tree
from bilevax._core import numbers
from bilevax._core.showing import screenful
from bilevax.attribution.training import Training, check_losses
from bilevax.base import LinearSolver, PyTree, as_linear
from bilevax.data.sources import check_arrays
from bilevax.linear import Preconditioner, cg, precondition
from bilevax.linear.preconditioner import Point, at


class Influence(NamedTuple):
    """What examples do to a measured quantity.

    Attributes:
      scores: derivative of the measured quantity in each example's weight, ``[examples]``
        (``[examples, tokens]`` where tokens have weights; with an axis of queries in front where
        the measure is a vector). Leaving example i out changes the quantity by about
        ``-scores[i]``.
      value: the measured quantity at weights of one.
      info: what the method says of itself.
    """

    scores: jax.Array
    value: jax.Array
    info: dict[str, Any]

    def __repr__(self) -> str:
        return screenful(self)


def metagradient(
    train: Training,
    measure: Callable[[PyTree, PyTree], jax.Array],
    measured: PyTree = None,
    *,
    tokens: bool = False,
    **keywords: Any,
) -> Influence:
    """The derivative through the whole training: what a small change of a weight does, whatever the
    optimizer and however far it is trained.

    One way back for all examples; for a vector of queries, one for all of them together.

    Args:
      train: a `training`.
      measure: ``(params, measured) -> scalar``, or a vector, a value a query.
      measured: the batch that `measure` is given.
      tokens: a weight for each token (losses ``[rows, tokens]``) in place of each example.
      **keywords: those of `replay.value_and_metagrad`: ``schedule``, ``microbatches``,
        ``sharding``, ``checkpoint``, ...

    Returns:
      An `Influence`; its info is the replay's.

    Raises:
      TypeError, ValueError: for arguments of another kind; `SolveError` where something is not
        finite.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> train = bx.attribution.training(
      ...     losses, optax.sgd(0.5), jnp.float32(0.0), jnp.array([1.0, 3.0]), [[0, 1]] * 20
      ... )
      >>> bx.attribution.metagradient(train, lambda w, _: w).scores.round(2).tolist()
      [-0.5, 0.5]

    Source: Ilyas and Engstrom, "MAGIC: near-optimal data attribution for deep learning" (arXiv
    2504.16430).
    """
    _check_training(train)
    numbers.function(measure, "measure", _MEASURE)
    tokens, measured = numbers.flag(tokens, "tokens"), check.batch(measured, "measured")
    outer = lambda params, weights, batch: measure(params, batch)
    fn = replay.value_and_metagrad(
        train.objective, outer, train.optimizer, train.num_steps, **keywords
    )
    found = fn(train.params, _ones(train, tokens), replay.reader(train.batch), measured)
    return Influence(found.grad, found.value, found.info)


def _ones(train: Training, tokens: bool) -> jax.Array:
    rows = jax.tree.map(lambda a: a[: train.batch_size], train.data)
    losses = jax.eval_shape(train.losses, train.params, rows)
    if tokens and losses.ndim < 2:
        raise ValueError(
            f"tokens: got True with losses of shape {list(losses.shape)}; expected losses [rows, "
            "tokens]."
        )
    return jnp.ones(
        (train.examples, *losses.shape[1:]) if tokens else (train.examples,), losses.dtype
    )


def implicit(
    losses: Callable[[PyTree, PyTree], jax.Array],
    measure: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    data: PyTree,
    measured: PyTree = None,
    *,
    linear: LinearSolver | None = None,
    damping: float = 0.0,
    regularizer: Callable[[PyTree], jax.Array] | None = None,
    tokens: bool = False,
) -> Influence:
    r"""Influence functions: the derivative of the measured quantity at the solution of the weighted
    problem.

    .. math::
        s_i = -\tfrac{1}{N} \nabla f(y)^\top (H + \rho I)^{-1} \nabla \ell_i(y), \qquad
        H = \nabla^2 \Bigl[\tfrac{1}{N} \sum_i \ell_i + r\Bigr](y)

    Right where `params` solve the problem and its Hessian is positive definite. Networks are
    neither, so that `damping` and a fixed number of iterations decide what comes out;
    `linear_datamodeling_score` tells what it is worth.

    Args:
      losses: ``(params, rows) -> [rows]``, or ``[rows, tokens]``.
      measure: ``(params, measured) -> scalar``, or a vector, a value a query.
      params: where the training ended.
      data: arrays with a common leading axis, an entry an example.
      measured: the batch that `measure` is given.
      linear: a linear solver; None for ``linear.cg(maxiter=100)``. For networks
        ``linear.ekfac((network, loss))``, alone or, dearer and better, as
        ``linear.gauss_newton(network, loss, linear.cg(maxiter=20,
        preconditioner=linear.ekfac((network, loss))))``; such functions take ``(params, rows)`` and
        ``(outputs, rows)``.
      damping: what is added to the Hessian's diagonal, at least 0.
      regularizer: a term ``params -> scalar`` beside the losses.
      tokens: a weight for each token in place of each example.

    Returns:
      An `Influence`; its info has ``iterations``, ``residual`` and ``code`` of the linear solves.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> found = bx.attribution.implicit(
      ...     losses, lambda w, _: w, jnp.float32(2.0), jnp.array([1.0, 3.0])
      ... )
      >>> found.scores.tolist()
      [-0.5, 0.5]

    Source: Koh and Liang, "Understanding black-box predictions via influence functions" (ICML
    2017).
    """
    rho = numbers.positive(damping, "damping", zero=True)
    tokens = numbers.flag(tokens, "tokens")
    if regularizer is not None:
        numbers.function(regularizer, "regularizer", "(params) -> scalar")
    solver = cg(maxiter=100) if linear is None else linear
    if not callable(solver):
        raise TypeError(
            f"linear: got {check.describe(solver)}; expected a linear solver. Try "
            "linear.cg(maxiter=100)."
        )
    numbers.takes(solver, "linear", "(matvec, b, x0) -> (x, info)")
    params, data, measured = _checked(losses, measure, params, data, measured)

    @jax.jit
    def found(params, data, measured):
        def total(params):
            loss = jnp.mean(losses(params, data))
            return loss if regularizer is None else loss + regularizer(params)

        _, product = jax.linearize(jax.grad(total), params)
        matvec = lambda v: tree.axpy(rho, v, product(v))

        call = lambda fn, first, rows, **keywords: fn(first, rows, **keywords)
        point = Point(
            lambda p, rows: jnp.mean(losses(p, rows)),
            params,
            data,
            call,
            None if damping == 0 else rho,
        )
        placed = at(as_linear(solver), point)
        held = placed.preconditioner
        if isinstance(held, Preconditioner):  # one for all queries
            placed = precondition(placed, held.refresh(matvec, held.init(params)))

        def one(gradient):
            q, info = placed(matvec, gradient, tree.zeros_like(gradient))
            _, along = jax.jvp(lambda p: losses(p, data), (params,), (q,))
            along = along if tokens else along.reshape(along.shape[0], -1).mean(-1)
            return -along / (along.size if tokens else along.shape[0]), info

        value, gradients = _gradients(measure, params, measured)
        return (value, *(one(gradients) if value.ndim == 0 else lax.map(one, gradients)))

    value, scores, info = found(params, data, measured)
    return Influence(scores, value, info._asdict())


_MEASURE = "(params, measured) -> scalar, or a vector"


def _checked(
    losses: Any, measure: Any, params: PyTree, data: PyTree, measured: PyTree, name: str = "params"
) -> tuple[PyTree, PyTree, PyTree]:
    """The arrays of an influence, each argument refused by its name."""
    numbers.function(losses, "losses", "(params, rows) -> losses, one a row")
    numbers.function(measure, "measure", _MEASURE)
    params = check.arrays(params, name)
    check.params(params, name)
    check.finite(params, name)
    check_arrays(data, "data")
    data = jax.tree.map(jnp.asarray, data)
    check_losses(losses, params, data, name)
    measured = check.batch(measured, "measured")
    with functions.told("measure", "(params, measured)", **{name: params}, measured=measured):
        jax.eval_shape(measure, params, measured)
    return params, data, measured


def _gradients(measure: Any, params: PyTree, measured: Any) -> tuple[jax.Array, PyTree]:
    """The measured quantity and its gradient, with an axis in front for a vector of queries."""
    value, pull = jax.vjp(lambda p: measure(p, measured), params)
    if value.ndim == 0:
        return value, pull(jnp.ones_like(value))[0]
    return value, jax.vmap(lambda row: pull(row)[0])(jnp.eye(value.shape[0], dtype=value.dtype))


def tracin(
    losses: Callable[[PyTree, PyTree], jax.Array],
    measure: Callable[[PyTree, PyTree], jax.Array],
    checkpoints: Sequence[PyTree],
    data: PyTree,
    measured: PyTree = None,
    *,
    step_sizes: Sequence[float] | None = None,
    tokens: bool = False,
) -> Influence:
    r"""Products of gradients, summed over checkpoints of the training.

    .. math::
        s_i = -\sum_k \eta_k \nabla f(y_k)^\top \nabla \ell_i(y_k)

    First order in each step, as if steps did not act on later ones. A baseline: the scale is free.

    Args:
      losses: ``(params, rows) -> [rows]``, or ``[rows, tokens]``.
      measure: ``(params, measured) -> scalar``, or a vector, a value a query.
      checkpoints: parameters at some moments of the training, at least one.
      data: arrays with a common leading axis, an entry an example.
      measured: the batch that `measure` is given.
      step_sizes: a weight a checkpoint; None for one each.
      tokens: a score for each token in place of each example.

    Returns:
      An `Influence`, its value at the last checkpoint.

    Raises:
      ValueError: without a checkpoint, or with another number of step sizes.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> found = bx.attribution.tracin(
      ...     losses, lambda w, _: w, [jnp.float32(0.0), jnp.float32(2.0)], jnp.array([0.0, 4.0])
      ... )
      >>> found.scores.tolist()
      [-2.0, 6.0]

    Source: Pruthi et al., "Estimating training data influence by tracing gradient descent" (NeurIPS
    2020).
    """
    if not isinstance(checkpoints, (list, tuple)):
        raise TypeError(
            f"checkpoints: got {check.describe(checkpoints)}; expected a list of parameters."
        )
    points, given, tokens = list(checkpoints), step_sizes, numbers.flag(tokens, "tokens")
    if not (
        given is None
        or isinstance(given, (list, tuple))
        or (isinstance(given, (np.ndarray, jax.Array)) and given.ndim == 1)
    ):
        raise TypeError(
            f"step_sizes: got {check.describe(given)}; expected numbers, one a checkpoint, or None."
        )
    numbers.arrays(given, "step_sizes")
    sizes = [1.0] * len(points) if given is None else [float(size) for size in given]
    if not all(map(math.isfinite, sizes)):
        raise ValueError(f"step_sizes: got {sizes}; expected finite numbers.")
    if not points:
        raise ValueError("checkpoints: got 0; expected at least one.")
    if len(sizes) != len(points):
        raise ValueError(
            f"step_sizes: got {len(sizes)} for {len(points)} checkpoints; expected a size for each."
        )

    @jax.jit
    def one(params, data, measured):
        value, gradients = _gradients(measure, params, measured)

        def along(gradient):
            change = jax.jvp(lambda p: losses(p, data), (params,), (gradient,))[1]
            return change if tokens else change.reshape(change.shape[0], -1).mean(-1)

        return value, along(gradients) if value.ndim == 0 else lax.map(along, gradients)

    checked = [
        _checked(losses, measure, params, data, measured, f"checkpoints[{i}]")
        for i, params in enumerate(points)
    ]
    found = [one(*arrays) for arrays in checked]
    scores = -sum(size * scores for size, (_, scores) in zip(sizes, found, strict=True))
    return Influence(scores, found[-1][0], {})


def similarity(
    losses: Callable[[PyTree, PyTree], jax.Array],
    measure: Callable[[PyTree, PyTree], jax.Array],
    params: PyTree,
    data: PyTree,
    measured: PyTree = None,
    *,
    batch_size: int = 32,
) -> Influence:
    r"""Cosines between the gradient of the measured quantity and those of the examples.

    .. math::
        s_i = -\frac{\nabla f(y)^\top \nabla \ell_i(y)}{\lVert\nabla f(y)\rVert \,
        \lVert\nabla \ell_i(y)\rVert}

    A baseline: the scale says nothing.

    Args:
      losses: ``(params, rows) -> [rows]``, or ``[rows, tokens]``.
      measure: ``(params, measured) -> scalar``, or a vector, a value a query.
      params: where the training ended.
      data: arrays with a common leading axis, an entry an example.
      measured: the batch that `measure` is given.
      batch_size: examples whose gradients are held at once, at least 1.

    Returns:
      An `Influence`. An example whose gradient is zero has a score of zero.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> losses = lambda w, rows: 0.5 * (w - rows) ** 2
      >>> bx.attribution.similarity(
      ...     losses, lambda w, _: w, jnp.float32(2.0), jnp.array([1.0, 3.0])
      ... ).scores.tolist()
      [-1.0, 1.0]

    Source: Charpiat et al., "Input similarity from the neural network perspective" (NeurIPS 2019).
    """
    size = numbers.count(batch_size, "batch_size")

    @jax.jit
    def found(params, data, measured):
        value, gradients = _gradients(measure, params, measured)

        def one(row):
            loss = lambda p: jnp.mean(losses(p, jax.tree.map(lambda a: a[None], row)))
            gradient = jax.grad(loss)(params)
            return (
                cosine(gradients, gradient)
                if value.ndim == 0
                else jax.vmap(cosine, (0, None))(gradients, gradient)
            )

        def cosine(a, b):
            norms = tree.norm(a) * tree.norm(b)
            return jnp.where(norms > 0, tree.dot(a, b) / jnp.where(norms > 0, norms, 1), 0)

        return value, -lax.map(one, data, batch_size=size).T

    value, scores = found(*_checked(losses, measure, params, data, measured))
    return Influence(scores, value, {})


def grouped(scores: jax.Array, groups: Any, num_groups: int | None = None) -> jax.Array:
    """Scores of groups: the derivative in a weight that all examples of a group share is the sum of
    theirs.

    Args:
      scores: ``[..., examples]``.
      groups: the group of each example, integers ``[examples]`` from 0.
      num_groups: how many groups; None for one more than the largest.

    Returns:
      ``[..., groups]``.

    Raises:
      ValueError: for groups of another shape.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> bx.attribution.grouped(jnp.array([1.0, 2.0, 4.0]), jnp.array([0, 1, 0])).tolist()
      [5.0, 2.0]
    """
    for name, given in (("scores", scores), ("groups", groups)):
        if given is None or isinstance(given, dict):
            raise TypeError(f"{name}: got {check.describe(given)}; expected an array.")
        numbers.arrays(given, name)
    groups, scores = jnp.asarray(groups), jnp.asarray(scores)
    if scores.ndim == 0:
        raise ValueError(f"scores: got {check.describe(scores)}; expected one an example.")
    if (
        groups.ndim != 1
        or not jnp.issubdtype(groups.dtype, jnp.integer)
        or groups.shape[0] != scores.shape[-1]
    ):
        raise ValueError(
            f"groups: got {check.describe(groups)} for scores {list(scores.shape)}; expected an "
            "integer an example."
        )
    most = int(groups.max(initial=-1)) + 1
    count = most if num_groups is None else numbers.count(num_groups, "num_groups", least=most)
    total = jax.ops.segment_sum(jnp.moveaxis(scores, -1, 0), groups, count)
    return jnp.moveaxis(total, 0, -1)


def _check_training(train: Any) -> None:
    if not isinstance(train, Training):
        raise TypeError(
            f"train: got {check.describe(train)}; expected a Training. Try "
            "attribution.training(losses, optimizer, ...)."
        )


__all__ = ["Influence", "grouped", "implicit", "metagradient", "similarity", "tracin"]
