"""Optimization problems nested in each other, in JAX."""

import importlib
from typing import TYPE_CHECKING as _TYPE_CHECKING
from typing import Any as _Any

from bilevax import callbacks, checkpoint, data, hypergradient, inner, linear, sharding
from bilevax._core.showing import tidy, tidy_class
from bilevax._core.version import __version__ as __version__
from bilevax.argmin import argmin
from bilevax.base import Estimate, objective
from bilevax.estimate import value_and_hypergrad
from bilevax.inner.tunable import tunable
from bilevax.results import RESULTS, SolveError
from bilevax.root import fixed_point, root
from bilevax.run.metrics import metrics
from bilevax.run.solution import Solution
from bilevax.solve import solve_bilevel
from bilevax.tasks import task_copies, tasks

if _TYPE_CHECKING:
    from bilevax import algorithms, attribution, diagnostics, games, nn, plots, replay, testing
    from bilevax.diagnostics import check_hypergradient, compare_hypergradients, error_bound
    from bilevax.multilevel import Level, solve_multilevel, value_and_multilevel_grad
    from bilevax.multilevel.explain import explain

# Imported when first used, so that importing the package stays quick: where a name is found, None
# for a module of that name.
_LATER = {
    **dict.fromkeys(
        ("algorithms", "attribution", "diagnostics", "games", "nn", "plots", "replay", "testing")
    ),
    **dict.fromkeys(
        ("check_hypergradient", "compare_hypergradients", "error_bound"), "diagnostics"
    ),
    **dict.fromkeys(
        ("Level", "explain", "solve_multilevel", "value_and_multilevel_grad"), "multilevel"
    ),
}


def __getattr__(name: str) -> _Any:
    """The names that are imported when they are first used."""
    if name not in _LATER:
        raise AttributeError(f"module 'bilevax' has no attribute {name!r}")
    module = importlib.import_module(f"bilevax.{_LATER[name] or name}")
    return getattr(module, name) if _LATER[name] else module


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "RESULTS",
    "Estimate",
    "Level",
    "Solution",
    "SolveError",
    "algorithms",
    "argmin",
    "attribution",
    "callbacks",
    "check_hypergradient",
    "checkpoint",
    "compare_hypergradients",
    "data",
    "diagnostics",
    "error_bound",
    "explain",
    "fixed_point",
    "games",
    "hypergradient",
    "inner",
    "linear",
    "metrics",
    "nn",
    "objective",
    "plots",
    "replay",
    "root",
    "sharding",
    "solve_bilevel",
    "solve_multilevel",
    "task_copies",
    "tasks",
    "testing",
    "tunable",
    "value_and_hypergrad",
    "value_and_multilevel_grad",
]

for _space in (callbacks, checkpoint, data, hypergradient, inner, linear, sharding):
    tidy(_space)
for _class in (Estimate, Solution):
    tidy_class(_class)
