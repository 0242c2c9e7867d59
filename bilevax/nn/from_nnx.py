"""Models of Flax's nnx."""

from __future__ import annotations

from typing import Any

import jax
from flax import nnx
from flax.nnx import filterlib

from bilevax import check
from bilevax._core import numbers
from bilevax._core.types import Key
from bilevax.base import Bound, PyTree
from bilevax.nn.net import Form, Net, check_groups, divided, pack, unpack


def from_nnx(model: Any, wrt: Any = nnx.Param) -> Net:
    """Take an nnx model apart into what is learned, what moves with it, and what stands still.

    Its graph definition is static, so that a second model of the same architecture compiles
    nothing. `model` itself is left as it is: write results into it with ``nnx.update(model,
    solution.inner_params)``, or make another one with ``net.merge``.

    Args:
      model: an ``nnx.Module``, or a dict, list or tuple of them. Calling one in a loss moves its
        own copy.
      wrt: what is learned. An nnx filter: a variable type (``nnx.LoRAParam``), or anything else
        that chooses among the ``nnx.Param``, such as `paths`, ``nnx.Not(...)``, or a function
        ``(path, value) -> bool``. A tuple or a dict of filters, a filter a level, divides the
        parameters of one model between levels; each takes what those before it left. Parameters
        that no filter takes are frozen.

    Returns:
      A `Net`. ``params`` holds ``nnx.State``, what ``nnx.state(model, filter)`` gives. Variables of
      other types (BatchNorm's statistics, caches) are the ``state``. A module that is in evaluation
      mode when it comes (``use_running_average=True``, ``deterministic=True``) stays in it; the
      others are switched by each objective's ``train``. Random streams are neither: each evaluation
      gets new keys from the key of the run.

    Raises:
      TypeError: if `model` is not of nnx.
      ValueError: if a filter takes nothing.

    Examples:
      >>> from flax import nnx
      >>> from bilevax import nn
      >>> model = nnx.Sequential(
      ...     nnx.Linear(3, 4, rngs=nnx.Rngs(0)),
      ...     nnx.BatchNorm(4, rngs=nnx.Rngs(0)),
      ...     nnx.Linear(4, 2, rngs=nnx.Rngs(0)),
      ... )
      >>> nn.from_nnx(model)
      Net(34 learned numbers, with state)
      >>> head_only = nn.from_nnx(model, wrt=nn.paths("layers/2"))
      >>> inner, outer = nn.from_nnx(model, wrt=(nn.paths("layers/2"), nn.paths("layers/0"))).params
    """
    if not modules(model):
        raise TypeError(
            f"model: got {check.describe(model)}; expected an nnx.Module, or a dict, list or tuple "
            "of them. For linen, try nn.from_linen."
        )
    filters, form = divided(wrt)
    for chosen in filters:
        try:
            filterlib.to_predicate(chosen)
        except Exception as error:
            raise TypeError(
                f"wrt: got {check.describe(chosen)}; expected an nnx filter. Try nnx.Param, or "
                "nn.paths('head')."
            ) from error
        if not isinstance(chosen, type) and callable(chosen):
            numbers.takes(chosen, "wrt", "(path, value) -> bool")
    model = nnx.clone(model)
    nnx.pop(model, nnx.Intermediate)
    graphdef, draws, *parts = nnx.split(
        model, nnx.RngState, *map(_among_params, filters), nnx.Param, ...
    )
    *groups, frozen, state = parts
    names = ["/".join(map(str, path)) for path, _ in nnx.to_flat_state(nnx.state(model, nnx.Param))]
    check_groups(tuple(groups), filters, names)
    settings = dict(graphdef=graphdef, draws=draws, frozen=frozen, form=form)
    bind = Bound(
        "nnx",
        _bind,
        **settings,
        moving=_Among(frozenset(path for path, _ in nnx.to_flat_state(state))),
    )
    return Net(
        pack(tuple(groups), form),
        state,
        bind,
        Bound("merge", _merge, **settings, initial=state),
        bool(jax.tree.leaves(draws)),
        form,
    )


def modules(model: Any) -> list[nnx.Module]:
    """The modules at the root of `model`."""
    leaves = jax.tree.leaves(model, is_leaf=lambda leaf: isinstance(leaf, nnx.Module))
    return [leaf for leaf in leaves if isinstance(leaf, nnx.Module)]


