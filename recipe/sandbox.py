"""Renders Jinja templates of others, in a process of its own that the operating system bounds.

A template is a program: loops in loops, a macro that calls itself twice, or one operation such as `'x' * 10**10` or
`'%1000000000d' % 1` may take all time or all memory, and nothing inside of the same process can stop such an operation.
So templates are rendered by a small helper process (`sandbox_process.py`) that knows Jinja alone. It has a limit of
processor time for each text (the system ends the process, whatever it is doing), a limit of memory, no environment
variables, and may neither write files nor start programs. What comes back is text of a limited length.

The helper starts with the first text, in about 0.1 seconds, and ends with this process. Texts go there and back in
batches: rendering in this process would take as long.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

HELPER = Path(__file__).with_name("sandbox_process.py")
SECONDS = 1.0  # of processor time for one text; usual templates take less than a thousandth of it
MEMORY = 1 << 30  # bytes beyond what the helper itself takes
LONGEST = 1_000_000  # characters of a text, beside 20 for each that the texts of a request were made from
PATIENCE = 30.0  # seconds of waiting where the system has no limit of processor time (Windows), or the machine is slow
BATCH = 256  # texts that are asked for at once
KEPT_VARIABLES = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # without which Python may not start

_helpers: dict[int, Helper] = {}  # by the process that owns it: after a fork, parent and child must not share one


class RenderError(Exception):
    """Why a template could not be rendered, in words for its author.

    Attributes:
        line: of the template, where it is known.
        index: of the text that failed.
    """

    def __init__(self, message: str, line: int | None = None, index: int = 0) -> None:
        super().__init__(message)
        self.line, self.index = line, index


def render(
    source: str, contexts: Sequence[Mapping[str, Any]], shared: Mapping[str, Any] | None = None, *, chat: bool = True
) -> list[str]:
    """One text for each context.

    >>> render("{{ greeting }}, {{ name }}", [{"name": "A"}, {"name": "B"}], {"greeting": "Hello"})
    ['Hello, A', 'Hello, B']

    Args:
        source: the template.
        contexts: the variables of each text; values as in JSON.
        shared: variables of all texts.
        chat: as transformers renders chat templates; else a missing variable is an error, and blank lines are kept.

    Raises:
        RenderError: the template is wrong, refuses a text, or needs more than its share of time, memory or length.
    """
    texts: list[str] = []
    while len(texts) < len(contexts):  # the helper sends fewer than it was asked for if they are long
        batch = contexts[len(texts) : len(texts) + BATCH]
        texts += _ask(source, batch, shared or {}, chat, [], len(texts))["texts"]
    return texts


def settings_of(source: str, context: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values that a template, rendered with `chat=False`, sets under these names; None for those that it does not.

    >>> settings_of("{% set low = 0 %}{% set high = 100 %}", {}, ["low", "high", "reason"])
    {'low': 0, 'high': 100, 'reason': None}

    Raises:
        RenderError: see `render`.
    """
    settings: dict[str, Any] = _ask(source, [context], {}, False, names, 0)["settings"]
    return settings


def _ask(
    source: str,
    contexts: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    chat: bool,
    names: Sequence[str],
    first: int,
) -> dict[str, Any]:
    """Ask the helper; `first` is the index of the first context among all."""
    request = {
        "source": source, "contexts": contexts, "shared": shared, "chat": chat, "names": names,
        "seconds": SECONDS, "longest": LONGEST,
    }  # fmt: skip
    content = json.dumps(request, default=str).encode()
    reply = _helper().ask(content, PATIENCE + SECONDS * len(contexts))
    if "error" in reply:
        raise RenderError(reply["error"], reply.get("line"), first + reply.get("index", 0))
    return reply


def _helper() -> Helper:
    helper = _helpers.get(os.getpid())
    if helper is None or helper.process.poll() is not None:
        helper = _helpers[os.getpid()] = Helper()
    return helper


@atexit.register
def _stop() -> None:
    if helper := _helpers.pop(os.getpid(), None):
        helper.end()


class Helper:
    """The process that renders: a request and its reply are JSON, each behind its length in 8 bytes."""

    def __init__(self) -> None:
        variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}  # no secrets
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where Jinja is
        self.lock = threading.Lock()
        self.process = subprocess.Popen(
            [sys.executable, "-S", "-P", str(HELPER), str(MEMORY)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=variables,
            start_new_session=True,  # Ctrl-C is for us; the helper ends when its input does
        )  # fmt: skip

    def ask(self, request: bytes, patience: float) -> dict[str, Any]:
        """The reply to a request, or an error if the process was ended over it."""
        timer = threading.Timer(patience, self.process.kill)
        timer.daemon = True
        with self.lock:
            timer.start()
            try:
                return self._exchange(request)
            except (OSError, EOFError):
                code = self.process.wait()
                return {"error": self._why(code, patience)}
            except BaseException:  # interrupted: the reply to this request would be taken for that to the next one
                self.end()
                raise
            finally:
                timer.cancel()

    def _exchange(self, request: bytes) -> dict[str, Any]:
        stdin, stdout = self.process.stdin, self.process.stdout
        assert stdin is not None and stdout is not None
        stdin.write(len(request).to_bytes(8) + request)
        stdin.flush()
        head = stdout.read(8)
        reply = stdout.read(int.from_bytes(head))
        if len(head) < 8 or len(reply) < int.from_bytes(head):
            raise EOFError
        content: dict[str, Any] = json.loads(reply)
        return content

    @staticmethod
    def _why(code: int, patience: float) -> str:
        """What the exit code of a process that was ended says."""
        if code == -getattr(signal, "SIGPROF", 0):
            return f"it does not end: one text took more than {SECONDS:g} s of processor time"
        if code in (-signal.SIGTERM, -getattr(signal, "SIGKILL", 0), 1):
            return f"it was ended: it takes too much memory, or more than {patience:.0f} s"
        return f"the process that renders it has crashed (exit code {code})"

    def end(self) -> None:
        self.process.kill()
        self.process.wait()
        for stream in (self.process.stdin, self.process.stdout):
            if stream is not None:
                stream.close()
