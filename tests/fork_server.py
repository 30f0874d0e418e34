"""A process that has imported the libraries and forks a child for each script that tests start; see processes.py.

Two of them run: one with the libraries that know nothing of Hugging Face, and one, forked from it, with all of them.
Each notes which environment variables were read while it imported: a script that wants others is started elsewhere.
A child leaves the loop of its server and runs its script at the top level of this file, so that the interpreter ends it
as it ends any script: exit code, traceback, threads, `atexit`, SIGINT.

python fork_server.py DESCRIPTOR DESCRIPTOR
"""

import contextlib
import gc
import importlib
import io
import json
import os
import runpy
import select
import signal
import socket
import sys
import threading
import time
import types
from importlib.machinery import BuiltinImporter, SourceFileLoader
from typing import Any, NoReturn

LIBRARIES = (  # seconds of every script's start, and none of them reads a variable of Hugging Face
    "numpy", "pyarrow", "pyarrow.parquet", "pyarrow.dataset", "pandas", "torch", "torch.distributed", "torch._dynamo",
    "torch._inductor", "torch._inductor.utils", "scipy.stats", "sklearn.metrics", "sympy", "matplotlib.pyplot",
    "openai", "aiohttp", "httpx", "rich.table", "jinja2.sandbox", "psutil", "PIL.Image", "yaml", "pydantic",
    "sacrebleu", "rouge_score.rouge_scorer",
)  # fmt: skip
ALL = (
    "transformers", "transformers.trainer", "transformers.models.auto.modeling_auto", "datasets", "accelerate",
    "evaluate", "transformers.models.gpt2.modeling_gpt2", "transformers.models.llama.modeling_llama",
    "recipe.trainer", "recipe.model", "recipe.figures", "recipe.data", "recipe.data.inspection",
    "recipe.data.inspection_tables",
    "recipe.provenance", "recipe.training.checks", "recipe.training.first_step", "recipe.training.samples",
    "recipe.publishing.card", "recipe.publishing.push_while_training", "recipe.publishing.secret_check",
    "recipe.evaluation.measures", "recipe.evaluation.likelihood", "recipe.evaluation.report.page",
    "recipe.evaluation.judge.run", "recipe.evaluation.gates", "recipe.evaluation.headline",
    "recipe.evaluation.generate",
)  # fmt: skip


class NotingEnvironment(os._Environ):
    """`os.environ` that notes which names are asked for; not those that a walk over all of them comes by."""

    def __getitem__(self, name):
        if sys._getframe(1).f_code.co_name != "__iter__":
            READ.add(os.fsdecode(name))
        return super().__getitem__(name)


READ: set[str] = set()


def preload(modules: tuple[str, ...]) -> None:
    """Import them; a library that is not installed is one that no script can need."""
    for name in modules:
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if (error.name or "").split(".")[0] == "recipe":
                raise
    if threading.active_count() > 1:
        raise RuntimeError(f"imports have started threads, which a fork would lose: {threading.enumerate()}")
    gc.collect()
    gc.freeze()  # a collection in a child would otherwise write to, and so copy, all of this


def describe(before: dict[str, str]) -> dict[str, Any]:
    """What the tests must know to tell which scripts may be forked from here."""
    after = dict(os.environ)
    loaded = {name: getattr(module, "__file__", None) for name, module in list(sys.modules.items()) if "." not in name}
    return {
        "pid": os.getpid(),
        "read": sorted(READ),
        "set": {name: value for name, value in after.items() if before.get(name) != value},
        "loaded": {name: os.path.dirname(file or "") for name, file in loaded.items() if name != "__main__"},
    }


def serve(control: socket.socket) -> tuple[dict[str, Any], list[int]]:
    """Fork a child for each request. Returns in the children only."""
    wake, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    watched: dict[int, int] = {}  # the descriptor that is told how each child ended
    while True:
        ready, _, _ = select.select([control, wake], [], [])
        if wake in ready:
            os.read(wake, 4096)
            report_ended(watched)
        if control not in ready:
            continue
        try:
            message, descriptors, _, _ = socket.recv_fds(control, 1, 5)
        except ConnectionResetError:  # with a request on its way
            message = b""
        if not message:  # the tests have ended, or were killed
            end(watched)
        with os.fdopen(descriptors[0], "rb") as file:
            request = json.loads(file.read())
        status = descriptors[-1]
        pid = os.fork()
        if pid == 0:
            signal.set_wakeup_fd(-1)
            control.close()
            for descriptor in (wake, woken, *watched.values()):
                os.close(descriptor)
            os.setsid()
            tell(status, f"pid {os.getpid()}\n")  # not before it is a group of its own, which can be killed
            os.close(status)
            return request, descriptors[1:4]
        watched[pid] = status
        for descriptor in descriptors[1:4]:
            os.close(descriptor)


def tell(descriptor: int, text: str) -> None:
    with contextlib.suppress(BrokenPipeError):  # the test does not wait for this one any more
        os.write(descriptor, text.encode())


