"""value_and_multilevel_grad: the top objective at the solved levels below it, and its total
derivative.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import check, tree
from bilevax._core.transfers import by_intent
from bilevax._core.types import Key
from bilevax._estimate import guarded
from bilevax.base import Ctx, Estimate, Feed, InnerState, PyTree, objective
from bilevax.data import same
from bilevax.data.draws import with_number
from bilevax.multilevel.derivative import differentiable
from bilevax.multilevel.level import (
    Level,
    check_batches,
    check_key,
    check_names,
    checked,
    split_params,
)
from bilevax.multilevel.statistics import Division, divided
from bilevax.multilevel.system import System, as_solver, as_system, method_of
from bilevax.results import RESULTS, strictness


class MultilevelEstimateState(NamedTuple):
    """What the next estimate starts from, by level name: optimizers' states, models' states,
    methods' states; and draws done.
    """

    opt: dict[str, PyTree]
    model: dict[str, PyTree]
    method: dict[str, PyTree]
    step: Any


class MultilevelGradFn:
    """What `value_and_multilevel_grad` returns: call it, or make a first state with `init`."""

    def __init__(self, levels: Sequence[Level], strict: int = 0):
        self.levels, self.strict = checked(levels), strict

    def __repr__(self) -> str:
        return f"value_and_multilevel_grad({list(self.levels)!r})"

    @by_intent
    def init(
        self, params: dict[str, PyTree], *, model_state: dict[str, PyTree] | None = None
    ) -> MultilevelEstimateState:
        """A first `state` for these parameters. Passing it from the start keeps one trace, where
        ``state=None`` and then a state make two.

        Args:
          params: dict by level name.
          model_state: initial model states of stateful objectives, by level name.

        Returns:
          A `MultilevelEstimateState`.
        """
        floats, fixed = split_params(self.levels, params)
        models = tree.strong(
            check_names(model_state, [level.name for level in self.levels], "model_state")
        )
        states, methods = first_states(self.levels, floats, {})
        opt = {name: state.opt for name, state in states.items()}
        return MultilevelEstimateState(
            opt, self._completed(models), methods, jnp.zeros((), jnp.int32)
        )

    @by_intent
    def __call__(
        self,
        params: dict[str, PyTree],
        batches: dict[str, PyTree] | None = None,
        *,
        state: MultilevelEstimateState | None = None,
        key: Key | None = None,
    ) -> Estimate:
        """Value and gradient of the top level at `params`; see `value_and_multilevel_grad`."""
        if state is not None and not isinstance(state, MultilevelEstimateState):
            raise TypeError(
                f"state: got {check.describe(state)}; expected an estimate's state, or None."
            )
        floats, fixed = split_params(self.levels, params)
        names = [level.name for level in self.levels]
        batches = {
            n: check.batch(b, f"batches[{n!r}]") for n, b in check_batches(batches, names).items()
        }
        models = self._completed({} if state is None else state.model)
        system = self.system(floats, fixed, batches, key, models)
        if state is None:
            states, methods = first_states(self.levels, floats, {})
            step = jnp.zeros((), jnp.int32)
        else:
            own = self.division(models).own
            states = {n: InnerState(floats[n], state.opt[n], own[n]) for n in names[:-1]}
            methods, step = state.method, state.step
        draws = {
            n: solver.steps + 1 for n, solver in system.solvers.items()
        }  # of a level in each call; `every` counts them
        feeds = {
            n: Feed(
                batches.get(n),
                None if key is None else jax.random.fold_in(key, i),
                step * draws.get(n, 1),
            )
            for i, n in enumerate(names)
        }
        out = differentiable(system, states, methods, floats[names[-1]], feeds)
        new_state = MultilevelEstimateState(
            {n: s.opt for n, s in out.states.items()},
            {**models, **self.division(models).shown(out.states, models)},
            out.methods,
            step + 1,
        )
        solved = {n: tree.combine(s.params, fixed[n]) for n, s in out.states.items()}
        grad = tree.combine(out.grad, jax.tree.map(lambda a: None, fixed[names[-1]]))
        found = Estimate(out.value, grad, solved, new_state, out.info, out.aux)
        before = MultilevelEstimateState(
            {n: s.opt for n, s in states.items()}, models, methods, step
        )
        return guarded(found, before, self.strict)

    def _completed(self, models: dict[Any, Any]) -> dict[Any, Any]:
        """An entry for each lower level, and for the top one where it has a state."""
        *lower, top = (level.name for level in self.levels)
        return {n: models.get(n) for n in (*lower, *([top] if top in models else []))}

    def division(self, models: dict[Any, Any]) -> Division:
        """Whose model state is whose."""
        objectives = {level.name: objective(level.objective) for level in self.levels}
        return divided(list(objectives), objectives, models)

    def system(
        self,
        floats: dict[Any, Any],
        fixed: dict[Any, Any],
        batches: dict[Any, Any],
        key: Any,
        models: dict[Any, Any],
    ) -> System:
        """The levels bound to these shapes, with the graph found from them."""
        check_key(self.levels, key, [])
        contexts = {
            level.name: with_number(objective(level.objective), Ctx(batches.get(level.name), key))
            for level in self.levels
        }
        return as_system(
            self.levels,
            floats,
            fixed,
            {level.name: same for level in self.levels},
            contexts,
            models,
        )


def first_states(
    levels: Sequence[Level], params: dict[str, PyTree], models: dict[Any, Any]
) -> tuple[dict[str, InnerState], dict[str, PyTree]]:
    """Fresh optimizer and method states of all levels but the top one."""
    states, methods = {}, {}
    for level in levels[:-1]:
        name = level.name
        opt, methods[name] = tree.strong(
            (as_solver(level).first(params[name], None), method_of(level).init(params[name]))
        )
        states[name] = InnerState(
            params[name], opt, None if models.get(name) is None else tree.strong(models[name])
        )
    return states, methods


def value_and_multilevel_grad(
    levels: Sequence[Level], *, strict: bool | Collection[RESULTS] = False
) -> MultilevelGradFn:
    r"""The top objective at the solved levels below it, and its total derivative:
    `value_and_hypergrad` for any number of levels.

    .. math::
        w_j = \nabla_{y_j} f + \sum_{k \text{ reads } j} (\partial y_k / \partial y_j)^\top w_k,
        \qquad
        \nabla F = \nabla_x f + \sum_{j \text{ reads } x} (\partial y_j / \partial x)^\top w_j

    Who reads whom is found from the objectives (`explain` prints it); so is whether a lower level
    is a constant of another's problem (a chain) or reacts to it and is solved inside it (nested).
    Every level is pulled back once, after all levels that read it.

    Args:
      levels: two or more `Level`, lowest first. Each but the top one has a solver and a method.
      strict: as in `value_and_hypergrad`.

    Returns:
      ``fn(params, batches=None, *, state=None, key=None) -> Estimate``, free to be jitted, vmapped
      and scanned, with ``fn.init(params, model_state=)`` for a first state. `params` and `batches`
      are dicts by level name; `params` says where each level starts. ``Estimate.grad`` is that of
      the top level, ``Estimate.inner_params`` a dict of the levels below as solved,
      ``Estimate.info`` has the entries of each level's method as ``"name/entry"``. A level that
      only others' objectives hold is returned as those left it.

    Raises:
      TypeError, ValueError: for arguments that cannot work, naming the level; for a level that
        nobody reads; for a method that needs a second derivative through a level whose method gives
        only one.

    Examples:
      >>> import jax.numpy as jnp, optax, bilevax as bx
      >>> descent, method = bx.inner.optax(optax.sgd(0.2), 30), bx.hypergradient.implicit()
      >>> levels = [
      ...     bx.Level(
      ...         "z", lambda p, batch: (p["z"] - p["y"]) ** 2, solver=descent, hypergradient=method
      ...     ),
      ...     bx.Level(
      ...         "y",
      ...         lambda p, batch: (p["y"] - p["x"]) ** 2 + p["z"] ** 2,
      ...         solver=descent,
      ...         hypergradient=method,
      ...     ),
      ...     bx.Level("x", lambda p, batch: (p["y"] - 1.0) ** 2, solver=optax.sgd(0.1)),
      ... ]
      >>> fn = bx.value_and_multilevel_grad(levels)
      >>> round(float(fn({"z": 0.0, "y": 0.0, "x": 4.0}).grad), 3)  # y = x / 2, since z follows y
      1.0

    Source: the levels' best responses compose by the implicit function theorem; Choe et al.,
    "Betty: an automatic differentiation library for multilevel optimization" (ICLR 2023), on graphs
    of levels.
    """
    return MultilevelGradFn(levels, strictness(strict))
