"""Starts the scripts that tests run in processes of their own, without the seconds that the imports take.

    done = processes.run([sys.executable, "scripts/train.py", "configs/demo.yaml"], cwd=ROOT, capture_output=True)

`run` and `start` take what `subprocess.run` and `subprocess.Popen` take, and give the same. The process is a real one,
with its own id, group, signals, files and exit code; but it is forked from a server (fork_server.py) that has imported
the libraries. What a fork cannot do as well is started as always, and `how` tells which it was: other programs, options
of the interpreter, environment variables that were read during the imports, folders that shadow what is imported.
"""

import atexit
import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
SERVER = Path(__file__).with_name("fork_server.py")
ENVIRONMENT = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}  # before any test
# read by the interpreter, C libraries or in walks over all of the environment, which the server cannot note
READ_AT_START = (
    "PYTHON", "LC_", "LANG", "OMP_", "GOMP_", "KMP_", "MKL_", "OPENBLAS_", "LD_", "MALLOC_", "GLIBC_", "TORCH_",
    "PYTORCH_", "ATEN_", "CUDA_", "TQDM_", "FSSPEC_", "ARROW_", "RUST_", "JE_", "MIMALLOC_",
)  # fmt: skip
# read anew by the child; set by the import of sklearn, here as in the server
SET_AGAIN = {"HF_DATASETS_CACHE", "PYTHONUNBUFFERED", "KMP_DUPLICATE_LIB_OK", "KMP_INIT_AT_FORK"}
_servers: list["Server"] = []


class Server:
    """The tests' end of one server: where it takes requests, and what it has told of itself."""

    def __init__(self, control: socket.socket):
        self.control = control
        self._about: dict[str, Any] | None = None

    @property
    def about(self) -> dict[str, Any]:
        """Waits until it has imported everything."""
        if self._about is None:
            with self.control.makefile("rb") as lines:
                line = lines.readline()
            if not line:
                raise RuntimeError(f"{SERVER} ended while it imported; its error is above")
            self._about = json.loads(line)
        return self._about

    def why_not(self, environment: Mapping[str, str], first_path: str) -> str:
        """Why a script that wants this environment, with this folder first in `sys.path`, is not forked from it."""
        as_it_is = ENVIRONMENT.items() | self.about["set"].items()  # an import in this process has set it, too
        names = {name for name, value in environment.items() if (name, value) not in as_it_is}
        names |= ENVIRONMENT.keys() - environment.keys()
        read = {name for name in names - SET_AGAIN if name in self.about["read"] or name.startswith(READ_AT_START)}
        if read:
            return f"the imports have read {', '.join(sorted(read))}"
        here = os.path.realpath(first_path or os.curdir)
        for entry in os.listdir(here) if os.path.isdir(here) else ():
            name = entry.partition(".")[0]
            found = self.about["loaded"].get(name)
            is_module = found is not None and (entry == name or entry.endswith((".py", ".so")))
            if is_module and os.path.realpath(found) not in (here, os.path.join(here, name)):
                return f"{here} has another {name}"
        return ""


def servers() -> list[Server]:
    """The one with everything, and the one with what is not of Hugging Face; started at the first call."""
    if not _servers:
        pairs = [socket.socketpair() for _ in range(2)]
        theirs = [theirs for _, theirs in pairs]
        process = subprocess.Popen(
            [sys.executable, str(SERVER), *(str(each.fileno()) for each in theirs)], env=ENVIRONMENT,
            stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, pass_fds=[each.fileno() for each in theirs],
            start_new_session=True,
        )  # fmt: skip
        for each in theirs:
            each.close()
        _servers.extend(Server(ours) for ours, _ in reversed(pairs))
        atexit.register(_end, process)
    return _servers


def _end(process: subprocess.Popen) -> None:
    for server in _servers:
        with contextlib.suppress(OSError):  # it has ended
            server.control.shutdown(socket.SHUT_RDWR)  # closing is not enough: a child of ours may hold it, too
        server.control.close()
    _servers.clear()
    process.wait()


def parse(command: Sequence[str | Path], cwd: str | Path | None) -> dict[str, Any] | None:
    """What a command asks of the interpreter; nothing if it is another program, or has options of Python's own."""
    words = [os.fspath(word) for word in command]
    if len(words) < 2 or words[0] != sys.executable:
        return None
    kind = {"-c": "c", "-m": "m"}.get(words[1], "script")
    rest = words[1:] if kind == "script" else words[2:]
    if not rest or (kind == "script" and not os.path.isfile(os.path.join(cwd or "", rest[0]))):
        return None  # an option, or nothing
    return {"kind": kind, "target": rest[0], "arguments": rest[1:], "command": words}


