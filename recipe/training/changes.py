"""A resumed run is the run that was begun: what has changed is refused by name, or allowed by name and applied."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import fields
from enum import Enum
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import Trainer

from recipe.config import UserError
from recipe.console import process_rank
from recipe.data.streaming import RecordStream, files_hash
from recipe.manifest import about
from recipe.setting_checks import did_you_mean
from recipe.training.errors import Settings

# settings that no weight depends on: where things are written and shown, how often is evaluated and saved, processes
FREE = re.compile(
    "output_dir|overwrite_output_dir|resume_from_checkpoint|allow_changed|data|num_proc|bad_records|max_bad_records|hub_.*|push_to_hub"
    "|logging_.*|log_.*|include_.*|disable_tqdm|report_to|run_name|project|trackio_.*|skip_memory_metrics|debug|do_.*"
    "|save_.*|eval_.*|per_device_eval_batch_size|prediction_loss_only|batch_eval_metrics|.*_full_eval|use_cache"
    "|load_best_model_at_end|num_sample_generations|generation_max_new_tokens|torch_empty_cache_steps"
    "|dataloader_(num_workers|pin_memory|persistent_workers|prefetch_factor|multiprocessing_context|in_order)"
    "|ddp_.*|local_rank|use_cpu|accelerator_config|enable_jit_checkpoint|restore_callback_states_from_checkpoint"
    "|length_column_name|label_names|remove_unused_columns|average_tokens_across_devices"
    # together, as records of a step; and as what accelerate came to
    "|per_device_train_batch_size|gradient_accumulation_steps|bf16|fp16"
)
RECORDS_AT_ONCE = 10_000
# hyperparameters of an optimizer, which a checkpoint's would replace, by the flags that set them
OF_OPTIMIZER = {
    "learning_rate": ("lr", "initial_lr"),
    "weight_decay": ("weight_decay",),
    "adam_beta1": ("betas",),
    "adam_beta2": ("betas",),
    "adam_epsilon": ("eps",),
}
# the state of one optimizer or model is none of another, and what the checkpoint holds would replace the new value
NEVER = ("optim", "optim_args", "optim_target_modules", "model_type", "lora_r", "lora_alpha", "lora_target_modules",
         "use_rslora", "use_dora", "base_weights")  # fmt: skip


def what_decides(settings: Settings, trainer: Trainer) -> dict[str, Any]:
    """The settings and the data that a run's weights follow from, as the manifest of each checkpoint keeps them.

    Returns:
        `settings`: by name, as JSON holds them. Batch size, accumulation and processes count together, as the records
        of a step. `data`: by split, how many records and a hash of their tokens and targets, in their order.
    """
    args = settings.training
    found: dict[str, Any] = {}
    for part in (settings.model, settings.data, settings.lora, args):
        found |= {f.name: _plain(getattr(part, f.name)) for f in fields(part) if not FREE.fullmatch(f.name)}
    batch, steps, processes = trainer._train_batch_size, args.gradient_accumulation_steps, args.world_size
    if args.max_tokens_per_batch is None:
        found["records_per_step"] = batch * steps * processes
    else:
        found |= {"gradient_accumulation_steps": steps, "processes": processes}
        found["collator"] = type(trainer.data_collator).__name__  # what the budget counts
    found["mixed_precision"] = trainer.accelerator.mixed_precision
    if settings.data.streaming:  # who reads what
        found |= {"processes": processes, "dataloader_num_workers": args.dataloader_num_workers}
    splits = {"train": trainer.train_dataset, "validation": trainer.eval_dataset}
    data = {name: _about_records(split) for name, split in splits.items() if isinstance(split, Dataset)}
    if isinstance(trainer.train_dataset, RecordStream):
        data["train"] = {"rows": len(trainer.train_dataset.files), "hash": files_hash(trainer.train_dataset)}
    return {"settings": found, "data": data}


def refuse_changes(now: Mapping[str, Any], checkpoint: str, allowed: Sequence[str]) -> list[str]:
    """What a resumed run changes of what its checkpoint was made with, each in words; all of it was allowed.

    Args:
        now: see `what_decides`.
        allowed: names that may change: of settings, and `data`.

    Raises:
        UserError: something else changes, or what no checkpoint can be resumed with; names each, old and new.
    """
    before = about(Path(checkpoint))
    if "settings" not in before:
        if process_rank() == "0":
            print(f"{checkpoint} does not tell the settings it was made with: whether they have changed is not known")
        return []
    known = [*now["settings"], "data"]
    for name in allowed:
        if name not in known:
            raise UserError(f"--allow_changed {name}: no setting that weights depend on{did_you_mean(name, known)}")
    found = _differences(before, now)
    refused = [name for name in found if name not in allowed or name in NEVER]
    if refused:
        changes = [f"  {words}" for name in refused for words in found[name]]
        names = [name for name in refused if name not in NEVER]
        ways = [f"allow them with --allow_changed {' '.join(names)}"] if names == refused else []
        ways = ["give the former ones again", *ways, "start a new run in another --output_dir"]
        first = f"--resume_from_checkpoint: {checkpoint} was made with other settings or data than are given now:"
        raise UserError("\n".join([first, *changes, ", or ".join(ways)]))
    return [words for each in found.values() for words in each]


def _differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> dict[str, list[str]]:
    """By the name that allows it, what differs: old and new."""
    old, new = before["settings"], now["settings"]
    found = {
        name: [f"{name}: {_shown(old[name])} → {_shown(new[name])}"]
        for name in new  # a version of the library that does not know a setting does not change it
        if name in old and old[name] != new[name]
    }
    for split in dict.fromkeys([*before["data"], *now["data"]]):
        one, other = (side["data"].get(split, {"rows": 0, "hash": None}) for side in (before, now))
        if one != other:
            kind = "files" if "streaming" in new and new["streaming"] and split == "train" else "records"
            counts = f"{one['rows']:,} → {other['rows']:,} {kind}" if one["rows"] != other["rows"] else kind
            words = f"data: the {split} {counts}, with other tokens or in another order"
            found.setdefault("data", []).append(words)
    return found


def apply_changed(trainer: Trainer, given: Sequence[Mapping[str, Any]], allowed: Sequence[str]) -> None:
    """Give the optimizer of a checkpoint the new hyperparameters that may change, and the run its new schedules.

    Args:
        given: the optimizer's groups as the settings made them, before the checkpoint was read.
    """
    assert trainer.optimizer is not None
    groups = trainer.optimizer.param_groups
    for flag in allowed:
        for name in OF_OPTIMIZER.get(flag, ()):
            for group, new in zip(groups, given, strict=True):
                if name == "lr" and "initial_lr" in group and group["initial_lr"]:
                    group["lr"] *= new["initial_lr"] / group["initial_lr"]  # where the schedule is
                elif name in new:
                    group[name] = new[name]
    if "learning_rate" in allowed:
        scheduler: Any = trainer.lr_scheduler
        if hasattr(scheduler, "base_lrs"):
            scheduler.base_lrs = [group["initial_lr"] for group in groups]
    # the checkpoint's would count: how often is logged, evaluated and saved
    trainer.state.compute_steps(trainer.args, trainer.state.max_steps)


def _about_records(split: Dataset) -> dict[str, Any]:
    digest = hashlib.sha256()
    columns = [name for name in ("input_ids", "labels", "ends") if name in split.column_names]
    for start in range(0, len(split), RECORDS_AT_ONCE):
        table = split.select_columns(columns).with_format("arrow")[start : start + RECORDS_AT_ONCE]
        for name in columns:
            lists = table[name].combine_chunks()
            lengths = np.asarray(lists.value_lengths().fill_null(0)).astype(np.int64)
            digest.update(lengths.tobytes() + np.asarray(lists.flatten()).astype(np.int64).tobytes())
    return {"rows": len(split), "hash": f"sha256:{digest.hexdigest()[:16]}"}


def _plain(value: Any) -> Any:
    value = value.value if isinstance(value, Enum) else value
    return json.loads(json.dumps(value, default=lambda other: getattr(other, "value", None) or str(other)))


def _shown(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
