"""Objectives of models: losses that are given modules, as functions of parameters."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

from bilevax import base, check
from bilevax._core import numbers
from bilevax.base import Bound, Objective, PyTree
from bilevax.nn.from_nnx import from_nnx, modules
from bilevax.nn.net import Net
from bilevax.run.metrics import Metrics
from bilevax.run.metrics import metrics as as_metrics


def objective(
    loss: Callable[..., Any],
    *,
    inner: Any = None,
    outer: Any = None,
    model: Any = None,
    levels: Mapping[str, Any] | None = None,
    train: bool = True,
) -> Objective:
    """An objective of parameters from a loss of models.

    ``g(y, x, batch) = loss(inner with parameters y, outer with parameters x, batch)``

    Args:
      loss: what a training script has. ``loss(inner, outer, batch) -> scalar``, where a level given
        here comes as a model to call, and any other as its parameters; with `model`, ``loss(model,
        batch)``; with `levels`, ``loss(models, batch)`` with a dict by level name.
        `bilevax.objective` of one says that it has aux (``has_aux=True``) or draws (``keyed=True``:
        it gets ``key=``).
      inner: the inner level's model: a `Net`, or an nnx module, all of whose parameters are learned
        then.
      outer: the outer level's model, likewise.
      model: one model, a `Net` whose parameters are divided between the levels: a pair for
        `solve_bilevel`, a dict by level name for `solve_multilevel`.
      levels: models by level name, for a `bilevax.Level`; names that are not given come as
        parameters.
      train: training mode (batch statistics, dropout), in which the models' states move; False for
        evaluation mode, in which they stand still.

    Returns:
      An `Objective`. Its model state is a dict of the states of those models that have one, by
      ``"inner"``, ``"outer"``, ``"model"`` or level name.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import nnx
      >>> import bilevax as bx
      >>> from bilevax import nn
      >>> net = nn.from_nnx(nnx.Linear(2, 1, rngs=nnx.Rngs(0)))
      >>> ridge = nn.objective(
      ...     lambda model, decay, x: (
      ...         jnp.mean(model(x) ** 2) + decay * jnp.sum(model.kernel[...] ** 2)
      ...     ),
      ...     inner=net,
      ... )
      >>> ridge
      objective(<lambda>)
      >>> value, _ = ridge(net.params, jnp.float32(0.1), bx.base.Ctx(jnp.ones((4, 2))))
      >>> value.shape
      ()
    """
    check.callable_objective(loss, "loss")
    wrapped = base.objective(loss)
    if wrapped.stateful:
        raise TypeError(
            f"loss: got {wrapped!r}; expected one that is not stateful: the models' states are "
            "kept for it."
        )
    if wrapped.trajectory:
        raise TypeError(
            f"loss: got {wrapped!r}; expected one of a single model: the parameters after every "
            "step are no model. Try bx.objective(lambda path, outer, batch: jnp.mean(jax.vmap("
            "lambda params: loss(net.merge(params, net.state), outer, batch))(path)), "
            "trajectory=True)."
        )
    train = numbers.flag(train, "train")
    given = {"inner": inner, "outer": outer, "model": model}
    if levels is not None:
        if any(value is not None for value in given.values()) or not isinstance(levels, Mapping):
            raise TypeError(
                f"levels: got {check.describe(levels)}; expected a dict of models by level name, "
                "without inner, outer or model."
            )
        given = dict(levels)
    elif (model is None) == (inner is None and outer is None):
        names = [name for name, value in given.items() if value is not None]
        raise TypeError(
            f"inner, outer, model: got {' and '.join(names) or 'none of them'}; expected inner or "
            "outer or both, or model alone."
        )
    nets = {role: as_net(value, role) for role, value in given.items() if value is not None}
    for role, net in nets.items():
        _check_form(role, net.form, net)
    form = "levels" if levels is not None else "pair" if model is None else "divided"
    binds = {role: Part(net.bind, net.keyed) for role, net in nets.items()}
    stateful, keyed = (
        any(net.has_state for net in nets.values()),
        wrapped.keyed or any(net.keyed for net in nets.values()),
    )
    settings = dict(
        fn=wrapped.fn,
        binds=binds,
        form=form,
        train=train,
        stateful=stateful,
        has_aux=wrapped.has_aux,
        keyed=wrapped.keyed,
    )
    return Objective(
        Bound(wrapped.name, _evaluate, **settings),
        wrapped.has_aux,
        stateful,
        keyed,
        wrapped.indexed,
    )


class Part(NamedTuple):
    """What an objective needs of a `Net`."""

    bind: Any
    keyed: bool


def as_net(value: Any, argument: str) -> Net:
    """`value` as a `Net`; an nnx module with all of its parameters learned."""
    if isinstance(value, Net):
        return value
    if modules(value):
        return from_nnx(value)
    hint = (
        " Try nn.from_linen(module, variables)."
        if hasattr(value, "apply")
        else " Parameters without a model are not given here."
    )
    raise TypeError(
        f"{argument}: got {check.describe(value)}; expected a Net or an nnx.Module.{hint}"
    )


def _check_form(role: str, form: Any, net: Net) -> None:
    if role == "model" and form is None:
        raise ValueError(
            f"model: got {net!r}, whose parameters are not divided; expected wrt=(inner filter, "
            "outer filter). Or give it as inner=."
        )
    if role == "model" and isinstance(form, int) and form != 2:
        raise ValueError(
            f"model: got {net!r}, divided between {form} levels; expected 2 here. For more, divide "
            "by a dict with level names."
        )
    if role != "model" and form is not None:
        raise ValueError(
            f"{role}: got {net!r}, whose parameters are divided between levels; expected it as "
            "model=."
        )


def _evaluate(
    *args: Any,
    key: Any = None,
    fn: Callable[..., Any],
    binds: dict[str, Part],
    form: str,
    train: bool,
    stateful: bool,
    has_aux: bool,
    keyed: bool,
    **number: Any,
) -> Any:
    *params, batch, state = args if stateful else (*args, {})
    if form == "pair":
        given = {"inner": params[0], "outer": params[1]}
    elif form == "levels":
        given = dict(params[0])
    else:  # a pair, or a dict by level name
        given = {"model": tuple(params) if len(params) == 2 else params[0]}
    collects = {}
    for place, role in enumerate(sorted(binds)):
        part = binds[role]
        own = jax.random.fold_in(key, place) if part.keyed else None
        given[role], collects[role] = part.bind(given[role], state.get(role), own, train)
    models = (given,) if form == "levels" else tuple(given.values())
    out = fn(
        *models, batch, **({"key": jax.random.fold_in(key, len(binds))} if keyed else {}), **number
    )
    if not stateful:
        return out
    moved = {
        role: collects[role]() if train and role in collects else old for role, old in state.items()
    }
    return (out[0], (moved, out[1])) if has_aux else (out, moved)


# ---- both levels at once


class Bilevel(NamedTuple):
    """Both objectives of a problem and where it starts; see `bilevel`.

    Attributes:
      inner_objective: what `solve_bilevel` and `value_and_hypergrad` take.
      outer_objective: likewise.
      inner_params: where the inner level starts.
      outer_params: where the outer level starts.
      model_state: the models' states, a dict, or None.
      nets: the models by ``"inner"``, ``"outer"`` or ``"model"``.
    """

    inner_objective: Objective
    outer_objective: Objective
    inner_params: PyTree
    outer_params: PyTree
    model_state: dict[str, PyTree] | None
    nets: dict[str, Net]

    def __repr__(self) -> str:
        nets = ", ".join(f"{role}={net}" for role, net in self.nets.items())
        return f"Bilevel({self.inner_objective.name}, {self.outer_objective.name}, {nets})"

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of `solve_bilevel`: ``bx.solve_bilevel(**problem.arguments,
        inner_data=..., ...)``.
        """
        names = (
            "inner_objective",
            "outer_objective",
            "inner_params",
            "outer_params",
            "model_state",
        )
        return {name: getattr(self, name) for name in names}

    def merge(self, solution: Any) -> Any:
        """The trained models: a pair, inner and outer, or the one model whose parameters are
        divided.

        From anything with ``inner_params``, ``outer_params`` and ``model_state``: a `Solution`. An
        nnx module comes as a new module, a linen one as its variables, a level without a model as
        its parameters.
        """
        state = solution.model_state or {}
        if "model" in self.nets:
            return self.nets["model"].merge(
                (solution.inner_params, solution.outer_params), state.get("model")
            )
        params = {"inner": solution.inner_params, "outer": solution.outer_params}
        return tuple(
            self.nets[role].merge(value, state.get(role)) if role in self.nets else value
            for role, value in params.items()
        )

    def metrics(self, fn: Callable[..., Any], data: PyTree = None, **settings: Any) -> Metrics:
        """`bilevax.metrics` of a function of models in evaluation mode: ``fn(inner, outer, data)``,
        or ``fn(model, data)``, to a dict of scalars.
        """
        binds = {role: Part(net.bind, net.keyed) for role, net in self.nets.items()}
        form = "divided" if "model" in self.nets else "pair"
        levels = "model" if form == "divided" else "inner, outer"
        numbers.takes(fn, "fn", f"({levels}, data) -> dict of scalars")
        stateful = self.model_state is not None
        return as_metrics(
            Bound(base.objective(fn).name, _measure, fn=fn, binds=binds, form=form),
            data,
            stateful=stateful,
            **settings,
        )


