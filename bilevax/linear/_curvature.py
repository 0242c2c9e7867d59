"""Statistics of per-example gradients: moments of a layer's inputs and output gradients, and the
curvature along their eigenvectors.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from bilevax import tree
from bilevax._core.types import PyTree
from bilevax.linear._capture import Layout, Use, Walk, layout, matrices, rows
from bilevax.linear.preconditioner import Point


class Block(NamedTuple):
    """How one leaf's block of the matrix is approximated. All static.

    Attributes:
      name: the leaf's path.
      shape: its shape.
      kind: "kronecker", "full" or "diagonal".
      layout: how the leaf becomes matrices ``[layers, in, out]``.
      left: whether the side of the inputs has eigenvectors, or stays as it is.
      right: likewise for the outputs.
    """

    name: str
    shape: tuple[int, ...]
    kind: str
    layout: Layout
    left: bool
    right: bool

    @property
    def sizes(self) -> tuple[int, int, int]:
        """Layers, rows, columns."""
        return matrices(self.layout, _Shape(self.shape)).shape


class _Shape:
    """An array without entries, for `matrices`."""

    def __init__(self, shape: Any):
        self.shape = tuple(shape)

    def reshape(self, *shape: Any) -> Any:
        size, known = int(np.prod(self.shape)), int(np.prod([n for n in shape if n >= 0]))
        return _Shape(size // known if n < 0 else n for n in shape)

    def transpose(self, axes: Any) -> Any:
        return _Shape(self.shape[i] for i in axes)


@jax.tree_util.register_static
class Layers(tuple[Any, ...]):
    """The blocks of all leaves; printed, a table."""

    def __repr__(self) -> str:
        lines = [("leaf", "shape", "block")]
        for block in self:
            layers, left, right = block.sizes
            side = lambda n, dense: f"{n}" if dense else f"diagonal {n}"
            what = {
                "kronecker": f"{side(left, block.left)} x {side(right, block.right)}",
                "full": f"full {left}",
                "diagonal": "diagonal",
            }[block.kind]
            lines.append(
                (
                    block.name,
                    "x".join(map(str, block.shape)) or "()",
                    what + (f", {layers} times" if layers > 1 else ""),
                )
            )
        widths = [max(len(line[i]) for line in lines) for i in range(2)]
        return "\n".join(f"{a:{widths[0]}}  {b:{widths[1]}}  {c}" for a, b, c in lines)


class Part(NamedTuple):
    """One block: eigenvectors of both sides (None: the identity), and what coordinates in them are
    divided by.
    """

    left: Any
    right: Any
    divisor: Any


class Plan(NamedTuple):
    """The program of one example with what is to be collected from it."""

    walk: Walk
    layers: Layers
    uses: list[
        list[tuple[int, bool]]
    ]  # of each leaf: which uses, and whether inputs and outputs change places


def plan(
    value: Callable[..., Any],
    params: PyTree,
    example: PyTree,
    *,
    small: int,
    largest: int,
    kronecker: bool = True,
) -> Plan:
    """What the blocks of a program's parameters are. `example`: a batch of one, or shapes."""
    walk = Walk(value, params, example)
    blocks: list[Block] = []
    found: list[list[tuple[int, bool]]] = []
    paths = jax.tree_util.tree_leaves_with_path(params)
    for number, (path, leaf) in enumerate(paths):
        uses = (
            [(i, use) for i, use in enumerate(walk.uses) if use.tag.leaf == number]
            if kronecker
            else []
        )
        places = _agreeing([use for _, use in uses], leaf.shape)
        name = jax.tree_util.keystr(path) or "params"
        size = int(np.prod(leaf.shape))
        if places is None:
            kind = "full" if size <= small and kronecker else "diagonal"
            flat = Layout(0, (("reshape", (size, 1)),), (), (0,), (1,))
            blocks.append(Block(name, tuple(leaf.shape), kind, flat, kind == "full", False))
            found.append([])
            continue
        how = layout(uses[0][1])
        _, left, right = Block(name, tuple(leaf.shape), "", how, True, True).sizes
        looked = [use.kind == "gather" for _, use in uses]
        by_row = all(look and not swapped for look, swapped in zip(looked, places, strict=True))
        by_column = all(look and swapped for look, swapped in zip(looked, places, strict=True))
        blocks.append(
            Block(
                name,
                tuple(leaf.shape),
                "kronecker",
                how,
                left <= largest and not by_row,
                right <= largest and not by_column,
            )
        )
        found.append([(i, swapped) for (i, _), swapped in zip(uses, places, strict=True)])
    return Plan(walk, Layers(blocks), found)


