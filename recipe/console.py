"""The terminal: how scripts start and end there, and tables and answers in it."""

from __future__ import annotations

import atexit
import io
import logging
import multiprocessing
import os
import re
import select
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from typing import Any, NoReturn

from rich.console import Console
from rich.measure import Measurement
from rich.table import Table
from rich.text import Text

import recipe
from recipe.config import UserError
from recipe.disk import AGAIN, disk_error, explain_disk
from recipe.keys import clean_hub_token
from recipe.peers import GONE, peer_error, tell_launcher
from recipe.redaction import redact, redact_message
from recipe.signals import STOPPING

RANKS = ("RANK", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")  # as torchrun and MPI launchers set them
SECONDS_OF_PATIENCE = 5  # of a process for the main one, which should have met the same error
BUG = "This is a bug in the recipe"
WIDTH = 120  # of tables that go to a file
NARROWEST = 6  # a column of names in a narrow terminal
HEADING = 20  # a longer heading above a column of figures is folded
LONGEST_LINE = 1_500  # characters of an error, which may quote a file
UNLIMITED = 10_000  # characters; wider than any table
# invisible, or able to reorder the text around them: C0 except tab and newline, C1, soft hyphen, zero width, bidi marks
UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb\ufffe\uffff\ud800-\udfff]"
)


def run_script(
    main: Callable[[list[str]], None],
    interrupted: str,
    after_os_error: str = "",
    expected: tuple[type[Exception], ...] = (),
) -> None:
    """Run a script's `main` on the words of the command line, and end the process as a terminal expects.

    A character that the terminal's encoding lacks is shown as its escape. A `UserError`, an `OSError` and what else is
    `expected` end with one message and exit code 1; so do Ctrl-C, SIGTERM and SIGHUP, with the script's own words. Any
    other error is a bug of ours: it shows its traceback, versions, and how to report it. Nothing is shown before
    `redact_message` has seen it. When all is done, a signal no longer changes the exit code.

    Example::

        if __name__ == "__main__":
            run_script(main, interrupted="nothing was changed; run it again")
    """
    stopped = False
    atexit.register(_ignore_signals)
    for number in STOPPING:
        if signal.getsignal(number) is signal.SIG_DFL:  # not what is ignored, as SIGHUP under `nohup`
            signal.signal(number, signal.default_int_handler)
    try:
        with safe_output():
            clean_hub_token()
            main(sys.argv[1:])
    except KeyboardInterrupt:
        stopped = True
    except Exception as error:
        if isinstance(error, BrokenPipeError) and _reader_has_left():
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # takes what is still in the buffer
            sys.exit(1)
        if isinstance(error, (UserError, *expected)):
            _exit(f"error: {error}")
        if found := disk_error(error):
            _exit(f"error: {explain_disk(found, then='' if after_os_error else AGAIN)}{after_os_error}")
        if said := peer_error(error):
            _exit(f"error: {said}", is_first=said != GONE)
        if isinstance(error, OSError):
            _exit(f"error: {error}{after_os_error}")
        _exit(f"{traceback.format_exc().rstrip()}\n{_bug()}", f"{BUG}: {type(error).__name__}: {error}")
    if stopped:
        sys.exit(f"interrupted: {interrupted}" if process_rank() == "0" else 1)


def _ignore_signals() -> None:
    """When all is done and Python ends, SIGTERM or Ctrl-C would only turn the exit code into another one."""
    for number in STOPPING:
        signal.signal(number, signal.SIG_IGN)


class SafeStream(io.TextIOWrapper):
    """A stream of the terminal that shows no secret."""

    def write(self, text: str) -> int:
        super().write(redact_message(text))
        return len(text)


_streams: list[SafeStream] = []  # a library may go on with one that it has seen; and one that is freed is closed


