"""Where the parts of a run lie: a mesh, a rule for the state, the rows of the batches, and the layout that a compiled step is held to."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevax import check, tree
from bilevax.base import Bound, Feed, InnerState, Objective, Problem, PyTree
from bilevax.data import Source, Stream
from bilevax.sharding import over_tasks
from bilevax.streams import peek


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and how a run is laid over it; made by `data_parallel`, `fsdp`, `tasks` or `by_path`.

    Attributes:
      mesh: the devices.
      rows: the mesh axis (or axes) that the rows of batches are split over, None for none.
      kind: "replicated", "largest" (each leaf over its largest divisible axis), "rules" or "tasks": where the state lies.
      axis: the mesh axis of "largest" and "tasks".
      rules: pairs of a pattern of paths and a partition spec, for "rules".
      min_size: entries below which "largest" leaves a leaf whole.
      mean: the objectives are means over rows, and each device may take its own rows' mean.
      dry: report instead of running.
    """

    mesh: Mesh
    rows: Any = None
    kind: str = "replicated"
    axis: str | None = None
    rules: tuple = ()
    min_size: int = 0
    mean: bool = False
    dry: bool = False

    @property
    def row_devices(self) -> int:
        """Over how many devices the rows of a batch are split."""
        names = () if self.rows is None else (self.rows,) if isinstance(self.rows, str) else tuple(self.rows)
        return int(np.prod([self.mesh.shape[name] for name in names], dtype=np.int64))

    def named(self, *spec) -> NamedSharding:
        """A sharding on this mesh."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))


# ---- the four ways


def _line(devices: Any, axis: str) -> Mesh:
    if not isinstance(axis, str) or not axis:
        raise TypeError(f"axis: got {axis!r}; expected the name of a mesh axis. Try 'data'.")
    found = jax.devices() if devices is None else devices
    if isinstance(found, Mesh):
        if axis not in found.shape:
            raise ValueError(f"axis: got {axis!r}; expected one of the mesh's axes, {tuple(found.shape)}.")
        return _auto(found)
    if isinstance(found, (str, bytes)) or not isinstance(found, (Sequence, np.ndarray)) or not len(found):
        raise TypeError(f"devices: got {check.describe(found)}; expected a sequence of devices, a mesh, or None for all. Try jax.devices().")
    return Mesh(np.asarray(found), (axis,), axis_types=(AxisType.Auto,))


def _auto(mesh: Mesh) -> Mesh:
    """The same devices and names with Auto axes.

    Inside a step arrays change their layout at will (an adjoint, a sketch, a line search's trial point); with Explicit axes each such place would
    have to name the new layout, and several operations refuse. Which axes are Explicit is the type of the user's arrays, not of what is computed: they
    are placed on this mesh on entry, so either kind of mesh gives the same run.
    """
    return mesh if all(kind == AxisType.Auto for kind in mesh.axis_types) else Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)


def data_parallel(devices: Any = None, *, axis: str = "data", mean: bool = False) -> Sharding:
    """Every device holds all of the state and a part of each batch's rows.

    The step means what it means on one device, whatever the objectives are: the compiler splits the work by the rows. With ``mean=True`` each device
    evaluates the objectives on rows of its own and the values are averaged, which communicates the least (one all-reduce of the inner gradient's size for
    each inner step and each Hessian-vector product) but is right for objectives that are means over the rows of their batch (terms that read no batch
    are fine). Whether they are is tried out on the first batch, values and gradients.

    Args:
      devices: a sequence of devices, a `Mesh` that has `axis`, or None for all devices.
      axis: name of the mesh axis.
      mean: see above.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind; in the run, for batches whose rows the devices do not divide, or, with ``mean``,
        for objectives that are no means or have aux, state or keys.

    Example:
      >>> import bilevax as bx
      >>> bx.sharding.data_parallel().rows
      'data'
    """
    if not isinstance(mean, bool):
        raise TypeError(f"mean: got {mean!r}; expected True or False.")
    return Sharding(_line(devices, axis), rows=axis, mean=mean)


def fsdp(devices: Any = None, *, axis: str = "data", min_size: int = 1024) -> Sharding:
    """As `data_parallel`, and every large leaf of the state is split as well: parameters, optimizer states, adjoints, the kept iterate.

    Each leaf of `min_size` entries or more is split along its largest axis that the devices divide. Weights are gathered where a step reads them, so
    the peak is not one part in n: a model whose layers are stacked and run by ``lax.scan`` gathers one layer at a time.

    Args:
      devices: a sequence of devices, a `Mesh` that has `axis`, or None for all devices.
      axis: name of the mesh axis, which splits rows and state.
      min_size: entries below which a leaf stays whole.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Example:
      >>> import bilevax as bx
      >>> bx.sharding.fsdp(min_size=64).kind
      'largest'

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter models" (SC 2020), stage 3.
    """
    return Sharding(_line(devices, axis), rows=axis, kind="largest", axis=axis, min_size=check.count(min_size, "min_size"))


def tasks(devices: Any = None, *, axis: str = "tasks") -> Sharding:
    """A leading axis of tasks split over the devices, for objectives made by `bilevax.tasks`.

    Each device runs the algorithm on tasks of its own, with no communication inside its loops; derivatives with respect to the outer parameters
    are summed at the end of each evaluation. Inner parameters and batches have the task axis in front, and the inner objective is a sum over
    tasks, so that no task's gradient depends on another. A solver's or a linear solver's own stopping rule is then applied device by device.

    Args:
      devices: a sequence of devices, a `Mesh` that has `axis`, or None for all devices; their number divides the number of tasks.
      axis: name of the mesh axis.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind; in the run, for objectives that were not made by `bilevax.tasks`.

    Example:
      >>> import bilevax as bx
      >>> bx.sharding.tasks().axis
      'tasks'
    """
    return Sharding(_line(devices, axis), kind="tasks", axis=axis)


def by_path(mesh: Mesh, rules: Mapping[str, PartitionSpec], *, rows: Any = None) -> Sharding:
    """Any mesh, with partition specs by path.

    A parameter's path is ``inner['layer']['w']`` or ``outer['scale']`` (of several levels: ``inner['name']...``). The first pattern found in it decides;
    what no pattern matches is on every device. Leaves of the state that mirror a parameter (moments, adjoints, the kept iterate) lie as it does.

    Args:
      mesh: a `jax.sharding.Mesh`.
      rules: pattern (a regular expression) -> ``PartitionSpec``, in order.
      rows: the mesh axis, or a tuple of them, that splits the rows of batches; None for none.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind, or specs that name no axis of the mesh.

    Example:
      >>> import jax, bilevax as bx
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
      >>> bx.sharding.by_path(mesh, {r"inner.*'w'": P(None, "model")}, rows="data").rows
      'data'
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(f"mesh: got {check.describe(mesh)}; expected a jax.sharding.Mesh. Try jax.make_mesh((4, 2), ('data', 'model')).")
    if not isinstance(rules, Mapping):
        raise TypeError(f"rules: got {check.describe(rules)}; expected a dict of patterns and partition specs.")
    axes = [rows] if isinstance(rows, str) else list(rows or ())
    for pattern, spec in rules.items():
        if not isinstance(pattern, str) or not isinstance(spec, PartitionSpec):
            raise TypeError(f"rules[{pattern!r}]: got {check.describe(spec)}; expected a pattern and a jax.sharding.PartitionSpec.")
        axes += [name for part in spec if part is not None for name in ((part,) if isinstance(part, str) else part)]
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(f"rules and rows: got the axis {name!r}; expected axes of the mesh, {tuple(mesh.shape)}.")
    compiled = tuple((pattern, spec) for pattern, spec in rules.items())
    return Sharding(_auto(mesh), rows=tuple(rows) if isinstance(rows, list) else rows, kind="rules", rules=compiled)


def check_sharding(value: Any) -> None:
    """A `Sharding` or None."""
    if value is not None and not isinstance(value, Sharding):
        hint = " Call the factory: sharding.data_parallel()." if callable(value) else " Try sharding.data_parallel() or sharding.by_path(mesh, rules)."
        raise TypeError(f"sharding: got {check.describe(value)}; expected one of sharding's factories, or None.{hint}")


# ---- the layout of a state


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each leaf of a run state lies."""

    sharding: Sharding
    specs: tuple[PartitionSpec, ...]

    def _each(self, state: PyTree, fn) -> PyTree:
        leaves, structure = jax.tree.flatten(state)
        return structure.unflatten([fn(leaf, self.sharding.named(*spec)) for leaf, spec in zip(leaves, self.specs, strict=True)])

    def pin(self, state: PyTree) -> PyTree:
        """Hold a traced state to the layout: left alone, the compiler may return a leaf split or whole as it likes."""
        return self._each(state, lax.with_sharding_constraint)

    def put(self, state: PyTree) -> PyTree:
        """Lay out a concrete state."""
        return self._each(state, _put)

    def everywhere(self, value: PyTree) -> PyTree:
        """Traced values on every device."""
        return jax.tree.map(lambda a: lax.with_sharding_constraint(a, self.sharding.named()), value)

    def put_everywhere(self, value: PyTree) -> PyTree:
        """Concrete arrays on every device; plain numbers stay what they are."""
        return jax.tree.map(lambda a: _put(a, self.sharding.named()) if isinstance(a, (jax.Array, np.ndarray)) else a, value)

    def put_window(self, stacked: PyTree) -> PyTree:
        """Stacked batches of a stream: rows split, the axis of draws not."""
        return jax.tree.map(lambda a: _put(a, self.sharding.named(*_rows_spec(self.sharding, a, 1))), stacked)


def _put(leaf, where: NamedSharding):
    """`leaf` placed; an array of several processes is moved by a compiled identity, which is the only thing that may communicate."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return leaf if leaf.sharding.is_equivalent_to(where, leaf.ndim) else jax.jit(lambda a: a, out_shardings=where)(leaf)
    return jax.device_put(leaf, where)


def _largest(sharding: Sharding, shape: tuple[int, ...]) -> PartitionSpec:
    devices = sharding.mesh.shape[sharding.axis]
    divisible = [i for i, length in enumerate(shape) if length % devices == 0 and length]
    if not divisible or int(np.prod(shape, dtype=np.int64)) < sharding.min_size:
        return PartitionSpec()
    chosen = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*[sharding.axis if i == chosen else None for i in range(chosen + 1)])


