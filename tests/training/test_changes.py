"""A resumed run goes on with the settings and the data it was begun with, or says what differs."""

import json
import runpy
import shutil

import pytest
import torch
import yaml
from conftest import DEMO, ROOT
from datasets import Dataset
from safetensors.torch import load_file

from recipe.config import (
    DataArguments,
    InstructionTrainingArguments,
    ModelArguments,
    UserError,
    parse_arguments,
)
from recipe.data import load_splits
from recipe.model import load_model, load_tokenizer
from recipe.templates import load_template
from recipe.trainer import InstructionTrainer
from recipe.training.changes import refuse_changes, what_decides
from recipe.training.collator_choice import make_collator
from recipe.training.errors import Settings

RECORDS = [json.loads(line) for line in (DEMO / "records" / "validation.jsonl").read_text().splitlines()[:24]]
BEGUN = {
    "lr_scheduler_type": "constant_with_warmup", "warmup_steps": 1,
    "model_name_or_path": str(DEMO / "base"), "data": None, "max_steps": 8, "per_device_train_batch_size": 4,
    "save_strategy": "steps", "save_steps": 2, "learning_rate": 1e-3,  "report_to": "none", "logging_steps": 1,
    "disable_tqdm": True, "num_sample_generations": 0, "use_cpu": True,
}  # fmt: skip


@pytest.fixture
def records(tmp_path):
    path = tmp_path / "records.json"
    path.write_text(json.dumps(RECORDS), encoding="utf-8")
    return path


