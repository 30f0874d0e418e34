"""The manifest of a folder: size and SHA-256 of each file, written last, by which damage is found."""

from __future__ import annotations

import functools
import hashlib
import json
import os
import shutil
import sys
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from threading import Event, Thread
from typing import Any

import recipe
from recipe.config import UserError
from recipe.files import draft_of, flush, is_there, own_hash, parse_json, read_file

MANIFEST = "manifest.json"
FORMAT = 1
PART = 16 * 2**20  # bytes that are hashed at once; a larger file has one hash for each part, so that cores can share it
BUFFER = 2**20  # bytes; fits a core's cache
THREADS = min(16, os.cpu_count() or 1)  # hashlib computes outside the GIL
SECONDS_BETWEEN_FLUSHES = 0.02  # so that the disk writes while the next file is made
UNKNOWN = None  # the hash of a part that is not yet computed

Entry = dict[str, Any]  # of a file: its size, and the SHA-256 of each part


class Seal:
    """Flushes the files of a folder to the disk, also while they are written, and writes their manifest, last.

    Flushing makes a save safe from a power failure, and a save waits for it. Hashes find damage that comes later: large
    files are hashed in the background when the save is done, so that training goes on.

    Example::

        seal = Seal(folder)
        save_everything(folder)
        seal.close({"step": 500})
        seal.complete(folder.rename(final))  # in the background
        seal.wait()
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.content: dict[str, Any] = {"format": FORMAT, "code": code_version(), "part_bytes": PART}
        self._saved = Event()
        self._flushing = Thread(target=self._flush_large_files, daemon=True)  # no process waits for it that is stopped
        self._flushing.start()
        self._completing: Thread | None = None

    def close(self, about: Mapping[str, Any]) -> None:
        """Wait until all files are on the disk, and write the manifest as the last one, with the hashes of small files.

        Args:
            about: what else the manifest tells, for example the step; no secrets.

        Raises:
            OSError: the disk is full, or fails.
        """
        self.abandon()
        files: dict[str, Entry] = {}
        for path in sorted(self.folder.rglob("*")):
            flush(path)
            if path.is_file():
                size = path.stat().st_size
                hashes = [UNKNOWN] * len(_parts(size, PART)) if size > PART else [_hash_part(path, 0, PART)]
                files[path.relative_to(self.folder).as_posix()] = {"size": size, "sha256": hashes}
        self.content |= {**about, "files": files}
        write_manifest(self.folder, self.content)

    def abandon(self) -> None:
        """End the thread that flushes while files are written."""
        self._saved.set()
        self._flushing.join()

    def _flush_large_files(self) -> None:
        while not self._saved.wait(SECONDS_BETWEEN_FLUSHES):
            for path in self.folder.glob("*"):
                with suppress(OSError):  # `close` reports it, if it stays
                    if path.is_file() and path.stat().st_size > PART:
                        flush(path)

    def complete(self, folder: Path) -> None:
        """Hash in the background what is not hashed, in the folder's new place, and write the manifest again."""
        if _knows_all(self.content):
            return
        self._completing = Thread(target=self._complete, args=(folder,))
        self._completing.start()

    def wait(self) -> None:
        """Wait for what `complete` began."""
        if self._completing is not None:
            self._completing.join()

    def _complete(self, folder: Path) -> None:
        names = set(self.content["files"])
        try:
            add_hashes(folder, self.content)
            write_manifest(folder, self.content)
        except OSError as error:
            if not folder.is_dir():  # it was removed meanwhile
                return
            print(f"  {folder.name}: its files are whole, but could not be hashed ({error.strerror})")
        if not any((folder / name).exists() for name in names):  # it was being removed when the manifest was written
            shutil.rmtree(folder, ignore_errors=True)


