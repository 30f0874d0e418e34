"""Whether a model keeps the examples of a shared row apart: by what its config says, and by trying a few examples."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from accelerate import PartialState
from accelerate.utils import broadcast_object_list, send_to_device
from torch import nn
from transformers import PreTrainedConfig, PreTrainedModel, TrainingArguments

from recipe.collator import IGNORE_INDEX, DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.model import base_model, virtual_tokens
from recipe.segments import Opaque

Layout = Literal["padded", "mask", "segments"]

FULL_ATTENTION = {"full_attention", "attention", "moe", "mlp"}  # types of layers that have no state and no window
# fields of a config by which a layer sees neighbours, blocks or a choice of tokens of the row, instead of what a mask
# shows. A window longer than the examples tried would not be found by trying.
OTHER_THAN_FULL = re.compile(
    "window|chunk|local_att|conv|mamba|ssm|lru|recurrent|linear_attn|linear_key|index_topk|block_size|block_types|"
    "compress|ngram|alibi|prefix_lm|rel_extent|cca_time|state_size"
)
HARMLESS = {"chunk_size_feed_forward", "max_window_layers", "use_sliding_window"}
NOT_FOR_THE_MODEL = ("labels", "shift_labels", "row", "example", "lengths", "examples", "supervised")
# the examples tried, as a tree: tokens of a run, and the runs below it; one may be empty, where an example ends
TREE = ((11, ((5, ((4, ()), (0, ()), (7, ()))), (9, ()), (14, ((3, ()), (6, ()))))), (7, ()), (6, ((4, ()), (12, ()))))
NOISE = 8  # times as much as a padded batch may a row differ from single examples, or 32 times the type's rounding
GRADIENT_NOISE = 1e-5  # of gradients, at least so much counts as that of a padded batch: they are sums over tokens
# by how much padding itself may change logits, relative to their size: models that see later tokens are far above
PADDING_LIMIT = {torch.float64: 1e-4, torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.25}


def why_not(model: nn.Module, layout: Layout) -> str | None:
    """Why batches of this layout would train a model on another loss than single examples; None if they would not.

    Call it on all processes, before the model is wrapped: the main process tries the examples and tells the others.
    """
    reason = None if layout == "padded" else why_never_one_row(model)
    if reason is None:
        tried = [why_logits_differ(model, layout) if PartialState().is_main_process else None]
        reason = broadcast_object_list(tried)[0]
    return reason


def why_never_one_row(model: nn.Module) -> str | None:
    """What the class and the config of a model say against a shared row; None if nothing."""
    if virtual_tokens(model):
        return "prompt and prefix tuning put virtual tokens before each row, not before each example"
    base: Any = base_model(model)
    kind, config = type(base).__name__, base.config.get_text_config(decoder=True)
    missing = {"logits_to_keep", "position_ids"} - inspect.signature(base.forward).parameters.keys()
    if missing:
        return f"{kind} does not take {' and '.join(sorted(missing))}"
    if not takes_boolean_mask(base):
        return f"{kind} has no attention in which a mask could separate the examples of a row"
    if window := _window(config):
        return f"{kind} attends to a window of {window} tokens, which a shared row does not respect"
    others = set(getattr(config, "layer_types", None) or ()) - FULL_ATTENTION
    if others:
        return f"{kind} has layers of the type {', '.join(sorted(others))}, which do not keep examples of a row apart"
    if any(type(module) is nn.Conv1d for module in model.modules()):
        return f"{kind} has convolutions, which run over the examples of a row"
    if field := _field_other_than_full(config):
        return f"{kind} does not attend to all tokens ({field}), which a shared row does not respect"
    return None


def takes_boolean_mask(model: PreTrainedModel) -> bool:
    """Whether the model can compute SDPA attention; transformers keeps it in a private field of the class alone."""
    return model._supports_sdpa


def _window(config: PreTrainedConfig) -> int | None:
    """The window of attention that is in force in some layers, in tokens; refused even if no example is longer."""
    layers, window = getattr(config, "layer_types", None), getattr(config, "sliding_window", None)
    return window if layers is None or "sliding_attention" in layers else None


def _field_other_than_full(config: PreTrainedConfig) -> str | None:
    """The first field by which some layers attend to less than the row, as name=value."""
    full_everywhere = bool(getattr(config, "layer_types", None))  # then a window or chunk is that of no layer
    for name, value in sorted(config.to_dict().items()):
        window = "window" in name or "chunk" in name
        if OTHER_THAN_FULL.search(name) and name not in HARMLESS and value and not (window and full_everywhere):
            return f"{name}={value}"
    return None


def why_logits_differ(model: nn.Module, layout: Layout) -> str | None:
    """Whether a batch gives a few made-up examples other logits than each has alone, with the model as it is.

    Everything is computed in evaluation mode and without gradients, and leaves no trace in the model or in a generator
    of random numbers. A row may differ as little as a padded batch does in the model's own type. What counts is the
    median over the targets of an example, so that one token which rounding sends to another expert does not decide.

    Returns:
        A reason to refuse, or None. Also None where the weights are not here: sharded by DeepSpeed, or on no device.
    """
    kind = type(base_model(model)).__name__
    if any(parameter.is_meta or parameter.numel() == 0 for parameter in model.parameters()):
        return None
    try:
        logits, gradients = differences(model, layout)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # whatever a model raises when it is given such a batch
        if layout == "padded":
            return None  # the first step fails too, and names the settings that it comes from
        text = str(error).strip().partition("\n")[0]
        return f"{kind} fails on such a batch ({type(error).__name__}: {text[:120]})"
    dtype = _computing_type(model)
    if logits.padded > PADDING_LIMIT.get(dtype, 0.25):
        return (
            f"the logits of {kind} depend on later tokens or on the other examples of a batch "
            f"(by {logits.padded:.0e} of their size), so it would not learn to predict"
        )
    rounding = 4 * torch.finfo(dtype).eps
    if logits.row > NOISE * max(logits.padded, rounding):
        return f"{kind} does not keep the examples of a row apart: its logits are off by {logits.row:.0e} of their size"
    if gradients.row > NOISE * max(gradients.padded, rounding, GRADIENT_NOISE):
        return f"{kind} learns something else from such a row: gradients are off by {gradients.row:.0e} of their size"
    return None


class Difference(NamedTuple):
    """How far a row, and a padded batch, are from single examples; relative, of the example where it is largest."""

    row: float
    padded: float


def _computing_type(model: nn.Module) -> torch.dtype:
    weights = next(p for p in model.parameters() if p.is_floating_point())
    device = weights.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else weights.dtype


def compiles_blocks(args: TrainingArguments) -> bool:
    """Whether `torch.compile` compiles each block of the model (accelerate's regional compilation).

    The head stays ours then, and segments are attended to between two graphs. Several processes and DeepSpeed compile
    the whole model as it is wrapped, which nobody has tried otherwise.
    """
    alone = args.world_size == 1 and args.deepspeed_plugin is None and not args.fsdp_plugin_args
    return bool(args.torch_compile) and alone


def fitting_collator(
    model: nn.Module, collator: DataCollatorWithSharedPrefix
) -> tuple[DataCollatorWithSharedPrefix | DataCollatorForInstructionTuning, str | None]:
    """The collator, or the next simpler one with which the model learns the same as from single examples; and why.

    Call it where the model will train, in its precision. Segments fall back to a mask, a mask to padding.

    Raises:
        ValueError: the config of the model says that a row does not fit it, or padding does not fit it either.
    """
    if reason := why_never_one_row(model):
        raise ValueError(f"DataCollatorWithSharedPrefix: {reason}; use DataCollatorForInstructionTuning")
    pad, reasons = collator.pad_token_id, []
    fitting: list[Any] = [collator]
    if collator.attention == "segments":
        fitting.append(DataCollatorWithSharedPrefix(pad, "mask", collator.pad_to_multiple_of))
    fitting.append(DataCollatorForInstructionTuning(pad))
    for each in fitting:
        layout: Layout = getattr(each, "attention", "padded")
        if (reason := why_not(model, layout)) is None:
            break
        reasons.append(reason)
    else:
        raise ValueError(f"{reasons[-1]}; give another model or another attention")
    if not reasons:
        return collator, None
    name = {"mask": "one row with a mask", "padded": "padded batches"}[layout]
    note = f"The batches of this run are {name}, because {'; '.join(dict.fromkeys(reasons))}"
    PartialState().print(note)
    return each, note


def differences(model: nn.Module, layout: Layout) -> tuple[Difference, Difference]:
    """How far logits and gradients in a batch of this layout, and in a padded one, are from those of single examples.

    Logits relative to their deviation from their mean; gradients are those of the first of the smallest weights, which
    all layers have a part in. Weights without a gradient tell nothing: half of a new LoRA adapter, as the other is 0.
    """
    features = example_features(base_model(model))
    padded = DataCollatorForInstructionTuning(0)(features)
    row = None if layout == "padded" else DataCollatorWithSharedPrefix(0, layout)(features)
    trained = [each for each in model.parameters() if each.requires_grad and each.is_floating_point()]
    with _evaluating(model), torch.set_grad_enabled(bool(trained)):
        # an example alone has its last token too, which the batches leave out: no earlier logits may depend on it
        alone = [_logits(model, {"input_ids": torch.tensor([each["input_ids"]])})[0] for each in features]
        in_padded = _logits(model, padded)
        in_row = None if row is None else _logits(model, row)[0]
        wanted, of_padding, of_row = [], [], []  # logits of the targets of each example
        for index, logits in enumerate(alone):
            targets = (padded["labels"][index] != IGNORE_INDEX).to(logits.device)
            wanted.append(logits[:-1][targets[: len(logits) - 1]])  # (targets, vocab)
            of_padding.append(in_padded[index][targets])
            if row is not None and in_row is not None:
                of_row.append(in_row[(row["example"] == index).to(logits.device)])
        found = [of_row, of_padding]
        off = Difference(*(max(map(_difference, each, wanted), default=0.0) for each in found))
        if not trained:
            return off, Difference(0.0, 0.0)
        learned = padded["labels"][padded["labels"] != IGNORE_INDEX]
        smallest = sorted(trained, key=torch.numel)
        weights = next((each for each in smallest if _gradient(wanted, learned, each).any()), smallest[0])
        expected, *gradients = (_gradient(each or wanted, learned, weights) for each in (wanted, *found))
        distances = ((each - expected).norm() / expected.norm().clamp_min(1e-30) for each in gradients)
    return off, Difference(*(float(each.nan_to_num(nan=float("inf"))) for each in distances))


def _gradient(logits: list[torch.Tensor], targets: torch.Tensor, weights: nn.Parameter) -> torch.Tensor:
    """Of the summed loss, as float64."""
    together = torch.cat(logits)
    loss = nn.functional.cross_entropy(together, targets.to(together.device), reduction="sum")
    gradient = torch.autograd.grad(loss, weights, retain_graph=True, allow_unused=True)[0]
    return (torch.zeros_like(weights) if gradient is None else gradient).double()


def example_features(model: PreTrainedModel) -> list[dict[str, Any]]:
    """Examples of different lengths, some with a prefix in common; their tokens are no special ones."""
    embeddings: Any = model.get_input_embeddings()
    head: Any = model.get_output_embeddings()  # some embed tokens that they never predict
    vocabulary = min(embeddings.num_embeddings, getattr(head, "out_features", None) or embeddings.num_embeddings)
    config = model.config.to_dict() | model.config.get_text_config(decoder=True).to_dict()
    special = {value for name, value in config.items() if name.endswith("token_id") and isinstance(value, int)}
    tokens = [token for token in range(vocabulary) if token not in special]
    generator = torch.Generator().manual_seed(0)
    features: list[dict[str, Any]] = []

    def draw(count: int) -> list[int]:
        return [tokens[i] for i in torch.randint(len(tokens), (count,), generator=generator).tolist()]

    def grow(before: list[int], tree: tuple) -> None:
        for length, below in tree:
            ids = before + draw(length)
            if below:
                grow(ids, below)
            else:  # the token after what it shares is predicted from the last that it shares
                first = max(1, min(len(before), len(ids) - 1))
                labels = [IGNORE_INDEX] * first + ids[first:]
                features.append({"input_ids": ids, "labels": labels, "row": len(features)})

    grow([], TREE)
    return features


def model_inputs(batch: dict[str, Any]) -> dict[str, Any]:
    """What a model takes of a batch; the segments as one value, so that `torch.compile` makes one graph for all."""
    found = {name: value for name, value in batch.items() if name not in NOT_FOR_THE_MODEL}
    return found | {"segments": Opaque(found["segments"])} if "segments" in found else found


def _logits(model: nn.Module, batch: dict[str, Any]) -> torch.Tensor:
    device = next(model.parameters()).device
    logits: torch.Tensor = model(**send_to_device(model_inputs(batch), device), use_cache=False).logits
    return logits.float()


@torch.no_grad()
def _difference(found: torch.Tensor, wanted: torch.Tensor) -> float:
    """Median over the targets of |found - wanted| / |wanted - mean|; infinite where one of them is not finite."""
    scale = (wanted - wanted.mean(-1, keepdim=True)).norm(dim=-1)
    ratio = (found - wanted).norm(dim=-1) / scale.clamp_min(torch.finfo(scale.dtype).tiny)
    return float(ratio.median().nan_to_num(nan=float("inf")))


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and each module's own mode again afterwards."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True
