"""Arrays in files of their own: written beside and moved into place, with a digest of every byte.

A file holds the leaves of a tree as they lay on this process's devices, in order. Read back, they
are placed as a template's leaves are. Each process of a run writes its own.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from bilevax.base import PyTree

FORMAT = 1


class Damaged(Exception):
    """A file that does not hold what was written."""


@dataclasses.dataclass(frozen=True)
class Form:
    """How a leaf lay: all that is needed to place its contents again."""

    shape: tuple[int, ...]
    sharding: Any = None  # None for an array of the host
    committed: bool = False
    devices: tuple[Any, ...] = ()
    key: Any = None

    @classmethod
    def of(cls, leaf: Any) -> Form:
        """The form of an array."""
        if isinstance(leaf, (np.ndarray, np.generic)):
            return cls(leaf.shape)
        is_key = jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        devices = tuple(part.device for part in leaf.addressable_shards)
        key = jax.random.key_impl(leaf) if is_key else None
        return cls(leaf.shape, leaf.sharding, leaf.committed, devices, key)

    def behind(self, axes: int) -> Form:
        """The same with so many axes in front, which are not split."""
        if not axes or not isinstance(self.sharding, NamedSharding):
            return self
        spec = PartitionSpec(*[None] * axes, *self.sharding.spec)
        return dataclasses.replace(self, sharding=NamedSharding(self.sharding.mesh, spec))


def forms(value: PyTree) -> PyTree:
    """A form for each leaf."""
    return jax.tree.map(Form.of, value)


def _parts(leaf: Any) -> list[np.ndarray]:
    """A leaf's contents on this process."""
    if isinstance(leaf, (np.ndarray, np.generic)):
        return [np.asarray(leaf)]
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if leaf.is_fully_addressable:
        return [np.asarray(leaf)]
    return [np.asarray(part.data) for part in leaf.addressable_shards]


def _bytes(part: np.ndarray) -> memoryview:
    # NumPy arrays have the buffer protocol, which its stubs leave out for views
    return memoryview(part.reshape(-1).view(np.uint8))  # type: ignore[arg-type]


def write(path: str, value: PyTree, **notes: Any) -> None:
    """Write the leaves of `value` and some `notes` of JSON's kinds."""
    parts = [
        np.asarray(part, order="C") for leaf in jax.tree.leaves(value) for part in _parts(leaf)
    ]
    total = hashlib.blake2b(digest_size=16)
    for part in parts:
        total.update(_bytes(part))
    shapes = [(part.dtype.name, list(part.shape)) for part in parts]
    header = {"format": FORMAT, "parts": shapes, "digest": total.hexdigest(), "notes": notes}
    text = json.dumps(header).encode()
    check = hashlib.blake2b(text, digest_size=16).hexdigest().encode()
    beside = f"{path}.{os.getpid()}.tmp"
    with open(beside, "wb") as file:
        file.write(b"%d %s\n" % (len(text), check))
        file.write(text)
        for part in parts:
            file.write(_bytes(part))
        file.flush()
        os.fsync(file.fileno())
    os.replace(beside, path)


def notes(path: str) -> dict[Any, Any]:
    """The notes of a file alone."""
    with open(path, "rb") as file:
        return _header(file)["notes"]


def _header(file: Any) -> dict[Any, Any]:
    try:
        length, check = file.readline().split()
        text = file.read(int(length))
    except ValueError as error:
        raise Damaged("its first line is not what was written") from error
    if hashlib.blake2b(text, digest_size=16).hexdigest().encode() != check:
        raise Damaged("its header does not have the header's digest")
    return json.loads(text)


def read(path: str, like: PyTree) -> tuple[PyTree, dict[Any, Any]]:
    """The value, placed as the forms `like` say, and the notes."""
    with open(path, "rb") as file:
        header = _header(file)
        parts, total = [], hashlib.blake2b(digest_size=16)
        for name, shape in header["parts"]:
            dtype = jnp.dtype(name)
            raw = file.read(int(np.prod(shape, dtype=np.int64)) * dtype.itemsize)
            total.update(raw)
            parts.append((raw, dtype, shape))
    if total.hexdigest() != header["digest"]:
        raise Damaged("it is cut off, or the digest of its arrays differs")
    arrays = iter([np.frombuffer(raw, dtype).reshape(shape) for raw, dtype, shape in parts])
    return jax.tree.map(lambda form: _placed(form, arrays), like), header["notes"]


def _placed(form: Form, arrays: Any) -> Any:
    if form.sharding is None:
        return next(arrays)
    if form.key is not None:
        return jax.random.wrap_key_data(jnp.array(next(arrays)), impl=form.key)
    if form.sharding.is_fully_addressable:
        # What lay on no device in particular is not bound to one, which would compile all programs
        # anew.
        return (
            jax.device_put(next(arrays), form.sharding)
            if form.committed
            else jnp.array(next(arrays))
        )
    own = [jax.device_put(next(arrays), device) for device in form.devices]
    return jax.make_array_from_single_device_arrays(form.shape, form.sharding, own)


def names(folder: str, prefix: str) -> dict[int, str]:
    """Paths of this process's files with that prefix, by number."""
    end = f".{jax.process_index()}.bin"
    found = {}
    for name in os.listdir(folder) if os.path.isdir(folder) else ():
        if name.startswith(f"{prefix}_") and name.endswith(end):
            found[int(name[len(prefix) + 1 : -len(end)])] = os.path.join(folder, name)
    return dict(sorted(found.items()))


def path(folder: str, prefix: str, number: int) -> str:
    """Where the file of that number belongs."""
    return os.path.join(folder, f"{prefix}_{number:09d}.{jax.process_index()}.bin")


def remove(paths: Sequence[str]) -> None:
    """Remove files, those that are gone already among them."""
    for one in paths:
        if os.path.exists(one):
            os.remove(one)


def make(folder: str) -> None:
    """The folder, without what a killed process was writing."""
    os.makedirs(folder, exist_ok=True)
    remove([os.path.join(folder, name) for name in os.listdir(folder) if name.endswith(".tmp")])
