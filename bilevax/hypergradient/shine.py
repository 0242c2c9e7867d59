"""The quasi-Newton matrix of the inner solve, used again as the adjoint solver."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from bilevax import linear as linear_solvers
from bilevax import tree
from bilevax._core import numbers
from bilevax._core.precision import needed, under
from bilevax._core.types import Numeric
from bilevax.base import (
    Bound,
    Ctx,
    Feed,
    Hypergradient,
    InnerState,
    LinearInfo,
    Lower,
    Pullback,
    PyTree,
)
from bilevax.hypergradient import _adjoint
from bilevax.hypergradient._solve import forward
from bilevax.results import RESULTS


def shine(
    refine: int = 0, *, tol: Numeric = 1e-6, max_residual: Numeric | None = None
) -> Hypergradient:
    r"""Implicit differentiation with the inverse Hessian estimate that L-BFGS leaves behind.

    .. math::
        q = B w \approx (\nabla^2_{yy} g)^{-1} w, \qquad dx = -\nabla^2_{xy} g \; q

    B costs nothing: it was built during the solve. It is accurate in the directions that the solve
    moved along, and may be far off in others, so the residual is measured (one product, shared with
    the mixed one), and `refine` iterations of CG, started from ``B w`` and preconditioned by B,
    repair what is missing.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      refine: iterations of CG from there; 0 takes ``B w`` as it is.
      tol: relative residual at which the refinement stops.
      max_residual: relative residual above which the warning ``adjoint_not_converged`` stands;
        ``jnp.inf``
        accepts anything. None: 0.1, and the same of the error in the norm of H as B tells it, which
        has no unit. Above 1 no adjoint at all would have been better.

    Returns:
      A `Hypergradient` for ``inner.lbfgs``. Its info has ``inner_grad_norm``,
      ``adjoint_iterations``, ``adjoint_residual``, and the cost
      beyond the solve: ``gradients``, ``hvps``, ``mixed_products``.

    Raises:
      TypeError, ValueError: for arguments of another kind or outside their range; when called, with
        a solver that keeps no such matrix.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum(jnp.array([1.0, 3.0]) * (y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y**2)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=bx.inner.lbfgs(), hypergradient=bx.hypergradient.shine(refine=2)
      ... )
      >>> fn(jnp.zeros(2), jnp.ones(2)).grad.round(3).tolist()
      [2.0, 2.0]

    Source: Ramzi et al., "SHINE: SHaring the INverse Estimate from the forward pass for bi-level
    optimization and implicit models" (ICLR 2022).
    """
    refine, tol = (
        numbers.count(refine, "refine", least=0),
        numbers.positive(tol, "tol", example=1e-6),
    )
    _, max_residual = _adjoint.check_settings(None, max_residual, linear_solvers.cg())
    precision = needed(tol) if refine else None
    vjp = Bound(
        "shine", _vjp, refine=refine, tol=tol, max_residual=max_residual, precision=precision
    )
    return Hypergradient(init=_init, vjp=vjp, order=1, precision=precision)


def _init(inner: PyTree) -> Any:
    return ()


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    refine: Any,
    tol: Any,
    max_residual: float | None,
    precision: str | None,
) -> tuple[InnerState, Pullback]:
    product = lower.solver.inverse_hessian
    if product is None:
        raise TypeError(
            f"solver: got {lower.solver!r}, which keeps no inverse Hessian; expected "
            "inner.lbfgs(). Try hypergradient.implicit()."
        )
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def pullback(w):
        def gradients(inner):
            return jax.grad(lower.objective, (0, 1), has_aux=True)(inner, outer, ctx)[0]

        (inner_grad, _), products = jax.linearize(gradients, solution.params)
        q = product(solution.opt, w)
        iterations, found = jnp.int32(0), jnp.int32(RESULTS.success)
        if refine:
            preconditioner = Bound("inverse_hessian", _apply, product=product, memory=solution.opt)
            q, refined = linear_solvers.cg(maxiter=refine, tol=tol, preconditioner=preconditioner)(
                lambda v: products(v)[0], w, q
            )
            iterations = refined.iterations
            # that the few iterations missed their tolerance is no news, that they met no positive
            # definite matrix is
            missed = refined.code == RESULTS.adjoint_not_converged
            found = jnp.where(missed, found, refined.code)
        hq, mixed = products(q)
        w_norm = tree.norm(w)
        residual = tree.norm(tree.sub(hq, w)) / jnp.where(w_norm > 0, w_norm, 1)
        code = jnp.where(jnp.isfinite(residual), found, jnp.int32(RESULTS.adjoint_nonfinite))
        linear_info = LinearInfo(iterations, residual, code)
        warned = info["warnings"]
        if max_residual is None:
            warned |= _adjoint.far_off(lower, solution.opt, w, hq, q)
        report = _adjoint.report(
            {**info, "warnings": warned},
            linear_info,
            max_residual,
            w,
            inner_grad_norm=tree.norm(inner_grad),
            hvps=iterations + 1,
        )
        return tree.neg(mixed), None, state, report

    return solution, under(precision, pullback)


def _apply(v: Any, *, product: Any, memory: Any) -> Any:
    return product(memory, v)
