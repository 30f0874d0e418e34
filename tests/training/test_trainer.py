"""The trainer against losses computed by hand, Hugging Face's own loss, and the stock Trainer."""

import copy
import json
import math
import os
from pathlib import Path

import processes
import pytest
import sacrebleu
import torch
from conftest import DEMO, ROOT
from datasets import Dataset
from safetensors.torch import load_file
from torch.nn import functional
from transformers import AutoModelForCausalLM, Trainer

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments
from recipe.data import load_splits
from recipe.evaluation.ask import without_reasoning
from recipe.generation import generate_responses
from recipe.reasoning import opened_by
from recipe.templates import load_template
from recipe.tokens import prompt_ids
from recipe.trainer import InstructionTrainer
from recipe.training.samples import SampleGenerations


@pytest.fixture(scope="module", params=[True, False], ids=["mask_prompt", "full_text"])
def rows(request, demo_tokenizer) -> Dataset:
    data = DataArguments(
        data={"train": str(DEMO / "records" / "validation.jsonl")}, test_ratio=0, mask_prompt=request.param
    )
    return load_splits(data, demo_tokenizer)["train"].select(range(16))


def arguments(tmp_path: Path, **changes) -> InstructionTrainingArguments:
    options = {
        "output_dir": str(tmp_path / "run"), "use_cpu": True, "max_steps": 1, "per_device_train_batch_size": 8,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "max_grad_norm": 0.0, "logging_steps": 1,
        "save_strategy": "no", "disable_tqdm": True, "report_to": "none", "seed": 1,
    }  # fmt: skip
    return InstructionTrainingArguments(**{**options, **changes})


def trainer_for(model, tokenizer, rows, args, collator=None, trainer_class=InstructionTrainer):
    return trainer_class(
        model,
        args,
        data_collator=collator or DataCollatorForInstructionTuning(tokenizer.eos_token_id),
        train_dataset=rows,
        eval_dataset=rows,
        processing_class=tokenizer,
    )


def loss_by_hand(model, rows) -> tuple[float, int]:
    """Row by row, without padding: the summed cross-entropy of each next token that is supervised, and their number."""
    total, count = 0.0, 0
    with torch.no_grad():
        for row in rows:
            logits = model(torch.tensor([row["input_ids"]])).logits[0].double()
            for position, target in enumerate(row["labels"][1:]):
                if target != -100:
                    total -= functional.log_softmax(logits[position], dim=-1)[target].item()
                    count += 1
    return total, count


def train_and_keep_gradients(trainer) -> dict[str, torch.Tensor]:
    """Run the trainer and return each parameter's gradient as the optimizer saw it at the last step."""
    gradients: dict[str, torch.Tensor] = {}

    class Keep(torch.optim.SGD):
        def step(self, closure=None):
            for name, parameter in trainer.model.named_parameters():
                gradients[name] = parameter.grad.clone()

    trainer.optimizer = Keep(trainer.model.parameters(), lr=0.0)
    trainer.train()
    return gradients


def assert_equal_gradients(one, other, tolerance=1e-6):
    """Relative to each parameter's gradient norm."""
    assert one.keys() == other.keys() and one
    for name in one:
        difference = ((one[name] - other[name]).norm() / one[name].norm()).item()
        assert difference <= tolerance, f"{name}: gradients differ by {difference:.1e} relative"


def test_loss_equals_the_one_by_hand_and_hugging_faces_own_shift(demo_model, demo_tokenizer, rows, tmp_path):
    demo_model.eval()
    total, count = loss_by_hand(demo_model, rows)
    trainer = trainer_for(demo_model, demo_tokenizer, rows, arguments(tmp_path))
    batch = DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id)(list(rows))
    ours = trainer.compute_loss(demo_model, batch).item()
    assert ours == pytest.approx(total / count, rel=1e-6)

    aligned = DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id, shift=False)(list(rows))
    aligned.pop("row")
    theirs = demo_model(**aligned).loss.item()
    assert ours == pytest.approx(theirs, rel=1e-6)


