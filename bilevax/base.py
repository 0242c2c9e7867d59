"""The core types: named tuples of pure functions, and a Protocol for each function in them.

Everything that is configured here (objectives, solvers, methods, algorithms) is a pytree. Its
functions and integers are static and compared by equality; its floats and arrays are leaves. A run
therefore recompiles when the mathematics changes and not when a number does.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, Protocol

import jax
import jax.numpy as jnp
from jax import lax

from bilevax._core.linear import Linear, LinearInfo, LinearSolver, as_linear
from bilevax._core.objective import Ctx, Objective, objective
from bilevax._core.settings import Bound, Static, join, split
from bilevax._core.showing import screenful
from bilevax._core.types import PyTree as PyTree
from bilevax._core.types import Scalar as Scalar

# ---- what a step reads


class Feed(NamedTuple):
    """A stream of batches: `data` that `draw` reads, the stream's key, and the index of the next
    draw.

    `order` is what each draw from here on would find out, found out for many of them at once: an
    array with an entry a draw.
    """

    data: PyTree = None
    key: Any = None
    step: Any = 0
    order: Any = None


class Feeds(NamedTuple):
    """The streams of one step of an algorithm, a key for its own randomness, the step's number, and
    how many steps led to the state.
    """

    inner: Feed = Feed()
    hyper: Feed = Feed()
    outer: Feed = Feed()
    key: jax.Array | None = None
    step: Any = 0
    done: Any = 0


# ---- the pieces


class Draw(Protocol):
    """How a stream finds the batch of its i-th draw from here."""

    def __call__(self, feed: Feed, i: Any) -> Ctx: ...


class InnerState(NamedTuple):
    """Where an inner solver stands: parameters, its optimizer's state, the model's state."""

    params: PyTree
    opt: PyTree = ()
    model: PyTree = None


class InnerInit(Protocol):
    """An inner solver's first state, of its parameters."""

    def __call__(self, params: PyTree) -> PyTree: ...


class InnerStep(Protocol):
    """One step of an inner solver, and what a person reads of it."""

    def __call__(
        self, objective: Objective, state: InnerState, outer: PyTree, ctx: Ctx
    ) -> tuple[InnerState, dict[str, Scalar]]: ...


class Update(Protocol):
    """An optimizer's update as a function of the gradient: ``(grads, opt, params, **extra) ->
    (updates, opt)``.
    """

    def __call__(self, grads: PyTree, opt: PyTree, params: PyTree) -> tuple[PyTree, PyTree]: ...


class Fixed(Protocol):
    """A mapping whose fixed points an inner solver's solutions are: ``(objective, params, outer,
    ctx) -> params``.
    """

    def __call__(self, objective: Objective, params: PyTree, outer: PyTree, ctx: Ctx) -> PyTree: ...


class InnerSolver(NamedTuple):
    """Moves `inner_params`: ``init(params) -> opt`` and ``step(objective, state, outer, ctx) ->
    (state, info)``, `steps` times.

    The first three say how it moves. The others say what else is known of it; their defaults are
    right for a solver that says nothing.

    Attributes:
      init: optimizer state from inner parameters.
      step: one step; its info has at least ``value`` (the inner objective before the step).
      steps: steps for each outer step.
      update: what SAMA differentiates; None where the solver is not a gradient transformation.
      reversible: False where a ``while_loop`` inside forbids reverse mode, so that unrolling is
        refused.
      sees_outer: its settings may depend on the outer parameters: it is called as
        ``init(params, outer)`` and ``update(grads, opt, params, outer=outer)``.
      to_tolerance: ``(tol, maxiter) -> InnerSolver``: the same solver, run in one step until it is
        solved to `tol` (a value or a traced scalar), at most `maxiter` iterations. None: a fixed
        number of steps is all it can do.
      optimality: what its solutions satisfy. None: the inner gradient is zero. Else the mapping
        whose fixed points they are (a projected or proximal step), which implicit differentiation
        then goes through.
      gradients: the most inner gradients that one step takes. None: not known.
      inverse_hessian: ``(opt, v) -> inner vector``: the product of v with an estimate of the
        inverse Hessian that
        the optimizer state holds. None: it holds none.
      constraints: the `Objective` form of ``(inner, outer, batch) -> (equality, inequality)``, of
        which its solutions make the first zero and the second not positive; its info has the
        ``multipliers``, of the same form. None: there are none.
      inverse_diagonal: ``opt -> inner vector``: the diagonal of an estimate of the inverse Hessian,
        up to a factor: positive, and ones where nothing is known. None: it knows of none.
    """

    init: InnerInit
    step: InnerStep
    steps: int = 1
    update: Update | None = None
    reversible: bool = True
    sees_outer: bool = False
    to_tolerance: Callable[[Any, int], InnerSolver] | None = None
    optimality: Fixed | None = None
    gradients: int | None = None
    inverse_hessian: Callable[[PyTree, PyTree], PyTree] | None = None
    constraints: Objective | None = None
    inverse_diagonal: Callable[[PyTree], PyTree] | None = None

    def first(self, params: PyTree, outer: PyTree) -> PyTree:
        """The first optimizer state."""
        # which of both signatures it has is what `sees_outer` says
        return self.init(params, outer) if self.sees_outer else self.init(params)  # type: ignore[call-arg]

    def __repr__(self) -> str:
        return repr(self.step)


