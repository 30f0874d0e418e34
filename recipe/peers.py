"""The other processes of a run: how they meet, which errors come from them, and what their launcher shows of ours."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from recipe.signals import taken_by

GONE = "another process of this run has ended; what it said is the cause"
CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed",
          "remote process exited")  # fmt: skip  # gloo's words, the store's and NCCL's
TIMED_OUT = re.compile(r"Timed out waiting (\d+)ms|timeout after (\d+)ms|Timeout\(ms\)=(\d+)")
NO_BATCH = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
DEAD_WORKER = re.compile(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)")
SIZES = ("WORLD_SIZE", "PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")  # as torchrun and MPI launchers set
SHOWN = 600  # characters of a message in the launcher's table


@contextmanager
def meeting_others() -> Iterator[None]:
    """While processes meet, SIGTERM, SIGHUP and Ctrl-C end each at once.

    The main process waits for the others inside torch, where no handler of Python's is run: if they were told to stop,
    too, and have gone, it would wait until the time is up.
    """
    alone = all(os.environ.get(name, "1") == "1" for name in SIZES)
    if alone or threading.current_thread() is not threading.main_thread():
        yield
        return
    with taken_by(signal.SIG_DFL):
        yield


def peer_error(error: BaseException) -> str | None:
    """What an error says of another process, in one line; None if it is this process's own.

    >>> peer_error(RuntimeError("[gloo/transport/tcp/buffer.cc:79] Timed out waiting 60000ms for recv operation"))
    'another process of this run did not answer for 60 s (--ddp_timeout): it hangs, or works longer than that alone'
    """
    if not isinstance(error, RuntimeError):  # as all errors of torch.distributed are
        return None
    said = str(error)
    if late := TIMED_OUT.search(said):
        seconds = int(next(filter(None, late.groups()))) / 1000
        return (
            f"another process of this run did not answer for {seconds:,.0f} s (--ddp_timeout): it hangs, or works "
            "longer than that alone"
        )
    if late := NO_BATCH.search(said):
        return (
            f"a worker of the data loader gave no batch for {float(late[1]):,.0f} s (--ddp_timeout): it hangs; see "
            "what it reads from, or use --dataloader_num_workers 0"
        )
    if DEAD_WORKER.search(said):
        return "a worker of the data loader was ended, as when memory is full; use fewer --dataloader_num_workers"
    return GONE if any(words in said for words in CLOSED) else None


def tell_launcher(message: str) -> None:
    """Let `torchrun`, which `accelerate launch` uses for several processes, end its own report with our message."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path:
        shown = message if len(message) <= SHOWN else f"{message[:SHOWN]} ... (all of it is above)"
        content = {"message": {"message": shown, "extraInfo": {"timestamp": str(int(time.time()))}}}
        with suppress(OSError), open(path, "w", encoding="utf-8") as file:
            json.dump(content, file)
