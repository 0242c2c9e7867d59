"""What a driver of levels is given, checked and taken apart: sources of data, parameters, a key, a
state to go on from.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from bilevax import check
from bilevax._core.types import Key, PyTree
from bilevax.data.episodes import numbered
from bilevax.data.sources import as_source
from bilevax.multilevel.level import Level, check_key, check_names, split_params
from bilevax.run.state import RunState
from bilevax.run.window import needs_key, refuse_one_pass, refuse_shared


class Givens(NamedTuple):
    """What the levels begin with, by name.

    Attributes:
      sources: of data.
      floats: parameters, their floating-point leaves.
      fixed: the other leaves.
      key: of the run; None where nothing is drawn.
    """

    sources: dict[str, Any]
    floats: dict[str, PyTree]
    fixed: dict[str, PyTree]
    key: Key | None


def givens(levels: Sequence[Level], params: Any, data: Any, key: Any, state: Any) -> Givens:
    """What `levels` are given for a run.

    Raises:
      TypeError, ValueError: naming the argument.
    """
    if state is not None and not isinstance(state, RunState):
        raise TypeError(
            f"state: got {check.describe(state)}; expected solution.state of an earlier run, or "
            "None."
        )
    names = [level.name for level in levels]
    given = check_names(data, names, "data")
    found = numbered(tuple(as_source(given.get(name), f"data[{name!r}]") for name in names))
    sources = dict(zip(names, found, strict=True))
    refuse_shared(found)
    run_key = key if state is None else state.key
    check_key(levels, run_key, [n for n, s in sources.items() if run_key is None and needs_key(s)])
    floats, fixed = split_params(levels, params)
    for name in names:
        check.finite(floats[name], f"params[{name!r}]")
    if state is not None:
        refuse_one_pass(found)
    return Givens(sources, floats, fixed, run_key)
