"""Algorithms: what moves both levels."""

import sys

from bilevax._core.showing import tidy
from bilevax.algorithms.adaptive import d_tfbo, s_tfbo
from bilevax.algorithms.double_loop import double_loop
from bilevax.algorithms.evolution import persistent_es
from bilevax.algorithms.hoag import hoag
from bilevax.algorithms.maid import maid
from bilevax.algorithms.momentum_two_loop import mrbo, sustain, vrbo
from bilevax.algorithms.multi_objective import multi_objective
from bilevax.algorithms.penalty import bome, f2sa
from bilevax.algorithms.single_loop import fsla, ma_soba, soba
from bilevax.algorithms.two_loop import amigo, bsa, stocbio, ttsa
from bilevax.algorithms.value_function import value_function
from bilevax.algorithms.variance_reduced import saba, spaba, srba
from bilevax.algorithms.zeroth import pzobo
from bilevax.certificate import Constants


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Constants", "amigo", "bome", "bsa", "d_tfbo", "double_loop", "f2sa", "fsla", "hoag",
    "ma_soba", "maid", "mrbo", "multi_objective",
    "persistent_es", "pzobo", "s_tfbo", "saba", "soba", "spaba", "srba", "stocbio", "sustain",
    "ttsa", "value_function", "vrbo",
]  # fmt: skip

tidy(sys.modules[__name__])
