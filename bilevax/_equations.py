"""Newton's method and accelerated fixed-point iteration on pytrees, each to a tolerance, in one
loop.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import PyTree
from bilevax.results import RESULTS

_SHORTEST = 1e-12  # step of the search along Newton's direction
_WORSE = 2.0  # growth of the residual from which on accelerated steps start anew


class Reached(NamedTuple):
    """Where a solve ended: the point, the norm of the residual there, iterations, and a `RESULTS`
    code.
    """

    point: PyTree
    residual: Any
    iterations: Any
    code: Any


def _verdict(point: PyTree, solved: Any) -> jax.Array:
    code = jnp.where(solved, jnp.int32(RESULTS.success), jnp.int32(RESULTS.inner_not_converged))
    return jnp.where(tree.all_finite(point), code, jnp.int32(RESULTS.inner_nonfinite))


class _Newton(NamedTuple):
    y: PyTree
    norm: Any  # of the residual at y
    step: Any  # length of the last step
    error: Any  # what is left of the error after it, as far as can be told
    seen: Any  # the largest norm of an iterate
    iterations: Any
    stuck: Any


def newton(
    residual: Callable[[PyTree], PyTree],
    start: PyTree,
    solve: Callable[..., Any],
    *,
    maxiter: int,
    tol: Any,
) -> Reached:
    r"""Newton's method with step lengths 1, 1/2, 1/4, 1/8, and from there tenths, of which the
    first that shrinks the residual is taken.

    It ends when the error that is left, :math:`\theta/(1-\theta)` times the last step with the
    ratio :math:`\theta` of the last two, is below
    `tol` times the point: that depends on the units of neither the point nor the residual. At
    rounding, where no step shrinks the residual any more, the last step's own length tells.
    ``solve(matvec, b)`` returns a direction and its system's relative residual.
    """
    unit = numbers.rounding_unit(start)
    size = tree.norm(start)
    dtype = size.dtype
    tol, infinite = jnp.asarray(tol, dtype), jnp.asarray(jnp.inf, dtype)

    def enough(c: _Newton, accuracy) -> jax.Array:
        return jnp.maximum(accuracy * tree.norm(c.y), unit * c.seen)

    def going(c: _Newton) -> jax.Array:
        open_ = (c.norm > 0) & jnp.isfinite(c.norm) & ~c.stuck & (c.error > enough(c, tol))
        return open_ & (c.iterations < maxiter)

    def body(c: _Newton) -> _Newton:
        value, products = jax.linearize(residual, c.y)
        direction, left = solve(products, tree.neg(value))

        def at(length):
            y = tree.axpy(length, direction, c.y)
            return length, y, tree.norm(residual(y)).astype(dtype)

        def shrinks(trial):
            length, _, norm = trial
            return norm <= (1 - 1e-4 * length) * c.norm

        trial = lax.while_loop(
            lambda t: ~shrinks(t) & (t[0] > _SHORTEST),
            lambda t: at(t[0] / jnp.where(t[0] > 0.2, 2, 10)),
            at(jnp.ones((), dtype)),
        )
        good, (length, y, norm) = shrinks(trial), trial
        # A singular matrix gives no direction, which is not the same as one of no length.
        whole = jnp.where(left < 1, tree.norm(direction).astype(dtype), infinite)
        ratio = whole / c.step
        # The first step tells nothing of the rate; a shortened one does not, either.
        known = jnp.isfinite(c.step) & (ratio < 1) & (length == 1)
        error = jnp.where(known, whole * ratio / jnp.where(known, 1 - ratio, 1), infinite)
        return _Newton(
            y=tree.where(good, y, c.y),
            norm=jnp.where(good, norm, c.norm),
            step=whole,
            error=jnp.where(good, error, infinite),
            seen=jnp.maximum(c.seen, jnp.where(good, tree.norm(y).astype(dtype), 0)),
            iterations=c.iterations + 1,
            stuck=~good,
        )

    first = _Newton(
        start,
        tree.norm(residual(start)).astype(dtype),
        infinite,
        infinite,
        size,
        jnp.int32(0),
        jnp.asarray(False),
    )
    end = lax.while_loop(going, body, first)
    rounded = end.step <= enough(end, jnp.maximum(tol, unit**0.5))
    solved = (end.norm == 0) | (end.error <= enough(end, tol)) | rounded
    return Reached(
        end.y, end.norm, end.iterations, _verdict(end.y, solved & jnp.isfinite(end.norm))
    )


class _Anderson(NamedTuple):
    y: PyTree
    f: PyTree  # T(y) - y
    norm: Any  # of f
    moves: PyTree  # the last differences of y, a row each
    changes: PyTree  # and of f
    held: Any  # how many of the rows are of use
    seen: Any
    iterations: Any


def anderson(
    mapping: Callable[[PyTree], PyTree], start: PyTree, *, memory: int, maxiter: int, tol: Any
) -> Reached:
    r"""Fixed-point iteration with Anderson's acceleration over the last `memory` steps; plain
    iteration with 0.

    .. math::
        y_{k+1} = T(y_k) - (\Delta Y + \Delta F) \gamma, \qquad
        \gamma = \operatorname{argmin} \|f_k - \Delta F \gamma\|, \quad f = T(y) - y

    Where a step makes the residual more than twice as large, it is undone and the memory begins
    anew. It ends at ``‖T(y) − y‖ ≤ tol ‖y‖``.
    """
    unit = numbers.rounding_unit(start)
    dtype = tree.norm(start).dtype
    tol = jnp.asarray(tol, dtype)

    def left(y: PyTree) -> PyTree:
        return tree.sub(mapping(y), y)

    def norm(y: PyTree) -> jax.Array:
        return tree.norm(y).astype(dtype)

    def solved(c: _Anderson) -> jax.Array:
        return c.norm <= jnp.maximum(tol * norm(c.y), unit * c.seen)

    def going(c: _Anderson) -> jax.Array:
        return ~solved(c) & jnp.isfinite(c.norm) & (c.iterations < maxiter)

    def body(c: _Anderson) -> _Anderson:
        ahead = tree.add(c.y, c.f)
        if memory:
            weights = _least_squares(c.changes, c.f, c.held)
            ahead = tree.sub(
                ahead, tree.add(tree.rows_sum(weights, c.moves), tree.rows_sum(weights, c.changes))
            )
        f = left(ahead)
        new = norm(f)
        plain = c.held == 0
        good = plain | (new <= _WORSE * c.norm)
        move, change = tree.sub(ahead, c.y), tree.sub(f, c.f)
        return _Anderson(
            y=tree.where(good, ahead, c.y),
            f=tree.where(good, f, c.f),
            norm=jnp.where(good, new, c.norm),
            moves=_pushed(c.moves, move),
            changes=_pushed(c.changes, change),
            held=jnp.where(good, jnp.minimum(c.held + 1, memory), 0),
            seen=jnp.maximum(c.seen, jnp.where(good, norm(ahead), 0)),
            iterations=c.iterations + 1,
        )

    rows = jax.tree.map(lambda a: jnp.zeros((memory, *a.shape), a.dtype), start)
    f = left(start)
    end = lax.while_loop(
        going,
        body,
        _Anderson(start, f, norm(f), rows, rows, jnp.int32(0), norm(start), jnp.int32(0)),
    )
    done = solved(end)
    point = tree.where(
        done, tree.add(end.y, end.f), end.y
    )  # one application more, which is there already
    return Reached(point, end.norm, end.iterations, _verdict(point, done))


def _pushed(rows: PyTree, row: PyTree) -> PyTree:
    return jax.tree.map(
        lambda all_, one: jnp.concatenate([one[None], all_[:-1]]) if all_.shape[0] else all_,
        rows,
        row,
    )


def _least_squares(rows: PyTree, target: PyTree, held: Any) -> jax.Array:
    """``argmin ‖target − Σ w_i rows_i‖`` over the first `held` rows, directions that rounding hides
    left out.
    """
    gram = jax.vmap(tree.rows_dot, in_axes=(None, 0))(rows, rows)
    right = tree.rows_dot(rows, target)
    used = jnp.arange(gram.shape[0], dtype=jnp.int32) < held
    lengths = jnp.sqrt(jnp.diagonal(gram))
    scale = jnp.where(used & (lengths > 0), 1 / jnp.where(lengths > 0, lengths, 1), 0)
    values, vectors = jnp.linalg.eigh(gram * scale[:, None] * scale[None, :])
    seen = values > 100 * numbers.rounding_unit(gram.dtype) * jnp.maximum(values[-1], 1)
    weights = jnp.where(seen, vectors.T @ (scale * right) / jnp.where(seen, values, 1), 0)
    return scale * (vectors @ weights)
