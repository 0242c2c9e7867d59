"""Smooth multilevel problems that are not quadratic, and their gradients by plain autodiff through
long unrolled descents, level inside level."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np


class Case(NamedTuple):
    """Levels lowest first, each with the levels that its reference solves inside it, in the order
    of their solves; and a descent that gets there."""

    objectives: dict[str, Callable]
    inside: dict[str, tuple[str, ...]]
    steps: int = 60
    step_size: float = 0.4

    @property
    def names(self):
        return tuple(self.objectives)

    def params(self, size=2):
        rng = np.random.default_rng(3)
        return {name: 0.5 * rng.standard_normal(size) for name in self.objectives}


def follow(name: str, reads: tuple, uses: tuple = ()) -> Callable:
    """A strongly convex objective of `name` whose minimizer follows `reads`, bent by a cosh; `uses`
    enter through terms of their own."""

    def objective(p, batch):
        y = p[name]
        target = sum(0.7 * jnp.sin(p[r]) + 0.1 * (i + 1) * p[r] for i, r in enumerate(reads))
        # The rotation makes Hessian and mixed derivative differ, so that no transposition goes
        # unseen.
        bend = jnp.sum(jnp.cosh(y - target)) + 0.2 * jnp.sum(y**4) + 0.3 * (y[0] * jnp.tanh(y[1]))
        return bend + sum(0.3 * jnp.sum((p[u] - 0.4) ** 2) + 0.2 * jnp.sum(p[u]) ** 2 for u in uses)

    objective.__name__ = f"objective_{name}"
    return objective


def top(name: str, uses: tuple) -> Callable:
    def objective(p, batch):
        return sum(
            jnp.sum((p[u] - 0.3 * (i + 1)) ** 2) + jnp.sum(p[u]) ** 3 / 9
            for i, u in enumerate(uses)
        ) + 0.05 * jnp.sum(p[name] ** 2)

    objective.__name__ = f"objective_{name}"
    return objective


def chain(depth: int) -> Case:
    """Level 1 follows the top; each level follows the one below it, and every other one the top as
    well."""
    names = [f"l{i}" for i in range(1, depth)]
    objectives = {}
    for i, name in enumerate(names):
        reads = ("x",) if i == 0 else (names[i - 1],) + (("x",) if i % 2 else ())
        objectives[name] = follow(name, reads)
    objectives["x"] = top("x", (names[-1], names[0]))
    return Case(objectives, {"x": tuple(names)})


def nested(depth: int) -> Case:
    """Each level follows the one above it, and uses the one below it."""
    names = [f"l{i}" for i in range(1, depth)]
    objectives, inside = {}, {}
    for i, name in enumerate(names):
        above = names[i + 1] if i + 1 < len(names) else "x"
        objectives[name] = follow(name, (above,), (names[i - 1],) if i else ())
        inside[name] = (names[i - 1],) if i else ()
    objectives["x"] = top("x", (names[-1], names[0]))
    inside["x"] = tuple(
        reversed(names)
    )  # the lowest is read directly: it follows the others, and is solved after them
    return Case(objectives, inside, *((60, 0.4) if depth < 4 else (45, 0.5)))


CASES = {
    "chain3": chain(3),
    "chain4": chain(4),
    "chain5": chain(5),
    "nested3": nested(3),
    "nested4": nested(4),
    "diamond": Case(
        {
            "base": follow("base", ("x",)),
            "left": follow("left", ("base",)),
            "right": follow("right", ("base", "x")),
            "joint": follow("joint", ("left", "right")),
            "x": top("x", ("joint",)),
        },
        {"x": ("base", "left", "right", "joint")},
    ),
    # the child is solved inside one parent, which it follows, and a constant of the other
    "shared": Case(
        {
            "child": follow("child", ("p",)),
            "p": follow("p", ("x",), ("child",)),
            "q": follow("q", ("child", "x")),
            "x": top("x", ("p", "q")),
        },
        {"p": ("child",), "x": ("p", "child", "q")},
    ),
    # both parents have the child inside them, and the second follows the first
    "shared_child": Case(
        {
            "child": follow("child", ("p", "q")),
            "p": follow("p", ("x",), ("child",)),
            "q": follow("q", ("x", "p"), ("child",)),
            "x": top("x", ("p", "q", "child")),
        },
        {"p": ("child",), "q": ("p", "child"), "x": ("q", "p", "child")},
    ),
    # two levels that read each other: the upper one leads
    "mutual": Case(
        {
            "follower": follow("follower", ("leader", "x")),
            "leader": follow("leader", ("follower", "x")),
            "x": top("x", ("follower", "leader")),
        },
        {"leader": ("follower",), "x": ("leader", "follower")},
        steps=250,
        step_size=0.5,
    ),
}


def reference(case: Case) -> Callable:
    """``params -> (value, gradient)`` of the top level; every best response is gradient steps from
    the start, differentiated as they stand."""

    def respond(name, env, readers):
        def total(y):
            return value(name, {**env, name: y})

        def step(y, _):
            return y - case.step_size * jax.grad(total)(y), None

        return jax.lax.scan(step, env[name], length=case.steps)[0]

    def value(name, env):
        for below in case.inside.get(name, ()):
            env = {**env, below: respond(below, env, name)}
        return case.objectives[name](env, None)

    upper = case.names[-1]

    def fn(params):
        return jax.value_and_grad(lambda x: value(upper, {**params, upper: x}))(params[upper])

    return fn
