"""Games: players who each minimize an objective of their own over their own parameters, all moving
at once.

| play | direction of each step, of the field ``v = (∇_i f_i)_i`` | evaluations of v |
|---|---|---|
| `simultaneous` | ``v(z)``; spirals outwards where players oppose each other | 1 |
| `extragradient` | ``v(z − a v(z))`` | 2 |
| `optimistic` | ``2 v(z_t) − v(z_{t−1})`` | 1 |
| `symplectic` | ``v + τ A'v``, A the antisymmetric part of ``∂v`` | 1 and two products |
| `consensus` | ``v + γ ∇½‖v‖²`` | 1 and one product |

`solve_game` finds a Nash equilibrium (a point where no player gains by a small move of his own),
`solve_multilevel` of the same levels the Stackelberg solution, in which the upper level counts on
the lower one's answer.
"""

import sys

from bilevax._core.showing import tidy
from bilevax.games.mirror import mirror
from bilevax.games.plays import Play, consensus, extragradient, optimistic, simultaneous, symplectic
from bilevax.games.solve import solve_game


def __dir__() -> list[str]:
    return __all__


__all__ = [
    "Play",
    "consensus",
    "extragradient",
    "mirror",
    "optimistic",
    "simultaneous",
    "solve_game",
    "symplectic",
]

tidy(sys.modules[__name__])
