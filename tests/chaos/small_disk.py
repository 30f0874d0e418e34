"""Disks that fill: a file system of its own in memory, and one whose writes the kernel refuses by order of the tests.

`full_disk` gives the first where the system lets this user mount one in a namespace, and the second elsewhere; neither
needs root, or leaves a mount behind. Both refuse every writer, also those in Rust and C++.
"""

import contextlib
import ctypes
import errno
import fcntl
import os
import platform
import select
import socket
import struct
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import processes

ROOT = Path(__file__).parent.parent.parent
LONGEST = 150  # seconds of one script
RUN = """
os.chdir({root!r})
script, sys.argv = sys.argv[1], sys.argv[1:]
sys.path[0] = os.path.dirname(os.path.abspath(script))
runpy.run_path(script, run_name="__main__")
"""
ENTER = """
import ctypes, os, runpy, sys
for kind in {kinds!r}:
    with open("/proc/{pid}/ns/" + kind) as namespace:
        assert ctypes.CDLL(None).setns(namespace.fileno(), 0) == 0, kind
"""
HAND_OVER = """
import os, runpy, socket, sys
sys.path[1:1] = {places!r}
from small_disk import refuse_writes
with socket.socket(fileno=os.dup(0)) as to_tests:
    descriptor = refuse_writes()
    socket.send_fds(to_tests, [b"x"], [descriptor])
    os.close(descriptor)
os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
"""
MOUNT = 'mount -t tmpfs -o size="$2" tmpfs "$1" && echo mounted && exec cat'


class MountedDisk:
    """A tmpfs that only the scripts of `run` see at `folder`; the tests see it at `seen`. It ends with its holder."""

    def __init__(self, folder: Path, size: int) -> None:
        own = os.geteuid() == 0
        self.folder, self.kinds = folder, ("mnt",) if own else ("user", "mnt")
        folder.mkdir()
        words = ["unshare", "-m" if own else "-rm", "sh", "-c", MOUNT, "sh", str(folder), str(size)]
        self.holder = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if self.holder.stdout.readline() != b"mounted\n":
            self.end()
            raise OSError(errno.EPERM, "this user may not mount a file system")
        self.seen = Path(f"/proc/{self.holder.pid}/root{folder}")

    def leave(self, free: int) -> None:
        """Fill it, but for so many bytes (in whole pages)."""
        (self.seen / "filler").unlink(missing_ok=True)
        now = os.statvfs(self.seen)
        size = now.f_bavail * now.f_frsize - free
        if size > 0:
            with open(self.seen / "filler", "wb") as file:
                os.posix_fallocate(file.fileno(), 0, size)

    def run(self, script: str, *words: str | Path, **variables: str) -> subprocess.CompletedProcess:
        code = ENTER.format(kinds=self.kinds, pid=self.holder.pid) + RUN.format(root=str(ROOT))
        return processes.run(
            [sys.executable, "-c", code, script, *map(str, words)], cwd=ROOT, env=os.environ | variables,
            capture_output=True, text=True, timeout=LONGEST,
        )  # fmt: skip

    def end(self) -> None:
        self.holder.stdin.close()
        self.holder.wait(timeout=30)


# --- refused by the kernel ------------------------------------------------------------------------------------------

NUMBERS = {  # of write, writev, pwrite64, pwritev, pwritev2, fallocate, sendfile, copy_file_range
    "x86_64": (1, 20, 18, 296, 328, 285, 40, 326),
    "aarch64": (64, 66, 68, 70, 287, 47, 71, 285),
}
SECCOMP = {"x86_64": 317, "aarch64": 277}
PR_SET_NO_NEW_PRIVS, SET_MODE_FILTER, NEW_LISTENER = 38, 1, 8  # linux/prctl.h, linux/seccomp.h
LOAD, JUMP_IF_EQUAL, RETURN, ALLOW, ASK = 0x20, 0x15, 0x06, 0x7FFF0000, 0x7FC00000
RECEIVE, SEND, GO_ON = 0xC0502100, 0xC0182101, 1


