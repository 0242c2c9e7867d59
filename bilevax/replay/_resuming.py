"""What a replay leaves in a folder so that it can go on after it was killed, on the way there or on
the way back.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections import deque
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp

from bilevax.base import PyTree
from bilevax.checkpoint import Checkpointing
from bilevax.replay import _files
from bilevax.run import digest

_IN_FLIGHT = 2  # files that may be waiting for the writer


def fingerprint(parts: list[str], arrays: PyTree) -> str:
    """What a replay is known by: its programs, numbers and arrays."""
    total = hashlib.blake2b(digest_size=16)
    for text in parts:
        total.update(re.sub(r"0x[0-9a-f]+", "0x", text).encode())
    leaves = [leaf for leaf in jax.tree.leaves(arrays) if not _is_key(leaf)]
    keys = [jax.random.key_data(leaf) for leaf in jax.tree.leaves(arrays) if _is_key(leaf)]
    total.update(repr(digest.of_arrays(leaves + keys)).encode())
    return total.hexdigest()


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


class Progress:
    """The files of one replay: states on the way there, every so many steps, and cotangents on the
    way back.

    Those of the way there stay until the way back has passed them. Writing overlaps with the steps.
    """

    def __init__(self, spec: Checkpointing, name: str):
        self.spec, self.name = spec, name
        _files.make(spec.directory)
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="replay-progress")
        self._writing: deque[Future[Any]] = deque()

    def due(self, step: int) -> bool:
        """Whether this step is one that is saved."""
        return step > 0 and step % self.spec.every == 0

    def save(self, kind: str, step: int, value: PyTree, **notes: Any) -> None:
        """Begin to write; `value` must not be donated. ``kind`` is "there" or "back"."""
        while len(self._writing) >= _IN_FLIGHT:
            self._writing.popleft().result()
        for leaf in jax.tree.leaves(value):
            if isinstance(leaf, jax.Array):
                leaf.copy_to_host_async()
        self._writing.append(self._pool.submit(self._write, kind, step, value, notes))

    def _write(self, kind: str, step: int, value: PyTree, notes: dict[Any, Any]) -> None:
        _files.write(_files.path(self.spec.directory, kind, step), value, name=self.name, **notes)
        if kind == "back":
            backs = _files.names(self.spec.directory, "back")
            kept = list(backs)[: self.spec.keep]  # the way back goes down
            _files.remove([path for step, path in backs.items() if step not in kept])
            passed = _files.names(self.spec.directory, "there")
            _files.remove([path for step, path in passed.items() if step >= kept[-1]])

    def there(self) -> list[int]:
        """Steps whose states are here."""
        return list(_files.names(self.spec.directory, "there"))

    def newest(self, kind: str, like: PyTree) -> tuple[int, PyTree, dict[Any, Any]] | None:
        """The file that is furthest, read; damaged ones are reported and passed over."""
        found = _files.names(self.spec.directory, kind)
        for step in sorted(found, reverse=kind == "there"):
            read = self.read(kind, step, like)
            if read is not None:
                return step, *read
        return None

    def read(self, kind: str, step: int, like: PyTree) -> tuple[PyTree, dict[Any, Any]] | None:
        """One file; None where it is damaged, which is said."""
        path = _files.path(self.spec.directory, kind, step)
        try:
            notes = _files.notes(path)
            if notes.get("name") == self.name:
                return _files.read(path, like)
        except (
            Exception
        ) as error:  # whatever the reader trips over: the file is not what was written
            reason = f"{type(error).__name__}: {error}"
            warnings.warn(
                f"checkpoint: {path} is damaged ({reason}); going back to the one before it.",
                RuntimeWarning,
                stacklevel=6,
            )
            _files.remove([path])
            return None
        raise ValueError(
            f"checkpoint: {path} belongs to another replay; expected the same objectives, "
            "optimizer, numbers, data, start and "
            "key. Give this one a directory of its own."
        )

    def close(self, done: bool) -> None:
        """Wait for the writer; when all is `done`, leave nothing behind."""
        self._pool.shutdown()
        for writing in self._writing:
            writing.result()
        if done:
            for kind in ("there", "back"):
                _files.remove(list(_files.names(self.spec.directory, kind).values()))
