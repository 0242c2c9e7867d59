"""Types of arguments, once.

They are those of chex, for who reads a signature and for type checkers. At run time nothing of chex is imported: it takes a fifth of a
second that importing the package should not.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, TypeAlias

if TYPE_CHECKING:
    import chex
    import jax

    Numeric: TypeAlias = chex.Numeric
    Key: TypeAlias = jax.Array
    PyTree: TypeAlias = chex.ArrayTree
else:
    PyTree = Numeric = Key = Any

Scalar: TypeAlias = Any  # of one's own arithmetic: a traced scalar, a number, a code
