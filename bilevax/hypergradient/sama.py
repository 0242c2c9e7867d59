"""SAMA: one-step differentiation of the optimizer that trains the lower level, whichever that
is.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers, optimizer
from bilevax._core.apart import apart, large
from bilevax._core.types import Numeric
from bilevax.base import (
    Bound,
    Ctx,
    Feed,
    Hypergradient,
    InnerState,
    Lower,
    Pullback,
    PyTree,
    Scalar,
)
from bilevax.hypergradient import _product
from bilevax.hypergradient._solve import forward
from bilevax.results import RESULTS, warning


def sama(*, product: str = "exact", nudge: bool = False, radius: Numeric = 0.01) -> Hypergradient:
    """One-step differentiation with the cotangent adapted to the inner optimizer.

    ``q = D w`` and ``dx = −∇²_xy g · q``, where ``y − u(∇_y g)`` is what the optimizer makes of `y`
    and ``D = (∂u/∂∇_y g)'``. The step that D belongs
    to is the next one: at the solution, with the optimizer's state as the solve left it, and with
    the gradient of the batch that second-order products are drawn from. D comes from ``jax.vjp``
    through ``update``, so bias correction, decoupled decay, clipping, schedules, masks and
    ``multi_transform`` are all in it, and so is the learning rate: for ``optax.sgd(α)`` this is
    ``one_step(scale=α)``.

    Where the update has no usable derivative:

    - A coordinate whose gradient is exactly zero, at which the update is not differentiable (the
      square root of Adam, RMSProp and their like at a second moment of zero; a parameter that no
      data ever reached), gets an adaptation of zero. Their number is ``adaptation_nonsmooth`` in
      the info. With ``eps_root > 0`` the optimizer has a derivative there and it is used.
    - Of ``optax.MultiSteps``, whose next step may only accumulate, it is the update that
      accumulation leads to.
    - An update whose derivative is zero everywhere (sign updates such as ``optax.lion``)
      gives a hypergradient of zero: the warning ``adaptation_zero`` stands.
    - Transformations that ask for ``value``, ``grad`` or ``value_fn`` get them, as constants. One
      that searches in a loop is refused.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      product: ``"exact"``, one forward sweep over ``∇_x g``; or ``"difference"``, two gradients at
        ``y ± εq``, ``ε = radius / ‖q‖``, with one key and batch, which never differentiates twice
        (as in the paper).
      nudge: start the next solve from ``y − εq``, one small step down the outer objective. The
        returned inner parameters are not moved.
      radius: positive; see `product` and `nudge`.

    Returns:
      A first-order `Hypergradient` (``order=1``). Its info has ``inner_grad_norm``,
      ``adaptation_nonsmooth`` and the counters ``gradients``, ``hvps`` and ``mixed_products``.

    Raises:
      TypeError, ValueError: for settings out of range; when run, with a solver that is no gradient
        transformation.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> solver = bx.inner.optax(optax.sgd(0.25), steps=1)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=solver, hypergradient=bx.hypergradient.sama()
      ... )
      >>> fn(jnp.zeros(1), jnp.ones(1)).grad.tolist()
      [0.5]

    Source: Choe et al., "Making scalable meta learning practical" (NeurIPS 2023, arXiv 2310.05674),
    section 3. The authors' program differentiates the last step made in place of the next one,
    takes D as the identity for every optimizer but Adam, and leaves the inner parameters at ``y −
    εq``, which is `nudge`.
    """
    numbers.choice(product, "product", ("exact", "difference"))
    nudge = numbers.flag(nudge, "nudge")
    settings = dict(
        product=product, nudge=nudge, radius=numbers.positive(radius, "radius", example=0.01)
    )
    init, differences = (
        Bound("sama", _init, nudge=nudge),
        Bound("sama", _vjp, **{**settings, "product": "difference"}),
    )
    form = None
    if product == "exact":
        form = Hypergradient(
            init, differences, order=1, cost=Bound("cost", _cost, product="difference")
        )
    return Hypergradient(
        init,
        Bound("sama", _vjp, **settings),
        order=1,
        cost=Bound("cost", _cost, product=product),
        first_order_form=form,
    )


def _cost(solver: Any, *, product: Any) -> dict[Any, Any]:
    exact = product == "exact"
    return {"gradients": 1 if exact else 3, "hvps": 0, "mixed_products": 1 if exact else 0}


def _init(inner: PyTree, *, nudge: Any) -> Any:
    return tree.zeros_like(inner) if nudge else ()


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    product: str,
    nudge: bool,
    radius: Any,
) -> tuple[InnerState, Pullback]:
    solver, update = lower.solver, lower.solver.update
    if update is None:
        raise ValueError(
            f"solver: got {solver!r}, which is not a gradient transformation, so that there is no "
            "update to differentiate; expected one built by "
            "inner.optax. Try hypergradient.implicit(), which needs no update."
        )
    if nudge:
        inner_state = inner_state._replace(params=tree.sub(inner_state.params, state))
    solution, info = forward(lower, inner_state, outer, feed)
    ctx = ctx._replace(model=solution.model)

    def inner_gradient(params):
        (value, _), grads = jax.value_and_grad(lower.objective, has_aux=True)(params, outer, ctx)
        return value, grads

    def pullback(w):
        value, grads = apart(inner_gradient, _after(w, solution.params))
        extra = {
            "value": value,
            "grad": grads,
            "value_fn": lambda params: lower.objective(params, outer, ctx)[0],
        }
        extra |= {"outer": outer} if solver.sees_outer else {}
        q, nonsmooth = adapt(_updates(update, solution, extra), grads, w)
        lost = (tree.dot(q, q) == 0) & (tree.dot(w, w) > 0)
        warnings = info["warnings"] | warning(lost, RESULTS.adaptation_zero)
        if product == "exact":
            cross = _product.exact(lower.objective, _after(q, solution.params), outer, ctx, q)
        else:
            cross, difference = _product.central_difference(
                lower.objective, solution.params, outer, ctx, q, radius
            )
            warnings |= difference
        size = tree.norm(q)
        moved = (
            tree.scale(radius / jnp.where(size > 0, size, jnp.ones_like(size)), q) if nudge else ()
        )
        is_exact = product == "exact"
        report = {
            **info,
            "inner_grad_norm": tree.norm(grads),
            "adaptation_nonsmooth": nonsmooth,
            "gradients": jnp.int32(1 if is_exact else 3),
            "hvps": jnp.int32(0),
            "mixed_products": jnp.int32(1 if is_exact else 0),
            "warnings": warnings,
        }
        return tree.neg(cross), None, moved, report

    return solution, pullback


def _after(before: PyTree, params: PyTree) -> PyTree:
    """`params`, not to be used until `before` is there.

    Otherwise XLA merges the forward passes of the two sweeps over the inner objective and holds all
    activations from the one to the other, and runs the outer gradient beside the inner one. (An
    optimization barrier is dropped before XLA merges, on CPU.) Sweeps over large parameters stand
    apart and need no copy of them.
    """
    return params if large(params) else tree.axpy(0.0, before, params)


def _updates(
    update: Callable[..., Any], solution: Any, extra: dict[Any, Any]
) -> Callable[[PyTree], PyTree]:
    """The optimizer's next update as a function of the gradient alone."""
    extra = optimizer.accepted(update, extra)

    def updates(grads):
        out, _ = update(grads, solution.opt, solution.params, **extra)
        return jax.tree.map(lambda u, p: jnp.asarray(u).astype(p.dtype), out, solution.params)

    return updates