def report_ended(watched: dict[int, int]) -> None:
    while watched:
        pid, status = os.waitpid(-1, os.WNOHANG)
        if pid == 0:
            return
        if pid in watched:
            descriptor = watched.pop(pid)
            tell(descriptor, f"code {os.waitstatus_to_exitcode(status)}\n")
            os.close(descriptor)


def end(watched: dict[int, int]) -> NoReturn:
    for pid in watched:
        for kill in (os.kill, os.killpg):  # it may not be a group yet
            with contextlib.suppress(ProcessLookupError):
                kill(pid, signal.SIGKILL)
    while True:  # all of them, so that their time counts as ours
        try:
            os.wait()
        except ChildProcessError:
            os._exit(0)


def as_started(request: dict[str, Any], descriptors: list[int]) -> None:
    """Streams, signals, folder, environment and random numbers of a process that has just begun."""
    for number, descriptor in enumerate(descriptors):
        os.dup2(descriptor, number)
        os.close(descriptor)
    for number in signal.valid_signals() - {signal.SIGKILL, signal.SIGSTOP}:
        if number < signal.SIGRTMIN:
            signal.signal(number, signal.SIG_DFL)
    for number in (signal.SIGPIPE, signal.SIGXFSZ):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["env"])
    time.tzset()
    for number, stream in enumerate((sys.stdin, sys.stdout, sys.stderr)):
        reopen(stream, number)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed()  # Python's own generator does it by itself
    if torch := sys.modules.get("torch"):
        torch.default_generator.seed()
    if datasets := sys.modules.get("datasets"):
        importlib.reload(datasets.config)  # its HF_DATASETS_CACHE: read here alone, and by attribute everywhere else


def reopen(stream: Any, number: int) -> None:
    """As the interpreter opens it, for a stream remembers its kind of file; but the same object, which loggers have."""
    unbuffered, mode = bool(os.environ.get("PYTHONUNBUFFERED")), "w" if number else "r"
    settings = {"encoding": stream.encoding, "errors": stream.errors, "write_through": unbuffered}
    raw = io.FileIO(number, mode, closefd=False)
    raw.name = stream.name
    buffer = io.BufferedReader(raw) if number == 0 else raw if unbuffered else io.BufferedWriter(raw)
    stream.__init__(buffer, line_buffering=not unbuffered and (number == 2 or raw.isatty()), **settings)
    stream.mode = mode


def main_module(request: dict[str, Any]) -> types.ModuleType:
    """A fresh `__main__`; `sys.argv` and `sys.path` as `python SCRIPT`, `-c CODE` or `-m MODULE` sets them."""
    kind, target = request["kind"], request["target"]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=__builtins__, __annotations__={}, __loader__=BuiltinImporter)
    sys.argv = [target if kind == "script" else f"-{kind}", *request["arguments"]]
    sys.orig_argv = request["command"]
    first = {"c": "", "m": os.getcwd()}.get(kind)
    if first is None:
        path = os.path.join(os.getcwd(), target)
        main.__dict__.update(__file__=path, __cached__=None, __loader__=SourceFileLoader("__main__", path))
        first = os.path.dirname(os.path.realpath(path))
    sys.path[:0] = [first]
    importlib.invalidate_caches()
    sys.modules["__main__"] = main
    return main


def code_of(request: dict[str, Any], main: types.ModuleType) -> types.CodeType:
    if request["kind"] == "c":
        return compile(request["target"], "<string>", "exec", dont_inherit=True)
    with open(main.__file__, "rb") as file:
        return compile(file.read(), main.__file__, "exec", dont_inherit=True)


def show_error(kind, error, traceback) -> None:
    """As the interpreter shows it: without the calls of this file, which stand above the script's."""
    while traceback is not None and traceback.tb_frame.f_code.co_filename == __file__:
        traceback = traceback.tb_next
    sys.__excepthook__(kind, error.with_traceback(traceback), traceback)


def start(controls: list[socket.socket]) -> tuple[dict[str, Any], list[int]]:
    """Preload, and serve. Returns in the children only."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # who ends the tests ends this by closing the socket
    sys.path.pop(0)  # where this file lies
    before = dict(os.environ)
    os.environ.__class__ = NotingEnvironment
    preload(LIBRARIES)
    if os.fork() == 0:
        controls.reverse()
        preload(ALL)
    other = controls.pop()
    other.close()
    os.environ.__class__ = os._Environ
    control = controls.pop()
    control.sendall(json.dumps(describe(before)).encode() + b"\n")
    return serve(control)


if __name__ == "__main__":
    __request, __descriptors = start([socket.socket(fileno=int(word)) for word in sys.argv[1:]])
    as_started(__request, __descriptors)
    __main = main_module(__request)
    sys.excepthook = show_error
    if __request["kind"] == "m":
        runpy._run_module_as_main(__request["target"])
    else:
        exec(code_of(__request, __main), __main.__dict__)
