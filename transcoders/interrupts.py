"""A request to end: SIGTERM, which a cluster sends before it takes a machine away, or Ctrl-C."""

import signal
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

PATIENCE = 2
"""A third Ctrl-C ends the process at once. The second may be torchrun's, which passes the first one on."""


@contextmanager
def asked_to_stop() -> Iterator[list[int]]:
    """Inside the block SIGTERM and Ctrl-C end nothing: their numbers are only remembered, in the yielded list."""
    asked: list[int] = []

    def remember(number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and asked.count(number) == PATIENCE:
            raise KeyboardInterrupt
        asked.append(number)

    before = {number: signal.signal(number, remember) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