class Lower(NamedTuple):
    """A lower level: objective, solver and the draw of its batches.

    `keeps`: the info of a solve has the parameters after each step as ``steps``, and methods that
    declare ``sees_steps`` return them, stacked, in place of the solution's.
    """

    objective: Objective
    solver: InnerSolver
    draw: Draw
    keeps: bool = False

    def step(
        self, state: InnerState, i: Any, outer: PyTree, feed: Feed
    ) -> tuple[InnerState, dict[str, Scalar]]:
        """The i-th step of the solve."""
        ctx = self.draw(feed, i)._replace(model=state.model)
        state, info = self.solver.step(self.objective, state, outer, ctx)
        return state, ({**info, "steps": state.params} if self.keeps else info)

    def run(
        self, state: InnerState, outer: PyTree, feed: Feed, lo: int = 0, hi: int | None = None
    ) -> tuple[InnerState, dict[str, Scalar]]:
        """Steps `lo` to `hi` (default: all) of the solve. The info's leaves have a leading axis, a
        row a step.
        """
        hi = self.solver.steps if hi is None else hi
        if hi - lo == 1:  # no loop to trace, and the solver's own loop stays the outermost one
            state, info = self.step(state, lo, outer, feed)
            return state, jax.tree.map(lambda a: jnp.asarray(a)[None], info)
        return lax.scan(
            lambda state, i: self.step(state, i, outer, feed),
            state,
            jnp.arange(lo, hi, dtype=jnp.int32),
        )


def as_cotangent(method: Hypergradient, params: PyTree, model: PyTree) -> PyTree:
    """Cotangents on a solution's parameters and on the floating-point leaves of its model's state,
    as `method` takes them.
    """
    return InnerState(params, (), model) if method.sees_model else params


Pullback = Callable[[PyTree], tuple[PyTree, PyTree, PyTree, dict[str, Scalar]]]


class HypergradientInit(Protocol):
    """A hypergradient method's first state: a warm adjoint, say."""

    def __call__(self, inner: PyTree) -> PyTree: ...


class HypergradientVjp(Protocol):
    """The lower level solved, with the pullback of its solution."""

    def __call__(
        self,
        lower: Lower,
        inner_state: InnerState,
        outer: PyTree,
        feed: Feed,
        ctx: Ctx,
        state: PyTree,
    ) -> tuple[InnerState, Pullback]: ...