def _among_params(chosen: Any) -> Any:
    """A type says itself which variables it means; any other filter means parameters, so that no
    path takes BatchNorm's statistics along.
    """
    return (
        chosen
        if isinstance(chosen, type)
        else nnx.All(nnx.Param, list(chosen) if isinstance(chosen, list) else chosen)
    )


class _Among:
    """The filter that takes the variables at these paths."""

    def __init__(self, places: frozenset[Any]):
        self.places = places

    def __call__(self, path: Any, value: Any) -> Any:
        return tuple(path) in self.places

    def __hash__(self) -> int:
        return hash(self.places)

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, _Among) and self.places == other.places


def _bind(
    params: PyTree,
    state: PyTree,
    key: Any,
    train: bool,
    *,
    graphdef: Any,
    draws: Any,
    frozen: Any,
    form: Form,
    moving: _Among,
) -> Any:
    state = nnx.State({}) if state is None else state
    draws = draws if key is None else _reseeded(draws, key)
    model = nnx.merge(
        graphdef, draws, *unpack(params, form), frozen, state, copy=True
    )  # a copy: calling it must not touch what was passed in
    _switch(model, train)
    return model, lambda: nnx.state(model, moving)


_MODES = ("deterministic", "use_running_average")


def _switch(model: Any, train: bool) -> None:
    """Training or evaluation mode of every module that its maker left in training mode: what was
    frozen stays frozen.
    """
    for root in modules(model):
        inside = [module for _, module in nnx.iter_modules(root)]
        frozen = [
            (module, mode)
            for module in inside
            for mode in _MODES
            if getattr(module, mode, None) is True
        ]
        root.train() if train else root.eval()
        for module, mode in frozen:
            setattr(module, mode, True)
        for module in inside:
            if train and type(module) is nnx.BatchNorm:
                module.__class__ = _BatchNorm


class _BatchNorm(nnx.BatchNorm):
    """BatchNorm whose running statistics have a derivative: flax stops it, and here it is part of
    the map.
    """

    def __call__(self, x: Any, use_running_average: Any = None, *, mask: Any = None) -> Any:
        given = self.use_running_average if use_running_average is None else use_running_average
        before = self.mean[...], self.var[...]
        out = super().__call__(x, use_running_average, mask=mask)
        if not given:
            axis = {self.axis} if isinstance(self.axis, int) else set(self.axis)
            axes = tuple(i for i in range(x.ndim) if i not in {a % x.ndim for a in axis})
            wide = x.astype(jax.numpy.promote_types(x.dtype, jax.numpy.float32))
            mean, square = (self._over(a, axes, mask) for a in (wide, wide * wide))
            for variable, old, new in zip(
                (self.mean, self.var), before, (mean, square - mean * mean), strict=True
            ):
                moved = self.momentum * old + (1 - self.momentum) * new.astype(old.dtype)
                variable[...] = variable[...] + (
                    moved - jax.lax.stop_gradient(moved)
                )  # flax's value, and our derivative
        return out

    def _over(self, a: Any, axes: Any, mask: Any) -> Any:
        mean = jax.numpy.mean(a, axes, where=mask)
        return (
            mean
            if self.axis_name is None
            else jax.lax.pmean(mean, self.axis_name, axis_index_groups=self.axis_index_groups)
        )


def _merge(
    params: PyTree,
    state: PyTree = None,
    *,
    graphdef: Any,
    draws: Any,
    frozen: Any,
    form: Form,
    initial: Any,
) -> Any:
    return nnx.merge(
        graphdef,
        draws,
        *unpack(params, form),
        frozen,
        initial if state is None else state,
        copy=True,
    )


def _reseeded(draws: nnx.State[Any, Any], key: Key) -> nnx.State[Any, Any]:
    """Every random stream from its beginning, with a key of its own."""
    if not jax.numpy.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    fresh = []
    for number, (path, variable) in enumerate(nnx.to_flat_state(draws)):
        old = variable.get_value()
        if isinstance(variable, nnx.RngKey):
            own = jax.random.fold_in(key, number)
            value = own if old.shape == () else jax.random.split(own, old.shape)
        else:
            value = jax.numpy.zeros_like(old)
        fresh.append((path, variable.replace(value)))
    return nnx.from_flat_state(fresh)


__all__ = ["from_nnx"]
