"""Real scripts on disks that fill, fail or may not be written: one clear line, nothing torn or lost, and they go on."""

import errno
import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import fills
import kills
import pyarrow
import pytest
import torch
from datasets.exceptions import DatasetGenerationError
from safetensors import SafetensorError
from small_disk import RefusingDisk, full_disk

from recipe.disk import disk_error, explain_disk, try_writing
from recipe.memory import is_out_of_memory
from recipe.training.errors import Settings, explain_error
from recipe.training.output_dir import explain_full_disk

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="the disks of these tests are made by Linux")
MB = 2**20


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    return kills.records(tmp_path_factory.mktemp("records") / "records.jsonl")


def test_a_run_that_meets_a_full_disk_again_and_again_ends_as_if_nothing_had_been(data, tmp_path):
    """`tests/chaos/fills.py` is the long form: its moments are in docs/results/full-disk.json."""
    with full_disk(tmp_path / "disk", 50 * MB) as disk:
        disk.leave(50 * MB)
        alone, run = fills.train(disk, data, fills.TINY), disk.seen / "run"
        assert alone.returncode == 0, alone.stderr[-2000:]
        expected, whole = fills.weights(run), fills.used_by(run)
        parts = {name: fills.used_by(run / name) for name in ("checkpoint-2", "checkpoint-4")}
        shutil.rmtree(run)
        before: dict[str, str] = {}
        told = []
        second, last = parts["checkpoint-2"] + parts["checkpoint-4"] // 2, sum(parts.values()) + 200_000
        for room in (0, second, last):  # in bytes; before it begins, in its second checkpoint, in its final model
            disk.leave(room - fills.used_by(run))
            done = fills.train(disk, data, fills.TINY, *(fills.RESUME if before else fills.NEW))
            told.append(fills.only_error(done))
            fills.check_what_is_left(run, before, told[-1])
            before = fills.whole_checkpoints(run)
        assert [len(before), json.loads((run / "run.json").read_text())["state"]] == [2, "failed"]
        assert "last whole checkpoint: " + str(disk.folder / "run" / "checkpoint-2") in told[1]
        assert "last whole checkpoint: " + str(disk.folder / "run" / "checkpoint-4") in told[2]
        disk.leave(whole)
        done = fills.train(disk, data, fills.TINY, *fills.RESUME)
        assert done.returncode == 0 and fills.weights(run) == expected, done.stderr[-2000:]


@pytest.mark.parametrize(("number", "free"), [(errno.EDQUOT, 1000), (errno.EROFS, 0), (errno.EIO, 20_000)])
def test_an_inspection_on_a_disk_that_refuses(number, free, data, tmp_path):
    disk = RefusingDisk(tmp_path / "disk", number)
    disk.leave(free)
    error = fills.only_error(disk.run("scripts/inspect_data.py", *fills.inspection(disk, data)))
    assert disk.refused and f"error: {disk.folder}/results/" in error and "cannot be written: " in error
    said = {errno.EDQUOT: "share of the disk is used up (", errno.EROFS: "read-only;", errno.EIO: "the disk fails;"}
    assert said[number] in error and "then run the same command again" in error
    assert not list((disk.folder / "results").glob(".*"))


def test_an_evaluation_keeps_the_answers_it_had_room_for(data, tmp_path):
    with full_disk(tmp_path / "disk", 30 * MB) as disk:
        words = fills.evaluation(disk, fills.BASE, data)
        disk.leave(20_000)
        error = fills.only_error(disk.run("scripts/eval.py", *words))
        assert f"error: {disk.folder}/results/" in error and "MB free in" in error
        assert "all answers so far are kept; the same command, without --overwrite_output_dir, resumes" in error
        kept = (disk.seen / "results" / "predictions.jsonl").read_text().splitlines()
        disk.leave(20 * MB)
        done = disk.run("scripts/eval.py", *words)
        assert done.returncode == 0, done.stderr[-2000:]
        assert len(kept) > 1 and (disk.seen / "results" / "report.html").is_file()


def test_a_run_whose_quota_is_used_up_in_a_save_by_a_writer_that_says_nothing(data, tmp_path):
    """torch's writer raises `RuntimeError: basic_ios::clear`, and the disk itself has room."""
    disk = RefusingDisk(tmp_path / "disk", errno.EDQUOT)
    disk.leave(700_000)
    error = fills.only_error(fills.train(disk, data, fills.TINY))
    assert f"error: {disk.folder}/run cannot be written: this user's share of the disk is used up (" in error
    assert "last whole checkpoint: none" in error or "--resume_from_checkpoint true" in error
    assert json.loads((disk.folder / "run" / "run.json").read_text())["state"] == "failed"


