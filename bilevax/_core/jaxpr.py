"""A traced function's code, called again on other arguments."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any


def reads(fn: Callable[..., Any], argument: Any) -> list[bool]:
    """Of each leaf of `argument`, whether the outputs of ``fn(argument)`` depend on it: what is
    left when dead code is dropped.
    """
    import jax
    from jax.interpreters import partial_eval

    closed = jax.make_jaxpr(fn)(argument)
    return list(partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))[1])


def dependences(
    fn: Callable[..., Any], argument: Any, *given: Any
) -> tuple[list[bool], list[bool]]:
    """Of one trace of ``fn(argument, *given)``: what `reads` says of the leaves of `argument`, and
    the same where a dependence through ``stop_gradient`` counts for nothing.

    Functions that bring a derivative of their own are not looked into.
    """
    import jax
    from jax.interpreters import partial_eval

    jaxpr = jax.make_jaxpr(fn)(argument, *given).jaxpr
    wanted, count = [True] * len(jaxpr.outvars), len(jax.tree.leaves(argument))
    used = lambda program: list(partial_eval.dce_jaxpr(program, wanted)[1])[:count]
    return used(jaxpr), used(_cut(jaxpr))


def _cut(jaxpr: Any) -> Any:
    """`jaxpr`, for its dependences only, whose stopped gradients are of nothing."""
    import jax.extend.core as jex

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
    # not above: it takes a tenth of a second, which importing the package should not
    import jax.extend.core as jex

    return jex.jaxpr_as_fun(jex.ClosedJaxpr(jaxpr, captured))(*leaves)


def has_rule_of_its_own(jaxpr: Any) -> bool:
    """Whether something in a program brings its own reverse-mode rule, which need not be
    differentiable backwards again.
    """
    import jax.extend.core as jex

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