@contextmanager
def safe_output() -> Iterator[None]:
    """While it lasts, whatever is printed, warned of or logged, here or in a library, goes through `redact_message`."""
    make_record = logging.getLogRecordFactory()

    def safe_record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make_record(*args, **kwargs)
        record.msg, record.args = redact_message(record.getMessage()), ()
        return record

    streams: list[Any] = [sys.stdout, sys.stderr]
    safe = [
        SafeStream(
            stream.buffer, encoding=stream.encoding, errors="backslashreplace", line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )
        for stream in streams
    ]  # fmt: skip
    _streams.extend(safe)
    logging.setLogRecordFactory(safe_record)
    try:
        with redirect_stdout(safe[0]), redirect_stderr(safe[1]):
            yield
    finally:
        close_progress_bars()
        logging.setLogRecordFactory(make_record)
        for stream in safe:
            stream.flush()


def close_progress_bars() -> None:
    """Let the bars that an error has left in the middle end their line."""
    library: Any = sys.modules.get("tqdm.std")
    for bar in list(library.tqdm._instances) if library else ():
        bar.close()


def _reader_has_left() -> bool:
    """Whether nobody reads our output any more, as after `| head`: no error to report."""
    if not hasattr(select, "poll"):  # on Windows
        return True
    pipe = select.poll()
    pipe.register(sys.stdout.fileno(), 0)
    return bool(pipe.poll(0))


def _bug() -> str:
    from recipe.provenance import versions  # here: it looks for all libraries

    ran = ", ".join(f"{name} {version}" for name, version in versions().items())
    return (
        f"\n{BUG} {recipe.__version__}, not in what you gave it. It ran with {ran}.\n"
        "Please report it as an issue of the repository that the recipe is from, with the command and the lines above "
        "(CONTRIBUTING.md); if it endangers somebody, privately (SECURITY.md)."
    )


def _exit(message: str, in_short: str = "", is_first: bool = True) -> NoReturn:
    """Print an error and exit with 1; one process speaks for all that have met it, and in the launcher's report, too.

    The launcher ends the others when the first ends. So who is still there after a while has met an error of its own.

    Args:
        in_short: for the launcher's report, where it is the last thing to be seen.
        is_first: whether no other process can have told what this comes from.
    """
    message, rank = as_message(message), process_rank()
    if is_first:
        tell_launcher(as_message(in_short) or message)
    if rank != "0" or not is_first:
        try:
            time.sleep(SECONDS_OF_PATIENCE)
        except KeyboardInterrupt:  # the launcher ends this one, because another has told
            sys.exit(1)
        message = f"process {rank}: {message}"
    for worker in multiprocessing.active_children():  # the interpreter would wait for one that hangs
        worker.kill()
        sys.unraisablehook = lambda error: None  # the loader it belonged to would complain of that, behind the message
    sys.exit(message)


def as_message(text: str) -> str:
    """An error as the terminal shows it: no secrets, no control characters, and of a very long line its two ends."""
    lines = visible(redact_message(text)).split("\n")
    return "\n".join(
        line if len(line) <= LONGEST_LINE else f"{line[: LONGEST_LINE // 2]} [...] {line[-LONGEST_LINE // 2 :]}"
        for line in lines
    )


def process_rank() -> str:
    """Which of a run's processes this is, as its launcher says; "0" if there is none."""
    return next((os.environ[name] for name in RANKS if name in os.environ), "0")


def visible(text: str) -> str:
    """A text with its invisible characters shown: control characters by their picture, others by their code point.

    >>> visible("a\\x00b\\u202ec")
    'a␀b⟨U+202E⟩c'
    """
    return UNSEEN.sub(lambda match: _picture(ord(match[0])), text)


def _picture(code: int) -> str:
    if code == 0x7F:
        return "␡"
    return chr(0x2400 + code) if code < 0x20 else f"⟨U+{code:04X}⟩"


def shorten(text: str, limit: int = 60) -> str:
    """A text of at most `limit` characters; a longer one is cut and ends in three dots."""
    return text if len(text) <= limit else text[: limit - 3] + "..."


