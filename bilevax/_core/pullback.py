"""A linear function that is known by its transpose only: NaN going forwards, where its use cannot
be seen, exact backwards.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import Any

import jax
import jax.numpy as jnp
from jax.extend.core import Primitive

from bilevax._core.types import PyTree


def known_backwards(
    pull: Callable[..., Any], like: PyTree, residuals: PyTree, directions: PyTree
) -> PyTree:
    """``L(directions)``, of the structure of `like`, with ``pull(residuals, cotangent) = L'
    cotangent``.

    `pull` is called when, and only where, a cotangent comes back; it may raise. Going forwards all
    is NaN, and so is a derivative of what came back; asking for it backwards raises.
    """
    held, structure = jax.tree.flatten(residuals)
    given, wanted = jax.tree.flatten(directions)
    wished, made = jax.tree.flatten(like)

    def flat(held: list[Any], cotangents: list[Any]) -> list[Any]:
        out = pull(structure.unflatten(held), made.unflatten(cotangents))
        return _once(wanted.flatten_up_to(out), [*held, *cotangents])

    shapes = tuple(jax.ShapeDtypeStruct(jnp.shape(leaf), jnp.result_type(leaf)) for leaf in wished)
    operands = [
        leaf if isinstance(leaf, jax.Array) else jnp.asarray(leaf) for leaf in (*held, *given)
    ]
    return made.unflatten(_primitive().bind(*operands, pull=flat, count=len(held), shapes=shapes))


@jax.custom_jvp
def _once(out: list[Any], given: list[Any]) -> list[Any]:
    """`out`, which depends on `given` in a way that is not to be differentiated."""
    return out


def _once_jvp(primals: Any, tangents: Any) -> Any:
    moves = [t for t in tangents[1] if not _is_zero(t)]
    out = _once(*primals)
    zero = jax.tree.map(jnp.zeros_like, out)
    return out, known_backwards(_refused, out, (), moves) if moves else zero


_once.defjvp(_once_jvp, symbolic_zeros=True)


def _refused(residuals: Any, cotangent: PyTree) -> None:
    raise ValueError(
        "hypergradient: got a method whose derivative is right once only, and a second derivative "
        "through the solution was asked for; expected "
        "a method of order 2, such as hypergradient.implicit(linear.cg()) or unrolled()."
    )


def _is_zero(tangent: PyTree) -> bool:
    return (
        isinstance(tangent, jax.custom_derivatives.SymbolicZero)
        or getattr(tangent, "dtype", None) == jax.dtypes.float0
    )


@lru_cache(maxsize=1)
def _primitive() -> Any:
    from jax.interpreters import ad, batching, mlir

    primitive = Primitive("known_backwards")
    primitive.multiple_results = True

    def nan(*operands, pull, count, shapes):
        return [jnp.full(s.shape, jnp.nan, s.dtype) for s in shapes]

    def abstract(*operands, pull, count, shapes):
        return [jax.core.ShapedArray(s.shape, s.dtype) for s in shapes]

    def jvp(primals, tangents, *, pull, count, shapes):
        out = primitive.bind(*primals, pull=pull, count=count, shapes=shapes)
        if not all(type(t) is ad.Zero for t in tangents[:count]):
            raise ValueError(
                "a derivative that is known backwards only was differentiated again; expected a "
                "method of order 2."
            )
        moves = [ad.instantiate_zeros(t) for t in tangents[count:]]
        return out, primitive.bind(*primals[:count], *moves, pull=pull, count=count, shapes=shapes)

    def transpose(cotangents, *operands, pull, count, shapes):
        if all(type(c) is ad.Zero for c in cotangents):
            return [None] * len(operands)
        full = [
            jnp.zeros(s.shape, s.dtype) if type(c) is ad.Zero else c
            for c, s in zip(cotangents, shapes, strict=True)
        ]
        return [None] * count + pull(list(operands[:count]), full)

    def batch(operands, dims, *, pull, count, shapes):
        size = next(a.shape[d] for a, d in zip(operands, dims, strict=True) if d is not None)
        axes = list(dims)

        def every(held, cotangents):
            found = jax.vmap(pull, in_axes=(axes[:count], 0))(held, cotangents)
            return [
                jnp.sum(leaf, axis=0) if axis is None else jnp.moveaxis(leaf, 0, axis)
                for leaf, axis in zip(found, axes[count:], strict=True)
            ]

        wider = tuple(jax.ShapeDtypeStruct((size, *s.shape), s.dtype) for s in shapes)
        return primitive.bind(*operands, pull=every, count=count, shapes=wider), [0] * len(shapes)

    primitive.def_impl(nan)
    primitive.def_abstract_eval(abstract)
    ad.primitive_jvps[primitive] = jvp
    ad.primitive_transposes[primitive] = transpose
    batching.primitive_batchers[primitive] = batch
    mlir.register_lowering(primitive, mlir.lower_fun(nan, multiple_results=True))
    return primitive
