"""An OpenAI-compatible endpoint on a loopback port that fails as it is told to.

What it does is scripted by a word in the prompt: a message that holds `do:NAME` gets the acts of that name, one an
attempt, the last one again and again; other messages (the warm-up) get the acts of `""`::

    with serve_stub({"": [Say("1")], "busy": [Status(429, {"Retry-After": "1"}), Say("85")]}) as stub:
        stub.url, stub.asked("busy")
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Say:
    """A proper completion; `text` may be a function of the prompt."""

    text: str | Callable[[str], str]
    finish_reason: str = "stop"


@dataclass(frozen=True)
class Status:
    code: int
    headers: Mapping[str, str] = field(default_factory=dict)
    body: str = '{"error": {"message": "the stub was told to"}}'


@dataclass(frozen=True)
class Raw:
    """Any body with status 200."""

    body: bytes


@dataclass(frozen=True)
class Hang:
    """No answer for so many seconds."""

    seconds: float


@dataclass(frozen=True)
class Cut:
    """The headers and the beginning of a body, then the end of the connection."""


@dataclass(frozen=True)
class Drip:
    """A byte now and then, each in time, the whole never."""

    seconds: float


Act = Say | Status | Raw | Hang | Cut | Drip
Refuse = Callable[[dict], Act | None]  # from the body of a request, before any act: what it is refused with


class Stub:
    """What was asked of a running stub, and what it is told to do; both may be changed while it runs."""

    def __init__(self, script: Mapping[str, Sequence[Act]], takes_schema: bool, refuses: Refuse | None) -> None:
        self.script = dict(script)
        self.refuses = refuses
        self.takes_schema = takes_schema
        self.url = ""
        self.bodies: list[dict] = []
        self.attempts: Counter[str] = Counter()  # answered by an act, by name
        self.keys: list[str] = []
        self.headers: list[dict[str, str]] = []
        self.at_once = self.most_at_once = 0
        self.lock = threading.Lock()

    def asked(self, name: str | None = None) -> int:
        """How many requests held `do:NAME`; without a name, how many held any."""
        names = Counter(name_in(body) for body in self.bodies)
        return names[name] if name else names.total() - names[""]

    def next_act(self, body: dict, key: str) -> Act:
        with self.lock:
            self.bodies.append(body)
            self.keys.append(key)
            name = name_in(body)
            if "response_format" in body and not self.takes_schema:
                return Status(422, body='{"detail": "Unexpected fields in the request: response_format"}')
            refusal = self.refuses(body) if self.refuses else None
            if refusal:
                return refusal
            acts = self.script[name] if name in self.script else self.script[""]
            self.attempts[name] += 1
            return acts[min(self.attempts[name], len(acts)) - 1]


def prompt_of(body: dict) -> str:
    return body["messages"][-1]["content"]


def name_in(body: dict) -> str:
    found = re.search(r"do:(\w+)", prompt_of(body))
    return found[1] if found else ""


@contextmanager
def serve_stub(
    script: Mapping[str, Sequence[Act]], takes_schema: bool = True, refuses: Refuse | None = None
) -> Iterator[Stub]:
    """Serve chat completions until the block ends."""
    stub = Stub(script, takes_schema, refuses)
    is_over = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with stub.lock:
                stub.headers.append(dict(self.headers))
                stub.at_once += 1
                stub.most_at_once = max(stub.most_at_once, stub.at_once)
            try:
                self.act(stub.next_act(body, self.headers["Authorization"]), prompt_of(body))
            except (BrokenPipeError, ConnectionResetError):
                pass  # the client had waited long enough
            finally:
                with stub.lock:
                    stub.at_once -= 1

        def act(self, act: Act, prompt: str) -> None:
            if isinstance(act, Say):
                text = act.text if isinstance(act.text, str) else act.text(prompt)
                self.send_whole(200, completion(text, act.finish_reason))
            elif isinstance(act, Status):
                self.send_whole(act.code, act.body.encode(), act.headers)
            elif isinstance(act, Raw):
                self.send_whole(200, act.body)
            elif isinstance(act, Hang):
                is_over.wait(act.seconds)
            elif isinstance(act, Cut):
                whole = completion("85")
                self.send_whole(200, whole[:20], {"Content-Length": str(len(whole))})
            elif isinstance(act, Drip):
                self.send_whole(200, b"", {"Content-Length": "1000"})
                until = time.monotonic() + act.seconds
                while time.monotonic() < until and not is_over.wait(0.05):
                    self.wfile.write(b" ")
                    self.wfile.flush()

        def send_whole(self, code: int, content: bytes, headers: Mapping[str, str] | None = None) -> None:
            self.send_response(code)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content)), **(headers or {})}
            for name, value in headers.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    stub.url = f"http://127.0.0.1:{server.server_port}/v1"
    try:
        yield stub
    finally:
        is_over.set()
        server.shutdown()
        server.server_close()
        thread.join(timeout=5)


def completion(text: str, finish_reason: str = "stop") -> bytes:
    """A completion of 10 prompt tokens and 2 more."""
    return json.dumps(
        {
            "model": "stub-2026",
            "choices": [{"message": {"role": "assistant", "content": text}, "finish_reason": finish_reason}],
            "usage": {"prompt_tokens": 10, "completion_tokens": 2, "total_tokens": 12},
        }
    ).encode()
