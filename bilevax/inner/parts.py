"""Mappings ``(inner_params, outer_params, batch) -> inner_params`` as the library calls them: for solvers of fixed points, and their methods."""

from bilevax.inner._mapping import apply, as_mapping, bound_like

__all__ = ["apply", "as_mapping", "bound_like"]
