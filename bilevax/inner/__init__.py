"""Inner solvers: how the lower level is solved."""

from bilevax.inner._jaxopt import jaxopt
from bilevax.inner._optax import optax
from bilevax.inner._optimistix import optimistix
from bilevax.inner.agd import agd
from bilevax.inner.black_box import black_box
from bilevax.inner.fixed_point import fixed_point, proximal_map
from bilevax.inner.gradient_descent import gradient_descent
from bilevax.inner.lbfgs import lbfgs
from bilevax.inner.qp import qp
from bilevax.inner.sqp import sqp
from bilevax.inner.tunable import tunable


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "agd", "black_box", "fixed_point", "gradient_descent", "jaxopt", "lbfgs", "optax",
    "optimistix", "proximal_map", "qp", "sqp", "tunable",
]  # fmt: skip