def _agreeing(uses: Sequence[Use], shape: Any) -> list[bool] | None:
    """Of each use of one leaf, whether its inputs are the outputs of the first; None where they are
    neither, or there is no use.
    """
    if not uses:
        return None
    if len(uses) == 1:
        return [False]
    numbered = np.arange(int(np.prod(shape))).reshape(shape)
    first, places = matrices(layout(uses[0]), numbered), []
    for use in uses:
        mine = matrices(layout(use), numbered)
        if mine.shape == first.shape and (mine == first).all():
            places.append(False)
        elif (
            mine.transpose(0, 2, 1).shape == first.shape
            and (mine.transpose(0, 2, 1) == first).all()
        ):
            places.append(True)
        else:
            return None
    return places


# ---- per-example gradients


class Gradients(NamedTuple):
    """Of one example or, with an axis in front, of many: rows of each use, and gradients of the
    leaves without a use.
    """

    rows: list[tuple[jax.Array, jax.Array]]
    rest: list[Any]


def gradients(made: Plan, params: PyTree, example: PyTree) -> Gradients:
    """Those of one example."""

    def value(added, leaves):
        return made.walk(jax.tree.unflatten(jax.tree.structure(params), leaves), example, added)

    (by_product, by_leaf), found = jax.grad(value, (0, 1), has_aux=True)(
        made.walk.zeros(), jax.tree.leaves(params)
    )
    wide = lambda a: a.astype(tree.accumulator(a)) if tree.is_float(a) else a
    taken = [
        tuple(map(wide, rows(use, x, g)))
        for use, x, g in zip(made.walk.uses, found, by_product, strict=True)
    ]
    rest = [
        None if uses else wide(g).reshape(-1) for uses, g in zip(made.uses, by_leaf, strict=True)
    ]
    return Gradients(taken, rest)


def of_block(
    made: Plan, number: int, got: Gradients, left: Any = None, right: Any = None
) -> jax.Array:
    """Gradients ``[examples, layers, in, out]`` of a leaf with uses, in the coordinates of its
    eigenvectors.
    """
    total: Any = 0
    _, height, width = made.layers[number].sizes
    for i, swapped in made.uses[number]:
        x, g = got.rows[i]
        if made.walk.uses[i].kind == "gather":
            count = width if swapped else height
            whole = jax.vmap(
                jax.vmap(
                    lambda at, rows, count=count: (
                        jnp.zeros((count, rows.shape[-1]), rows.dtype).at[at].add(rows)
                    )
                )
            )(x, g)
            whole = whole.swapaxes(-1, -2) if swapped else whole
            total = total + _turned(_turned(whole, right).swapaxes(-1, -2), left).swapaxes(-1, -2)
        else:
            a, b = (g, x) if swapped else (x, g)
            total = total + jnp.einsum("nltr,nltc->nlrc", _turned(a, left), _turned(b, right))
    return total


def _turned(values: jax.Array, basis: Any) -> jax.Array:
    """``[examples, layers, tokens, side]`` in the coordinates of the side's eigenvectors."""
    return values if basis is None else jnp.einsum("nlts,lsk->nltk", values, basis)


# ---- moments


def moments(made: Plan, got: Gradients) -> list[Any]:
    """Of each leaf, summed over examples: second moments of both sides a use, and those of its
    gradient.
    """
    out: list[Any] = []
    for number, block in enumerate(made.layers):
        if not made.uses[number]:
            g = got.rest[number]
            out.append(
                (
                    jnp.einsum("ni,nj->ij", g, g) if block.kind == "full" else jnp.sum(g**2, 0),
                    jnp.sum(g, 0),
                )
            )
            continue
        sides = [_sides(made, block, got, i, swapped) for i, swapped in made.uses[number]]
        out.append((sides, jnp.sum(of_block(made, number, got) ** 2, (0, 2, 3))))
    return out


def _sides(
    made: Plan, block: Block, got: Gradients, i: int, swapped: bool
) -> tuple[jax.Array, jax.Array]:
    x, g = got.rows[i]
    _, height, width = block.sizes
    looked = made.walk.uses[i].kind == "gather"

    def side(a, dense, count):
        if a is x and looked:
            counts = jnp.zeros((1, count), g.dtype).at[0, a.reshape(-1)].add(1)
            return jax.vmap(jnp.diag)(counts) if dense else counts
        return jnp.einsum("nlti,nltj->lij", a, a) if dense else jnp.einsum("nlti,nlti->li", a, a)

    first, second = (g, x) if swapped else (x, g)
    return side(first, block.left, height), side(second, block.right, width)


