"""How far an inexact implicit hypergradient can be from the exact one."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import check, tree
from bilevax._core import numbers
from bilevax.base import Ctx, PyTree, Scalar, objective


class Constants(NamedTuple):
    """What the error bound needs to know of a problem, near the solution; all in Euclidean and operator norms.

    Attributes:
      strong_convexity: μ > 0, the inner objective's strong convexity.
      cross: ``‖∇²_xy g‖`` at the inner point reached.
      outer_smoothness: Lipschitz constant in y of ``∇_y f``.
      outer_cross: Lipschitz constant in y of ``∇_x f``; 0 where f does not couple the two.
      hessian_lipschitz: Lipschitz constant in y of ``∇²_yy g``; 0 for quadratics.
      cross_lipschitz: Lipschitz constant in y of ``∇²_xy g``; 0 where it does not depend on y.
      guaranteed: True where these are bounds that someone vouches for; False where `estimate_constants` measured them.
    """

    strong_convexity: Scalar
    cross: Scalar
    outer_smoothness: Scalar
    outer_cross: Scalar = 0.0
    hessian_lipschitz: Scalar = 0.0
    cross_lipschitz: Scalar = 0.0
    guaranteed: bool = True


class ErrorBound(NamedTuple):
    """A bound on ``‖grad − ∇h‖`` and its parts.

    Attributes:
      total: the sum of the parts.
      inner: what the inexact inner solve contributes.
      adjoint: what the inexact adjoint contributes.
      distance: the bound on ``‖y − y*‖`` that both rest on.
      guaranteed: whether this is a bound, or an estimate of one from measured constants.
    """

    total: Any
    inner: Any
    adjoint: Any
    distance: Any
    guaranteed: bool

    @property
    def label(self) -> str:
        """The word for it: "guaranteed" or "estimated"."""
        return "guaranteed" if self.guaranteed else "estimated"


def error_bound(info: Mapping[str, Scalar], constants: Constants) -> ErrorBound:
    r"""Bound the error of an implicit hypergradient by what its own info says.

    .. math::
        \|z - \nabla h\| \le c\,\varepsilon + \frac{\|B\|}{\mu}\,\delta + \frac{L_B L_f}{\mu}\,\varepsilon^2, \qquad
        \varepsilon = \frac{\|\nabla_y g\|}{\mu}, \quad \delta = \|Hq - \nabla_y f\|,

    .. math::
        c = L_{fx} + \frac{L_f \|B\|}{\mu} + \frac{L_H}{\mu^2} \|\nabla_y f\| \|B\| + \frac{L_B \|\nabla_y f\|}{\mu}, \qquad B = \nabla^2_{xy} g.

    Args:
      info: of an estimate by ``hypergradient.implicit``: its ``inner_grad_norm``, ``adjoint_residual`` (relative) and ``cotangent_norm``
        (``‖∇_y f‖``) are read. A mapping with these three keys will do. Full batches: on a minibatch it speaks of the minibatch's problem.
      constants: `Constants`, known ones or those of `estimate_constants`.

    Returns:
      An `ErrorBound`: guaranteed if the constants are, otherwise an estimate, and labelled so.

    Raises:
      TypeError, ValueError: for an info without these entries, or constants of another kind or out of range.

    Examples:
      >>> import bilevax as bx
      >>> info = {"inner_grad_norm": 1e-3, "adjoint_residual": 1e-2, "cotangent_norm": 2.0}
      >>> bound = bx.error_bound(info, bx.diagnostics.Constants(strong_convexity=0.5, cross=1.0, outer_smoothness=1.0))
      >>> round(float(bound.total), 6), bound.label
      (0.044, 'guaranteed')

    Source: Ehrhardt and Roberts, "Analyzing inexact hypergradients for bilevel learning" (IMA J. Appl. Math. 2024), theorem 3.1, as used by
    Salehi et al., "An adaptively inexact first-order method for bilevel optimization" (arXiv 2308.10098). The term in ``L_fx`` is for outer
    objectives that couple both levels.
    """
    missing = [name for name in ("inner_grad_norm", "adjoint_residual", "cotangent_norm") if name not in info]
    if missing:
        raise ValueError(f"info: got entries {sorted(info)}, without {', '.join(missing)}; expected the info of hypergradient.implicit.")
    if not hasattr(constants, "strong_convexity"):
        raise TypeError(f"constants: got {type(constants).__name__}; expected diagnostics.Constants, or diagnostics.estimate_constants(...).")
    for name, value in constants._asdict().items():
        positive = name == "strong_convexity"
        if name != "guaranteed" and not isinstance(value, (jax.core.Tracer, jax.Array)) and not (value > 0 if positive else value >= 0):
            raise ValueError(f"constants.{name}: got {value!r}; expected a {'positive' if positive else 'nonnegative'} number.")
    mu, cross, w = constants.strong_convexity, constants.cross, info["cotangent_norm"]
    distance = info["inner_grad_norm"] / mu
    # First order in the distance: the direct term, the cotangent, the inverse Hessian, and the mixed derivative change with y.
    factor = constants.outer_cross + constants.outer_smoothness * cross / mu
    factor = factor + constants.hessian_lipschitz / mu**2 * w * cross + constants.cross_lipschitz * w / mu
    inner = factor * distance + constants.cross_lipschitz * constants.outer_smoothness / mu * distance**2
    adjoint = cross / mu * info["adjoint_residual"] * w
    return ErrorBound(inner + adjoint, inner, adjoint, distance, constants.guaranteed)


def estimate_constants(
    inner_objective: Callable,
    outer_objective: Callable,
    inner_params: PyTree,
    outer_params: PyTree,
    inner_batch: PyTree = None,
    outer_batch: PyTree = None,
    *,
    iterations: int = 50,
    radius: float = 1e-2,
    key: jax.Array | None = None,
) -> Constants:
    """Measure the constants of the error bound around a point: power iteration for norms, differences of products for Lipschitz constants.

    ``μ = L − λ_max(L I − H)`` and ``‖B‖² = λ_max(B B')``; a Lipschitz constant is the largest ``‖(H(y + r u) − H(y)) v‖ / r`` over a few random
    unit pairs. Power iteration reaches norms from below and μ from above, so what follows from these is an estimate and no bound.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``.
      inner_params: floating-point pytree; take the inner solution.
      outer_params: floating-point pytree.
      inner_batch: data of the inner objective.
      outer_batch: data of the outer objective.
      iterations: of each power iteration; the cost is about seven products an iteration.
      radius: how far around the point Lipschitz constants are looked for, relative to ``max(1, ‖y‖)``.
      key: PRNG key of the first vectors; default ``jax.random.key(0)``.

    Returns:
      `Constants` with ``guaranteed=False``. A modulus that is not positive says that the point is no strict minimum: then no bound exists.

    Raises:
      TypeError, ValueError: for objectives that are none, and for counts below 1.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum(jnp.array([1.0, 3.0]) * (y - x) ** 2) / 2
      >>> outer = lambda y, x, batch: jnp.sum(y**2) / 2
      >>> constants = bx.diagnostics.estimate_constants(inner, outer, jnp.ones(2), jnp.ones(2))
      >>> round(float(constants.strong_convexity), 3), round(float(constants.cross), 3), constants.guaranteed
      (1.0, 3.0, False)

    Source: von Mises and Pollaczek-Geiringer (1929), the power method.
    """
    g, f = objective(inner_objective), objective(outer_objective)
    iterations, radius = numbers.count(iterations, "iterations"), numbers.positive(radius, "radius", example=1e-2)
    if key is not None:
        numbers.key(key)
    y, x, inner_batch, outer_batch = (tree.strong(value) for value in (inner_params, outer_params, inner_batch, outer_batch))
    check.params(y, "inner_params")
    check.params(x, "outer_params")
    inner_ctx, outer_ctx = Ctx(inner_batch), Ctx(outer_batch)

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

            def body(_, carry):
                v, _ = carry
                image = operator(v)
                size = tree.norm(image)
                return tree.scale(1 / jnp.where(size > 0, size, 1), image), size

            v = tree.normal_like(key, y)
            v = tree.scale(1 / tree.norm(v), v)
            return lax.fori_loop(0, iterations, body, (v, tree.norm(v)))[1]

        smooth = largest(lambda v: inner_products(v)[0], keys[0])
        shifted = largest(lambda v: tree.sub(tree.scale(smooth, v), inner_products(v)[0]), keys[1])
        mixed = jnp.sqrt(largest(lambda v: back(inner_products(v)[1])[0], keys[2]))
        outer = largest(lambda v: outer_products(v)[0], keys[3])
        outer_mixed = jnp.sqrt(largest(lambda v: outer_back(outer_products(v)[1])[0], keys[4]))
        reach = radius * jnp.maximum(1.0, tree.norm(y))

        def changes(key):
            u, v = (tree.normal_like(k, y) for k in jax.random.split(key))
            u, v = tree.scale(1 / tree.norm(u), u), tree.scale(1 / tree.norm(v), v)
            moved = jax.jvp(lambda y: grads(g, inner_ctx, y), (tree.axpy(reach, u, y),), (v,))[1]
            differences = tree.sub(moved, inner_products(v))
            return tree.norm(differences[0]) / reach, tree.norm(differences[1]) / reach

        hessian, mixed_change = lax.map(changes, jax.random.split(keys[5], 8))
        return smooth - shifted, mixed, outer, outer_mixed, jnp.max(hessian), jnp.max(mixed_change)

    return Constants(*jax.jit(run)(jax.random.key(0) if key is None else key))._replace(guaranteed=False)
