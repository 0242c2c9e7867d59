"""Differentiation of the inner iterations themselves, in reverse."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient._mixed_mode import GRADIENT, mixed
from bilevax.hypergradient._solve import summary

CHECKPOINTS = ("mixed", "none", "step", "sqrt")


def unrolled(last: int | None = None, *, checkpoint: str = "mixed") -> Hypergradient:
    """Reverse-mode differentiation through the inner solver's steps.

    ``dx = Σ_t (∂y_t/∂x)' (∂y_K/∂y_t)' w`` over the last `last` of the K steps. Exact for the K-step
    map, whatever the optimizer: momentum, schedules, clipping and the model's state are
    differentiated along.

    Args:
      last: steps to differentiate, counted from the end; None for all of them. Fewer is cheaper and
        biased.
      checkpoint: what is kept for the way back. All give the same numbers.

        - ``"mixed"``: each step's state and its gradient. On the way back the optimizer's update
          alone is differentiated, and the gradient's cotangent is pulled by one forward sweep over
          it in place of a reverse sweep. A step back costs 2.7 training steps of a transformer and
          2.4 of a perceptron (operations, Adam), the least of all but ``"none"``.
        - ``"sqrt"``: the states of √K steps; the others are made again, for one training step more
          (3.7 and 3.4). The mixed-mode rule inside. For long solves.
        - ``"step"``: each step's state, one vector less than ``"mixed"``; plain reverse mode
          through one step at a time (3.1 and 2.8).
        - ``"none"``: everything; plain reverse mode (2.1 and 1.8, at many times the memory, which
          bounds its speed).

    Returns:
      A `Hypergradient`. With ``last=None`` its pullback also returns the cotangent of the initial
      inner point. Its info has ``inner_grad_norm``, of the last gradient that the solver took,
      where it reports one, and the counters ``gradients`` (done again), ``hvps`` and
      ``mixed_products``.

    Raises:
      ValueError: if `last` is below 1 or `checkpoint` unknown; later, with a solver whose loop
        cannot be reversed, or with fewer steps than `last`.

    With ``last=None`` the solution may be differentiated again, in any mode and with any
    `checkpoint` (``order=2``): what is returned is a primal output of ``jax.vjp``, whose rules are
    ordinary code to the derivative above. (Only a ``jax.jvp`` straight through the mixed-mode solve
    would find no rule, and JAX refuses that with a TypeError.) A truncated solution is marked
    ``order=1``: its derivative is as truncated as the pullback.

    Adam, RMSProp and their like have no derivative at a coordinate whose gradients have all been
    exactly zero (an input that is zero in all data, a
    dead unit): the hypergradient is NaN, and its code ``hypergradient_nonfinite``.
      ``eps_root=1e-12`` in the optimizer cures that.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: 0.5 * jnp.sum((y - x) ** 2)
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> solver = bx.inner.optax(optax.sgd(0.5), steps=2)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=solver, hypergradient=bx.hypergradient.unrolled()
      ... )
      >>> fn(jnp.zeros(1), jnp.ones(1)).grad.tolist()
      [0.75]

    Source: Maclaurin, Duvenaud and Adams (ICML 2015); Shaban et al., "Truncated back-propagation
    for bilevel optimization" (AISTATS 2019); Kemaev et al., "Scalable meta-learning via mixed-mode
    differentiation" (arXiv 2505.00793); Chen et al., "Training deep nets with sublinear memory
    cost" (arXiv 1604.06174).
    """
    last = None if last is None else numbers.count(last, "last", why=", or None for all steps")
    numbers.choice(checkpoint, "checkpoint", CHECKPOINTS)
    vjp = Bound("unrolled", _vjp, last=last, checkpoint=checkpoint)
    return Hypergradient(
        init=_init,
        vjp=vjp,
        sees_init=last is None,
        order=2 if last is None else 1,
        cost=Bound("cost", _cost, last=last, checkpoint=checkpoint),
        sees_model=True,
        sees_settings=True,
        sees_steps=last is None,
        batches=0,
    )


def _cost(solver: Any, *, last: Any, checkpoint: Any) -> dict[Any, Any]:
    taken = solver.steps if last is None else last
    return {
        "gradients": taken if checkpoint in ("step", "sqrt") else 0,
        "hvps": taken,
        "mixed_products": taken,
    }


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
    last: Any,
    checkpoint: Any,
) -> tuple[InnerState, Pullback]:
    solver, steps = lower.solver, lower.solver.steps
    if not solver.reversible:
        raise ValueError(
            f"solver: got {solver!r}, whose loop runs until a tolerance and has no reverse mode; "
            "expected a fixed number of steps. "
            "Try inner.optax(optax.sgd(step_size), steps), hypergradient.implicit(), or "
            "hypergradient.forward() for few outer parameters."
        )
    if last is not None and last > steps:
        raise ValueError(f"last: got {last}; expected at most the solver's {steps} steps.")
    start = 0 if last is None else steps - last
    if start:
        inner_state, _ = lax.stop_gradient(
            lower.run(*lax.stop_gradient((inner_state, outer, feed)), 0, start)
        )

    floats, rest = tree.partition(inner_state.model)

    def solve(params, floats, outer):
        begin = inner_state._replace(params=params, model=tree.combine(floats, rest))
        end, info = _RUNS[checkpoint](lower, begin, outer, feed, start, steps)
        seen = info.pop("steps") if lower.keeps else end.params
        return (seen, tree.partition(end.model)[0]), (end, info)

    (params, moved), reverse, (solution, info) = jax.vjp(
        solve, inner_state.params, floats, outer, has_aux=True
    )
    solution = solution._replace(
        params=params, model=tree.combine(moved, tree.partition(solution.model)[1])
    )
    report = summary(lax.stop_gradient(info), lax.stop_gradient(solution))
    taken = steps - start
    again = {"none": 0, "step": taken, "mixed": 0, "sqrt": taken}[checkpoint]
    report |= {
        "gradients": jnp.int32(again),
        "hvps": jnp.int32(taken),
        "mixed_products": jnp.int32(taken),
    }

    def pullback(w):
        *begin, outer_cotangent = reverse((w.params, w.model))
        return (
            outer_cotangent,
            InnerState(begin[0], (), begin[1]) if last is None else None,
            state,
            report,
        )

    return solution, pullback


# ---- the solve, with what is kept of it


def _body(lower: Lower, checkpointed: bool = True) -> Callable[..., Any]:
    # Inside a scan nothing can be merged across the loop's boundary, so merging need not be
    # prevented.
    policy = jax.checkpoint_policies.save_only_these_names(GRADIENT)
    return (
        jax.checkpoint(lower.step, prevent_cse=False, policy=policy) if checkpointed else lower.step
    )


def _steps(
    body: Callable[..., Any], state: InnerState, outer: PyTree, feed: Feed, indices: Any
) -> tuple[InnerState, PyTree]:
    return lax.scan(lambda state, i: body(state, i, outer, feed), state, indices)


def _all(lower: Lower, state: Any, outer: PyTree, feed: Feed, lo: Any, hi: Any) -> Any:
    return lower.run(state, outer, feed, lo, hi)


def _each(lower: Lower, state: Any, outer: PyTree, feed: Feed, lo: Any, hi: Any) -> Any:
    return _steps(_body(lower), state, outer, feed, jnp.arange(lo, hi))


def _mixed(lower: Lower, state: Any, outer: PyTree, feed: Feed, lo: Any, hi: Any) -> Any:
    return _each(lower._replace(objective=mixed(lower.objective)), state, outer, feed, lo, hi)


def _sqrt(lower: Lower, state: Any, outer: PyTree, feed: Feed, lo: Any, hi: Any) -> Any:
    """Segments of about √K steps: the states at their starts are kept, those inside one are rebuilt
    when the way back comes to it.
    """
    body = _body(lower._replace(objective=mixed(lower.objective)))
    length = math.isqrt(hi - lo)
    rest = (hi - lo) % length
    segment = jax.checkpoint(
        lambda state, indices, outer, feed: _steps(body, state, outer, feed, indices),
        prevent_cse=False,
    )
    infos = []
    if rest:
        state, info = segment(state, jnp.arange(lo, lo + rest), outer, feed)
        infos.append(info)
    indices = jnp.arange(lo + rest, hi).reshape(-1, length)
    state, info = lax.scan(
        lambda state, indices: segment(state, indices, outer, feed), state, indices
    )
    infos.append(jax.tree.map(lambda a: a.reshape(-1, *a.shape[2:]), info))
    return state, jax.tree.map(lambda *rows: jnp.concatenate(rows), *infos)


_RUNS = {"none": _all, "step": _each, "mixed": _mixed, "sqrt": _sqrt}
