"""MAID: safeguarded descent with inexact hypergradients whose accuracy is chosen on the way."""

from bilevax.algorithms.maid.algorithm import maid
from bilevax.algorithms.maid.state import MaidState

__all__ = ["MaidState", "maid"]
