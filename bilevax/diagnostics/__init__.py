"""How wrong a hypergradient is: against a reference, against other methods, and by a bound."""

import sys

from bilevax._core.showing import tidy
from bilevax.certificate import Constants, ErrorBound, error_bound, estimate_constants
from bilevax.diagnostics.checking import HypergradientReport, check_hypergradient
from bilevax.diagnostics.compare import (
    ComparisonRow,
    HypergradientComparison,
    compare_hypergradients,
)


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "ComparisonRow",
    "Constants",
    "ErrorBound",
    "HypergradientComparison",
    "HypergradientReport",
    "check_hypergradient",
    "compare_hypergradients",
    "error_bound",
    "estimate_constants",
]

tidy(sys.modules[__name__])
