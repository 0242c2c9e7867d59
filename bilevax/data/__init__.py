"""Where batches come from: pure draws keyed by (key, step), and adapters that turn what a user has
into one.

Four forms are taken wherever data is asked for:

- a pytree of arrays with a common leading axis: the whole of it is the batch of every step
  (`full`); with `minibatches`, a batch of it is drawn on the device, inside the compiled loop;
- a pure function ``(key, step) -> batch``;
- an iterable of batches (a ``grain``, ``torch`` or any other loader), read on the host ahead of the
  steps;
- None: the objective gets ``batch=None``.
"""

from bilevax.data.draws import same, stacked
from bilevax.data.episodes import episodes
from bilevax.data.sources import full, minibatches, partitioned


def __dir__() -> list[str]:
    return __all__


__all__ = ["episodes", "full", "minibatches", "partitioned", "same", "stacked"]
