"""The preparation of a call: what every way into the library does with the objectives and
parameters that it is given.
"""

from __future__ import annotations

from typing import Any, NamedTuple

from bilevax import check, tree
from bilevax._core.types import Key
from bilevax.base import Ctx, Problem, PyTree
from bilevax.data.draws import with_number


class Call(NamedTuple):
    """A checked problem on floating-point leaves, bound to the others, and where it starts.

    Attributes:
      problem: both objectives, on floating-point leaves.
      inner: inner parameters, and
      outer: outer ones, None where a leaf is not floating-point.
      fixed: the other leaves, of the inner and of the outer parameters.
      model: the model's state.
    """

    problem: Problem
    inner: PyTree
    outer: PyTree
    fixed: tuple[PyTree, PyTree]
    model: PyTree

    def traced(self, inner_ctx: Ctx, outer_ctx: Ctx, steps: int = 1) -> tuple[Problem, Any]:
        """The problem bound to the traced arrays that its objectives capture, after both were tried
        on these shapes; the value's dtype.
        """
        given = (
            self.inner,
            self.outer,
            self.model,
            with_number(self.problem.inner, inner_ctx),
            outer_ctx,
        )
        dtype = check.objectives(self.problem, *given, steps)
        return check.captured(self.problem, *given, steps), dtype


def prepared(
    problem: Problem,
    inner_params: PyTree,
    outer_params: PyTree,
    model_state: PyTree,
    key: Key | None,
    *,
    sampled: bool = False,
    finite: bool = True,
) -> Call:
    """Check what was given, by its names, and bind what is no floating-point leaf.

    Args:
      problem: both objectives and their draws.
      inner_params: as given.
      outer_params: as given.
      model_state: as given.
      key: as given.
      sampled: some data is drawn with it.
      finite: look at the values, of those that have one.
    """
    check.key(key, problem, sampled)
    inner_params, outer_params = (
        check.arrays(inner_params, "inner_params"),
        check.arrays(outer_params, "outer_params"),
    )
    model_state = None if model_state is None else check.arrays(model_state, "model_state")
    for value, name in ((inner_params, "inner_params"), (outer_params, "outer_params")):
        check.module(value, name)
        check.params(value, name)
    if finite:
        for value, name in (
            (inner_params, "inner_params"),
            (outer_params, "outer_params"),
            (model_state, "model_state"),
        ):
            check.finite(value, name)
    (inner, inner_fixed), (outer, outer_fixed) = (
        tree.partition(inner_params),
        tree.partition(outer_params),
    )
    return Call(
        check.bind_fixed(problem, inner_fixed, outer_fixed),
        inner,
        outer,
        (inner_fixed, outer_fixed),
        model_state,
    )
