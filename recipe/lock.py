"""One process at a time in an output folder: a lock that the system releases when its holder dies."""

from __future__ import annotations

import errno
import json
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import datetime
from fnmatch import fnmatch
from pathlib import Path
from typing import IO

from recipe.config import UserError
from recipe.files import LEFTOVERS, check_place, naming

try:
    import fcntl
except ImportError:  # on Windows, where two runs in one folder are the user's to avoid
    fcntl = None  # type: ignore[assignment]

LOCK = ".lock"


NO_LOCKS = {errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL}  # what file systems without locks answer


def contents(folder: Path) -> list[Path]:
    """What is in a folder besides the lock and what trials leave for a moment; nothing if there is no folder."""
    if not folder.is_dir():
        return []
    passing = (LOCK, *LEFTOVERS)  # by name: another process may make one at any moment
    return [path for path in folder.iterdir() if not any(fnmatch(path.name, pattern) for pattern in passing)]


@contextmanager
def hold_folder(output_dir: str | Path | None) -> Iterator[None]:
    """Keep other processes out of an output folder, which is made if it is not there.

    The lock is the system's (`fcntl.lockf`, over NFS too), on the file `.lock` in the folder, which says who holds it.
    It ends with the process, however that dies. If nothing was written, a folder that this call made is removed. Of
    several processes of one run only the main one may call this.

    Raises:
        UserError: another process holds the folder; with its host, process id and start. Or see
            `recipe.files.check_place`.

    Example::

        with hold_folder("outputs/run"):
            ...  # nobody else writes there
    """
    check_place(output_dir)
    folder = Path(str(output_dir))
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    file = _take(folder)
    try:
        yield
    finally:
        with suppress(OSError):  # a folder that is gone, or a file that nobody may remove any more
            (folder / LOCK).unlink(missing_ok=True)
            for path in made:
                path.rmdir()
        file.close()


def _take(folder: Path) -> IO[str]:
    """The open lock file; whoever closes it, or any other file object of it in this process, releases the lock."""
    path = folder / LOCK
    while True:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            file = open(path, "a+", encoding="utf-8")  # noqa: SIM115
        except FileNotFoundError:  # another process, which made the folder and has failed, removed it in between
            continue
        except PermissionError as error:
            raise UserError(
                f"--output_dir {folder}: {LOCK} in it is another user's; remove it, if they are through"
            ) from error
        try:
            if fcntl is not None:
                fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno not in NO_LOCKS:
                raise UserError(
                    f"--output_dir {folder} is in use{_holder(file)}; wait, or name another folder"
                ) from error
            print(f"{folder} is on a file system without locks: a second run in it would not be refused")
        try:
            current = os.stat(path).st_ino == os.fstat(file.fileno()).st_ino
        except FileNotFoundError:
            current = False
        if current:
            break
        file.close()  # the one who held it has removed the file in between
    file.truncate(0)
    start = datetime.now().astimezone().isoformat(timespec="seconds")
    with naming(path):
        file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid(), "start": start}) + "\n")
        file.flush()
    return file


def _holder(file: IO[str]) -> str:
    file.seek(0)
    try:
        found = json.loads(file.read())
        return f" by process {found['pid']} on {found['host']} since {found['start']}"
    except (ValueError, KeyError, TypeError):  # it has just begun
        return " by another process"