def add_hashes(folder: Path, content: dict[str, Any]) -> None:
    """Hash the parts of files whose hash a manifest does not know."""
    part = content["part_bytes"]
    with ThreadPoolExecutor(THREADS) as pool:
        for name, entry in content["files"].items():
            starts = _parts(entry["size"], part)
            works = [
                pool.submit(_hash_part, folder / name, start, part) if known is UNKNOWN else known
                for start, known in zip(starts, entry["sha256"], strict=True)
            ]
            entry["sha256"] = [work.result() if isinstance(work, Future) else work for work in works]


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write a manifest, with a hash of itself; the folder must be there."""
    with draft_of(folder / MANIFEST) as draft:
        draft.write_text(json.dumps({**content, "sha256": own_hash(content)}, indent=1), encoding="utf-8")


def read_manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest of a folder, or in words what is wrong with it."""
    path = folder / MANIFEST
    try:
        content = parse_json(read_file(path))
    except UserError:
        return f"{MANIFEST} is not a file"
    except (OSError, ValueError) as error:
        return f"{MANIFEST} cannot be read ({error.strerror if isinstance(error, OSError) else 'not JSON'})"
    if not isinstance(content, dict) or content.pop("sha256", None) != own_hash(content):
        return f"{MANIFEST} has changed since it was written"
    if content["format"] != FORMAT:
        return f"{MANIFEST} is of another version of this recipe (format {content['format']}, not {FORMAT})"
    return content


def about(folder: Path) -> dict[str, Any]:
    """What a folder's manifest tells; nothing if it has none, or a damaged one."""
    manifest = read_manifest(folder)
    return manifest if isinstance(manifest, dict) else {}


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest: the first file that is missing or not as it was written.

    Args:
        contents: also compare the hashes, which reads every file.

    Example::

        find_damage(Path("run/checkpoint-500"))  # "optimizer.pt has 4,096 bytes, not 995,638,346"
    """
    manifest = read_manifest(folder)
    if isinstance(manifest, str):
        return manifest
    part = manifest["part_bytes"]
    for name, entry in manifest["files"].items():
        path = folder / name
        if not path.is_file():
            return f"{name} is {'not a file' if path.exists() else 'missing'}"
        if (size := path.stat().st_size) != entry["size"]:
            return f"{name} has {size:,} bytes, not {entry['size']:,}"
    if not contents:
        return None
    with ThreadPoolExecutor(THREADS) as pool:
        found = [
            (name, wanted, pool.submit(_hash_part, folder / name, start, part))
            for name, entry in manifest["files"].items()
            for start, wanted in zip(_parts(entry["size"], part), entry["sha256"], strict=True)
            if wanted is not UNKNOWN
        ]
        try:
            for name, wanted, hashed in found:
                if hashed.result() != wanted:
                    return f"{name} is not what was written (its SHA-256 differs)"
        except OSError as error:
            return f"{name} cannot be read ({error.strerror})"
        finally:
            pool.shutdown(cancel_futures=True)
    return None


def check_unchanged(folder: Path) -> None:
    """Refuse weights that are not those that were saved; a line on stderr names another file that is not.

    Raises:
        UserError: with the file, and what is wrong with it.
    """
    damage = find_damage(folder) if is_there(folder / MANIFEST) else None
    if damage and ".safetensors" in damage:
        raise UserError(f"{folder}: {damage}; restore it, or remove {MANIFEST} to use the folder as it is")
    if damage:
        print(f"note: {folder} is not as it was saved: {damage}; it is used as it is", file=sys.stderr)


def is_hashed(folder: Path) -> bool:
    """Whether a folder's manifest knows all hashes: a run may be killed between a save and its last hash."""
    manifest = read_manifest(folder)
    return isinstance(manifest, dict) and _knows_all(manifest)


@functools.cache
def code_version() -> str:
    """The version of this recipe, and a hash of its Python files, which may have been edited since.

    >>> code_version().startswith(recipe.__version__)
    True
    """
    root, digest = Path(recipe.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{recipe.__version__} sha256:{digest.hexdigest()[:16]}"


def _knows_all(content: dict[str, Any]) -> bool:
    return all(UNKNOWN not in entry["sha256"] for entry in content["files"].values())


def _parts(size: int, part: int) -> range:
    return range(0, max(size, 1), part)


def _hash_part(path: Path, start: int, part: int) -> str:
    """SHA-256 of `part` bytes of a file, or of what is left of it."""
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(BUFFER)), part
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, BUFFER)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
