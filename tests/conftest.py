"""Shared pieces of the tests: no network, one thread a process, real input where it lies beside the repository."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # two test processes share two cores
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_TOKEN"] = os.environ["HUGGING_FACE_HUB_TOKEN"] = ""  # whoever runs the tests may be logged in
os.environ["HF_TOKEN_PATH"] = os.path.join(os.path.dirname(__file__), "no-token")

import importlib.util
import json
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it; some tests send it

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "recipe" / "demo"
SHARED = ROOT.parent / "shared"
OPTIONAL = ("trl", "lm_eval", "onnx", "onnxruntime", "tensorboard", "trackio", "wandb")  # extras interop and trackers


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if missing := [name for name in OPTIONAL if importlib.util.find_spec(name) is None]:
        terminalreporter.write_line(f"without tests of {', '.join(missing)}: `make test-all` installs and tests them")


@pytest.fixture(scope="session")
def demo_tokenizer() -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(DEMO / "base")


@pytest.fixture
def demo_model() -> PreTrainedModel:
    """The demo's base model in float32, in training mode without dropout."""
    return AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32).train()


@pytest.fixture(scope="session")
def real_data() -> Path:
    path = SHARED / "data" / "instruction-data.json"
    if not path.is_file():
        pytest.skip(f"the real records are not at {path}; the demo's records are tested instead")
    return path


@pytest.fixture(scope="session")
def real_records(real_data: Path) -> list[dict[str, str]]:
    return json.loads(real_data.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def real_responses() -> list[dict[str, str]]:
    path = SHARED / "data" / "gpt2-medium-responses.json"
    if not path.is_file():
        pytest.skip(f"the real predictions are not at {path}; made-up ones are tested instead")
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="session")
def gpt2_tokenizer() -> PreTrainedTokenizerBase:
    path = SHARED / "gpt2-tokenizer"
    if not path.is_dir():
        pytest.skip(f"the GPT-2 tokenizer is not at {path}; the demo's tokenizer is tested instead")
    return AutoTokenizer.from_pretrained(path)


@pytest.fixture(scope="session")
def evaluate() -> Callable[..., None]:
    """scripts/eval.py in this process: a call with its flags."""
    spec = importlib.util.spec_from_file_location("eval_script", ROOT / "scripts" / "eval.py")
    script = importlib.util.module_from_spec(spec)
    sys.modules["eval_script"] = script  # its dataclasses look their module up
    spec.loader.exec_module(script)
    return lambda *flags: script.main([str(flag) for flag in flags])


@pytest.fixture
def no_retries(monkeypatch: pytest.MonkeyPatch) -> None:
    """Requests to endpoints are sent once, and nobody waits for the next attempt."""
    monkeypatch.setattr("recipe.evaluation.endpoints.MAX_RETRIES", 0)


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """`datasets` puts a copy in the place of `os.environ` when it uses several processes; others keep the first."""
    environment = os.environ
    yield
    os.environ = environment  # noqa: B003


@pytest.fixture(autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that no test passes by what an earlier run left."""
    import datasets

    path = tmp_path_factory.mktemp("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", path)
    return path
