"""What the README shows is run."""

import re
from pathlib import Path

import pytest
import torch
from conftest import DEMO, ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_the_collator_example_trains_with_the_stock_trainer(tmp_path, monkeypatch):
    [code] = [block for block in blocks("python") if "Trainer" in block]
    records = DEMO / "records" / "validation.jsonl"
    for written, here in (("openai-community/gpt2", str(DEMO / "base")), ("my_records.json", str(records))):
        assert written in code
        code = code.replace(written, here)
    code = code.replace(
        'TrainingArguments("outputs/stock")',
        'TrainingArguments("outputs/stock", max_steps=2, use_cpu=True, save_strategy="no", logging_steps=1)',
    )
    code = code.replace("Trainer(model,", "trainer = Trainer(model,").replace(").train()", ")\ntrainer.train()")
    monkeypatch.chdir(tmp_path)
    space: dict = {}
    exec(compile(code, "README.md", "exec"), space)
    losses = [entry["loss"] for entry in space["trainer"].state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(torch.isfinite(torch.tensor(losses)))


def test_the_example_records_are_valid(tmp_path):
    from recipe.config import DataArguments
    from recipe.data import load_records

    [text] = blocks("json")
    (tmp_path / "my_records.json").write_text(text, encoding="utf-8")
    data = DataArguments(data=str(tmp_path / "my_records.json"), validation_ratio=0, test_ratio=0)
    assert len(load_records(data)[0]["train"]) == 2


def test_the_example_of_conversations_is_learned_whole(tmp_path, demo_tokenizer):
    from recipe.config import DataArguments
    from recipe.data import load_splits

    [block] = [block for block in blocks("bash") if "chats.jsonl" in block]
    (tmp_path / "chats.jsonl").write_text(re.search(r"<<'END'\n(.*?)END\n", block, re.DOTALL)[1], encoding="utf-8")
    data = DataArguments(data=str(tmp_path / "chats.jsonl"), template="chatml", validation_ratio=0, test_ratio=0)
    rows = load_splits(data, demo_tokenizer)["train"]
    assert rows["turns"][:] == [2, 2] and "ends" not in rows.column_names


@pytest.mark.parametrize("name", sorted(set(re.findall(r"(?:configs|scripts|recipe)/[\w./]+\.(?:yaml|py)", README))))
def test_files_it_names_exist(name):
    assert (ROOT / name).is_file()


def test_the_trip_of_a_record_shows_real_tokens(gpt2_tokenizer):
    from recipe.templates import load_template

    prompt = gpt2_tokenizer(load_template("alpaca").prompt({"instruction": "Fix the grammar.", "input": "He go."}))[
        "input_ids"
    ]
    response = gpt2_tokenizer("He goes.")["input_ids"]
    shown = re.search(r"input_ids\s+(.*?)\|(.*?)\(prompt", README)
    first, last = shown.group(1).split("…")
    assert [int(token) for token in first.split()] == prompt[:2]
    assert [int(token) for token in last.split()] == prompt[-2:]
    assert [int(token) for token in shown.group(2).split()] == [*response, 50256]


def test_targets_of_the_makefile_are_the_commands():
    makefile = Path(ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"^make (\w+)", README, flags=re.MULTILINE):
        assert f"\n{target}:" in makefile


def test_the_demo_output_it_shows_names_real_families():
    from recipe.demo.build_records import FAMILIES

    [shown] = [block for block in blocks("text") if "exact_match" in block]
    named = set(re.findall(r"^│ (\w+) +│ +\d+ │", shown, flags=re.MULTILINE))
    assert len(named) >= 5 and named <= {family.name for family in FAMILIES}


def test_the_tree_names_the_files_that_are_there():
    [tree] = [block for block in blocks("text") if block.startswith("scripts/")]
    shown = set(re.findall(r"\b(\w+\.py)\b", tree))
    folders = [ROOT / "scripts", ROOT / "recipe"]
    there = {path.name for folder in folders for path in folder.rglob("*.py") if "demo" not in path.parts}
    assert len(shown) > 30 and shown <= there
    at_the_top = {path.name for path in (ROOT / "recipe").glob("*.py")} - {"__init__.py"}
    stages = {path.name for name in ("data", "training") for path in (ROOT / "recipe" / name).glob("*.py")}
    assert at_the_top | stages - {"__init__.py"} <= shown
