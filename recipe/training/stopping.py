"""A run that is told to stop finishes its step, saves, and says how to go on."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerState, TrainingArguments

STOPPED = 75  # exit code of a run that was stopped and saved: EX_TEMPFAIL of sysexits.h, "try again later"
SIGNALS = ("SIGTERM", "SIGINT", "SIGHUP")
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed", b"torch/distributed")


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which SIGTERM, SIGINT or SIGHUP came, with a checkpoint; a second one at once.

    All processes stop after the same step, whichever of them was told. An evaluation that is due at that step is done.
    A signal that is ignored when training begins, as SIGHUP under `nohup`, stays ignored.

    Example::

        stop = StopOnSignal()
        trainer.add_callback(stop)
        with stop.listening():
            trainer.train()
        if stop.stopped:
            sys.exit(STOPPED)
    """

    def __init__(self) -> None:
        self.signal = 0  # that came
        self.stopped = False
        self._parent = os.getppid()
        self._group: Any = None

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Take the signals; what happened to them before, happens again afterwards."""
        numbers = [getattr(signal, name) for name in SIGNALS if hasattr(signal, name)]
        before = {number: signal.getsignal(number) for number in numbers}
        try:
            for number in numbers:
                if before[number] is not signal.SIG_IGN:
                    signal.signal(number, self._receive)
            yield
        finally:
            for number in numbers:
                signal.signal(number, before[number])

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if not self.signal:
            self.signal = number
            name = signal.Signals(number).name
            line = f"\n{name}: the run stops when its step is done and saved; a second signal ends it at once\n"
            os.write(sys.stderr.fileno(), line.encode())  # `print` may be what was interrupted
        elif os.getppid() != self._parent:
            self._parent = os.getppid()  # the launcher was told, too, and has gone: that is no second signal
        else:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)

    def say_how_to_go_on(self, state: TrainerState, args: TrainingArguments) -> None:
        """The last line of a run that has stopped."""
        if args.process_index:
            return
        checkpoint = f"{args.output_dir}/checkpoint-{state.global_step}"
        way = "the same command with --resume_from_checkpoint true goes on"
        if args.save_only_model:
            way = f"without its optimizer: --model_name_or_path {checkpoint} starts a new run from its weights"
        print(
            f"\nstopped by {signal.Signals(self.signal).name} after step {state.global_step:,} of "
            f"{state.max_steps:,}, and saved in {checkpoint}; {way}"
        )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size > 1 and self._group is None:
            self._group = dist.new_group(backend="gloo")  # asking on the device would wait for its work

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._told() and state.global_step < state.max_steps:
            control.should_save = control.should_training_stop = self.stopped = True

    def _told(self) -> bool:
        """Whether any process was told to stop; the same on all."""
        if self._group is None:
            return bool(self.signal)
        told = torch.tensor([self.signal])
        dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
        self.signal = self.signal or int(told)
        return bool(told)


def end_with_launcher() -> None:
    """Be told to stop when `accelerate launch` or `torchrun` dies, on Linux; they do not pass signals on themselves."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and parent.is_file() and any(name in parent.read_bytes() for name in LAUNCHERS):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