def choose(
    command: Sequence[str | Path], cwd: str | Path | None, env: Mapping[str, str] | None
) -> tuple[Server | None, dict[str, Any], str]:
    """The server that forks it, if any; what it is sent; and how the script is started, in words."""
    environment = dict(os.environ if env is None else env)
    request = parse(command, cwd)
    if request is None:
        return None, {}, "not `python SCRIPT`, `python -c CODE` or `python -m MODULE`"
    if not hasattr(os, "fork") or not hasattr(socket, "send_fds") or sys.platform == "darwin":
        return None, {}, "this system cannot fork it"
    folder = os.path.abspath(cwd or os.curdir)
    if not os.path.isdir(folder):
        return None, {}, f"{folder} is no folder"
    first = folder
    if request["kind"] == "script":
        first = os.path.dirname(os.path.realpath(os.path.join(folder, request["target"])))
    reasons = []
    for server in servers():
        reason = server.why_not(environment, first)
        if not reason:
            environment |= {name: value for name, value in server.about["set"].items() if name not in environment}
            return server, request | {"cwd": folder, "env": environment}, "forked"
        reasons.append(reason)
    return None, {}, reasons[-1]


class Forked(subprocess.Popen):
    """A Popen whose process is the server's child: it is asked for, and its end is told through a pipe."""

    def __init__(self, server: Server, request: dict[str, Any], **options):
        self._server, self._request, self._heard = server, request, b""
        super().__init__(request["command"], **options)

    def _execute_child(self, *arguments):
        names = ("p2cread", "p2cwrite", "c2pread", "c2pwrite", "errread", "errwrite")
        code = subprocess.Popen._execute_child.__code__
        places = code.co_varnames[1 : code.co_argcount]  # other versions of Python have other arguments
        given = dict(zip(places, arguments, strict=True))
        theirs = [given[name] for name in ("p2cread", "c2pwrite", "errwrite")]
        streams = [fd if fd != -1 else number for number, fd in enumerate(theirs)]
        self._status, status = os.pipe()
        try:
            with tempfile.TemporaryFile() as message:
                message.write(json.dumps(self._request).encode())
                message.seek(0)
                socket.send_fds(self._server.control, [b"x"], [message.fileno(), *streams, status])
        finally:
            os.close(status)
            self._close_pipe_fds(*(given[name] for name in names))
        self._child_created = True
        self.pid = self._hear("pid", None)

    def _hear(self, what: str, timeout: float | None) -> int | None:
        """Its id, which it tells itself, or its exit code, which the server tells; none if neither comes in time."""
        end = None if timeout is None else time.monotonic() + timeout
        while b"\n" not in self._heard:
            left = None if end is None else max(0.0, end - time.monotonic())
            if not select.select([self._status], [], [], left)[0]:
                return None
            heard = os.read(self._status, 64)
            if not heard:
                raise RuntimeError(f"the server of {self.args} ended before it")
            self._heard += heard
        line, _, self._heard = self._heard.partition(b"\n")
        told, number = line.decode().split()
        if told != what:
            raise RuntimeError(f"{self.args} ended with {number} before it had begun")
        return int(number)

    def _internal_poll(self, _deadstate=None, **_):
        if self.returncode is None:
            self._ended(self._hear("code", 0))
        return self.returncode

    def _wait(self, timeout):
        if self.returncode is None:
            self._ended(self._hear("code", timeout))
        if self.returncode is None:
            raise subprocess.TimeoutExpired(self.args, timeout)
        return self.returncode

    def _ended(self, code: int | None) -> None:
        if code is not None:
            self.returncode = code
            os.close(self._status)


def start(
    command: Sequence[str | Path], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None,
    stdin=None, stdout=None, stderr=None, text: bool | None = None, encoding: str | None = None,
    errors: str | None = None, start_new_session: bool = False,
) -> subprocess.Popen:  # fmt: skip
    """`subprocess.Popen` of a script. A forked one always has a session and a process group of its own."""
    streams = {"stdin": stdin, "stdout": stdout, "stderr": stderr, "text": text, "encoding": encoding, "errors": errors}
    server, request, _ = choose(command, cwd, env)
    if server is None:
        return subprocess.Popen(command, cwd=cwd, env=env, start_new_session=start_new_session, **streams)
    return Forked(server, request, **streams)


