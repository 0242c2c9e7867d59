"""Hypergradient methods: how a cotangent on a solved lower level is pulled back."""

from bilevax.hypergradient.black_box import black_box
from bilevax.hypergradient.direct import direct
from bilevax.hypergradient.finite_difference import finite_difference
from bilevax.hypergradient.fixed_point import fixed_point
from bilevax.hypergradient.forward import forward
from bilevax.hypergradient.implicit import implicit
from bilevax.hypergradient.kkt import kkt
from bilevax.hypergradient.one_step import one_step
from bilevax.hypergradient.sama import sama
from bilevax.hypergradient.shine import shine
from bilevax.hypergradient.unrolled import unrolled
from bilevax.hypergradient.zeroth_order import zeroth_order


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "black_box",
    "direct",
    "finite_difference",
    "fixed_point",
    "forward",
    "implicit",
    "kkt",
    "one_step",
    "sama",
    "shine",
    "unrolled",
    "zeroth_order",
]
