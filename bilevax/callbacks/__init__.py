"""What may watch a run from outside: stops, logs, progress. Any function of an `Event` is a
callback.
"""

from bilevax.callbacks.files import csv, jsonl
from bilevax.callbacks.stopping import early_stopping, every
from bilevax.callbacks.writers import ScalarWriter, mlflow, scalars, tensorboard, wandb
from bilevax.run.watch import Callback, Event, progress_bar


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Callback",
    "Event",
    "ScalarWriter",
    "csv",
    "early_stopping",
    "every",
    "jsonl",
    "mlflow",
    "progress_bar",
    "scalars",
    "tensorboard",
    "wandb",
]
