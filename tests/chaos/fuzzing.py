"""Tries inputs in forked processes, each with a time limit, and says what became of them; see fuzz_inputs.py."""

import contextlib
import importlib.util
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType

from recipe.config import UserError
from recipe.console import LONGEST_LINE, UNSEEN, as_message

ROOT = Path(__file__).parent.parent.parent
FINE = ("read", "refused")
MEMORY = 12 << 30  # bytes of address space; an input that takes more ends in a MemoryError, and so in a traceback


class MisreadError(Exception):
    """An input was read as something else than it says."""


class ReachedFirstStepError(BaseException):
    """Training would begin: all that is checked before it has passed."""


@dataclass
class Case:
    """An input.

    Attributes:
        kind: how it was made, for the counts.
        content: what repeats it, to be kept if it fails.
        attempt: reads it, in an empty folder.
        expected: "read" or "refused", if that is known.
        words: what a refusal must say.
    """

    kind: str
    content: bytes
    attempt: Callable[[Path], None]
    expected: str = ""
    words: tuple[str, ...] = ()


@dataclass
class Result:
    """What became of an input: `read`, `refused`, or a fault. `lines` are those of the source that it reached first."""

    outcome: str
    said: str = ""
    seconds: float = 0.0
    lines: list[tuple[str, int]] = field(default_factory=list)


def outcome(case: Case, folder: Path) -> tuple[str, str]:
    """Read an input here and now."""
    try:
        case.attempt(folder)
    except MisreadError as error:
        return "misread", str(error)
    except ReachedFirstStepError:
        pass
    except (UserError, OSError) as error:  # which scripts print without a traceback
        said = as_message(str(error))
        if case.expected == "read":
            return "refused wrongly", said
        fault = unclear(said, case.words)
        return ("unclear", f"{fault}: {said}") if fault else ("refused", said)
    except BaseException:
        return "traceback", traceback.format_exc()
    return ("read wrongly", "") if case.expected == "refused" else ("read", "")


def unclear(said: str, words: Sequence[str] = ()) -> str:
    """What is wrong with a message; nothing, if it is clear."""
    if missing := [word for word in words if word not in said]:
        return f"without {missing[0]!r}"
    if unseen := UNSEEN.search(said):
        return f"holds {unseen[0]!r}, which a terminal obeys or hides"
    if any(len(line) > LONGEST_LINE + 20 for line in said.split("\n")):
        return f"a line of more than {LONGEST_LINE} characters"
    return "" if said.strip() and "Traceback" not in said else "says nothing"


def run_cases(
    cases: Sequence[Case], folder: Path, limit: float, seen: set[tuple[str, int]] | None = None, each: int = 1
) -> Iterator[Result]:
    """Each case's result, from processes that are forked for `each` cases.

    Args:
        seen: lines of `recipe/data` that were reached before; None if nobody asks.
    """
    start = 0
    while start < len(cases):
        reader, writer = os.pipe()
        part = cases[start : start + each]
        pid = os.fork()
        if pid == 0:
            os.close(reader)
            _work(part, folder, writer, seen)
        os.close(writer)
        done = 0
        with os.fdopen(reader, "rb", buffering=0) as results:
            rest = b""
            while done < len(part):
                rest, line = _read_line(results.fileno(), rest, limit)
                if line is None:
                    break
                done += 1
                result = Result(**json.loads(line))
                result.lines = [(name, number) for name, number in result.lines]
                yield result
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
        _, status = os.waitpid(pid, 0)
        if done < len(part):
            code = os.waitstatus_to_exitcode(status)
            late = line is None and code == -signal.SIGKILL
            yield Result("hang", f"more than {limit:g} s") if late else Result("crash", f"exit code {code}")
            done += 1
        start += done


def _read_line(descriptor: int, rest: bytes, limit: float) -> tuple[bytes, bytes | None]:
    """The next line of a pipe; none if it does not come in time, or its writer has ended."""
    end = time.monotonic() + limit
    while b"\n" not in rest:
        if not select.select([descriptor], [], [], max(0.0, end - time.monotonic()))[0]:
            return rest, None
        if not (heard := os.read(descriptor, 1 << 16)):
            return rest, None
        rest += heard
    line, _, rest = rest.partition(b"\n")
    return rest, line


