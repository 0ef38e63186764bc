"""SIGINT and SIGTERM: finish the step, checkpoint, then stop."""

import signal
import threading
import time
from contextlib import AbstractContextManager
from types import FrameType, TracebackType

_ECHO = 2.0  # seconds: torchrun sends on to its ranks the Ctrl-C that the terminal has sent them already


class Interrupt(AbstractContextManager["Interrupt"]):
    """Within the context, the two signals only set `received`. A later second one stops at once."""

    def __init__(self) -> None:
        self.received: int | None = None
        self._at = 0.0
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.received is None:
            self.received, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > _ECHO:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
