"""A metagradient through a whole training run, its states on the host: time over plain training and peak device memory."""

from __future__ import annotations

import bilevax as bx
from benchmarks._accelerator.common import Part


def run(part: Part) -> None:
    if not hasattr(bx, "replay"):
        part.skip("replay", "bx.replay is not there")
        return