def decides(tmp_path, records, **changes) -> dict:
    """`what_decides` of a run with these settings, as the script reads them."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(BEGUN | {"data": str(records), "output_dir": str(tmp_path / "run")} | changes))
    types = [ModelArguments, DataArguments, InstructionTrainingArguments]
    settings = Settings(*parse_arguments(types, [str(config)], ""))
    tokenizer = load_tokenizer(settings.model)
    settings.data.max_length = settings.data.max_length or 256
    splits = load_splits(settings.data, tokenizer)
    model, _ = load_model(settings.model, tokenizer)
    trainer = InstructionTrainer(
        model, settings.training, data_collator=make_collator(settings.data, settings.training, model, tokenizer),
        train_dataset=splits["train"], eval_dataset=splits.get("validation"), processing_class=tokenizer,
        template=load_template(settings.data.template, tokenizer),
    )  # fmt: skip
    return what_decides(settings, trainer)


@pytest.fixture(scope="module")
def begun(tmp_path_factory):
    folder = tmp_path_factory.mktemp("begun")
    (folder / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    return decides(folder, folder / "records.json")


def refusal(begun, now, tmp_path, monkeypatch, allowed=()):
    """What is said of resuming a checkpoint that was made with `begun`; nothing if it is resumed."""
    checkpoint = tmp_path / "checkpoint-2"
    monkeypatch.setattr("recipe.training.changes.about", lambda folder: json.loads(json.dumps(begun)))
    try:
        return refuse_changes(now, str(checkpoint), allowed)
    except UserError as error:
        return str(error)


CHANGES = [  # settings, and what is named
    ({"learning_rate": 1e-2}, "learning_rate: 0.001 → 0.01"),
    ({"weight_decay": 0.3}, "weight_decay: 0.0 → 0.3"),
    ({"seed": 7}, "seed: 42 → 7"),
    ({"data_seed": 7}, "data_seed: null → 7"),
    ({"gradient_accumulation_steps": 2}, "records_per_step: 4 → 8"),
    ({"per_device_train_batch_size": 2}, "records_per_step: 4 → 2"),
    ({"max_steps": 6}, "max_steps: 8 → 6"),
    ({"max_steps": -1, "num_train_epochs": 5}, "num_train_epochs: 3.0 → 5"),
    ({"template": "phi3"}, "template: alpaca → phi3"),
    ({"template": "phi3"}, "data: the train records, with other tokens or in another order"),
    ({"mask_prompt": False}, "mask_prompt: true → false"),
    ({"max_length": 60}, "max_length: 256 → 60"),
    ({"overflow": "drop"}, "overflow: truncate → drop"),
    ({"batching": "shared_prefix"}, "batching: padded → shared_prefix"),
    ({"config_overrides": "resid_pdrop=0.1"}, "config_overrides: null → resid_pdrop=0.1"),
    ({"lr_scheduler_type": "cosine"}, "lr_scheduler_type: constant_with_warmup → cosine"),
    ({"warmup_steps": 3}, "warmup_steps: 1.0 → 3"),
    ({"dtype": "bfloat16"}, "dtype: float32 → bfloat16"),
    ({"bf16": True}, "mixed_precision: no → bf16"),
    ({"max_grad_norm": 0.1}, "max_grad_norm: 1.0 → 0.1"),
    ({"adam_beta2": 0.99}, "adam_beta2: 0.999 → 0.99"),
    ({"train_sampling_strategy": "group_by_length"}, "train_sampling_strategy: random → group_by_length"),
    ({"max_tokens_per_batch": 300}, "max_tokens_per_batch: null → 300"),
    ({"dataloader_drop_last": True}, "dataloader_drop_last: false → true"),
    ({"neftune_noise_alpha": 5.0}, "neftune_noise_alpha: null → 5"),
    ({"split_seed": 5}, "split_seed: 123 → 5"),
    ({"validation_ratio": 0.2}, "data: the train 21 → 17 records"),
    ({"metric_for_best_model": "loss", "eval_strategy": "steps"}, "metric_for_best_model: null → loss"),
]


@pytest.mark.parametrize(("changes", "named"), CHANGES, ids=[str(changes) for changes, _ in CHANGES])
def test_a_changed_setting_is_refused_by_name_with_old_and_new(begun, changes, named, records, tmp_path, monkeypatch):
    said = refusal(begun, decides(tmp_path, records, **changes), tmp_path, monkeypatch)
    assert f"\n  {named}" in said and "checkpoint-2 was made with other settings" in said
    ways = said.rpartition("--allow_changed ")[2].partition(",")[0].split()
    assert named.partition(":")[0] in ways and set(ways) <= {
        *changes,
        "data",
        "records_per_step",
        "mixed_precision",
        "greater_is_better",
    }


def edit(records):
    records[0] = records[0] | {"output": records[0]["output"] + " Indeed."}


DATA = {
    "an edited record": edit,
    "reversed rows": list.reverse,
    "a record less": list.pop,
    "a record more": lambda records: records.append({"instruction": "Name a tree.", "input": "", "output": "Oak."}),
    "other data": lambda records: records.__setitem__(
        slice(None), [{"instruction": f"Say {n}.", "output": f"{n}"} for n in range(24)]
    ),
}


@pytest.mark.parametrize("how", DATA)
def test_changed_data_are_refused(begun, how, records, tmp_path, monkeypatch):
    changed = json.loads(json.dumps(RECORDS))
    DATA[how](changed)
    records.write_text(json.dumps(changed), encoding="utf-8")
    said = refusal(begun, decides(tmp_path, records), tmp_path, monkeypatch)
    assert "\n  data: the " in said and "--allow_changed data, or start" in said


FREE = [
    {}, {"logging_steps": 3}, {"eval_strategy": "steps", "eval_steps": 3}, {"save_steps": 5, "save_total_limit": 1},
    {"per_device_eval_batch_size": 3}, {"dataloader_num_workers": 1, "dataloader_persistent_workers": True},
    {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2}, {"run_name": "again"}, {"num_proc": 2},
    {"num_sample_generations": 2}, {"hub_model_id": "someone/name"},
]  # fmt: skip


@pytest.mark.parametrize("changes", FREE, ids=str)
def test_what_no_weight_depends_on_may_change(begun, changes, records, tmp_path, monkeypatch):
    assert refusal(begun, decides(tmp_path, records, **changes), tmp_path, monkeypatch) == []


def test_what_is_allowed_is_told_and_what_is_not_is_refused_still(begun, records, tmp_path, monkeypatch):
    now = decides(tmp_path, records, learning_rate=1e-2, seed=3)
    allowed = refusal(begun, now, tmp_path, monkeypatch, ["learning_rate", "seed", "data"])
    assert allowed == ["learning_rate: 0.001 → 0.01", "seed: 42 → 3"]
    said = refusal(begun, now, tmp_path, monkeypatch, ["seed"])
    assert "learning_rate: 0.001 → 0.01" in said and "seed" not in said
    assert "did you mean 'learning_rate'" in refusal(begun, now, tmp_path, monkeypatch, ["learning_rat"])
    other = decides(tmp_path, records, optim="adafactor")
    said = refusal(begun, other, tmp_path, monkeypatch, ["optim"])
    assert "optim: adamw_torch_fused → adafactor" in said and "--allow_changed" not in said


# --- the script ------------------------------------------------------------------------------------------------------


def train(folder, records, *flags):
    flags = [word for name, value in BEGUN.items() if name not in ("data",) for word in (f"--{name}", str(value))] + [
        *flags
    ]
    runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"](
        ["--output_dir", str(folder), "--data", str(records), *flags]
    )


def test_changes_take_effect_and_totals_are_of_all_legs(records, tmp_path, capsys):
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    train(straight, records)
    shutil.copytree(straight, resumed)
    for step in (6, 8):
        shutil.rmtree(resumed / f"checkpoint-{step}")
    with pytest.raises(UserError, match=r"learning_rate: 0\.001 → 0\.01"):
        train(resumed, records, "--learning_rate", "1e-2", "--resume_from_checkpoint", "true")
    changed = ["--learning_rate", "1e-2", "--weight_decay", "0.1", "--allow_changed", "learning_rate", "weight_decay"]
    train(resumed, records, *changed, "--save_steps", "3", "--resume_from_checkpoint", "true")

    optimizer = torch.load(resumed / "checkpoint-6" / "optimizer.pt")["param_groups"]
    before = torch.load(straight / "checkpoint-6" / "optimizer.pt")["param_groups"]
    assert [group["initial_lr"] for group in optimizer] == [1e-2, 1e-2]
    assert [group["lr"] for group in optimizer] == pytest.approx([10 * group["lr"] for group in before])
    assert [group["weight_decay"] for group in optimizer] == [0.1, 0.0]

    run = json.loads((resumed / "run.json").read_text())
    assert [leg.get("changed") for leg in run["legs"]] == [
        None,
        ["learning_rate: 0.001 → 0.01", "weight_decay: 0.0 → 0.1"],
    ]
    assert [(leg["first_step"], leg["last_step"], leg["state"]) for leg in run["legs"]] == [
        (0, 8, "finished"), (4, 8, "finished"),
    ]  # fmt: skip
    history = json.loads((resumed / "trainer_state.json").read_text())["log_history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]  # logged at each step
    assert len(losses) == 8 and run["result"]["train_loss"] == pytest.approx(sum(losses) / 8, rel=1e-6)
    assert history[-1]["train_loss"] == run["result"]["train_loss"]

    again = tmp_path / "again"
    shutil.copytree(straight, again)
    for step in (6, 8):
        shutil.rmtree(again / f"checkpoint-{step}")
    train(again, records, "--resume_from_checkpoint", "true")
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, again))
    assert all(torch.equal(one[name], other[name]) for name in one)
    results = [json.loads((folder / "run.json").read_text())["result"] for folder in (straight, again)]
    assert (
        results[0]["train_loss"] == results[1]["train_loss"] and results[0]["tokens_seen"] == results[1]["tokens_seen"]
    )
    assert results[1]["train_seconds"] > 0

    train(again, records, "--resume_from_checkpoint", "true")  # from its last step: nothing is left to do
    run = json.loads((again / "run.json").read_text())
    assert run["result"]["steps"] == 8 and run["result"]["train_loss"] == results[0]["train_loss"]
    assert (run["legs"][-1]["first_step"], run["legs"][-1]["last_step"]) == (8, 8)
    one, other = (load_file(folder / "model.safetensors") for folder in (straight, again))
    assert all(torch.equal(one[name], other[name]) for name in one)

    with pytest.raises(UserError, match="of step 8, and this run would end at step 5"):
        train(again, records, "--resume_from_checkpoint", "true", "--max_steps", "5", "--allow_changed", "max_steps")
    with pytest.raises(UserError, match="--allow_changed is for --resume_from_checkpoint"):
        train(tmp_path / "new", records, "--allow_changed", "seed")


def test_legs_are_of_the_run_that_is_resumed_and_say_how_they_ended(records, tmp_path, monkeypatch, capsys):
    """Into another folder, which holds another run that goes; and one that ends with an error."""
    first, other = tmp_path / "first", tmp_path / "other"
    train(first, records)
    train(other, records, "--seed", "5")
    flags = ("--resume_from_checkpoint", str(first / "checkpoint-4"), "--overwrite_output_dir", "true")
    train(other, records, *flags)
    run = json.loads((other / "run.json").read_text())
    assert [(leg["first_step"], leg["last_step"]) for leg in run["legs"]] == [(0, 8), (4, 8)] and run["seed"] == 42
    assert {path.name for path in other.glob("checkpoint-*")} == {"checkpoint-6", "checkpoint-8"}
    (first / "run.json").unlink()  # copied without it
    train(other, records, *flags)
    assert f"{first / 'run.json'} has no list of earlier starts" in capsys.readouterr().out
    assert len(json.loads((other / "run.json").read_text())["legs"]) == 1

    def fail(self, *values):
        raise RuntimeError("a fault of the machine")

    monkeypatch.setattr("recipe.training.saving.WholeSaves.save_state", fail)
    with pytest.raises(RuntimeError, match="a fault of the machine"):
        train(tmp_path / "failed", records)
    run = json.loads((tmp_path / "failed" / "run.json").read_text())
    assert (run["state"], run["legs"][-1]["state"], run["result"]["steps"]) == ("failed", "failed", 8)


def test_a_hash_of_records_is_of_tokens_targets_and_order():
    from recipe.training.changes import _about_records

    def hash_of(*rows):
        return _about_records(Dataset.from_list([{"input_ids": ids, "labels": ids} for ids in rows]))["hash"]

    assert hash_of([1, 2], [3]) == hash_of([1, 2], [3])
    assert len({hash_of([1, 2], [3]), hash_of([1], [2, 3]), hash_of([3], [1, 2]), hash_of([1, 2, 3])}) == 4
    both = Dataset.from_list([{"input_ids": [5], "labels": [5]}, {"input_ids": [6], "labels": [6]}])
    assert _about_records(both.select([1, 0]))["hash"] == hash_of([6], [5])
