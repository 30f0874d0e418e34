"""The model card: what it says is what was run and measured, its example runs, and the Hub's library reads it.

`ModelCard.validate` is a remote call: only the Hub itself can say that a card is valid, and these tests cannot. They
hold the card to what of it is known here: `huggingface_hub` parses it into the same results, every field that the
specification of `model-index` requires is there, and identifiers have the form that the Hub asks for.
"""

import copy
import doctest
import json
import math
import os
import re
import shlex
import shutil
import sys
from pathlib import Path

import processes
import pytest
import sacrebleu
import yaml
from conftest import DEMO, ROOT
from huggingface_hub import HfApi, ModelCard, ModelCardData, constants, metadata_load
from huggingface_hub.repocard import metadata_eval_result, metadata_save
from loopback_hub import LoopbackHub, serve_hub
from markdown_it import MarkdownIt
from transformers import AutoModelForCausalLM, AutoTokenizer

import recipe.publishing.card
from recipe.config import UserError
from recipe.evaluation.verdict import MEASURES, verdict
from recipe.files import file_hash, write_sealed
from recipe.generation import generate_responses
from recipe.publishing.card import (
    EXAMPLE,
    SHOWN,
    escape,
    eval_results,
    hub_sources,
    is_hub_id,
    make_model_card,
    public_command,
    read_evaluation,
)
from recipe.templates import load_template


