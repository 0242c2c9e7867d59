"""Metagradients: derivatives through a whole training, as a loop of the host over one step."""

import sys

from bilevax._core.showing import tidy
from bilevax.replay._batches import Reader, reader
from bilevax.replay.metagradient import Metagradient, gradients, value_and_metagrad
from bilevax.replay.schedules import Action, Counts, Schedule, everything, segments, tree


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Action",
    "Counts",
    "Metagradient",
    "Reader",
    "Schedule",
    "everything",
    "gradients",
    "reader",
    "segments",
    "tree",
    "value_and_metagrad",
]

tidy(sys.modules[__name__])