def test_stock_trainer_with_our_collator_gives_the_same_loss_and_gradients(demo_model, demo_tokenizer, rows, tmp_path):
    assert_equal_to_stock_trainer(demo_model, demo_tokenizer, rows, tmp_path, shift=True)


@pytest.mark.parametrize("rows", [True], indirect=True)  # of full text, the stock Trainer counts one target too many
def test_stock_trainer_with_our_collator_that_does_not_shift(demo_model, demo_tokenizer, rows, tmp_path):
    assert_equal_to_stock_trainer(demo_model, demo_tokenizer, rows, tmp_path, shift=False)


def assert_equal_to_stock_trainer(demo_model, demo_tokenizer, rows, tmp_path, shift):
    collator = DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id, shift=shift)
    ours = trainer_for(copy.deepcopy(demo_model), demo_tokenizer, rows, arguments(tmp_path), collator)
    stock_args = arguments(tmp_path, remove_unused_columns=True)
    stock = trainer_for(copy.deepcopy(demo_model), demo_tokenizer, rows, stock_args, collator, Trainer)
    assert_equal_gradients(train_and_keep_gradients(ours), train_and_keep_gradients(stock))
    assert ours.state.log_history[0]["loss"] == pytest.approx(stock.state.log_history[0]["loss"], rel=1e-6)


def test_evaluation_is_weighted_by_tokens_and_does_not_depend_on_the_batch_size(
    demo_model, demo_tokenizer, rows, tmp_path
):
    total, count = loss_by_hand(demo_model.eval(), rows)
    results = []
    for batch_size, drop_last in ((1, False), (5, False), (16, False), (5, True), (32, True)):  # it drops none here
        args = arguments(tmp_path, per_device_eval_batch_size=batch_size, dataloader_drop_last=drop_last)
        results.append(trainer_for(demo_model, demo_tokenizer, rows, args).evaluate())
    for result in results:
        assert result["eval_loss"] == pytest.approx(total / count, rel=1e-6)
        assert result["eval_perplexity"] == pytest.approx(math.exp(total / count), rel=1e-5)
        assert result["eval_next_token_accuracy"] == results[0]["eval_next_token_accuracy"]
    with torch.no_grad():
        hits = sum(
            int(predicted == target)
            for row in rows
            for predicted, target in zip(
                demo_model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist(),
                row["labels"][1:],
                strict=False,
            )
            if target != -100
        )
    assert results[0]["eval_next_token_accuracy"] == pytest.approx(hits / count)


def test_with_persistent_workers_each_dataset_is_evaluated_by_itself(demo_model, demo_tokenizer, rows, tmp_path):
    args = arguments(tmp_path, dataloader_num_workers=1, dataloader_persistent_workers=True)
    trainer = trainer_for(demo_model, demo_tokenizer, rows, args)
    for part in (rows, rows.select(range(5)), rows.select([7])):
        total, count = loss_by_hand(demo_model.eval(), part)
        assert trainer.evaluate(part)["eval_loss"] == pytest.approx(total / count, rel=1e-6)
    assert trainer.args.dataloader_persistent_workers


