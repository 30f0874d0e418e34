"""The helper process of `sandbox.py`: reads templates with their variables, and writes the texts; knows Jinja alone.

The environment of chat templates is that of `apply_chat_template` in transformers: the same settings, functions and
tags. It is run as a file, so that nothing else of this package, and none of its libraries, has to be imported.
"""

from __future__ import annotations

import gc
import json
import re
import signal
import sys
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.sandbox

LONGEST_MESSAGE = 300  # characters
MOST_AT_ONCE = 16_000_000  # characters of the texts of a reply, after which the others are asked for again


class Generation(jinja2.ext.Extension):
    """`{% generation %}`, around what a model says: here only its content counts."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Any) -> Any:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_content"), [], [], body).set_lineno(line)

    def _content(self, caller: Any) -> Any:
        return caller()


def raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


@lru_cache(maxsize=1)
def chat_environment() -> jinja2.Environment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = tojson
    environment.globals.update(raise_exception=raise_exception, strftime_now=strftime_now)
    return environment


@lru_cache(maxsize=1)
def text_environment() -> jinja2.Environment:
    return jinja2.sandbox.ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


@lru_cache(maxsize=16)
def compiled(source: str, chat: bool) -> jinja2.Template:
    return (chat_environment() if chat else text_environment()).from_string(source)


def answer(request: Mapping[str, Any]) -> dict[str, Any]:
    """The texts of a request, or what is wrong with its template."""
    texts: list[str] = []
    refused: dict[int, str] = {}
    total = 0
    try:
        start_clock(request["seconds"])
        template = compiled(request["source"], request["chat"])
        if request["names"]:
            values = vars(template.make_module({**request["shared"], **request["contexts"][0]}))
            return {"settings": {name: values.get(name) for name in request["names"]}}
        for context in request["contexts"]:
            start_clock(request["seconds"])
            try:
                texts.append(template.render(request["shared"], **context))
            except (MemoryError, RecursionError):
                raise
            except Exception as error:
                if not request["each"]:
                    raise
                refused[len(texts)] = problem(str(error) or type(error).__name__)["error"]
                texts.append("")
            if len(texts[-1]) > request["longest"]:
                length, longest = len(texts[-1]), request["longest"]
                return problem(f"it makes a text of {length:,} characters; at most {longest:,} are taken")
            total += len(texts[-1])
            if total > MOST_AT_ONCE:
                break
        return {"texts": texts, "refused": refused}
    except MemoryError:
        texts = texts[:0]
        return problem("it takes too much memory, more than 1 GB")
    except RecursionError:
        return problem("it calls itself, or is nested, too deeply (recursion)")
    except jinja2.TemplateSyntaxError as error:
        return {**problem(str(error.message)), "line": error.lineno}
    except Exception as error:  # an expression of a template may raise anything
        return problem(str(error) or type(error).__name__)


def problem(message: str) -> dict[str, Any]:
    """What is sent of an error; a template may raise megabytes."""
    return {"error": re.sub(r"\s+", " ", message[:LONGEST_MESSAGE]).strip()}


def start_clock(seconds: float) -> None:
    """Let the system end this process after so much processor time, whatever it is doing then."""
    if hasattr(signal, "setitimer"):  # not on Windows
        signal.setitimer(signal.ITIMER_PROF, seconds)


def bound(memory: int) -> None:
    """Limit the memory; let nothing be written into files, and (root excepted) no second process be started."""
    try:
        import resource
    except ImportError:  # on Windows
        return
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            memory += int(file.read().split()[0]) * resource.getpagesize()
    except OSError:  # not Linux
        pass
    for limit, value in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_FSIZE, 0), (resource.RLIMIT_NPROC, 0)):
        try:
            resource.setrlimit(limit, (value, value))
        except (ValueError, OSError):  # lower already, or not known to this system
            continue


def main() -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    chat_environment(), text_environment()
    datetime.now().strftime("%d")  # whatever these import is imported before the limits
    gc.set_threshold(100_000)  # thousands of texts at once would keep it busy
    bound(int(sys.argv[1]))
    read, write = sys.stdin.buffer.read, sys.stdout.buffer.write
    write(b"ready")
    sys.stdout.flush()
    while len(head := read(8)) == 8:
        content = read(int.from_bytes(head))
        request = json.loads(content)
        request["longest"] += 20 * len(content)
        reply = answer(request)
        start_clock(10 * request["seconds"])
        try:
            content = json.dumps(reply, default=str).encode()
        except (MemoryError, RecursionError, ValueError) as error:
            content = json.dumps(problem(f"its texts cannot be sent ({type(error).__name__})")).encode()
        start_clock(0)
        write(len(content).to_bytes(8) + content)
        sys.stdout.flush()


if __name__ == "__main__":
    main()
