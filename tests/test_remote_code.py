"""Code that a model's folder brings along is never run, whatever stands on standard input, unless a flag allows it."""

import ast
import io
import json
import runpy
import shutil
import sys

import pytest
import torch
from conftest import DEMO, ROOT
from transformers import AutoModelForCausalLM

from recipe.adapters import base_of, load_adapter
from recipe.config import ModelArguments, UserError
from recipe.model import load_config, load_model, load_tokenizer
from recipe.publishing.card import make_model_card

CODE = """
import pathlib
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast
pathlib.Path({canary!r}).write_text("the code of the folder has run")
class OddConfig(GPT2Config):
    model_type = "odd"
class OddModel(GPT2LMHeadModel):
    config_class = OddConfig
class OddTokenizer(PreTrainedTokenizerFast):
    pass
"""
TINY = ["--max_steps", "1", "--save_strategy", "no", "--eval_strategy", "no", "--report_to", "none", "--use_cpu"]
SAID = "brings code of its own, which loading it would run on this machine"
# every function of the ecosystem that can run a folder's code, and asks on standard input if nothing is said
LOADERS = ("from_pretrained", "from_config", "pipeline")
OF_A_FOLDER = ("AutoConfig", "AutoModelForCausalLM", "AutoTokenizer", "AutoPeftModelForCausalLM", "AutoProcessor")


@pytest.fixture(autouse=True)
def yes_on_standard_input(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    yield
    assert sys.stdin.tell() == 0, "something has asked on standard input"


@pytest.fixture
def canary(tmp_path):
    return tmp_path / "canary"


@pytest.fixture
def folder(tmp_path, canary):
    """A call that makes a folder of the demo's base whose config, model or tokenizer is code of its own."""

    def make(*parts: str):
        path = tmp_path / "_".join(parts)
        shutil.copytree(DEMO / "base", path)
        (path / "odd.py").write_text(CODE.format(canary=str(canary)))
        config, tokenizer = (json.loads((path / name).read_text()) for name in ("config.json", "tokenizer_config.json"))
        if "config" in parts:
            config |= {"model_type": "odd", "auto_map": {"AutoConfig": "odd.OddConfig"}}
            config["auto_map"]["AutoModelForCausalLM"] = "odd.OddModel"
        if "tokenizer" in parts:
            tokenizer |= {"tokenizer_class": "OddTokenizer", "auto_map": {"AutoTokenizer": [None, "odd.OddTokenizer"]}}
        (path / "config.json").write_text(json.dumps(config))
        if "alone" in parts:  # else transformers has a class of its own for this kind of model, and takes it
            (path / "config.json").unlink()
        (path / "tokenizer_config.json").write_text(json.dumps(tokenizer))
        return path

    return make


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.jsonl"
    lines = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:20]
    path.write_text("\n".join(lines), encoding="utf-8")
    return str(path)


@pytest.fixture(scope="module")
def train():
    return runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]


def test_neither_model_nor_tokenizer_nor_config_is_run(folder, canary, demo_tokenizer):
    odd, cut, both = (str(folder(*parts)) for parts in (["config"], ["tokenizer", "alone"], ["config", "tokenizer"]))
    with pytest.raises(UserError, match=f"model '{odd}': it {SAID}"):
        load_config(ModelArguments(odd), demo_tokenizer)
    with pytest.raises(UserError, match=f"model '{odd}': it {SAID}.* add --trust_remote_code true"):
        load_model(ModelArguments(odd), demo_tokenizer)
    with pytest.raises(UserError, match=f"tokenizer '{cut}': it {SAID}"):
        load_tokenizer(ModelArguments(cut))
    with pytest.raises(UserError, match=f"tokenizer '{both}': it {SAID}"):
        load_tokenizer(ModelArguments(both))
    assert type(load_tokenizer(ModelArguments(str(folder("tokenizer"))))).__module__.startswith("transformers.")
    assert not canary.exists()


