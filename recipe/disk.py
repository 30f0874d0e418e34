"""A disk that takes no more: what could not be written, how much is free where, and the way out, in one line."""

from __future__ import annotations

import errno
import os
import re
import shutil
import tempfile
from pathlib import Path

KINDS = {  # what the disk says, in words, and the way out
    errno.ENOSPC: ("the disk is full", "free some space"),
    errno.EDQUOT: ("this user's share of the disk is used up", "free some of it or ask for more"),
    errno.EROFS: ("the file system is read-only", "make it writable or name a folder on another disk"),
    errno.EIO: ("the disk fails", "look into the system's log and name a folder on another disk"),
    errno.EFBIG: ("it is larger than a file may be", "raise the limit (ulimit -f) or name a folder on another disk"),
}
SHARED_MEMORY = re.compile(r"shared memory|/torch_\d|/dev/shm")  # torch's words where workers hand over batches
SHM = Path("/dev/shm")
MORE_SHM = "give it more room (--shm-size of a container) or use --dataloader_num_workers 0"
TRIED = 2**20  # bytes; the rest is only claimed
AGAIN = "run the same command again"
CACHES = ("HF_DATASETS_CACHE", "HF_HOME")


def disk_error(error: BaseException) -> OSError | None:
    """The error of a disk that an error is, or comes from: an `OSError`, with the path where it is known.

    Libraries in other languages raise errors of their own, which quote the system. A full memory is no disk.
    """
    from recipe.memory import is_out_of_memory  # here: torch takes seconds, and few errors are asked about

    cause: BaseException | None = error
    seen: list[BaseException] = []
    while cause is not None and cause not in seen:  # an error that is raised from itself is its own cause
        seen.append(cause)
        if isinstance(cause, Exception) and is_out_of_memory(cause):
            return None
        if isinstance(cause, OSError) and cause.errno in KINDS:
            return cause
        code = next((code for code in KINDS if os.strerror(code) in str(cause)), None)
        if code is not None:
            return OSError(code, os.strerror(code), str(SHM) if SHARED_MEMORY.search(str(cause)) else None)
        cause = cause.__cause__ or (None if cause.__suppress_context__ else cause.__context__)
    return None


def explain_disk(error: OSError, *places: Path, then: str = AGAIN) -> str:
    """One line for what `disk_error` has found.

    Args:
        places: where it may have been, if the error does not say so; by default where libraries keep their files.
        then: what to do after the way out.

    >>> explain_disk(OSError(errno.EIO, "", "a"), then="go on")
    "a cannot be written: the disk fails; look into the system's log and name a folder on another disk, then go on"
    """
    said, way_out = KINDS[error.errno or errno.EIO]
    path = Path(os.fsdecode(error.filename)) if error.filename else None
    places = (path,) if path else places or _places_of_libraries()
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        said += f" ({', '.join(dict.fromkeys(map(_free, places)))})"
    way_out = (MORE_SHM if path == SHM else way_out) + (f", then {then}" if then else "")
    return f"{path or 'a file'} cannot be written: {said}; {way_out}"


def _places_of_libraries() -> tuple[Path, ...]:
    caches = [os.environ[name] for name in CACHES if name in os.environ] or ["~/.cache/huggingface"]
    return (*(Path(cache).expanduser() for cache in caches), Path(tempfile.gettempdir()))


def _free(path: Path) -> str:
    folder = next(each for each in (path, *path.absolute().parents) if each.is_dir())
    return f"{shutil.disk_usage(folder).free / 1e6:,.1f} MB free in {folder}"


def try_writing(folder: Path, size: int) -> OSError | None:
    """What the disk says to so many bytes in a folder, which are gone at once; None if it would take them."""
    if shutil.disk_usage(folder).free < size:
        return OSError(errno.ENOSPC, "", str(folder))
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(bytes(TRIED))
            file.flush()
            os.fsync(file.fileno())
            if hasattr(os, "posix_fallocate"):  # a quota is not in what `disk_usage` tells
                os.posix_fallocate(file.fileno(), 0, size)
    except OSError as error:
        return OSError(error.errno, error.strerror, str(folder)) if error.errno in KINDS else None
    return None
