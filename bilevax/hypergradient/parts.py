"""What methods share, and a method of your own may use: the solve that is not differentiated, and
the info of a linear solve.
"""

from bilevax.hypergradient._adjoint import report, verdict
from bilevax.hypergradient._kkt import chosen
from bilevax.hypergradient._solve import forward, over, summary

__all__ = ["chosen", "forward", "over", "report", "summary", "verdict"]
