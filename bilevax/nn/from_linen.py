"""Models of Flax's linen."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
from flax import linen
from flax.core import unfreeze
from flax.traverse_util import flatten_dict, unflatten_dict

from bilevax import check
from bilevax.base import Bound, PyTree
from bilevax.nn.net import Form, Net, check_groups, divided, pack, unpack


def from_linen(
    module: linen.Module | Callable[..., Any],
    variables: Mapping[str, PyTree],
    wrt: Any = True,
    *,
    train: Mapping[str, Any] | None = None,
    evaluate: Mapping[str, Any] | None = None,
    rngs: tuple[str, ...] = (),
) -> Net:
    """Take a linen model apart into what is learned, what moves with it, and what stands still.

    In a loss the model is a function: ``model(x)`` is ``module.apply`` with the variables, the
    mode's arguments and fresh ``rngs``; the collections that it changes are kept.

    Args:
      module: a ``linen.Module``, or its ``apply`` (a ``TrainState.apply_fn``).
      variables: what ``module.init`` returned, with ``"params"``.
      wrt: what is learned: True for all parameters, a predicate ``(path, value) -> bool`` such as
        `paths`, or a tuple or a dict of them, a filter a level, which divides the parameters
        between levels; each takes what those before it left. What no filter takes is frozen.
      train: arguments of each call in training mode, such as ``{"train": True}`` or
        ``{"deterministic": False}``.
      evaluate: arguments of each call in evaluation mode.
      rngs: names of the module's random streams, such as ``("dropout",)``. Each evaluation gets new
        keys from the key of the run.

    Returns:
      A `Net`. ``params`` are nested dicts like ``variables["params"]``, the other collections are
      the ``state``.

    Raises:
      TypeError: for arguments of another kind.
      ValueError: if there are no parameters, or a filter takes nothing.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from flax import linen
      >>> from bilevax import nn
      >>> module = linen.Sequential([linen.Dense(4), linen.Dense(2)])
      >>> net = nn.from_linen(module, module.init(jax.random.key(0), jnp.ones((1, 3))))
      >>> net
      Net(26 learned numbers)
      >>> model, _ = net.bind(net.params, net.state, None, True)
      >>> model(jnp.ones((5, 3))).shape
      (5, 2)
    """
    module = getattr(
        module, "__self__", module
    )  # the module behind its bound apply, which compares by value
    if not callable(module):
        raise TypeError(
            f"module: got {check.describe(module)}; expected a linen.Module, or its apply."
        )
    if not isinstance(variables, Mapping) or "params" not in variables:
        got = sorted(variables) if isinstance(variables, Mapping) else check.describe(variables)
        raise ValueError(
            f"variables: got {got}; expected what module.init returned, with 'params'. Wrap "
            f"parameters alone: {{'params': params}}."
        )
    if isinstance(rngs, str) or not all(isinstance(name, str) for name in rngs):
        raise TypeError(f"rngs: got {rngs!r}; expected a tuple of names. Try rngs=('dropout',).")
    for name, value in (("train", train), ("evaluate", evaluate)):
        if value is not None and not isinstance(value, Mapping):
            raise TypeError(
                f"{name}: got {check.describe(value)}; expected the arguments of a call in that "
                f"mode. Try {name}={{'train': {name == 'train'}}}."
            )
    filters, form = divided(wrt)
    params, state = (
        unfreeze(variables["params"]),
        {name: unfreeze(value) for name, value in variables.items() if name != "params"},
    )
    groups, frozen = _divide(params, filters)
    check_groups(groups, filters, list(flatten_dict(params, sep="/")))
    modes = (tuple((evaluate or {}).items()), tuple((train or {}).items()))
    bind = Bound(
        "linen", _bind, module=module, frozen=frozen, form=form, modes=modes, rngs=tuple(rngs)
    )
    return Net(
        pack(groups, form),
        state,
        bind,
        Bound("merge", _merge, frozen=frozen, form=form, initial=state),
        bool(rngs),
        form,
    )


def _divide(params: PyTree, filters: tuple[Any, ...]) -> tuple[tuple[Any, ...], PyTree]:
    """The parameters of each filter, and the rest."""
    groups: list[dict[Any, Any]] = [{} for _ in (*filters, None)]
    for path, value in flatten_dict(params).items():
        taken = (number for number, chosen in enumerate(filters) if _takes(chosen, path, value))
        groups[next(taken, len(filters))][path] = value
    *chosen, frozen = (unflatten_dict(group) for group in groups)
    return tuple(chosen), frozen


def _takes(chosen: Any, path: Any, value: Any) -> bool:
    if chosen is True or chosen is ...:
        return True
    if not callable(chosen) or isinstance(chosen, type):
        raise TypeError(
            f"wrt: got {chosen!r}; expected True, or a predicate (path, value) -> bool. Try "
            "nn.paths('head')."
        )
    return bool(chosen(path, value))


def _joined(*parts: PyTree) -> PyTree:
    return unflatten_dict(
        {path: value for part in parts for path, value in flatten_dict(part).items()}
    )


class _Model:
    """A linen module with its variables, for the length of one evaluation of a loss."""

    def __init__(
        self,
        apply: Callable[..., Any],
        params: PyTree,
        state: PyTree,
        mode: dict[Any, Any],
        rngs: tuple[str, ...],
        key: Any,
        train: bool,
    ):
        self.apply, self.params, self.state, self.mode, self.rngs, self.key, self.train = (
            apply,
            params,
            state,
            mode,
            rngs,
            key,
            train,
        )
        self.calls = 0

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        drawn = {}
        if self.key is not None:
            key = jax.random.fold_in(self.key, self.calls)
            drawn = {
                "rngs": {
                    name: jax.random.fold_in(key, number) for number, name in enumerate(self.rngs)
                }
            }
        self.calls += 1
        variables, kwargs = {"params": self.params, **self.state}, {**self.mode, **kwargs}
        moving = dict(mutable=list(self.state)) if self.train and self.state else {}
        try:
            out = self.apply(variables, *args, **moving, **drawn, **kwargs)
        except Exception as error:
            error.add_note(
                f"from_linen: raised this in {'training' if self.train else 'evaluation'} mode, "
                f"called with the arguments {self.mode}, the collections {sorted(variables)} and "
                f"the random streams {self.rngs}; what is missing is given to from_linen, as "
                "train={'train': True}, evaluate={'train': False}, rngs=('dropout',) or with the "
                "variables."
            )
            raise
        if not moving:
            return out
        out, moved = out
        self.state = {**self.state, **unfreeze(moved)}
        return out


def _bind(
    params: PyTree,
    state: PyTree,
    key: Any,
    train: bool,
    *,
    module: Any,
    frozen: Any,
    form: Form,
    modes: tuple[Any, ...],
    rngs: tuple[str, ...],
) -> Any:
    apply = module.apply if isinstance(module, linen.Module) else module
    whole = _joined(*unpack(params, form), frozen)
    model = _Model(apply, whole, state or {}, dict(modes[train]), rngs, key, train)
    return model, lambda: model.state


def _merge(params: PyTree, state: PyTree = None, *, frozen: Any, form: Form, initial: Any) -> Any:
    return {
        "params": _joined(*unpack(params, form), frozen),
        **(initial if state is None else state),
    }


__all__ = ["from_linen"]
