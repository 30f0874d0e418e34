"""Every causal-LM class of the installed transformers, with random weights and a small config: does each batch layout
give the loss and the gradients of one example at a time?

python benchmarks/architectures.py --output docs/architectures.md       all of them, a few minutes on one core
python benchmarks/architectures.py llama stablelm                       some model types, to the terminal

A layout is exact, or refused before a run starts, with the reason. Exit code 1 if one is neither.
"""

from __future__ import annotations

import argparse
import copy
import re
import signal
import sys
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers
from torch import nn
from torch.nn import functional
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM, PreTrainedConfig, TrainingArguments

from recipe import attention
from recipe.collator import IGNORE_INDEX, DataCollatorForInstructionTuning, DataCollatorWithSharedPrefix
from recipe.model import base_model
from recipe.trainer import InstructionTrainer
from recipe.training.layout_check import why_never_one_row, why_not

LAYOUTS = {"padded": None, "mask": "sdpa", "segments": attention.NAME}  # and the attention a model is loaded with
LOSS_TOLERANCE, GRADIENT_TOLERANCE = 1e-5, 1e-4  # relative
TIME_LIMIT = 30  # seconds for one class
VOCABULARY = 96
# a small value for the whole numbers of a config: that of the first pattern found in the name
INTEGERS = [  # first match of the name counts; None leaves a field
    (r"^vocab_size$|unpadded_vocab_size|vocab_size_per_layer_input|audio_vocab_size", 96),
    (
        r"max_position|n_positions|n_ctx|max_seq_len|context_length|max_sequence_length|max_target_positions|max_source_positions",
        128,
    ),
    (r"original_max_position", None),
    (r"num_key_value_heads|num_kv_heads|n_head_kv|multi_query_group", 2),
    (r"mamba_n_heads|mamba_num_heads|n_mamba_heads", 8),
    (r"mamba_d_head|mamba_head_dim|mamba_headdim", 8),
    (r"mamba_d_state|state_size|ssm_state", 8),
    (r"mamba_d_ssm", 64),
    (r"n_groups|mamba_n_groups|mamba_ngroups", 1),
    (r"num_attention_heads$|^n_head$|^n_heads$|attention_heads$|^num_heads$|linear_num_heads", 4),
    (r"linear_num_key_heads|linear_num_value_heads", 4),
    (r"qk_rope_head_dim", 4),
    (r"qk_nope_head_dim", 8),
    (r"qk_head_dim", 12),
    (r"v_head_dim", 8),
    (r"index_head_dim", 8),
    (r"rotary_dim", 4),
    (
        r"^head_dim$|global_head_dim|swa_head_dim|linear_head_dim|linear_key_head_dim|linear_value_head_dim|dim_head|kv_channels|d_head|swa_head_dim",
        8,
    ),
    (r"q_lora_rank|kv_lora_rank|o_lora_rank", 16),
    (r"d_rel", 8),
    (r"^lru_width", 32),
    (
        r"sliding_window_size|^sliding_window$|window_size|attention_chunk_size|local_attention$|keep_window_size|rel_extent",
        8,
    ),
    (r"chunk_size$|mamba_chunk_size|block_size|index_block_size", 8),
    # with few index heads many scores are 0, and which of equal scores is chosen depends on the batch's shape
    (r"index_topk_blocks", 2),
    (r"index_topk", 8),
    (r"index_n_heads", 32),
    (r"num_experts_per_tok|moe_topk|top_k_experts|num_experts_per_token|experts_per_token|moe_top_k|router_topk", 2),
    (r"n_routed_experts|num_local_experts|num_experts$|moe_num_experts|num_expert", 4),
    (r"n_group|topk_group|num_expert_group|n_shared_experts|num_shared_experts|moe_num_shared_experts", 1),
    (r"first_k_dense_replace|num_dense_layers|mlp_only", 1),
    (r"num_kv_shared_layers", 2),
    (
        r"^num_hidden_layers$|^n_layer$|^n_layers$|^num_layers$|decoder_layers$|encoder_layers$|num_blocks|num_decoder_layers|num_encoder_layers|num_layers_per_stack",
        4,
    ),
    (
        r"intermediate_size|ffn_dim|ffn_hidden|^dff$|dim_ff|n_inner|d_inner|feed_forward_size|intermediate_size_mlp|expert_ffn",
        64,
    ),
    (r"hidden_size_per_layer_input|laurel_rank", 8),
    (
        r"^hidden_size$|^d_model$|^n_embd$|^emb_dim$|embedding_dim|attention_hidden_size|input_embedding_size|output_embedding_size|word_embed_proj_dim|embedding_size|moe_latent",
        32,
    ),
    (r"attention_head_dim", 16),
    (r"zero_expert_num", 2),
    (r"router_hidden_size", 16),
    (r"time_step_rank", 4),
]
TOKENS = re.compile(r"token_id$|^pad_index|^eos_index|^bos_index|^unk_index|^mask_index")
SPANS = re.compile("window|chunk|local|extent|index_topk|block_size")  # tokens that a layer attends to
MLA = {"qk_nope_head_dim": 8, "qk_rope_head_dim": 4, "v_head_dim": 8, "head_dim": None, "num_key_value_heads": 4}
ESPECIALLY: dict[str, dict[str, Any]] = {  # where the patterns do not fit together
    "axk1": MLA | {"head_dim": 4},
    "axk2": MLA | {"head_dim": 4},
    "deepseek_v2": MLA | {"head_dim": 4, "num_experts_per_tok": 2},
    "deepseek_v3": MLA | {"head_dim": 4},
    "deepseek_v32": MLA | {"head_dim": 4},
    "glm4_moe_lite": MLA | {"head_dim": 4},
    "glm_moe_dsa": MLA | {"head_dim": 4},
    "longcat_flash": MLA | {"head_dim": 4},
    "minicpm3": MLA | {"head_dim": 4},
    "youtu": MLA | {"head_dim": 4},
    "bailing_hybrid": {"num_experts_per_tok": 2, "num_experts_per_token": 2, "num_expert_group": 1, "topk_group": 1},
    "dots1": {"n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1},
    "ernie4_5_moe": {"moe_k": 2},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "ministral": {"head_dim": 8},
    "nemotron": {"head_dim": 8, "num_key_value_heads": 2},
    "mamba2": {"num_heads": 8},
    "reformer": {"is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "gpt_neo": {"attention_types": [[["global", "local"], 2]]},
}


def small_config(config_class: type[PreTrainedConfig], spans: bool = True) -> PreTrainedConfig:
    """A config with the features of its defaults in a small size, without dropout.

    Args:
        spans: also make windows, chunks and the like so short that they are in force in a short example.
    """
    return _shrink(config_class(), spans)


def _shrink(default: PreTrainedConfig, spans: bool) -> PreTrainedConfig:
    values: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        part = default.__dict__.get(name)
        if isinstance(part, PreTrainedConfig):
            values[name] = _shrink(part, spans)
        elif name not in ("transformers_version", "model_type", "dtype", "architectures"):
            small = _small_value(name, value, spans)
            if small != value:
                values[name] = small
    return type(default)(**values | ESPECIALLY.get(default.model_type, {}))


def _small_value(name: str, value: Any, spans: bool) -> Any:
    if name == "is_decoder":  # else BERT and the like see the tokens that they are to predict
        return True
    if isinstance(value, float):
        return 0.0 if re.search(r"drop|jitter", name) else value
    if isinstance(value, bool) or not isinstance(value, int) or (SPANS.search(name) and not spans):
        return value
    if TOKENS.search(name):
        return 1 + len(name) % 3
    small = next((small for pattern, small in INTEGERS if re.search(pattern, name)), None)
    return value if small is None else min(small, value)


def build_model(config: PreTrainedConfig, attn_implementation: str | None = None) -> nn.Module:
    """The same random weights each time, large enough for every part to count."""
    torch.manual_seed(0)
    options: dict[str, Any] = {"attn_implementation": attn_implementation, "dtype": torch.float32}
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config), **options, trust_remote_code=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.05 * torch.randn_like(parameter)
    return model.train()


def make_examples() -> list[dict[str, Any]]:
    """Three groups: four examples that share twelve tokens, one that shares none, two that share five."""
    generator, examples = torch.Generator().manual_seed(1), []

    def draw(count: int) -> list[int]:
        return torch.randint(5, VOCABULARY, (count,), generator=generator).tolist()

    for shared, lengths in ((12, (5, 9, 14, 21)), (0, (17,)), (5, (13, 8))):
        prefix = draw(shared)
        for length in lengths:
            ids = prefix + draw(length)
            labels = [IGNORE_INDEX] * (shared + 2) + ids[shared + 2 :]
            examples.append({"input_ids": ids, "labels": labels, "row": len(examples)})
    return examples


Result = tuple[float, dict[str, torch.Tensor]]


def one_at_a_time(model: nn.Module, examples: list[dict[str, Any]]) -> Result:
    """Loss and gradients from the logits of each example alone, without a mask: the independent answer."""
    model.zero_grad()
    total, count = torch.zeros(()), 0
    for example in examples:
        inputs, labels = torch.tensor([example["input_ids"][:-1]]), torch.tensor(example["labels"][1:])
        logits = model(input_ids=inputs, use_cache=False).logits[0]
        total = total + functional.cross_entropy(logits, labels, ignore_index=IGNORE_INDEX, reduction="sum")
        count += int((labels != IGNORE_INDEX).sum())
    return _with_gradients(model, total / count)


def in_a_batch(model: nn.Module, examples: list[dict[str, Any]], layout: str) -> Result:
    """Loss and gradients of the trainer."""
    collator: Any = DataCollatorForInstructionTuning(0)
    if layout != "padded":
        collator = DataCollatorWithSharedPrefix(0, layout)  # type: ignore[arg-type]
    with tempfile.TemporaryDirectory() as folder:
        arguments = TrainingArguments(folder, use_cpu=True, report_to="none", disable_tqdm=True)
        trainer = InstructionTrainer(model, arguments, data_collator=collator)
        model.train()
        model.zero_grad()
        loss: Any = trainer.compute_loss(model, collator(examples))
    return _with_gradients(model, loss)


def _with_gradients(model: nn.Module, loss: torch.Tensor) -> Result:
    loss.backward()
    return loss.item(), {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def difference(found: Result, wanted: Result) -> str | None:
    """In words, or None if they are the same."""
    if not abs(found[0] - wanted[0]) <= LOSS_TOLERANCE * abs(wanted[0]):
        return f"loss {found[0]:.5f} for {wanted[0]:.5f}"
    everything = torch.stack([gradient.norm() for gradient in wanted[1].values()]).norm()
    for name, gradient in wanted[1].items():
        distance = (found[1].get(name, torch.zeros_like(gradient)) - gradient).norm()
        if not distance <= GRADIENT_TOLERANCE * gradient.norm() + 1e-6 * everything:
            return f"gradient of {name} off by {distance / gradient.norm():.1e}"
    return None


def verdict(config: PreTrainedConfig, layout: str, wanted: Result) -> str:
    """One of "exact", "refused: ..." and "different: ..."."""
    try:
        model = build_model(config, LAYOUTS[layout])
    except (ImportError, KeyError, ValueError) as error:
        return f"refused: transformers does not load it with this attention ({type(error).__name__})"
    if reason := why_not(model, layout):  # type: ignore[arg-type]
        return f"refused: {reason}"
    try:
        different = difference(in_a_batch(model, make_examples(), layout), wanted)
    except Exception as error:  # a run would end so, without a word beforehand
        different = f"{type(error).__name__}: {error}"
    return "exact" if different is None else f"different: {different}"


def examine(config_class: type[PreTrainedConfig]) -> dict[str, str]:
    """The verdict on each layout, and on a config whose windows are longer than the examples."""
    model_type = config_class.model_type
    try:
        config = small_config(config_class)
        model = build_model(config)
        wanted = one_at_a_time(model, make_examples())
    except Exception as error:  # whatever a config or a model raises when it is made small
        text = str(error).strip().partition("\n")[0]
        return {"class": config_class.__name__, "type": model_type,
                "padded": f"not built: {type(error).__name__}: {text[:70]}", "mask": "", "segments": ""}  # fmt: skip
    result = {"class": type(base_model(model)).__name__, "type": model_type}
    result |= {layout: verdict(config, layout, wanted) for layout in LAYOUTS}
    long_spans = small_config(config_class, spans=False)
    if why_never_one_row(model) and not why_never_one_row(build_model(long_spans)):
        result["mask"] = "different: refused only while a window is shorter than the examples"
    return result


def main(argv: list[str]) -> int:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("model_types", nargs="*", help="only these")
    parser.add_argument("--output", help="a Markdown file to write")
    arguments = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    results = []
    for config_class in sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING.keys()), key=lambda each: each.model_type):
        if arguments.model_types and config_class.model_type not in arguments.model_types:
            continue
        with _time_limit():
            results.append(examine(config_class))
        if not arguments.output:
            print(" | ".join(results[-1].values()), flush=True)
    if arguments.output:
        with open(arguments.output, "w", encoding="utf-8") as file:
            file.write(page(results))
    wrong = [row["type"] for row in results if any(cell.startswith("different") for cell in row.values())]
    print(f"{summary(results)}; different: {', '.join(wrong) or 'none'}")
    return 1 if wrong else 0


