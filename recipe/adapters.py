"""Adapters: LoRA by PEFT in place of full fine-tuning, what an adapter belongs to, and both as one model."""

from __future__ import annotations

import copy
import importlib.util
import re
import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from torch import nn
from transformers import BitsAndBytesConfig, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase
from transformers.pytorch_utils import Conv1D
from transformers.utils import find_adapter_config_file

from recipe.config import LoraArguments, ModelArguments, UserError
from recipe.files import read_json
from recipe.model import (
    base_model,
    check_finite,
    check_folder,
    check_weights,
    library_errors,
    load_model,
    virtual_tokens,
)
from recipe.provenance import read_run, weights_hash
from recipe.shapes import check_shape

if TYPE_CHECKING:
    from peft import PeftModel

CONFIG, WEIGHTS, ENDS = "adapter_config.json", "adapter_model.safetensors", "generation_config.json"
ALL_LINEAR = "all-linear"
CAN_BE_ADAPTED = (nn.Linear, nn.Embedding, Conv1D)
INSTALL = "pip install 'gpt2-instruction-recipe[lora]' (or pip install peft)"


class Base(NamedTuple):
    """The model that an adapter belongs to: a folder, or a Hub id at a commit; and where the adapter's files are."""

    name: str
    revision: str
    adapter: Path


# --- training -------------------------------------------------------------------------------------------------------


def check_lora(lora: LoraArguments, model_args: ModelArguments, pushes: bool) -> None:
    """Refuse an adapter that could not be trained here, or that nobody could load afterwards.

    Args:
        pushes: whether the run pushes to the Hub while it trains.

    Raises:
        UserError: PEFT or what 4 bits need is missing; no trained weights are named; the base model is changed by the
            run, or only here while the adapter is pushed.
    """
    if lora.lora_r is None:
        return
    import_peft()
    flag, name, overrides = f"--lora_r {lora.lora_r}", model_args.model_name_or_path, model_args.config_overrides or ""
    if name is None:
        raise UserError(f"{flag}: an adapter is saved without its model, which must be there: --model_name_or_path")
    changed = [key for key in re.findall(r"(?:^|,)(\w+)=", overrides) if "drop" not in key]
    if changed:
        raise UserError(
            f"{flag}: --config_overrides {overrides} changes the model ({', '.join(changed)}), and the adapter would "
            "be loaded beside the unchanged one; override dropouts alone, or leave --lora_r out"
        )
    if pushes and Path(name).is_dir():
        raise UserError(
            f"{flag} --push_to_hub: the adapter would name {name}, a folder that nobody else has; train from a Hub id, "
            "or push later with scripts/publish.py --base HUB_ID, or what scripts/merge.py writes"
        )
    if lora.load_in_4bit and not torch.cuda.is_available():
        raise UserError("--load_in_4bit: bitsandbytes needs a CUDA GPU, and there is none; leave it out")
    if lora.load_in_4bit and importlib.util.find_spec("bitsandbytes") is None:
        raise UserError("--load_in_4bit: bitsandbytes is not installed; pip install bitsandbytes, or leave it out")


def import_peft() -> Any:
    """The library, which is an extra of this package.

    Raises:
        UserError: it is not installed.
    """
    try:
        import peft
    except ImportError as error:
        raise UserError(f"adapters need PEFT, which is not installed: {INSTALL}") from error
    return peft


def quantization(lora: LoraArguments) -> BitsAndBytesConfig | None:
    """How frozen weights are kept: in 4 bits as in QLoRA (Dettmers et al. 2023, arXiv:2305.14314), or as they are."""
    if not lora.load_in_4bit:
        return None
    return BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )  # fmt: skip


