"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric, PyTree
from bilevax.base import Bound, Linear, LinearInfo
from bilevax.linear import _common
from bilevax.linear._block import block_cg
from bilevax.linear.preconditioner import Preconditioner, checked, started
from bilevax.results import RESULTS


def cg(
    maxiter: int = 100,
    tol: Numeric = 1e-6,
    *,
    preconditioner: Callable[[PyTree], PyTree] | Preconditioner | Linear | None = None,
) -> Linear:
    r"""Conjugate gradients for symmetric positive definite systems.

    .. math::
        x_{k+1} = x_k + \alpha_k p_k, \quad r_{k+1} = r_k - \alpha_k A p_k, \quad
        p_{k+1} = M r_{k+1} + \beta_k p_k,
        \quad \alpha_k = \frac{r_k^\top M r_k}{p_k^\top A p_k}, \quad
        \beta_k = \frac{r_{k+1}^\top M r_{k+1}}{r_k^\top M r_k}

    One matvec an iteration; a start other than zero costs one more. Where rounding could hide the
    truth (:math:`\epsilon\|A\|\|x\|` above the residual asked for) the residual is measured by one
    matvec more, and the iteration goes on from the measured one for as long as this halves it; so a
    `tol` below what the precision allows ends early, with the true residual. Four vectors of
    memory. Several right sides at once (`Linear.block`, which `algorithms.multi_objective` asks
    for) are solved in one block of conjugate gradients where there is no `preconditioner`.

    Args:
      maxiter: the most iterations.
      tol: stop at ``‖Ax − b‖ <= tol ‖b‖``.
      preconditioner: an approximate inverse M of A, symmetric positive definite: a function from a
        vector to a vector (pytrees as `b`), or a `Preconditioner` such as `nystrom_preconditioner`,
        whose sketch is then drawn anew in each solve, or a solver that holds one, such as `ekfac`.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes are ``negative_curvature``
      (``p'Ap <= 0``) and ``adjoint_breakdown`` (singular to rounding) with the iterate before that
      direction (zero if that is worse than zero), ``adjoint_nonfinite``, ``adjoint_not_converged``.
      Rows that are zero are left out where they are all that
      makes the matrix singular: the others are solved, zeros stand there, the code is
      ``adjoint_breakdown`` and the residual says how much of b they are.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Examples:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.cg(tol=1e-5)(
      ...     lambda v: jnp.array([1.0, 2.0, 4.0]) * v, jnp.array([1.0, 1.0, 1.0]), jnp.zeros(3)
      ... )
      >>> x.round(3).tolist(), int(info.iterations), int(info.code)
      ([1.0, 0.5, 0.25], 3, 0)

    Source: Hestenes and Stiefel 1952, Methods of Conjugate Gradients for Solving Linear Systems.
    For residual replacement: van der Vorst and Ye 2000, Residual Replacement Strategies for Krylov
    Subspace Iterative Methods. For blocks: O'Leary 1980, The Block Conjugate Gradient Algorithm and
    Related Methods; Dubrulle 2001, Retooling the Method of Block Conjugate Gradients.
    """
    maxiter = numbers.count(maxiter, "maxiter")
    tol = numbers.positive(tol, "tol", example=1e-6)
    preconditioner = checked(preconditioner)
    block = Bound("block_cg", block_cg, maxiter=maxiter) if preconditioner is None else None
    return Linear(
        Bound("cg", _cg, maxiter=maxiter), tol, maxiter, preconditioner=preconditioner, block=block
    )


class _Carry(NamedTuple):
    x: PyTree
    r: PyTree
    p: PyTree  # what is multiplied next: a direction, or x where `check`
    # `_Numbers` as one vector: a scalar carried by itself costs a kernel and a copy an iteration,
    # which small systems feel
    numbers: Any
    counts: Any  # `_Counts`, likewise


class _Numbers(NamedTuple):
    rz: Any
    rr: Any
    a_norm: Any  # largest Rayleigh quotient met
    x_norm: Any  # bound on the norm of x
    measured: Any  # norm of the last residual that was measured, not updated
    apart: Any  # squared norm of the part of b in rows that are zero


class _Counts(NamedTuple):
    step: Any  # iterations
    matvecs: Any
    code: Any
    check: Any
    done: Any
    without: Any  # whether rows that are zero have been left out


