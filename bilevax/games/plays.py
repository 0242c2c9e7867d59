"""How the players of a game move: pairs of an initial memory and a step."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax.base import Bound, PyTree


class Play(NamedTuple):
    """How players move; everything a dict by player's name.

    ``init(params) -> memory``; ``step(field, move, params, opts, memory) -> (params, opts, memory,
    seen)``, where ``field(params) -> (directions, report)`` gives each player's own gradient,
    ``move(params, directions, opts) -> (params, opts)`` takes a step of each player's optimizer,
    and `seen` is what `field` gave at `params`.
    """

    init: Callable[..., Any]
    step: Callable[..., Any]

    def __repr__(self) -> str:
        return repr(self.step)


def simultaneous() -> Play:
    """Every player follows his own gradient: ``z⁺ = z − a v(z)``.

    Returns:
      A `Play`. It spirals outwards where players oppose each other (a bilinear game), which the
      others are for.

    Examples:
      >>> import bilevax as bx
      >>> bx.games.simultaneous()
      simultaneous()

    Source: Singh, Kearns and Mansour, "Nash convergence of gradient dynamics in general-sum games"
    (UAI 2000).
    """
    return Play(Bound("init", _nothing), Bound("simultaneous", _simultaneous))


def extragradient() -> Play:
    """Every player follows the gradient at where all would be: ``z' = z − a v(z)``, ``z⁺ = z − a
    v(z')``. Both on one batch.

    Returns:
      A `Play`, which converges for monotone fields with a step below the inverse of their Lipschitz
      constant.

    Examples:
      >>> import bilevax as bx
      >>> bx.games.extragradient()
      extragradient()

    Source: Korpelevich 1976; Nemirovski, "Prox-method with rate of convergence O(1/t)" (SIAM J.
    Optimization 2004).
    """
    return Play(Bound("init", _nothing), Bound("extragradient", _extragradient))


def optimistic() -> Play:
    """Every player follows a guess of the next gradient: ``z⁺ = z − a (2 v(z_t) − v(z_{t−1}))``;
    one evaluation a step.

    Returns:
      A `Play`.

    Examples:
      >>> import bilevax as bx
      >>> bx.games.optimistic()
      optimistic()

    Source: Popov 1980; Daskalakis, Ilyas, Syrgkanis and Zeng, "Training GANs with optimism" (ICLR
    2018).
    """
    return Play(Bound("init", _last), Bound("optimistic", _optimistic))


def symplectic(strength: float = 1.0, *, align: bool = True) -> Play:
    """The field with the part that rotates it turned inwards: ``v + τ A'v`` with ``A = (J −
    J')/2``, ``J = ∂v/∂z``.

    Args:
      strength: τ.
      align: τ takes the sign with which the adjustment is drawn to stable fixed points, and away
        from others.

    Returns:
      A `Play`.

    Raises:
      TypeError, ValueError: for arguments of another kind.

    Examples:
      >>> import bilevax as bx
      >>> bx.games.symplectic(0.5)
      symplectic(strength=0.5, align=True)

    Source: Balduzzi et al., "The mechanics of n-player differentiable games" (ICML 2018), algorithm
    1.
    """
    settings = dict(
        strength=numbers.positive(strength, "strength"), align=numbers.flag(align, "align")
    )
    return Play(Bound("init", _nothing), Bound("symplectic", _symplectic, **settings))


def consensus(strength: float = 1.0) -> Play:
    """The field and a pull to where it vanishes: ``v + γ ∇½‖v‖² = v + γ J'v``.

    Args:
      strength: γ.

    Returns:
      A `Play`. It is also drawn to points that are no equilibria, where the field vanishes at a
      maximum.

    Raises:
      TypeError, ValueError: for a strength that is not a positive number.

    Examples:
      >>> import bilevax as bx
      >>> bx.games.consensus(0.5)
      consensus(strength=0.5)

    Source: Mescheder, Nowozin and Geiger, "The numerics of GANs" (NeurIPS 2017), algorithm 2.
    """
    return Play(
        Bound("init", _nothing),
        Bound("consensus", _consensus, strength=numbers.positive(strength, "strength")),
    )


def _nothing(params: PyTree) -> tuple[Any, ...]:
    return ()


def _last(params: PyTree) -> tuple[Any, ...]:
    return tree.zeros_like(params), jnp.asarray(False)


def _simultaneous(field: Any, move: Any, params: PyTree, opts: Any, memory: Any) -> Any:
    seen = field(params)
    return *move(params, seen[0], opts), memory, seen


def _extragradient(field: Any, move: Any, params: PyTree, opts: Any, memory: Any) -> Any:
    seen = field(params)
    ahead, _ = move(params, seen[0], opts)
    return *move(params, field(ahead)[0], opts), memory, seen


def _optimistic(field: Any, move: Any, params: PyTree, opts: Any, memory: Any) -> Any:
    last, known = memory
    seen = field(params)
    change = tree.scale(jnp.where(known, 1.0, 0.0), tree.sub(seen[0], last))
    return *move(params, tree.add(seen[0], change), opts), (seen[0], jnp.asarray(True)), seen


def _symplectic(
    field: Any, move: Any, params: PyTree, opts: Any, memory: Any, *, strength: Any, align: Any
) -> Any:
    v, pulled, seen = _transposed(field, params)
    _, pushed = jax.jvp(lambda z: field(z)[0], (params,), (v,))
    turned = tree.scale(
        0.5, tree.sub(pulled, pushed)
    )  # A'v; `pulled` is also the gradient of ½‖v‖²
    signed: Any = strength
    if align:
        inwards = tree.dot(v, pulled) * tree.dot(turned, pulled)
        signed = strength * jnp.where(inwards / jnp.maximum(tree.size(params), 1) + 0.1 >= 0, 1, -1)
    return *move(params, tree.axpy(signed, turned, v), opts), memory, seen


def _consensus(
    field: Any, move: Any, params: PyTree, opts: Any, memory: Any, *, strength: Any
) -> Any:
    v, pulled, seen = _transposed(field, params)
    return *move(params, tree.axpy(strength, pulled, v), opts), memory, seen


def _transposed(field: Any, params: PyTree) -> tuple[PyTree, PyTree, Any]:
    """``v``, ``J'v`` and what the field gave."""
    v, back, report = jax.vjp(field, params, has_aux=True)
    return v, back(v)[0], (v, report)
