"""Where results come from: versions, weights, machine, command, and the run.json of a training run."""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
import platform
import shlex
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args, get_origin, get_type_hints

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import HfHubHTTPError
from transformers.utils import find_adapter_config_file

from recipe.config import DataArguments, ModelArguments, UserError
from recipe.files import file_hash, is_there, read_sealed
from recipe.redaction import HUB_TOKEN, SECRET_FLAG, hide_in_addresses

if TYPE_CHECKING:
    from transformers import Trainer

PACKAGES = ("torch", "transformers", "datasets", "accelerate", "evaluate", "tokenizers")


def versions() -> dict[str, str]:
    """Versions of Python and of the libraries that decide the numbers."""
    return {"python": platform.python_version(), **{name: importlib.metadata.version(name) for name in PACKAGES}}


def weights_hash(model: str, revision: str = "main") -> str | None:
    """What identifies a model's weights: a hash of its safetensors files, or the commit of a Hub id.

    Raises:
        UserError: a Hub id that cannot be found.
    """
    if not Path(model).is_dir():
        try:
            config = find_adapter_config_file(model, revision=revision)
            return Path(config or hf_hub_download(model, "config.json", revision=revision)).parent.name
        except (HfHubHTTPError, OSError, ValueError) as error:
            raise UserError(f"model {model!r}: {' '.join(str(error).split())[:300]}") from error
    hashes = [file_hash(path) for path in sorted(Path(model).glob("*.safetensors"))]
    if len(hashes) == 1:
        return hashes[0]
    return f"sha256:{hashlib.sha256(repr(hashes).encode()).hexdigest()[:16]}" if hashes else None


def hardware() -> str:
    """The machine in words: its accelerators, or its processor and cores."""
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores"


def command_line() -> str:
    """The command that started this process, ready for a shell, without its secrets.

    Addresses lose user, password and secret parameters; flags such as `--hub_token` their value: `--hub_token
    '<HUB_TOKEN>'`.
    """
    words, secret = [], None  # what replaces the next word, if that is the value of a secret flag
    for word in sys.argv:
        name, equals, _ = word.partition("=")
        placeholder = f"<{name.strip('-').replace('-', '_').upper()}>" if SECRET_FLAG.fullmatch(name) else None
        if placeholder and equals:
            word = f"{name}={placeholder}"
        elif secret and not word.startswith("--"):
            word = secret
        secret = None if equals else placeholder
        words.append(HUB_TOKEN.sub("<HUB_TOKEN>", hide_in_addresses(word, instead="", every_user=True)))
    return shlex.join([Path(sys.executable).name, *words])


def describe_run(
    model_args: ModelArguments, data_args: DataArguments, trainer: Trainer, attention: str | None
) -> dict[str, Any]:
    """For `run.json`: how a run was started, and what runs.

    `config` is what was asked, `ran` what came of it: accelerate's file and environment variables decide too.
    `attention` is the implementation that the model uses.
    """
    args = trainer.args
    return {
        "command": command_line(),
        "versions": versions(),
        "hardware": hardware(),
        "seed": args.seed,
        "processes": args.world_size,
        "ran": what_ran(trainer) | {"attention": attention},
        "config": {"model": asdict(model_args), "data": asdict(data_args), "training": args.to_dict()},
    }


def what_ran(trainer: Trainer) -> dict[str, Any]:
    """The settings of a run that is set up, read where they take effect."""
    args, accelerator = trainer.args, trainer.accelerator
    optimizer: Any = getattr(trainer.optimizer, "optimizer", trainer.optimizer)  # without accelerate's wrapper
    model: Any = trainer.model
    return {
        "device": str(args.device),
        "gpus_per_process": args.n_gpu,
        "distributed": accelerator.distributed_type.value.lower(),
        "weights": str(model.dtype).removeprefix("torch."),
        "mixed_precision": accelerator.mixed_precision,
        "float32_matmul": torch.get_float32_matmul_precision(),
        "compiler": accelerator.state.dynamo_plugin.backend.value.lower(),
        "optimizer": type(optimizer).__name__,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "data_seed": args.seed if args.data_seed is None else args.data_seed,
    }


def read_run(output_dir: str | Path) -> dict[str, Any] | None:
    """The `run.json` of a training run's folder, or of the run that a `checkpoint-N` belongs to; None without one.

    Raises:
        UserError: the file is not what a training run writes.
    """
    folder = Path(output_dir)
    path = (folder.parent if folder.name.startswith("checkpoint-") else folder) / "run.json"
    if not is_there(path):
        return None
    shapes = {f"{f.name}?": _shape_of(get_type_hints(DataArguments)[f.name]) for f in fields(DataArguments)}
    shapes["data"] = shapes.pop("data?")
    training = {"load_best_model_at_end?": bool}
    way_out = "train again or remove it"
    adapter = (None, {"base_weights": (None, str)})
    shape = {"config": {"data": shapes, "training": training}, "data_hash": str, "adapter?": adapter}
    run = read_sealed(path, shape, way_out)
    settings = run["config"]["data"]
    for name in sorted(settings.keys() - {shape.rstrip("?") for shape in shapes}):
        del settings[name]
        print(
            f"note: {path}: the setting {name!r} of the data is unknown to this version, and left out", file=sys.stderr
        )
    try:
        DataArguments(**settings)
    except UserError as error:
        raise UserError(f"{path}: config.data: {error}; {way_out}") from error
    return run


def _shape_of(hint: Any) -> Any:
    """The shape, see `recipe.shapes`, of what a setting of this type may be."""
    if get_origin(hint) is Literal:
        return set(get_args(hint))
    shapes = {dict: {str: (str, [str])}, list: [(str, {"path": (str, [str], {str: (str, [str])})})], type(None): None}
    return tuple(_shape_of(one) for one in get_args(hint)) or shapes.get(hint, hint)