class Hypergradient(NamedTuple):
    """How a cotangent on a solved lower level is pulled back to what the solution depends on; the
    shape of ``jax.vjp``.

    ``solution, pullback = vjp(lower, inner_state, outer, feed, ctx, state)`` solves, and
    ``outer_cotangent, init_cotangent, state, info = pullback(inner_cotangent)`` pulls back.

    Attributes:
      init: method state (a warm adjoint, say) from inner parameters.
      vjp: as above. `ctx` is the context of second-order products, drawn apart from the solve's
        own.
      sees_init: the pullback returns a cotangent on the initial inner point; otherwise None stands
        there. With `sees_model` that is an `InnerState`, of parameters and model state.
      order: how often the solution may be differentiated: 1 where only this pullback is right; 2
        where the
        derivative is exact any number of times: through `linear`, by the implicit function theorem,
        and where that is None through the operations of `vjp` itself.
      sees_model: the pullback takes an `InnerState` of cotangents, on parameters and model state
        (its `opt` is ``()``). Otherwise it takes that on the parameters, and the statistics count
        as constants.
      sees_settings: it differentiates inner optimizer settings that depend on the outer parameters.
      sees_steps: it differentiates the trajectory, not only its end (objectives declared
        `trajectory`).
      batches: batches on which the pullback evaluates the inner objective. 0: none. 1: one, where
        need be the
        one last trained on. More: as many, independent of each other and of the training.
      cost: ``(inner solver) -> {"gradients": n, "hvps": n, "mixed_products": n}``, of one pullback.
        None: not known.
      linear: the solver of the adjoint system, with its damping, for those who differentiate the
        solution by the implicit function theorem, or solve a larger system in its place. None:
        there is none.
      max_residual: the residual of that solve which is accepted. None: the solver's own tolerance.
      extends: the pullback gives cotangents of all else that the objective reads (batches, captured
        arrays) when that is appended to the outer parameters. Otherwise such derivatives are
        refused.
      first_order_form: the method to take where the inner objective may be differentiated only once
        (it
        holds a solution of a first-order method). None: this method itself.
      precision: the `jax.default_matmul_precision` that its cotangent needs. None: the user's own.
      mapping: what it differentiates beside the inner objective, as `objective` makes one: a
        constraint, say.
      constant: the solution counts as a constant, so that only what the outer objective itself
        reads has a derivative.
      rows: like `vjp`, with a pullback of several cotangents at once (a leading axis), over solvers
        whose solutions are
        stationary points. None: they are pulled back one by one, vectorised.
    """

    init: HypergradientInit
    vjp: HypergradientVjp
    sees_init: bool = False
    order: int = 1
    sees_model: bool = False
    sees_settings: bool = False
    sees_steps: bool = False
    batches: int = 1
    cost: Callable[[InnerSolver], dict[str, Any]] | None = None
    linear: Linear | None = None
    max_residual: Any = None
    first_order_form: Hypergradient | None = None
    extends: bool = True
    precision: str | None = None
    mapping: Objective | None = None
    constant: bool = False
    rows: HypergradientVjp | None = None

    def __repr__(self) -> str:
        return repr(self.vjp)


class Problem(NamedTuple):
    """Both objectives and how their batches are drawn: what an algorithm solves.

    `inner_init` maps outer parameters, and a key, to the inner parameters and the model state (or
    None: as it stands) that each step starts from; None is a warm start. `project` maps outer
    parameters into their feasible set after each outer step.
    """

    inner: Objective
    outer: Objective
    inner_draw: Draw
    hyper_draw: Draw
    outer_draw: Draw
    inner_init: Any = None  # (outer, key) -> (params, model), or None
    project: Callable[[PyTree], PyTree] | None = None

    @property
    def separable(self) -> bool:
        """Whether devices may run it on tasks of their own, without the others."""
        return True

    @property
    def stream_draws(self) -> tuple[Draw, ...]:
        """The draw of each of a step's streams."""
        return self.inner_draw, self.hyper_draw, self.outer_draw

    def with_objectives(self, change: Callable[[Objective], Objective]) -> Problem:
        """The same problem of changed objectives."""
        return self._replace(inner=change(self.inner), outer=change(self.outer))

    def feeds(self, streams: tuple[Feed, ...], key: Any, step: Any, done: Any) -> Feeds:
        """A step's streams as its algorithm takes them; `key` is the run's."""
        own = None if key is None else jax.random.fold_in(jax.random.fold_in(key, 3), step)
        inner, hyper, outer = streams
        return Feeds(inner, hyper, outer, own, step, done)