def test_log_tells_padding_tokens_and_learning_rate(demo_model, demo_tokenizer, rows, tmp_path):
    args = arguments(tmp_path, max_steps=2, logging_steps=2)
    trainer = trainer_for(demo_model, demo_tokenizer, rows, args)
    trainer.train()
    log = trainer.state.log_history[0]
    batches = [torch.tensor([rows["length"][i] for i in order]) for order in seen_rows(args, rows)]
    real = sum(int(lengths.sum()) - len(lengths) for lengths in batches)  # the last token of a record predicts none
    computed = sum(len(lengths) * (int(lengths.max()) - 1) for lengths in batches)
    assert log["num_input_tokens_seen"] == trainer.state.num_input_tokens_seen == real
    assert log["padding"] == pytest.approx(1 - real / computed, abs=1e-4)
    supervised = sum(label != -100 for order in seen_rows(args, rows) for i in order for label in rows["labels"][i][1:])
    assert log["supervised"] == pytest.approx(supervised / real, abs=1e-4)
    assert log["learning_rate"] == 1e-3
    assert log["tokens_per_second"] > 0
    for counted, expected in (("non_padding", real), ("all", computed)):
        args = arguments(tmp_path, max_steps=2, logging_steps=2, include_num_input_tokens_seen=counted)
        trainer = trainer_for(demo_model, demo_tokenizer, rows, args)
        trainer.train()
        assert trainer.state.num_input_tokens_seen == expected


