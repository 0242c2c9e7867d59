"""Objectives over a named axis, for steps that run inside ``jax.shard_map`` or ``jax.pmap``: right
derivatives of any order.

Two linear maps, each the transpose of the other, stand at the border between what all devices share
and what each has of its own:

    enter: shared -> own, the identity;        its transpose sums over the devices
    leave: own -> shared, the sum over devices; its transpose is the identity

A ``lax.psum`` alone has the right transpose only where JAX tracks which values differ by device
(``check_vma=True``), where a ``lax.pcast`` is `enter`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import check, tree
from bilevax.base import Bound, Objective, PyTree, objective


def _identity(value: Any) -> Any:
    return value


def _linear(forward: Callable[..., Any], backward: Callable[..., Any], value: Any) -> Any:
    """A linear map with this transpose. A linear solve with the identity is the one such primitive
    that batches, too.
    """
    return lax.custom_linear_solve(
        _identity, value, lambda _, b: forward(b), lambda _, b: backward(b)
    )


def tracked(axis: str) -> bool:
    """Whether JAX tracks here which values differ along `axis` (``check_vma=True``)."""
    try:
        index = lax.axis_index(axis)
    except NameError as error:
        raise ValueError(
            f"axis_name: got {axis!r}, which no map around this has; expected the axis of a "
            "jax.shard_map or pmap."
        ) from error
    return axis in _varying(index)


def _varying(value: Any) -> Any:
    manual = getattr(jax.typeof(value), "manual_axis_type", None)
    return getattr(manual, "varying", frozenset())


def enter(value: PyTree, axis: str) -> PyTree:
    """A shared value as each device's own."""
    if tracked(axis):
        return jax.tree.map(lambda a: lax.pcast(a, axis, to="varying"), value)
    return jax.tree.map(
        lambda a: _linear(_identity, lambda b: lax.psum(b, axis), a) if tree.is_float(a) else a,
        value,
    )


def leave(value: PyTree, axis: str) -> PyTree:
    """The sum over devices of each one's own value, shared."""
    if tracked(axis):
        return lax.psum(value, axis)
    return jax.tree.map(lambda a: _linear(lambda b: lax.psum(b, axis), _identity, a), value)


def axis_mean(fn: Callable[..., Any], axis_name: str) -> Objective:
    r"""An objective whose value is the mean over a named axis, for use inside ``jax.shard_map`` or
    ``jax.pmap``.

    .. math::
        F(y, x) = \frac{1}{D} \sum_{d=1}^{D} f(y, x, \mathrm{batch}_d)

    Every device holds the same parameters and a batch of its own. Whatever is derived from the
    objective (gradients at both levels, Hessian-vector products, cross products, unrolled steps) is
    then that of the mean, the same on all devices; with ``check_vma`` on and off, and in ``pmap``.
    Each of them costs one all-reduce of its own size.

    Args:
      fn: ``(inner_params, outer_params, batch) -> scalar``, or `objective` of one. Aux and model
        state are averaged over the axis (their floating-point
        leaves; all of them must be of the same shape on every device); a key is folded with the
        device's place.
      axis_name: the axis of the surrounding ``shard_map`` or ``pmap``.

    Returns:
      An `Objective`.

    Raises:
      TypeError: for arguments of another kind.
      ValueError: in the run, for parameters that differ by device.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> inner = bx.sharding.axis_mean(lambda y, x, batch: jnp.mean((y - x * batch) ** 2), "data")
      >>> outer = bx.sharding.axis_mean(lambda y, x, batch: jnp.mean((y - batch) ** 2), "data")
      >>> fn = bx.value_and_hypergrad(
      ...     inner,
      ...     outer,
      ...     solver=bx.inner.optax(optax.sgd(0.5), 1),
      ...     hypergradient=bx.hypergradient.implicit(),
      ... )
      >>> mesh = jax.make_mesh((1,), ("data",), axis_types=(AxisType.Auto,))
      >>> step = lambda y, x, batch: fn(y, x, batch, batch).grad
      >>> jax.jit(jax.shard_map(step, mesh=mesh, in_specs=(P(), P(), P("data")), out_specs=P()))(
      ...     0.0, 2.0, jnp.ones(4)
      ... ).tolist()
      2.0
    """
    if not isinstance(axis_name, str) or not axis_name:
        raise TypeError(
            f"axis_name: got {check.describe(axis_name)}; expected the name of an axis. Try 'data'."
        )
    one = objective(fn)
    return dataclasses.replace(
        one, fn=Bound(one.name, _mean, fn=one.fn, axis=axis_name, extra=one.has_aux or one.stateful)
    )


def _mean(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    *model: Any,
    fn: Callable[..., Any],
    axis: Any,
    extra: Any,
    **keyed: Any,
) -> Any:
    if tracked(axis):
        for path, leaf in jax.tree_util.tree_leaves_with_path((inner, outer)):
            if axis in _varying(leaf):
                name = "inner_params" if path[0].idx == 0 else "outer_params"
                raise ValueError(
                    f"{name}{jax.tree_util.keystr(path[1:])}: got values that differ along "
                    f"{axis!r}; expected the same on every device, with "
                    "in_specs=P() or after lax.pmean. What differs by device is the batch."
                )
    if "key" in keyed:
        keyed = {"key": jax.random.fold_in(keyed["key"], lax.axis_index(axis))}
    out = fn(*enter((inner, outer), axis), batch, *enter(model, axis), **keyed)
    return _averaged(out, axis) if extra else _averaged((out, None), axis)[0]


def _averaged(out: tuple[Any, ...], axis: str) -> tuple[Any, ...]:
    devices = lax.axis_size(axis)

    def mean(a):
        if not tree.is_float(a):
            return lax.pmax(a, axis) if jnp.issubdtype(jnp.result_type(a), jnp.integer) else a
        return leave(a / devices, axis)

    value, rest = out
    return mean(value), jax.tree.map(mean, rest)


__all__ = ["axis_mean", "enter", "leave"]
