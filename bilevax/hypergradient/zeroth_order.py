"""Hypergradients from solves alone: differences of the solution map along random directions."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import Numeric
from bilevax.base import Bound, Ctx, Feed, Hypergradient, InnerState, Lower, Pullback, PyTree
from bilevax.hypergradient._solve import forward_with


def zeroth_order(
    samples: int = 16, scale: Numeric = 1e-2, *, antithetic: bool = True, chunk: int | None = None
) -> Hypergradient:
    r"""The derivative of a Gaussian-smoothed solution map, by solves at perturbed outer parameters.

    .. math::
        dx = \frac{1}{Q} \sum_{j=1}^{Q} u_j \Big\langle w,
        \frac{y_K(x + \mu u_j) - y_K(x - \mu u_j)}{2\mu} \Big\rangle, \qquad u_j \sim N(0, I)

    Unbiased for the derivative of ``E[y_K(x + μu)]``, where ``y_K`` is what the solver's K steps
    make of their start: right for any solver, through loops, kinks and code without derivatives, at
    a variance that grows with the number of outer parameters. Each solve sees the same batches, the
    same keys and the same start.

    A network's statistics (its model state) are taken as constants: the warning
    ``statistics_constant`` stands where the outer objective reads them.

    Args:
      samples: directions Q. Each costs two solves, one if not antithetic.
      scale: μ, the width of the smoothing. Large values (evolution strategies) see over small
        bumps; too small a one drowns in rounding.
      antithetic: mirrored pairs. Otherwise differences to the unperturbed solve, half as costly and
        of larger variance.
      chunk: directions solved at once; None for all. Fewer need less memory.

    Returns:
      A `Hypergradient`. It draws, so it needs ``key=``; its info has ``gradients`` (those of the
      extra solves), ``hvps`` and ``mixed_products`` (none), and ``spread``, the standard error of
      the estimate's norm.

    Raises:
      TypeError, ValueError: for arguments of another kind or outside their range; when called
        without a key.

    Examples:
      >>> import jax, jax.numpy as jnp, optax, bilevax as bx
      >>> inner = lambda y, x, batch: jnp.sum((y - x) ** 2) / 2
      >>> outer = lambda y, x, batch: jnp.sum(y)
      >>> solver = bx.inner.optax(optax.sgd(0.5), steps=2)
      >>> fn = bx.value_and_hypergrad(
      ...     inner, outer, solver=solver, hypergradient=bx.hypergradient.zeroth_order(samples=500)
      ... )
      >>> bool(
      ...     abs(fn(jnp.zeros(1), jnp.ones(1), key=jax.random.key(0)).grad[0] - 0.75) < 0.15
      ... )  # 1 - 0.5**2, give or take
      True

    Source: Nesterov and Spokoiny, "Random gradient-free minimization of convex functions" (2017);
    Sow, Ji and Liang, "On the convergence theory for Hessian-free bilevel algorithms" (NeurIPS
    2022, PZOBO); Salimans et al., "Evolution strategies as a scalable alternative to reinforcement
    learning" (2017), on antithetic pairs.
    """
    settings = dict(
        samples=numbers.count(samples, "samples"),
        scale=numbers.positive(scale, "scale", example=1e-2),
        antithetic=numbers.flag(antithetic, "antithetic"),
        chunk=None if chunk is None else numbers.count(chunk, "chunk"),
    )
    return Hypergradient(
        init=_init,
        vjp=Bound("zeroth_order", _vjp, **settings),
        order=1,
        extends=False,
        sees_settings=True,
        batches=0,
    )


def _init(inner: PyTree) -> Any:
    return ()


def _vjp(
    lower: Lower,
    inner_state: InnerState,
    outer: PyTree,
    feed: Feed,
    ctx: Ctx,
    state: PyTree,
    *,
    samples: int,
    scale: Any,
    antithetic: bool,
    chunk: int | None,
) -> tuple[InnerState, Pullback]:
    key = ctx.key
    if key is None:
        raise ValueError(
            "key: got None although hypergradient.zeroth_order draws directions; expected a PRNG "
            "key. Try key=jax.random.key(0)."
        )
    solution, info, _ = forward_with(lower, inner_state, outer, feed)

    def solve(direction, sign):
        return lower.run(inner_state, tree.axpy(sign * scale, direction, outer), feed)[0].params

    def pullback(w):
        def one(own):
            direction = tree.normal_like(own, outer)
            ahead = solve(direction, 1.0)
            behind = solve(direction, -1.0) if antithetic else solution.params
            slope = tree.dot(w, tree.sub(ahead, behind)) / (2 * scale if antithetic else scale)
            return tree.scale(slope, direction)

        keys = jax.random.split(jax.random.fold_in(key, 0x5A), samples)
        terms = lax.map(one, keys, batch_size=min(samples, chunk or samples))
        mean = jax.tree.map(lambda a: jnp.mean(a, axis=0), terms)
        squares = jnp.mean(jax.vmap(lambda term: tree.dot(term, term))(terms)) - tree.dot(
            mean, mean
        )
        solves = samples * (2 if antithetic else 1)
        steps = (
            info["inner_iterations"]
            if "inner_iterations" in info
            else jnp.int32(lower.solver.steps)
        )
        report = {
            **info,
            "gradients": solves * jnp.asarray(steps, jnp.int32),
            "hvps": jnp.int32(0),
            "mixed_products": jnp.int32(0),
            "spread": jnp.sqrt(jnp.maximum(squares, 0) / max(samples - 1, 1)),
        }
        return mean, None, state, report

    return solution, pullback