def eigenvectors(sides: Sequence[jax.Array], dense: bool) -> tuple[Any, jax.Array]:
    """Eigenvectors and eigenvalues of the mean of some moments, each scaled to a trace of one."""

    def scaled(a):
        trace = (
            jnp.trace(a, axis1=-2, axis2=-1)[:, None, None]
            if dense
            else jnp.sum(a, -1, keepdims=True)
        )
        return a / jnp.where(trace > 0, trace, 1)

    mean = sum(map(scaled, sides)) / len(sides)
    if not dense:
        return None, mean
    values, vectors = jnp.linalg.eigh(mean)
    return vectors, jnp.maximum(values, 0)


def summed(fn: Callable[[PyTree], PyTree], rows: PyTree) -> PyTree:
    """The sum of `fn` over rows, one at a time."""
    shapes = jax.eval_shape(lambda rows: fn(jax.tree.map(lambda a: a[0], rows)), rows)
    zero = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
    return lax.scan(lambda total, row: (tree.add(total, fn(row)), None), zero, rows)[0]


def averaged(fn: Callable[[PyTree], PyTree], examples: PyTree, at_once: int | None) -> PyTree:
    """The mean over examples of what `fn` sums over some of them, `at_once` in one piece."""
    count = jax.tree.leaves(examples)[0].shape[0]
    if at_once is None or at_once >= count:
        return jax.tree.map(lambda a: a / count, fn(examples))
    whole = count // at_once * at_once
    pieces = jax.tree.map(lambda a: a[:whole].reshape(-1, at_once, *a.shape[1:]), examples)
    total = summed(fn, pieces)
    if whole < count:
        total = tree.add(total, fn(jax.tree.map(lambda a: a[whole:], examples)))
    return jax.tree.map(lambda a: a / count, total)


# ---- what the gradients are of


def drawn(
    point: Point, relabel: Any, outputs: Any, key: jax.Array, number: Any, every: bool
) -> PyTree:
    """Examples whose gradients have the matrix as second moment: rows with labels drawn from the
    model, or with cotangents of its outputs.
    """
    if relabel is not None:
        return alone(point.call(relabel, point.params, point.batch, key=key))
    if outputs is None:
        return alone(point.batch)
    network, loss = outputs
    examples = alone(point.batch)
    count = jax.tree.leaves(examples)[0].shape[0]

    def one(example, key):
        found = point.call(network, point.params, example)
        return example, _root(
            lambda out: jnp.mean(point.call(loss, out, example)), found, key, number, every
        )

    return jax.vmap(one)(examples, jax.random.split(key, count))


def surrogate(point: Point, outputs: Any) -> Callable[[PyTree, PyTree], Any]:
    """What is differentiated: the objective of one example, or the outputs' inner product with a
    cotangent.
    """
    if outputs is None:
        return lambda params, example: point.value(params, example)
    return lambda params, example: jnp.sum(point.call(outputs[0], params, example[0]) * example[1])


def alone(batch: PyTree) -> PyTree:
    """A batch as many batches of one example."""
    return jax.tree.map(lambda a: jnp.asarray(a)[:, None], batch)


def _root(
    loss: Callable[..., Any], out: jax.Array, key: jax.Array, number: Any, every: bool
) -> jax.Array:
    """A random vector whose second moment is the loss' Hessian, that Hessian being a block for each
    position along the last axis.
    """
    classes = out.shape[-1]
    _, product = jax.linearize(jax.grad(loss), out)
    columns = jax.vmap(lambda e: product(jnp.broadcast_to(e, out.shape)))(
        jnp.eye(classes, dtype=out.dtype)
    )
    wide = tree.accumulator(out)
    hessian = jnp.moveaxis(columns, 0, -1).astype(wide)
    values, vectors = jnp.linalg.eigh((hessian + hessian.swapaxes(-1, -2)) / 2)
    half = vectors * jnp.sqrt(jnp.maximum(values, 0))[..., None, :]
    if every:  # one column at a time, with a sign for each position
        sign = jax.random.rademacher(key, out.shape[:-1], wide)
        chosen = jnp.broadcast_to(jnp.arange(classes, dtype=jnp.int32) == number, out.shape).astype(
            wide
        )
        weights = sign[..., None] * chosen * float(np.sqrt(classes))
    else:
        weights = jax.random.rademacher(key, out.shape, wide)
    return jnp.einsum("...cd,...d->...c", half, weights).astype(out.dtype)