@contextmanager
def _time_limit() -> Iterator[None]:
    """Ends a class that takes too long with `TimeoutError`."""

    def stop(*_: Any) -> None:
        raise TimeoutError(f"more than {TIME_LIMIT} s")

    signal.signal(signal.SIGALRM, stop)
    signal.alarm(TIME_LIMIT)
    yield
    signal.alarm(0)


def summary(results: list[dict[str, str]]) -> str:
    built = [row for row in results if not row["padded"].startswith("not built")]
    counts = [f"{layout} {sum(row[layout] == 'exact' for row in built)}" for layout in LAYOUTS]
    return f"{len(built)} of {len(results)} built; exact: {', '.join(counts)}"


INTRODUCTION = """# Architectures and batch layouts

Made by `python benchmarks/architectures.py --output docs/architectures.md` with transformers {version}: every class for
causal language models, from a small config with random weights, in float32. The loss and all gradients of
`InstructionTrainer` are compared with one example at a time (logits without padding or a mask, cross-entropy by hand):
a loss within 1e-5, gradients within 1e-4, relative.

- **padded** is `--batching padded`. **mask** and **segments** are `--batching shared_prefix` with
  `--attn_implementation sdpa` and with `shared_prefix`, its default. If only the mask is exact, a run uses it and
  says so.
- *refused*: before the run starts, by the model's name, because its config says so or because made-up examples, alone
  and in a batch, got different logits. A window is refused even if it is longer than `--max_length`.
- *not built*: the command does not know how to make this config small, or a package is missing; a run tries it.
- Models that choose tokens by an indexer (deepseek_v32, axk2, glm_moe_dsa, hy_v4) are built with 32 index heads. With
  the 4 of an earlier trial their losses differed in a padded batch (4.65841 for 4.65925): many scores were equal, and
  which of them counted depended on the width of the batch. That this is the only cause is not shown.
- BERT and its relatives are built with `is_decoder=true`; without, they see the tokens they are to predict, and
  `--batching padded` refuses them too.

{summary}.

| class | model_type | padded | mask | segments |
| --- | --- | --- | --- | --- |
"""


def page(results: list[dict[str, str]]) -> str:
    lines = [f"| {' | '.join(cell.replace('|', '/') for cell in row.values())} |\n" for row in results]
    return INTRODUCTION.format(version=transformers.__version__, summary=summary(results)) + "".join(lines)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
