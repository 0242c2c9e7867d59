"""SIGTERM as a question that the driver asks between chunks."""

from __future__ import annotations

import signal
import threading

import jax
import numpy as np


class Preemption:
    """``with Preemption() as asked:`` ``asked()`` is true after a SIGTERM, on every process once it came to one of them."""

    def __init__(self):
        self._flag, self._before, self._mine = threading.Event(), None, threading.current_thread() is threading.main_thread()

    def __enter__(self):
        if self._mine:  # handlers can be set in the main thread only
            self._before = signal.signal(signal.SIGTERM, lambda *_: self._flag.set())
        return self

    def __exit__(self, *_):
        if self._mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL if self._before is None else self._before)

    def __call__(self) -> bool:
        if jax.process_count() == 1:
            return self._flag.is_set()
        from jax.experimental import multihost_utils

        return bool(np.any(multihost_utils.process_allgather(np.asarray(self._flag.is_set()))))
