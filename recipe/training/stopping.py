"""A run that is told to stop finishes its step, saves, and says how to go on."""

from __future__ import annotations

import ctypes
import functools
import os
import signal
import sys
import threading
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from accelerate.data_loader import DataLoaderAdapter
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerState, TrainingArguments

from recipe.signals import STOPPING, taken_by

if TYPE_CHECKING:
    from recipe.training.saving import WholeSaves

STOPPED = 75  # exit code of a run that was stopped and saved: EX_TEMPFAIL of sysexits.h, "try again later"
ROUNDING = 1e-6  # of the epoch, which the Trainer adds up in parts
PR_SET_PDEATHSIG = 1  # of Linux's prctl
LAUNCHERS = (b"accelerate", b"torchrun", b"torch.distributed", b"torch/distributed")


class StopOnSignal(TrainerCallback):
    """Ends training after the step in which SIGTERM, SIGINT or SIGHUP came, with a checkpoint; a second one at once.

    All processes stop after the same step, whichever of them was told. An evaluation that is due at that step is done.
    Before the first step there is nothing to save, so a signal ends the run at once. One that is ignored when training
    begins, as SIGHUP under `nohup`, stays ignored.

    Example::

        stop = StopOnSignal(trainer)
        trainer.add_callback(stop)
        with stop.listening():
            trainer.train()
        if trainer.stopped:
            sys.exit(STOPPED)
    """

    def __init__(self, trainer: WholeSaves) -> None:
        self.trainer = trainer
        self.signal = 0  # for which all processes stop
        self._received = 0  # by this process
        self._begun = self._over = False
        self._own, self._parent = os.getpid(), os.getppid()
        self._group: Any = None

    def listening(self) -> AbstractContextManager[None]:
        """Take the signals; what happened to them before, happens again afterwards."""
        return taken_by(self._receive)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._own:  # a worker that was just forked
            return
        if not self._begun:
            raise KeyboardInterrupt
        if not self._received:
            self._received = number
            what = "is at its end, and ends when it is saved" if self._over else "stops when its step is done and saved"
            line = f"\n{signal.Signals(number).name}: the run {what}; a second signal ends it at once\n"
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
            dist.distributed_c10d._set_pg_timeout(args.ddp_timeout_delta)  # on a CPU, transformers leaves it as it was
            self._group = dist.new_group(None, args.ddp_timeout_delta, "gloo")  # the device's would wait for its work

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = True

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._told() and state.global_step < state.max_steps:
            control.should_training_stop = self.trainer.stopped = True

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.trainer.stopped and abs(state.epoch - round(state.epoch)) > ROUNDING:  # it is not at its end
            control.should_log = control.should_evaluate = control.should_save = False

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._begun = self._over = True  # a run that is resumed at its last step has taken none

    def _told(self) -> bool:
        """Whether any process was told to stop; the same on all."""
        self.signal = self._received
        if self._group is not None:
            told = torch.tensor([self._received])
            dist.all_reduce(told, op=dist.ReduceOp.MAX, group=self._group)
            self.signal = int(told)
        return bool(self.signal)


def shield_workers(loader: DataLoader, patience: int) -> DataLoader:
    """Let the workers of a loader live on when a signal comes to all processes, so that the step can be finished.

    Launchers and schedulers send it to the whole group. A worker ends when its parent says so, or has died.
    A batch may take `patience` seconds.
    """
    base = loader.base_dataloader if isinstance(loader, DataLoaderAdapter) else loader
    base.timeout = patience if loader.num_workers else 0
    if loader.num_workers and hasattr(signal, "sigwaitinfo"):  # not on macOS and Windows
        base.worker_init_fn = functools.partial(_start_worker, base.worker_init_fn)
    return loader


def _start_worker(first: Callable[[int], None] | None, worker: int) -> None:
    numbers = set(STOPPING)
    signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    threading.Thread(target=_end_with_parent, args=(numbers,), daemon=True).start()
    if first is not None:
        first(worker)


def _end_with_parent(numbers: set[int]) -> None:
    """Wait for signals, of which only SIGTERM from the parent counts: multiprocessing ends its children so."""
    while True:
        told = signal.sigwaitinfo(numbers)
        if told.si_signo == signal.SIGTERM and told.si_pid == os.getppid():
            os._exit(0)


def end_with_launcher() -> None:
    """Be told to stop when `accelerate launch` or `torchrun` dies, on Linux; they do not pass signals on themselves."""
    parent = Path(f"/proc/{os.getppid()}/cmdline")
    launched = "ACCELERATE_MIXED_PRECISION" in os.environ or "TORCHELASTIC_RUN_ID" in os.environ
    if launched and parent.is_file() and any(name in parent.read_bytes() for name in LAUNCHERS):
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
