"""One process at a time in an output folder, and nothing left where nothing was done."""

import errno
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path

import processes
import pytest
from conftest import ROOT

from recipe.config import UserError
from recipe.lock import LOCK, contents, hold_folder

HOLD = """
import sys, time
from recipe.lock import hold_folder
with hold_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder():
    """Starts a process that holds a folder; it is ended with the test."""
    started = []

    def hold(folder: Path):
        command = [sys.executable, "-c", HOLD, str(folder)]
        process = processes.start(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        started.append(process)
        assert process.stdout.readline() == "held\n"
        return process

    yield hold
    for process in started:
        process.kill()
        process.wait()


def test_the_second_is_told_who_the_first_is(holder, tmp_path):
    process = holder(tmp_path / "run")
    with pytest.raises(UserError) as refused, hold_folder(tmp_path / "run"):
        pass
    told = str(refused.value)
    assert f"process {process.pid} on {socket.gethostname()} since 20" in told and "name another folder" in told
    assert contents(tmp_path / "run") == []


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_the_system_releases_it_when_its_holder_dies(holder, tmp_path, number):
    process = holder(tmp_path / "run")
    os.kill(process.pid, number)
    process.wait()
    with hold_folder(tmp_path / "run"):
        assert json.loads((tmp_path / "run" / LOCK).read_text())["pid"] == os.getpid()


def test_a_child_of_the_holder_does_not_keep_it(tmp_path):
    """As workers of a data loader, which end some seconds after a killed run."""
    code = HOLD.replace("time.sleep(60)", "os.write(1, b'%d\\n' % os.fork()); time.sleep(60)").replace(
        "sys,", "os, sys,"
    )
    process = processes.start(
        [sys.executable, "-c", code, str(tmp_path / "run")], cwd=ROOT, stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "held\n"
    numbers = sorted(int(process.stdout.readline()) for _ in range(2))  # the child's 0, and its id in the holder
    try:
        process.kill()
        process.wait()
        with hold_folder(tmp_path / "run"):
            os.kill(numbers[1], 0)  # it is still there
    finally:
        os.kill(numbers[1], signal.SIGKILL)


def test_what_was_made_for_nothing_goes_again(tmp_path):
    with pytest.raises(UserError, match="a mistake"), hold_folder(tmp_path / "outputs" / "run"):
        raise UserError("a mistake")
    assert not (tmp_path / "outputs").exists()
    with hold_folder(tmp_path / "outputs" / "run"):
        (tmp_path / "outputs" / "run" / "kept").touch()
    assert [path.name for path in (tmp_path / "outputs" / "run").iterdir()] == ["kept"]


def test_a_lock_file_that_a_killed_process_left_holds_nobody_up(tmp_path):
    (tmp_path / LOCK).write_text("half a li")
    with hold_folder(tmp_path):
        assert json.loads((tmp_path / LOCK).read_text())["host"] == socket.gethostname()
    assert not (tmp_path / LOCK).exists()


def test_what_other_processes_of_the_run_try_in_the_folder_is_no_content(tmp_path):
    (tmp_path / ".recipe-x1y2").mkdir()  # of `check_place`, which each process calls
    (tmp_path / ".trial-x1y2").mkdir()
    assert contents(tmp_path) == [] and contents(tmp_path / "nowhere") == []
    (tmp_path / "notes.txt").touch()
    assert [path.name for path in contents(tmp_path)] == ["notes.txt"]


def test_a_trial_that_begins_while_somebody_looks_is_no_content(tmp_path):
    ended = threading.Event()

    def try_again_and_again() -> None:
        while not ended.is_set():
            with tempfile.TemporaryDirectory(prefix=".recipe-", dir=tmp_path):
                pass

    thread = threading.Thread(target=try_again_and_again)
    thread.start()
    try:
        assert [contents(tmp_path) for _ in range(3000)] == [[]] * 3000
    finally:
        ended.set()
        thread.join()


@pytest.mark.parametrize(("number", "is_held"), [(errno.ENOLCK, False), (errno.ENOSYS, False), (errno.EACCES, True)])
def test_a_file_system_without_locks_is_told_from_a_lock(number, is_held, tmp_path, monkeypatch, capsys):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr("recipe.lock.fcntl.lockf", fail)
    if is_held:
        with pytest.raises(UserError, match="is in use by another process"), hold_folder(tmp_path):
            pass
    else:
        with hold_folder(tmp_path):
            assert "without locks" in capsys.readouterr().out
