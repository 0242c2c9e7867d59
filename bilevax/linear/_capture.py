"""Where a program multiplies something by a parameter: what it multiplies there, and the derivative
by the product.

A walk over the program of one example. Where a matrix product, a convolution or a look-up of rows
has a parameter as operand, the other operand is recorded and a zero is added to the product, by
which the value can then be differentiated: the gradient of the parameter is made of the two. Calls
(``jit``, ``checkpoint``, custom rules) and scans are walked into, with parameters as constants of
the scan (shared by its steps) or as rows that it runs over (a layer a step).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.extend.core as jex
import jax.numpy as jnp
from jax import lax

from bilevax._core.types import PyTree


class Tag(NamedTuple):
    """A value that is a parameter leaf, or a row of it for each of `depth` scans, after some
    `steps` that move entries about.
    """

    leaf: int
    steps: tuple[Any, ...] = ()  # ("transpose", axes) or ("reshape", shape)
    depth: int = 0


class Use(NamedTuple):
    """One place where a parameter is an operand.

    Attributes:
      tag: which parameter.
      kind: "dot", "conv" or "gather".
      place: the operand's position.
      operand: the operand's shape and dtype.
      other: the other operand's shape.
      params: those of the primitive.
      loops: the scans around it, outermost first: whether each runs over the parameter's rows, and
        its length.
      product: shape and dtype of the product, loops included.
    """

    tag: Tag
    kind: str
    place: int
    operand: Any
    other: tuple[int, ...]
    params: dict[str, Any]
    loops: tuple[tuple[bool, int], ...]
    product: Any


_KINDS = {"dot_general": "dot", "conv_general_dilated": "conv", "gather": "gather"}
_SAME = ("convert_element_type", "copy", "copy_p", "optimization_barrier", "sharding_constraint")


class Walk:
    """A program with its uses of parameters.

    Args:
      fn: ``(params, example) -> scalar``.
      params: pytree of floating-point arrays.
      example: a batch of one example, or shapes.
    """

    def __init__(self, fn: Callable[..., Any], params: PyTree, example: PyTree):
        flat, self._treedef = jax.tree.flatten(params)
        self._count = len(flat)
        self._closed = jax.make_jaxpr(fn)(params, example)
        self.uses: list[Use] = []
        self._spans: dict[int, tuple[int, int]] = {}
        shapes = [
            jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in self._closed.jaxpr.invars
        ]
        jax.eval_shape(
            lambda args: self._run(self._closed, args, self._tags(), self._live(), None, [], ()),
            shapes,
        )

    def _tags(self) -> list[Tag | None]:
        return [Tag(i) if i < self._count else None for i in range(len(self._closed.jaxpr.invars))]

    def _live(self) -> list[bool]:
        return [i >= self._count for i in range(len(self._closed.jaxpr.invars))]

    def zeros(self) -> list[jax.Array]:
        """What is added to the products."""
        return [jnp.zeros(use.product.shape, use.product.dtype) for use in self.uses]

    def __call__(
        self, params: PyTree, example: PyTree, added: Sequence[jax.Array]
    ) -> tuple[jax.Array, list[jax.Array]]:
        """The value, and the other operand of each use, loops in front."""
        found: list[jax.Array] = []
        args = jax.tree.leaves((params, example))
        out = self._run(self._closed, args, self._tags(), self._live(), list(added), found, ())
        return out[0], found

    # ---- the walk

    def _run(
        self, closed: Any, args: Any, tags: Any, live: Any, added: Any, found: Any, loops: Any
    ) -> list[Any]:
        """The program's outputs. `added` is None in the first walk, which fills `uses`; later it is
        what remains to be added, in order.
        """
        env: dict[Any, Any] = dict(zip(closed.jaxpr.constvars, closed.consts, strict=True))
        tag: dict[Any, Tag | None] = {}
        alive: dict[Any, bool] = {}
        for variable, value, mark, of_batch in zip(
            closed.jaxpr.invars, args, tags, live, strict=True
        ):
            env[variable], tag[variable], alive[variable] = value, mark, of_batch

        def read(v):
            return v.val if isinstance(v, jex.Literal) else env[v]

        for eqn in closed.jaxpr.eqns:
            values = [read(v) for v in eqn.invars]
            marks = [None if isinstance(v, jex.Literal) else tag.get(v) for v in eqn.invars]
            batch = [not isinstance(v, jex.Literal) and alive.get(v, False) for v in eqn.invars]
            outs = self._equation(eqn, values, marks, batch, added, found, loops)
            after = _moved(eqn, marks)
            for i, (variable, value) in enumerate(zip(eqn.outvars, outs, strict=True)):
                env[variable], alive[variable] = value, any(batch)
                tag[variable] = after if i == 0 else None
        return [read(v) for v in closed.jaxpr.outvars]

    def _equation(
        self, eqn: Any, values: Any, marks: Any, batch: PyTree, added: Any, found: Any, loops: Any
    ) -> list[Any]:
        name, marked = eqn.primitive.name, [i for i, mark in enumerate(marks) if mark is not None]
        if marked and name == "scan":
            return self._scan(eqn, values, marks, batch, added, found, loops)
        inner = _called(eqn) if marked else None
        if inner is not None:
            return self._run(inner, values, marks, batch, added, found, loops)
        outs = eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(eqn.params))
        outs = list(outs) if eqn.primitive.multiple_results else [outs]
        if (
            len(marked) == 1
            and name in _KINDS
            and batch[1 - marked[0]]
            and _fits(eqn, marked[0], marks[marked[0]])
        ):
            place = marked[0]
            if added is None:
                shape = tuple(length for _, length in loops) + outs[0].shape
                operand = jax.ShapeDtypeStruct(values[place].shape, values[place].dtype)
                product = jax.ShapeDtypeStruct(shape, outs[0].dtype)
                self.uses.append(
                    Use(
                        marks[place],
                        _KINDS[name],
                        place,
                        operand,
                        values[1 - place].shape,
                        dict(eqn.params),
                        loops,
                        product,
                    )
                )
            else:
                found.append(values[1 - place])
                outs[0] = outs[0] + added.pop(0)
        return outs

    def _scan(
        self, eqn: Any, values: Any, marks: Any, batch: PyTree, added: Any, found: Any, loops: Any
    ) -> list[Any]:
        p = eqn.params
        consts, carry = p["num_consts"], p["num_consts"] + p["num_carry"]
        # A row of a parameter has a tag only where nothing has moved its entries about.
        inner = [
            mark
            if mark is None or i < consts
            else (None if i < carry or mark.steps else mark._replace(depth=mark.depth + 1))
            for i, mark in enumerate(marks)
        ]
        live = [any(batch) and mark is None for mark in inner]
        if added is None:
            # Which of the parameters a use reads decides whether the scan runs over its rows: known
            # when the use is met.
            first = len(self.uses)
            shapes = [
                jax.ShapeDtypeStruct(v.aval.shape, v.aval.dtype) for v in p["jaxpr"].jaxpr.invars
            ]
            jax.eval_shape(
                lambda args: self._run(
                    p["jaxpr"], args, inner, live, None, [], (*loops, (False, p["length"]))
                ),
                shapes,
            )
            for i in range(first, len(self.uses)):
                use = self.uses[i]
                over = any(mark is not None and mark.leaf == use.tag.leaf for mark in inner[carry:])
                around: list[tuple[bool, int]] = list(use.loops)
                around[len(loops)] = (over, p["length"])
                self.uses[i] = use._replace(loops=tuple(around))
            self._spans[id(eqn)] = (first, len(self.uses))
            return list(eqn.primitive.bind(*values, **eqn.primitive.get_bind_params(p)))
        first, last = self._spans[id(eqn)]
        mine = [added.pop(0) for _ in range(last - first)]

        def body(state, row):
            xs, rows = row
            seen: list[jax.Array] = []
            outs = self._run(
                p["jaxpr"], [*values[:consts], *state, *xs], inner, live, list(rows), seen, loops
            )
            return tuple(outs[: p["num_carry"]]), (tuple(outs[p["num_carry"] :]), tuple(seen))

        given = (tuple(values[carry:]), tuple(mine))
        state, (ys, seen) = lax.scan(
            body,
            tuple(values[consts:carry]),
            given,
            length=p["length"],
            reverse=p["reverse"],
            unroll=p["unroll"],
        )
        found.extend(seen)
        return [*state, *ys]


def _called(eqn: Any) -> Any:
    """The program that an equation calls, with as many inputs as it has; None where it calls
    none.
    """
    for name in ("jaxpr", "call_jaxpr", "fun_jaxpr"):
        inner = eqn.params.get(name)
        if inner is not None:
            closed = inner if isinstance(inner, jex.ClosedJaxpr) else jex.ClosedJaxpr(inner, ())
            same = len(closed.jaxpr.invars) == len(eqn.invars) and len(closed.jaxpr.outvars) == len(
                eqn.outvars
            )
            return closed if same and eqn.primitive.name != "while" else None
    return None


def _moved(eqn: Any, marks: Any) -> Tag | None:
    """The tag of an equation's result, where that holds the entries of a tagged operand and nothing
    else.
    """
    mark = marks[0] if marks else None
    if mark is None:
        return None
    name = eqn.primitive.name
    if name in _SAME:
        return mark
    if name == "transpose":
        return mark._replace(steps=(*mark.steps, ("transpose", tuple(eqn.params["permutation"]))))
    if name in ("reshape", "squeeze", "expand_dims"):
        return mark._replace(steps=(*mark.steps, ("reshape", tuple(eqn.outvars[0].aval.shape))))
    return None


def _fits(eqn: Any, place: int, tag: Tag) -> bool:
    p = eqn.params
    if eqn.primitive.name == "conv_general_dilated":
        return place == 1 and p["feature_group_count"] == 1 and p["batch_group_count"] == 1
    if eqn.primitive.name == "gather":
        numbers, operand, out = (
            p["dimension_numbers"],
            eqn.invars[0].aval.shape,
            eqn.outvars[0].aval,
        )
        rows = (
            numbers.collapsed_slice_dims == (0,)
            and numbers.start_index_map == (0,)
            and not numbers.operand_batching_dims
        )
        whole = (
            len(operand) == 2
            and tuple(p["slice_sizes"]) == (1, operand[-1])
            and numbers.offset_dims == (len(out.shape) - 1,)
        )
        return place == 0 and rows and whole and not tag.depth
    return True


# ---- a parameter as matrices, and a use as rows of them


class Layout(NamedTuple):
    """How a leaf becomes matrices ``[layers, in, out]``: after `steps`, by axes behind the first
    `depth`. All static.
    """

    depth: int
    steps: tuple[Any, ...]
    layers: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


def layout(use: Use) -> Layout:
    """That of a use: independent products, what is summed over, what remains."""
    depth, steps = use.tag.depth, use.tag.steps
    if use.kind == "gather":
        return Layout(depth, steps, (), (0,), (1,))
    if use.kind == "conv":
        out, into, *window = use.params["dimension_numbers"].rhs_spec
        return Layout(depth, steps, (), (into, *window), (out,))
    contracted, batched = use.params["dimension_numbers"]
    summed, layers = contracted[use.place], batched[use.place]
    rest = tuple(i for i in range(len(use.operand.shape)) if i not in (*summed, *layers))
    return Layout(depth, steps, tuple(layers), tuple(summed), rest)


def matrices(how: Layout, leaf: Any) -> Any:
    """A leaf (of jax or numpy) as matrices ``[layers, in, out]``, its entries moved about and no
    more.
    """
    front = leaf.shape[: how.depth]
    for kind, to in how.steps:
        ahead = len(front)
        leaf = (
            leaf.transpose([*range(ahead), *(ahead + i for i in to)])
            if kind == "transpose"
            else leaf.reshape(*front, *to)
        )
    shape = leaf.shape[len(front) :]
    size = lambda axes: math.prod(shape[i] for i in axes)
    axes = [*range(len(front)), *(len(front) + i for i in (*how.layers, *how.inputs, *how.outputs))]
    return leaf.transpose(axes).reshape(
        math.prod(front) * size(how.layers), size(how.inputs), size(how.outputs)
    )


def rows(use: Use, other: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``[layers, tokens, in]`` and ``[layers, tokens, out]``, whose products summed over tokens are
    the gradient of `matrices`.

    Of a look-up the first are the numbers of the rows, ``[1, tokens]``.
    """
    one = lambda other, gradient: _rows(use, other, gradient)
    for _ in use.loops:
        one = jax.vmap(one)
    x, g = one(other, gradient)
    over = [i for i, (stacked, _) in enumerate(use.loops) if stacked]
    shared = [i for i, (stacked, _) in enumerate(use.loops) if not stacked]
    ahead = len(use.loops)

    def together(a):
        a = a.transpose([*over, ahead, *shared, *range(ahead + 1, a.ndim)])
        layers = math.prod(a.shape[: len(over) + 1])
        tokens = math.prod(a.shape[len(over) + 1 : ahead + 2])
        return a.reshape(layers, tokens, *a.shape[ahead + 2 :])

    return together(x), together(g)


