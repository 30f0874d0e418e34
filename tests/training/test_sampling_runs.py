"""Training with planned batches: their flags, the same gradients however accumulated, resumed runs, real processes."""

import json
import os
import sys
from pathlib import Path

import numpy as np
import processes
import pytest
import torch
import transformers
from accelerate.utils import send_to_device
from conftest import DEMO, ROOT
from datasets import Dataset
from packaging.version import Version
from torch.utils.data._utils.pin_memory import pin_memory
from transformers import AutoModelForCausalLM

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.config import DataArguments, InstructionTrainingArguments, UserError
from recipe.data import load_splits
from recipe.trainer import InstructionTrainer
from recipe.training.collator_choice import make_collator
from recipe.training.sampling import TokenBudgetBatches, common_start, record_lengths

# --- flags ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_tokens_per_batch": 0}, "--max_tokens_per_batch 0: give at least 1"),
        ({"train_sampling_strategy": "sequential"}, "leave out --train_sampling_strategy sequential"),
        ({"dataloader_drop_last": True}, "leave out --dataloader_drop_last"),
        ({"auto_find_batch_size": True}, "leave out --auto_find_batch_size"),
    ],
)
def test_flags_that_contradict_a_token_budget_are_refused(tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        InstructionTrainingArguments(**{"output_dir": str(tmp_path), "max_tokens_per_batch": 100} | changes)


def test_noise_that_would_depend_on_the_layout_is_refused(tmp_path, demo_model, demo_tokenizer):
    args = InstructionTrainingArguments(str(tmp_path), use_cpu=True, neftune_noise_alpha=5.0)
    make_collator(DataArguments(), args, demo_model, demo_tokenizer)
    with pytest.raises(UserError, match=r"--neftune_noise_alpha depends on the length of a row.*use --batching padded"):
        make_collator(DataArguments(batching="shared_prefix"), args, demo_model, demo_tokenizer)


def test_copies_to_a_gpu_do_not_wait_unless_told_to(tmp_path, monkeypatch):
    def non_blocking(**changes) -> bool:
        args = InstructionTrainingArguments(output_dir=str(tmp_path), use_cpu=True, **changes)
        return args.accelerator_config.non_blocking

    assert non_blocking() is False
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert non_blocking() is True
    assert non_blocking(accelerator_config={"non_blocking": False}) is False
    assert non_blocking(dataloader_pin_memory=False) is False


def test_pinning_and_moving_a_batch_leaves_its_segments_a_tuple(rows, demo_tokenizer):
    """They are a cache's key in `recipe.attention`; tensors are pinned only where there is an accelerator."""
    batch = DataCollatorWithSharedPrefix(demo_tokenizer.eos_token_id, "segments")([rows[0], rows[1]])
    segments = batch["segments"]
    assert pin_memory({"segments": segments}) == {"segments": segments} == send_to_device({"segments": segments}, "cpu")
    hash(pin_memory(segments))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rows(demo_tokenizer) -> Dataset:
    data = DataArguments(data={"train": str(DEMO / "records" / "validation.jsonl")}, test_ratio=0)
    return load_splits(data, demo_tokenizer)["train"].select(range(40))


def trainer_for(
    batching: str,
    tokenizer,
    rows: Dataset,
    folder: Path,
    dtype=torch.float32,
    trainer_class=InstructionTrainer,
    **changes,
):
    options = {
        "output_dir": str(folder / "run"), "use_cpu": True, "max_steps": 1, "learning_rate": 1e-3, "max_grad_norm": 0.0,
        "lr_scheduler_type": "constant", "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True,
        "report_to": "none", "seed": 1,
    }  # fmt: skip
    shared = batching == "shared_prefix"
    model = AutoModelForCausalLM.from_pretrained(
        DEMO / "base", dtype=dtype, attn_implementation=attention.NAME if shared else "sdpa"
    )
    collator = (
        DataCollatorWithSharedPrefix(tokenizer.eos_token_id, "segments")
        if shared
        else DataCollatorForInstructionTuning(tokenizer.eos_token_id)
    )
    args = InstructionTrainingArguments(**options | changes)
    return trainer_class(
        model, args, data_collator=collator, train_dataset=rows, eval_dataset=rows, processing_class=tokenizer
    )


def take_one_step(trainer: InstructionTrainer) -> dict[str, torch.Tensor]:
    """Each parameter's gradient as the optimizer saw it."""
    gradients: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            gradients.update({name: p.grad.clone() for name, p in trainer.model.named_parameters()})

    trainer.optimizer = Keep(trainer.model.parameters(), lr=0.0)
    trainer.train()
    return gradients


def test_shared_prefix_steps_are_those_of_padded_ones_however_they_are_accumulated(demo_tokenizer, rows, tmp_path):
    """In float64: 12 x 1, 1 x 12, 5 x 3, and micro-batches by a token budget that hold different numbers of rows."""
    rows = rows.select(range(12))
    options = {"train_sampling_strategy": "sequential", "dtype": torch.float64}
    expected = take_one_step(
        trainer_for("padded", demo_tokenizer, rows, tmp_path, per_device_train_batch_size=12, **options)
    )
    budget = int(max(rows["length"])) * 3
    sampler = TokenBudgetBatches(record_lengths(rows), budget, seed=1)
    assert len({len(batch) for batch in sampler}) > 1 and len(sampler) > 2
    ways = [
        {"per_device_train_batch_size": size, "gradient_accumulation_steps": accumulated, **options}
        for size, accumulated in ((12, 1), (1, 12), (5, 3))
    ]
    ways += [{"max_tokens_per_batch": budget, "gradient_accumulation_steps": len(sampler), "dtype": torch.float64}]
    for batching in ("padded", "shared_prefix"):
        for way in ways:
            found = take_one_step(trainer_for(batching, demo_tokenizer, rows, tmp_path, **way))
            for name, gradient in expected.items():
                assert (found[name] - gradient).norm() <= 1e-6 * gradient.norm(), (batching, way, name)


@pytest.mark.parametrize(
    ("batching", "changes"),
    [
        ("shared_prefix", {"max_tokens_per_batch": 400}),
        ("padded", {"train_sampling_strategy": "group_by_length", "per_device_train_batch_size": 4}),
    ],
    ids=["budget", "group_by_length"],
)
def test_resumed_in_the_middle_of_an_epoch_equals_never_stopped(batching, changes, demo_tokenizer, rows, tmp_path):
    """Also where processes of their own make the batches, and where the global random state was used in between."""
    whole = trainer_for(batching, demo_tokenizer, rows, tmp_path / "a", num_train_epochs=3, **changes)
    steps = len(whole.get_train_dataloader())
    changes |= {"max_steps": 2 * steps + 1, "save_strategy": "steps", "save_steps": steps + 2}
    assert steps > 3
    whole = trainer_for(batching, demo_tokenizer, rows, tmp_path / "a", **changes)
    whole.train()
    assert whole.state.epoch == pytest.approx(2 + 1 / steps)
    resumed = trainer_for(batching, demo_tokenizer, rows, tmp_path / "b", dataloader_num_workers=1, **changes)
    torch.rand(5)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "run" / f"checkpoint-{steps + 2}"))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen
    assert whole.state.num_input_tokens_seen > 2 * int((record_lengths(rows) - 1).sum())  # each epoch holds all rows


