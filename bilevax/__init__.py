"""Optimization problems nested in each other, in JAX."""

import importlib

from bilevax import algorithms, callbacks, checkpoint, data, diagnostics, hypergradient, inner, linear, plots, sharding, testing
from bilevax.argmin import argmin
from bilevax.base import Estimate, objective
from bilevax.diagnostics import check_hypergradient, compare_hypergradients, error_bound
from bilevax.estimate import value_and_hypergrad
from bilevax.explain import explain
from bilevax.inner.tunable import tunable
from bilevax.level import Level
from bilevax.metrics import metrics
from bilevax.multilevel import solve_multilevel, value_and_multilevel_grad
from bilevax.results import RESULTS, SolveError
from bilevax.solution import Solution
from bilevax.solve import solve_bilevel
from bilevax.tasks import task_copies, tasks

__version__ = "0.1.0"


def __getattr__(name: str):
    """``bilevax.nn`` is imported when it is first used, and Flax with it."""
    if name == "nn":
        return importlib.import_module("bilevax.nn")
    raise AttributeError(f"module 'bilevax' has no attribute {name!r}")


__all__ = [
    "RESULTS",
    "Estimate",
    "Level",
    "Solution",
    "SolveError",
    "algorithms",
    "argmin",
    "callbacks",
    "check_hypergradient",
    "checkpoint",
    "compare_hypergradients",
    "data",
    "diagnostics",
    "error_bound",
    "explain",
    "hypergradient",
    "inner",
    "linear",
    "metrics",
    "nn",
    "objective",
    "plots",
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
