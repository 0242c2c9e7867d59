"""The graph of a multilevel problem as it was found, and what a step of it costs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax

from bilevax._core.settings import name_of
from bilevax.base import Feed, PyTree
from bilevax.data.episodes import Episodes, drawn
from bilevax.data.sources import Source, as_source
from bilevax.multilevel import joint
from bilevax.multilevel.gradient import MultilevelGradFn
from bilevax.multilevel.level import Level, check_names, split_params
from bilevax.multilevel.system import System

GRADIENTS, HVPS = "gradients", "hvps"


class Edge(NamedTuple):
    """`level` reads `reads`: a change of the one moves the solution of the other, and `method`
    differentiates that.

    Attributes:
      level: whose solution moves (or whose objective, for the top level, which has no method).
      reads: with what.
      method: what differentiates it; empty for the top level, whose objective is differentiated
        directly, and where nothing is.
      inside: the level in whose objective this happens, where `level` is nested; None in the sweep
        of the top level.
    """

    level: str
    reads: str
    method: str
    inside: str | None = None


class Explanation(NamedTuple):
    """What `explain` found. ``print`` it, or `draw` it.

    Attributes:
      levels: names, lowest first.
      edges: who reads whom, and what differentiates it.
      nested: for each level, those that are solved inside its objective, in the order of their
        solves.
      order: levels in the order in which the top level's step solves them; their gradients are
        pulled in the reverse of it.
      frozen: levels that stand still.
      gradients: by level, the most gradients of its own objective in one step of the top level;
        None where a method's cost is not known.
      hvps: the same for Hessian-vector products, mixed products counted as one each.
    """

    levels: tuple[str, ...]
    edges: tuple[Edge, ...]
    nested: dict[str, tuple[str, ...]]
    order: tuple[str, ...]
    frozen: tuple[str, ...]
    gradients: dict[str, int | None]
    hvps: dict[str, int | None]

    def __repr__(self) -> str:
        top = self.levels[-1]
        lines = [
            f"{len(self.levels)} levels. A step of {top!r} solves {' -> '.join(self.order)} and "
            f"pulls {' -> '.join(reversed(self.order))}."
        ]
        for name in reversed(self.levels):
            reads = [edge.reads for edge in self.edges if edge.level == name]
            lines.append(
                f"{name}: reads {', '.join(dict.fromkeys(reads)) or 'no other level'}"
                + (" (top)" if name == top else "")
            )
            if name in self.frozen:
                lines.append("  frozen: a constant to all")
                continue
            if self.nested[name] and name != top:
                lines.append(f"  nested in its objective: {', '.join(self.nested[name])}")
            for edge in self.edges:
                if edge.level == name and edge.method:
                    where = f", inside {edge.inside}" if edge.inside else ""
                    lines.append(f"  d{name}/d{edge.reads} by {edge.method}{where}")
            lines.append(
                f"  a step: {_count(self.gradients[name], 'gradient')}, "
                f"{_count(self.hvps[name], 'HVP')}"
            )
        return "\n".join(lines)

    def draw(self, ax: Any = None) -> Any:
        """The graph as a picture: an arrow from what is read to who reads it, dashed where that
        happens inside another level's objective.

        Args:
          ax: matplotlib axes; None for new ones. Needs matplotlib.

        Returns:
          The axes.

        Examples:
          >>> explanation.draw().figure.savefig("levels.png")  # doctest: +SKIP
        """
        import matplotlib.pyplot as plt

        if ax is None:
            _, ax = plt.subplots(figsize=(6.5, 1.3 + 1.25 * len(self.levels)), layout="constrained")
        # Levels on a gently bent line, the arrows bowed to its outer side, so that none runs
        # through a box.
        place = {name: (0.0, float(i)) for i, name in enumerate(self.levels)}
        seen: Counter[Any] = Counter()
        for edge in self.edges:
            (x0, y0), (x1, y1) = place[edge.reads], place[edge.level]
            pair = (edge.reads, edge.level)
            seen[pair] += 1
            if seen[pair] > 1:
                continue
            bend = (
                0.0
                if abs(y1 - y0) == 1
                and (edge.level, edge.reads) not in {(e.reads, e.level) for e in self.edges}
                else 0.32
            )
            style = dict(
                arrowstyle="-|>",
                mutation_scale=16,
                shrinkA=17,
                shrinkB=17,
                connectionstyle=f"arc3,rad={bend}",
                linewidth=1.4,
            )
            colour = "#0072B2" if edge.inside else "#000000"
            ax.annotate(
                "",
                (x1, y1),
                (x0, y0),
                arrowprops={**style, "color": colour, "linestyle": "--" if edge.inside else "-"},
            )
        for name, (x, y) in place.items():
            method = next(
                (edge.method for edge in self.edges if edge.level == name and edge.method), ""
            )
            box = dict(
                boxstyle="round,pad=0.45",
                facecolor="#F2F2F2" if name in self.frozen else "white",
                edgecolor="black",
            )
            ax.text(x, y, name, ha="center", va="center", bbox=box, fontsize=12)
            cost = f"{_count(self.gradients[name], 'gradient')}, {_count(self.hvps[name], 'HVP')}"
            note = "frozen" if name in self.frozen else "\n".join(filter(None, (method, cost)))
            ax.annotate(
                note,
                (x, y),
                textcoords="offset points",
                xytext=(110, 0),
                va="center",
                fontsize=9,
                color="0.35",
            )
        ax.set_xlim(-1, 2.2)
        ax.set_ylim(-0.6, len(self.levels) - 0.4)
        ax.set_axis_off()
        ax.set_title(
            "Arrows from what is read to who reads it; dashed: inside another level", fontsize=10
        )
        return ax


def _count(number: int | None, what: str) -> str:
    return (
        f"{what}s not known"
        if number is None
        else f"at most {number:,} {what}{'' if number == 1 else 's'}"
    )


def one_of(data: Any, argument: str) -> PyTree:
    """A batch that a run would draw from `data`; a loader is left alone, as what it yields once is
    for the run.
    """
    if not isinstance(data, (Source, Episodes)) and not callable(data):
        return data
    source, key = as_source(data, argument), jax.random.key(0)
    if not isinstance(source, Episodes):
        return source.draw(Feed(source.data, key, 0), 0).batch
    if not isinstance(source.parent, Source):
        raise TypeError(
            f"{argument}: got episodes of an iterable; expected one batch of them. Try the first "
            "that it yields."
        )
    return drawn(source.data, key, 0)


def explain(
    levels: Sequence[Level],
    params: dict[str, PyTree],
    batches: dict[str, PyTree] | None = None,
    *,
    model_state: dict[Any, Any] | None = None,
    key: Any = None,
) -> Explanation:
    """The graph of these levels as their objectives make it: who reads whom, what is nested in
    what, which method differentiates which edge.

    And what one step of the top level costs: for each level the gradients and Hessian-vector
    products of its own objective, as upper bounds (a solver with a tolerance may stop before its
    `maxiter`). A gradient of a level with others nested in it solves those, and is counted so.

    Args:
      levels: as for `value_and_multilevel_grad`.
      params: dict by level name; shapes are all that is looked at.
      batches: dict by level name, one batch of each level that has data, or what a run draws it
        from: `data.minibatches`, episodes, a function of ``(key, step)``.
      model_state: model states of stateful objectives, by level name.
      key: PRNG key, where an objective takes one.

    Returns:
      An `Explanation`, to ``print`` or to ``draw``.

    Raises:
      TypeError, ValueError: as `value_and_multilevel_grad`, above all for a level that nobody
        reads, or that declares to read itself.

    Examples:
      >>> import optax, bilevax as bx
      >>> descent, method = (
      ...     bx.inner.optax(optax.sgd(0.5), 10),
      ...     bx.hypergradient.implicit(bx.linear.cg(maxiter=5)),
      ... )
      >>> levels = [
      ...     bx.Level(
      ...         "z",
      ...         lambda p, batch: (p["z"] - p["y"]) ** 2,
      ...         solver=descent,
      ...         hypergradient=bx.hypergradient.finite_difference(),
      ...     ),
      ...     bx.Level(
      ...         "y", lambda p, batch: (p["y"] - p["x"]) ** 2, solver=descent, hypergradient=method
      ...     ),
      ...     bx.Level("x", lambda p, batch: (p["z"] - 1.0) ** 2, solver=optax.sgd(0.1)),
      ... ]
      >>> print(bx.explain(levels, {"z": 0.0, "y": 0.0, "x": 4.0}))
      3 levels. A step of 'x' solves y -> z and pulls z -> y.
      x: reads z (top)
        a step: at most 1 gradient, at most 0 HVPs
      y: reads x
        dy/dx by implicit(cg)
        a step: at most 11 gradients, at most 6 HVPs
      z: reads y
        dz/dy by finite_difference
        a step: at most 12 gradients, at most 0 HVPs
    """
    fn = MultilevelGradFn(levels)
    names = [level.name for level in fn.levels]
    floats, fixed = split_params(fn.levels, params)
    given = check_names(batches, names, "batches")
    system = fn.system(
        floats,
        fixed,
        {name: one_of(data, f"batches[{name!r}]") for name, data in given.items()},
        key,
        check_names(model_state, names, "model_state"),
    )
    graph, frozen = system.graph, tuple(level.name for level in fn.levels if level.freeze)
    *lower, top = names
    edges = [Edge(top, n, "") for n in graph[top].uses]
    for name in lower:
        if name in frozen:
            continue
        holders = [n for n in names if name in graph[n].nested]
        for holder in holders:
            sweep = holder == top
            moving = (
                graph[name].live
                if sweep
                else [n for n in graph[name].total if n == holder or n in graph[holder].nested]
            )
            edges += [
                Edge(name, n, describe(system, name, sweep), None if sweep else holder)
                for n in moving
            ]
        still = [
            n
            for n in graph[name].reads
            if not any(edge.level == name and edge.reads == n for edge in edges)
        ]
        edges += [Edge(name, n, "") for n in still]
    cost: Counter[Any] | None = Counter({(top, GRADIENTS): 1})
    for name in graph[top].nested:
        cost = _sum(
            cost, _solve(system, name), _pullback(system, name) if graph[name].live else Counter()
        )
    by_level = [
        {n: None if cost is None else cost[n, what] for n in names} for what in (GRADIENTS, HVPS)
    ]
    return Explanation(
        tuple(names),
        tuple(edges),
        {n: graph[n].nested for n in names},
        graph[top].nested,
        frozen,
        by_level[0],
        by_level[1],
    )


def describe(system: System, name: str, sweep: bool) -> str:
    """The name of a level's method and of its linear solver; for the joint system, what it stands
    for.
    """
    method = system.methods[name]
    called = name_of(method.vjp)
    if sweep and joint.is_adapted(system, name):
        return f"{called}, as one symmetric system (minres)"
    return called if method.linear is None else f"{called}({name_of(method.linear.solve)})"


# ---- counting: (level, what) -> number, None where it is not known


def _sum(*costs: Counter[Any] | None) -> Counter[Any] | None:
    total: Counter[Any] = Counter()
    for cost in costs:
        if cost is None:
            return None
        total.update(cost)
    return total


def _times(n: int | None, cost: Counter[Any] | None) -> Counter[Any] | None:
    return (
        None
        if cost is None or n is None
        else Counter({key: n * value for key, value in cost.items()})
    )


def _solve(system: System, name: str) -> Counter[Any] | None:
    solver = system.solvers[name]
    return (
        None
        if solver.gradients is None
        else _times(solver.steps * solver.gradients, _gradient(system, name))
    )


def _gradient(system: System, name: str) -> Counter[Any] | None:
    """One gradient of the total objective: the levels inside are solved, and their solutions
    differentiated once.
    """
    inside = [_sum(_solve(system, i), _derivative(system, i)) for i in system.graph[name].nested]
    return _sum(Counter({(name, GRADIENTS): 1}), *inside)


def _hvp(system: System, name: str) -> Counter[Any] | None:
    """One product with the total objective's Hessian: the solutions inside are differentiated
    forward and backward, at solved points.
    """
    inside = [_times(2, _derivative(system, i)) for i in system.graph[name].nested]
    return _sum(Counter({(name, HVPS): 1}), *inside)


def _joint_hvp(system: System, name: str) -> Counter[Any]:
    """One product with the joint system's matrix: a directional derivative more for each level
    inside.
    """
    out = Counter({(name, HVPS): 1})
    for i in system.graph[name].nested:
        out.update(_times(2, _joint_hvp(system, i)))
    return out


def _derivative(system: System, name: str) -> Counter[Any] | None:
    """A solution's derivative applied once, at a point that is solved: what its method says that it
    takes.
    """
    method = system.methods[name]
    cost = {} if method.cost is None else method.cost(system.solvers[name])
    gradients, hvps, mixed = (cost.get(entry) for entry in ("gradients", "hvps", "mixed_products"))
    products = None if hvps is None or mixed is None else hvps + mixed
    return _sum(_times(gradients, _gradient(system, name)), _times(products, _hvp(system, name)))


def _pullback(system: System, name: str) -> Counter[Any] | None:
    if not joint.is_adapted(system, name):
        return _derivative(system, name)
    # The levels inside are solved at the solution, the multipliers found, then one system is solved
    # for all.
    again = [
        _sum(_solve(system, i), _times(joint.products(system, i), _joint_hvp(system, i)))
        for i in system.graph[name].nested
    ]
    own = joint.products(system, name)
    return _sum(*again, _times(None if own is None else own + 1, _joint_hvp(system, name)))


__all__ = ["Edge", "Explanation", "explain"]
