"""The folder of a training run in the tools people load it with: the code of docs/loads_anywhere.md, run from there."""

import contextlib
import io
import itertools
import json
import os
import re
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import processes
import pytest
import torch
from conftest import DEMO, ROOT
from datasets import Dataset
from serve import serve
from torch.nn import functional
from transformers import AutoModelForCausalLM, AutoTokenizer, pipeline

from recipe.collator import DataCollatorWithSharedPrefix
from recipe.config import DataArguments
from recipe.data import load_splits
from recipe.evaluation.likelihood import reference_losses
from recipe.generation import Response, generate_responses
from recipe.templates import load_template, to_messages

DOC = (ROOT / "docs" / "loads_anywhere.md").read_text(encoding="utf-8")
MAX_NEW_TOKENS = 64
OPTIONAL = "make test-all installs the optional clients"


def blocks(heading: str, language: str) -> list[str]:
    """The code of one language below a heading of the document."""
    [section] = re.findall(rf"^## {heading}\n(.*?)(?=^## |\Z)", DOC, re.DOTALL | re.MULTILINE)
    return re.findall(rf"^```{language}\n(.*?)^```", section, re.DOTALL | re.MULTILINE)


def execute(code: str, outputs: Path, names: dict | None = None) -> dict:
    """Run a block of the document with its folders in `outputs`; its names, and what it printed as `printed`."""
    names, printed = {**(names or {})}, io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(compile(localise(code, outputs), "docs/loads_anywhere.md", "exec"), names)
    return {**names, "printed": printed.getvalue()}


def localise(code: str, outputs: Path) -> str:
    """The document's folders and records are those of the test."""
    return code.replace("outputs/", f"{outputs}/").replace("records.jsonl", f"{outputs}/records.jsonl")


def run(*command: str | Path, outputs: Path) -> subprocess.CompletedProcess:
    environment = {**os.environ, "HF_DATASETS_CACHE": str(outputs / "cache")}
    done = processes.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280, env=environment)
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def load(folder: Path, auto=AutoModelForCausalLM):
    return auto.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)


def answers(model, tokenizer) -> list[Response]:
    return generate_responses(model, tokenizer, PROMPTS, MAX_NEW_TOKENS)


def tokens(responses: list[Response]) -> list[list[int]]:
    return [response.token_ids for response in responses]


with (DEMO / "records" / "test.jsonl").open(encoding="utf-8") as file:
    RECORDS = [json.loads(line) for line in itertools.islice(file, 8)]
PROMPTS = load_template("alpaca").prompts(RECORDS)
WITH_INPUT = [to_messages(record)[0] for record in RECORDS]  # beside the content
INTO_CONTENT = [
    {"role": "user", "content": record["instruction"] + (record["input"] and f"\n\n### Input:\n{record['input']}")}
    for record in RECORDS
]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory) -> Path:
    """A folder of outputs: a short real run of the demo, and eight records for further training."""
    folder = tmp_path_factory.mktemp("outputs")
    run(
        sys.executable, "scripts/train.py", "configs/demo.yaml", "--output_dir", str(folder / "demo"),
        "--max_steps", "60", "--per_device_train_batch_size", "16", "--eval_strategy", "no", outputs=folder,
    )  # fmt: skip
    lines = [json.dumps(record) for record in RECORDS]
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def ours(outputs) -> list[Response]:
    """Our own greedy responses: most of them different and all complete, so that a comparison can fail."""
    responses = answers(*load(outputs / "demo"))
    assert {response.stop_reason for response in responses} == {"eos"}
    assert len({response.text for response in responses}) >= 6
    assert min(len(response.token_ids) for response in responses) >= 4
    assert {bool(record["input"]) for record in RECORDS} == {True, False}
    return responses


@pytest.fixture(scope="module")
def encoded(outputs) -> Dataset:
    """The eight records as tokens."""
    data = DataArguments(data={"train": str(outputs / "records.jsonl")}, validation_ratio=0, test_ratio=0)
    return load_splits(data, AutoTokenizer.from_pretrained(outputs / "demo"))["train"]


def score_by_hand(model, rows: Dataset) -> tuple[float, float]:
    """The mean cross-entropy and accuracy over all supervised tokens of the rows, one row at a time."""
    losses, hits = [], []
    for row in rows:
        targets = torch.tensor(row["labels"][1:])
        with torch.no_grad():
            logits = model(torch.tensor([row["input_ids"][:-1]])).logits[0]
        supervised = targets != -100
        losses.append(functional.cross_entropy(logits[supervised], targets[supervised], reduction="none"))
        hits.append((logits.argmax(-1) == targets)[supervised])
    return torch.cat(losses).mean().item(), torch.cat(hits).float().mean().item()


# --- transformers ---------------------------------------------------------------------------------------------------


