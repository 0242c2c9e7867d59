"""What is said while the compiler works for long."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Iterator

import jax

LONG = 20.0  # seconds of a first call, after which a line says what is going on


@contextlib.contextmanager
def compiling(what: str) -> Iterator[None]:
    """A line of log where the block takes long."""

    def tell():
        logging.getLogger("bilevax").warning(
            "%s: tracing and compiling the first steps has taken %.0f s so far. It is done once "
            "for these shapes; with the option "
            "jax_compilation_cache_dir the next process finds it done.",
            what,
            LONG,
        )

    timer = threading.Timer(LONG, tell)
    timer.daemon = True
    if jax.process_index() == 0:
        timer.start()
    try:
        yield
    finally:
        timer.cancel()
