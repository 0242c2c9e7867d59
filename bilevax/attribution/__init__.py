"""What a trained model owes to its training data: influence, the score that judges it, and whether
it can be trusted.
"""

import sys

from bilevax._core.showing import tidy
from bilevax.attribution.influence import (
    Influence,
    grouped,
    implicit,
    metagradient,
    similarity,
    tracin,
)
from bilevax.attribution.score import Score, linear_datamodeling_score
from bilevax.attribution.smoothness import Smoothness, metasmoothness
from bilevax.attribution.training import Training, training


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Influence",
    "Score",
    "Smoothness",
    "Training",
    "grouped",
    "implicit",
    "linear_datamodeling_score",
    "metagradient",
    "metasmoothness",
    "similarity",
    "tracin",
    "training",
]

tidy(sys.modules[__name__])
