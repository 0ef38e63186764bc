"""SIGINT and SIGTERM: finish the step, checkpoint, then stop."""

import ctypes
import os
import signal
import sys
import threading
import time
from contextlib import AbstractContextManager, suppress
from types import FrameType, TracebackType

_ECHO = 2.0  # seconds: torchrun sends on to its ranks the Ctrl-C that the terminal has sent them already


PARENT = "HETERODOX_PARENT"
"""The environment variable in which a study tells its runs its own process id."""


PR_SET_PDEATHSIG = 1


def follow_parent() -> None:
    """Let this run of a study receive SIGTERM when the study's process dies, however it dies.

    Linux sends the signal itself. Elsewhere `Interrupt` looks, once a step, whether the parent is still the same.
    """
    parent = int(os.environ.get(PARENT, "0"))
    if not parent:
        return
    if sys.platform == "linux":
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
    if os.getppid() != parent:  # it died before this
        os.kill(os.getpid(), signal.SIGTERM)


class Interrupt(AbstractContextManager["Interrupt"]):
    """Within the context, the two signals only set `received`. A later second one stops at once.

    The run of a study whose process is no more has received SIGTERM.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._at = 0.0
        self._parent = int(os.environ.get(PARENT, "0"))
        self._previous: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._note)
        return self

    @property
    def received(self) -> int | None:
        """The first signal, or None."""
        if self._received is None and self._parent and os.getppid() != self._parent:
            self._received = signal.SIGTERM
        return self._received

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._received is None:
            self._received, self._at = number, time.monotonic()
        elif time.monotonic() - self._at > _ECHO:
            raise KeyboardInterrupt

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)  # pyrefly: ignore[bad-argument-type]