def _rows(use: Use, other: jax.Array, gradient: jax.Array) -> tuple[jax.Array, jax.Array]:
    if use.kind == "gather":
        return other.reshape(1, -1), gradient.reshape(1, -1, gradient.shape[-1])
    p = use.params
    if use.kind == "conv":
        numbers = p["dimension_numbers"]
        window = [use.operand.shape[i] for i in numbers.rhs_spec[2:]]
        patches = lax.conv_general_dilated_patches(
            other,
            window,
            p["window_strides"],
            p["padding"],
            p["lhs_dilation"],
            p["rhs_dilation"],
            numbers,
            precision=lax.Precision.HIGHEST,
        )
        batch, feature, *space = numbers.out_spec
        flat = lambda a: a.transpose(batch, *space, feature).reshape(1, -1, a.shape[feature])
        return flat(patches), flat(gradient)
    contracted, batched = p["dimension_numbers"]
    summed, layers = contracted[1 - use.place], batched[1 - use.place]
    free = [i for i in range(other.ndim) if i not in (*summed, *layers)]
    count, tokens = (
        math.prod(other.shape[i] for i in layers),
        math.prod(other.shape[i] for i in free),
    )
    x = other.transpose(*layers, *free, *summed).reshape(count, tokens, -1)
    if use.place == 1:  # the product's axes: of layers, of the left operand, of the right
        return x, gradient.reshape(count, tokens, -1)
    return x, gradient.reshape(count, -1, tokens).transpose(0, 2, 1)
