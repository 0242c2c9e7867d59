"""A user's function of ``(inner, *args)`` with nothing captured: what rules of differentiation are
written for.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import base, tree
from bilevax._core.jaxpr import evaluate
from bilevax._core.precision import asked_by, under
from bilevax.base import Objective, PyTree


class Outer(NamedTuple):
    """All that a traced function reads besides the float leaves of `inner`."""

    fixed: PyTree  # non-float leaves of the inner parameters
    args: PyTree
    dynamic: tuple[Any, ...]  # dynamic leaves of the function's own configuration
    captured: list[Any]  # arrays that the function closes over


class Traceable:
    """A user's function, traced to a jaxpr whose captured arrays are operands.

    A custom rule that closes over a traced array leaks it as soon as the rule runs after the trace
    has ended (grad of jit, for one). ``jax.closure_convert`` hoists floating-point tracers only;
    the constants of a jaxpr are all that is captured, keys and integers too.
    """

    def __init__(self, fn: Callable[..., Any], linear_solver: Any):
        # What is solved and what is differentiated are one program, so one precision serves both.
        self._precision = (
            "highest" if linear_solver is None else asked_by(base.as_linear(linear_solver))
        )
        plain = fn.fn if isinstance(fn, Objective) else fn
        self.name = Objective(plain).name
        self._static, self._dynamic = base.split(plain)
        self._flat = self._function()

    def _function(self) -> Callable[..., Any]:
        static = self._static
        return lambda inner, args, settings: base.join(static, settings)(inner, *args)

    def traced(self, inner: PyTree, args: tuple[Any, ...]) -> tuple[Any, PyTree, Outer, Any]:
        """The closed jaxpr, the float leaves of `inner`, what else is read, and the structure of
        the outputs with their shapes.
        """
        inner, args = (
            tree.strong(checked("inner_init", inner)),
            jax.tree.map(jnp.asarray, checked("args", args)),
        )
        params, fixed = tree.partition(inner)
        make = lambda fn: under(self._precision, jax.make_jaxpr(fn, return_shape=True))(
            inner, args, self._dynamic
        )
        closed, shapes = make(self._flat)
        if any(isinstance(const, jax.core.Tracer) for const in closed.consts):
            # JAX remembers the trace of a function; one that captured a tracer may be of a trace
            # that has ended.
            closed, shapes = make(self._function())
        return closed, params, Outer(fixed, args, self._dynamic, list(closed.consts)), shapes


def outputs(jaxpr: Any, inner: PyTree, outer: Outer) -> list[Any]:
    """The function's outputs, flat, at the float leaves `inner`."""
    operands = jax.tree.leaves((tree.combine(inner, outer.fixed), outer.args, outer.dynamic))
    return evaluate(jaxpr, outer.captured, operands)


def checked(name: str, values: PyTree) -> PyTree:
    """`values`, if all its leaves are arrays or numbers, and real ones where they are to be solved
    for.
    """
    for path, leaf in jax.tree_util.tree_leaves_with_path(values):
        where = f"{name}{jax.tree_util.keystr(path)}"
        try:
            dtype = jnp.result_type(leaf)
        except TypeError as error:
            raise TypeError(
                f"{where}: got {leaf!r} of type {type(leaf).__name__}; expected an array or a "
                "number. Try capturing it."
            ) from error
        if jnp.issubdtype(dtype, jnp.complexfloating) and name != "args":
            raise TypeError(
                f"{where}: got dtype {dtype}; expected real numbers. Try its real and imaginary "
                "parts as two leaves."
            )
    return values


# ---- what a rule of differentiation needs


def constant(leaf: Any) -> Any:
    """Cut off from differentiation, functions and Python numbers left alone."""
    return lax.stop_gradient(leaf) if isinstance(leaf, (jax.Array, np.ndarray)) else leaf


def is_zero(tangent: PyTree) -> bool:
    """Whether a tangent is none: symbolically zero, or of a leaf that is no real number."""
    return (
        isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        or getattr(tangent, "dtype", None) == jax.dtypes.float0
    )


def together(vector: PyTree) -> PyTree:
    """`vector`, of which to the eyes of differentiation either every leaf moves or none does.

    JAX transposes a linear solve only if all leaves of its right side are linear; where an argument
    reaches some leaves of the solution's system and not the others (a bias that it does not enter),
    those would be constants.
    """
    return lax.optimization_barrier(vector) if len(jax.tree.leaves(vector)) > 1 else vector