def add_adapter(
    model: PreTrainedModel, lora: LoraArguments, commit: str | None = None
) -> tuple[PeftModel, dict[str, Any]]:
    """The model with a new adapter, which alone is trained; and what run.json says of it.

    Args:
        commit: of the model on the Hub, which the adapter's config names.

    Raises:
        UserError: names of layers that the model does not have, or for which PEFT has no default.

    Example::

        model, about = add_adapter(model, LoraArguments(lora_r=16))
        about["targets"], about["trained"]  # (['c_attn'], 589824)
    """
    peft = import_peft()
    targets = target_modules(model, lora.lora_target_modules)
    if lora.load_in_4bit:
        model = peft.prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    config = peft.LoraConfig(
        task_type="CAUSAL_LM", r=lora.lora_r, lora_alpha=lora.lora_alpha, lora_dropout=lora.lora_dropout,
        target_modules=targets, use_rslora=lora.use_rslora, use_dora=lora.use_dora, revision=commit,
        fan_in_fan_out=any(type(module) is Conv1D for module in model.modules()),  # how GPT-2 keeps its weights
    )  # fmt: skip
    with library_errors(f"--lora_r {lora.lora_r}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="fan_in_fan_out is set to True")  # a head beside Conv1D
        warnings.simplefilter("ignore", FutureWarning)  # what PEFT asks transformers by an old name
        adapted = peft.get_peft_model(model, config)
    found: Any = adapted.peft_config["default"].target_modules
    counts, name = [(p.numel(), p.requires_grad) for p in adapted.parameters()], str(model.name_or_path)
    return adapted, {
        "targets": [found] if isinstance(found, str) else sorted(found),
        "trained": sum(count for count, trained in counts if trained),
        "frozen": sum(count for count, trained in counts if not trained),
        "base_weights": weights_hash(name) if Path(name).is_dir() else None,
    }


def target_modules(model: PreTrainedModel, asked: list[str] | None) -> list[str] | str:
    """The names of layers to adapt, as PEFT takes them: the end of a layer's name, whole words.

    Raises:
        UserError: one names no layer, with the names that there are; none is asked, and PEFT has no default.
    """
    named = {name for name, module in model.named_modules() if isinstance(module, CAN_BE_ADAPTED)}
    known = ", ".join([*sorted({name.rpartition(".")[2] for name in named}), ALL_LINEAR])
    if asked == [ALL_LINEAR]:
        return ALL_LINEAR
    if asked:
        unknown = [each for each in asked if not any(name == each or name.endswith(f".{each}") for name in named)]
        if unknown:
            raise UserError(f"--lora_target_modules {' '.join(unknown)}: the model has {known}")
        return asked
    from peft.utils import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as DEFAULTS

    kind = model.config.model_type
    if kind not in DEFAULTS:
        raise UserError(f"PEFT has no layers to adapt by default for {kind}: give --lora_target_modules, of {known}")
    default = DEFAULTS[kind]
    return default if isinstance(default, str) else [*default]  # some are a pattern


# --- loading --------------------------------------------------------------------------------------------------------


def base_of(name: str) -> Base | None:
    """What the adapter in a folder, or of a Hub id, belongs to; None if it is a whole model.

    Raises:
        UserError: its adapter_config.json does not say it, names a folder that is not there, or a module to import.
    """
    check_folder(name)
    path = Path(name) / CONFIG
    if not Path(name).is_dir():
        with library_errors(f"model {name!r}"):
            path = Path(find_adapter_config_file(name) or path)
    if not path.is_file() or (Path(name) / "config.json").is_file():  # that is a whole model with an adapter in it
        return None
    way_out, text = "name the model that the adapter belongs to", (None, str)
    check_shape(content := read_json(path), {"base_model_name_or_path": str, "revision?": text}, str(path), way_out)
    if content.get("megatron_config"):
        raise UserError(f"{path}: with megatron_config, PEFT would import a module that this file names; remove it")
    base = Base(content["base_model_name_or_path"], content.get("revision") or "main", path.parent)
    with _told_of(name, base):
        check_folder(base.name)
    return base


@contextmanager
def _told_of(name: str, base: Base) -> Iterator[None]:
    """Errors of the base model say whose it is, and where it is looked for."""
    try:
        yield
    except UserError as error:
        raise UserError(
            f"adapter {name!r} belongs to the model {base.name!r}: {error}; start in the folder where it was trained, "
            f"or write where the model is into base_model_name_or_path in {base.adapter / CONFIG}"
        ) from error


def load_adapter(
    config: ModelArguments, base: Base, tokenizer: PreTrainedTokenizerBase
) -> tuple[PeftModel, GenerationConfig | None]:
    """The base model with its adapter, in `config.dtype`, and the base model's own generation config.

    Raises:
        UserError: PEFT is missing; the base model cannot be found, or has other weights than the adapter was trained
            with; the adapter does not fit it, is not whole, or its weights are no safetensors.
    """
    peft, name = import_peft(), str(config.model_name_or_path)
    if Path(name).is_dir():
        check_weights(name)
    else:  # beside its config, in the cache
        with library_errors(f"adapter {name!r}"):
            hf_hub_download(name, WEIGHTS, revision=base.adapter.name)
            with suppress(EntryNotFoundError):
                hf_hub_download(name, ENDS, revision=base.adapter.name)
    check_finite(str(base.adapter))
    with _told_of(name, base):
        wanted = ((read_run(base.adapter) or {}).get("adapter") or {}).get("base_weights")
        if wanted and Path(base.name).is_dir() and (found := weights_hash(base.name)) != wanted:
            raise UserError(f"its weights are others ({found}) than those it was trained with ({wanted})")
        whole = replace(config, model_name_or_path=base.name, model_revision=base.revision)
        model, _ = load_model(whole, tokenizer)
    own = copy.deepcopy(model.generation_config)
    with library_errors(f"adapter {name!r} does not fit the model {base.name!r}"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would be as if untrained
        adapted = peft.PeftModel.from_pretrained(model, str(base.adapter), torch_device="cpu")
    if (base.adapter / ENDS).is_file():  # PEFT itself saves none
        with library_errors(f"adapter {name!r}: {ENDS}"):
            model.generation_config = GenerationConfig.from_pretrained(str(base.adapter))
    return adapted, own


@torch.no_grad()
def merged(model: PeftModel, name: str) -> PreTrainedModel:
    """The whole model, with the adapter added to its weights; `name` is that of the adapter.

    Raises:
        UserError: it computes other logits than both apart. So it is with an adapted head that shares its weight with
            the embedding; or it is an adapter that cannot be added to weights, as of prompt tuning.
    """
    if virtual_tokens(model):
        raise UserError(f"{name}: prompt and prefix tuning put tokens before a text, which no weights can hold")
    inner = base_model(model).eval()
    ids = torch.arange(min(32, inner.get_input_embeddings().num_embeddings))[None]  # type: ignore[operator]
    apart = inner(ids, use_cache=False).logits.float()
    whole: Any = model.merge_and_unload()
    off = (whole(ids, use_cache=False).logits.float() - apart).norm() / apart.norm()
    if not off < (1e-4 if whole.dtype == torch.float32 else 0.05):
        raise UserError(
            f"{name}: merged, the logits are off by {off:.0e} of their size; keep the adapter, or train one without "
            "the head (--lora_target_modules all-linear)"
        )
    return whole


class Models:
    """Opens models, one at a time; an adapter and its base model are one in memory, the base with the adapter off.

    Example::

        models = Models(["recipe/demo/base", "outputs/adapter"])
        with models.opened(ModelArguments("recipe/demo/base"), tokenizer) as model: ...
        with models.opened(ModelArguments("outputs/adapter"), tokenizer) as model: ...  # loads nothing
    """

    def __init__(self, names: Collection[str]) -> None:
        self.bases = {name: base for name in names if (base := base_of(name))}
        self._loaded: tuple[str, PeftModel, GenerationConfig | None] | None = None

    def revision(self, name: str) -> str:
        """At which a model is asked: of a base, that of which the adapter was trained."""
        return next((base.revision for base in self.bases.values() if base.name == name), "main")

    @contextmanager
    def opened(self, config: ModelArguments, tokenizer: PreTrainedTokenizerBase) -> Iterator[PreTrainedModel]:
        name = str(config.model_name_or_path)
        owner = next((each for each, base in self.bases.items() if name in (each, base.name)), None)
        if owner is None or (self._loaded and self._loaded[0] != owner):
            self._loaded = None  # before the next one needs the memory
        if owner is None:
            yield load_model(config, tokenizer)[0]
            return
        if self._loaded is None:
            adapter = replace(config, model_name_or_path=owner)
            self._loaded = owner, *load_adapter(adapter, self.bases[owner], tokenizer)
        _, model, own = self._loaded
        if name == owner:
            yield model  # type: ignore[misc]
            return
        inner: Any = base_model(model)
        tuned, inner.generation_config = inner.generation_config, copy.deepcopy(own)
        try:
            with model.disable_adapter():
                yield model  # type: ignore[misc]
        finally:
            inner.generation_config = tuned