def _cg(
    matvec: Callable[[PyTree], PyTree],
    b: PyTree,
    x0: PyTree = None,
    *,
    maxiter: int,
    tol: Any,
    preconditioner: Any = None,
) -> tuple[PyTree, LinearInfo]:
    b, x0 = _common.prepare(b, x0)
    precondition, setup = started(preconditioner, matvec, b)

    bb = tree.dot(b, b)
    dtype, b_norm = bb.dtype, jnp.sqrt(bb)
    unit, tiny = numbers.rounding_unit(b), numbers.rounding_unit(dtype)
    target = (
        jnp.maximum(jnp.asarray(tol, dtype), unit / 2) * b_norm
    )  # nothing is gained below the rounding of b itself
    x = tree.where(b_norm == 0, tree.zeros_like(b), x0)
    x_norm = tree.norm(x).astype(dtype)
    warm = x_norm != 0  # true for NaN too, which the first product then meets
    z = b if precondition is None else precondition(b)
    code = jnp.where(jnp.isfinite(bb), RESULTS.success, RESULTS.adjoint_nonfinite)
    start = _Carry(
        x=x,
        r=b,
        p=tree.where(warm, x, z),
        numbers=_vector(
            _Numbers(
                bb if precondition is None else tree.dot(b, z),
                bb,
                0,
                x_norm,
                jnp.where(warm, jnp.inf, b_norm),
                0,
            ),
            dtype,
        ),
        counts=_vector(
            _Counts(0, setup, code, warm, (b_norm == 0) | ~jnp.isfinite(bb), 0), jnp.int32
        ),
    )

    def body(c: _Carry) -> _Carry:
        last, count = _Numbers(*c.numbers), _Counts(*c.counts)
        checking = count.check != 0
        ap = matvec(c.p)
        pap, pp = tree.dot(c.p, ap), tree.dot(c.p, c.p)
        a_norm = jnp.maximum(last.a_norm, jnp.abs(pap) / jnp.where(pp == 0, 1, pp))
        noise = tiny * a_norm * pp
        negative = ~checking & (pap < -noise)
        alpha = last.rz / jnp.where(jnp.abs(pap) <= noise, 1, pap)
        length = jnp.where(checking, 0, last.x_norm + jnp.abs(alpha) * jnp.sqrt(pp)) + jnp.where(
            checking, jnp.sqrt(pp), 0
        )
        flat = ~checking & ~negative & ((pap <= noise) | _common.singular(a_norm, length, b_norm))
        # Rows of zeros (parameters that no batch has touched) make A singular and take no part in
        # the rest, whose iterate is of use. They are left out once they are met, and the residual
        # of the rest is measured.
        empty = jax.tree.map(lambda a: a == 0, ap)
        apart = tree.dot(c.r, jax.tree.map(lambda zero, a: jnp.where(zero, a, 0), empty, c.r))
        leaving = flat & (count.without == 0) & (apart > 0) & (apart < last.rr)
        without = (count.without != 0) | leaving
        flat &= ~leaving
        alpha = jnp.where(leaving, 0, alpha)
        # A measuring pass multiplies x itself: r = b - 1 Ap. That way the matvec is traced once.
        r = tree.axpy(-jnp.where(checking, 1, alpha), ap, tree.where(checking, b, c.r))
        r = jax.tree.map(lambda zero, a: jnp.where(without & zero, 0, a), empty, r)
        rr = tree.dot(r, r)
        drop = jnp.isinf(last.measured) & (rr > bb - last.apart)  # a start worse than zero
        r = jax.tree.map(
            lambda zero, a, full: jnp.where(drop, jnp.where(without & zero, 0, full), a),
            empty,
            r,
            b,
        )
        rr = jnp.where(drop, bb - last.apart, rr)
        finite = jnp.isfinite(rr) & jnp.isfinite(alpha)
        bad = negative | flat | ~finite
        moved = jnp.where(checking | bad, 0, alpha)
        x = tree.where(drop, tree.zeros_like(b), tree.axpy(moved, c.p, c.x))
        x = jax.tree.map(lambda zero, a: jnp.where(leaving & zero, 0, a), empty, x)
        x_norm = jnp.where(drop, 0, jnp.where(bad, last.x_norm, length))
        z = r if precondition is None else precondition(r)
        rz = rr if precondition is None else tree.dot(r, z)

        step = count.step + jnp.where(checking, 0, 1)
        r_norm = jnp.sqrt(rr)
        end = (r_norm <= target) | (step >= maxiter)
        trusted = checking | (unit * a_norm * x_norm <= jnp.maximum(r_norm, target))
        stalled = checking & (r_norm > 0.5 * last.measured)
        check = ((end & ~trusted) | leaving) & ~bad
        beta = jnp.where(checking, 0, rz / jnp.where(last.rz == 0, 1, last.rz))
        failure = jnp.where(
            negative,
            RESULTS.negative_curvature,
            jnp.where(flat, RESULTS.adjoint_breakdown, RESULTS.success),
        )
        failure = jnp.where(finite, failure, RESULTS.adjoint_nonfinite)
        outside = jnp.where(leaving, apart, last.apart)
        measured = jnp.where(leaving, jnp.inf, jnp.where(checking, r_norm, last.measured))
        kept = jnp.where(bad & ~checking, last.rr, rr)
        return _Carry(
            x=x,
            r=r,
            p=tree.where(check, x, tree.axpy(beta, c.p, z)),
            numbers=_vector(_Numbers(rz, kept, a_norm, x_norm, measured, outside), dtype),
            counts=_vector(
                _Counts(
                    step,
                    count.matvecs + 1,
                    failure,
                    check,
                    bad | stalled | (end & trusted & ~leaving),
                    without,
                ),
                jnp.int32,
            ),
        )

    end = lax.while_loop(lambda c: _Counts(*c.counts).done == 0, body, start)
    last, count = _Numbers(*end.numbers), _Counts(*end.counts)
    rr, code = (
        last.rr + last.apart,
        jnp.where((count.code == 0) & (count.without != 0), RESULTS.adjoint_breakdown, count.code),
    )
    lost = (code == RESULTS.adjoint_breakdown) & (
        rr > bb
    )  # a singular matrix makes x grow without bound before it is seen
    x, rr = tree.where(lost, tree.zeros_like(b), end.x), jnp.where(lost, bb, rr)
    return x, _common.info(count.matvecs, _common.relative(jnp.sqrt(rr), b_norm), code, tol)


def _vector(scalars: tuple[Any, ...], dtype: Any) -> Any:
    return jnp.stack([jnp.asarray(scalar).astype(dtype) for scalar in scalars])
