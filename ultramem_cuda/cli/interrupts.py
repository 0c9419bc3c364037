"""SIGTERM as an exception, so that what is under way is cleaned up as it is after Ctrl-C."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


class Terminated(KeyboardInterrupt):
    """SIGTERM has arrived."""


@contextmanager
def terminable() -> Iterator[None]:
    """Raises Terminated at the first SIGTERM inside the block; in the main thread only."""
    if threading.current_thread() is not threading.main_thread():
        # Python lets no other thread set handlers.
        yield
        return
    before = signal.signal(signal.SIGTERM, _raise_terminated)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _raise_terminated(number: int, frame: FrameType | None) -> None:
    # A second one must not break off the cleaning up after the first.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise Terminated
