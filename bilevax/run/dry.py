"""A step that is compiled and looked at, and not run."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np

from bilevax.base import join
from bilevax.run.chunk import one_step
from bilevax.run.window import Window
from bilevax.sharding.report import Piece, Report, collectives


def of_step(static: Any, dynamic: tuple, run: Any, sources: tuple) -> Report:
    """The report of one step of a run."""
    plan = join(static, dynamic)
    data, _ = Window(sources, 1, 1, plan.layout.put_window).read(0, 1)
    step = jax.jit(lambda dynamic, run, data: one_step(join(static, dynamic), run, data), donate_argnums=(1,))
    compiled = step.lower(dynamic, run, data).compile()
    pieces = tuple(_piece(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(run))
    return Report(
        pieces,
        collectives(compiled.as_text() or ""),
        sum(p.device_bytes for p in pieces),
        sum(p.total_bytes for p in pieces),
        _peak(compiled),
    )


def _peak(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return int(memory.argument_size_in_bytes + memory.output_size_in_bytes + memory.temp_size_in_bytes - memory.alias_size_in_bytes)


def _piece(path: Any, leaf: jax.Array) -> Piece:
    if jax.numpy.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    local = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    device, total = (int(np.prod(shape, dtype=np.int64)) * size for shape in (local, leaf.shape))
    return Piece(jax.tree_util.keystr(path), leaf.shape, str(leaf.dtype), getattr(leaf.sharding, "spec", None), device, total)
