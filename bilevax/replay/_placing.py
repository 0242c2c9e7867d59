"""A replay laid over many devices: where states, cotangents, outer parameters and rows lie."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from bilevax import tree
from bilevax.base import InnerState, PyTree
from bilevax.run import layout
from bilevax.sharding.placement import Sharding


class Placing:
    """Where everything lies. Without a sharding it leaves all as it is."""

    def __init__(self, sharding: Sharding | None = None, state: Any = None, outer: PyTree = None):
        self.sharding = sharding
        if sharding is None:
            return
        start = InnerState(state.params, model=state.model)
        found = layout.of_run(sharding, state, start, outer)
        self.state = jax.tree.structure(state).unflatten(
            [sharding.named(*spec) for spec in found.specs]
        )
        self.outer = jax.tree.map(
            lambda spec: sharding.named(*spec), layout.param_specs(sharding, outer, "outer")
        )
        self.moving = jax.tree.map(
            lambda leaf, where: where if tree.is_float(leaf) else None, state, self.state
        )

    def _name(self) -> Any:
        return self.sharding, () if self.sharding is None else tuple(
            jax.tree.leaves((self.state, self.outer))
        )

    def __hash__(self) -> int:
        return hash(self._name())

    def __eq__(self, other: Any) -> bool:
        return isinstance(other, Placing) and self._name() == other._name()

    # ---- traced values

    def hold_state(self, state: InnerState) -> InnerState:
        """A state, held to its place, which the compiler would choose anew."""
        return state if self.sharding is None else jax.tree.map(_hold, state, self.state)

    def hold_grads(self, grads: PyTree) -> PyTree:
        """Gradients, which lie as the parameters."""
        return grads if self.sharding is None else jax.tree.map(_hold, grads, self.state.params)

    def hold_cotangents(self, cotangent: InnerState, outer: PyTree) -> tuple[InnerState, PyTree]:
        """Cotangents lie as what they belong to."""
        if self.sharding is None:
            return cotangent, outer
        return jax.tree.map(_hold, cotangent, self.moving), jax.tree.map(_hold, outer, self.outer)

    # ---- concrete values

    def put_rows(self, batch: PyTree) -> PyTree:
        """A batch, or the rows of a source, split over the devices."""
        sharding = self.sharding
        if sharding is None:
            return batch
        rows = lambda a: sharding.named(*layout.rows_spec(sharding, a))
        return jax.tree.map(lambda a: layout.put_leaf(a, rows(a)), batch)

    def put_whole(self, value: PyTree) -> PyTree:
        """Arrays on every device."""
        if self.sharding is None:
            return value
        whole = self.sharding.named()
        return jax.tree.map(lambda a: layout.put_leaf(a, whole), value)

    def put_params(self, params: PyTree) -> PyTree:
        """Inner parameters."""
        return (
            params
            if self.sharding is None
            else jax.tree.map(layout.put_leaf, params, self.state.params)
        )

    def put_outer(self, outer: PyTree) -> PyTree:
        """Outer parameters."""
        return outer if self.sharding is None else jax.tree.map(layout.put_leaf, outer, self.outer)


def _hold(leaf: Any, where: NamedSharding) -> Any:
    return (
        leaf
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        else lax.with_sharding_constraint(leaf, where)
    )
