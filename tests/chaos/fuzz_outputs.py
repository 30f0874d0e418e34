"""Files that our scripts have written, edited or damaged, and what becomes of them when the scripts read them back.

`try_cases` tries some. As a script, this is the long form, part of `make chaos`:

    python tests/chaos/fuzz_outputs.py --cases 1000 --seeds 0 1 2 --output outputs/chaos/fuzz_outputs.json

A case is a run's folder and the folder of its evaluation, in which one file is another than it was, and one of the
scripts that read it. It ends well if the script reads the file right (its results are those of the untouched file),
tells what it has found in a line, or refuses it with an error that names the file. It ends badly with a traceback,
after too long, with an error that names no file, or if the results are others and nobody says so.
"""

import argparse
import contextlib
import io
import json
import os
import platform
import random
import re
import runpy
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, dataclass
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(Path(__file__).parent), str(ROOT), str(ROOT / "tests")]

import edits  # noqa: E402
import processes  # noqa: E402
from stub_endpoint import Say, serve_stub  # noqa: E402

import recipe.evaluation.generate  # noqa: E402 - so that forks have it
import recipe.evaluation.report.page  # noqa: E402
import recipe.publishing.card  # noqa: E402, F401
from recipe.console import run_script  # noqa: E402

DEMO = ROOT / "recipe" / "demo"
LONGEST = 120  # seconds of one script; the slowest takes six
TRAIN = {
    "data": "records.jsonl", "validation_ratio": 0.2, "test_ratio": 0.4, "per_device_train_batch_size": 4,
    "save_strategy": "steps", "save_steps": 1, "eval_strategy": "steps", "eval_steps": 1, "logging_steps": 1,
    "report_to": "none", "disable_tqdm": True, "num_sample_generations": 1, "max_length": 96,
}  # fmt: skip
JUDGE = ("--judge_prompts", "score_0_100", "pairwise")
SEALED = ("eval/metrics.json", "eval/evaluation.json", "run/run.json")  # which hold a hash of themselves
READERS = {  # who reads it
    "eval/predictions.jsonl": ("report", "score", "resume", "card", "recorded"),
    "eval/metrics.json": ("report", "score", "judge", "card"),
    "eval/evaluation.json": ("score", "resume"),
    "eval/judge.jsonl": ("report", "judge"),
    "eval/judge_cache.jsonl": ("judge",),
    "run/run.json": ("report", "resume", "card", "continue"),
    "run/trainer_state.json": ("report",),
    "run/samples.jsonl": ("continue",),
    "run/manifest.json": ("ask", "card"),
    "run/config.json": ("ask", "card", "tune"),
    "run/generation_config.json": ("ask", "card"),
    "run/tokenizer.json": ("ask", "card", "tune"),
    "run/tokenizer_config.json": ("ask", "card", "tune"),
    "run/chat_template.jinja": ("ask", "card"),
    "run/model.safetensors": ("ask", "card", "tune"),
    "run/adapter_config.json": ("card",),
    "run/model.safetensors.index.json": ("ask", "card"),
    "run/checkpoint-2/trainer_state.json": ("continue",),
    "run/checkpoint-2/manifest.json": ("continue",),
}  # fmt: skip
ADDED = {  # not of this run, but read where they are
    "run/adapter_config.json": {"base_model_name_or_path": "someone/base", "peft_type": "LORA"},
    "run/model.safetensors.index.json": {"metadata": {}, "weight_map": {"a": "model.safetensors"}},
}
TRAINING = ("train", "continue", "tune")
BAD = ("traceback", "hang", "unclear", "silent")


@dataclass(frozen=True)
class Case:
    """One file that is edited, how, and which script reads it."""

    file: str
    edit: str
    reader: str
    seed: int
    unsealed: bool = False  # it lost its hash, as an earlier version wrote it


@dataclass(frozen=True)
class Ending:
    """`same`, `told`, `refused`, `without`, `taken`, or one of `BAD`; with the words that say so."""

    how: str
    said: str = ""


