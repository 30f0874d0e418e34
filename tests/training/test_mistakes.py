"""Mistakes that can be known before the first step: one line, exit code 1, and an earlier run is left as it was.

docs/api.md lists their kinds.
"""

import hashlib
import json
import runpy
import shutil
import sys
from pathlib import Path

import processes
import pytest
import torch
from conftest import DEMO, ROOT
from torch.optim.optimizer import register_optimizer_step_pre_hook
from transformers import AutoConfig, AutoModelForCausalLM

from recipe import model as models
from recipe.config import InstructionTrainingArguments, UserError, parse_arguments
from recipe.console import run_script
from recipe.training.output_dir import find_checkpoint

BASE = str(DEMO / "base")
TINY = ["--model_type", "gpt2", "--tokenizer_name", BASE]
CHANGED = "error: --resume_from_checkpoint: "  # and a line for each change
SHAPE = "n_layer=1,n_embd=16,n_head=2,n_positions=256"
SHORT = ["--max_steps", "2", "--per_device_train_batch_size", "8", "--num_sample_generations", "1",
         "--disable_tqdm", "true", "--report_to", "none", "--overwrite_output_dir", "true"]  # fmt: skip
LLAMA = "num_hidden_layers=1,hidden_size=16,intermediate_size=16,num_attention_heads=4"
BEST = "--load_best_model_at_end true --save_strategy epoch --eval_strategy epoch --metric_for_best_model"

