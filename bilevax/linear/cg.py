"""Conjugate gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax.base import Bound, LinearInfo
from bilevax.linear import _common
from bilevax.linear.nystrom import Preconditioner, applied
from bilevax.results import RESULTS

PyTree = Any


def cg(maxiter: int = 100, tol: float = 1e-6, *, preconditioner: Callable[[PyTree], PyTree] | Preconditioner | None = None) -> Bound:
    r"""Conjugate gradients for symmetric positive definite systems.

    .. math::
        x_{k+1} = x_k + \alpha_k p_k, \quad r_{k+1} = r_k - \alpha_k A p_k, \quad p_{k+1} = M r_{k+1} + \beta_k p_k,
        \quad \alpha_k = \frac{r_k^\top M r_k}{p_k^\top A p_k}, \quad \beta_k = \frac{r_{k+1}^\top M r_{k+1}}{r_k^\top M r_k}

    One matvec an iteration; a start other than zero costs one more. Where rounding could hide the truth (:math:`\epsilon\|A\|\|x\|` above
    the residual asked for) the residual is measured by one matvec more, and the iteration goes on from the measured one for as long as this
    halves it; so a `tol` below what the precision allows ends early, with the true residual. Four vectors of memory.

    Args:
      maxiter: the most iterations.
      tol: stop at ``‖Ax − b‖ <= tol ‖b‖``.
      preconditioner: an approximate inverse M of A, symmetric positive definite: a function from a vector to a vector (pytrees as `b`), or a
        `Preconditioner` such as `nystrom_preconditioner`, whose sketch is then drawn anew in each solve.

    Returns:
      A `LinearSolver`, ``(matvec, b, x0) -> (x, LinearInfo)``. Codes: ``negative_curvature`` (``p'Ap <= 0``) and ``adjoint_breakdown``
      (singular to rounding) with the iterate before that direction (zero if
      that is worse than zero), ``adjoint_nonfinite``, ``adjoint_not_converged``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive.

    Example:
      >>> import jax.numpy as jnp
      >>> from bilevax import linear
      >>> x, info = linear.cg(tol=1e-5)(lambda v: jnp.array([1.0, 2.0, 4.0]) * v, jnp.array([1.0, 1.0, 1.0]), jnp.zeros(3))
      >>> x.round(3).tolist(), int(info.iterations), int(info.code)
      ([1.0, 0.5, 0.25], 3, 0)

    Reference:
      Hestenes and Stiefel 1952, Methods of Conjugate Gradients for Solving Linear Systems. For residual replacement: van der Vorst and Ye
      2000, Residual Replacement Strategies for Krylov Subspace Iterative Methods.
    """
    _common.check_count("maxiter", maxiter)
    _common.check_positive("tol", tol, 1e-6)
    if not (preconditioner is None or callable(preconditioner) or isinstance(preconditioner, Preconditioner)):
        raise TypeError(
            f"preconditioner: got {type(preconditioner).__name__}; expected a function of a vector, a Preconditioner or None. "
            "Try linear.nystrom_preconditioner(rank=10)."
        )
    return Bound("cg", _cg, maxiter=maxiter, tol=tol, preconditioner=preconditioner)


class _Carry(NamedTuple):
    step: Any  # iterations
    matvecs: Any
    x: PyTree
    r: PyTree
    p: PyTree  # what is multiplied next: a direction, or x where `check`
    rz: Any
    rr: Any
    a_norm: Any  # largest Rayleigh quotient met
    x_norm: Any  # bound on the norm of x
    measured: Any  # norm of the last residual that was measured, not updated
    check: Any
    code: Any
    done: Any


def _cg(matvec, b, x0=None, *, maxiter, tol, preconditioner) -> tuple[PyTree, LinearInfo]:
    b, x0 = _common.prepare(b, x0)
    setup = 0
    precondition = preconditioner
    if isinstance(preconditioner, Preconditioner):
        state = preconditioner.refresh(matvec, preconditioner.init(b))
        precondition, setup = applied(preconditioner, state), preconditioner.cost(b)

    bb = tree.dot(b, b)
    dtype, b_norm = bb.dtype, jnp.sqrt(bb)
    unit, tiny = _common.eps(b), float(jnp.finfo(dtype).eps)
    target = jnp.maximum(jnp.asarray(tol, dtype), unit / 2) * b_norm  # nothing is gained below the rounding of b itself
    x = tree.where(b_norm == 0, tree.zeros_like(b), x0)
    x_norm = tree.norm(x).astype(dtype)
    warm = x_norm != 0  # true for NaN too, which the first product then meets
    z = b if precondition is None else precondition(b)
    start = _Carry(
        step=jnp.int32(0),
        matvecs=jnp.int32(setup),
        x=x,
        r=b,
        p=tree.where(warm, x, z),
        rz=bb if precondition is None else tree.dot(b, z),
        rr=bb,
        a_norm=jnp.zeros((), dtype),
        x_norm=x_norm,
        measured=jnp.where(warm, jnp.inf, b_norm),
        check=warm,
        code=jnp.where(jnp.isfinite(bb), RESULTS.success, RESULTS.adjoint_nonfinite).astype(jnp.int32),
        done=(b_norm == 0) | ~jnp.isfinite(bb),
    )

    def body(c: _Carry) -> _Carry:
        ap = matvec(c.p)
        pap, pp = tree.dot(c.p, ap), tree.dot(c.p, c.p)
        a_norm = jnp.maximum(c.a_norm, jnp.abs(pap) / jnp.where(pp == 0, 1, pp))
        noise = tiny * a_norm * pp
        negative = ~c.check & (pap <= -noise)
        alpha = c.rz / jnp.where(jnp.abs(pap) <= noise, 1, pap)
        length = c.x_norm + jnp.where(c.check, 0, jnp.abs(alpha) * jnp.sqrt(pp))
        flat = ~c.check & ~negative & ((pap <= noise) | _common.singular(a_norm, length, b_norm))
        # A measuring pass multiplies x itself: r = b - 1 Ap. That way the matvec is traced once.
        r = tree.axpy(-jnp.where(c.check, 1, alpha), ap, tree.where(c.check, b, c.r))
        rr = tree.dot(r, r)
        drop = jnp.isinf(c.measured) & (rr > bb)  # a start worse than zero
        r, rr = tree.where(drop, b, r), jnp.where(drop, bb, rr)
        finite = jnp.isfinite(rr) & jnp.isfinite(alpha)
        bad = negative | flat | ~finite
        moved = jnp.where(c.check | bad, 0, alpha)
        x = tree.where(drop, tree.zeros_like(b), tree.axpy(moved, c.p, c.x))
        x_norm = jnp.where(drop, 0, jnp.where(bad, c.x_norm, length))
        z = r if precondition is None else precondition(r)
        rz = rr if precondition is None else tree.dot(r, z)

        step = c.step + jnp.where(c.check, 0, 1)
        r_norm = jnp.sqrt(rr)
        end = (r_norm <= target) | (step >= maxiter)
        trusted = c.check | (unit * a_norm * x_norm <= jnp.maximum(r_norm, target))
        stalled = c.check & (r_norm > 0.5 * c.measured)
        check = end & ~trusted & ~bad
        beta = jnp.where(c.check, 0, rz / jnp.where(c.rz == 0, 1, c.rz))
        failure = jnp.where(negative, RESULTS.negative_curvature, jnp.where(flat, RESULTS.adjoint_breakdown, RESULTS.success))
        failure = jnp.where(finite, failure, RESULTS.adjoint_nonfinite)
        return _Carry(
            step=step,
            matvecs=c.matvecs + 1,
            x=x,
            r=r,
            p=tree.where(check, x, tree.axpy(beta, c.p, z)),
            rz=rz,
            rr=jnp.where(bad & ~c.check, c.rr, rr),
            a_norm=a_norm,
            x_norm=x_norm,
            measured=jnp.where(c.check, r_norm, c.measured),
            check=check,
            code=failure.astype(jnp.int32),
            done=bad | stalled | (end & trusted),
        )

    end = lax.while_loop(lambda c: ~c.done, body, start)
    lost = (end.code == RESULTS.adjoint_breakdown) & (end.rr > bb)  # a singular matrix makes x grow without bound before it is seen
    x, rr = tree.where(lost, tree.zeros_like(b), end.x), jnp.where(lost, bb, end.rr)
    return x, _common.info(end.matvecs, _common.relative(jnp.sqrt(rr), b_norm), end.code, tol)
