"""The damped inverse of a network's curvature, block by block: how it is made from its examples'
gradients, kept, and applied.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from bilevax import tree
from bilevax._core import numbers
from bilevax._core.types import PyTree
from bilevax.base import Bound
from bilevax.linear._capture import matrices
from bilevax.linear._curvature import (
    Gradients,
    Layers,
    Part,
    Plan,
    alone,
    averaged,
    drawn,
    eigenvectors,
    gradients,
    moments,
    of_block,
    plan,
    summed,
    surrogate,
)
from bilevax.linear.preconditioner import Point, Preconditioner

SHARE = 0.1  # of the mean eigenvalue of a block: the customary damping


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts", "key"], meta_fields=["layers"]
)
class Curvature:
    """What is kept of a network's curvature.

    Attributes:
      parts: eigenvectors and damped eigenvalues of each leaf's block.
      key: PRNG key of the next refresh.
      layers: how each leaf is treated.
    """

    def __init__(self, parts: list[Part], key: Any, layers: Layers):
        self.parts, self.key, self.layers = parts, key, layers


@jax.tree_util.register_static
@dataclasses.dataclass(frozen=True)
class Settings:
    kind: str
    outputs: Any
    relabel: Any
    draws: Any
    small: int
    largest: int
    at_once: int | None


def no_products(b: PyTree) -> int:
    return 0


def init(b: PyTree, *, layers: Any, key: Any) -> Any:
    """With layers a state with which nothing is done; without, what it will look like is not
    known.
    """
    if layers is None:
        return None
    leaves = jax.tree.leaves(b)
    if [leaf.shape for leaf in leaves] != [block.shape for block in layers]:
        shapes = [list(leaf.shape) for leaf in leaves]
        raise ValueError(
            f"layers: got blocks of {[list(block.shape) for block in layers]} for parameters "
            f"{shapes}. Try linear.layers of this objective."
        )
    parts = []
    for block, leaf in zip(layers, leaves, strict=True):
        count, height, width = block.sizes
        dtype = tree.accumulator(leaf)
        same = lambda n, dense, count=count, dtype=dtype: (
            jnp.broadcast_to(jnp.eye(n, dtype=dtype), (count, n, n)) if dense else None
        )
        parts.append(
            Part(
                same(height, block.left),
                same(width, block.right),
                jnp.ones((count, height, width), dtype),
            )
        )
    return Curvature(parts, jax.random.key(0) if key is None else key, layers)


def blind(matvec: Callable[[PyTree], PyTree], state: Any, *, settings: Any) -> None:
    raise TypeError(
        f"linear.{settings.kind}: got products with a matrix and not the objective behind it; "
        "expected to be called by hypergradient.implicit or "
        "attribution.implicit. Try linear.nystrom or linear.nystrom_preconditioner here."
    )


def at(point: Point, *, settings: Any, damping: Any, layers: Any, key: Any) -> Preconditioner:
    return Preconditioner(
        init=Bound("init", init, layers=layers, key=key),
        refresh=Bound(
            "refresh",
            refreshed,
            point=point,
            settings=settings,
            damping=damping,
            layers=layers,
            key=key,
        ),
        apply=Bound(settings.kind, apply),
        cost=no_products,
        kept=layers is not None,
    )


def refreshed(
    matvec: Callable[[PyTree], PyTree],
    state: Any,
    *,
    point: Point,
    settings: Settings,
    damping: Any,
    layers: Any,
    key: Any,
) -> Curvature:
    known = state.key if state is not None else key
    next_key, use = jax.random.split(jax.random.key(0) if known is None else known)
    if isinstance(settings.draws, str):
        shapes = jax.eval_shape(
            lambda: point.call(
                settings.outputs[0], point.params, jax.tree.map(lambda a: a[0], alone(point.batch))
            )
        )
        count, every = shapes.shape[-1], True
    else:
        count, every = int(settings.draws), False
    if settings.relabel is None and settings.outputs is None:
        count = 1  # the data's labels are what they are
    examples = lambda number, key: drawn(
        point, settings.relabel, settings.outputs, key, number, every
    )
    shape = jax.eval_shape(lambda: jax.tree.map(lambda a: a[0], examples(0, use)))
    made = plan(
        surrogate(point, settings.outputs),
        point.params,
        shape,
        small=settings.small,
        largest=settings.largest,
        kronecker=settings.kind != "diagonal",
    )
    if layers is not None and made.layers != layers:
        raise ValueError(
            f"layers: got\n{layers}\nwhere the objective has\n{made.layers}\nTry linear.layers of "
            "this objective."
        )

    def mean(fn: Callable[[Gradients], PyTree]) -> PyTree:
        """Over examples and draws."""

        def draw(number):
            taken = lambda some: fn(jax.vmap(lambda one: gradients(made, point.params, one))(some))
            return averaged(
                taken, examples(number, jax.random.fold_in(use, number)), settings.at_once
            )

        if count == 1:
            return draw(jnp.int32(0))
        return jax.tree.map(lambda a: a / count, summed(draw, jnp.arange(count, dtype=jnp.int32)))

    found = mean(lambda got: moments(made, got))
    bases = [bases_of(made, number, found[number]) for number in range(len(made.layers))]
    if settings.kind == "ekfac" and any(made.uses):
        squares = mean(lambda got: squares_of(made, bases, got))
        bases = [
            (left, right, values if new is None else new)
            for (left, right, values), new in zip(bases, squares, strict=True)
        ]
    if settings.outputs is None:
        bases = [centred(made, number, found[number], base) for number, base in enumerate(bases)]
    leaves = jax.tree.leaves(point.params)
    parts = [
        Part(left, right, damped(values, leaf, damping, point.damping))
        for (left, right, values), leaf in zip(bases, leaves, strict=True)
    ]
    return Curvature(parts, next_key, made.layers)


def bases_of(made: Plan, number: int, found: Any) -> tuple[Any, Any, jax.Array]:
    """Eigenvectors of both sides, and the eigenvalues that the moments alone give."""
    block = made.layers[number]
    if block.kind == "full":
        values, vectors = jnp.linalg.eigh(found[0])
        return vectors[None], None, jnp.maximum(values, 0)[None, :, None]
    if block.kind == "diagonal":
        return None, None, found[0].reshape(block.sizes)
    sides, size = found
    left, along_left = eigenvectors([a for a, _ in sides], block.left)
    right, along_right = eigenvectors([b for _, b in sides], block.right)
    return left, right, size[:, None, None] * along_left[:, :, None] * along_right[:, None, :]


def squares_of(made: Plan, bases: list[Any], got: Gradients) -> list[Any]:
    """Along the eigenvectors, the squares of each leaf's gradients, summed over examples."""
    return [
        jnp.sum(of_block(made, number, got, left, right) ** 2, 0) if made.uses[number] else None
        for number, (left, right, _) in enumerate(bases)
    ]


