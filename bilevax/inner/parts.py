"""What solvers of constrained levels and fixed points share with the methods that differentiate
them, and small quadratic programs for others.
"""

from bilevax.inner._conditions import active, come_apart, lagrangian, ties
from bilevax.inner._constraints import as_constraints, dense_dtype, unvector, vector
from bilevax.inner._mapping import apply, as_mapping, bound_like
from bilevax.inner._quadratic import Program, minimize, violation

__all__ = [
    "Program", "active", "apply", "as_constraints", "as_mapping", "bound_like", "come_apart",
    "dense_dtype", "lagrangian", "minimize", "ties",
    "unvector", "vector", "violation",
]  # fmt: skip
