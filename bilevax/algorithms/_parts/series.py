"""Neumann series on fresh batches, and the hypergradient with an adjoint: what two-loop algorithms
share.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Key, Numeric
from bilevax.algorithms._parts.directions import descend, hessian_product, inner_pass
from bilevax.algorithms._parts.steps import StepSize
from bilevax.base import Ctx, Problem, PyTree


class Contexts(NamedTuple):
    """The contexts of one linearisation point, drawn one after another from a stream: ``at(i)``."""

    draw: Callable[..., Any]
    feed: Any  # what `draw` reads: a `Feed`, or one with where it is to begin
    model: PyTree

    def at(self, i: Any) -> Ctx:
        """The i-th of them."""
        return self.draw(self.feed, i)._replace(model=self.model)


def neumann(
    problem: Problem,
    points: tuple[Any, ...],
    rhs: tuple[Any, ...],
    hyper: Contexts,
    num: Any,
    size: Any,
) -> tuple[Any, ...]:
    """``a Σ_{q=0}^{num} Π_{i≤q} (I − a H_i) w`` at several points at once, on shared batches: Ji et
    al.'s series with fresh batches.

    Args:
      problem: both objectives.
      points: ``(y, x)`` pairs.
      rhs: a ``w`` for each.
      hyper: contexts of the products, one an iteration.
      num: Hessian-vector products at each point.
      size: ``a``.
    """

    def body(i, carry):
        terms, sums = carry
        terms = _contracted(problem, points, terms, hyper.at(i), size)
        return terms, tuple(map(tree.add, sums, terms))

    _, sums = lax.fori_loop(0, num, body, (rhs, rhs))
    return tuple(tree.scale(size, s) for s in sums)


def truncated(
    problem: Problem,
    points: tuple[Any, ...],
    rhs: tuple[Any, ...],
    hyper: Contexts,
    num: int,
    size: Any,
    key: Key,
) -> tuple[Any, ...]:
    """``Q a Π_{i<p} (I − a H_i) w`` with ``p`` uniform on 0 to Q − 1: one unbiased term of the
    Neumann series of Q (Ghadimi and Wang).

    Arguments as `neumann`, with ``Q = num``; at most Q − 1 contexts are drawn.
    """
    p = jax.random.randint(key, (), 0, num, jnp.int32)
    terms = lax.fori_loop(
        0, p, lambda i, terms: _contracted(problem, points, terms, hyper.at(i), size), rhs
    )
    return tuple(tree.scale(num * size, t) for t in terms)


def _contracted(
    problem: Problem, points: Any, terms: Any, ctx: Ctx, size: Any
) -> tuple[PyTree, ...]:
    return tuple(
        descend(t, size, hessian_product(problem, y, x, t, ctx))
        for (y, x), t in zip(points, terms, strict=True)
    )


def adjoint_hypergradient(
    problem: Problem, y: PyTree, x: PyTree, q: PyTree, f_x: PyTree, ctx: Ctx
) -> PyTree:
    """``∇_x f − ∇²_xy g·q``."""
    return tree.sub(f_x, inner_pass(problem, y, x, q, ctx).cross)


def neumann_settings(
    inner_step: StepSize, neumann_step: Numeric | None, neumann_steps: int
) -> dict[Any, Any]:
    """``size`` and ``terms`` of a Neumann series."""
    if neumann_step is None:
        if hasattr(inner_step, "init"):
            raise ValueError(
                "neumann_step: got None with an optax transformation as inner_step; expected a "
                "positive number. Try neumann_step=0.1."
            )
        neumann_step = inner_step
    return dict(
        size=numbers.positive(neumann_step, "neumann_step"),
        terms=numbers.count(neumann_steps, "neumann_steps"),
    )