def test_the_base_of_an_adapter_is_not_run(folder, canary, tmp_path, demo_tokenizer):
    base, adapter = folder("config"), tmp_path / "adapter"
    shutil.copytree(DEMO / "base", adapter)
    about = {"base_model_name_or_path": str(base), "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 1}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError):
        load_model(ModelArguments(str(adapter)), demo_tokenizer)
    (adapter / "config.json").unlink()
    alone = ModelArguments(str(adapter))
    with pytest.raises(UserError, match="is an adapter, not a whole model"):
        load_model(alone, demo_tokenizer)
    (adapter / "model.safetensors").rename(adapter / "adapter_model.safetensors")
    with pytest.raises(UserError, match=f"belongs to the model '{base}': .*{SAID}"):
        load_adapter(alone, base_of(str(adapter)), demo_tokenizer)
    (adapter / "adapter_config.json").write_text(json.dumps(about | {"megatron_config": {}, "megatron_core": "canary"}))
    assert base_of(str(adapter)) is not None  # nothing to import for
    about |= {"megatron_config": {"x": 1}, "megatron_core": "canary"}
    (adapter / "adapter_config.json").write_text(json.dumps(about))
    with pytest.raises(UserError, match="PEFT would import a module that this file names"):
        base_of(str(adapter))
    assert not canary.exists()


def test_training_and_evaluation_run_none(folder, canary, records, tmp_path, train, evaluate):
    odd, cut, base = str(folder("config")), str(folder("tokenizer", "alone")), str(DEMO / "base")
    both = str(folder("config", "tokenizer"))
    out = str(tmp_path / "out")
    shared = ["--data", records, "--output_dir", out, *TINY]
    for flags in (["--model_name_or_path", odd], ["--model_name_or_path", base, "--tokenizer_name", cut]):
        with pytest.raises(UserError, match=SAID):
            train([*flags, *shared])
    for flags in (["--model", odd], ["--model", both], ["--model", base, "--baseline", odd], ["--model", base, both]):
        with pytest.raises(UserError, match=SAID):
            evaluate(*flags, "--data", records, "--output_dir", out, "--split", "all", "--stages", "generate")
    assert not canary.exists()


def test_the_flag_allows_it_and_is_recorded(folder, canary, records, tmp_path, train, evaluate):
    odd, out = str(folder("config")), tmp_path / "out"
    flags = ["--data", records, "--trust_remote_code", "true"]
    train(["--model_name_or_path", odd, "--output_dir", str(out), *flags, *TINY])
    assert canary.exists()
    run = json.loads((out / "run.json").read_text())
    assert run["config"]["model"]["trust_remote_code"] is True
    card = make_model_card(out, run)
    assert "started with `--trust_remote_code`" in card and str(tmp_path) not in card
    evaluate("--model", odd, *flags, "--split", "all", "--stages", "generate", "--output_dir", out / "eval",
             "--max_new_tokens", 1)  # fmt: skip
    assert json.loads((out / "eval" / "evaluation.json").read_text())["trust_remote_code"] is True
    assert isinstance(AutoModelForCausalLM.from_pretrained(DEMO / "base", trust_remote_code=False), torch.nn.Module)


@pytest.mark.parametrize("place", ["recipe", "scripts", "examples", "benchmarks"])
def test_every_loader_says_whether_code_may_run(place):
    """In the source: no call of a loader leaves it open."""
    for path in (ROOT / place).rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not isinstance(call, ast.Call):
                continue
            name = ast.unparse(call.func)
            if name.rpartition(".")[2] not in LOADERS or name.rpartition(".")[0] not in (
                *OF_A_FOLDER,
                "transformers",
                "",
            ):
                continue
            words = [keyword.arg or ast.unparse(keyword.value) for keyword in call.keywords]
            assert {"trust_remote_code", "_code(config)"} & {*words}, f"{path} line {call.lineno}"
