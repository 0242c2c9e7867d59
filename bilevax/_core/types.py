"""Types of arguments, once.

They are those of chex, for who reads a signature and for type checkers. At run time nothing of chex
is imported: it takes a fifth of a second that importing the package should not.

A tree of arrays is the exception. `chex.ArrayTree` is a union that a strict checker unrolls: with
it nothing could be done with the parameters of a solution, or inside an objective, before a cast.
What is a tree is Any to a checker, and named for people.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

PyTree: TypeAlias = Any  # of arrays
Scalar: TypeAlias = Any  # of one's own arithmetic: a traced scalar, a number, a code

if TYPE_CHECKING:
    import chex
    import optax

    Numeric: TypeAlias = chex.Numeric  # a number that is given: Python's, NumPy's or JAX's
    Key: TypeAlias = chex.PRNGKey
    Transformation: TypeAlias = optax.GradientTransformation
else:
    Numeric = Key = Transformation = Any
