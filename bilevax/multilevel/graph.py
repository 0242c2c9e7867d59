"""Who reads whom among the levels, found from the objectives themselves.

A level's *reads* are the levels that the gradient of its objective with respect to its own variable
depends on: what is left of that gradient's jaxpr after dead code is dropped. From them, and the
order of the levels, follows everything else:

- A lower level that reacts to a level's variable (reads it, or reads a level that does) and that
  the objective depends on is **nested** in that
  level: its own objective is the total one, through the lower level's best response.
- Any other lower level that it reads is a **chain**: a constant of its problem.

What remains to be read when the nested levels have been replaced by their best responses has no
cycle. For in a cycle the highest level would react, through the others, to itself, and would have
nested its successor. So two levels that read each other are never an error: by their order, the
upper one leads and the lower one follows. A level that declares to read itself is refused, and so
is one that nobody reads.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import jax
from jax.interpreters import partial_eval

from bilevax.base import Objective, PyTree


@dataclasses.dataclass(frozen=True)
class Node:
    """What is known of one level; all tuples are of level names.

    Attributes:
      name: its name.
      reads: what the gradient of its objective in its own variable depends on.
      uses: what its objective's value depends on.
      nested: levels solved inside its objective, in the order in which they are solved. For the top
        level, all that its objective waits for.
      total: what the gradient of its total objective depends on besides.
      held: levels whose warm states its objective carries: the nested ones, and theirs.
      depth: levels stacked in its total objective, itself included.
      live: for a level that the top level solves, the part of `total` that moves with the top
        level.
    """

    name: str
    reads: tuple[str, ...]
    uses: tuple[str, ...]
    nested: tuple[str, ...]
    total: tuple[str, ...]
    held: tuple[str, ...]
    depth: int
    live: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Graph:
    """All nodes, lowest first."""

    nodes: tuple[Node, ...]

    def __getitem__(self, name: str) -> Node:
        return next(node for node in self.nodes if node.name == name)

    @property
    def names(self) -> tuple[str, ...]:
        """Lowest first."""
        return tuple(node.name for node in self.nodes)

    @property
    def top(self) -> Node:
        """The level that nothing stands above."""
        return self.nodes[-1]

    def index(self, name: str) -> int:
        """A level's number, 0 for the lowest."""
        return self.names.index(name)


def dependencies(fn: Callable[..., Any], params: dict[str, PyTree], *args: Any) -> tuple[str, ...]:
    """The entries of `params` that ``fn(params, *args)`` depends on: those left in its jaxpr when
    dead code is dropped.
    """
    closed = jax.make_jaxpr(fn)(params, *args)
    _, used = partial_eval.dce_jaxpr(closed.jaxpr, [True] * len(closed.jaxpr.outvars))
    found, flags = [], iter(used)
    for name in sorted(params):  # the order in which a dict is flattened
        count = len(jax.tree.leaves(params[name]))
        if any(list(itertools.islice(flags, count))):
            found.append(name)
    return tuple(name for name in params if name in found)


