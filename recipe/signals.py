"""The signals that tell a process to stop, and who takes them."""

from __future__ import annotations

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C is SIGINT; Windows has no SIGHUP
STOPPING = [getattr(signal, name) for name in ("SIGTERM", "SIGINT", "SIGHUP") if hasattr(signal, name)]


@contextmanager
def taken_by(handler: Callable[..., Any] | signal.Handlers) -> Iterator[None]:
    """Let `handler` take them for a while, but for those that are ignored, as SIGHUP under `nohup`.

    What happened to them before, happens again afterwards.

    Example::

        with taken_by(signal.SIG_DFL):  # which ends the process at once
            wait_in_a_library()
    """
    before = {number: signal.getsignal(number) for number in STOPPING}
    try:
        for number, former in before.items():
            if former is not signal.SIG_IGN:
                signal.signal(number, handler)
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)
