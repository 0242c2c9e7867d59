"""Problems of any number of levels."""

import sys

from bilevax._core.showing import tidy
from bilevax.multilevel.explain import Edge, Explanation, explain
from bilevax.multilevel.gradient import value_and_multilevel_grad
from bilevax.multilevel.level import Level
from bilevax.multilevel.solve import solve_multilevel


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Edge",
    "Explanation",
    "Level",
    "explain",
    "solve_multilevel",
    "value_and_multilevel_grad",
]

tidy(sys.modules[__name__])