def refuse_writes() -> int:
    """Let this process's writes wait for whoever has the descriptor that is returned (`man 2 seccomp`)."""
    numbers, libc = NUMBERS[platform.machine()], ctypes.CDLL(None, use_errno=True)
    program = [(LOAD, 0, 0, 0)]
    program += [(JUMP_IF_EQUAL, len(numbers) - place, 0, number) for place, number in enumerate(numbers)]
    program += [(RETURN, 0, 0, ALLOW), (RETURN, 0, 0, ASK)]
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *line) for line in program))
    libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0)
    filters = struct.pack("@HP", len(program), ctypes.addressof(code))
    descriptor = libc.syscall(SECCOMP[platform.machine()], SET_MODE_FILTER, NEW_LISTENER, filters)
    if descriptor < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return descriptor


class RefusingDisk:
    """A folder to which the scripts of `run` can write so many bytes more; then each write fails with `number`."""

    def __init__(self, folder: Path, number: int = errno.ENOSPC) -> None:
        self.folder = self.seen = folder
        self.number, self.limit, self.refused = number, 0, 0
        folder.mkdir()

    def leave(self, free: int) -> None:
        self.limit = self._used() + free

    def _used(self) -> int:
        used = 0
        for path in self.folder.rglob("*"):
            with contextlib.suppress(FileNotFoundError):
                used += path.lstat().st_size
        return used

    def run(self, script: str, *words: str | Path, **variables: str) -> subprocess.CompletedProcess:
        ours, theirs = socket.socketpair()
        code = HAND_OVER.format(places=[str(ROOT / "tests"), str(ROOT / "tests" / "chaos")]) + RUN.format(
            root=str(ROOT)
        )
        env = os.environ | variables
        judge = threading.Thread(target=self._judge, args=(ours,))
        judge.start()
        try:
            with theirs:
                return processes.run(
                    [sys.executable, "-c", code, script, *map(str, words)], cwd=ROOT, env=env, stdin=theirs,
                    capture_output=True, text=True, timeout=LONGEST,
                )  # fmt: skip
        finally:
            judge.join(timeout=30)
            ours.close()

    def _judge(self, ours: socket.socket) -> None:
        """Answer for each write: it may go on, or it fails."""
        ours.settimeout(LONGEST)
        _, [descriptor], _, _ = socket.recv_fds(ours, 1, 1)
        poll = select.poll()
        poll.register(descriptor, select.POLLIN)
        while not any(event & select.POLLHUP for _, event in poll.poll(LONGEST * 1000)):
            notice = bytearray(80)
            with contextlib.suppress(FileNotFoundError):  # its thread was killed meanwhile
                fcntl.ioctl(descriptor, RECEIVE, notice)
                asked, thread, _, number, _, _, *arguments = struct.unpack("QIIiIQ6Q", notice)
                length = arguments[3 if number == NUMBERS[platform.machine()][5] else 2]  # of vectors, how many
                error = self._refuse(thread, arguments[0], length)
                fcntl.ioctl(descriptor, SEND, struct.pack("QqiI", asked, 0, -error, 0 if error else GO_ON))
        os.close(descriptor)

    def _refuse(self, thread: int, descriptor: int, length: int) -> int:
        try:
            path = os.readlink(f"/proc/{thread}/fd/{descriptor}")
        except OSError:
            return 0
        if not path.startswith(f"{self.folder}/"):
            return 0
        if self.limit - self._used() >= length:
            return 0
        self.refused += 1
        return self.number


@contextlib.contextmanager
def full_disk(folder: Path, size: int) -> Iterator[MountedDisk | RefusingDisk]:
    """A disk of so many bytes."""
    try:
        disk = MountedDisk(folder, size)
    except OSError:
        folder.rmdir()
        disk = RefusingDisk(folder)
    try:
        yield disk
    finally:
        if isinstance(disk, MountedDisk):
            disk.end()