def centred(
    made: Plan, number: int, found: Any, base: tuple[Any, ...]
) -> tuple[Any, Any, jax.Array]:
    """Without what all examples share: the gradient of a leaf that is not captured holds the
    regulariser's.
    """
    if made.uses[number]:
        return base
    square, mean = found
    shared = jnp.outer(mean, mean) if made.layers[number].kind == "full" else mean**2
    left, right, values = bases_of(made, number, (square - shared, mean))
    return left, right, jnp.maximum(values, 0)


def damped(values: jax.Array, leaf: jax.Array, own: Any, added: Any) -> jax.Array:
    if own is None and added is None:
        damping = SHARE * jnp.mean(values)
    else:
        damping = jnp.asarray(0.0 if own is None else own, values.dtype) + jnp.asarray(
            0.0 if added is None else added, values.dtype
        )
    floor = numbers.rounding_unit(values.dtype) * jnp.max(values)
    total = values + jnp.maximum(damping, floor)
    return jnp.where(total > 0, total, 1)


def apply(state: Curvature, v: PyTree) -> PyTree:
    leaves, treedef = jax.tree.flatten(v)
    return treedef.unflatten(
        [
            solved(block, part, leaf)
            for block, part, leaf in zip(state.layers, state.parts, leaves, strict=True)
        ]
    )


def solved(block: Any, part: Part, leaf: jax.Array) -> jax.Array:
    wide = matrices(block.layout, leaf).astype(part.divisor.dtype)
    if part.left is not None:
        wide = jnp.einsum("lrk,lrc->lkc", part.left, wide)
    if part.right is not None:
        wide = jnp.einsum("lkc,lcm->lkm", wide, part.right)
    wide = wide / part.divisor
    if part.right is not None:
        wide = jnp.einsum("lkm,lcm->lkc", wide, part.right)
    if part.left is not None:
        wide = jnp.einsum("lrk,lkc->lrc", part.left, wide)
    (back,) = jax.linear_transpose(lambda a: matrices(block.layout, a), leaf)(
        wide.astype(leaf.dtype)
    )
    return back