def run(
    command: Sequence[str | Path], *, timeout: float | None = None, check: bool = False,
    input: str | bytes | None = None, capture_output: bool = False, **options: Any,
) -> subprocess.CompletedProcess:  # fmt: skip
    """`subprocess.run` of a script; the options are those of `start`."""
    if capture_output:
        options |= {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    if input is not None:
        options["stdin"] = subprocess.PIPE
    with start(command, **options) as process:
        try:
            output, errors = process.communicate(input, timeout=timeout)
        except BaseException:  # out of time, too
            kill_group(process)
            process.wait()
            raise
    done = subprocess.CompletedProcess(process.args, process.returncode, output, errors)
    if check:
        done.check_returncode()
    return done


def kill_group(process: subprocess.Popen, number: int = signal.SIGKILL) -> None:
    """Send a signal to a process and, if it was forked, to those that it has started."""
    if process.poll() is None and isinstance(process, Forked):
        with contextlib.suppress(ProcessLookupError):  # it has just ended
            os.killpg(process.pid, number)
    else:
        process.send_signal(number)


def how(command: Sequence[str | Path], *, cwd: str | Path | None = None, env: Mapping[str, str] | None = None) -> str:
    """ "forked", or why a command is started as an ordinary process."""
    return choose(command, cwd, env)[2]


def ranks_environment(config: str | Path, processes: int) -> list[dict[str, str]]:
    """What `accelerate launch --config_file CONFIG --num_processes N` adds to the environment of each process."""
    from accelerate.commands.launch import _validate_launch_command, launch_command_parser
    from accelerate.utils.launch import prepare_multi_gpu_env, prepare_simple_launcher_cmd_env

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    flags = ["--config_file", str(config), "--num_processes", str(processes), "--main_process_port", port, "script.py"]
    arguments, _, _ = _validate_launch_command(launch_command_parser().parse_args(flags))
    if processes == 1:
        _, added = prepare_simple_launcher_cmd_env(arguments)
    else:
        added = prepare_multi_gpu_env(arguments)
    shared = {name: value for name, value in added.items() if os.environ.get(name) != value}
    if processes == 1:
        return [shared]
    size = str(processes)
    shared |= {  # by torchrun, whose agent would be the store where the processes meet; here it is that of rank 0
        "WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size, "ROLE_WORLD_SIZE": size, "GROUP_WORLD_SIZE": "1",
        "GROUP_RANK": "0", "ROLE_NAME": "default", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
        "TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0", "TORCHELASTIC_MAX_RESTARTS": "0",
        "PYTHONUNBUFFERED": "1", "TORCHELASTIC_SIGNALS_TO_HANDLE": "SIGTERM,SIGINT,SIGHUP,SIGQUIT",
    }  # fmt: skip
    return [shared | {"RANK": rank, "LOCAL_RANK": rank, "ROLE_RANK": rank} for rank in map(str, range(processes))]


def start_ranks(
    script: str | Path, processes: int, *arguments: str | Path, config: str | Path | None = None,
    env: Mapping[str, str] | None = None, **options: Any,
) -> list[subprocess.Popen]:  # fmt: skip
    """The processes that `accelerate launch` would start, without the launcher: no one ends them all when one fails."""
    if config is None:
        config = ROOT / ("accelerate_config.yaml" if processes == 1 else "configs/accelerate/two_processes.yaml")
    environment = dict(os.environ if env is None else env)
    command = [sys.executable, script, *arguments]
    return [start(command, env=environment | added, **options) for added in ranks_environment(config, processes)]


def run_ranks(
    script: str | Path, processes: int, *arguments: str | Path, timeout: float = 240, **options: Any
) -> subprocess.CompletedProcess:
    """`start_ranks` to their end, and what all of them wrote. Like the launcher, it ends the others when one fails."""
    end = time.monotonic() + timeout
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = start_ranks(script, processes, *arguments, stdout=output, stderr=errors, **options)
        try:
            while (None in (codes := [each.poll() for each in started])) and not any(codes):
                if time.monotonic() > end:
                    raise subprocess.TimeoutExpired(started[0].args, timeout)
                time.sleep(0.02)
            for each in started:
                each.terminate()
            for each in started:
                each.wait(timeout=30)
        finally:
            for each in started:
                kill_group(each)
                each.wait()
        texts = []
        for file in (output, errors):
            file.seek(0)
            texts.append(file.read().decode())
    return subprocess.CompletedProcess(started[0].args, int(any(codes)), *texts)