class Workplace:
    """The untouched folders, the scripts that read them, and what these find in them."""

    def __init__(self, root: Path, judge: str) -> None:
        self.root, self.base, self.judge = root, root / "base", judge
        self.expected: dict[str, dict] = {}  # by reader

    def command(self, reader: str) -> list[str]:
        evaluate, tune, publish = (str(ROOT / "scripts" / f"{name}.py") for name in ("eval", "train", "publish"))
        asked = ("--baseline", str(DEMO / "base"), "--max_new_tokens", "4")
        training = [word for name, value in TRAIN.items() for word in (f"--{name}", str(value))]
        words = {
            "train": [tune, *training, "--model_name_or_path", str(DEMO / "base"), "--max_steps", "2",
                      "--output_dir", "run"],
            "evaluate": [evaluate, "--model", "run", *asked, "--output_dir", "eval", "--judge", self.judge, *JUDGE],
            "report": [evaluate, "--stages", "report", "--output_dir", "eval", "--gate", "chrf>=0"],
            "score": [evaluate, "--stages", "score", "report", "--output_dir", "eval"],
            "judge": [evaluate, "--stages", "judge", "report", "--output_dir", "eval", "--judge", self.judge, *JUDGE],
            "resume": [evaluate, "--stages", "generate", "score", "report", "--model", "run", *asked,
                       "--output_dir", "eval"],
            "recorded": [evaluate, "--stages", "generate", "score", "--model", "eval/predictions.jsonl",
                         "--output_dir", "new"],
            "ask": [evaluate, "--stages", "generate", "score", "--model", "run", *asked[2:], "--output_dir", "new"],
            "card": [publish, "run", "--dry_run", "--evaluation", "eval"],
            "continue": [tune, *training, "--model_name_or_path", str(DEMO / "base"), "--max_steps", "3",
                         "--output_dir", "run", "--resume_from_checkpoint", "true", "--allow_changed", "max_steps"],
            "tune": [tune, *training, "--model_name_or_path", "run", "--max_steps", "1", "--output_dir", "new"],
        }  # fmt: skip
        return [sys.executable, *words[reader]]

    def run(self, reader: str, folder: Path) -> subprocess.CompletedProcess:
        environment = {**os.environ, "COLUMNS": "120", "HF_DATASETS_CACHE": str(self.root / "cache")}
        command = self.command(reader)
        if reader in TRAINING:
            options = {"cwd": folder, "env": environment, "timeout": LONGEST, "stdin": subprocess.DEVNULL}
            return processes.run(command, capture_output=True, **options)
        return forked(command[1:], folder, environment)

    def make(self) -> None:
        """Train for two steps, and evaluate."""
        self.base.mkdir(parents=True)
        lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:24]
        (self.base / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        for reader in ("train", "evaluate"):
            done = self.run(reader, self.base)
            if done.returncode:
                raise RuntimeError(f"{reader}: {done.stderr.decode()[-2000:]}")
        with redirect_stdout(io.StringIO()), contextlib.chdir(self.base):  # what it imports late, forks then have
            runpy.run_path(str(ROOT / "scripts" / "eval.py"))["main"](self.command("report")[2:])
            runpy.run_path(str(ROOT / "scripts" / "publish.py"))["main"](self.command("card")[2:])

    def copy(self, file: str) -> Path:
        """The untouched folders once more; weights, into which nobody writes, are not copied."""
        folder = Path(tempfile.mkdtemp(dir=self.root))

        def take(source: str, target: str) -> None:
            (os.link if source.endswith((".safetensors", ".pt", ".pth")) else shutil.copyfile)(source, target)

        shutil.copytree(self.base, folder / "case", copy_function=take)
        if file in ADDED:
            (folder / "case" / file).write_text(json.dumps(ADDED[file]), encoding="utf-8")
        return folder / "case"

    def expect(self, reader: str, file: str) -> dict:
        """What a reader finds in the untouched folders, to which a file of no run is added if it is the one to edit."""
        key = f"{reader} {file}" if file in ADDED else reader
        if key not in self.expected:
            folder = self.copy(file)
            done = self.run(reader, folder)
            if done.returncode:
                raise RuntimeError(f"{reader} of what is whole: {done.stderr.decode()[-2000:]}")
            self.expected[key] = found(reader, folder, done) | {"said": words_of(done)}
            shutil.rmtree(folder.parent)
        return self.expected[key]

    def try_case(self, case: Case) -> Ending:
        expected, folder = self.expect(case.reader, case.file), self.copy(case.file)
        try:
            other = self.base / "eval" / Path(case.file).name
            edits.apply(folder / case.file, case.edit, random.Random(case.seed), case.unsealed, other)
            done = self.run(case.reader, folder)
            return judged(case, expected, found(case.reader, folder, done), done)
        except subprocess.TimeoutExpired:
            return Ending("hang", f"no end after {LONGEST} s")
        finally:
            shutil.rmtree(folder.parent)


def forked(command: list[str], folder: Path, environment: dict[str, str]) -> subprocess.CompletedProcess:
    """A script in a fork of this process, which has imported what it needs; at its end it prints the card, too."""
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        sys.stdout.flush()
        process = os.fork()
        if process == 0:
            code = 1
            try:
                os.setsid()
                os.chdir(folder)
                os.environ |= environment
                streams = (os.open(os.devnull, os.O_RDONLY), output.fileno(), errors.fileno())
                for number, stream in enumerate(streams):
                    os.dup2(stream, number)
                sys.argv = command
                run_as_script(Path(command[0]))
                code = 0
            except SystemExit as end:
                code = end.code if isinstance(end.code, int) else end.code is not None
                print(end.code if isinstance(end.code, str) else "", file=sys.stderr)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        begun, status = time.monotonic(), None
        while status is None:
            ended, found_status = os.waitpid(process, os.WNOHANG)
            if ended:
                status = os.waitstatus_to_exitcode(found_status)
            elif time.monotonic() - begun > LONGEST:
                os.killpg(process, signal.SIGKILL)
                os.waitpid(process, 0)
                raise subprocess.TimeoutExpired(command, LONGEST)
            else:
                time.sleep(0.01)
        output.seek(0)
        errors.seek(0)
        return subprocess.CompletedProcess(command, status, output.read(), errors.read())


def run_as_script(path: Path) -> None:
    """What `python PATH` does; scripts/publish.py prints the card that it would write, instead of the files."""
    if path.stem == "publish":
        publish = runpy.run_path(str(path))
        draft = publish["draft_card"]
        publish["main"].__globals__.update(draft_card=lambda *arguments: shown(draft(*arguments)))
        run_script(publish["main"], interrupted="")
    else:
        runpy.run_path(str(path), run_name="__main__")


def shown(card: str) -> str:
    print(card)
    return card


def found(reader: str, folder: Path, done: subprocess.CompletedProcess) -> dict:
    """The results of a script: what it prints, and the numbers and pages that it writes."""
    if done.returncode:
        return {}
    printed = "\n".join(line.strip() for line in done.stdout.decode().splitlines())
    # sizes of files are another where the file is
    results = {
        "printed": re.sub(
            r".*\d of \d+ answers of .*|\W*[\w./-]+[ │]+[\d.,]+\W*$|\d+ files, .*", "", printed, flags=re.MULTILINE
        )
    }
    if reader in ("continue", "tune"):
        run = json.loads((folder / ("new" if reader == "tune" else "run") / "run.json").read_bytes())
        return {name: run["result"][name] for name in ("steps", "train_loss", "tokens_seen")}
    output = folder / ("new" if reader in ("ask", "recorded") else "eval")
    metrics = output / "metrics.json"
    if reader != "card" and metrics.is_file():
        content = json.loads(metrics.read_bytes())
        results |= {name: content.get(name) for name in ("splits", "other_models", "judge", "comparisons")}
    if reader in ("report", "score", "judge", "resume"):
        results["page"] = (output / "report.html").read_text(encoding="utf-8")
    return results


def words_of(done: subprocess.CompletedProcess) -> set[str]:
    return set((done.stderr + b"\n" + done.stdout).decode(errors="replace").splitlines())


def judged(case: Case, expected: dict, results: dict, done: subprocess.CompletedProcess) -> Ending:
    """How a case has ended."""
    said = done.stderr.decode(errors="replace")
    if "Traceback (most recent call last)" in said or done.returncode not in (0, 1):
        return Ending("traceback", f"{done.returncode}: {said.strip()[-700:]}")
    name = Path(case.file).name
    names = (name, Path(case.file).parent.as_posix(), "'run'")
    if done.returncode:
        message = said[said.rfind("error: ") :].strip()
        is_clear = "error: " in said and any(each in message for each in names) and len(message.splitlines()) <= 12
        return Ending("refused" if is_clear else "unclear", message or said[-700:])
    told = [line for line in words_of(done) - expected["said"] if name in line and not line.startswith(("│", "┃"))]
    if told:
        return Ending("told", sorted(told)[0])
    if results == {key: expected[key] for key in expected if key != "said"}:
        return Ending("same")
    if (case.file, case.edit) == ("run/run.json", "removed"):
        return Ending("without")  # nothing tells that there was a run: no loss curve, no settings of its data
    if case.reader == "recorded":
        return Ending("taken")  # as a file of records and answers, which may hold any
    differ = [key for key in results if results[key] != expected.get(key)]
    return Ending("silent", f"other {', '.join(differ)}")


def draw_case(draw: random.Random, readers: dict[str, tuple[str, ...]]) -> Case:
    """A case; scripts that train take long, and get one of the others' three."""
    pairs = {(file, reader): 1 if reader in TRAINING else 3 for file in readers for reader in readers[file]}
    [(file, reader)] = draw.choices([*pairs], [*pairs.values()])
    edit = draw.choice([edit for edit in edits.possible(file) if file not in ADDED or edit not in edits.PLACES])
    return Case(file, edit, reader, draw.randrange(2**32), file in SEALED and draw.random() < 0.5)


@contextmanager
def workplace():
    """A `Workplace` with its untouched folders, and with a judge that can be asked."""
    replies = {"": [Say(lambda prompt: '{"winner": "A"}' if "Response B" in prompt else str(len(prompt) % 100))]}
    with tempfile.TemporaryDirectory() as root, serve_stub(replies) as stub:
        place = Workplace(Path(root), f"{stub.url}#judge")
        place.make()
        yield place


def try_cases(place: Workplace, cases: list[Case], tell=lambda case, ending: None) -> list[tuple[Case, Ending]]:
    """Each case with its ending."""
    tried = []
    for case in cases:
        tried.append((case, place.try_case(case)))
        tell(*tried[-1])
    return tried


def summary(tried: list[tuple[Case, Ending]], arguments: argparse.Namespace) -> dict:
    by_file: dict[str, Counter] = {}
    for case, ending in tried:
        by_file.setdefault(case.file, Counter())[ending.how] += 1
    versions = {name: __import__(name).__version__ for name in ("torch", "transformers", "datasets", "safetensors")}
    return {
        "command": shlex.join(["python", "tests/chaos/fuzz_outputs.py", *sys.argv[1:]]),
        "seeds": arguments.seeds,
        "versions": {"python": platform.python_version(), **versions},
        "cases": len(tried),
        "endings": dict(Counter(ending.how for _, ending in tried)),
        "files": {file: dict(by_file[file]) for file in sorted(by_file)},
        "bad": [{**asdict(case), **asdict(ending)} for case, ending in tried if ending.how in BAD],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=1000, help="of each seed")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--only", default="", help="files whose name has this part")
    parser.add_argument("--readers", nargs="+", default=None)
    parser.add_argument("--verbose", action="store_true")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    readers = {
        file: tuple(name for name in names if arguments.readers is None or name in arguments.readers)
        for file, names in READERS.items()
        if arguments.only in file
    }
    readers = {file: names for file, names in readers.items() if names}

    def tell(case: Case, ending: Ending) -> None:
        if arguments.verbose:
            print(f"{ending.how}: {case.file}, {case.edit}, {case.reader}: {ending.said}", flush=True)
        if ending.how in BAD:
            print(f"{ending.how}: {case}\n    {ending.said}", flush=True)

    with workplace() as place:
        tried = []
        for seed in arguments.seeds:
            draw = random.Random(seed)
            tried += try_cases(place, [draw_case(draw, readers) for _ in range(arguments.cases)], tell)
            found = summary(tried, arguments)
            print(seed, found["cases"], found["endings"], flush=True)
            if arguments.output:
                arguments.output.parent.mkdir(parents=True, exist_ok=True)
                arguments.output.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    sys.exit(bool(found["bad"]))


if __name__ == "__main__":
    main()
