"""Approximate inverses of a network's Gauss-Newton or Fisher matrix, made of its layers: K-FAC,
EK-FAC, and the diagonal.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import Bound, Ctx, Linear, LinearInfo, Objective
from bilevax.linear import _common, _factors
from bilevax.linear._curvature import Layers, plan
from bilevax.linear.preconditioner import Preconditioner, started

_SMALL, _LARGEST = 256, 4096


def kfac(
    outputs: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    *,
    relabel: Callable[..., Any] | None = None,
    draws: int | str = 4,
    damping: float | None = None,
    layers: Layers | None = None,
    small: int = _SMALL,
    largest: int = _LARGEST,
    at_once: int | None = None,
    key: jax.Array | None = None,
) -> Linear:
    r"""Kronecker-factored approximate curvature: the inverse of a network's Gauss-Newton matrix,
    layer by layer.

    .. math::
        s = W a, \quad g = \partial \ell / \partial s, \quad
        F_W \approx c\, E[a a^\top] \otimes E[g g^\top], \qquad x = (F + \lambda I)^{-1} b

    with c so that the trace is that of the block. As `ekfac`, without its second pass over the
    examples; see there.

    Args:
      outputs: as for `ekfac`.
      relabel: as for `ekfac`.
      draws: as for `ekfac`.
      damping: as for `ekfac`.
      layers: as for `ekfac`.
      small: as for `ekfac`.
      largest: as for `ekfac`.
      at_once: as for `ekfac`.
      key: as for `ekfac`.

    Returns:
      As `ekfac`.

    Raises:
      TypeError, ValueError: as `ekfac`.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> solver = bx.linear.kfac(damping=0.1)
      >>> bx.linear.cg(preconditioner=solver)  # or as it is
      cg(maxiter=100, tol=1e-06, preconditioner=kfac())

    Source: Martens and Grosse 2015, Optimizing Neural Networks with Kronecker-factored Approximate
    Curvature; Eschenhagen et al. 2023, Kronecker-Factored Approximate Curvature for Modern Neural
    Network Architectures, for shared weights.
    """
    return _made("kfac", outputs, relabel, draws, damping, layers, small, largest, at_once, key)


def ekfac(
    outputs: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    *,
    relabel: Callable[..., Any] | None = None,
    draws: int | str = 4,
    damping: float | None = None,
    layers: Layers | None = None,
    small: int = _SMALL,
    largest: int = _LARGEST,
    at_once: int | None = None,
    key: jax.Array | None = None,
) -> Linear:
    r"""Eigenvalue-corrected Kronecker factors: a network's curvature along the eigenvectors of its
    layers' inputs and output gradients.

    .. math::
        E[a a^\top] = Q_A \cdot Q_A^\top, \; E[g g^\top] = Q_S \cdot Q_S^\top, \quad
        \Lambda = E[(Q_A^\top G Q_S)^2], \qquad
        x = Q_A \frac{Q_A^\top b\, Q_S}{\Lambda + \lambda} Q_S^\top

    A direct answer (influence functions), or a preconditioner:
    ``linear.cg(preconditioner=linear.ekfac(...))``, likewise for `minres` and `neumann`. It reads
    the objective, a mean over the leading axis of its batch, one example at a time:
    `hypergradient.implicit` and `attribution.implicit` show it; where only products are known it is
    refused. Dense layers and other products with a parameter, convolutions, embeddings, parameters
    used several times, stacked layers inside ``lax.scan``; small leaves (biases, normalisation)
    have their full block, what remains its diagonal: `linear.layers` lists what was found. A
    batch's statistics (BatchNorm in training) are those of one example here: use frozen ones. What
    all examples share, such as a weight decay, is left out: let `damping` hold it.

    Args:
      outputs: the objective as a pair ``(network, loss)``: ``network`` takes the objective's
        arguments and returns an array, ``loss`` takes that in place of the inner parameters, and is
        a sum of terms for each position along its last axis (classes). The factors are then the
        Gauss-Newton matrix's, in its scale. Recommended.
      relabel: instead, takes the objective's arguments and ``key=``, and returns the batch with
        labels drawn from the model: the Fisher matrix. Its scale is that of an objective whose
        example's loss is the negative logarithm of a probability; for a mean over T drawn labels it
        is T times too small.
        With neither, labels are the data's: the empirical Fisher, wrong in scale and near a
        solution in direction.
      draws: draws of the labels (or cotangents), at least 1; "all": one for each class, exact where
        an example has one label (with `outputs` only).
      damping: λ, beside what the method adds (``implicit(damping=...)``). None: nothing more where
        that adds something, else a tenth of the mean eigenvalue, block by block, which is customary
        for influence functions.
      layers: from `linear.layers`. With it the factors are kept in the method's state and refreshed
        by ``implicit(refresh=...)``; without, they are made in each solve.
      small: leaves of other kinds up to this many entries have their full block.
      largest: a side of a layer with more entries has no eigenvectors; its coordinates stay as they
        are.
      at_once: examples whose gradients are held at once; None for all.
      key: PRNG key of the first draw; None takes ``jax.random.key(0)``.

    Returns:
      A `LinearSolver` which holds a `Preconditioner`. One product measures the residual. The code
      is success where that is below one of x = 0, else ``adjoint_not_converged``, or
      ``adjoint_nonfinite``.

    Raises:
      TypeError, ValueError: for arguments of another kind or not positive; where only products with
        the matrix are known.

    Examples:
      >>> import jax, jax.numpy as jnp, bilevax as bx
      >>> network = lambda w, rows: rows["x"] @ w
      >>> loss = lambda out, rows: 0.5 * jnp.sum((out - rows["y"]) ** 2, -1)
      >>> rows = {"x": jax.random.normal(jax.random.key(0), (64, 3)), "y": jnp.ones((64, 1))}
      >>> found = bx.attribution.implicit(
      ...     lambda w, rows: loss(network(w, rows), rows),
      ...     lambda w, _: jnp.sum(w),
      ...     jnp.ones((3, 1)),
      ...     rows,
      ...     linear=bx.linear.ekfac((network, loss), draws="all", damping=1e-6),
      ... )
      >>> bool(found.info["residual"] < 1e-2)  # one output: the factors are exact
      True

    Source: George et al. 2018, Fast Approximate Natural Gradient Descent in a Kronecker-factored
    Eigenbasis; Grosse et al. 2023, Studying Large Language Model Generalization with Influence
    Functions.
    """
    return _made("ekfac", outputs, relabel, draws, damping, layers, small, largest, at_once, key)


def diagonal(
    outputs: tuple[Callable[..., Any], Callable[..., Any]] | None = None,
    *,
    relabel: Callable[..., Any] | None = None,
    draws: int | str = 4,
    damping: float | None = None,
    layers: Layers | None = None,
    at_once: int | None = None,
    key: jax.Array | None = None,
) -> Linear:
    r"""The diagonal of a network's Gauss-Newton matrix, from its examples' gradients.

    .. math::
        x = b / (E[g^2] + \lambda)

    Args:
      outputs: as for `ekfac`.
      relabel: as for `ekfac`.
      draws: as for `ekfac`.
      damping: as for `ekfac`.
      layers: as for `ekfac`, from ``linear.layers(..., kronecker=False)``.
      at_once: as for `ekfac`.
      key: as for `ekfac`.

    Returns:
      As `ekfac`.

    Raises:
      TypeError, ValueError: as `ekfac`.

    Examples:
      >>> import bilevax as bx
      >>> bx.linear.diagonal(damping=0.1)
      diagonal(preconditioner=diagonal())

    Source: Becker and LeCun 1989, Improving the Convergence of Back-Propagation Learning with
    Second Order Methods.
    """
    return _made("diagonal", outputs, relabel, draws, damping, layers, 1, 1, at_once, key)


def layers(
    objective: Callable[..., Any],
    params: PyTree,
    *arguments: PyTree,
    small: int = _SMALL,
    largest: int = _LARGEST,
    kronecker: bool = True,
) -> Layers:
    """What `kfac` and `ekfac` make of an objective's parameters, leaf by leaf. Nothing is computed.

    Args:
      objective: as it is minimised: ``(inner, outer, batch[, model_state]) -> scalar``, or
        ``(params, rows)`` for influence.
      params: the inner parameters, or their shapes.
      *arguments: its other arguments, or their shapes.
      small: as for `ekfac`.
      largest: as for `ekfac`.
      kronecker: False for those of `diagonal`.

    Returns:
      A tuple of blocks, to be printed, or given to `ekfac` as ``layers=``.

    Raises:
      TypeError: without a batch; ValueError: for parameters without a floating-point leaf.

    Examples:
      >>> import jax.numpy as jnp, bilevax as bx
      >>> model = lambda p, rows: jnp.mean((jnp.tanh(rows @ p["w"] + p["b"]) @ p["v"]) ** 2)
      >>> bx.linear.layers(
      ...     model,
      ...     {"b": jnp.zeros(3), "v": jnp.zeros((3, 1)), "w": jnp.zeros((2, 3))},
      ...     jnp.ones((8, 2)),
      ... )
      leaf   shape  block
      ['b']  3      full 3
      ['v']  3x1    3 x 1
      ['w']  2x3    2 x 3
    """
    small, largest = numbers.count(small, "small"), numbers.count(largest, "largest")
    kronecker = numbers.flag(kronecker, "kronecker")
    if not callable(objective):
        raise TypeError(
            f"objective: got {numbers.shown(objective)}; expected a function (inner, outer, batch) "
            "-> scalar."
        )
    if not arguments:
        raise TypeError(
            "arguments: got none; expected the objective's arguments behind the inner parameters, "
            "its batch among them."
        )
    numbers.arrays((params, arguments), "params")
    place = 0 if len(arguments) == 1 else 1
    floats, fixed = tree.partition(jax.tree.map(_shape, params))
    if not jax.tree.leaves(floats):
        raise ValueError(
            f"params: got {numbers.describe(params)}, which has no floating-point leaf; expected "
            "parameters."
        )
    batch, rest = jax.tree.map(_shape, (arguments[place], arguments))

    def value(params, given):
        example, rest = given
        full = list(rest)
        full[place] = example
        whole = tree.combine(params, fixed)
        if isinstance(objective, Objective):
            model = full[2] if len(full) > 2 else None
            return objective(whole, full[0], Ctx(full[1], jax.random.key(0), model))[0]
        return jnp.mean(objective(whole, *full))

    fixed = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), fixed)
    example = jax.tree.map(lambda a: jax.ShapeDtypeStruct((1, *a.shape[1:]), a.dtype), batch)
    return plan(
        value, floats, (example, rest), small=small, largest=largest, kronecker=kronecker
    ).layers


def _shape(a: Any) -> jax.ShapeDtypeStruct:
    return a if isinstance(a, jax.ShapeDtypeStruct) else jax.eval_shape(lambda: jnp.asarray(a))


def _made(
    kind: Any,
    outputs: Any,
    relabel: Any,
    draws: Any,
    damping: Any,
    layers: Any,
    small: Any,
    largest: Any,
    at_once: Any,
    key: Any,
) -> Linear:
    if outputs is not None and not (
        isinstance(outputs, tuple) and len(outputs) == 2 and all(map(callable, outputs))
    ):
        raise TypeError(
            f"outputs: got {numbers.shown(outputs)}; expected a pair of functions, (network, loss)."
        )
    if not (relabel is None or callable(relabel)):
        raise TypeError(
            f"relabel: got {numbers.shown(relabel)}; expected a function of the objective's "
            "arguments and key=."
        )
    if relabel is not None and outputs is not None:
        raise TypeError("relabel: got a function beside outputs=; expected one of the two.")
    if isinstance(draws, str):
        numbers.choice(draws, "draws", ["all"])
        if outputs is None:
            raise ValueError(
                "draws: got 'all' without outputs=; expected a number. Try outputs=(network, loss)."
            )
    else:
        draws = numbers.count(draws, "draws", why=" or 'all'")
    if not (layers is None or isinstance(layers, Layers)):
        raise TypeError(f"layers: got {numbers.shown(layers)}; expected what linear.layers found.")
    damping = (
        None if damping is None else numbers.positive(damping, "damping", zero=True, example=1e-3)
    )
    small, largest = numbers.count(small, "small"), numbers.count(largest, "largest")
    at_once = None if at_once is None else numbers.count(at_once, "at_once")
    key = None if key is None else numbers.key(key)
    settings = _factors.Settings(kind, outputs, relabel, draws, small, largest, at_once)
    held = Preconditioner(
        init=Bound("init", _factors.init, layers=layers, key=key),
        refresh=Bound("refresh", _factors.blind, settings=settings),
        apply=Bound(kind, _factors.apply),
        cost=_factors.no_products,
        at=Bound("at", _factors.at, settings=settings, damping=damping, layers=layers, key=key),
        kept=layers is not None,
    )
    return Linear(Bound(kind, _direct), products=1, approximate=True, preconditioner=held)


def _direct(
    matvec: Callable[[PyTree], PyTree], b: PyTree, x0: PyTree = None, *, preconditioner: Any
) -> tuple[PyTree, LinearInfo]:
    b, _ = _common.prepare(b, b)
    inverse, products = started(preconditioner, matvec, b)
    x = b if inverse is None else inverse(b)
    residual = _common.relative(tree.norm(tree.sub(b, matvec(x))), tree.norm(b))
    return x, _common.info(products + 1, residual, jnp.int32(0))
