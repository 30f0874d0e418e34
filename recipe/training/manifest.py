"""The manifest of a folder: size and SHA-256 of each file, written last, by which damage is found."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import recipe
from recipe.files import flush, write_whole

MANIFEST = "manifest.json"
FORMAT = 1
PART = 64 * 2**20  # bytes that are hashed at once; a larger file has one hash for each part, so that all cores help
BUFFER = 2**20  # bytes; fits a core's cache
THREADS = min(16, 2 + (os.cpu_count() or 1))  # two may wait for the disk; hashlib computes outside the GIL


class Seal:
    """Flushes and hashes the files of a folder while others are still being written, then writes the manifest.

    Example::

        seal = Seal(folder)
        save_the_weights(folder)
        seal.take("*.safetensors")  # in the background
        save_the_optimizer(folder)
        seal.close({"step": 500})
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.code = code_version()
        self._pool = ThreadPoolExecutor(THREADS)
        self._taken: dict[Path, tuple[tuple[int, int], list[Future]]] = {}  # (size, time of change), flush and hashes

    def take(self, pattern: str = "*") -> None:
        """Begin to flush and hash files, which must be complete; one that changes later is taken again."""
        for path in sorted(self.folder.rglob(pattern)):
            if path.is_file():
                status = path.stat()
                stamp = (status.st_size, status.st_mtime_ns)
                if path not in self._taken or self._taken[path][0] != stamp:
                    hashes = [self._pool.submit(_hash_part, path, start) for start in _parts(status.st_size)]
                    self._taken[path] = stamp, [self._pool.submit(flush, path), *hashes]

    def close(self, about: Mapping[str, Any]) -> None:
        """Wait until all files are on the disk, and write the manifest as the last one.

        Args:
            about: what else the manifest tells, for example the step; no secrets.

        Raises:
            OSError: the disk is full, or fails.
        """
        self.take()
        files = {}
        for path, ((size, _), [flushed, *hashes]) in self._taken.items():
            flushed.result()
            files[path.relative_to(self.folder).as_posix()] = {"size": size, "sha256": [h.result() for h in hashes]}
        for path in self.folder.rglob("*"):
            if path.is_dir():
                flush(path)
        content = {"format": FORMAT, "code": self.code, **about, "part_bytes": PART, "files": files}
        text = json.dumps({**content, "sha256": _own_hash(content)}, indent=1)
        write_whole(self.folder / MANIFEST, text.encode())  # bytes: nothing in it may be rewritten
        self.abandon()

    def abandon(self) -> None:
        """End the threads."""
        self._pool.shutdown(cancel_futures=True)


def read_manifest(folder: Path) -> dict[str, Any] | str:
    """The manifest of a folder, or in words what is wrong with it."""
    path = folder / MANIFEST
    try:
        content = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        return f"{MANIFEST} cannot be read ({error.strerror if isinstance(error, OSError) else 'not JSON'})"
    if not isinstance(content, dict) or content.pop("sha256", None) != _own_hash(content):
        return f"{MANIFEST} has changed since it was written"
    if content["format"] != FORMAT:
        return f"{MANIFEST} is of another version of this recipe (format {content['format']}, not {FORMAT})"
    return content


def find_damage(folder: Path, contents: bool = True) -> str | None:
    """What is wrong with a folder that has a manifest: the first file that is missing or not as it was written.

    Args:
        contents: also compare the hashes, which reads every file.

    >>> find_damage(Path("run/checkpoint-500"))  # doctest: +SKIP
    'optimizer.pt has 4,096 bytes, not 995,638,346'
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


@functools.cache
def code_version() -> str:
    """The version of this recipe, and a hash of its Python files, which may have been edited since.

    >>> code_version()  # doctest: +SKIP
    '0.1.0 sha256:5d41402abc4b2a76'
    """
    root, digest = Path(recipe.__file__).parent, hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        digest.update(path.relative_to(root).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return f"{recipe.__version__} sha256:{digest.hexdigest()[:16]}"


def _own_hash(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()


def _parts(size: int, part: int = PART) -> range:
    return range(0, max(size, 1), part)


def _hash_part(path: Path, start: int, part: int = PART) -> str:
    """SHA-256 of `part` bytes of a file, or of what is left of it."""
    digest, buffer, left = hashlib.sha256(), memoryview(bytearray(BUFFER)), part
    with open(path, "rb", buffering=0) as file:
        file.seek(start)
        while left and (count := file.readinto(buffer[: min(left, BUFFER)])):
            digest.update(buffer[:count])
            left -= count
    return digest.hexdigest()
