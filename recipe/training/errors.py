"""Errors of libraries before the first step, told as what they nearly always are: settings that do not work."""

from __future__ import annotations

import json
import textwrap
import traceback
from dataclasses import MISSING, Field, dataclass, field, fields
from enum import Enum
from pathlib import Path
from typing import Any

from recipe.config import DataArguments, InstructionTrainingArguments, LoraArguments, ModelArguments, UserError
from recipe.disk import disk_error
from recipe.memory import is_out_of_memory
from recipe.peers import peer_error

# Which settings a function reads: they are named if an error comes out of it, the innermost function first.
BATCHES = ("max_tokens_per_batch", "train_sampling_strategy", "accelerator_config", "data_seed", *(
    f"dataloader_{name}" for name in ("num_workers", "prefetch_factor", "multiprocessing_context",
                                      "persistent_workers", "drop_last")
))  # fmt: skip
COMPILER = ("torch_compile", "torch_compile_backend", "torch_compile_mode")
MODEL = (*COMPILER, "model_type", "config_overrides", "attn_implementation", "dtype", "batching", "use_liger_kernel",
         "bf16", "fp16", "debug")  # fmt: skip
CHECKPOINTING = ("gradient_checkpointing", "gradient_checkpointing_kwargs")  # transformers copies the new names to them
SHARDING = ("fsdp", "deepspeed", "parallelism_config")
SETTINGS_OF = {
    "create_optimizer": ("optim", "optim_args", "optim_target_modules", "learning_rate", "weight_decay", "adam_beta1",
                         "adam_beta2", "adam_epsilon"),
    "create_scheduler": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    "check_schedule": ("lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps"),
    "get_train_dataloader": BATCHES,
    "train_batches": BATCHES,
    "create_accelerator_and_postprocess": (*SHARDING, *COMPILER, "fp16", "bf16", "accelerator_config"),
    "prepare_model": (*COMPILER, *SHARDING),
    "add_callback": ("report_to",),
    "on_train_begin": ("report_to", "run_name", "project"),
    "apply_liger_kernel": ("use_liger_kernel", "liger_kernel_config"),
    "activation_checkpointing_enable": CHECKPOINTING,
    "checkpoint": CHECKPOINTING,
    "activate_neftune": ("neftune_noise_alpha",),
    "try_save": ("config_overrides", "model_type", "template"),
    "try_answer": ("config_overrides", "eval_generate", "num_sample_generations"),
    "try_evaluation": ("eval_do_concat_batches", "eval_use_gather_object", "include_for_metrics", *MODEL),
    "compute_loss": MODEL,
    "training_step": MODEL,
    "train": ("resume_from_checkpoint", *SHARDING, "debug"),
    "make_trainer": (*SHARDING, "accelerator_config", "batch_eval_metrics"),
}  # fmt: skip
EXAMPLES = {  # of what a schedule needs beside its name
    "cosine_with_min_lr": """--lr_scheduler_kwargs '{"min_lr_rate": 0.1}'""",
    "cosine_warmup_with_min_lr": """--lr_scheduler_kwargs '{"min_lr_rate": 0.1}'""",
    "warmup_stable_decay": """--lr_scheduler_kwargs '{"num_decay_steps": 100}'""",
}
SPEAKS_FOR_ITSELF = (ValueError, RuntimeError, ImportError, OSError)  # other errors need their name and place beside
PLAIN = (str, int, float, list, dict)  # what a user writes; transformers makes objects of some settings
LONGEST = 500  # characters of a library's text


@dataclass(frozen=True)
class Settings:
    """All settings of a run."""

    model: ModelArguments
    data: DataArguments
    training: InstructionTrainingArguments
    lora: LoraArguments = field(default_factory=LoraArguments)

    def asked(self, names: tuple[str, ...]) -> list[str]:
        """Those of the named settings that differ from their default, as flags with their values.

        >>> Settings(ModelArguments(dtype="float16"), DataArguments(), InstructionTrainingArguments("x")).asked(MODEL)
        ['--dtype float16']
        """
        found = {}
        for part in (self.model, self.data, self.training, self.lora):
            for setting in fields(part):
                value = getattr(part, setting.name)
                if setting.name in names and isinstance(value, PLAIN) and value not in (_default(setting), []):
                    found[setting.name] = value
        return [f"--{name} {_written(found[name])}" for name in names if name in found]


def _default(setting: Field) -> Any:
    return setting.default if setting.default_factory is MISSING else setting.default_factory()


def _written(value: Any) -> str:
    if isinstance(value, Enum):
        return str(value.value)
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list):
        return " ".join(map(str, value))
    return repr(json.dumps(value, default=str)) if isinstance(value, dict) else str(value)


def explain_error(error: Exception, settings: Settings) -> Exception:
    """One line for an error before the first step: the settings it comes from, what the library says, and a way out.

    What tells its own story, or is none of the user's, is returned as it is.
    """
    if is_out_of_memory(error):
        return out_of_memory(error, "the first step")
    known = isinstance(error, UserError | FloatingPointError | BrokenPipeError)
    if known or disk_error(error) or peer_error(error):
        return error
    said, frames = _said(error), traceback.extract_tb(error.__traceback__)
    if not isinstance(error, SPEAKS_FOR_ITSELF) and frames:
        place = "/".join(Path(frames[-1].filename).parts[-2:])
        said = f"{said} ({type(error).__name__} in {place}, line {frames[-1].lineno})"
    stages = [SETTINGS_OF[frame.name] for frame in reversed(frames) if frame.name in SETTINGS_OF]
    asked = next(
        filter(None, map(settings.asked, stages)), ["before the first step, from a setting or accelerate's file"]
    )
    example = (
        EXAMPLES.get(settings.training.lr_scheduler_type) if any("lr_scheduler" in flag for flag in asked) else None
    )
    return UserError(f"{', '.join(asked)}: {said}" + (f"; for example {example}" if example else ""))


def out_of_memory(error: Exception, what: str) -> UserError:
    """What to lower where memory was full: in a training step, or in an evaluation."""
    frames = {frame.name for frame in traceback.extract_tb(error.__traceback__)}
    remedy = (
        "--per_device_train_batch_size or --max_tokens_per_batch and raise --gradient_accumulation_steps, or add "
        "--gradient_checkpointing true"
    )
    if frames & {"evaluate", "evaluation_loop", "generate_responses"}:
        what, remedy = f"an evaluation ({what})", "--per_device_eval_batch_size"
    return UserError(f"{what} does not fit in memory ({_said(error)}); lower {remedy}")


def _said(error: Exception) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    return textwrap.shorten(said, LONGEST, placeholder=" ...")
