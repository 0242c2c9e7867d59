"""A run laid over the devices of a sharding: its starting point, its data, and the layout that a
compiled step is held to.
"""

from __future__ import annotations

import dataclasses
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from bilevax import tree
from bilevax.base import Bound, Feed, InnerState, Objective, Problem, PyTree, join, split
from bilevax.data.episodes import Episodes, drawn
from bilevax.data.loaders import Stream
from bilevax.run import over_tasks
from bilevax.run.window import source_draw
from bilevax.sharding.placement import Sharding


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where each leaf of a run state lies."""

    sharding: Sharding
    specs: tuple[PartitionSpec, ...]

    def _each(self, state: PyTree, fn: Callable[..., Any]) -> PyTree:
        leaves, structure = jax.tree.flatten(state)
        return structure.unflatten(
            [
                fn(leaf, self.sharding.named(*spec))
                for leaf, spec in zip(leaves, self.specs, strict=True)
            ]
        )

    def pin(self, state: PyTree) -> PyTree:
        """Hold a traced state to the layout: left alone, the compiler may return a leaf split or
        whole as it likes.
        """
        return self._each(state, lax.with_sharding_constraint)

    def put(self, state: PyTree) -> PyTree:
        """Lay out a concrete state."""
        return self._each(state, put_leaf)

    def everywhere(self, value: PyTree) -> PyTree:
        """Traced values on every device."""
        return jax.tree.map(lambda a: lax.with_sharding_constraint(a, self.sharding.named()), value)

    def put_everywhere(self, value: PyTree) -> PyTree:
        """Concrete arrays on every device; plain numbers stay what they are."""
        return jax.tree.map(
            lambda a: (
                put_leaf(a, self.sharding.named()) if isinstance(a, (jax.Array, np.ndarray)) else a
            ),
            value,
        )

    def put_window(self, stacked: PyTree) -> PyTree:
        """Stacked batches of a stream: rows split, the axis of draws not."""
        return jax.tree.map(
            lambda a: put_leaf(a, self.sharding.named(*rows_spec(self.sharding, a, 1))), stacked
        )


def put_leaf(leaf: Any, where: NamedSharding) -> Any:
    """`leaf` placed; an array of several processes is moved by a compiled identity, which is the
    only thing that may communicate.
    """
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return (
            leaf
            if leaf.sharding.is_equivalent_to(where, leaf.ndim)
            else jax.jit(lambda a: a, out_shardings=where)(leaf)
        )
    if not where.is_fully_addressable and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        return jax.random.wrap_key_data(
            jax.device_put(np.asarray(jax.random.key_data(leaf)), where),
            impl=jax.random.key_impl(leaf),
        )
    return jax.device_put(leaf, where)


def param_specs(sharding: Sharding, params: PyTree, level: str) -> PyTree:
    """The partition spec of each leaf of `params`, which are the "inner" or the "outer" ones."""

    def spec(path, leaf):
        return sharding.spec(level + jax.tree_util.keystr(path), leaf.shape)

    return jax.tree_util.tree_map_with_path(spec, params)


def of_run(
    sharding: Sharding, shapes: PyTree, start: InnerState, outer: PyTree, spec: PyTree = None
) -> Layout:
    """The layout of a run state of these shapes; `spec` is what `place` has found of the
    algorithm's.
    """
    if spec is not None:
        return Layout(sharding, over_tasks.run_specs(spec, shapes))
    params = []
    for level, value in (("inner", start.params), ("outer", outer)):
        leaves = jax.tree_util.tree_leaves_with_path(value)
        named = [(jax.tree_util.keystr(path), leaf.shape) for path, leaf in leaves]
        params += [
            (level, name, shape, sharding.spec(level + name, shape)) for name, shape in named
        ]

    for pattern, _ in sharding.rules:
        if not any(re.search(pattern, level + name) for level, name, *_ in params):
            known = [level + name for level, name, *_ in params][:20]
            raise ValueError(
                f"rules: got {pattern!r}, which matches no parameter; expected a pattern of one of "
                f"{known}."
            )

    def found_for(path, leaf) -> PartitionSpec:
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            return PartitionSpec()
        if not sharding.mirrors:
            return sharding.spec("", leaf.shape)
        text = jax.tree_util.keystr(path)
        near = "outer" if "outer" in text else "inner"  # of equal names and shapes in both levels
        same = []
        for level, name, shape, found in params:
            extra = len(leaf.shape) - len(
                shape
            )  # a memory of several such vectors has axes in front
            if extra >= 0 and text.endswith(name) and leaf.shape[extra:] == shape:
                same.append((len(name), level == near, extra, found))
        if not same:
            return PartitionSpec()
        _, _, extra, found = max(same, key=lambda item: item[:2])
        return PartitionSpec(*[None] * extra, *found) if found else found

    return Layout(
        sharding,
        tuple(found_for(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(shapes)),
    )


# ---- batches


def rows_spec(sharding: Sharding, leaf: Any, axis: int = 0) -> tuple[Any, ...]:
    """Split along `axis` where there is one that the devices divide."""
    where = sharding.leading
    if (
        where is None
        or jnp.ndim(leaf) <= axis
        or leaf.shape[axis] % sharding.leading_devices
        or not leaf.shape[axis]
    ):
        return ()
    return (*[None] * axis, where)


def _check_rows(sharding: Sharding, batch: PyTree, of: str) -> None:
    """Refuse a batch none of whose leaves can be split: it would be computed whole on every
    device.
    """
    lengths = {int(leaf.shape[0]) for leaf in jax.tree.leaves(batch) if jnp.ndim(leaf)}
    if (
        sharding.row_devices > 1
        and lengths
        and all(length % sharding.row_devices for length in lengths)
    ):
        raise ValueError(
            f"batch of {of}: got {sorted(lengths)} rows on {sharding.row_devices} devices; "
            f"expected a multiple of {sharding.row_devices}. Leave out the last few rows, or fill "
            "up with rows of weight zero."
        )


def _place_source(sharding: Sharding, source: Any) -> Any:
    if isinstance(source, Stream):
        return source
    if isinstance(source, Episodes):
        return source._replace(parent=_place_source(sharding, source.parent))
    return source._replace(
        data=jax.tree.map(
            lambda a: put_leaf(a, sharding.named(*rows_spec(sharding, a))), source.data
        )
    )


def _split_rows(
    inner: PyTree,
    outer: PyTree,
    batch: PyTree,
    *args: Any,
    fn: Callable[..., Any],
    sharding: Any,
    of: str,
    **kwargs: Any,
) -> Any:
    """The objective with its batch's rows split, wherever the batch was drawn from."""
    _check_rows(sharding, batch, of)
    batch = jax.tree.map(
        lambda a: lax.with_sharding_constraint(a, sharding.named(*rows_spec(sharding, a))), batch
    )
    return fn(inner, outer, batch, *args, **kwargs)


