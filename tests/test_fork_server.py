"""A script that processes.py forks does what `python SCRIPT` does: text, exit codes, signals, weights."""

import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
from conftest import ROOT

ENDINGS = {
    "nothing": "print('é', flush=True)",
    "code": "import sys; sys.exit(7)",
    "text": "import sys; sys.exit('no é')",
    "error": "def f():\n    raise ValueError('wrong') from KeyError('k')\nf()",
    "syntax": "print(1\n",
    "interrupt": "import os, signal, time; os.kill(os.getpid(), signal.SIGINT); time.sleep(9)",
    "terminated": "import os, signal, time; os.kill(os.getpid(), signal.SIGTERM); time.sleep(9)",
    "killed": "import os, signal; print('lost', end=''); os.kill(os.getpid(), signal.SIGKILL)",
    "thread": "import threading, time\nthreading.Thread(target=lambda: (time.sleep(0.2), print('late'))).start()",
    "atexit": "import atexit; atexit.register(print, 'at the end'); raise SystemExit(3)",
    "at once": "import os; print('lost', end=''); os._exit(4)",
    "main": "import __main__, sys\nX = 1\nprint(__name__, __main__.X, sys.modules['__main__'].__dict__ is globals())",
    "names": "print(sorted(globals()), __spec__, type(__loader__), globals().get('__file__'))",
    "words": "import os, sys; print(sys.argv, sys.path[0], sys.orig_argv[1:], os.getcwd(), os.environ['WORD'])",
    "input": "import sys; print(sys.stdin.read(), [s.encoding for s in (sys.stdin, sys.stdout, sys.stderr)])",
    "streams": "import sys\nfor s in (sys.stdin, sys.stdout, sys.stderr):\n"
    "    print(s.name, s.mode, s.errors, s.line_buffering, s.write_through, s.seekable(), s.isatty(), type(s.buffer))",
    "order": "import sys; print('1'); print('2', file=sys.stderr); print('3')",
    "descriptors": "import os; print(sorted(os.listdir('/proc/self/fd'))[:4])",
    "pickle": "import pickle\nclass A: pass\nprint(type(pickle.loads(pickle.dumps(A()))))",
    "signals": "import signal\n"
    "print([(n, signal.getsignal(n)) for n in (2, 13, 15, 17, 25)], signal.pthread_sigmask(0, []))",
    "torch": "import torch; torch.manual_seed(0)\n"
    "print(torch.rand(2), torch.get_num_threads(), torch.get_num_interop_threads())",
    "state": "from accelerate import PartialState\nprint(PartialState._shared_state)",
    "logging": "from transformers.utils import logging; logging.get_logger('transformers').warning('careful')",
    "filters": "import warnings; warnings.warn('careful')",
}


def both(*command: str | Path, **options) -> list[tuple[int, str, str]]:
    """A command's exit code and texts: forked, and as a process that starts from nothing."""
    options = {"cwd": ROOT, "capture_output": True, "text": True, "timeout": 120} | options
    words = [sys.executable, *command]
    assert processes.how(words, cwd=options["cwd"], env=options.get("env")) == "forked"
    done = [call(words, **options) for call in (processes.run, subprocess.run)]
    return [(each.returncode, each.stdout, each.stderr) for each in done]


@pytest.mark.parametrize("name", ENDINGS)
def test_a_script_ends_and_speaks_as_always(name, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(ENDINGS[name], encoding="utf-8")
    options = {"cwd": tmp_path, "env": os.environ | {"WORD": "é"}, "input": "asked é"}
    forked, usual = both("script.py", "a", "--b", **options)
    assert forked == usual
    forked, usual = both("-c", ENDINGS[name], "a", **options)
    assert forked == usual


def test_a_module_is_run_as_always(tmp_path):
    (tmp_path / "some").mkdir()
    (tmp_path / "some" / "__main__.py").write_text("import sys; print(sys.argv, sys.path[0], __spec__.name); 1 / 0")
    forked, usual = both("-m", "some", "a", cwd=tmp_path)
    assert forked == usual


def test_random_numbers_differ_from_process_to_process():
    code = "import random, numpy, torch, uuid\n"
    code += "print(random.random(), numpy.random.rand(), torch.rand(1).item(), uuid.uuid4())"
    command = [sys.executable, "-c", code]
    drawn = [processes.run(command, capture_output=True, text=True).stdout.split() for _ in range(3)]
    assert all(len({*column}) == 3 for column in zip(*drawn, strict=True))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"HF_DATASETS_CACHE": "/somewhere"}, "forked"),
        ({"OPENAI_API_KEY": "key"}, "forked"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}, "forked"),  # by the server that has not read it
        ({"OMP_NUM_THREADS": "2"}, "the imports have read OMP_NUM_THREADS"),
        ({"PYTHONHASHSEED": "1"}, "the imports have read PYTHONHASHSEED"),
        ({"PYTHONPATH": "/somewhere"}, "the imports have read PYTHONPATH"),
        ({"HOME": "/somewhere"}, "the imports have read HOME"),
        ({"TORCH_LOGS": "all"}, "the imports have read TORCH_LOGS"),
    ],
)
def test_what_the_imports_have_read_is_not_changed_behind_their_back(changes, why):
    environment = os.environ | changes
    command = [sys.executable, "-c", SEEN]
    assert processes.how(command, env=environment) == why
    options = {"env": environment, "capture_output": True, "text": True}
    if why == "forked":
        assert processes.run(command, **options).stdout == subprocess.run(command, **options).stdout


