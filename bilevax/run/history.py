"""The rows of a run's history, on the host."""

from __future__ import annotations

import re

import jax
import numpy as np

from bilevax.base import PyTree


class History:
    """The rows so far: those of the chunks, after those of an earlier process."""

    def __init__(self) -> None:
        self.restored: dict[str, np.ndarray] | None = None  # columns by path
        self.chunks: list[dict] = []

    def all(self) -> dict:
        if self.restored is not None:
            like = self.chunks[0] if self.chunks else None
            self.chunks.insert(0, as_history(self.restored, like))
            if like is not None:
                self.restored = None
            else:
                return self.chunks.pop(0)
        if len(self.chunks) > 1:
            self.chunks = [jax.tree.map(lambda *columns: np.concatenate(columns), *self.chunks)]
        return self.chunks[0] if self.chunks else {}


def as_history(rows: dict[str, np.ndarray], like: PyTree = None) -> dict:
    """Columns by path as the nested history that `like` shows; without it, as nested dicts as far as the paths tell."""
    if like is not None:
        return jax.tree_util.tree_map_with_path(lambda path, _: rows[jax.tree_util.keystr(path)], like)
    out: dict = {}
    for path, column in rows.items():
        keys = re.findall(r"\['([^']*)'\]", path)
        if "".join(f"['{key}']" for key in keys) != path:  # not dicts all the way
            keys = [keys[0], path]
        inner = out
        for key in keys[:-1]:
            inner = inner.setdefault(key, {})
        inner[keys[-1]] = column
    return out
