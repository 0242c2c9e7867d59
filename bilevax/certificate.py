"""One set of constants of a problem, the error bound of an inexact hypergradient that follows from
them, and their estimates.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import check, tree
from bilevax._core import numbers
from bilevax._core.spectrum import power, smallest_eigenpair
from bilevax._core.types import Key
from bilevax.base import Ctx, Problem, PyTree, Scalar, objective
from bilevax.functions import evaluate

if TYPE_CHECKING:
    from bilevax.algorithms._parts.solving import Curvature

RITZ = 6  # products with the Hessian in one refinement of its smallest eigenpair
FIRST = 8  # refinements at the first step
PAIRS = 8  # random pairs of directions along which Lipschitz constants are looked for
ROUNDING = 100.0  # rounding errors of a gradient or a product, in units of its largest terms


class Constants(NamedTuple):
    """Constants of a problem. All norms are Euclidean, over all leaves together.

    None is not known: `maid` estimates it on the way, and `error_bound` refuses it.

    Attributes:
      strong_convexity: μ, the smallest eigenvalue of ``∇²_yy g``.
      cross: ``‖B‖``, the largest singular value of ``∇²_xy g``, at the inner point reached.
      outer_smoothness: L_f, the Lipschitz constant in y of ``∇_y f``.
      outer_cross: L_fx, that of ``∇_x f``; 0 where the outer objective is a sum of a function of y
        and one of x.
      hessian_lipschitz: L_H, that of ``∇²_yy g``; 0 where the inner objective is quadratic in y.
      cross_lipschitz: L_B, that of ``∇²_xy g``; 0 where it does not depend on y.
      guaranteed: True where these are bounds that someone vouches for; False where
        `estimate_constants` measured them.
      smoothness: L_g, the largest eigenvalue of ``∇²_yy g``: what rounding in its gradients and
        products amounts to. Without it a bound holds in exact arithmetic only, and is not called
        guaranteed.
    """

    strong_convexity: Any = None
    cross: Any = None
    outer_smoothness: Any = None
    outer_cross: Any = None
    hessian_lipschitz: Any = None
    cross_lipschitz: Any = None
    guaranteed: bool = True
    smoothness: Any = None


class ErrorBound(NamedTuple):
    """A bound on ``‖grad − ∇h‖``, its parts, and how it depends on the accuracies.

    Attributes:
      total: the sum of the parts.
      inner: what the inexact inner solve contributes.
      adjoint: what the inexact adjoint contributes.
      distance: ε, the bound on ``‖y − y*‖`` that both rest on.
      guaranteed: whether this is a bound, or an estimate of one: from measured constants, or
        without what rounding adds.
      slope: of `inner` in ε at 0.
      weight: of `adjoint` in the adjoint's absolute residual.
      rounding: what `total` has for rounding errors; None where `Constants.smoothness` or ``‖y‖``
        was not known.
    """

    total: Any
    inner: Any
    adjoint: Any
    distance: Any
    guaranteed: bool
    slope: Any = None
    weight: Any = None
    rounding: Any = None

    @property
    def label(self) -> str:
        """The word for it: "guaranteed" or "estimated"."""
        return "guaranteed" if self.guaranteed else "estimated"


class Sizes(NamedTuple):
    """What rounding errors are relative to: ``‖y‖`` and ``‖z‖``, and the rounding unit."""

    inner: Any
    gradient: Any
    unit: Any


def bound(
    k: Constants,
    grad_norm: Scalar,
    residual: Scalar,
    *,
    adjoint_norm: Any = None,
    cotangent_norm: Any = None,
    sizes: Sizes | None = None,
) -> ErrorBound:
    """The bound at an inner gradient norm and an absolute adjoint residual δ.

    With ``ε = ‖∇_y g‖/μ ≥ ‖y − y*‖`` and a bound s of ``‖H⁻¹∇_y f‖``:
    ``‖z − ∇h‖ ≤ ‖B‖/μ δ + (L_fx + L_B s + ‖B‖ t) ε + L_B t' ε²`` with ``t = (L_f + L_H s)/μ``.

    From the adjoint itself ``s = ‖q‖ + δ/μ``, which holds at this y alone, and ``t' = t``. From the
    cotangent ``s = ‖∇_y f‖/μ``, which holds with the Hessian at y*, too, so that ``t' = L_f/μ``.

    With `sizes` and L_g known, ``∇_y g`` may be off by u L_g ‖y‖, the residual by 2 u L_g s and z
    by u (‖z‖ + 2 ‖B‖ s), u being `ROUNDING` units.
    """

    def exact(grad_norm, residual):
        distance = grad_norm / mu
        s = cotangent_norm / mu if adjoint_norm is None else adjoint_norm + residual / mu
        turn = (k.outer_smoothness + k.hessian_lipschitz * s) / mu
        bend = k.outer_smoothness / mu if adjoint_norm is None else turn
        slope = k.outer_cross + k.cross_lipschitz * s + k.cross * turn
        inner = slope * distance + k.cross_lipschitz * bend * distance**2
        return inner, weight * residual, distance, slope, s

    mu, weight = k.strong_convexity, k.cross / k.strong_convexity
    inner, adjoint, distance, slope, s = exact(grad_norm, residual)
    if sizes is None or k.smoothness is None:
        return ErrorBound(inner + adjoint, inner, adjoint, distance, False, slope, weight)
    u = ROUNDING * sizes.unit
    rough = exact(grad_norm + u * k.smoothness * sizes.inner, residual + 2 * u * k.smoothness * s)
    total = rough[0] + rough[1] + u * (sizes.gradient + 2 * k.cross * s)
    return ErrorBound(
        total, inner, adjoint, rough[2], k.guaranteed, slope, weight, total - inner - adjoint
    )


def error_bound(
    info: Mapping[str, Scalar], constants: Constants, inner_params: PyTree = None
) -> ErrorBound:
    r"""Bound the error of an implicit hypergradient by what its own info says.

    .. math::
        \|z - \nabla h\| \le c\,\varepsilon + \frac{\|B\|}{\mu}\,\delta
        + \frac{L_B L_f}{\mu}\,\varepsilon^2, \qquad
        \varepsilon = \frac{\|\nabla_y g\|}{\mu}, \quad \delta = \|Hq - \nabla_y f\|,

    .. math::
        c = L_{fx} + \frac{L_f \|B\|}{\mu} + \frac{L_H}{\mu^2} \|\nabla_y f\| \|B\|
        + \frac{L_B \|\nabla_y f\|}{\mu}, \qquad B = \nabla^2_{xy} g.

    and, with ``constants.smoothness``, what rounding adds to the gradient and the residual as they
    were computed, and to z.

    Args:
      info: of an estimate by ``hypergradient.implicit``: its ``inner_grad_norm``,
        ``adjoint_residual`` (relative) and ``cotangent_norm`` (``‖∇_y f‖``) are read, and for
        rounding ``grad_norm`` (``‖z‖``). A mapping with the first three will do. Full batches: on a
        minibatch it speaks of the minibatch's problem.
      constants: `Constants`, known ones or those of `estimate_constants`.

      inner_params: the estimate's, whose norm and dtype rounding is relative to. None: the bound is
        of exact arithmetic.

    Returns:
      An `ErrorBound`, guaranteed if the constants are and rounding is in it, otherwise an estimate,
      and labelled so.

    Raises:
      TypeError, ValueError: for an info without these entries, or constants of another kind or out
        of range.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> info = {
      ...     "inner_grad_norm": 1e-3,
      ...     "adjoint_residual": 1e-2,
      ...     "cotangent_norm": 2.0,
      ...     "grad_norm": 1.0,
      ... }
      >>> quadratic = dict(outer_cross=0.0, hessian_lipschitz=0.0, cross_lipschitz=0.0)
      >>> constants = bx.diagnostics.Constants(
      ...     strong_convexity=0.5, cross=1.0, outer_smoothness=1.0, smoothness=2.0, **quadratic
      ... )
      >>> bound = bx.error_bound(info, constants, jnp.ones(3))
      >>> round(float(bound.total), 2), bound.label
      (0.04, 'guaranteed')

    Source: Ehrhardt and Roberts, "Analyzing inexact hypergradients for bilevel learning" (IMA J.
    Appl. Math. 2024), theorem 3.1, as used by Salehi et al., "An adaptively inexact first-order
    method for bilevel optimization" (arXiv 2308.10098). The term in ``L_fx`` is for outer
    objectives that couple both levels.
    """
    if not isinstance(info, Mapping):
        raise TypeError(
            f"info: got {check.describe(info)}; expected the info of an estimate, a mapping."
        )
    missing = [
        name
        for name in ("inner_grad_norm", "adjoint_residual", "cotangent_norm")
        if name not in info
    ]
    if missing:
        raise ValueError(
            f"info: got entries {sorted(info)}, without {', '.join(missing)}; expected the info of "
            "hypergradient.implicit."
        )
    if not isinstance(constants, Constants):
        raise TypeError(
            f"constants: got {check.describe(constants)}; expected diagnostics.Constants, or "
            "diagnostics.estimate_constants(...)."
        )
    for name, value in constants._asdict().items():
        if value is None and name == "smoothness":
            continue
        if value is None:
            raise ValueError(
                f"constants.{name}: got None; expected a number, since nothing is estimated here. "
                "Try 0 where it vanishes (see Constants), "
                "or diagnostics.estimate_constants(...)."
            )
        if name != "guaranteed":
            numbers.positive(value, f"constants.{name}", zero=name != "strong_convexity")
    w, sizes = info["cotangent_norm"], None
    if inner_params is not None:
        inner_params = check.arrays(inner_params, "inner_params")
        check.params(inner_params, "inner_params")
        check.finite(inner_params, "inner_params")
    if inner_params is not None and "grad_norm" in info:
        floats = tree.partition(inner_params)[0]
        sizes = Sizes(
            tree.norm(floats).astype(jnp.asarray(w).dtype),
            info["grad_norm"],
            numbers.rounding_unit(floats),
        )
    return bound(
        constants,
        info["inner_grad_norm"],
        info["adjoint_residual"] * w,
        cotangent_norm=w,
        sizes=sizes,
    )


# ---- estimates at a point


def estimate_constants(
    inner_objective: Callable[..., Any],
    outer_objective: Callable[..., Any],
    inner_params: PyTree,
    outer_params: PyTree,
    inner_batch: PyTree = None,
    outer_batch: PyTree = None,
    *,
    iterations: int = 50,
    radius: float = 1e-2,
    key: Key | None = None,
) -> Constants:
    """Measure the constants of the error bound around a point: power iteration for norms,
    differences of products for Lipschitz constants.

    ``μ = L − λ_max(L I − H)`` and ``‖B‖² = λ_max(B B')``; a Lipschitz constant is the largest
    ``‖(H(y + r u) − H(y)) v‖ / r`` over a few random unit pairs. Power iteration reaches norms from
    below and μ from above, so what follows from these is an estimate and no bound.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``.
      inner_params: floating-point pytree; take the inner solution.
      outer_params: floating-point pytree.
      inner_batch: data of the inner objective.
      outer_batch: data of the outer objective.
      iterations: of each power iteration; the cost is about seven products an iteration.
      radius: how far around the point Lipschitz constants are looked for, relative to ``max(1,
        ‖y‖)``.
      key: PRNG key of the first vectors; default ``jax.random.key(0)``.

    Returns:
      `Constants` with ``guaranteed=False``. A modulus that is not positive says that the point is
      no strict minimum: then no bound exists.

    Raises:
      TypeError, ValueError: for objectives that are none, and for counts below 1.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum(jnp.array([1.0, 3.0]) * (y - x) ** 2) / 2
      >>> outer = lambda y, x, batch: jnp.sum(y**2) / 2
      >>> constants = bx.diagnostics.estimate_constants(inner, outer, jnp.ones(2), jnp.ones(2))
      >>> (
      ...     round(float(constants.strong_convexity), 3),
      ...     round(float(constants.cross), 3),
      ...     constants.guaranteed,
      ... )
      (1.0, 3.0, False)

    Source: von Mises and Pollaczek-Geiringer (1929), the power method.
    """
    for name, fn in (("inner_objective", inner_objective), ("outer_objective", outer_objective)):
        check.callable_objective(fn, name)
    g, f = objective(inner_objective), objective(outer_objective)
    iterations, radius = (
        numbers.count(iterations, "iterations"),
        numbers.positive(radius, "radius", example=1e-2),
    )
    if key is not None:
        numbers.key(key)
    y, x = check.arrays(inner_params, "inner_params"), check.arrays(outer_params, "outer_params")
    for name, params in (("inner_params", y), ("outer_params", x)):
        check.params(params, name)
        check.finite(params, name)
    inner_batch, outer_batch = (
        tree.strong(check.batch(batch, name))
        for name, batch in (("inner_batch", inner_batch), ("outer_batch", outer_batch))
    )
    inner_ctx, outer_ctx = Ctx(inner_batch), Ctx(outer_batch)
    evaluate(g, "inner_objective", y, x, inner_ctx)
    evaluate(f, "outer_objective", y, x, outer_ctx)

    def grads(of, ctx, y):
        return jax.grad(of, (0, 1), has_aux=True)(y, x, ctx)[0]

    def run(key):
        keys = jax.random.split(key, 7)
        inner_products = jax.linearize(lambda y: grads(g, inner_ctx, y), y)[1]
        outer_products = jax.linearize(lambda y: grads(f, outer_ctx, y), y)[1]
        back = jax.linear_transpose(lambda v: inner_products(v)[1], y)
        outer_back = jax.linear_transpose(lambda v: outer_products(v)[1], y)

        def largest(operator, key):
            """Largest absolute eigenvalue of a symmetric operator on inner vectors."""
            return power(
                lambda v: (tree.norm(image := operator(v)), image),
                tree.normal_like(key, y),
                iterations,
            )[0]

        smooth = largest(lambda v: inner_products(v)[0], keys[0])
        shifted = largest(lambda v: tree.sub(tree.scale(smooth, v), inner_products(v)[0]), keys[1])
        mixed = jnp.sqrt(largest(lambda v: back(inner_products(v)[1])[0], keys[2]))
        outer = largest(lambda v: outer_products(v)[0], keys[3])
        outer_mixed = jnp.sqrt(largest(lambda v: outer_back(outer_products(v)[1])[0], keys[4]))
        reach = radius * jnp.maximum(1.0, tree.norm(y))

        def changes(key):
            u, v = (tree.normal_like(k, y) for k in jax.random.split(key))
            u, v = tree.unit(u), tree.unit(v)
            moved = jax.jvp(lambda y: grads(g, inner_ctx, y), (tree.axpy(reach, u, y),), (v,))[1]
            differences = tree.sub(moved, inner_products(v))
            return tree.norm(differences[0]) / reach, tree.norm(differences[1]) / reach

        hessian, mixed_change = lax.map(changes, jax.random.split(keys[5], PAIRS))
        return (
            smooth - shifted,
            mixed,
            outer,
            outer_mixed,
            jnp.max(hessian),
            jnp.max(mixed_change),
            smooth,
        )

    *found, smooth = jax.jit(run)(jax.random.key(0) if key is None else key)
    return Constants(*found)._replace(guaranteed=False, smoothness=smooth)


# ---- estimates on the way, from step to step


class Probes(NamedTuple):
    """What estimates are refined from, step by step: the last strong convexity, extreme vectors,
    and the largest Lipschitz constants met.
    """

    modulus: Any
    lowest: PyTree
    cross: PyTree
    outer: PyTree
    hessian_lipschitz: Any
    cross_lipschitz: Any


def probes(inner: PyTree) -> Probes:
    """First probes, from a fixed key: the run stays deterministic."""
    keys = jax.random.split(jax.random.key(0), 3)
    zero = jnp.zeros((), tree.norm(inner).dtype)
    lowest, cross, outer = (tree.unit(tree.normal_like(key, inner)) for key in keys)
    return Probes(jnp.ones_like(zero), lowest, cross, outer, zero, jnp.zeros_like(zero))


def estimate(
    problem: Problem,
    known: Constants,
    p: Probes,
    y: PyTree,
    x: PyTree,
    q: PyTree,
    products: Curvature,
    contexts: tuple[Ctx, Ctx],
    first: Any,
) -> tuple[Constants, Probes, Any]:
    """All constants at a point, refined probes, and the products spent.

    `first`: refine from random probes, not from those of a step before.
    """
    inner_ctx, outer_ctx = contexts
    dtype, spent = p.hessian_lipschitz.dtype, jnp.int32(0)
    rounds = jnp.where(first, FIRST, 1)
    out: dict[str, Any] = {
        name: None if value is None else jnp.asarray(value).astype(dtype)
        for name, value in known._asdict().items()
        if name != "guaranteed"
    }

    if known.strong_convexity is None:

        def refine(_, carry):
            return smallest_eigenpair(products.hessian, carry[1], RITZ)

        value, lowest = lax.fori_loop(0, rounds, refine, (jnp.zeros((), dtype), p.lowest))
        out["strong_convexity"] = value
        p, spent = p._replace(lowest=lowest), spent + RITZ * rounds
    if known.cross is None:

        def image_of(v):
            image = products.cross(v)
            return tree.norm(image).astype(dtype), products.cross_transposed(image)

        value, probe = power(image_of, p.cross, 2 * rounds)
        out["cross"] = value
        p, spent = p._replace(cross=tree.where(value > 0, probe, p.cross)), spent + 4 * rounds
    if known.outer_smoothness is None or known.outer_cross is None:
        gradients = lambda y: jax.grad(problem.outer, (0, 1), has_aux=True)(y, x, outer_ctx)[0]
        _, outer_products = jax.linearize(gradients, y)

        def images_of(v):
            image, cross = outer_products(v)
            return (tree.norm(image).astype(dtype), tree.norm(cross).astype(dtype)), image

        (smooth, cross), probe = power(images_of, p.outer, 2 * rounds)
        out["outer_smoothness"] = (
            smooth if known.outer_smoothness is None else out["outer_smoothness"]
        )
        out["outer_cross"] = cross if known.outer_cross is None else out["outer_cross"]
        p, spent = p._replace(outer=tree.where(smooth > 0, probe, p.outer)), spent + 2 * rounds
    if known.hessian_lipschitz is None or known.cross_lipschitz is None:
        # The change of both products with q along the direction that the solution is in, as far as
        # the gradient tells.
        def at(y):
            gradients = lambda y: jax.grad(problem.inner, (0, 1), has_aux=True)(y, x, inner_ctx)[0]
            return jax.jvp(gradients, (y,), (tree.unit(q),))[1]

        _, (hessian, cross) = jax.jvp(at, (y,), (tree.unit(products.grad),))
        hessian, cross = (jnp.nan_to_num(tree.norm(a).astype(dtype)) for a in (hessian, cross))
        p = p._replace(
            hessian_lipschitz=jnp.maximum(p.hessian_lipschitz, hessian),
            cross_lipschitz=jnp.maximum(p.cross_lipschitz, cross),
        )
        out["hessian_lipschitz"] = (
            p.hessian_lipschitz if known.hessian_lipschitz is None else out["hessian_lipschitz"]
        )
        out["cross_lipschitz"] = (
            p.cross_lipschitz if known.cross_lipschitz is None else out["cross_lipschitz"]
        )
        spent = spent + 2
    # A lower level that is not strongly convex has no bound; a tiny modulus makes it large, and
    # divisions safe.
    floor = numbers.rounding_unit(dtype) ** 0.5 * (
        out["cross"] + float(jnp.finfo(dtype).tiny) ** 0.5
    )
    out["strong_convexity"] = jnp.maximum(out["strong_convexity"], floor)
    return (
        Constants(**out, guaranteed=known.guaranteed),
        p._replace(modulus=out["strong_convexity"]),
        spent,
    )


__all__ = ["Constants", "ErrorBound", "error_bound", "estimate_constants"]