def seen_rows(args, rows) -> list[list[int]]:
    """The indices of each batch of the first epoch, in the stock Trainer's order."""
    trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=rows, data_collator=lambda batch: batch)
    row_of = {row: index for index, row in enumerate(rows["row"])}
    torch.manual_seed(args.seed)
    from transformers import set_seed

    set_seed(args.seed)
    return [[row_of[feature["row"]] for feature in batch] for batch in trainer.get_train_dataloader()]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_training_with_step_and_rows(demo_model, demo_tokenizer, rows, tmp_path, bad):
    class Breaks(InstructionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if self.state.global_step == 2:  # the third step
                self.bad_rows = inputs["row"].tolist()
                with torch.no_grad():
                    model.transformer.wte.weight.fill_(bad)
            return super().compute_loss(model, inputs, *args, **kwargs)

    args = arguments(
        tmp_path, max_steps=6, logging_steps=5, save_strategy="steps", save_steps=4, per_device_train_batch_size=2
    )
    trainer = trainer_for(demo_model, demo_tokenizer, rows, args, trainer_class=Breaks)
    with pytest.raises(
        FloatingPointError, match=r"the loss is (nan|inf) at step 3 in the batch of .*jsonl rows \d+, \d+\. "
    ) as stop:
        trainer.train()
    assert ", ".join(map(str, trainer.bad_rows)) in str(stop.value)
    assert not (tmp_path / "run" / "checkpoint-4").exists() or not any((tmp_path / "run" / "checkpoint-4").iterdir())


def test_weights_that_the_last_step_ruined_are_not_saved(demo_model, demo_tokenizer, rows, tmp_path):
    trainer = trainer_for(demo_model, demo_tokenizer, rows, arguments(tmp_path, learning_rate=1e38))
    trainer.train()
    with pytest.raises(FloatingPointError, match="the weights are not finite after step 1"):
        trainer.save_model()
    assert not (tmp_path / "run" / "model.safetensors").exists()
    with pytest.raises(FloatingPointError, match="eval_loss is nan after step 1"):
        trainer.evaluate()


def test_sample_generations_are_saved_and_leave_the_model_training(demo_model, demo_tokenizer, rows, tmp_path, capsys):
    record = {"instruction": "Name a colour.", "input": "", "output": "Blue."}
    trainer = trainer_for(demo_model, demo_tokenizer, rows, arguments(tmp_path))
    trainer.add_callback(SampleGenerations([record], load_template("alpaca"), max_new_tokens=4))
    trainer.model.train()
    trainer.evaluate()
    [line] = (tmp_path / "run" / "samples.jsonl").read_text().splitlines()
    sample = json.loads(line)
    assert {name: sample[name] for name in record} == record
    assert sample["stop_reason"] in ("eos", "length") and isinstance(sample["response"], str)
    assert "reference  Blue." in capsys.readouterr().out


def test_resumed_in_the_middle_of_an_epoch_equals_never_stopped(demo_model, demo_tokenizer, rows, tmp_path):
    options = {"max_steps": 9, "per_device_train_batch_size": 4, "save_strategy": "steps", "save_steps": 6}
    whole = trainer_for(copy.deepcopy(demo_model), demo_tokenizer, rows, arguments(tmp_path / "a", **options))
    whole.train()
    checkpoint = tmp_path / "a" / "run" / "checkpoint-6"  # in the middle of the second epoch of four steps
    resumed = trainer_for(copy.deepcopy(demo_model), demo_tokenizer, rows, arguments(tmp_path / "b", **options))
    resumed.train(resume_from_checkpoint=str(checkpoint))
    for (name, one), other in zip(whole.model.named_parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(one, other), name
    assert resumed.state.num_input_tokens_seen == whole.state.num_input_tokens_seen


def launch_three_steps(tmp_path, config: str, count: int, batching: str = "padded") -> tuple[list[dict], Path]:
    """Three steps of the demo as `accelerate launch` starts them, 8 rows a step over all processes: log and folder."""
    output_dir = tmp_path / f"{Path(config).stem}-{batching}"
    done = processes.run_ranks(
        "scripts/train.py", count, "configs/demo.yaml", "--output_dir", str(output_dir), "--max_steps", "3",
        "--per_device_train_batch_size", str(8 // count), "--per_device_eval_batch_size", "7",
        "--logging_steps", "1", "--eval_strategy", "steps", "--eval_steps", "3", "--num_sample_generations", "1",
        "--disable_tqdm", "true", "--warmup_steps", "0", "--eval_generate", "true", "--generation_max_new_tokens", "4",
        "--batching", batching, config=config, cwd=ROOT,
        env=os.environ | {"HF_DATASETS_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads((output_dir / "run.json").read_text())["processes"] == count
    return json.loads((output_dir / "trainer_state.json").read_text())["log_history"], output_dir


def test_two_processes_equal_one(tmp_path):
    """Real processes: 2 x 4 rows against 1 x 8, weights copied (DDP) and shared (FSDP 2), down to the saved model."""
    expected, folder = launch_three_steps(tmp_path, "accelerate_config.yaml", 1)
    weights = load_file(folder / "model.safetensors")
    assert {"loss", "grad_norm"} <= expected[2].keys() and {"eval_loss", "eval_chrf"} <= expected[3].keys()
    copied, shared = "configs/accelerate/two_processes.yaml", "configs/accelerate/fsdp.yaml"
    for config, batching in ((copied, "padded"), (shared, "padded"), (shared, "shared_prefix")):
        log, folder = launch_three_steps(tmp_path, config, 2, batching)
        for key in ("loss", "grad_norm"):
            assert log[0][key] == pytest.approx(expected[0][key], rel=1e-6), (config, key)
        for entry, one in zip(log[:4], expected[:4], strict=True):  # after steps, in which rounding grows
            for key in {"loss", "grad_norm", "eval_loss", "eval_next_token_accuracy", "eval_chrf"} & one.keys():
                assert entry[key] == pytest.approx(one[key], rel=1e-4), (config, key)
        saved = load_file(folder / "model.safetensors")
        assert saved.keys() == weights.keys()
        for name, tensor in weights.items():
            assert (saved[name] - tensor).norm() <= 1e-3 * tensor.norm(), (config, name)


def test_eval_generate_scores_answers_and_picks_the_best_checkpoint_by_them(demo_model, demo_tokenizer, rows, tmp_path):
    """The scores in the log are those of answers generated one by one from the checkpoint of that step."""
    lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:6]
    records, template = [json.loads(line) for line in lines], load_template("alpaca")
    args = arguments(
        tmp_path, max_steps=3, eval_strategy="steps", eval_steps=1, save_strategy="steps", save_steps=1,
        metric_for_best_model="chrf", greater_is_better=True,
        load_best_model_at_end=True,
    )  # fmt: skip
    trainer = InstructionTrainer(
        demo_model, args, data_collator=DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id),
        train_dataset=rows, eval_dataset=rows, processing_class=demo_tokenizer, generation_records=records,
        template=template, max_new_tokens=8,
    )  # fmt: skip
    trainer.train()
    logged = {entry["step"]: entry for entry in trainer.state.log_history if "eval_loss" in entry}
    assert set(logged) == {1, 2, 3}
    references = [[record["output"] for record in records]]
    for step, entry in logged.items():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "run" / f"checkpoint-{step}", dtype=torch.float32)
        texts = [
            generate_responses(model, demo_tokenizer, [template.prompt(record)], max_new_tokens=8)[0].text
            for record in records
        ]
        assert entry["eval_chrf"] == pytest.approx(sacrebleu.corpus_chrf(texts, references).score / 100)
        assert entry["eval_bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, references).score / 100)
        assert 0 <= entry["eval_stop_rate"] <= 1 and "eval_exact_match" in entry
    best = max(logged, key=lambda step: logged[step]["eval_chrf"])
    assert trainer.state.best_global_step == best and trainer.model.training is False
    weights = load_file(tmp_path / "run" / f"checkpoint-{best}" / "model.safetensors")
    assert torch.equal(trainer.model.transformer.wpe.weight.detach(), weights["transformer.wpe.weight"].float())


@pytest.mark.parametrize(("ending", "score"), [("", 1), ("<think>\n", 0), ("<|START_THINKING|>", 0)])
def test_what_is_cut_off_inside_opened_reasoning_has_no_score(demo_model, demo_tokenizer, tmp_path, ending, score):
    """The references are the very texts that are generated; as reasoning that does not end they are no answers."""
    path = tmp_path / "own.jinja"
    ends = "{% if m.role == 'user' %}\n" + ending + "{% endif %}"
    path.write_text("{% for m in messages %}{{ m.content }}" + ends + "{% endfor %}", encoding="utf-8")
    template = load_template(str(path))
    records = [{"instruction": text, "input": "", "output": "."} for text in ("Name a colour.", "Name two animals.")]
    prompts = prompt_ids(template, demo_tokenizer, records)
    texts = [response.text for response in generate_responses(demo_model, demo_tokenizer, prompts, max_new_tokens=8)]
    assert all(texts)
    trainer = InstructionTrainer(
        demo_model, arguments(tmp_path), data_collator=DataCollatorForInstructionTuning(demo_tokenizer.eos_token_id),
        processing_class=demo_tokenizer, template=template, max_new_tokens=8,
        eval_dataset=Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "length": 3}]),
        generation_records=[{**record, "output": text} for record, text in zip(records, texts, strict=True)],
    )  # fmt: skip
    found = trainer.evaluate()
    assert found["eval_token_f1"] == found["eval_exact_match"] == score
    scored = [without_reasoning({"text": text}, text, opened_by(demo_tokenizer, prompts[0]))["text"] for text in texts]
    assert scored == (texts if score else ["", ""])


def test_totals_are_of_the_steps_that_count(demo_model, demo_tokenizer, rows, tmp_path):
    """Trained twice, and again with a smaller batch after one that did not fit: each total is of its own steps."""
    options = {"max_steps": 3, "logging_steps": 1, "per_device_train_batch_size": 4, "auto_find_batch_size": True}
    trainer = trainer_for(demo_model, demo_tokenizer, rows, arguments(tmp_path, **options))
    step, calls = trainer.training_step, []

    def fail_once(*values, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            raise RuntimeError("CUDA out of memory.")
        return step(*values, **kwargs)

    trainer.training_step = fail_once
    for _ in range(2):
        trainer.train()
        losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
        assert len(losses) == 3 and trainer.counts.totals["loss_sum"] == pytest.approx(sum(losses), rel=1e-5)
        assert trainer.state.log_history[-1]["train_loss"] == pytest.approx(sum(losses) / 3, rel=1e-5)
    assert len(calls) == 3 + 3 + 3
