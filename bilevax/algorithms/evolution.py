"""Evolution strategies on truncated unrolls, biased or persistent."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax

from bilevax import check, tree
from bilevax._core import numbers, optimizer
from bilevax._core.types import Numeric
from bilevax.base import (
    Algorithm,
    Bound,
    Draws,
    Feeds,
    InnerSolver,
    InnerState,
    Lower,
    Problem,
    PyTree,
    StepInfo,
)
from bilevax.results import ladder
from bilevax.starts import takes_key


class EvolutionState(NamedTuple):
    """Where an evolution strategy stands.

    Attributes:
      inner: the unperturbed trajectory.
      outer: outer parameters.
      outer_opt: the outer optimizer's state.
      particles: inner states of the perturbed trajectories, leading axes (2, samples): the mirrored
        halves.
      drift: sum of each pair's perturbations since the last reset, leading axis samples.
      start: the inner point that trajectories begin at.
      unrolls: unrolls since the last reset.
    """

    inner: InnerState
    outer: PyTree
    outer_opt: PyTree
    particles: InnerState
    drift: PyTree
    start: PyTree
    unrolls: Any


def persistent_es(
    inner_solver: InnerSolver,
    outer_optimizer: optax.GradientTransformation,
    *,
    samples: int = 16,
    scale: Numeric = 1e-2,
    unrolls: int = 10,
    persistent: bool = True,
    chunk: int | None = None,
) -> Algorithm:
    r"""Persistent evolution strategies: the gradient of long inner trajectories, from truncated
    unrolls and values alone.

    .. math::
        \hat g = \frac{1}{2 \sigma^2 N} \sum_{i=1}^{N} \xi_i \big( f(y_i^+) - f(y_i^-) \big),
        \qquad \xi_i \leftarrow \xi_i + \epsilon_i, \quad
        y_i^\pm \leftarrow \mathrm{solver}(y_i^\pm, x \pm \epsilon_i), \quad
        \epsilon_i \sim N(0, \sigma^2 I)

    Each particle carries its own trajectory from step to step, and the sum of all perturbations
    that shaped it. With x held, the estimates of the steps between two resets add up to an unbiased
    gradient of the smoothed sum of their losses; plain truncated ES (``ξ = ε``) forgets what
    earlier unrolls did to the trajectory and is biased towards what pays soon. Works through
    solvers and objectives without derivatives.

    Args:
      inner_solver: an `InnerSolver`; its steps are one truncated unroll.
      outer_optimizer: any optax transformation.
      samples: mirrored pairs N. Each costs two unrolls a step.
      scale: σ, the width of the smoothing.
      unrolls: steps until trajectories start over at the initial inner point (or at `inner_init` of
        the outer parameters).
      persistent: False for plain truncated ES.
      chunk: pairs run at once; None for all.

    Returns:
      An `Algorithm`; it needs a key.

    Raises:
      TypeError, ValueError: for arguments of another kind or outside their range; when run without
        a key.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2) / 2
      >>> outer = lambda y, x, batch: jnp.sum((y - 1.0) ** 2) / 2
      >>> algorithm = bx.algorithms.persistent_es(
      ...     bx.inner.optax(optax.sgd(0.5), 2), optax.sgd(0.3), unrolls=3
      ... )
      >>> solution = bx.solve_bilevel(
      ...     inner,
      ...     outer,
      ...     jnp.zeros(1),
      ...     jnp.zeros(1),
      ...     algorithm=algorithm,
      ...     num_steps=60,
      ...     key=jax.random.key(0),
      ... )
      >>> bool(abs(solution.outer_params[0] - 1.0) < 0.2)
      True

    Source: Vicol, Metz and Sohl-Dickstein, "Unbiased gradient estimation in unrolled computation
    graphs with persistent evolution strategies" (ICML 2021), algorithm 2.
    """
    if not isinstance(inner_solver, InnerSolver):
        raise TypeError(
            f"inner_solver: got {check.describe(inner_solver)}; expected an InnerSolver. Try "
            "inner.optax(optimizer, steps)."
        )
    check.transformation(outer_optimizer, "outer_optimizer")
    settings = dict(
        inner_solver=inner_solver,
        outer_optimizer=outer_optimizer,
        samples=numbers.count(samples, "samples"),
    )
    moves = dict(
        scale=numbers.positive(scale, "scale", example=1e-2),
        unrolls=numbers.count(unrolls, "unrolls"),
        persistent=numbers.flag(persistent, "persistent"),
        chunk=None if chunk is None else numbers.count(chunk, "chunk"),
    )
    init = Bound("persistent_es", _init, **settings)
    step = Bound("persistent_es", _step, **settings, **moves)
    return Algorithm(init, step, Draws(inner_solver.steps, 1, 1), differentiates=False)


def _copies(state: InnerState, samples: int) -> InnerState:
    return jax.tree.map(lambda a: jnp.broadcast_to(a, (2, samples, *jnp.shape(a))), state)


def _init(
    problem: Problem,
    inner: InnerState,
    outer: PyTree,
    *,
    inner_solver: InnerSolver,
    outer_optimizer: optax.GradientTransformation,
    samples: int,
) -> EvolutionState:
    if problem.outer.trajectory or takes_key(problem.inner_init):
        raise ValueError(
            "algorithm: got persistent_es with trajectory=True or a start that draws; expected "
            "neither. Try double_loop."
        )
    params = inner.params if problem.inner_init is None else problem.inner_init(outer, None)[0]
    inner = InnerState(params, tree.strong(inner_solver.first(params, outer)), inner.model)
    drift = jax.tree.map(lambda a: jnp.zeros((samples, *a.shape), a.dtype), outer)
    # Not the array that `inner` holds: one array held twice cannot be donated.
    start = jax.tree.map(jnp.copy, inner.params)
    return EvolutionState(
        inner,
        outer,
        optimizer.init(outer_optimizer, outer),
        _copies(inner, samples),
        drift,
        start,
        jnp.int32(0),
    )


def _step(
    problem: Problem,
    state: EvolutionState,
    feeds: Feeds,
    *,
    inner_solver: InnerSolver,
    outer_optimizer: optax.GradientTransformation,
    samples: int,
    scale: Any,
    unrolls: Any,
    persistent: Any,
    chunk: Any,
) -> tuple[EvolutionState, StepInfo]:
    if feeds.key is None:
        raise ValueError(
            "key: got None although algorithms.persistent_es draws perturbations; expected a PRNG "
            "key. Try key=jax.random.key(0)."
        )
    outer, lower = state.outer, Lower(problem.inner, inner_solver, problem.inner_draw)
    again = state.unrolls >= unrolls
    begin = state.start if problem.inner_init is None else problem.inner_init(outer, None)[0]
    fresh = InnerState(begin, tree.strong(inner_solver.first(begin, outer)), state.inner.model)
    inner = tree.where(again, fresh, state.inner)
    particles = tree.where(again, _copies(fresh, samples), state.particles)
    drift = tree.where(again, tree.zeros_like(state.drift), state.drift)
    outer_ctx = problem.outer_draw(feeds.outer, 0)

    def unroll(inner, outer):
        end, _ = lower.run(inner, outer, feeds.inner)
        value, (_, aux) = problem.outer(end.params, outer, outer_ctx._replace(model=end.model))
        return end, value, aux

    def pair(arguments):
        key, halves = arguments
        moved = tree.scale(scale, tree.normal_like(key, outer))
        ahead, behind = (jax.tree.map(lambda a, i=i: a[i], halves) for i in (0, 1))
        (ahead, up, _), (behind, down, _) = (
            unroll(ahead, tree.add(outer, moved)),
            unroll(behind, tree.sub(outer, moved)),
        )
        return moved, jax.tree.map(lambda a, b: jnp.stack([a, b]), ahead, behind), up - down

    by_pair = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), particles)
    keys = jax.random.split(feeds.key, samples)
    moved, halves, differences = lax.map(
        pair, (keys, by_pair), batch_size=min(samples, chunk or samples)
    )
    drift = tree.add(drift, moved) if persistent else moved
    weights = differences / (2 * scale**2 * samples)
    grad = jax.tree.map(
        lambda a: jnp.sum(weights.astype(a.dtype).reshape((-1,) + (1,) * (a.ndim - 1)) * a, axis=0),
        drift,
    )

    solution, value, aux = unroll(inner, outer)
    grad_norm = tree.norm(grad)
    code = ladder(
        inner=tree.all_finite(solution.params),
        value=jnp.isfinite(value),
        grad=jnp.isfinite(grad_norm),
    )
    moved_outer, outer_opt = optimizer.moved(
        outer_optimizer, grad, state.outer_opt, outer, problem.project, value=value, grad=grad
    )
    count = jnp.where(again, 1, state.unrolls + 1).astype(jnp.int32)
    particles = jax.tree.map(lambda a: jnp.swapaxes(a, 0, 1), halves)
    diagnostics = {"gradients": jnp.int32((2 * samples + 1) * inner_solver.steps), "unrolls": count}
    info = StepInfo(value, grad_norm, (solution, outer), code, diagnostics, aux)
    return EvolutionState(
        solution, moved_outer, outer_opt, particles, drift, state.start, count
    ), info


__all__ = ["EvolutionState", "persistent_es"]