def test_resumed_with_persistent_workers_and_dropout_equals_never_stopped(demo_tokenizer, rows, tmp_path):
    """They draw a seed at the start of a run only: not from the random state that dropout uses."""
    changes = {
        "max_steps": 9, "per_device_train_batch_size": 10, "save_strategy": "steps", "save_steps": 3,
        "eval_strategy": "steps", "eval_steps": 2, "dataloader_num_workers": 1, "dataloader_persistent_workers": True,
    }  # fmt: skip
    trained = []
    for folder, checkpoint in (("a", None), ("b", str(tmp_path / "a" / "run" / "checkpoint-3"))):
        trainer = trainer_for("padded", demo_tokenizer, rows, tmp_path / folder, **changes)
        for part in trainer.model.modules():
            if isinstance(part, torch.nn.Dropout):
                part.p = 0.1
        trainer.train(resume_from_checkpoint=checkpoint)
        trained.append(trainer.model.state_dict())
    for name, weight in trained[0].items():
        assert torch.equal(weight, trained[1][name]), name


def test_no_batch_that_reaches_the_model_is_over_the_budget_and_samples_are_counted_right(
    demo_tokenizer, rows, tmp_path
):
    sizes = []

    class Watch(InstructionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            sizes.append(inputs["input_ids"].shape)
            return super().compute_loss(model, inputs, *args, **kwargs)

    for batching in ("padded", "shared_prefix"):
        sizes.clear()
        changes = {"num_train_epochs": 2, "max_steps": -1, "max_tokens_per_batch": 400, "trainer_class": Watch}
        trainer = trainer_for(batching, demo_tokenizer, rows, tmp_path, **changes)
        trainer.train()
        assert len(sizes) == 2 * len(trainer.get_train_dataloader()) and max(map(np.prod, sizes)) <= 400
    last, steps = trainer.state.log_history[-1], trainer.state.global_step
    assert last["train_samples_per_second"] * last["train_runtime"] == pytest.approx(2 * len(rows), rel=0.05)
    assert trainer.get_total_train_batch_size(trainer.args) == pytest.approx(2 * len(rows) / steps, abs=0.5)


def launch(folder: Path, count: int, *flags: str) -> list[dict]:
    """Some steps of the demo in so many processes: the log."""
    done = processes.run_ranks(
        "scripts/train.py", count, "configs/demo.yaml", "--output_dir", str(folder), "--batching", "shared_prefix",
        "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "3", "--num_sample_generations", "0",
        "--per_device_eval_batch_size", "7", "--disable_tqdm", "true", "--warmup_steps", "0", *flags,
        cwd=ROOT, env=os.environ | {"HF_DATASETS_CACHE": str(folder.parent / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((folder / "run.json").read_text())["processes"] == count
    return json.loads((folder / "trainer_state.json").read_text())["log_history"]


def test_two_processes_with_shared_prefixes_equal_one(tmp_path):
    """Real processes (DDP): batches of like length, 2 x 4 rows against 1 x 8, and evaluation."""
    flags = ("--max_steps", "3", "--train_sampling_strategy", "group_by_length", "--per_device_train_batch_size")
    expected = launch(tmp_path / "one", 1, *flags, "8")
    log = launch(tmp_path / "two", 2, *flags, "4")
    assert {"loss", "grad_norm"} <= expected[2].keys() and "eval_loss" in expected[3]
    for entry, one in zip(log[:4], expected[:4], strict=True):
        for key in {"loss", "grad_norm", "eval_loss", "eval_next_token_accuracy"} & one.keys():
            assert entry[key] == pytest.approx(one[key], rel=1e-4), key
        assert entry.get("num_input_tokens_seen") == one.get("num_input_tokens_seen")


def test_two_processes_with_a_token_budget_see_each_record_once_an_epoch_and_resume_within_one(
    demo_tokenizer, tmp_path
):
    """Real processes: two whole epochs, and from the middle of the second again."""
    lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    files = {"train": str(tmp_path / "train.jsonl"), "validation": str(tmp_path / "validation.jsonl")}
    for path, part in zip(files.values(), (lines[:45], lines[45:60]), strict=True):
        Path(path).write_text("".join(part), encoding="utf-8")
    splits = load_splits(DataArguments(data=files, test_ratio=0), demo_tokenizer)
    lengths, start = record_lengths(splits["train"]), common_start(splits["train"])
    steps = len(TokenBudgetBatches(lengths, 200, shared=start, num_processes=2)) // 2  # of an epoch
    flags = (
        "--data", json.dumps(files), "--test_ratio", "0", "--num_train_epochs", "2", "--max_tokens_per_batch", "200",
        "--save_strategy", "steps", "--save_steps", str(steps + 2),
    )  # fmt: skip
    folder = tmp_path / "two"
    whole = launch(folder, 2, *flags)
    if Version(transformers.__version__) < Version("5.18"):
        pytest.skip("transformers 5.17 cannot resume several processes on a CPU: it loads the optimizer to 'cpu:0'")
    resumed = launch(folder, 2, *flags, "--resume_from_checkpoint", str(folder / f"checkpoint-{steps + 2}"))
    seen, again = ([entry for entry in log if "num_input_tokens_seen" in entry] for log in (whole, resumed))
    assert len(seen) == len(again) == 2 * steps and steps > 4
    for epoch in (1, 2):
        assert seen[epoch * steps - 1]["num_input_tokens_seen"] == epoch * int((lengths - 1).sum())
    for one, other in zip(seen, again, strict=True):
        for key in ("loss", "grad_norm", "num_input_tokens_seen"):
            assert one[key] == other[key], (one["step"], key)


def test_a_budget_below_the_longest_record_ends_the_script_before_it_touches_anything(tmp_path):
    kept = tmp_path / "run" / "run.json"
    kept.parent.mkdir()
    kept.write_text("{}")
    command = [
        sys.executable, "scripts/train.py", "configs/demo.yaml", "--output_dir", str(kept.parent),
        "--overwrite_output_dir", "--max_tokens_per_batch", "20",
    ]  # fmt: skip
    environment = {**os.environ, "HF_DATASETS_CACHE": str(tmp_path / "cache")}
    done = processes.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "input tokens, and max_tokens_per_batch is 20; give at least" in done.stderr
    assert kept.read_text() == "{}"
