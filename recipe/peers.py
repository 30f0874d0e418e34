"""The other processes of a run: which errors come from them, and what their launcher shows of ours."""

from __future__ import annotations

import json
import os
import re
import time
from contextlib import suppress

GONE = "another process of this run has ended; what it said is the cause"
CLOSED = ("Connection closed by peer", "Connection reset by peer", "Broken pipe", "Connection was likely closed",
          "remote process exited")  # fmt: skip  # gloo's words, the store's and NCCL's
TIMED_OUT = re.compile(r"Timed out waiting (\d+)ms|timeout after (\d+)ms|Timeout\(ms\)=(\d+)")
NO_BATCH = re.compile(r"DataLoader timed out after ([\d.]+) seconds")
DEAD_WORKER = re.compile(r"DataLoader worker .*(?:killed by signal|exited unexpectedly)")
SHOWN = 600  # characters of a message in the launcher's table


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
