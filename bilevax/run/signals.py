"""SIGTERM and SIGINT as questions that the driver asks between chunks."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable
from typing import Any


class Signals:
    """``with Signals(...) as heard:`` what came is in ``heard.terminate`` and ``heard.interrupt``.

    Handlers are set in the main thread only, where alone they can be, and put back at the end. One
    that ignores the signal stays; a function of somebody else's is called after ours. A second
    SIGINT raises KeyboardInterrupt at once.
    """

    def __init__(self, numbers: tuple[int, ...]):
        mine = threading.current_thread() is threading.main_thread()
        self.numbers = numbers if mine else ()
        self.terminate = self.interrupt = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Any:
        for number in self.numbers:
            if signal.getsignal(number) is not signal.SIG_IGN:
                self._before[number] = signal.signal(number, self._heard)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, before in self._before.items():
            signal.signal(number, signal.SIG_DFL if before is None else before)
        self._before = {}

    def _heard(self, number: int, frame: Any) -> None:
        if number == signal.SIGTERM:
            self.terminate = True
        elif self.interrupt:
            raise KeyboardInterrupt
        else:
            self.interrupt = True
        before: Callable[..., Any] | int | None = self._before.get(number)
        if callable(before) and before is not signal.default_int_handler:
            before(number, frame)