def _ruled(sharding: Sharding, path: str) -> PartitionSpec:
    for pattern, spec in sharding.rules:
        if re.search(pattern, path):
            return spec
    return PartitionSpec()


def param_specs(sharding: Sharding, params: PyTree, level: str) -> PyTree:
    """The partition spec of each leaf of `params`, which are the "inner" or the "outer" ones."""

    def spec(path, leaf):
        if sharding.kind == "largest":
            return _largest(sharding, leaf.shape)
        if sharding.kind == "tasks" and level == "inner":
            return PartitionSpec(sharding.axis)
        found = _ruled(sharding, level + jax.tree_util.keystr(path))
        if len(found) > len(leaf.shape):
            raise ValueError(f"rules: got {found} for {level}{jax.tree_util.keystr(path)} of shape {list(leaf.shape)}; expected at most that many axes.")
        return found

    return jax.tree_util.tree_map_with_path(spec, params)


def layout(sharding: Sharding, plan: Any, shapes: PyTree, start: InnerState, outer: PyTree) -> Layout:
    """The layout of a run state of these shapes."""
    if sharding.kind == "tasks":
        return Layout(sharding, over_tasks.run_specs(plan, shapes))
    if sharding.kind == "replicated":
        return Layout(sharding, (PartitionSpec(),) * len(jax.tree.leaves(shapes)))
    params = []
    for level, value in (("inner", start.params), ("outer", outer)):
        leaves = jax.tree_util.tree_leaves_with_path(value)
        params += [(level, jax.tree_util.keystr(path), leaf.shape, _ruled(sharding, level + jax.tree_util.keystr(path))) for path, leaf in leaves]

    def spec(path, leaf) -> PartitionSpec:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return PartitionSpec()
        if sharding.kind == "largest":
            return _largest(sharding, leaf.shape)
        text = jax.tree_util.keystr(path)
        near = "outer" if "outer" in text else "inner"  # of equal names and shapes in both levels
        same = [(len(name), level == near, len(leaf.shape) - len(shape), found) for level, name, shape, found in params if text.endswith(name) and leaf.shape[len(leaf.shape) - len(shape) :] == shape]
        if not same:
            return PartitionSpec()
        _, _, extra, found = max(same, key=lambda item: item[:2])  # a memory of several such vectors has axes in front
        return PartitionSpec(*[None] * extra, *found)

    return Layout(sharding, tuple(spec(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)))


