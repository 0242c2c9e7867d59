"""The rows of a run's history, on the host."""

from __future__ import annotations

import logging
import re
from typing import Any

import jax
import numpy as np


class History:
    """The rows so far: those of an earlier process, and those of the chunks behind them.

    Columns are kept by path in buffers that grow by doubling, so that adding rows and looking at
    all of them cost the same at any length.
    """

    def __init__(self, restored: dict[str, np.ndarray] | None = None) -> None:
        self.begun: list[str] = []  # columns that the earlier process did not have
        self.ended: list[str] = []  # and those that this one does not go on with
        self._restored = restored or {}
        self._buffers: dict[str, np.ndarray] = dict(self._restored)
        self._rows = max((len(column) for column in self._restored.values()), default=0)
        self._structure: Any = None  # of a row, and the paths of its leaves
        self._views: dict[str, Any] | None = None  # what `all` gives, until a row is added

    def __len__(self) -> int:
        return self._rows

    def append(self, rows: dict[Any, Any], count: int) -> None:
        """Add the first `count` of these rows."""
        flat = {
            jax.tree_util.keystr(path): leaf
            # all columns leave the device at once, not one after the other
            for path, leaf in jax.tree_util.tree_leaves_with_path(jax.device_get(rows))
        }
        if self._structure is None:
            self._structure = jax.tree.structure(rows), list(flat)
            self._meet(flat)
        total, self._views = self._rows + count, None
        for path, leaf in flat.items():
            self._room(path, total)[self._rows : total] = leaf[:count]
        for path in self.ended:
            self._room(path, total)[self._rows : total] = np.nan
        self._rows = total

    def _meet(self, flat: dict[str, np.ndarray]) -> None:
        """Bring restored columns and those of the first chunk together: what one of them lacks is
        NaN there.
        """
        before = self._restored
        self.begun = [path for path in flat if path not in before] if before else []
        self.ended = [path for path in before if path not in flat]
        for path, leaf in flat.items():
            old = before.get(path)
            if old is None:
                dtype = _with_nan(leaf.dtype) if self._rows else leaf.dtype
                self._buffers[path] = np.full(
                    (self._rows, *leaf.shape[1:]), np.nan if self._rows else 0, dtype
                )
            elif old.shape[1:] != leaf.shape[1:]:
                raise ValueError(
                    f"checkpoint: the column {path} of the history has rows of shape "
                    f"{list(old.shape[1:])} there and {list(leaf.shape[1:])} here; "
                    "expected one shape. Give the new column another name, or this run a directory "
                    "of its own."
                )
        for path in self.ended:
            self._buffers[path] = before[path].astype(_with_nan(before[path].dtype))
        if self.begun or self.ended:
            begun, ended = self.names()
            logging.getLogger("bilevax").warning(
                "checkpoint: the history's columns %s begin at row %d, and %s end there",
                begun,
                self._rows,
                ended,
            )

    def names(self) -> tuple[list[str], list[str]]:
        """The columns that begin and those that end where this process goes on."""
        plain = lambda paths: sorted("/".join(_keys(path)) for path in paths)
        return plain(self.begun), plain(self.ended)

    def _room(self, path: str, total: int) -> np.ndarray:
        buffer = self._buffers[path]
        if len(buffer) < total:
            grown = np.empty((max(total, 2 * len(buffer)), *buffer.shape[1:]), buffer.dtype)
            grown[: self._rows] = buffer[: self._rows]
            self._buffers[path] = buffer = grown
        return buffer

    def flat(self) -> dict[str, np.ndarray]:
        """Columns by path: views of the rows so far."""
        return {path: buffer[: self._rows] for path, buffer in self._buffers.items()}

    def all(self, rows: int | None = None) -> dict[str, Any]:
        """The nested columns, or the first `rows` of each: views, only to be read."""
        if self._views is None:
            self._views = self._nested()
        if rows is None or rows == self._rows:
            return dict(self._views)
        return {
            name: a[:rows] if type(a) is np.ndarray else jax.tree.map(lambda a: a[:rows], a)
            for name, a in self._views.items()
        }

    def cut(self, rows: int) -> None:
        """Forget all rows but the first `rows`."""
        self._rows, self._views = rows, None

    def _nested(self) -> dict[str, Any]:
        columns = self.flat()
        for column in columns.values():
            column.flags.writeable = False
        if self._structure is None:
            return _nested(columns)
        structure, paths = self._structure
        out = jax.tree.unflatten(structure, [columns[path] for path in paths])
        return {**_nested({path: columns[path] for path in self.ended}), **out}

    def copy(self) -> dict[str, Any]:
        """The nested columns, the caller's own."""
        return jax.tree.map(np.copy, self.all())


def _with_nan(dtype: np.dtype) -> np.dtype:
    return dtype if jax.numpy.issubdtype(dtype, np.inexact) else np.dtype(np.float64)


_KEY = re.compile(r"""\[(?:'((?:[^'\\]|\\.)*)'|"((?:[^"\\]|\\.)*)")\]""")


def _keys(path: str) -> list[str]:
    """The names that a path is made of: ``aux, a, 0`` of ``['aux']['a'][0]``."""
    keys, at = [], 0
    while found := _KEY.match(path, at):
        keys.append(re.sub(r"\\(.)", r"\1", found[1] if found[2] is None else found[2]))
        at = found.end()
    return [*keys, *re.findall(r"\w+", path[at:])]


def _nested(rows: dict[str, np.ndarray]) -> dict[str, Any]:
    """Columns by path as nested dicts, as far as the paths tell."""
    out: dict[Any, Any] = {}
    for path, column in rows.items():
        keys = _keys(path)
        inner = out
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = column
    return out
