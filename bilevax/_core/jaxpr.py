"""A traced function's code, called again on other arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

# jax.extend with the package and not in the first call, though it takes a tenth of a second: from
# jax 0.12 on it adds to jax's configuration, after which every program is traced and compiled anew.
import jax
import jax.extend.core as jex
from jax.interpreters import partial_eval


def reads(fn: Callable[..., Any], argument: Any) -> list[bool]:
    """Of each leaf of `argument`, whether the outputs of ``fn(argument)`` depend on it: what is
    left when dead code is dropped.
    """
    closed = jax.make_jaxpr(fn)(argument)
    return list(partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[1])


class Depends(NamedTuple):
    """Of each leaf of an argument, what some outputs of a function take of it.

    Attributes:
      read: whether they depend on it.
      moved: the same where a dependence through ``stop_gradient`` counts for nothing.
    """

    read: list[bool]
    moved: list[bool]


def dependences(fn: Callable[..., Any], argument: Any, *given: Any) -> list[Depends]:
    """Of one trace of ``fn(argument, *given)``, which returns a sequence: what each of its parts
    takes of the leaves of `argument`.

    Functions that bring a derivative of their own are not looked into.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(argument, *given)
    sizes = [len(jax.tree.leaves(part)) for part in shapes]
    count, cut = len(jax.tree.leaves(argument)), _cut(closed.jaxpr)

    def of(number: int) -> Depends:
        wanted = [i == number for i, size in enumerate(sizes) for _ in range(size)]
        used = lambda program: list(partial_eval.dce_jaxpr(program, wanted)[1])[:count]
        return Depends(used(closed.jaxpr), used(cut))

    return [of(number) for number in range(len(sizes))]


def _cut(jaxpr: Any) -> Any:
    """`jaxpr`, for its dependences only, whose stopped gradients are of nothing."""

    def inside(value):
        if isinstance(value, jex.ClosedJaxpr):
            return jex.ClosedJaxpr(_cut(value.jaxpr), value.consts)
        if isinstance(value, jex.Jaxpr):
            return _cut(value)
        return tuple(map(inside, value)) if isinstance(value, tuple) else value

    eqns = []
    for eqn in jaxpr.eqns:
        name = eqn.primitive.name
        if name == "stop_gradient":
            eqn = eqn.replace(invars=[jex.Literal(0.0, eqn.invars[0].aval)])
        elif not name.startswith("custom_"):
            eqn = eqn.replace(params={key: inside(value) for key, value in eqn.params.items()})
        eqns.append(eqn)
    return jaxpr.replace(eqns=eqns)


def evaluate(jaxpr: Any, captured: Sequence[Any], leaves: Sequence[Any]) -> list[Any]:
    """The outputs of `jaxpr`, flat, with what it `captured` given anew as values: nothing is closed
    over, so no tracer leaks.
    """
    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, captured))(*leaves)


def has_rule_of_its_own(jaxpr: Any) -> bool:
    """Whether something in a program brings its own reverse-mode rule, which need not be
    differentiable backwards again.
    """
    if any(eqn.primitive.name.startswith("custom_vjp_call") for eqn in jaxpr.eqns):
        return True
    inside = [
        leaf
        for eqn in jaxpr.eqns
        for value in eqn.params.values()
        for leaf in (value if isinstance(value, (tuple, list)) else (value,))
    ]
    inner = [
        leaf.jaxpr if isinstance(leaf, jex.ClosedJaxpr) else leaf
        for leaf in inside
        if isinstance(leaf, (jex.ClosedJaxpr, jex.Jaxpr))
    ]
    return any(has_rule_of_its_own(each) for each in inner)
