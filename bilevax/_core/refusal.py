"""Values that must not be differentiated: doing so raises, in words of one's own."""

from __future__ import annotations

from functools import partial
from typing import Any, NoReturn

import jax

from bilevax._core.types import PyTree


@partial(jax.custom_jvp, nondiff_argnums=(0,))
def undifferentiable(why: str, value: PyTree) -> PyTree:
    """`value`; a derivative that reaches it raises a ValueError that says `why`."""
    return value


@undifferentiable.defjvp
def _refuse(why: str, primals: Any, tangents: Any) -> NoReturn:
    raise ValueError(why)
