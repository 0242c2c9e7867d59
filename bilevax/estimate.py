"""value_and_hypergrad: one hypergradient, inside a training loop of one's own."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import _derivative, check, tree
from bilevax._call import Call, prepared
from bilevax._core.transfers import by_intent
from bilevax._core.types import Key
from bilevax._estimate import estimate, guarded
from bilevax.base import (
    Ctx,
    Draw,
    Estimate,
    Feed,
    Feeds,
    Hypergradient,
    InnerSolver,
    InnerState,
    Problem,
    PyTree,
    objective,
)
from bilevax.data import same
from bilevax.data.draws import check_stacked, count_steps
from bilevax.results import RESULTS, strictness


class EstimateState(NamedTuple):
    """What the next estimate starts from: the inner optimizer's state, the model's state, the
    method's (a warm adjoint), and draws done.
    """

    opt: PyTree
    model: PyTree
    method: PyTree
    step: Any


class HypergradFn:
    """What `value_and_hypergrad` returns: call it, or make a first state with `init`."""

    def __init__(
        self, problem: Problem, solver: InnerSolver, method: Hypergradient, strict: int = 0
    ):
        self.problem, self.solver, self.method, self.strict = problem, solver, method, strict

    def __repr__(self) -> str:
        return (
            f"value_and_hypergrad({self.problem.inner.name}, {self.problem.outer.name}, "
            f"solver={self.solver!r}, hypergradient={self.method!r})"
        )

    @by_intent
    def init(
        self, inner_params: PyTree, outer_params: PyTree = None, *, model_state: PyTree = None
    ) -> EstimateState:
        """A first `state` for these inner parameters. Passing it from the start keeps one trace,
        where ``state=None`` and then a state make two.

        Args:
          inner_params: pytree with floating-point leaves.
          outer_params: needed where the solver's settings depend on them.
          model_state: initial model state of a stateful inner objective.

        Returns:
          An `EstimateState`.
        """
        params, _ = tree.partition(check.arrays(inner_params, "inner_params"))
        if self.solver.sees_outer and outer_params is None:
            raise TypeError(
                "outer_params: got None with a solver whose settings depend on them; expected "
                "them. Try fn.init(inner_params, outer_params)."
            )
        outer = None if outer_params is None else check.arrays(outer_params, "outer_params")
        opt, method = tree.strong((self.solver.first(params, outer), self.method.init(params)))
        return EstimateState(
            opt,
            None if model_state is None else check.arrays(model_state, "model_state"),
            method,
            jnp.zeros((), jnp.int32),
        )

    @by_intent
    def __call__(
        self,
        inner_params: PyTree,
        outer_params: PyTree,
        inner_batch: PyTree = None,
        outer_batch: PyTree = None,
        *,
        hyper_batch: PyTree = None,
        state: EstimateState | None = None,
        key: Key | None = None,
    ) -> Estimate:
        """Value and hypergradient at ``(inner_params, outer_params)``; see
        `value_and_hypergrad`.
        """
        call = prepared(self.problem, inner_params, outer_params, None, key, finite=False)
        if state is None:
            state = self.init(inner_params, outer_params)
        call = call._replace(model=state.model)
        call, feeds = self._fed(call, inner_batch, outer_batch, hyper_batch, key, state.step)
        contexts = _context(call.problem.inner_draw, feeds.inner), _context(same, feeds.outer)
        problem, _ = call.traced(*contexts, steps=self.solver.steps)
        start = InnerState(call.inner, state.opt, state.model)
        solution, out = _derivative.differentiable(
            problem, self.solver, self.method, start, call.outer, feeds, state.method
        )
        new_state = EstimateState(solution.opt, solution.model, out.state, state.step + 1)
        out = guarded(out._replace(state=new_state), state, self.strict)
        inner_fixed, outer_fixed = call.fixed
        return out._replace(
            grad=tree.combine(out.grad, jax.tree.map(lambda a: None, outer_fixed)),
            inner_params=tree.combine(solution.params, inner_fixed),
        )

    def _fed(
        self,
        call: Call,
        inner_batch: PyTree,
        outer_batch: PyTree,
        hyper_batch: PyTree,
        key: Key | None,
        step: Any,
    ) -> tuple[Call, Feeds]:
        """The call with its draws, and its batches as streams of them."""
        keys = (None,) * 3 if key is None else tuple(jax.random.split(key, 3))
        inner_batch, outer_batch = (
            check.batch(inner_batch, "inner_batch"),
            check.batch(outer_batch, "outer_batch"),
        )
        problem, inner_feed = call.problem, Feed(inner_batch, keys[0], jnp.zeros((), jnp.int32))
        if hyper_batch is None:
            hyper_feed = inner_feed._replace(key=keys[1])
        else:
            hyper_feed, problem = (
                Feed(check.batch(hyper_batch, "hyper_batch"), keys[1], 0),
                problem._replace(hyper_draw=same),
            )
        check_stacked(problem.inner_draw, inner_batch, self.solver.steps)
        own = None if key is None else jax.random.fold_in(key, 3)
        feeds = Feeds(inner_feed, hyper_feed, Feed(outer_batch, keys[2], 0), own, step)
        return call._replace(problem=count_steps(problem, self.solver.steps)), feeds


def _context(draw: Draw, feed: Feed) -> Ctx:
    return jax.eval_shape(lambda feed: draw(feed, 0), feed)


def value_and_hypergrad(
    inner_objective: Callable[..., Any],
    outer_objective: Callable[..., Any],
    *,
    solver: InnerSolver,
    hypergradient: Hypergradient,
    inner_init: Callable[[PyTree], PyTree] | None = None,
    inner_draw: Draw = same,
    strict: bool | Collection[RESULTS] = False,
) -> HypergradFn:
    """The outer objective at the lower level's solution, and its total derivative: the
    ``jax.value_and_grad`` of bilevel problems.

    ``y = solver(inner_objective, x)``, ``value = f(y, x)``, ``grad = ∇_x f + (∂y/∂x)' ∇_y f``.

    Args:
      inner_objective: ``g(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      outer_objective: ``f(inner_params, outer_params, batch) -> scalar``, or an `objective`.
      solver: an `InnerSolver`, run once for each call from ``inner_params``.
      hypergradient: a `Hypergradient` method.
      inner_init: ``outer_params -> inner_params``, where each solve starts, with ``key=`` where it
        draws; it may return ``(inner_params, model_state)``.
      inner_draw: how the solver's K steps read `inner_batch`: ``data.same`` gives each of them the
        whole, ``data.stacked`` gives step i the i-th entry of the leading axis.
      strict: warnings that are to be failures: True for all, or a set of `RESULTS`.

    Returns:
      ``fn(inner_params, outer_params, inner_batch=None, outer_batch=None, *, hyper_batch=None,
      state=None, key=None) -> Estimate``, free to be jitted, vmapped and scanned, with
      ``fn.init(inner_params, model_state=)`` for a first state. `hyper_batch` is for second-order
      products
      (default: as drawn from `inner_batch`). ``Estimate.state`` carries optimizer state, model
      state and warm starts to the next call, and ``Estimate.grad`` has None at outer leaves that
      are not floating-point. ``info["code"]`` is a `RESULTS` code: after a failure (no number could
      come) `grad` is NaN and `state` the one that was passed in. ``info["warnings"]`` is a mask of
      what is rough (`results.warnings_in` names it).

    Raises:
      TypeError, ValueError: for arguments that cannot work, before anything is compiled; see the
        message.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> ridge = lambda w, lam, batch: (
      ...     jnp.mean((batch[0] @ w - batch[1]) ** 2) + jnp.exp(lam) * w @ w
      ... )
      >>> loss = lambda w, lam, batch: jnp.mean((batch[0] @ w - batch[1]) ** 2)
      >>> fn = jax.jit(
      ...     bx.value_and_hypergrad(
      ...         ridge, loss, solver=bx.inner.lbfgs(), hypergradient=bx.hypergradient.implicit()
      ...     )
      ... )
      >>> x, y = jnp.eye(3), jnp.array([1.0, 2.0, 3.0])
      >>> estimate = fn(jnp.zeros(3), jnp.float32(0.0), (x, y), (x, y + 0.1))
      >>> float(estimate.grad) > 0
      True
    """
    check.pieces(solver, hypergradient)
    problem = check.problem(
        inner_objective, outer_objective, inner_draw, inner_draw, same, inner_init=inner_init
    )
    check.trajectory(problem, hypergradient)
    return HypergradFn(problem, solver, hypergradient, strictness(strict))


__all__ = ["EstimateState", "HypergradFn", "estimate", "objective", "value_and_hypergrad"]