# --- what libraries raise -------------------------------------------------------------------------------------------

FULL_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 8 GiB"),
    torch.AcceleratorError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("MPS backend out of memory (MPS allocated: 18.13 GB, other allocations: 1 MB)"),
    RuntimeError("[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: you tried"),
    RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
    MemoryError(),
]


@pytest.mark.parametrize("error", FULL_MEMORY, ids=lambda error: type(error).__name__)
def test_a_full_memory_is_never_called_a_full_disk(error, tmp_path, monkeypatch):
    """Also when it comes in a save, on a disk that has no room left."""
    monkeypatch.setattr("recipe.training.output_dir.try_writing", lambda *_: OSError(errno.ENOSPC, "", "/full"))

    def save_model() -> None:
        raise error

    assert is_out_of_memory(error) and disk_error(error) is None
    with pytest.raises(type(error)) as raised, explain_full_disk(tmp_path, torch.nn.Linear(2, 2)):
        save_model()
    assert raised.value is error
    assert "does not fit in memory" in str(explain_error(error, Settings(None, None, None)))


def caused(error: Exception, cause: Exception, explicit: bool = True) -> Exception:
    try:
        try:
            raise cause
        except Exception:
            raise error from (cause if explicit else None)
    except Exception as raised:
        raised.__suppress_context__ = explicit
        return raised


def of_itself(error: Exception) -> Exception:
    error.__cause__ = error
    return error


def of_this_system(number: int) -> OSError:
    return OSError(number, os.strerror(number))


@pytest.mark.parametrize(
    ("error", "number", "path"),
    [
        (OSError(errno.ENOSPC, "No space left on device", "a/loss.png"), errno.ENOSPC, "a/loss.png"),
        (SafetensorError("I/O error: No space left on device (os error 28)"), errno.ENOSPC, None),
        (Exception("Disk quota exceeded (os error 122)"), errno.EDQUOT, None),  # tokenizers' own class
        (pyarrow.ArrowException("Error writing bytes. Detail: [errno 28] No space left on device"), errno.ENOSPC, None),
        (caused(DatasetGenerationError("An error occurred"), of_this_system(errno.EIO)), errno.EIO, None),
        (caused(RuntimeError("unexpected pos 64 vs 0"), of_this_system(errno.ENOSPC), False), errno.ENOSPC, None),
        (RuntimeError("unable to write to file </torch_1_2>: No space left on device (28)"), errno.ENOSPC, "/dev/shm"),
        (OSError(errno.EFBIG, "File too large", "x"), errno.EFBIG, "x"),
        (FileNotFoundError(errno.ENOENT, "No such file", "x"), None, None),
        (RuntimeError("unexpected pos 64 vs 0"), None, None),
        (of_itself(pickle.PicklingError("a bug")), None, None),
    ],
)  # fmt: skip
def test_the_disk_is_found_in_what_libraries_raise(error, number, path):
    found = disk_error(error)
    assert (found and found.errno, found and found.filename) == (number, path)


def test_the_line_says_where_how_much_and_what_to_do(tmp_path):
    free = f"{shutil.disk_usage(tmp_path).free / 1e6:,.1f}"[:-4]  # others may write meanwhile
    said = explain_disk(OSError(errno.ENOSPC, "", str(tmp_path / "no" / "loss.png")))
    assert said.startswith(f"{tmp_path}/no/loss.png cannot be written: the disk is full ({free}")
    assert said.endswith(f" MB free in {tmp_path}); free some space, then run the same command again")
    said = explain_disk(OSError(errno.ENOSPC, ""), tmp_path, then="")
    assert said.startswith("a file cannot be written: ") and said.endswith(f" in {tmp_path}); free some space")
    assert "--dataloader_num_workers 0" in explain_disk(OSError(errno.ENOSPC, "", "/dev/shm"))
    assert try_writing(tmp_path, 4096) is None and list(tmp_path.iterdir()) == []
    refused = try_writing(tmp_path, 2**50)
    assert refused is not None and (refused.errno, refused.filename) == (errno.ENOSPC, str(tmp_path))