def _own_rows(
    inner: PyTree, outer: PyTree, batch: PyTree, *, fn: Callable[..., Any], sharding: Any, of: str
) -> Any:
    """The mean over devices of the objective on each one's rows."""
    _check_rows(sharding, batch, of)
    names = (sharding.rows,) if isinstance(sharding.rows, str) else tuple(sharding.rows)
    everywhere, rows = (
        PartitionSpec(),
        jax.tree.map(lambda a: PartitionSpec(*rows_spec(sharding, a)), batch),
    )

    def local(inner, outer, batch):
        # Made each device's own here and not where they first meet the batch: what is summed is
        # then a gradient, not an intermediate of any size.
        inner, outer = jax.tree.map(lambda a: lax.pcast(a, names, to="varying"), (inner, outer))
        return lax.pmean(fn(inner, outer, batch), names)

    return jax.shard_map(
        local, mesh=sharding.mesh, in_specs=(everywhere, everywhere, rows), out_specs=everywhere
    )(inner, outer, batch)


def wrap(sharding: Sharding, objective: Objective) -> Objective:
    """The objective on batches whose rows are split over the devices."""
    fn = _own_rows if sharding.mean else _split_rows
    return dataclasses.replace(
        objective,
        fn=Bound(objective.name, fn, fn=objective.fn, sharding=sharding, of=objective.name),
    )


