"""Which devices, and what lies where on them: the four kinds of sharding."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from bilevax import check
from bilevax._core import numbers, peers
from bilevax.base import PyTree


def _largest(sharding: Sharding, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Split along the largest axis that the devices divide."""
    devices = sharding.mesh.shape[sharding.axis]
    divisible = [i for i, length in enumerate(shape) if length % devices == 0 and length]
    if not divisible or int(np.prod(shape, dtype=np.int64)) < sharding.min_size:
        return PartitionSpec()
    chosen = max(divisible, key=lambda i: shape[i])
    return PartitionSpec(*[sharding.axis if i == chosen else None for i in range(chosen + 1)])


def _ruled(sharding: Sharding, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """As the first rule says whose pattern is found in the path."""
    found = next(
        (spec for pattern, spec in sharding.rules if re.search(pattern, path)), PartitionSpec()
    )
    if len(found) > len(shape):
        raise ValueError(
            f"rules: got {found} for {path} of shape {list(shape)}; expected at most that many "
            "axes."
        )
    return found


def _by_task(sharding: Sharding, path: str, shape: tuple[int, ...]) -> PartitionSpec:
    """Inner parameters by their leading axis, outer ones on every device."""
    return PartitionSpec(sharding.axis) if path.startswith("inner") else PartitionSpec()


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh and how a run is laid over it; made by `data_parallel`, `fsdp`, `tasks` or `by_path`.

    Attributes:
      mesh: the devices.
      rows: the mesh axis (or axes) that the rows of batches are split over, None for none.
      kind: "replicated", "largest" (each leaf over its largest divisible axis), "rules" or "tasks":
        where the state lies, for people.
      axis: the mesh axis of "largest" and "tasks".
      rules: pairs of a pattern of paths and a partition spec, for "rules".
      min_size: entries below which "largest" leaves a leaf whole.
      mean: the objectives are means over rows, and each device may take its own rows' mean.
      dry: compile the step, and go no further.
      lies: ``(sharding, path, shape) -> PartitionSpec``: where a leaf of the parameters lies. None:
        on every device.
      mirrors: what the state has beside parameters lies as those that it mirrors; otherwise as
        `lies` says of its own shape.
      apart: each device runs the algorithm on entries of its own of the leading axis, without the
        others.
    """

    mesh: Mesh
    rows: Any = None
    kind: str = "replicated"
    axis: str | None = None
    rules: tuple[Any, ...] = ()
    min_size: int = 0
    mean: bool = False
    dry: bool = False
    lies: Callable[[Sharding, str, tuple[int, ...]], PartitionSpec] | None = dataclasses.field(
        default=None, repr=False
    )
    mirrors: bool = dataclasses.field(default=True, repr=False)
    apart: bool = dataclasses.field(default=False, repr=False)

    @property
    def leading(self) -> Any:
        """The mesh axis (or axes) that leading axes of data are split over, None for none."""
        return self.axis if self.apart else self.rows

    @property
    def row_devices(self) -> int:
        """Over how many devices the rows of a batch are split."""
        return self._devices(self.rows)

    @property
    def leading_devices(self) -> int:
        """Over how many devices leading axes of data are split."""
        return self._devices(self.leading)

    def _devices(self, axes: Any) -> int:
        names = () if axes is None else (axes,) if isinstance(axes, str) else tuple(axes)
        return int(np.prod([self.mesh.shape[name] for name in names], dtype=np.int64))

    def spec(self, path: str, shape: tuple[int, ...]) -> PartitionSpec:
        """Where a leaf of the parameters lies."""
        return PartitionSpec() if self.lies is None else self.lies(self, path, shape)

    def named(self, *spec: Any) -> NamedSharding:
        """A sharding on this mesh."""
        return NamedSharding(self.mesh, PartitionSpec(*spec))


# ---- the four ways


def _line(devices: Any, axis: str) -> Mesh:
    numbers.word(axis, "axis", "data")
    found = jax.devices() if devices is None else devices
    if isinstance(found, Mesh):
        if axis not in found.shape:
            raise ValueError(
                f"axis: got {axis!r}; expected one of the mesh's axes, {tuple(found.shape)}."
            )
        return _auto(found)
    if (
        isinstance(found, (str, bytes))
        or not isinstance(found, (Sequence, np.ndarray))
        or not len(found)
    ):
        raise TypeError(
            f"devices: got {check.describe(found)}; expected a sequence of devices, a mesh, or "
            "None for all. Try jax.devices()."
        )
    if not all(isinstance(device, jax.Device) for device in np.asarray(found, dtype=object).flat):
        raise TypeError(
            f"devices: got {check.describe(found)}; expected what jax.devices() gives. Try "
            "[jax.devices()[i] for i in ...]."
        )
    return Mesh(np.asarray(found), (axis,), axis_types=(AxisType.Auto,))


def _auto(mesh: Mesh) -> Mesh:
    """The same devices and names with Auto axes.

    Inside a step arrays change their layout at will (an adjoint, a sketch, a line search's trial
    point); with Explicit axes each such place would have to name the new layout, and several
    operations refuse. Which axes are Explicit is the type of the user's arrays, not of what is
    computed: they are placed on this mesh on entry, so either kind of mesh gives the same run.
    """
    return (
        mesh
        if all(kind == AxisType.Auto for kind in mesh.axis_types)
        else Mesh(mesh.devices, mesh.axis_names, axis_types=(AxisType.Auto,) * mesh.devices.ndim)
    )


def automatic(arrays: PyTree) -> PyTree:
    """`arrays`, those on a mesh with Explicit axes placed anew, as they lie, on its Auto one."""

    def explicit(leaf: Any) -> bool:
        known = isinstance(leaf, jax.Array) and not isinstance(leaf, jax.core.Tracer)
        mesh = getattr(leaf.sharding, "mesh", None) if known else None
        return isinstance(mesh, Mesh) and _auto(mesh) is not mesh

    def placed(leaf: Any) -> Any:
        if not explicit(leaf):
            return leaf
        where = leaf.sharding
        auto = NamedSharding(_auto(where.mesh), where.spec, memory_kind=where.memory_kind)
        return jax.device_put(leaf, auto)

    # as it came where nothing is to be done: who shares a tree may be known by its identity
    return jax.tree.map(placed, arrays) if any(map(explicit, jax.tree.leaves(arrays))) else arrays


def data_parallel(devices: Any = None, *, axis: str = "data", mean: bool = False) -> Sharding:
    """Every device holds all of the state and a part of each batch's rows.

    The step means what it means on one device, whatever the objectives are: the compiler splits the
    work by the rows. With ``mean=True`` each device evaluates the objectives on rows of its own and
    the values are averaged, which communicates the least (one all-reduce of the inner gradient's
    size for each inner step and each Hessian-vector product) but is right for objectives that are
    means over the rows of their batch (terms that read no batch are fine). Whether they are is
    tried out on the first batch, values and gradients.

    Args:
      devices: a sequence of devices, a `Mesh` that has `axis`, or None for all devices.
      axis: name of the mesh axis.
      mean: see above.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind; in the run, for batches whose rows the
        devices do not divide, or, with ``mean``, for objectives that are no means or have aux,
        state or keys.

    Examples:
      >>> import bilevax as bx
      >>> bx.sharding.data_parallel().rows
      'data'
    """
    return Sharding(_line(devices, axis), rows=axis, mean=numbers.flag(mean, "mean"))


def fsdp(devices: Any = None, *, axis: str = "data", min_size: int = 1024) -> Sharding:
    """As `data_parallel`, and every large leaf of the state is split as well: parameters, optimizer
    states, adjoints, the kept iterate.

    Each leaf of `min_size` entries or more is split along its largest axis that the devices divide.
    Weights are gathered where a step reads them, so the peak is not one part in n: a model whose
    layers are stacked and run by ``lax.scan`` gathers one layer at a time.

    Args:
      devices: a sequence of devices, a `Mesh` that has `axis`, or None for all devices.
      axis: name of the mesh axis, which splits rows and state.
      min_size: entries below which a leaf stays whole.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.sharding.fsdp(min_size=64).kind
      'largest'

    Source: Rajbhandari et al., "ZeRO: memory optimizations toward training trillion parameter
    models" (SC 2020), stage 3.
    """
    least = numbers.count(min_size, "min_size")
    return Sharding(
        _line(devices, axis),
        rows=axis,
        kind="largest",
        axis=axis,
        min_size=least,
        lies=_largest,
        mirrors=False,
    )


def tasks(devices: Any = None, *, axis: str = "tasks") -> Sharding:
    """A leading axis of tasks split over the devices, for objectives made by `bilevax.tasks`.

    Each device runs the algorithm on tasks of its own, with no communication inside its loops;
    derivatives with respect to the outer parameters are summed at the end of each evaluation. Inner
    parameters and batches have the task axis in front, and the inner objective is a sum over tasks,
    so that no task's gradient depends on another. A solver's or a linear solver's own stopping rule
    is then applied device by device.

    Of more than two levels, the lowest one's parameters and the batches have the task axis in
    front; the levels below the top one that have it as well lie split over the tasks, the others
    are on every device, and the step means what it means on one device.

    Args:
      devices: a sequence of devices, a `Mesh` that has `axis`, or None for all devices; their
        number divides the number of tasks.
      axis: name of the mesh axis.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind; in the run, for two levels whose
        objectives were not made by `bilevax.tasks`.

    Examples:
      >>> import bilevax as bx
      >>> bx.sharding.tasks().axis
      'tasks'
    """
    return Sharding(_line(devices, axis), kind="tasks", axis=axis, lies=_by_task, apart=True)


def by_path(mesh: Mesh, rules: Mapping[str, PartitionSpec], *, rows: Any = None) -> Sharding:
    """Any mesh, with partition specs by path.

    A parameter's path is ``inner['layer']['w']`` or ``outer['scale']`` (of several levels:
    ``inner['name']...``). The first pattern found in it decides;
    what no pattern matches is on every device. Leaves of the state that mirror a parameter
    (moments, adjoints, the kept iterate) lie as it does.

    Args:
      mesh: a `jax.sharding.Mesh`.
      rules: pattern (a regular expression) -> ``PartitionSpec``, in order.
      rows: the mesh axis, or a tuple of them, that splits the rows of batches; None for none.

    Returns:
      A `Sharding` for ``solve_bilevel(..., sharding=...)``.

    Raises:
      TypeError, ValueError: for arguments of another kind, or specs that name no axis of the mesh;
        in the run, for a pattern that no parameter's path has.

    Examples:
      >>> import jax, bilevax as bx
      >>> from jax.sharding import AxisType, PartitionSpec as P
      >>> mesh = jax.make_mesh((1, 1), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
      >>> bx.sharding.by_path(mesh, {r"inner.*'w'": P(None, "model")}, rows="data").rows
      'data'
    """
    if not isinstance(mesh, Mesh):
        raise TypeError(
            f"mesh: got {check.describe(mesh)}; expected a jax.sharding.Mesh. Try "
            "jax.make_mesh((4, 2), ('data', 'model'))."
        )
    if not isinstance(rules, Mapping):
        raise TypeError(
            f"rules: got {check.describe(rules)}; expected a dict of patterns and partition specs."
        )
    if rows is not None and not isinstance(rows, (str, tuple, list)):
        raise TypeError(
            f"rows: got {check.describe(rows)}; expected the name of a mesh axis, a tuple of them, "
            "or None."
        )
    axes = [rows] if isinstance(rows, str) else list(rows or ())
    for pattern, spec in rules.items():
        if not isinstance(pattern, str) or not isinstance(spec, PartitionSpec):
            raise TypeError(
                f"rules[{pattern!r}]: got {check.describe(spec)}; expected a pattern and a "
                "jax.sharding.PartitionSpec."
            )
        axes += [
            name
            for part in spec
            if part is not None
            for name in ((part,) if isinstance(part, str) else part)
        ]
    for name in axes:
        if name not in mesh.shape:
            raise ValueError(
                f"rules and rows: got the axis {check.describe(name)}; expected axes of the mesh, "
                f"{tuple(mesh.shape)}."
            )
    compiled = tuple((pattern, spec) for pattern, spec in rules.items())
    return Sharding(
        _auto(mesh),
        rows=tuple(rows) if isinstance(rows, list) else rows,
        kind="rules",
        rules=compiled,
        lies=_ruled,
    )


def from_process(sharding: Sharding, arrays: PyTree) -> PyTree:
    """Arrays of all processes together, from the rows that each of them holds.

    Process p passes its own part of the data (the same number of rows on each); the result is what
    `inner_data` and `outer_data` take, every device holding rows of its own process, and nothing is
    sent.

    Args:
      sharding: one of this module's, with `rows`.
      arrays: pytree of numpy arrays with a common leading axis, this process's rows.

    Returns:
      A pytree of ``jax.Array`` whose leading axes are as long as those of all processes together.

    Raises:
      TypeError: for what is no array.
      ValueError: for a sharding that does not split rows, or shapes that differ between processes.

    Examples:
      >>> import numpy as np, bilevax as bx
      >>> bx.sharding.from_process(bx.sharding.data_parallel(), {"x": np.zeros((16, 3))})[
      ...     "x"
      ... ].shape  # in a single process
      (16, 3)
    """
    check_sharding(sharding)
    numbers.arrays(arrays, "arrays")
    if sharding is None or sharding.rows is None:
        raise ValueError(
            f"sharding: got {sharding!r:.80}, which does not split rows; expected data_parallel(), "
            "fsdp() or by_path(..., rows=...)."
        )
    given = {
        f"arrays{jax.tree_util.keystr(path)}": a
        for path, a in jax.tree_util.tree_leaves_with_path(arrays)
    }
    for name, a in given.items():
        if not isinstance(a, (np.ndarray, jax.Array)) or not np.ndim(a):
            raise TypeError(
                f"{name}: got {check.describe(a)}; expected an array whose leading axis counts "
                "rows."
            )
    shapes = {name: f"{a.dtype}{list(a.shape)}" for name, a in given.items()}
    peers.agree(
        shapes,
        "from_process",
        "Expected the same number of rows on each. Leave out the last few rows, or fill up with "
        "rows of weight zero.",
    )
    return jax.tree.map(
        lambda a: jax.make_array_from_process_local_data(
            sharding.named(sharding.rows), np.asarray(a)
        ),
        arrays,
    )


def check_sharding(value: Any) -> None:
    """A `Sharding` or None."""
    if value is not None and not isinstance(value, Sharding):
        hint = (
            " Call the factory: sharding.data_parallel()."
            if callable(value)
            else " Try sharding.data_parallel() or sharding.by_path(mesh, rules)."
        )
        raise TypeError(
            f"sharding: got {check.describe(value)}; expected one of sharding's factories, or "
            f"None.{hint}"
        )


__all__ = [
    "Sharding",
    "by_path",
    "check_sharding",
    "data_parallel",
    "from_process",
    "fsdp",
    "tasks",
]
