"""Whose model state is whose: a network's statistics belong to the level that trains it, and every
reader sees the current ones.

A level's model state that is a dict by level names is *by owner*: the entry under the level's own
name is its own, to be moved by its real inner steps; those under other names are the other levels',
which this one reads. Any other model state is the level's alone. Among the variables of all levels
an owner's state has two entries, its floating-point leaves, which methods that see the model's
state differentiate, and the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from jax import lax

from bilevax import tree
from bilevax.base import InnerState, Objective, PyTree


def floats_of(name: str) -> str:
    """The name of a level's floating-point statistics among the variables."""
    return f"{name} (statistics)"


def others_of(name: str) -> str:
    """And that of the rest of its model state."""
    return f"{name} (other state)"


class Division(NamedTuple):
    """Each level's own model state, who owns one that others may read, and whose state is by owner.

    Attributes:
      own: by level name, what travels as its model state; None for a level without one.
      owners: names of the levels whose own state others may read, lowest first.
      by_owner: names of the levels whose objective takes a dict by owner.
    """

    own: dict[str, PyTree]
    owners: tuple[str, ...]
    by_owner: tuple[str, ...]

    def whole(self, name: str) -> PyTree:
        """All that a level's objective is given, with the others' states as they are now."""
        if name not in self.by_owner:
            return self.own[name]
        return {**{k: self.own[k][k] for k in self.owners}, **self.own[name]}

    def states_of(self, owners: Sequence[str]) -> dict[str, PyTree]:
        """The states of some of the owners."""
        return {name: self.own[name][name] for name in owners}

    def shown(self, states: dict[str, InnerState], like: dict[str, PyTree]) -> dict[str, PyTree]:
        """The states' models, in the form of `like`: a reader that was given a copy gets the
        current one.
        """
        out = {name: state.model for name, state in states.items()}
        for name in out:
            given = like.get(name)
            if name in self.by_owner and isinstance(given, dict):
                out[name] = {
                    k: states[k].model[k]
                    if k in self.owners and k in states
                    else out[name].get(k, given[k])
                    for k in given
                }
            elif name in self.by_owner:
                out[name] = None
        return out


def divided(
    names: Sequence[str], objectives: dict[str, Objective], models: dict[str, PyTree]
) -> Division:
    """Who owns which state.

    Raises:
      ValueError: naming a level whose objective is stateful without any state.
    """
    keyed = {
        n
        for n in names
        if isinstance(models.get(n), dict) and models[n] and set(models[n]) <= set(names)
    }
    owners = tuple(n for n in names if n in keyed and n in models[n])
    own: dict[str, PyTree] = {}
    by_owner = []
    for name in names:
        given = models.get(name)
        if not objectives[name].stateful:
            own[name] = None
        elif name in keyed:
            by_owner.append(name)
            # a level in `keyed` was given a dict
            own[name] = {k: v for k, v in given.items() if k == name or k not in owners}  # type: ignore[union-attr]
        elif not given and owners and isinstance(given, dict | None):
            by_owner.append(name)
            own[name] = {}
        elif given is None:
            raise ValueError(
                f"model_state: got none for level {name!r}, whose objective is stateful; expected "
                "its initial model "
                "state, or one of a level whose network it reads."
            )
        else:
            own[name] = given
    return Division(own, owners, tuple(by_owner))


def read(params: dict[str, PyTree], model: PyTree, shared: Sequence[str]) -> dict[str, PyTree]:
    """A dict by owner: the others' states out of the variables, beside the level's own."""
    found = {
        k: tree.combine(params[floats_of(k)], params[others_of(k)])
        for k in shared
        if floats_of(k) in params
    }
    return {**found, **model}


def entered(
    env: dict[str, PyTree], owners: Sequence[str], models: dict[str, PyTree]
) -> dict[str, PyTree]:
    """`env` with the states of those owners that are in `models`."""
    out = dict(env)
    for name in owners:
        if name in models:
            out[floats_of(name)], out[others_of(name)] = tree.partition(models[name][name])
    return out


def constant(
    env: dict[str, PyTree], owners: Sequence[str], states: dict[str, InnerState]
) -> dict[str, PyTree]:
    """`env` with the states of the owners in `states`, which nothing is differentiated through."""
    return entered(
        env, owners, lax.stop_gradient({n: s.model for n, s in states.items() if n in owners})
    )
