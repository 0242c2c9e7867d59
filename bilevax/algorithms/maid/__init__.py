"""MAID: safeguarded descent with inexact hypergradients whose accuracy is chosen on the way."""

from bilevax.algorithms.maid.algorithm import MaidState, maid

__all__ = ["MaidState", "maid"]
