"""Runs code as a reader would: in jax's default configuration, from an empty folder, with pictures
kept off the screen."""

import contextlib
import os
from pathlib import Path

import jax

DEFAULTS = {
    "jax_enable_x64": False,
    "jax_numpy_dtype_promotion": "standard",
    "jax_numpy_rank_promotion": "allow",
}


@contextlib.contextmanager
def as_reader(folder: Path):
    """jax's defaults and the working directory `folder`; all of it put back at the end, whatever
    the code sets."""
    saved = {name: getattr(jax.config, name) for name in DEFAULTS}
    backend = os.environ.get("MPLBACKEND")
    os.environ["MPLBACKEND"] = "agg"
    try:
        for name, value in DEFAULTS.items():
            jax.config.update(name, value)
        with contextlib.chdir(folder):
            yield
    finally:
        for name, value in saved.items():
            jax.config.update(name, value)
        os.environ.pop("MPLBACKEND") if backend is None else os.environ.__setitem__(
            "MPLBACKEND", backend
        )
