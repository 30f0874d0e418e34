"""The power fails at every moment of a save: what the disk may then hold has no torn checkpoint, and a whole one.

The disk of this test is as forgetful as POSIX allows: it keeps the content that a file had when it was last flushed,
and the names that a folder had when it was last flushed.
"""

import itertools
import os
import stat
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from tiny_runs import contents, tiny_trainer

from recipe import manifest
from recipe.files import write_whole
from recipe.training.checkpoints import numbered
from recipe.training.resuming import find_problem

CHANGES = ("rename", "replace", "unlink", "rmdir", "mkdir")  # of names


class ForgetfulDisk:
    """Records what is flushed below a folder, and at each change yields what a power failure would leave."""

    def __init__(self, root: Path, copies: Path) -> None:
        self.root, self.copies = root, copies
        self.numbers: dict[int, int] = {}  # inode, which is used again for another file, to a number of our own
        self.files: dict[int, bytes] = {}  # number to flushed content
        self.folders: dict[int, dict[str, int]] = {}  # number to flushed names
        self.kinds: dict[int, bool] = {}  # whether it is a folder
        self.moments: list[Path] = []
        self.unused = itertools.count()
        self.lock = threading.RLock()
        self.flush(root)

    def number(self, inode: int) -> int:
        return self.numbers.setdefault(inode, next(self.unused))

    def flush(self, path: Path) -> None:
        status = path.stat()
        if stat.S_ISDIR(status.st_mode):
            entries = list(os.scandir(path))
            self.folders[self.number(status.st_ino)] = {entry.name: self.number(entry.inode()) for entry in entries}
            self.kinds |= {self.number(entry.inode()): entry.is_dir() for entry in entries}
        else:
            self.files[self.number(status.st_ino)] = path.read_bytes()

    def fail(self) -> None:
        """Keep what would be left if the power failed now: flushed names, or all names; only flushed contents."""
        copy = self.copies / str(len(self.moments))
        self._restore(self.number(self.root.stat().st_ino), copy)
        self.moments.append(copy)
        copy = self.copies / str(len(self.moments))
        self._keep_names(self.root, copy)
        self.moments.append(copy)

    def _restore(self, number: int, place: Path) -> None:
        place.mkdir(parents=True)
        for name, child in self.folders.get(number, {}).items():
            if self.kinds[child]:
                self._restore(child, place / name)
            else:
                (place / name).write_bytes(self.files.get(child, b""))

    def _keep_names(self, folder: Path, place: Path) -> None:
        place.mkdir(parents=True)
        for entry in os.scandir(folder):
            if entry.is_dir():
                self._keep_names(Path(entry.path), place / entry.name)
            else:
                (place / entry.name).write_bytes(self.files.get(self.number(entry.inode()), b""))


@pytest.fixture
def disk(tmp_path, monkeypatch) -> Iterator[ForgetfulDisk]:
    root = tmp_path / "disk"
    root.mkdir()
    disk = ForgetfulDisk(root, tmp_path / "copies")
    real = {name: getattr(os, name) for name in (*CHANGES, "fsync")}

    def fsync(descriptor: int) -> None:
        with disk.lock:
            path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
            real["fsync"](descriptor)
            if path.is_relative_to(root):
                disk.fail()
                disk.flush(path)
                disk.fail()

    def inode_at(path, dir_fd: int | None) -> int | None:
        return os.lstat(path, dir_fd=dir_fd).st_ino if os.path.lexists(path) or dir_fd is not None else None

    def change(name: str) -> Callable:
        def changed(path, *args, **kwargs):
            with disk.lock:
                folder = kwargs.get("dir_fd")
                where = os.readlink(f"/proc/self/fd/{folder}") if folder is not None else os.getcwd()
                within = (Path(where) / os.fspath(path)).is_relative_to(root)
                gone = None  # the inode of what is removed, or of what another takes the place of
                if within and name != "mkdir":
                    gone = inode_at(args[0], None) if args else inode_at(path, folder)
                result = real[name](path, *args, **kwargs)
                if within:
                    disk.numbers.pop(gone, None)
                    disk.fail()
                return result

        return changed

    monkeypatch.setattr(os, "fsync", fsync)
    for name in CHANGES:
        monkeypatch.setattr(os, name, change(name))
    yield disk


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the descriptor's path is read from /proc")
@pytest.mark.parametrize(("limit", "part"), [(1, manifest.PART), (2, manifest.PART), (1, 500)])
def test_no_moment_leaves_a_torn_checkpoint_or_none(limit, part, disk, monkeypatch):
    """Four saves, of which the limit removes some, and the last again over one that is there.

    With parts of 500 bytes, hashes are added in the background.
    """
    monkeypatch.setattr(manifest, "PART", part)
    trainer = tiny_trainer(disk.root / "run", save_steps=1, max_steps=4, save_total_limit=limit)
    saved: dict[str, list[dict]] = {}
    begun = []
    save = trainer._save_checkpoint

    def watched(model, trial) -> None:
        save(model, trial)
        begun.append(len(disk.moments))
        name = f"checkpoint-{trainer.state.global_step}"
        saved.setdefault(name, []).append(files_of(disk.root / "run" / name))

    trainer._save_checkpoint = watched
    trainer.train()
    trainer._save_checkpoint(None, None)  # replaces the last
    trainer._wait_for_hashes()
    accepted = 0
    for number, moment in enumerate(disk.moments):
        whole = [folder for folder in numbered(moment / "run") if find_problem(folder, 1) is None]
        for folder in whole:
            assert files_of(folder) in saved[folder.name], (number, folder)
        assert whole or number < begun[0] or put_aside(moment / "run", saved), (number, sorted(moment.rglob("*")))
        accepted += bool(whole)
    assert len(disk.moments) > 200 and accepted > 100


def files_of(checkpoint: Path) -> dict[str, bytes]:
    """Without the manifest, which is written again when all is hashed."""
    return {name: content for name, content in contents(checkpoint).items() if "manifest.json" not in name}


def put_aside(run: Path, saved: dict[str, list[dict]]) -> bool:
    """Whether the checkpoint that another replaces is whole where it is put aside, from where it comes back."""
    [folder] = run.glob("_unfinished/replaced-*")
    return files_of(folder) in saved[folder.name.removeprefix("replaced-")]


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the descriptor's path is read from /proc")
def test_no_moment_of_the_final_save_leaves_a_model_that_looks_finished_and_is_not(disk):
    """Over an earlier model in the same folder, with other weights and another config."""
    folder, models = disk.root / "run", []
    trainer = tiny_trainer(folder, save_strategy="no", max_steps=1)
    for scale in (1.0, 2.0):
        for weight in trainer.model.parameters():
            weight.data.fill_(scale)
        trainer.model.config.bos_token_id = int(scale)
        trainer.save_model()
        files = contents(folder)
        models.append({name: files[name] for name in ("config.json", "model.safetensors")})
    finished = 0
    for moment in disk.moments:
        files = contents(moment)
        if "run/config.json" in files:
            assert {name: files.get(f"run/{name}") for name in models[0]} in models
            finished += 1
    assert 0 < finished < len(disk.moments)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="the descriptor's path is read from /proc")
def test_a_file_that_is_written_whole_is_the_earlier_or_the_later_one(disk):
    path = disk.root / "new" / "run.json"
    for content in ("earlier", "later"):
        write_whole(path, content)
    left = [contents(moment).get("new/run.json") for moment in disk.moments]
    assert set(left) == {None, b"earlier", b"later"} and left[-1] == b"later"
    assert next(value for value in left if value) == b"earlier" and None not in left[left.index(b"earlier") + 2 :]