# ---- batches


def _rows_spec(sharding: Sharding, leaf, axis: int = 0) -> tuple:
    """Split along `axis` where there is one that the devices divide."""
    devices = sharding.row_devices
    where = sharding.axis if sharding.kind == "tasks" else sharding.rows
    if sharding.kind == "tasks":
        devices = sharding.mesh.shape[sharding.axis]
    if where is None or jnp.ndim(leaf) <= axis or leaf.shape[axis] % devices or not leaf.shape[axis]:
        return ()
    return (*[None] * axis, where)


def _check_rows(sharding: Sharding, batch: PyTree, what: str) -> None:
    """Refuse a batch none of whose leaves can be split: it would be computed whole on every device."""
    lengths = {int(leaf.shape[0]) for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)}
    if sharding.row_devices > 1 and lengths and all(length % sharding.row_devices for length in lengths):
        raise ValueError(f"{what}: got {sorted(lengths)} rows on {sharding.row_devices} devices; expected a multiple of {sharding.row_devices}.")


def _place_source(sharding: Sharding, source: Source | Stream) -> Source | Stream:
    if isinstance(source, Stream):
        return source
    return source._replace(data=jax.tree.map(lambda a: _put(a, sharding.named(*_rows_spec(sharding, a))), source.data))


def _split_rows(inner, outer, batch, *args, fn, sharding, **kwargs):
    """The objective with its batch's rows split, wherever the batch was drawn from."""
    _check_rows(sharding, batch, "batch")
    batch = jax.tree.map(lambda a: lax.with_sharding_constraint(a, sharding.named(*_rows_spec(sharding, a))), batch)
    return fn(inner, outer, batch, *args, **kwargs)