def of_problem(sharding: Sharding, problem: Any, start: InnerState) -> Sharding:
    """The sharding as this problem takes it: tasks of more than two levels lie by path."""
    return (
        over_tasks.of_levels(sharding, start.params)
        if sharding.apart and not problem.separable
        else sharding
    )


def place(
    sharding: Sharding,
    plan: Any,
    sources: tuple[Any, ...],
    start: InnerState,
    outer: PyTree,
    key: Any,
) -> tuple[Any, ...]:
    """The plan, the data and the starting point as they lie on the mesh, and the specs of the
    algorithm's state where they are known.
    """
    problem, spec = plan.problem, None
    if sharding.apart:
        plan, spec = over_tasks.distribute(sharding, plan, sources, start, outer)
    elif sharding.rows is not None:
        if sharding.mean:
            _check_mean(sharding, problem, sources, start, outer, key)
        plan = plan._replace(
            problem=problem.with_objectives(lambda objective: wrap(sharding, objective))
        )
    everywhere = sharding.named()

    def put(params, level):
        return jax.tree.map(
            lambda a, spec: put_leaf(a, sharding.named(*spec)),
            params,
            param_specs(sharding, params, level),
        )

    start = start._replace(
        params=put(start.params, "inner"),
        model=jax.tree.map(lambda a: put_leaf(a, everywhere), start.model),
    )
    key = None if key is None else put_leaf(key, everywhere)
    return (
        plan,
        tuple(_place_source(sharding, source) for source in sources),
        start,
        put(outer, "outer"),
        key,
        spec,
    )


@functools.partial(jax.jit, static_argnums=0)
def _compared(static: Any, dynamic: Any, inner: PyTree, outer: PyTree, batch: PyTree) -> Any:
    """The values of two functions, and how far they and their gradients are apart."""
    one, two = (jax.value_and_grad(fn, (0, 1))(inner, outer, batch) for fn in join(static, dynamic))
    return one[0], two[0], tree.norm(tree.sub(one, two)), tree.norm(one)


def _beside(inner: PyTree, outer: PyTree) -> tuple[PyTree, PyTree]:
    """A point in no special direction from this one."""

    def moved(params, seed):
        noise = tree.normal_like(jax.random.key(seed), params)
        return jax.tree.map(
            lambda a, n: a + jnp.asarray(0.1, a.dtype) * (1 + jnp.abs(a)) * n, params, noise
        )

    return moved(inner, 0), moved(outer, 1)


def _check_mean(
    sharding: Sharding,
    problem: Problem,
    sources: tuple[Any, ...],
    start: InnerState,
    outer: PyTree,
    key: Any,
) -> None:
    """Means over rows, by value and gradient on the first batch, at the start and beside it: at
    zero many a sum is zero, too.
    """
    for name, objective, source in (
        ("inner_objective", problem.inner, sources[0]),
        ("outer_objective", problem.outer, sources[2]),
    ):
        if objective.has_aux or objective.stateful or objective.keyed:
            raise ValueError(
                f"{name}: got {objective!r} with mean=True; expected one without aux, state and "
                "keys, which each device would have of its own. "
                "Try data_parallel() without mean."
            )
        if isinstance(source, Stream):
            batch = jax.tree.map(jnp.asarray, source.peek())
        else:
            zero = jnp.zeros((), jnp.int32)
            batch = source_draw(source)(Feed(drawn(source.data, key, zero), key, zero), 0).batch
        if not jax.tree.leaves(batch):
            continue
        batch = jax.tree.map(lambda a: put_leaf(a, sharding.named(*rows_spec(sharding, a))), batch)
        static, dynamic = split((objective.fn, wrap(sharding, objective).fn))
        for point in ((start.params, outer), _beside(start.params, outer)):
            whole, parts, gap, size = _compared(static, dynamic, *point, batch)
            if not gap > 1e-3 * size:  # as where beside the start there are no numbers
                continue
            raise ValueError(
                f"{name}: got {objective.name} with mean=True, which is no mean over the rows of "
                "its batch: on the whole of the first batch it gives "
                f"{float(whole):.6g}, as the mean of the devices' parts {float(parts):.6g} (values "
                f"and gradients differ by {gap / size:.1e}); "
                "expected a mean. Try jnp.mean in place of jnp.sum, or data_parallel() without "
                "mean."
            )