def test_pipeline_answers_alone_and_in_a_batch(outputs, ours):
    generator = pipeline("text-generation", model=str(outputs / "demo"), device="cpu")
    eos = generator.tokenizer.eos_token_id
    for messages in (WITH_INPUT, INTO_CONTENT):
        conversations = [[message] for message in messages]
        for batch_size in (1, 8):
            replies = generator(conversations, batch_size=batch_size)
            texts = [reply[0]["generated_text"][-1]["content"] for reply in replies]
            assert texts == [response.text for response in ours]
    for message, prompt, response in zip(WITH_INPUT, PROMPTS, ours, strict=True):
        [alone] = generator([message], return_tensors=True)
        prompt_ids = generator.tokenizer(prompt)["input_ids"]
        assert alone["generated_token_ids"] == [*prompt_ids, *response.token_ids, eos]  # it stops by itself


def test_pipeline_gives_no_warning(outputs, ours):
    [code] = blocks("pipeline", "python")
    done = run(sys.executable, "-c", localise(code, outputs), outputs=outputs)
    assert done.stdout.strip()
    messages = [line for line in re.split(r"[\r\n]+", done.stderr) if line and not line.startswith("Loading weights:")]
    assert messages == []


def test_generate_answers_a_batch(outputs, ours):
    [code] = blocks("generate", "python")
    names = execute(code, outputs)
    assert names["printed"].strip()
    model, tokenizer = names["model"], names["tokenizer"]
    conversations = [[message] for message in WITH_INPUT]
    inputs = tokenizer.apply_chat_template(
        conversations, add_generation_prompt=True, padding=True, return_dict=True, return_tensors="pt"
    )
    generated = model.generate(**inputs)[:, inputs["input_ids"].shape[1] :].tolist()
    assert [row[: row.index(tokenizer.eos_token_id)] for row in generated] == tokens(ours)


def test_transformers_serve_answers_the_openai_client(outputs, ours, tmp_path):
    [code] = blocks("transformers serve", "python")
    assert blocks("transformers serve", "bash") == ["transformers serve --device cpu\n"]  # as `serve` starts it
    with serve(tmp_path / "serve.log") as address:
        names = execute(code.replace("http://127.0.0.1:8000/v1", address), outputs)
        text = names["reply"].choices[0].message.content
        assert names["printed"] == f"{text}\n{text}"  # streamed, the same
        for message, response in zip(INTO_CONTENT, ours, strict=True):
            request = {"model": str(outputs / "demo"), "messages": [message], "temperature": 0, "max_tokens": 64}
            reply = names["client"].chat.completions.create(**request)
            assert reply.choices[0].message.content == response.text
            assert reply.choices[0].finish_reason == "stop"
            assert reply.usage.completion_tokens == len(response.token_ids) + 1  # and the end
            stream = names["client"].chat.completions.create(**request, stream=True)
            assert "".join(chunk.choices[0].delta.content or "" for chunk in stream) == response.text


# --- further training -----------------------------------------------------------------------------------------------


def test_trl_continues_from_the_folder(outputs, ours, encoded):
    pytest.importorskip("trl", reason=OPTIONAL)
    [code] = blocks("TRL", "python")
    for options in ("", ", shift=False"):
        shifting = code.replace("(tokenizer.eos_token_id)", f"(tokenizer.eos_token_id{options})")
        trainer = execute(shifting, outputs)["trainer"]
        log = [entry for entry in trainer.state.log_history if "loss" in entry]
        loss, accuracy = score_by_hand(load(outputs / "demo")[0], encoded)
        assert log[0]["loss"] == pytest.approx(loss, rel=1e-5)
        assert log[0]["mean_token_accuracy"] == pytest.approx(accuracy)
        assert log[-1]["loss"] < log[0]["loss"]
    saved, tokenizer = load(outputs / "trl")
    assert tokens(answers(saved, tokenizer)) == tokens(answers(trainer.model, tokenizer))
    assert score_by_hand(saved, encoded)[0] < loss  # the weights that were trained
    for name in ("chat_template.jinja", "tokenizer.json", "generation_config.json"):
        assert (outputs / "trl" / name).read_bytes() == (outputs / "demo" / name).read_bytes()


def test_trl_stops_at_a_shared_prefix(outputs, ours):
    pytest.importorskip("trl", reason=OPTIONAL)
    [code] = blocks("TRL", "python")
    with pytest.raises(RuntimeError, match="size of tensor"):  # all positions against the supervised ones
        execute(code.replace("DataCollatorForInstructionTuning", DataCollatorWithSharedPrefix.__name__), outputs)