# flags; words of the message
MISTAKES = [
    # optimizers and schedules, built before anything is removed
    ("--optim adamw_bnb_8bit", "--optim adamw_bnb_8bit: | bitsandbytes"),
    ("--optim galore_adamw --optim_target_modules c_attn", "--optim_target_modules c_attn: | galore_torch"),
    ("--optim sgd --optim_args momentum=-1", "--optim sgd, --optim_args momentum=-1: Invalid momentum value: -1.0"),
    ("--optim sgd --optim_args momentum", "--optim sgd, --optim_args momentum: "),
    ("--optim_args lr=1", "--optim_args lr=1 has no effect on --optim adamw_torch_fused"),
    ("--adam_beta2 1", "--adam_beta2 1.0: Invalid beta parameter"),
    ("--lr_scheduler_type cosine_with_min_lr", """for example --lr_scheduler_kwargs '{"min_lr_rate": 0.1}'"""),
    ("--lr_scheduler_type warmup_stable_decay", """for example --lr_scheduler_kwargs '{"num_decay_steps": 100}'"""),
    ("""--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycle":1}""", "unexpected keyword argument 'num_cycle'"),
    ("""--lr_scheduler_type cosine --lr_scheduler_kwargs {"num_cycles":"x"} --warmup_steps 1""",
     """--lr_scheduler_kwargs '{"num_cycles": "x"}', | could not convert"""),  # which fails after the warm-up only
    ("--lr_scheduler_kwargs {num_cycles:1}", "--lr_scheduler_kwargs {num_cycles:1}: not valid JSON"),
    ("--warmup_steps 100", "--warmup_steps 100: the run has only 2 steps"),
    # numbers out of their range
    ("--max_steps 0", "--max_steps 0: give at least 1"),
    ("--num_train_epochs 0", "--num_train_epochs 0.0: give a number above 0"),
    ("--weight_decay nan", "--weight_decay nan: give a finite number"),
    ("--seed -1", "--seed -1: give at least 0, at most 4294967295"),
    ("--num_proc 0", "--num_proc 0: give at least 1"),
    ("--dataloader_num_workers -1", "--dataloader_num_workers -1: give at least 0"),
    ("--save_strategy steps --save_steps 0", "--save_steps 0.0: give a number above 0"),
    # batches
    ("--dataloader_drop_last true --per_device_train_batch_size 99", "--dataloader_drop_last leaves nothing | (99)"),
    ("--dataloader_persistent_workers true", "--dataloader_persistent_workers true: | num_workers > 0"),
    ("--max_tokens_per_batch 10", "--max_tokens_per_batch 10: | records.jsonl row"),
    ("""--accelerator_config {"nonsense":1}""", "unexpected keyword argument 'nonsense'"),
    # what decides the best model
    (f"{BEST} bleu", "--metric_for_best_model bleu scores answers, | --eval_generate true"),
    (f"{BEST} eval_los", "loss, perplexity, next_token_accuracy, | did you mean 'loss'?"),
    (f"{BEST} rouge_1 --eval_generate true", "did you mean 'rouge_l'?"),
    (f"{BEST} perplexity --greater_is_better true", "would keep the worst model: of this metric lower is better"),
    (f"{BEST} loss --eval_delay 5", "--eval_delay 5: the run ends after 1 epoch(s), before its first evaluation"),
    ("--save_strategy best --eval_strategy epoch", "--save_strategy best: name what is compared"),
    ("--load_best_model_at_end true", "--load_best_model_at_end compares evaluations: add --eval_strategy"),
    ("--eval_strategy epoch --validation_ratio 0", "--eval_strategy epoch needs a validation split"),
    ("--eval_strategy epoch --eval_do_concat_batches false", "--eval_do_concat_batches false"),
    # trackers
    ("--report_to nonsense", "--report_to nonsense: nonsense is not supported"),
    ("--report_to dagshub", "--report_to dagshub: its library is not installed"),
    # models that cannot be built, trained or saved
    ("--config_overrides n_head=5", "--config_overrides n_head=5: | divisible"),
    ("--config_overrides activation_function=geluu", "activation_function=geluu: it does not know 'geluu'"),
    (f"--model_type llama --config_overrides {LLAMA},num_key_value_heads=3", "num_key_value_heads=3: The size of"),
    (f"--model_type mixtral --config_overrides {LLAMA},num_key_value_heads=4,num_experts_per_tok=9",
     "num_experts_per_tok=9: selected index k out of range"),
    (f"--model_type bloom --config_overrides {SHAPE}", "key n_embd isn't in the original config"),
    ("--attn_implementation nonsense", '--attn_implementation nonsense: | ="nonsense"` is not supported'),
    ("--use_liger_kernel true", "--use_liger_kernel true: | liger-kernel"),
    ("""--gradient_checkpointing true --gradient_checkpointing_kwargs {"x":1}""",
     """--gradient_checkpointing_kwargs '{"x": 1}': """),  # told by the first forward pass
    ("--torch_compile_mode nonsense", "--torch_compile_mode nonsense: Unrecognized mode"),
    ("--neftune_noise_alpha 5 --batching shared_prefix", "--neftune_noise_alpha 5.0 | use --batching padded"),
    ("--bf16 true --fp16 true", "At most one of fp16 and bf16"),
    ("--deepspeed /no/such.json", "--deepspeed /no/such.json: | the path of a file"),
    ("--fsdp full_shard", "--fsdp true: Using fsdp only works in distributed training"),
    ("--adam_epsilon 0", "--adam_epsilon 0.0: give a number above 0"),
    ("--debug underflow_overflow --num_sample_generations 1 --eval_strategy epoch", "add --num_sample_generations 0"),
    # names and places
    ("--output_dir=", "say where the results go: --output_dir FOLDER"),
    ("--output_dir /proc/run", "--output_dir /proc/run: /proc cannot be written to ("),
    ("--resume_from_checkpoint /no/such",
     "--resume_from_checkpoint /no/such: no checkpoint there | start a new one with --overwrite_output_dir true"),
    ("--output_dir /dev/null/run", "/dev/null is a file"),
    ("--group_by_length true", "unknown flag --group_by_length; use train_sampling_strategy: group_by_length"),
    ("--evaluation_strategy epoch", "unknown flag --evaluation_strategy; use eval_strategy"),
    ("--warmup_ratio 0.1", "unknown flag --warmup_ratio; use warmup_steps"),
]  # fmt: skip


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """Records, and in `run` what an earlier run has left, with a checkpoint."""
    folder = tmp_path_factory.mktemp("mistakes")
    lines = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    main_of_training()(arguments(folder, "--save_strategy", "steps", "--save_steps", "2"))
    assert (folder / "run" / "checkpoint-2" / "optimizer.pt").is_file()
    return folder


def main_of_training():
    return runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]


def arguments(folder: Path, *flags: str) -> list[str]:
    places = ["--data", str(folder / "records.jsonl"), "--output_dir", str(folder / "run")]
    return [*TINY, "--config_overrides", SHAPE, *places, *SHORT, "--save_strategy", "no", *flags]


