"""Renders Jinja templates of others, in a process of its own that the operating system bounds.

A template is a program: loops in loops, a macro that calls itself twice, or one operation such as `'x' * 10**10` or
`'%1000000000d' % 1` may take all time or all memory, and nothing inside of the same process can stop such an operation.
So templates are rendered by a small helper process (`sandbox_process.py`) that knows Jinja alone. It has a limit of
processor time for each text (the system ends the process, whatever it is doing) and a limit of memory. What comes back
is text of a limited length. It is Jinja's sandbox that keeps a template from files and programs. If one gets out of it,
the helper holds none of the user's variables but those in `KEPT_VARIABLES`, and on Linux it can write nothing into a
file; nor can it start a second process, unless it runs as root. It could still create, empty and remove files, and
become another program.

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
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

HELPER = Path(__file__).with_name("sandbox_process.py")
SECONDS = 1.0  # of processor time for one text; usual templates take less than a thousandth of it
MEMORY = 1 << 30  # bytes beyond what the helper itself takes
LONGEST = 1_000_000  # characters of a text, plus 20 for each character of the request
# seconds to wait for a batch, plus SECONDS for each of its texts: what ends it where the system has no limit of
# processor time (Windows), or the machine is slow
PATIENCE = 30.0
BATCH = 256  # texts that are asked for at once
READY = b"ready"  # what the helper says when it is
KEPT_VARIABLES = ("TZ", "SYSTEMROOT", "LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH")  # without which Python may not start

T = TypeVar("T")

_helpers: dict[int, Helper] = {}  # by the process that owns it: after a fork, parent and child must not share one


class RenderError(Exception):
    """Why a template could not be rendered, in words for its author.

    Attributes:
        line: of the template, where it is known.
    """

    def __init__(self, message: str, line: int | None = None) -> None:
        super().__init__(message)
        self.line = line


def render(
    source: str,
    contexts: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any] | None = None,
    *,
    chat: bool = True,
    refused: dict[int, str] | None = None,
) -> list[str]:
    """One text for each context.

    >>> render("{{ greeting }}, {{ name }}", [{"name": "A"}, {"name": "B"}], {"greeting": "Hello"})
    ['Hello, A', 'Hello, B']

    Args:
        source: the template.
        contexts: the variables of each text; values as in JSON.
        shared: variables of all texts.
        chat: as transformers renders chat templates; else a missing variable is an error, and blank lines are kept.
        refused: is given why a text could not be rendered, by the index of its context; that text is then empty.

    Raises:
        RenderError: the template is wrong, refuses a text (without `refused`), or needs more than its share of time,
            memory or length.
    """
    texts: list[str] = []
    while len(texts) < len(contexts):  # the helper sends fewer than it was asked for if they are long
        batch = contexts[len(texts) : len(texts) + BATCH]
        reply = _ask(source, batch, shared or {}, chat, [], refused is not None)
        if refused is not None:
            refused |= {len(texts) + int(index): said for index, said in reply["refused"].items()}
        texts += reply["texts"]
    return texts


def settings_of(source: str, context: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
    """The values that a template, rendered with `chat=False`, sets under these names; None for those that it does not.

    >>> settings_of("{% set low = 0 %}{% set high = 100 %}", {}, ["low", "high", "reason"])
    {'low': 0, 'high': 100, 'reason': None}

    Raises:
        RenderError: see `render`.
    """
    settings: dict[str, Any] = _ask(source, [context], {}, False, names)["settings"]
    return settings


def _ask(
    source: str,
    contexts: Sequence[Mapping[str, Any]],
    shared: Mapping[str, Any],
    chat: bool,
    names: Sequence[str],
    each: bool = False,
) -> dict[str, Any]:
    request = {
        "source": source, "contexts": contexts, "shared": shared, "chat": chat, "names": names, "each": each,
        "seconds": SECONDS, "longest": LONGEST,
    }  # fmt: skip
    content = json.dumps(request, default=str).encode()
    reply = _helper().ask(content, PATIENCE + SECONDS * len(contexts))
    if "error" in reply:
        raise RenderError(reply["error"], reply.get("line"))
    return reply


def _helper() -> Helper:
    return _helpers.setdefault(os.getpid(), Helper())  # in one step, so that no two threads have one each


@atexit.register
def _stop() -> None:
    if helper := _helpers.pop(os.getpid(), None):
        helper.end()


class Helper:
    """The process that renders, started when it is asked, and again after it was ended.

    It says `READY`; then a request and its reply are JSON, each behind its length in 8 bytes.
    """

    def __init__(self) -> None:
        self.lock = threading.RLock()  # who holds it may start, ask and end the process
        self.process: subprocess.Popen[bytes] | None = None

    def ask(self, request: bytes, patience: float) -> dict[str, Any]:
        """The reply to a request, or an error if the process did not start, or was ended over it."""
        with self.lock:
            try:
                if problem := self._start():
                    return {"error": problem}
                return self._within(patience, self._exchange, request)
            except (OSError, EOFError):
                assert self.process is not None
                return {"error": self._why(self.process.wait(), patience)}
            except BaseException:  # interrupted: the reply to this request would be taken for that to the next one
                self.end()
                raise

    def _start(self) -> str | None:
        """Start the process if there is none; what hinders it, if it does not."""
        if self.process is not None and self.process.poll() is None:
            return None
        self.end()
        variables = {name: os.environ[name] for name in KEPT_VARIABLES if name in os.environ}  # no secrets
        variables["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))  # where Jinja is
        try:
            self.process = subprocess.Popen(
                [sys.executable, "-S", "-P", str(HELPER), str(MEMORY)],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=variables,
                start_new_session=True,  # Ctrl-C is for us; the helper ends when its input does
            )  # fmt: skip
        except OSError as error:
            return f"the process that renders templates did not start: {error}"
        stdout, stderr = self.process.stdout, self.process.stderr
        assert stdout is not None and stderr is not None
        if self._within(PATIENCE, stdout.read, len(READY)) != READY:
            self.process.kill()
            last = "".join(stderr.read().decode("utf-8", "replace").strip().splitlines()[-1:])
            code = self.process.wait()
            return f"the process that renders templates did not start: {last or f'it ended with exit code {code}'}"
        stderr.close()
        return None

    def _within(self, patience: float, wait: Callable[[Any], T], argument: Any) -> T:
        """What `wait(argument)` returns; the process is ended if that takes longer than `patience` seconds."""
        assert self.process is not None
        timer = threading.Timer(patience, self.process.kill)
        timer.daemon = True
        timer.start()
        try:
            return wait(argument)
        finally:
            timer.cancel()

    def _exchange(self, request: bytes) -> dict[str, Any]:
        assert self.process is not None
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
        if process := self.process:
            process.kill()  # who waits for a reply in another thread goes on, and gives back the lock
            with self.lock:
                process.wait()
                for stream in (process.stdin, process.stdout, process.stderr):
                    if stream is not None:
                        with suppress(OSError):  # what was not sent yet
                            stream.close()