class StepInfo(NamedTuple):
    """What one step of an algorithm reports.

    Attributes:
      value: the outer objective at `point`.
      grad_norm: norm of the hypergradient (or of the direction that stands for it).
      point: ``InnerState`` and outer parameters that `value` belongs to.
      code: a `RESULTS` code as int32; a failure ends the run and the step is undone.
      diagnostics: scalars by name, a column of the history each.
      aux: the outer objective's aux.
      warnings: what is known to be rough about this step, as a bit mask (`results.warning`).
      scored: whether `value` may be compared with those of other steps: the inner level has caught
        up with the outer one, as far as the step can tell.
      lag: ``‖∇_y g‖`` where the value was taken, of algorithms that move both levels at once and
        cannot tell;
        the driver then compares it with those of other steps. None: `scored` says all.
    """

    value: Scalar
    grad_norm: Scalar
    point: tuple[InnerState, PyTree]
    code: Scalar
    diagnostics: dict[str, Scalar]
    aux: PyTree = None
    warnings: Scalar = 0
    scored: Scalar = True
    lag: Scalar | None = None


class Draws(NamedTuple):
    """How many batches one step of an algorithm draws from each stream."""

    inner: int = 1
    hyper: int = 1
    outer: int = 1


class AlgorithmInit(Protocol):
    """An algorithm's first state, of where both levels begin."""

    def __call__(self, problem: Problem, inner: InnerState, outer: PyTree) -> PyTree: ...


class AlgorithmStep(Protocol):
    """One move of both levels, and what a person reads of it."""

    def __call__(
        self, problem: Problem, state: PyTree, feeds: Feeds
    ) -> tuple[PyTree, StepInfo]: ...


class Algorithm(NamedTuple):
    """Moves both levels: ``init(problem, inner_state, outer) -> state`` and ``step(problem, state,
    feeds) -> (state, StepInfo)``.

    A state has the fields `inner` (an `InnerState`) and `outer`. `draws` says how many batches a
    step draws from each stream. `undoes`: where a step reports a failure, it returns the state that
    it was given. Otherwise the driver restores that, at the price of a copy of the whole state a
    step.
    `around`: ``(wrap) -> Algorithm``, the same algorithm with its hypergradient method wrapped;
    None where it has none.
    `finite`: ``(problem, feeds, draws) -> bool``, whether what a failed step has read is finite;
    None for a step that finds that out itself.
    `differentiates`: it moves the outer parameters along derivatives of both objectives, where what
    goes through ``stop_gradient`` counts for nothing. False: by differences of values, or by what
    only itself knows.
    `descends`: it goes to no point whose value it finds larger. The latest iterate that is scored
    is then the one to keep: a smaller value of before was taken where the inner level was solved
    less.
    """

    init: AlgorithmInit
    step: AlgorithmStep
    draws: Draws = Draws()
    undoes: bool = False
    finite: Callable[..., Any] | None = None
    around: Callable[[Callable[[Hypergradient], Hypergradient]], Algorithm] | None = None
    differentiates: bool = True
    descends: bool = False

    def __repr__(self) -> str:
        return repr(self.step)


class Estimate(NamedTuple):
    """One hypergradient: outer `value`, its `grad`, the solved `inner_params`, `state` to go on
    from, `info` to read, the outer `aux`.
    """

    value: Scalar
    grad: PyTree
    inner_params: PyTree
    state: PyTree
    info: dict[str, Scalar]
    aux: PyTree = None

    def __repr__(self) -> str:
        return screenful(self)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Algorithm", "AlgorithmInit", "AlgorithmStep", "Bound", "Ctx", "Draw", "Draws", "Estimate",
    "Feed", "Feeds", "Fixed", "Hypergradient",
    "HypergradientInit", "HypergradientVjp", "InnerInit", "InnerSolver", "InnerState", "InnerStep",
    "Linear", "LinearInfo", "LinearSolver",
    "Lower", "Objective", "Problem", "Static", "StepInfo", "Update", "as_cotangent", "as_linear",
    "join",
    "objective", "split",
]  # fmt: skip