def content(folder: Path) -> dict[str, str]:
    """All paths of a folder, with a hash of each file."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


@pytest.fixture
def refused(work, monkeypatch, capsys):
    """Runs the script with flags, and returns its one line of an error; nothing was trained, nothing changed."""

    def run(*flags: str) -> str:
        before, steps = content(work / "run"), []
        counter = register_optimizer_step_pre_hook(lambda *_: steps.append(1))
        monkeypatch.setattr(sys, "argv", ["train.py", *arguments(work, *flags)])
        try:
            with pytest.raises(SystemExit) as end:
                run_script(main_of_training(), interrupted="")
        finally:
            counter.remove()
        message = end.value.code
        assert isinstance(message, str), "an exit with a text: Python prints it and ends with 1"
        assert message.startswith("error: ") and ("\n" not in message or message.startswith(CHANGED))
        assert "Traceback" not in capsys.readouterr().err
        assert not steps and content(work / "run") == before
        return message

    return run


@pytest.mark.parametrize(("flags", "words"), MISTAKES, ids=[flags for flags, _ in MISTAKES])
def test_a_mistake_costs_neither_a_step_nor_the_earlier_run(refused, flags, words):
    message = refused(*flags.split())
    for part in words.split(" | "):
        assert part in message


def test_a_model_that_cannot_be_saved_is_found_out_before_it_is_trained(refused, work, demo_tokenizer):
    """Layers that the config gives no type; their weights are left out when the model is loaded."""
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_attention_heads": 2, "num_key_value_heads": 1}
    config = AutoConfig.for_model("qwen2", vocab_size=len(demo_tokenizer), num_hidden_layers=2, **sizes)
    AutoModelForCausalLM.from_config(config).save_pretrained(work / "qwen2")
    message = refused("--model_type", "qwen2", "--config_overrides", "num_hidden_layers=1,hidden_size=16,layer_types=x")
    assert "key layer_types" in message
    run = arguments(work)[4:]  # without model_type and tokenizer_name
    flags = ["--model_name_or_path", str(work / "qwen2"), "--tokenizer_name", BASE, *run]
    flags[flags.index(SHAPE)] = "num_hidden_layers=1"
    before = content(work / "run")
    with pytest.raises(UserError, match=r"--config_overrides num_hidden_layers=1: .*`layer_types` \(2\)"):
        main_of_training()(flags)
    assert content(work / "run") == before


def test_weights_that_have_changed_since_their_run_are_no_start(work, tmp_path):
    model = shutil.copytree(work / "run" / "checkpoint-2", tmp_path / "model")
    weights = bytearray((model / "model.safetensors").read_bytes())
    weights[-3] ^= 1
    (model / "model.safetensors").write_bytes(weights)
    flags, before = arguments(work)[6:], content(work / "run")  # without model_type, tokenizer_name and shape
    with pytest.raises(UserError, match=f"{model}: model.safetensors is not what was written .its SHA-256 differs"):
        main_of_training()(["--model_name_or_path", str(model), *flags])
    assert content(work / "run") == before


def test_an_error_in_the_first_backward_pass_leaves_the_earlier_run(refused, monkeypatch):
    def backward(*args, **kwargs):
        raise RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB.")

    monkeypatch.setattr(torch.Tensor, "backward", backward)
    assert "the first step does not fit in memory (CUDA out of memory" in refused()


def test_weights_that_share_memory_unknown_to_transformers_are_found_out(refused, monkeypatch):
    """safetensors refuses them, at the first save."""
    load = models.load_model

    def load_tied(*args):
        model, origin = load(*args)
        model.transformer.h[0].ln_1.weight = model.transformer.h[0].ln_2.weight
        return model, origin

    monkeypatch.setattr(models, "load_model", load_tied)
    assert "shared tensors" in refused()


def test_a_disk_without_room_for_a_checkpoint(refused, monkeypatch):
    usage = shutil.disk_usage(ROOT)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=-(10**9)))
    message = refused("--save_strategy", "epoch")
    assert "MB free, and a save needs" in message and "optimizer" in message and "--save_only_model true" in message


def test_a_checkpoint_of_weights_alone_is_not_resumed(refused, work, tmp_path):
    checkpoint = shutil.copytree(work / "run" / "checkpoint-2", tmp_path / "checkpoint-2")
    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth", "manifest.json"):  # as --save_only_model leaves it
        (checkpoint / name).unlink()
    message = refused("--resume_from_checkpoint", str(checkpoint))
    assert f"{checkpoint} holds no optimizer" in message and f"--model_name_or_path {checkpoint}" in message


def test_a_checkpoint_of_another_shape_is_not_resumed(refused, work):
    checkpoint = str(work / "run" / "checkpoint-2")
    message = refused(
        "--resume_from_checkpoint", checkpoint, "--config_overrides", SHAPE.replace("n_embd=16", "n_embd=8")
    )
    assert message.startswith(f"{CHANGED}{checkpoint} was made with other settings")
    assert "n_embd=16,n_head=2,n_positions=256 → n_layer=1,n_embd=8" in message


def test_a_yaml_file_with_lists_in_the_place_of_numbers(work):
    path = work / "run.yaml"
    path.write_text("max_length: [64]\nseed: {a: 1}\n", encoding="utf-8")
    before = content(work / "run")
    with pytest.raises(UserError) as error:
        main_of_training()([str(path), *arguments(work)])
    assert str(error.value).splitlines() == [
        f"{path}: max_length: [64] is a list of int; give one whole number or null",
        f'{path}: seed: {{"a": 1}} is a mapping; give one whole number',
    ]
    assert content(work / "run") == before


def test_what_yaml_reads_as_false_is_the_word_no(work, tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("save_strategy: no\neval_strategy: off\nbf16: no\n", encoding="utf-8")
    [args] = parse_arguments([InstructionTrainingArguments], [str(path), "--output_dir", str(tmp_path)], "")
    assert (args.save_strategy, args.eval_strategy, args.bf16) == ("no", "no", False)


def test_an_error_about_a_flag_is_not_blamed_on_the_file(tmp_path):
    path = tmp_path / "run.yaml"
    path.write_text("learning_rate: 0.1\nload_best_model_at_end: true\n", encoding="utf-8")
    for flags, source in (
        (["--load_best_model_at_end", "false", "--accelerator_config", '{"foo": 1}'],
         "command line: --accelerator_config: "),
        (["--load_best_model_at_end", "false", "--bf16", "true", "--fp16", "true"], "command line: --bf16, --fp16: "),
        ([], f"{path}: "),
    ):  # fmt: skip
        with pytest.raises(UserError) as error:
            parse_arguments([InstructionTrainingArguments], [str(path), "--output_dir", str(tmp_path), *flags], "")
        assert str(error.value).startswith(source)


def test_a_folder_with_other_files_is_told_what_can_be_done(tmp_path):
    (tmp_path / "samples.jsonl").write_text("")
    for resume, words in ((None, "files; add --overwrite_output_dir true"), ("true", "so nothing to resume; ")):
        args = InstructionTrainingArguments(str(tmp_path), resume_from_checkpoint=resume)
        with pytest.raises(UserError, match=words) as error:
            find_checkpoint(args)
        assert "--overwrite_output_dir true" in str(error.value)
        assert "--resume_from_checkpoint true to" not in str(error.value)


def test_a_readme_of_the_users_own_is_not_replaced(tmp_path):
    (tmp_path / "README.md").write_text("# My notes")
    with pytest.raises(UserError, match=r"holds a README.md that is of no run, and the model card would replace it"):
        find_checkpoint(InstructionTrainingArguments(str(tmp_path), overwrite_output_dir=True))
    (tmp_path / "run.json").write_text("{}")
    assert find_checkpoint(InstructionTrainingArguments(str(tmp_path), overwrite_output_dir=True)) is None


def test_in_a_process_of_its_own_as_a_user_sees_it(work):
    before = content(work / "run")
    done = processes.run(
        [sys.executable, "scripts/train.py", *arguments(work, "--optim", "adamw_bnb_8bit")],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode == 1 and content(work / "run") == before
    assert done.stderr.splitlines()[-1].startswith("error: --optim adamw_bnb_8bit: ")
    assert "Traceback" not in done.stderr


def test_an_error_of_one_process_of_two_is_told_once(work):
    """The launcher ends the first process when the second, which alone met the error, has told it."""
    before = content(work / "run")
    script = work / "second_fails.py"
    script.write_text(
        "import os, runpy, sys\n"
        f"sys.path.insert(0, {str(ROOT)!r})\n"
        "import recipe.training.checks as checks\n"
        "from recipe.config import UserError\n"
        "from recipe.console import run_script\n"
        "def check(*args):\n"
        "    if os.environ['RANK'] == '1':\n"
        "        raise UserError('only here')\n"
        "checks.check_splits = check\n"
        f"run_script(runpy.run_path({str(ROOT / 'scripts' / 'train.py')!r})['main'], interrupted='')\n"
    )
    launch = ["accelerate.commands.launch", "--config_file", "configs/accelerate/two_processes.yaml"]
    done = processes.run(
        [sys.executable, "-m", *launch, "--main_process_port", "0", str(script), *arguments(work)],
        cwd=ROOT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0 and content(work / "run") == before
    lines = done.stderr.splitlines()
    assert [line for line in lines if "only here" in line] == [
        "process 1: error: only here",
        "  traceback : error: only here",
    ]
    assert "  traceback : error: only here" in lines[-15:]  # of torchrun's own report, which ends with it


def test_a_new_run_replaces_the_earlier_one_when_it_steps(work, tmp_path):
    shutil.copytree(work / "run", tmp_path / "run")
    shutil.copy(work / "records.jsonl", tmp_path)
    main_of_training()(arguments(tmp_path, "--seed", "5", "--num_sample_generations", "0"))
    assert not (tmp_path / "run" / "checkpoint-2").exists()
    assert json.loads((tmp_path / "run" / "run.json").read_text())["seed"] == 5