def test_lora_adapter_loads_in_every_way(outputs, ours):
    train, load_adapter = blocks("PEFT", "python")
    trainer = execute(train, outputs)["trainer"]
    loaded = execute(load_adapter, outputs)
    names = {path.name for path in (outputs / "lora").iterdir()}
    assert names >= {"adapter_config.json", "adapter_model.safetensors", "chat_template.jinja", "tokenizer.json"}
    tokenizer = AutoTokenizer.from_pretrained(outputs / "lora")
    expected = tokens(answers(trainer.model, tokenizer))
    assert expected != tokens(ours)  # the adapter does something
    for model in (loaded["adapted"], loaded["plain"], loaded["merged"], load(outputs / "merged")[0]):
        assert tokens(answers(model, tokenizer)) == expected
    generator = pipeline("text-generation", model=str(outputs / "merged"), device="cpu")
    texts = [generator([message])[0]["generated_text"][-1]["content"] for message in WITH_INPUT]
    assert texts == [tokenizer.decode(token_ids) for token_ids in expected]


# --- evaluation and conversion --------------------------------------------------------------------------------------


def test_lm_eval_gives_our_answers_and_likelihoods(outputs, ours):
    pytest.importorskip("lm_eval", reason=OPTIONAL)
    tasks = outputs / "tasks"
    tasks.mkdir()
    for code in blocks("lm-eval", "yaml"):
        name = re.match(r"task: (\w+)\n", code)[1]
        (tasks / f"{name}.yaml").write_text(code, encoding="utf-8")
    [command] = blocks("lm-eval", "bash")
    command = localise(command.replace("--include_path ", "--include_path outputs/").replace("\\\n", ""), outputs)
    program, *arguments = command.split()
    run(Path(sys.executable).with_name(program), *arguments, outputs=outputs)

    samples = {}
    for name in ("answers", "likelihood"):
        [path] = (outputs / "lm_eval").rglob(f"samples_{name}_*.jsonl")
        rows = sorted(map(json.loads, path.read_text(encoding="utf-8").splitlines()), key=lambda row: row["doc_id"])
        samples[name] = rows
        assert [row["doc"]["output"] for row in rows] == [record["output"] for record in RECORDS]
    assert [row["arguments"]["gen_args_0"]["arg_0"] for row in samples["answers"]] == PROMPTS
    assert [row["resps"][0][0] for row in samples["answers"]] == [response.text for response in ours]

    model, tokenizer = load(outputs / "demo")
    references = [f"\n{record['output']}" for record in RECORDS]  # lm-eval takes the newline for part of the response
    expected = reference_losses(model, tokenizer, [prompt.rstrip("\n") for prompt in PROMPTS], references)
    likelihoods = [float(row["resps"][0][0][0]) for row in samples["likelihood"]]
    assert likelihoods == pytest.approx([-nats for nats, _ in expected], rel=1e-4)


@pytest.mark.filterwarnings("ignore")  # of what is inside torch's exporter
def test_onnx_runtime_gives_our_tokens(outputs, ours):
    for package in ("onnx", "onnxscript", "onnxruntime"):
        pytest.importorskip(package, reason=OPTIONAL)
    export, answer = blocks("ONNX", "python")
    execute(export, outputs)
    names = execute(answer, outputs)
    assert names["printed"].strip()
    assert [names["answer"](message, MAX_NEW_TOKENS) for message in WITH_INPUT] == tokens(ours)


# --- the folder itself ----------------------------------------------------------------------------------------------


def test_the_folder_says_what_other_tools_look_for(outputs):
    folder = outputs / "demo"
    config = json.loads((folder / "config.json").read_text())
    generation = json.loads((folder / "generation_config.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert config["architectures"] == ["GPT2LMHeadModel"] and config["use_cache"] is True
    assert config["eos_token_id"] == generation["eos_token_id"] == tokenizer.eos_token_id
    assert config["pad_token_id"] == generation["pad_token_id"] == tokenizer.pad_token_id
    assert generation["do_sample"] is False and generation["max_new_tokens"] == config["n_positions"] // 2
    assert "auto_map" not in config and "_attn_implementation" not in config
    assert tokenizer.model_max_length == config["n_positions"]
    assert (folder / "chat_template.jinja").read_text() == load_template("alpaca").chat_template
    weights = {path.name for path in folder.iterdir() if path.suffix in (".safetensors", ".bin", ".pt", ".pth", ".pkl")}
    assert weights == {"model.safetensors"}


def test_the_folder_pads_on_the_left(outputs):
    assert AutoTokenizer.from_pretrained(outputs / "demo").padding_side == "left"


def test_the_document_names_the_versions_that_were_run():
    names = "transformers|openai|trl|lm_eval|peft|onnx|onnxscript|onnxruntime"
    found = re.findall(rf"\b({names}) (\d+(?:\.\d+)+)", DOC)
    assert {name for name, _ in found} == {*names.split("|")}
    for name, stated in found:
        with contextlib.suppress(PackageNotFoundError):  # an optional client
            assert f"{version(name)}.".startswith(f"{stated}."), f"{name} {stated}"