def _measure(
    inner: PyTree,
    outer: PyTree,
    data: Any,
    state: Any = None,
    *,
    fn: Callable[..., Any],
    binds: Any,
    form: Any,
) -> Any:
    key = (
        jax.random.key(0) if any(part.keyed for part in binds.values()) else None
    )  # a model that draws is measured with one draw throughout
    args = (inner, outer, data) if state is None else (inner, outer, data, state)
    settings = dict(fn=fn, binds=binds, form=form, train=False, has_aux=False, keyed=False)
    out = _evaluate(*args, key=key, stateful=state is not None, **settings)
    return out if state is None else out[0]


def bilevel(
    inner_loss: Callable[..., Any],
    outer_loss: Callable[..., Any],
    inner: Any = None,
    outer: Any = None,
    *,
    model: Any = None,
    train: tuple[bool, bool] = (True, False),
) -> Bilevel:
    """Both levels from two losses of models: what a training script has, as what `solve_bilevel`
    takes.

    Args:
      inner_loss: ``loss(inner, outer, batch) -> scalar`` of models to call, or ``loss(model,
        batch)`` with `model`; see `objective`.
      outer_loss: likewise.
      inner: the inner level: an nnx module, a `Net`, or a pytree of parameters without a model.
      outer: the outer level, likewise.
      model: in place of both, one model, a `Net` whose parameters are divided between the two
        levels.
      train: whether the inner and the outer loss are taken in training mode. The states move on
        real inner steps only.

    Returns:
      A `Bilevel`, with ``problem.arguments`` for `solve_bilevel`, ``problem.merge(solution)`` for
      the trained models.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> from flax import nnx
      >>> def train_loss(model, log_decay, batch):
      ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2) + jnp.exp(log_decay) * jnp.sum(
      ...         model.kernel[...] ** 2
      ...     )
      >>> def valid_loss(model, log_decay, batch):
      ...     return jnp.mean((model(batch[0]) - batch[1]) ** 2)
      >>> problem = bx.nn.bilevel(
      ...     train_loss,
      ...     valid_loss,
      ...     nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0)),
      ...     jnp.zeros(()),
      ... )
      >>> algorithm = bx.algorithms.double_loop(
      ...     bx.inner.optax(optax.sgd(0.1), 10), bx.hypergradient.implicit(), optax.adam(0.1)
      ... )
      >>> x, y = jnp.eye(2), jnp.ones((2, 1))
      >>> solution = bx.solve_bilevel(
      ...     **problem.arguments,
      ...     inner_data=(x, y),
      ...     outer_data=(x, 2 * y),
      ...     algorithm=algorithm,
      ...     num_steps=5,
      ... )
      >>> model, log_decay = problem.merge(solution)
      >>> type(model).__name__, bool(log_decay < 0)
      ('Linear', True)
    """
    if not (isinstance(train, tuple) and len(train) == 2):
        raise TypeError(
            f"train: got {check.describe(train)}; expected a pair of booleans, for the inner and "
            "the outer loss."
        )
    check.callable_objective(inner_loss, "inner_loss")
    check.callable_objective(outer_loss, "outer_loss")
    if model is not None:
        if inner is not None or outer is not None:
            raise TypeError("model: got it beside inner or outer; expected one of the two ways.")
        nets = {"model": as_net(model, "model")}
        objectives = [
            objective(loss, model=nets["model"], train=mode)
            for loss, mode in zip((inner_loss, outer_loss), train, strict=True)
        ]
        inner_params, outer_params = nets["model"].params
    else:
        if inner is None or outer is None:
            raise TypeError(
                f"{'inner' if inner is None else 'outer'}: got None; expected a model, a Net, or a "
                "pytree of parameters."
            )
        levels = {"inner": inner, "outer": outer}
        nets = {
            role: as_net(value, role)
            for role, value in levels.items()
            if isinstance(value, Net) or modules(value) or hasattr(value, "apply")
        }
        inner_params, outer_params = (
            nets[role].params if role in nets else value for role, value in levels.items()
        )
        if not nets:
            raise TypeError(
                "inner, outer: got no model at either level; expected an nnx module or a Net at "
                "one of them. Without, call solve_bilevel itself."
            )
        sides = {"inner": nets.get("inner"), "outer": nets.get("outer")}
        # mypy takes a mapping's values for every keyword of objective
        objectives = [
            objective(loss, **sides, train=mode)  # type: ignore[arg-type]
            for loss, mode in zip((inner_loss, outer_loss), train, strict=True)
        ]
    state = {role: net.state for role, net in nets.items() if net.has_state} or None
    return Bilevel(objectives[0], objectives[1], inner_params, outer_params, state, nets)


__all__ = ["Bilevel", "bilevel", "objective"]