def find(
    objectives: dict[str, Objective],
    params: dict[str, PyTree],
    contexts: dict[Any, Any],
    declared: Mapping[str, Sequence[str] | None],
    frozen: Sequence[str] = (),
    starts: Mapping[str, set[str]] | None = None,
) -> Graph:
    """The graph of these levels, lowest first.

    Args:
      objectives: ``(params, None, ctx) -> (value, ...)`` by name.
      params: floating-point leaves (or their shapes) by name.
      contexts: what each objective is given besides.
      declared: a level's own word on what it reads, or None.
      frozen: levels that stand still: constants, whoever reads them.
      starts: of levels whose solves begin at a function of others, those that it depends on: the
        solution does, too.

    Raises:
      ValueError: naming a level that declares a read that is not there, or one that nobody reads.
    """
    names = tuple(objectives)
    nodes: dict[str, Node] = {}

    def ordered(found: Iterable[str]) -> tuple[str, ...]:
        found = set(found)
        return tuple(name for name in names if name in found)

    def gradient_reads(name: str, wrt: Iterable[str]) -> set[str]:
        wrt = ordered(wrt)

        def gradient(params, ctx):
            def fn(moved):
                return objectives[name]({**params, **moved}, None, ctx)[0]

            return jax.grad(fn)({n: params[n] for n in wrt})

        found = set(dependencies(gradient, params, contexts[name])) - (set(frozen) - {name})
        said = declared[name]
        return found if said is None else found & {*said, name}

    def start_reads(name: str) -> set[str]:
        if not starts or name not in starts:
            return set()
        found = starts[name] - set(frozen)
        said = declared[name]
        return found if said is None else found & set(said)

    for position, name in enumerate(names):
        below = set(names[:position])
        value = set(
            dependencies(
                lambda p, ctx, name=name: objectives[name](p, None, ctx)[0], params, contexts[name]
            )
        )
        direct = gradient_reads(name, [name]) - {name}
        uses = (value | direct) - {name}
        said = declared[name]
        if said is not None:
            absent = [n for n in said if n not in uses]
            if absent:
                raise ValueError(
                    f"Level {name!r}, reads: got {absent[0]!r}, which its objective does not read; "
                    "expected only what it takes from params. If it is "
                    f"captured by the function, use params[{absent[0]!r}] instead: what is "
                    "captured cannot be differentiated."
                )
            uses &= set(said)
        begun = start_reads(name)
        uses = (uses | begun) - set(frozen)
        lower = {
            n: set(nodes[n].total) for n in below
        }  # who each of them reads; nothing is followed beyond
        active = _reach(uses & below, partial(_read_among, lower))
        reacting = {n for n in active if name in _reach({n}, partial(_read_by, lower))}
        if name not in value and not reacting:
            raise ValueError(
                f"Level {name!r}, objective: it does not depend on params[{name!r}], by itself or "
                "through a level below; expected a function to be "
                "minimized over it."
            )
        inside = active if position == len(names) - 1 else reacting
        mixed = gradient_reads(name, [name, *(inside & uses)])
        total = (mixed | begun).union(*(nodes[n].total for n in inside)) - inside - {name}
        nested = _solve_order(ordered(inside), {n: set(nodes[n].total) for n in inside})
        held = ordered(inside.union(*(nodes[n].held for n in inside)))
        depth = 1 + max((nodes[n].depth for n in inside), default=0)
        nodes[name] = Node(
            name, ordered(direct), ordered(uses), nested, ordered(total), held, depth
        )

    top = nodes[names[-1]]
    for name in names[:-1]:
        if name not in top.held and name not in frozen:
            raise ValueError(
                f"Level {name!r}: nobody reads it, so it has no part in the objective of "
                f"{top.name!r}; expected a level that another one uses "
                f"through params[{name!r}]. (Captured variables are not seen.)"
            )
    moving = {n for n in top.nested if top.name in _reach({n}, lambda n: set(nodes[n].total))} | {
        top.name
    }
    for name in top.nested:
        nodes[name] = dataclasses.replace(
            nodes[name], live=ordered(set(nodes[name].total) & moving)
        )
    return Graph(tuple(nodes.values()))


def _read_by(total: dict[str, set[str]], name: str) -> set[str]:
    return total.get(name, set())


def _read_among(total: dict[str, set[str]], name: str) -> set[str]:
    return total[name] & set(total)


def _reach(start: set[str], step: Callable[[str], set[str]]) -> set[str]:
    """All that can be reached from `start`, itself included."""
    found, new = set(start), list(start)
    while new:
        for name in step(new.pop()) - found:
            found.add(name)
            new.append(name)
    return found


def _solve_order(names: tuple[str, ...], total: dict[str, set[str]]) -> tuple[str, ...]:
    """Every level after those that it reads; in the order given where there is a choice."""
    out: list[str] = []
    while len(out) < len(names):
        out.append(
            next(n for n in names if n not in out and not (total[n] & set(names)) - set(out))
        )
    return tuple(out)
