"""Which algorithm runs when none is named."""

from __future__ import annotations

import functools

import optax

from bilevax import hypergradient, inner, linear
from bilevax.algorithms.double_loop import double_loop
from bilevax.algorithms.maid import maid
from bilevax.base import Algorithm
from bilevax.data import same


@functools.cache
def _full_batch() -> Algorithm:
    return maid()


@functools.cache
def _minibatch() -> Algorithm:
    steps = inner.optax(inner.tunable(optax.adam, learning_rate=1e-3), 10)
    return double_loop(steps, hypergradient.implicit(linear.cg(maxiter=10), damping=1e-3), inner.tunable(optax.adam, learning_rate=1e-2))


def default_algorithm(sources) -> Algorithm:
    """The algorithm for these data sources.

    Where every stream gives the same batch each time (or None), it is `maid`: L-BFGS inside, conjugate gradients from the last adjoint, accuracies
    and quasi-Newton steps outside found on the way, nothing to tune. Where any stream samples, a warm-started double loop takes 10 Adam steps
    (1e-3) inside, 10 CG iterations on a fresh batch with damping 1e-3, and Adam (1e-2) outside.

    Args:
      sources: the three data sources of a run.

    Returns:
      An `Algorithm`, the same object at every call.

    Examples:
      >>> from bilevax import data
      >>> from bilevax.algorithms.default import default_algorithm
      >>> default_algorithm([data.full(None)] * 3).draws.inner
      1
    """
    return _full_batch() if all(getattr(s, "draw", None) is same for s in sources) else _minibatch()
