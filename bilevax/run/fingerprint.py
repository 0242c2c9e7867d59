"""What a run is of: a digest for each part of its problem, the same in every process that builds
the same problem.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend import core

from bilevax._core.version import __version__
from bilevax.base import PyTree
from bilevax.run import digest

_ADDRESS = re.compile(r"( at)? ?0x[0-9a-f]+")

# Where arrays lie, and what tells the compiler how, is no part of a problem.
_LAYOUT = (
    "mesh",
    "sharding",
    "shardings",
    "layout",
    "layouts",
    "donated",
    "keep_unused",
    "compiler_options",
)


def versions() -> dict[str, str]:
    """What the text of a traced function depends on beside the function."""
    return {"bilevax": __version__, "jax": jax.__version__}


def of_values(values: PyTree) -> str:
    """A digest of a pytree of arrays, keys and numbers: structure, shapes, dtypes and bits,
    wherever they lie.
    """
    leaves, treedef = jax.tree.flatten(values)
    plain = [
        jax.random.key_data(a)
        if jnp.issubdtype(jnp.asarray(a).dtype, jax.dtypes.prng_key)
        else jnp.asarray(a)
        for a in leaves
    ]
    shapes = [
        f"{a.dtype}{list(a.shape)}{_unseen_kind(leaf)}"
        for a, leaf in zip(plain, leaves, strict=True)
    ]
    structure = _ADDRESS.sub(
        "", str(treedef)
    )  # functions may be part of it; what they compute is traced elsewhere
    return _hash(structure, *shapes, *map(str, digest.of_arrays([a for a in plain if a.size])))


def typed(key: Any) -> tuple[Any, str]:
    """A key and its kind; one of the old style is of the kind that is set for this session."""
    if key is None:
        return None, "none"
    if not jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        key = jax.random.wrap_key_data(key)
    return key, str(jax.random.key_impl(key))


def _unseen_kind(leaf: Any) -> str:
    """The kind of a key whose bits have the shape of another kind's."""
    if not jnp.issubdtype(jnp.asarray(leaf).dtype, jax.dtypes.prng_key):
        return ""
    kind = str(jax.random.key_impl(leaf))
    return "" if kind in ("threefry2x32", "rbg") else f" {kind}"


def of_function(fn: Callable[..., Any], *args: Any) -> str:
    """A digest of what `fn` computes on arguments of these shapes, the values that it closes over
    included.
    """
    shapes = jax.tree.map(
        lambda a: (
            jax.ShapeDtypeStruct(jnp.shape(a), a.dtype, weak_type=False)
            if hasattr(a, "dtype")
            else a
        ),
        args,
    )
    closed = jax.make_jaxpr(fn)(*shapes)
    return _hash(text(closed.jaxpr), of_values([jnp.asarray(c) for c in closed.consts]))


def of_settings(value: PyTree) -> str:
    """A digest of the numbers among some settings, each with its place."""
    leaves = jax.tree_util.tree_leaves_with_path(value)
    numbers = [
        (jax.tree_util.keystr(path), leaf)
        for path, leaf in leaves
        if isinstance(leaf, (float, int, np.generic, np.ndarray, jax.Array))
    ]
    return _hash(*(path for path, _ in numbers), of_values([leaf for _, leaf in numbers]))


def shown(value: Any) -> str:
    """How settings read in a message."""
    return _ADDRESS.sub("", repr(value))[:600]


def differing(saved: dict[Any, Any], now: dict[Any, Any]) -> dict[str, str]:
    """The parts that differ, each with how it reads there and here where that tells anything.

    Parts that are digests of traced functions differ between versions of the libraries, too: there
    they are not compared. Nor where the keys are of two kinds, which is part of whatever draws.
    """
    kinds = [of.get("kind of key", now["kind of key"]) for of in (saved, now)]
    comparable = saved["versions"] == now["versions"] and kinds[0] == kinds[1]
    out = {}
    for name in {**now["parts"], **saved["parts"]}:
        there, here = saved["parts"].get(name), now["parts"].get(name)
        if there != here and (comparable or not (name in now["traced"] or name in saved["traced"])):
            a, b = saved["shown"].get(name), now["shown"].get(name)
            out[name] = f" (there {a}, here {b})" if a != b else ""
    if (
        any(name != "algorithm" and name in now["traced"] for name in out)
        and "algorithm" in out
        and not out["algorithm"]
    ):
        del out[
            "algorithm"
        ]  # its steps hold the objectives, and nothing says that more than those differ
    return out


def _hash(*texts: str) -> str:
    total = hashlib.blake2b(digest_size=16)
    for one in texts:
        total.update(f"{len(one)}:{one}".encode())
    return total.hexdigest()


# ---- the text of a jaxpr


def text(jaxpr: Any) -> str:
    """A jaxpr with its variables numbered in order, functions by their names, arrays by their bits;
    no addresses, no lines of source.
    """
    names: dict[Any, str] = {}

    def var(v) -> str:
        if isinstance(v, core.Literal):
            return f"{_value(v.val)}:{v.aval.str_short()}"
        return names.setdefault(v, f"v{len(names)}") + f":{v.aval.str_short()}"

    lines = [" ".join(map(var, (*jaxpr.constvars, *jaxpr.invars)))]
    for eqn in jaxpr.eqns:
        params = (
            f"{name}={_value(value)}"
            for name, value in sorted(eqn.params.items())
            if not any(part in name for part in _LAYOUT)
        )
        lines.append(
            f"{' '.join(map(var, eqn.outvars))} = {eqn.primitive.name}[{' '.join(params)}] "
            f"{' '.join(map(var, eqn.invars))}"
        )
    lines.append(" ".join(map(var, jaxpr.outvars)))
    return "\n".join(lines)


def _value(value: Any) -> str:
    """A parameter of an equation, or a literal."""
    if isinstance(value, core.ClosedJaxpr):
        return f"{{{text(value.jaxpr)}|{' '.join(_value(c) for c in value.consts)}}}"
    if isinstance(value, core.Jaxpr):
        return f"{{{text(value)}}}"
    if isinstance(value, (np.ndarray, np.generic, jax.Array)):
        plain: Any = value
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            # checked one line above: it is a key array
            plain = jax.random.key_data(value)  # type: ignore[arg-type]
        content = hashlib.blake2b(np.asarray(plain).tobytes(), digest_size=8).hexdigest()
        return f"{plain.dtype}{list(plain.shape)}:{content}"
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return f"{type(value).__name__}({' '.join(map(_value, value))})"
    if isinstance(value, (tuple, list)):
        return f"({' '.join(map(_value, value))})"
    if isinstance(value, dict):
        return f"{{{' '.join(f'{k}:{_value(v)}' for k, v in sorted(value.items(), key=str))}}}"
    if isinstance(value, (str, int, float, complex, bool, bytes, type(None), np.dtype)):
        return repr(value)
    if isinstance(value, type) or callable(value):
        return getattr(value, "__name__", type(value).__name__)
    return _ADDRESS.sub("", str(value))