def _own_rows(inner, outer, batch, *, fn, sharding):
    """The mean over devices of the objective on each one's rows."""
    _check_rows(sharding, batch, "batch")
    names = (sharding.rows,) if isinstance(sharding.rows, str) else tuple(sharding.rows)
    everywhere, rows = PartitionSpec(), jax.tree.map(lambda a: PartitionSpec(*_rows_spec(sharding, a)), batch)
    local = jax.shard_map(lambda y, x, b: lax.pmean(fn(y, x, b), names), mesh=sharding.mesh, in_specs=(everywhere, everywhere, rows), out_specs=everywhere)
    return local(inner, outer, batch)


def _wrap(sharding: Sharding, objective: Objective) -> Objective:
    fn = _own_rows if sharding.mean else _split_rows
    return dataclasses.replace(objective, fn=Bound(objective.name, fn, fn=objective.fn, sharding=sharding))


def place(sharding: Sharding, plan: Any, sources: tuple, start: InnerState, outer: PyTree, key: Any) -> tuple:
    """The plan, the data and the starting point as they lie on the mesh."""
    problem = plan.problem
    if sharding.kind == "tasks":
        plan = over_tasks.distribute(sharding, plan, sources, start, outer)
    elif sharding.rows is not None:
        if sharding.mean:
            _check_mean(sharding, problem, sources, start, outer, key)
        if isinstance(problem, Problem):
            problem = problem._replace(inner=_wrap(sharding, problem.inner), outer=_wrap(sharding, problem.outer))
        else:
            problem = problem._replace(objectives={name: _wrap(sharding, objective) for name, objective in problem.objectives.items()})
        plan = plan._replace(problem=problem)
    everywhere = sharding.named()

    def put(params, level):
        return jax.tree.map(lambda a, spec: _put(a, sharding.named(*spec)), params, param_specs(sharding, params, level))

    start = start._replace(params=put(start.params, "inner"), model=jax.tree.map(lambda a: _put(a, everywhere), start.model))
    key = None if key is None else _put(key, everywhere)
    return plan, tuple(_place_source(sharding, source) for source in sources), start, put(outer, "outer"), key


def _check_mean(sharding: Sharding, problem: Any, sources: tuple, start: InnerState, outer: PyTree, key: Any) -> None:
    """Means over rows, by value and gradient on the first batch."""
    if not isinstance(problem, Problem):
        raise ValueError("sharding: got mean=True for more than two levels; expected data_parallel() there.")
    for name, objective, source in (("inner_objective", problem.inner, sources[0]), ("outer_objective", problem.outer, sources[2])):
        if objective.has_aux or objective.stateful or objective.keyed:
            raise ValueError(
                f"{name}: got {objective!r} with mean=True; expected an objective without aux, state and keys, which each device would have of its own. "
                "Try data_parallel() without mean."
            )
        if isinstance(source, Stream):
            batch = jax.tree.map(jnp.asarray, peek(source))
        else:
            batch = source.draw(Feed(source.data, key, jnp.zeros((), jnp.int32)), 0).batch
        if not jax.tree.leaves(batch):
            continue
        batch = jax.tree.map(lambda a: _put(a, sharding.named(*_rows_spec(sharding, a))), batch)
        whole, parts = (
            jax.jit(jax.value_and_grad(fn, (0, 1)))(start.params, outer, batch)
            for fn in (objective.fn, Bound(objective.name, _own_rows, fn=objective.fn, sharding=sharding))
        )
        gap, size = float(tree.norm(tree.sub(whole, parts))), float(tree.norm(whole))
        if gap > 1e-3 * size:
            raise ValueError(
                f"{name}: got {objective.name} with mean=True, which is no mean over the rows of its batch: on the whole of the first batch it gives "
                f"{float(whole[0]):.6g}, as the mean of the devices' parts {float(parts[0]):.6g} (values and gradients differ by {gap / size:.1e}); "
                "expected a mean. Try jnp.mean in place of jnp.sum, or data_parallel() without mean."
            )


__all__ = ["Layout", "Sharding", "by_path", "data_parallel", "fsdp", "tasks"]
