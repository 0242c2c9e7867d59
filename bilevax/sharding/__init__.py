"""Runs on many devices: placements, objectives over a named axis, dry runs, and what saves
memory.
"""

from bilevax.sharding.axis import axis_mean
from bilevax.sharding.memory import accumulate, low_precision
from bilevax.sharding.placement import Sharding, by_path, data_parallel, from_process, fsdp, tasks
from bilevax.sharding.report import Collective, Piece, Report, collectives, dry_run


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Collective",
    "Piece",
    "Report",
    "Sharding",
    "accumulate",
    "axis_mean",
    "by_path",
    "collectives",
    "data_parallel",
    "dry_run",
    "from_process",
    "fsdp",
    "low_precision",
    "tasks",
]
