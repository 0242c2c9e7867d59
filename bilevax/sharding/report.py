"""What a sharded step costs before it is run: bytes of state on each device, collectives in the
compiled program.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from bilevax._core import numbers
from bilevax.sharding.placement import Sharding

KINDS = (
    "all-reduce",
    "all-gather",
    "reduce-scatter",
    "all-to-all",
    "collective-permute",
    "collective-broadcast",
)
_BYTES = {"pred": 1, "s4": 0.5, "u4": 0.5, "c64": 8, "c128": 16}


class Piece(NamedTuple):
    """One leaf of the state: its path, shape and dtype as a whole, its partition spec, and the
    bytes that one device holds.
    """

    path: str
    shape: tuple[int, ...]
    dtype: str
    spec: Any
    device_bytes: int
    total_bytes: int


class Collective(NamedTuple):
    """Collectives of one kind and size in the compiled step.

    Attributes:
      kind: as XLA calls it, "all-reduce" for example.
      bytes: size of one on one device.
      shapes: what it carries, as XLA writes it.
      times: how often a step runs it; in a loop that ends by a condition, how often one pass does.
      loop: it stands in a loop whose number of passes is not known at compile time.
    """

    kind: str
    bytes: int
    shapes: str
    times: int
    loop: bool


class Report(NamedTuple):
    """A step that was compiled and not run.

    Attributes:
      pieces: the leaves of the state.
      collectives: what the devices say to each other in one step.
      state_bytes: of one device, all pieces together.
      total_bytes: of the state as a whole.
      peak_bytes: what the compiled step needs on one device, arguments and temporaries; None where
        the backend does not say.
    """

    pieces: tuple[Piece, ...]
    collectives: tuple[Collective, ...]
    state_bytes: int
    total_bytes: int
    peak_bytes: int | None

    def __repr__(self) -> str:
        lines = [
            f"state: {_size(self.state_bytes)} a device of {_size(self.total_bytes)} in all; step: "
            f"{_size(self.peak_bytes)} a device"
        ]
        lines += [
            f"  {_size(p.device_bytes):>10}  {p.dtype}{list(p.shape)} {p.spec}  {p.path}"
            for p in self.pieces
            if p.total_bytes >= 64
        ]
        lines.append("collectives:" if self.collectives else "no collectives")
        for c in self.collectives:
            lines.append(
                f"  {c.times:>4} x {_size(c.bytes):>10}  "
                f"{c.kind}{', each pass of a loop' if c.loop else ''}  {c.shapes}"
            )
        return "\n".join(lines)


def _size(amount: float | None) -> str:
    if amount is None:
        return "unknown"
    power = 0
    while amount >= 1024 and power < 3:
        amount, power = amount / 1024, power + 1
    return f"{amount:.4g} {('B', 'KiB', 'MiB', 'GiB')[power]}"


class Compiled(Exception):
    """How a dry run leaves a driver: with the compiled step, and the state that it would have begun
    with.
    """

    def __init__(self, program: Any, state: Any):
        super().__init__("a dry run ends before its first step")
        self.program, self.state = program, state


def dry_run(driver: Callable[..., Any], *args: Any, **kwargs: Any) -> Report:
    """Compile one step of `solve_bilevel` or `solve_multilevel` and say what it holds and sends,
    without running it.

    Args:
      driver: `bilevax.solve_bilevel` or `bilevax.solve_multilevel`.
      *args: its arguments.
      **kwargs: its keywords, ``sharding`` among them.

    Returns:
      A `Report`; printing it shows a table.

    Raises:
      TypeError: without a sharding.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.mean((batch @ y - x) ** 2) + jnp.sum(y**2)
      >>> outer = lambda y, x, batch: jnp.mean((batch @ y - 1.0) ** 2)
      >>> algorithm = bx.algorithms.double_loop(
      ...     bx.inner.optax(optax.sgd(0.1), 3), bx.hypergradient.sama(), optax.sgd(0.1)
      ... )
      >>> report = bx.sharding.dry_run(
      ...     bx.solve_bilevel,
      ...     inner,
      ...     outer,
      ...     jnp.zeros(512),
      ...     jnp.zeros(()),
      ...     inner_data=jnp.ones((16, 512)),
      ...     outer_data=jnp.ones((16, 512)),
      ...     algorithm=algorithm,
      ...     sharding=bx.sharding.fsdp(jax.devices()[:1]),
      ... )
      >>> report.state_bytes == report.total_bytes  # on one device
      True
    """
    if not callable(driver):
        raise TypeError(
            f"driver: got {numbers.describe(driver)}; expected bilevax.solve_bilevel or "
            "bilevax.solve_multilevel."
        )
    sharding = kwargs.pop("sharding", None)
    if not isinstance(sharding, Sharding):
        raise TypeError(
            f"sharding: got {sharding!r}; expected one of sharding's factories. Try "
            "sharding.data_parallel()."
        )
    try:
        driver(*args, **kwargs, sharding=dataclasses.replace(sharding, dry=True))
    except Compiled as step:
        return _report(step)
    raise TypeError(
        f"driver: got {numbers.describe(driver)}; expected solve_bilevel or solve_multilevel."
    )


def _report(step: Compiled) -> Report:
    pieces = tuple(
        _piece(path, leaf) for path, leaf in jax.tree_util.tree_leaves_with_path(step.state)
    )
    device, total = sum(p.device_bytes for p in pieces), sum(p.total_bytes for p in pieces)
    return Report(pieces, collectives(step.program.as_text()), device, total, _peak(step.program))


def _peak(compiled: Any) -> int | None:
    memory = compiled.memory_analysis()
    if memory is None:
        return None
    return int(
        memory.argument_size_in_bytes
        + memory.output_size_in_bytes
        + memory.temp_size_in_bytes
        - memory.alias_size_in_bytes
    )


def _piece(path: Any, leaf: jax.Array) -> Piece:
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    local = leaf.sharding.shard_shape(leaf.shape)
    size = leaf.dtype.itemsize
    device, total = (int(np.prod(shape, dtype=np.int64)) * size for shape in (local, leaf.shape))
    return Piece(
        jax.tree_util.keystr(path),
        leaf.shape,
        str(leaf.dtype),
        getattr(leaf.sharding, "spec", None),
        device,
        total,
    )


# ---- reading the compiled program

_OP = re.compile(rf"= (?P<shape>.+?) (?P<kind>{'|'.join(KINDS)})(?P<phase>-start|-done)?\(")
_SHAPE = re.compile(r"([a-z]\w*)\[([\d,]*)\]")
_CALLED = re.compile(
    r"(?:to_apply|calls|body|true_computation|false_computation)=%?([\w.\-]+)|branch_computations=\{([^}]*)\}"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def _bytes_of(shapes: str) -> int:
    total = 0.0
    for dtype, dims in _SHAPE.findall(shapes):
        digits = re.findall(r"\d+", dtype)
        each = _BYTES.get(dtype, int(digits[0]) / 8 if digits else 0)
        total += each * int(np.prod([int(d) for d in dims.split(",") if d], dtype=np.int64))
    return int(total)


def collectives(text: str | None) -> tuple[Collective, ...]:
    """The collectives in a compiled program, those in loops times the passes where XLA knows them.

    Args:
      text: the program, from ``jitted.lower(...).compile().as_text()``; None, from a backend that
        does not tell, has none.

    Returns:
      A `Collective` for each.

    Raises:
      TypeError: for what is no text.

    Examples:
      >>> import jax, jax.numpy as jnp
      >>> from bilevax import sharding
      >>> sharding.collectives(jax.jit(jnp.sin).lower(1.0).compile().as_text())
      ()
    """
    if not (text is None or isinstance(text, str)):
        raise TypeError(f"text: got {numbers.describe(text)}; expected a compiled program's text.")
    bodies: dict[str, list[str]] = {}
    entry = name = None
    for line in (text or "").splitlines():
        if line.endswith("{") and not line.startswith(" "):
            match = re.match(r"(ENTRY )?%?([\w.\-]+)", line)
            if match and not line.startswith("HloModule"):
                name = match[2]
                bodies[name] = []
                entry = name if match[1] else entry
        elif line.startswith("}"):
            name = None
        elif name is not None:
            bodies[name].append(line)
    found: dict[tuple[Any, ...], int] = {}

    def walk(name: str, times: int, loop: bool) -> None:
        for line in bodies.get(name, ()):
            op = _OP.search(line)
            if op and op["phase"] != "-done":
                shape = op["shape"]
                if (
                    op["phase"] == "-start" and op["kind"] != "all-reduce"
                ):  # its result holds the operands, too
                    shape = shape[len(shape) // 2 :]
                key = (
                    op["kind"],
                    _bytes_of(shape),
                    re.sub(r"\{[^}]*\}|/\*[^*]*\*/", "", shape),
                    loop,
                )
                found[key] = found.get(key, 0) + times
                continue
            is_loop = " while(" in line
            trips = _TRIPS.search(line)
            for one, several in _CALLED.findall(line):
                for called in [one] if one else [c.strip().lstrip("%") for c in several.split(",")]:
                    if is_loop and trips:
                        walk(called, times * int(trips[1]), loop)
                    else:
                        walk(called, times, loop or is_loop)
            condition = re.search(r"condition=%?([\w.\-]+)", line)
            if condition:
                walk(condition[1], times * (int(trips[1]) + 1 if trips else 1), loop or not trips)

    if entry is not None:
        walk(entry, 1, False)
    return tuple(
        Collective(kind, size, shapes, count, loop)
        for (kind, size, shapes, loop), count in sorted(found.items(), key=lambda item: -item[0][1])
    )


__all__ = ["Collective", "Piece", "Report", "collectives", "dry_run"]