def _work(cases: Sequence[Case], folder: Path, writer: int, seen: set[tuple[str, int]] | None) -> None:
    """In the child: judge the cases, and end."""
    try:
        os.setsid()
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
        nowhere = os.open(os.devnull, os.O_RDWR)
        for descriptor in (0, 1, 2):
            os.dup2(nowhere, descriptor)
        for number, case in enumerate(cases):
            place = folder / f"{os.getpid()}-{number}"
            place.mkdir()
            os.chdir(place)
            begun, lines = time.monotonic(), []
            with _lines_into(lines, seen):
                found, said = outcome(case, place)
            seconds = time.monotonic() - begun
            result = {"outcome": found, "said": said[:20_000], "seconds": round(seconds, 3), "lines": lines}
            os.chdir(folder)
            shutil.rmtree(place, ignore_errors=True)
            content = json.dumps(result).encode() + b"\n"
            while content:
                content = content[os.write(writer, content) :]
    finally:
        os._exit(0)


@contextlib.contextmanager
def _lines_into(new: list[tuple[str, int]], seen: set[tuple[str, int]] | None) -> Iterator[None]:
    """Note the lines of `recipe/data` that are reached for the first time."""
    if seen is None:
        yield
        return
    home = str(ROOT / "recipe" / "data")

    def note(frame, event, _):
        place = (os.path.basename(frame.f_code.co_filename), frame.f_lineno)
        if event == "line" and place not in seen:
            seen.add(place)
            new.append(place)
        return note

    sys.settrace(lambda frame, *_: note if frame.f_code.co_filename.startswith(home) else None)
    try:
        yield
    finally:
        sys.settrace(None)


PIECES = [
    b"\0", b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xef\xbb\xbf", b'"', b'""', b"\\", b'\\"', b"\\u", b"\\ud800", b"{",
    b"}", b"[", b"]", b",",
    b":", b"\n", b"\r", b"\r\n", b" ", b"\t", b"null", b"NaN", b"Infinity", b"1e400", b"9" * 5000, b"[" * 3000,
    b'{"":' * 3000, b"'",
    b"#", b"&a ", b"*a", b"!!", b"|", b">", b"- ", b"? ", b"%", b"---\n", b"...", b"<<: ", b"{{", b"}}", b"{%",
    b"%}", b"{#", b"\x1b[2J",
    "\u2028".encode(), "\u202e".encode(), b"\x85", b"\x1c", b"x" * 70_000,
]  # fmt: skip


def damage(draw: random.Random, content: bytes, others: Sequence[bytes], pieces: Sequence[bytes] = ()) -> bytes:
    """Some bytes changed, removed, doubled, moved, or taken from another input."""
    data = bytearray(content)
    for _ in range(draw.choice([1, 1, 2, 3, 6])):
        start = draw.randrange(len(data) + 1)
        end = min(len(data), start + draw.choice([0, 1, 1, 2, 8, 40, 1000]))
        how = draw.randrange(8)
        if how == 0 and start < len(data):
            data[start] ^= 1 << draw.randrange(8)
        elif how == 1:
            data[start:end] = bytes(draw.randrange(256) for _ in range(end - start))
        elif how == 2:
            del data[start:end]
        elif how == 3:
            data[start:start] = data[start:end] * draw.choice([1, 2, 50])
        elif how in (4, 5):
            data[start : end if how == 4 else start] = draw.choice([*PIECES, *pieces])
        elif how == 6:
            other = draw.choice(others)
            begin = draw.randrange(len(other) + 1)
            data[start:end] = other[begin : begin + draw.choice([1, 10, 100])]
        else:
            del data[start:]
    return bytes(data)


def train_script() -> ModuleType:
    """scripts/train.py as a module, of which `main` ends where the first step would begin."""
    spec = importlib.util.spec_from_file_location("train_script", ROOT / "scripts" / "train.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["train_script"] = script
    spec.loader.exec_module(script)
    return script


def stop_at_first_step() -> None:
    """Let training end where it would change what is on the disk; in a child, for good."""
    from recipe.training.first_step import FirstStep

    def reached(self: FirstStep) -> None:
        raise ReachedFirstStepError

    FirstStep._take = reached