def script(name: str, *arguments: str, cache: Path) -> None:
    done = processes.run(
        [sys.executable, f"scripts/{name}.py", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=170,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache)},
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> tuple[Path, Path]:
    """The folders of a short training run and of its evaluation, as the scripts leave them."""
    folder = tmp_path_factory.mktemp("card")
    sizes = {"train": 40, "validation": 8, "test": 24}
    data = {}
    for split, size in sizes.items():
        lines = (DEMO / "records" / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()[:size]
        data[split] = str(folder / f"{split}.jsonl")
        Path(data[split]).write_text("\n".join(lines), encoding="utf-8")
    script(
        "train", "--model_name_or_path", "recipe/demo/base", "--data", json.dumps(data), "--max_steps", "6",
        "--per_device_train_batch_size", "8", "--gradient_accumulation_steps", "2", "--learning_rate", "2e-3",
        "--eval_strategy", "steps", "--eval_steps", "6", "--num_sample_generations", "0", "--max_length", "64",
        "--save_strategy", "no", "--bf16", "false", "--output_dir", str(folder / "run"), cache=folder / "cache",
    )  # fmt: skip
    script(
        "eval", "--model", str(folder / "run"), "--baseline", "recipe/demo/base", "--max_new_tokens", "16",
        "--output_dir", str(folder / "scores"), cache=folder / "cache",
    )  # fmt: skip
    return folder / "run", folder / "scores"


@pytest.fixture(scope="module")
def run(made) -> dict:
    return json.loads((made[0] / "run.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def metrics(made) -> dict:
    return json.loads((made[1] / "metrics.json").read_text(encoding="utf-8"))


@pytest.fixture
def folder(made, tmp_path) -> Path:
    """A copy of the trained folder."""
    return shutil.copytree(made[0], tmp_path / "demo")


def card_of(folder: Path, run: dict, evaluation: Path | None = None, **options) -> str:
    """The card's text, also written into the folder."""
    scores = read_evaluation(evaluation, folder) if evaluation else None
    card = make_model_card(folder, run, scores, **options)
    (folder / "README.md").write_text(card, encoding="utf-8")
    return card


def parsed(card: str) -> list:
    """The Markdown below the metadata as CommonMark with tables reads it, raw HTML allowed as on the Hub."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").parse(ModelCard(card).text)


def tables(card: str) -> list[list[list[str]]]:
    """Every table: its rows of cells, the head first."""
    found, cell = [], False
    for token in parsed(card):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type in ("th_open", "td_open", "th_close", "td_close"):
            cell = token.type.endswith("open")
        elif token.type == "inline" and cell:
            text = "".join(
                part.content for part in token.children if part.type in ("text", "code_inline", "text_special")
            )
            found[-1][-1].append(text)
    return found


def facts_of(card: str) -> dict[str, str]:
    """All rows of the tables of two columns."""
    return {row[0]: row[1] for table in tables(card) for row in table[1:] if len(row) == 2}


def check_sound(card: str) -> None:
    """Nothing is missing in a way that shows, and nothing shows that should not."""
    body = ModelCard(card).text
    assert not re.search(r"\b(None|nan|undefined|null)\b", body)
    assert "{{" not in body and "{%" not in body and "\n\n\n" not in body
    assert str(Path.home()) not in card or Path.home() == Path("/")
    found = tables(card)
    assert len(found) >= 3 and all(len(table) > 1 for table in found)
    for table in found:
        assert {len(row) for row in table} == {len(table[0])}
        assert all(cell for row in table[1:] for cell in row[:1]), table
    headings = [token.tag for token in parsed(card) if token.type == "heading_open"]
    assert headings.count("h1") == 1 and headings.count("h2") >= 6


# --- what it says -----------------------------------------------------------------------------------------------------


def test_it_says_what_was_run(folder, made, run):
    card = card_of(folder, run, made[1], license="apache-2.0", language=["en"])
    check_sound(card)
    said = facts_of(card)
    parameters = AutoModelForCausalLM.from_pretrained(folder).num_parameters()
    assert said["parameters"] == f"{parameters:,}"
    assert said["base model"] == "the weights of the local folder recipe/demo/base"
    assert said["training data"] == "train: …/train.jsonl, validation: …/validation.jsonl, test: …/test.jsonl"
    assert said["licence"] == "apache-2.0" and said["language"] == "en"
    assert said["steps"] == "6" and said["effective batch"] == "16 records (8 × 2 accumulated × 1 process)"
    assert said["learning rate"].startswith("0.002, ")
    assert "weight decay" in said["optimizer"] and "β₁ 0.9" in said["optimizer"]
    assert said["precision"] == "weights in float32" and said["loss over"] == "the response"
    assert said["length limit"] == "64 tokens (truncate)" and said["seed"].startswith("42, ")
    assert said["validation loss"].startswith(f"{run['result']['eval']['eval_loss']:.4f} nats")
    assert all(f"{name} {version}" in said["versions"] for name, version in run["versions"].items())
    assert said["hardware"] == run["hardware"]
    [splits] = [table for table in tables(card) if table[0][0] == "split"]
    assert [row[:2] for row in splits[1:]] == [["train", "40"], ["validation", "8"], ["test", "24"]]
    assert [row[2] for row in splits[1:]] == [f"{split['tokens']:,}" for split in run["splits"].values()]
    assert "![Training and validation loss over optimizer steps](loss.png)" in card
    assert run["data_hash"] in card
    assert run["hub"] == {"base": False, "base_commit": None, "data": []}
    assert "Cite the base model and the data" in card and "Weights not checked" not in card


def test_the_scores_are_those_of_the_evaluation(folder, made, run, metrics):
    card = card_of(folder, run, made[1])
    [table] = [table for table in tables(card) if table[0][0] == "score"]
    rows = {row[0].split(" (")[0]: row[1:] for row in table[1:]}
    part = metrics["splits"]["test"]
    scores = {
        name: score for name, score in {**part["metrics"], **part["behaviour"]}.items() if score["tuned"] is not None
    }
    assert rows.keys() == {MEASURES[name].title for name in scores}

    def number(cell: str) -> float:
        return float(cell.removesuffix(" %").replace("−", "-").replace(",", ""))

    for name, score in scores.items():
        base, tuned, change, interval, _, records = rows[MEASURES[name].title]
        factor, tolerance = (100, 0.051) if "%" in tuned else (1, 0.0051)
        wanted = [factor * score[key] for key in ("baseline", "tuned", "delta")]
        assert [number(base), number(tuned), number(change)] == pytest.approx(wanted, abs=tolerance)
        if score["ci95"] is None:
            assert interval == "–"
        else:
            bounds = [factor * bound for bound in score["ci95"]]
            assert [number(cell) for cell in interval.split(" to ")] == pytest.approx(bounds, abs=tolerance)
        assert records == str(score["n"])
    assert escape(verdict(metrics).sentence) in card
    assert "\n- Only 24 test records: intervals over so few are rough" in card


def test_three_good_and_three_bad_examples_are_chosen_by_chrf(folder, made, run):
    card = card_of(folder, run, made[1])
    rows = [json.loads(line) for line in (made[1] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    chrf = [sacrebleu.sentence_chrf(row["tuned"]["text"], [row["output"]]).score for row in rows]
    order = sorted(range(len(rows)), key=lambda index: -round(chrf[index], 6))
    last = sorted(range(len(rows)), key=lambda index: round(chrf[index], 6))
    chosen = order[:SHOWN] + last[:SHOWN]
    assert len(set(chosen)) == 2 * SHOWN
    blocks = [token.content for token in parsed(card) if token.type == "fence" and "\nreference" in token.content]
    shown = re.findall(r"^\*\*(test/\d+)\*\* \(chrF: base [\d.]+ %, tuned ([\d.]+) %\)$", card, re.MULTILINE)
    assert [id_ for id_, _ in shown] == [rows[i]["id"] for i in chosen]
    assert [float(score) for *_, score in shown] == pytest.approx([chrf[i] for i in chosen], abs=0.051)
    for index, block in zip(chosen, blocks, strict=True):
        words = " ".join(block.split())
        for text in (rows[index]["instruction"], rows[index]["output"], rows[index]["baseline"]["text"][:80]):
            assert " ".join(text.split()) in words


# --- its example ------------------------------------------------------------------------------------------------------


def example_in(card: str) -> str:
    [block] = [token.content for token in parsed(card) if token.type == "fence" and token.info == "python"]
    return block


def execute(code: str, cwd: Path, **environment: str) -> str:
    done = processes.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_its_example_answers_from_the_folder_and_from_the_hub(folder, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    local = example_in(card_of(Path("demo"), run))
    assert 'model="demo"' in local
    hub = example_in(card_of(Path("demo"), run, repo_id="someone/answers"))
    assert 'model="someone/answers"' in hub

    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    prompts = load_template("alpaca").prompts([{"instruction": "Which animal is bigger: a horse or a mouse?"}, EXAMPLE])
    cap = model.generation_config.max_new_tokens
    expected = "".join(
        f"{response.text}\n" for prompt in prompts for response in generate_responses(model, tokenizer, [prompt], cap)
    )
    assert execute(local, cwd=tmp_path) == expected
    with serve_hub({"models/someone/answers": folder}) as endpoint:
        answered = execute(
            hub, cwd=ROOT, HF_ENDPOINT=endpoint, HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1",
            HF_HOME=str(tmp_path / "home"),
        )  # fmt: skip
    assert answered == expected
    [shown] = [
        token.content for token in parsed(card_of(folder, run)) if token.type == "fence" and token.info == "text"
    ]
    assert shown == prompts[1] + "\n"


def test_an_adapter_says_so_and_its_example_runs(folder, run, tmp_path, monkeypatch):
    from peft import LoraConfig, get_peft_model

    base = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype="float32")
    adapted = get_peft_model(base, LoraConfig(r=4, lora_alpha=8, target_modules=["c_attn"], fan_in_fan_out=True))
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    adapted.save_pretrained(folder)
    monkeypatch.chdir(tmp_path)
    card = card_of(Path("demo"), run)
    check_sound(card)
    count = sum(weight.numel() for name, weight in adapted.named_parameters() if "lora_" in name)
    said = facts_of(card)
    assert said["parameters"] == f"{count:,} in the adapter" and "This folder holds a PEFT adapter" in card
    assert metadata_load(folder / "README.md")["library_name"] == "peft"
    model, tokenizer = adapted.merge_and_unload(), AutoTokenizer.from_pretrained(folder)
    prompts = load_template("alpaca").prompts([{"instruction": "Which animal is bigger: a horse or a mouse?"}, EXAMPLE])
    responses = [generate_responses(model, tokenizer, [prompt], max_new_tokens=128)[0].text for prompt in prompts]
    assert execute(example_in(card), cwd=tmp_path) == "".join(f"{text}\n" for text in responses)


# --- its metadata -----------------------------------------------------------------------------------------------------


def test_huggingface_hub_reads_its_metadata(folder, made, run, metrics):
    card_of(folder, run, made[1], repo_id="someone/answers", license="mit", language=["en", "no"])
    card = ModelCard.load(folder / "README.md")
    assert card.data.eval_results == _without_none(eval_results(metrics))
    assert card.data.model_name == "answers"
    data = metadata_load(folder / "README.md")
    assert data["license"] == "mit" and data["language"] == ["en", "no"]
    assert data["library_name"] == "transformers" and data["pipeline_tag"] == "text-generation"
    assert "base_model" not in data and "datasets" not in data  # they are not on the Hub

    for result in data["model-index"][0]["results"]:
        assert result["task"]["type"] == data["pipeline_tag"]
        # the Hub's pattern, as it stands in its refusals: "fails to match the required pattern"
        assert re.fullmatch(r"(?:[\w-]+/)?[\w.-]+", result["dataset"]["type"]) and result["dataset"]["name"]
        for metric in result["metrics"]:
            assert metric["type"] in MEASURES and math.isfinite(metric["value"]) and metric["args"]["n"] == 24

    before = (folder / "README.md").read_text(encoding="utf-8")
    metadata_save(folder / "README.md", data)  # what the library's own tools do to a card
    assert ModelCard.load(folder / "README.md").text == ModelCard(before).text
    more = metadata_eval_result(
        model_pretty_name="answers", task_pretty_name="x", task_id="text-generation", metrics_pretty_name="x",
        metrics_id="x", metrics_value=1, dataset_pretty_name="x", dataset_id="x",
    )  # fmt: skip
    assert more["model-index"][0].keys() == data["model-index"][0].keys()


def _without_none(results: list) -> list:
    """As YAML brings them back: it has no keys for what is None."""
    for result in results:
        result.metric_args = {key: value for key, value in result.metric_args.items() if value is not None}
    return results


SCORE = {"baseline": 0.1, "tuned": 0.8, "delta": 0.7, "ci95": [0.6, 0.75], "better": "higher", "n": 100}
METRICS = {
    "splits": {
        "test": {
            "metrics": {"exact_match": SCORE, "perplexity": {**SCORE, "tuned": None}},
            "behaviour": {"stop_rate": None},
        },
        "unseen": {"metrics": {"chrf": {**SCORE, "baseline": None, "delta": None}}, "behaviour": {}},
    },
    "provenance": {"data": {"test": "a.jsonl"}, "models": {"tuned": {"name": "outputs/demo"}}},
}


def test_scores_with_intervals_come_back_from_the_cards_metadata():
    data = ModelCardData(model_name="demo", eval_results=eval_results(METRICS))
    results = ModelCardData(**yaml.safe_load(data.to_yaml())).eval_results
    assert [(r.dataset_split, r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("test", "exact_match", "Exact match", 0.8), ("unseen", "chrf", "chrF", 0.8),
    ]  # fmt: skip
    assert results[0].metric_args == {"n": 100, "baseline": 0.1, "delta": 0.7, "ci95": [0.6, 0.75], "ci95_of": "delta"}
    assert results[1].metric_args["ci95_of"] == "tuned"


def test_ids_on_the_hub_are_named_in_the_metadata(folder, run, tmp_path, monkeypatch):
    changed = copy.deepcopy(run)
    changed["config"]["model"] |= {"model_name_or_path": "openai-community/gpt2", "model_revision": "v1|2"}
    changed["config"]["data"]["data"] = ["tatsu-lab/alpaca"]
    changed["weights_from"] = "openai-community/gpt2"
    changed["hub"] = {"base": True, "base_commit": "0123abc", "data": ["tatsu-lab/alpaca"]}
    monkeypatch.chdir(tmp_path)
    for name in ("openai-community/gpt2", "tatsu-lab/alpaca"):  # folders of these names come too late
        Path(name).mkdir(parents=True)
    card = card_of(folder, changed)
    check_sound(card)
    data = metadata_load(folder / "README.md")
    assert data["base_model"] == "openai-community/gpt2" and data["base_model_relation"] == "finetune"
    assert data["datasets"] == ["tatsu-lab/alpaca"]
    assert "| base model | openai-community/gpt2, revision v1\\|2, commit 0123abc |" in card  # \\| is | in a cell
    assert "| training data | tatsu-lab/alpaca |" in card


def test_what_is_an_id_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert is_hub_id("gpt2") and is_hub_id("openai-community/gpt2") and is_hub_id("Qwen/Qwen2.5-0.5B")
    for source in (
        None, "", ["a/b"], {"train": "a"}, "a.jsonl", "data/a.csv", "data/*.json", "a/b/c", "./a", "/a", "~/a", "a" * 99
    ):  # fmt: skip
        assert not is_hub_id(source), source
    (tmp_path / "outputs" / "demo").mkdir(parents=True)
    assert not is_hub_id("outputs/demo")


# --- runs of all kinds ------------------------------------------------------------------------------------------------


def changed_by(run: dict, **values) -> dict:
    """A copy of a run with values at dotted paths: `config__data__data="x"`."""
    changed = copy.deepcopy(run)
    for path, value in values.items():
        *parents, name = path.split("__")
        place = changed
        for parent in parents:
            place = place[parent]
        place[name] = value
    return changed


KINDS = {
    "random weights": (
        {"config__model__model_name_or_path": None, "weights_from": "random weights (gpt2)"},
        ["trained from random weights to answer", "| base model | none: random weights (gpt2) |"],
    ),
    "no validation": ({"result__eval": None}, ["| seed | 42, of the split 123 |\n| versions |"]),
    "one file": (
        {"config__data__data": "/home/someone/instruction-data.json"}, ["| training data | …/instruction-data.json |"],
    ),
    "files and globs": ({"config__data__data": ["a|b.json", "x/*.json"]}, [r"a\|b.json, x/\*.json |"]),
    "token budget": (
        {"config__training__max_tokens_per_batch": 4096, "processes": 2},
        ["| up to 16,384 input tokens (4,096 × 2 accumulated × 2 processes) |", "accelerate launch --num_processes 2 "],
    ),
    "mixed precision": ({"ran__mixed_precision": "bf16"}, ["| weights in float32, mixed bf16 |"]),
    "a run before it said what ran": (
        {"ran": None, "config__training__bf16": True}, ["| weights in float32, mixed bf16 |"],
    ),
    "long records": (
        {"rows": {"truncated": 1234, "dropped": 5, "left_out_of_train_as_duplicates": 6}},
        ["- 1,234 records were cut at 64 tokens", "- 5 records longer than 64", "- 6 training records were also"],
    ),
    "no limit": ({"config__data__max_length": None}, ["| length limit | the tokenizer's limit"]),
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_run_gives_a_sound_card(folder, run, kind):
    values, wanted = KINDS[kind]
    card = card_of(folder, changed_by(run, **values))
    check_sound(card)
    for text in wanted:
        assert text in card
    assert "It was not evaluated: this card holds no scores" in card and "/home/" not in card
    assert "model-index" not in metadata_load(folder / "README.md")
    assert "| licence | not stated |" in card and "| language | not stated |" in card


def test_an_evaluation_without_baseline_on_seen_records(folder, made, run, tmp_path):
    """Answers of one model to the records it learned from, few of them, scored by the very functions of eval.py."""
    from recipe.evaluation.comparison import compare

    scores = shutil.copytree(made[1], tmp_path / "scores")
    rows = [json.loads(line) for line in (scores / "predictions.jsonl").read_text(encoding="utf-8").splitlines()][:5]
    rows = [{k: v for k, v in row.items() if k not in ("baseline", "family")} | {"split": "train"} for row in rows]
    provenance = json.loads((scores / "metrics.json").read_text(encoding="utf-8"))["provenance"]
    del provenance["models"]["baseline"]
    provenance["data"] = "/home/someone/others.json"
    rewrite(
        scores, rows, {"splits": {"train": compare(rows)}, "judge": None, "other_models": {}, "provenance": provenance}
    )
    card = card_of(folder, run, scores)
    check_sound(card)
    [table] = [table for table in tables(card) if table[0][0] == "score"]
    assert table[0] == ["score", "tuned", "95 % interval", "n"]
    assert "There is no base model to compare with." in card and "there is no baseline." in card
    assert "Scores on `train` are on records that it may have learned from." in card
    assert "The records are not those of training: …/others.json." in card
    best, worst = card.split("### Best")[1].split("### Worst")
    assert best.count("```text") == 3 and worst.split("## Training")[0].count("```text") == 2  # none is both


def rewrite(scores: Path, rows: list[dict], metrics: dict) -> None:
    (scores / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    provenance = metrics["provenance"] | {"predictions_hash": file_hash(scores / "predictions.jsonl")}
    write_sealed(scores / "metrics.json", {**metrics, "provenance": provenance})


def test_a_judges_scores_are_in_the_card(folder, made, run, metrics, tmp_path):
    scores = shutil.copytree(made[1], tmp_path / "scores")
    judged = copy.deepcopy(metrics)
    judged["judge"] = {
        "model": "judge|7b", "error": None, "complete": True, "labels": ["baseline", "tuned"], "answers": "",
        "scores": {"grade": {
            "scale": [0, 100], "n": 24, "scored": {"baseline": 24, "tuned": 24}, "empty": {}, "missing": {},
            "baseline": 10.0, "tuned": 61.25, "delta": 51.25, "ci95": [40.0, 60.0], "p": 1e-7, "other_models": {},
            "bounds": {"baseline": [10.0, 10.0], "tuned": [61.25, 61.25]},
        }},
        "pairwise": {
            "n": 24, "judged": 24, "decided": 4, "win": 20, "tie": 2, "loss": 2, "flips": 1, "flip_rate": 0.05,
            "win_rate": 0.875, "ci95": [0.75, 0.975], "bounds": [0.875, 0.875], "missing": {},
        },
    }  # fmt: skip
    write_sealed(scores / "metrics.json", judged)
    card = card_of(folder, run, scores)
    check_sound(card)
    assert "### Judged by judge\\|7b" in card
    [table] = [table for table in tables(card) if table[0][0] == "prompt"]
    assert table[1] == ["grade", "0 to 100", "10.0", "61.2", "+51.2", "+40.0 to +60.0", "better"]
    assert "Win rate 87.5 % (95 % interval 75.0 % to 97.5 %)" in card


# --- what must not happen ---------------------------------------------------------------------------------------------

HOSTILE = [
    "```\n# A heading\n<script>alert(1)</script>\n````\n| a | b |\n| - | - |\n---\nlicense: evil\n---",
    "<img src=x onerror=alert(1)> [link](javascript:alert(1)) {{ run }} {% raw %} ~~~",
    "half a pair \ud800, a bell \x07, a command \x1b[31m, the other way \u202e, another line \u2028 and\r\none",
    "line\n" * 500,
    "x" * 5000,
    "",
]


def test_hostile_texts_stay_texts(folder, made, run, metrics, tmp_path):
    scores = shutil.copytree(made[1], tmp_path / "scores")
    rows = [json.loads(line) for line in (scores / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    for index, row in enumerate(rows):
        row["tuned"]["text"] = row["baseline"]["text"] = HOSTILE[index % len(HOSTILE)]
        row["instruction"] = HOSTILE[(index + 1) % len(HOSTILE)] or "-"
        row["family"] = "<b>|`*[x](y)\n# no"
    rewrite(scores, rows, metrics)
    plain = card_of(folder, run, made[1])
    card = card_of(folder, run, scores)
    assert [t.tag for t in parsed(card) if t.type == "heading_open"] == [
        t.tag for t in parsed(plain) if t.type == "heading_open"
    ]
    assert len(tables(card)) == len(tables(plain))
    assert not [token for token in parsed(card) if "html" in token.type]
    assert not [part for t in parsed(card) for part in t.children or () if part.type in ("html_inline", "link_open")]
    blocks = [token.content for token in parsed(card) if token.type == "fence" and "\nreference" in token.content]
    assert len(blocks) == 2 * SHOWN and max(map(len, blocks)) < 4000
    assert not re.search("[\x00-\x08\x0b-\x1f\u2028\u202e]", card)
    assert "xxx..." in card and "(empty)" in card
    assert metadata_load(folder / "README.md") == yaml.safe_load(plain.split("---\n")[1])


def test_a_folder_with_a_strange_name(made, run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = 'a "b" <i>|`c'
    shutil.copytree(made[0], tmp_path / name)
    card = card_of(Path(name), run, made[1])
    check_sound(card)
    [title] = re.findall(r"^# (.*)$", card.split("## How")[0], re.MULTILINE)
    assert MarkdownIt().renderInline(title) == "a &quot;b&quot; &lt;i&gt;|`c"
    assert json.loads(re.search(r"model=(.*)\)", example_in(card))[1]) == name
    assert metadata_load(tmp_path / name / "README.md")["model-index"][0]["name"] == name


def test_paths_of_this_machine_stay_here(folder, made, run, tmp_path):
    card = card_of(folder, run, made[1])
    assert str(made[0].parent) not in card and str(tmp_path) not in card
    words = [
        "python", "scripts/train.py", "--data", json.dumps({"train": "/home/me/a b.json", "test": f"{ROOT}/c.json"}),
        "--output_dir=/home/me/runs/x", "--template", "/t/u.jinja", "--model", "http://127.0.0.1:1/v1#m",
        "--note", "a/b\nc",
    ]  # fmt: skip
    assert shlex.split(public_command(shlex.join(words))) == [
        "python", "scripts/train.py", "--data", '{"train": "…/a b.json", "test": "…/c.json"}',
        "--output_dir=…/x", "--template", "…/u.jinja", "--model", "http://127.0.0.1:1/v1#m",
        "--note", "a/b\nc",
    ]  # fmt: skip
    assert public_command("python a.py\npython b.py") == "python a.py\npython b.py"


def test_the_commands_are_those_that_were_run(folder, made, run, metrics):
    card = card_of(folder, run, made[1])
    train, evaluate = (token.content for token in parsed(card) if token.type == "fence" and token.info == "bash")
    for shown, command in ((train, run["command"]), (evaluate, metrics["provenance"]["command"])):
        words = shlex.split(shown)
        assert len(words) == len(shlex.split(command))
        assert [word for word in words if word.startswith("--")] == [
            word for word in shlex.split(command) if word.startswith("--")
        ]


def test_evaluations_that_do_not_belong_are_refused(folder, made, metrics, tmp_path):
    scores = shutil.copytree(made[1], tmp_path / "scores")
    rows = (made[1] / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    (scores / "predictions.jsonl").write_text("\n".join(rows[:3]), encoding="utf-8")
    with pytest.raises(UserError, match=r"holds .*'test': 3.* score again"):
        read_evaluation(scores, folder)
    write_sealed(scores / "metrics.json", {})
    with pytest.raises(UserError, match=r"metrics.json: judge is missing; remove it and run the score stage again"):
        read_evaluation(scores, folder)
    (scores / "metrics.json").unlink()
    with pytest.raises(UserError, match=r"scores holds no scores; run the score stage"):
        read_evaluation(scores, folder)


def scored(scores: Path, metrics: dict, name: str, weights: str | None) -> Path:
    """An evaluation of another model of that name."""
    other = copy.deepcopy(metrics)
    other["provenance"]["models"]["tuned"] = {"name": name, "weights": weights}
    write_sealed(scores / "metrics.json", other)
    return scores


@pytest.mark.parametrize(
    ("name", "weights"),
    [("http://127.0.0.1:1/v1#m", None), ("answers.json", "sha256:0123456789abcdef"), ("someone/base", "0123abc")],
)
def test_scores_of_weights_that_cannot_be_checked_say_so(folder, made, run, metrics, tmp_path, name, weights):
    scores = scored(shutil.copytree(made[1], tmp_path / "scores"), metrics, name, weights)
    card = card_of(folder, run, scores)
    check_sound(card)
    assert f"\nWeights not checked: the answers are those of {escape(name)}." in card


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("echo", None, "is of 'echo'"),
        ("runs/x", "sha256:0", r"with other weights \(sha256:0\) than"),
    ],
)
def test_scores_of_other_weights_are_refused(folder, made, metrics, tmp_path, name, weights, message):
    scores = scored(shutil.copytree(made[1], tmp_path / "scores"), metrics, name, weights)
    with pytest.raises(UserError, match=message):
        read_evaluation(scores, folder)


def test_the_commit_of_a_base_on_the_hub_is_found_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with LoopbackHub() as hub:
        hub.add("models/someone/base", DEMO / "base")
        commit = Path(HfApi(endpoint=hub.endpoint).snapshot_download("someone/base", cache_dir=tmp_path / "hub")).name
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    assert hub_sources("someone/base", "a.json", "main")["base_commit"] == commit


def test_doctests():
    failed, tried = doctest.testmod(recipe.publishing.card)
    assert failed == 0 and tried > 0


def test_settings_that_are_off_are_left_out(folder, run):
    off = changed_by(run, config__training__max_grad_norm=0.0, config__training__warmup_steps=0.05)
    card = card_of(folder, off)
    assert "gradients clipped" not in card and "warm-up over the first 5 % of the steps |" in card
    on = card_of(folder, changed_by(run, config__training__max_grad_norm=1.0, config__training__warmup_steps=100))
    assert "gradients clipped at 1 |" in on and "warm-up over 100 steps |" in on