def adapt(updates: Callable[[PyTree], PyTree], grads: PyTree, w: PyTree) -> tuple[PyTree, Scalar]:
    """``D w``, the transposed Jacobian of ``−updates`` at `grads` applied to `w`, and how many
    coordinates the rule for kinks set to zero.
    """
    q = _pull(updates, grads, w)

    def smooth():
        return q, jnp.int32(0)

    def kinked():
        at_zero = jax.tree.map(
            lambda g: jnp.abs(g) < _tiny(g.dtype), grads
        )  # squares that underflow are zero to the optimizer
        _, moved = jax.jvp(
            updates, (grads,), (jax.tree.map(lambda z, g: z.astype(g.dtype), at_zero, grads),)
        )
        kinks = jax.tree.map(lambda z, m: z & ~jnp.isfinite(m), at_zero, moved)

        # Beside the kink every derivative is finite, and `where` cuts those that are not wanted
        # before they meet anything else: setting the NaN to zero afterwards would come too late
        # where a norm of the whole gradient (clipping) has spread it.
        def beside(grads):
            return updates(
                jax.tree.map(
                    lambda k, g: jnp.where(k, jnp.asarray(_tiny(g.dtype), g.dtype), g), kinks, grads
                )
            )

        return _pull(beside, grads, w), sum(
            jnp.sum(k, dtype=jnp.int32) for k in jax.tree.leaves(kinks)
        )

    return lax.cond(tree.all_finite(q), smooth, kinked)


def _pull(updates: Any, grads: Any, w: Any) -> Any:
    try:
        return tree.neg(jax.vjp(updates, grads)[1](w)[0])
    except ValueError as error:
        if "Reverse-mode differentiation does not work" not in str(error):
            raise
        raise ValueError(
            "solver: got an optimizer whose update searches in a loop and has no derivative; "
            "expected one that does not search. "
            "Try optax.adam or optax.sgd, or hypergradient.implicit()."
        ) from error


def _tiny(dtype: Any) -> float:
    """Small beside any gradient, and its square times 1e-3 still a normal number."""
    return float(jnp.finfo(dtype).smallest_normal) ** 0.4


__all__ = ["adapt", "sama"]
