"""Which cases of a parametrised test are run each time, and which in the long suite only."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import Any

import pytest


def quick(values: Iterable, chosen: Collection) -> list[Any]:
    """All `values` as parameters, those that are not `chosen` marked slow: they say again what the
    chosen ones say."""
    values = list(values)
    missing = [value for value in chosen if value not in values]
    assert not missing, missing  # a case that was renamed must not leave the quick suite unseen
    return [
        value if value in chosen else pytest.param(value, marks=pytest.mark.slow)
        for value in values
    ]