def one_line(text: str, limit: int = 200) -> str:
    """A text in one line of at most `limit` characters, without characters that control a terminal."""
    return shorten(visible(text[: limit + 1]).replace("\n", "\\n").replace("\t", "\\t"), limit)


def quoted(text: str, limit: int = 300) -> str:
    """What a server, a library or the system says, as a message may quote it: in one line, without secrets.

    >>> quoted("no such\\n  file \\x1b[2J")
    'no such file ␛[2J'
    """
    return one_line(" ".join(redact(text).split()), limit)  # cut last, so that no part of a key is left


def print_table(
    title: str, columns: Sequence[str], rows: Sequence[Sequence[str]], text_columns: int = 1, caption: str | None = None
) -> None:
    """Print a table in the terminal; the first `text_columns` hold text, the others figures.

    If it is too wide, the names in the first column are cut, but never figures: the lines are then too long.
    """
    # everything is a Text, so that rich reads no markup in it
    headings, *lines = [[Text(one_line(cell)) for cell in row] for row in (columns, *rows)]
    table = Table(title=Text(one_line(title), style="table.title"), title_justify="left", caption_justify="left")
    table.caption = Text(caption, style="table.caption") if caption else None
    for index, heading in enumerate(headings):
        if index < text_columns:
            table.add_column(heading, no_wrap=True, overflow="ellipsis")
        else:
            widest = max([HEADING, *(line[index].cell_len for line in lines)])
            table.add_column(heading, justify="right", max_width=widest, overflow="fold")
    for line in lines:
        table.add_row(*line)
    terminal, unlimited = Console(), Console(width=UNLIMITED)
    room = terminal.width if terminal.is_terminal else WIDTH
    excess = Measurement.get(unlimited, unlimited.options, table).maximum - room
    if excess > 0:
        longest = max(line[0].cell_len for line in (headings, *lines))
        table.columns[0].max_width = max(NARROWEST, longest - excess)
    unlimited.print(table)


def print_token_statistics(
    statistics: Sequence[Mapping], leaked: int, bad: Mapping[str, int], notes: Sequence[str] = ()
) -> None:
    """Print `recipe.data.token_statistics` as a table, and below it how many records were cut or left out.

    `bad` counts bad records by reason; `notes` say which files were not read.
    """
    headings = ["split", "rows", "tokens", "longest", "% preamble", "% supervised"]
    rows = []
    for split in statistics:
        counts = [f"{split[name]:,}" for name in ("rows", "tokens", "longest")]
        rows.append([split["split"], *counts, f"{split['preamble']:.0%}", f"{split['supervised']:.0%}"])
    turns, left_out = (sum(split.get(name, 0) for split in statistics) for name in ("turns", "turns_left_out"))
    notes_of = {
        "cut to max_length": sum(split["truncated"] for split in statistics),
        "left out because they are too long": sum(split["dropped"] for split in statistics),
        "left out because a later split holds them too": leaked,
        **{f"left out as bad: {reason}": count for reason, count in bad.items()},
    }
    lines = [f"{count:,} records {note}" for note, count in notes_of.items() if count]
    lines += [f"{turns:,} turns of the assistant are learned in conversations"] if turns else []
    lines += [f"{left_out:,} turns left out because their history is too long"] if left_out else []
    caption = "\n".join([*lines, *notes])
    print_table("Records in tokens", headings, rows, caption=caption)


def print_sources(sources: Sequence[Mapping]) -> None:
    """Print what `recipe.data.mixture.mix` tells of a mixture: how much of an epoch each source has."""
    total = sum(source["used"] for source in sources)
    rows = [
        [
            source["source"],
            f"{source['records']:,}",
            f"{source['used']:,}",
            f"{source['used'] / total:.1%}",
            f"{source['repeated']:.2f}",
            f"{source['left_out']:,}",
            f"{source['tokens']:,}",
        ]
        for source in sources
    ]
    if rows:
        headings = ["source", "records", "in an epoch", "share", "times each", "left out", "tokens"]
        print_table("Mixture that is trained on", headings, rows)