SEEN = """
import os, sys, datasets, huggingface_hub as hub
print(datasets.config.HF_DATASETS_CACHE, hub.constants.ENDPOINT, hub.HfApi().endpoint, hub.hf_api.api.endpoint)
print(hub.constants.HF_HUB_OFFLINE, datasets.config.HF_HUB_OFFLINE, datasets.config.HF_ENDPOINT)
import torch, sklearn, torch._inductor.runtime.cache_dir_utils as cache; cache.cache_dir()  # which set some more
print({name: os.environ[name] for name in sorted(os.environ)})
"""


def test_other_programs_and_folders_that_shadow_a_library_are_started_as_always(tmp_path):
    assert processes.how(["git", "--version"]) != "forked"
    assert processes.how([sys.executable, "-X", "dev", "-c", "1"]) != "forked"
    assert processes.how([sys.executable, tmp_path / "none.py"]) != "forked"
    assert processes.run([sys.executable, tmp_path / "none.py"], capture_output=True).returncode == 2
    (tmp_path / "yaml.py").write_text("print('mine')")
    assert "has another yaml" in processes.how([sys.executable, "-c", "import yaml"], cwd=tmp_path)
    done = processes.run([sys.executable, "-c", "import yaml"], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout == "mine\n"


def test_it_can_be_awaited_signalled_and_killed_like_any_process(tmp_path):
    code = "import os, time; print(os.getpid(), os.getpgrp(), os.getsid(0), flush=True); time.sleep(60)"
    for number in (signal.SIGKILL, signal.SIGTERM, signal.SIGINT):
        with processes.start([sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
            assert set(map(int, process.stdout.readline().split())) == {process.pid}
            assert process.poll() is None
            with pytest.raises(subprocess.TimeoutExpired):
                process.wait(timeout=0.05)
            process.send_signal(number)
            assert process.wait(timeout=60) == process.poll() == -number
        with pytest.raises(ProcessLookupError):
            os.kill(process.pid, 0)  # nothing is left of it
    with pytest.raises(subprocess.TimeoutExpired):
        processes.run([sys.executable, "-c", code], timeout=0.2)
    for _ in range(20):  # also before it has begun
        process = processes.start([sys.executable, "-c", code], stdout=subprocess.DEVNULL)
        processes.kill_group(process)
        assert process.wait(timeout=60) == -signal.SIGKILL
    many = [processes.start([sys.executable, "-c", f"raise SystemExit({code})"]) for code in range(9)]
    assert [process.wait(timeout=60) for process in many] == list(range(9))


ENDED = """
import os, sys
sys.path.insert(0, {tests!r})
import processes
process = processes.start([sys.executable, "-c", "import time; time.sleep(600)"])
print(process.pid, *[server.about["pid"] for server in processes.servers()], flush=True)
{last}
"""


@pytest.mark.parametrize("last", ["", "os.kill(os.getpid(), 9)"])
def test_servers_and_scripts_end_with_the_process_that_started_them(last):
    code = ENDED.format(tests=str(ROOT / "tests"), last=last)
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, timeout=120)
    pids = [int(word) for word in done.stdout.split()]
    assert len(pids) == 3
    end = time.monotonic() + 30
    while any(is_running(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.05)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


TRAIN = (
    "scripts/train.py", "configs/demo.yaml", "--max_steps", "3", "--eval_strategy", "steps", "--eval_steps", "3",
    "--num_sample_generations", "1", "--save_strategy", "steps", "--save_steps", "2", "--output_dir",
)  # fmt: skip
MEASURED = re.compile(r"(?<=runtime': ')[\d.]+|(?<=per_second': ')[\d.]+|[\d,.]+ ?(s|examples/s|it/s)\b")


def test_training_leaves_the_same_files_and_says_the_same(tmp_path):
    said, left = [], []
    for name, call in (("one", processes.run), ("two", subprocess.run)):
        folder = tmp_path / name
        environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache")}
        command = [sys.executable, *TRAIN, str(folder / "run")]
        done = call(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
        assert done.returncode == 0, done.stderr[-3000:]
        said.append(MEASURED.sub("#", done.stdout.replace(str(folder), "FOLDER")))
        left.append({str(path.relative_to(folder)): path for path in sorted(folder.rglob("*")) if path.is_file()})
    assert said[0] == said[1]
    names = [{name for name in files if not name.startswith("cache")} for files in left]
    assert names[0] == names[1]
    same = {name for name in names[0] if name.endswith((".safetensors", ".jinja", "samples.jsonl", "tokenizer.json"))}
    assert len(same) >= 7
    for name in same:
        first, second = (hashlib.sha256(files[name].read_bytes()).hexdigest() for files in left)
        assert first == second, name
    runs = [json.loads(files["run/run.json"].read_text()) for files in left]
    assert runs[0].keys() == runs[1].keys()
    assert [run["command"].replace(name, "") for run, name in zip(runs, ("one", "two"), strict=True)] == [
        runs[0]["command"].replace("one", "")
    ] * 2
    assert runs[0]["versions"] == runs[1]["versions"] and runs[0]["result"]["eval"] | runs[1]["result"]["eval"]


SHOW = "import json, os, sys\nsys.stdout.write(json.dumps([sys.argv[1:], {**os.environ}]) + '\\n')"
ONLY_THE_LAUNCHER = {"TORCHELASTIC_USE_AGENT_STORE", "TORCHELASTIC_ERROR_FILE", "TORCH_NCCL_ASYNC_ERROR_HANDLING"}


@pytest.mark.parametrize(
    ("config", "count"),
    [("accelerate_config.yaml", 1), ("configs/accelerate/two_processes.yaml", 2), ("configs/accelerate/fsdp.yaml", 2)],
)
def test_ranks_get_the_environment_that_the_launcher_gives_them(config, count, tmp_path):
    script = tmp_path / "show.py"
    script.write_text(SHOW)
    launcher = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", config, "--main_process_port", "0"]
    options = {"env": os.environ, "capture_output": True, "text": True, "check": True}
    launched = subprocess.run([*launcher, script, "a"], cwd=ROOT, **options)
    forked = processes.run_ranks(script, count, "a", config=config, cwd=ROOT)
    assert forked.returncode == 0, forked.stderr
    seen = []
    for done in (launched, forked):
        rows = [json.loads(line) for line in done.stdout.replace("][", "]\n[").splitlines()]
        assert [words for words, _ in rows] == [["a"]] * count
        environments = sorted((environment for _, environment in rows), key=lambda each: each.get("RANK", ""))
        seen.append([{**each, "MASTER_PORT": "MASTER_PORT" in each} for each in environments])
    for usual, ours in zip(*seen, strict=True):
        different = {name for name in usual.keys() | ours.keys() if usual.get(name) != ours.get(name)}
        imports = processes.servers()[0].about["set"].keys()
        assert different - imports <= ONLY_THE_LAUNCHER | {"PYTHONUNBUFFERED"}  # torchrun says `python -u`


def test_ranks_meet_and_when_one_fails_the_other_is_ended(tmp_path):
    script = tmp_path / "meet.py"
    script.write_text(
        "import sys, time, torch\nfrom accelerate import PartialState\nfrom accelerate.utils import reduce\n"
        "state, reduction = PartialState(cpu=True), 'sum'\n"
        "print(f'sum {reduce(torch.tensor(state.process_index + 1.0), reduction).item()}\\n', end='')\n"
        "if state.process_index and 'fail' in sys.argv: raise SystemExit('failed')\n"
        "if 'fail' in sys.argv: time.sleep(600)\n"
        "state.destroy_process_group()\n"
    )
    done = processes.run_ranks(script, 2, cwd=ROOT)
    assert (done.returncode, done.stdout) == (0, "sum 3.0\nsum 3.0\n"), done.stderr
    done = processes.run_ranks(script, 2, "fail", cwd=ROOT)
    assert done.returncode == 1 and "failed" in done.stderr
