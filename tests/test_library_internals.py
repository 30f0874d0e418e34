"""Private corners of libraries that the recipe uses, each in one function: a release that changes one fails here."""

import json
import os
import subprocess
import sys

import pytest
import torch
import transformers
from accelerate.utils.memory import should_reduce_batch_size
from conftest import DEMO, ROOT
from datasets import Dataset
from packaging.version import Version
from sacrebleu.metrics.helpers import extract_all_char_ngrams
from torch.backends.cuda import SDPAParams, can_use_flash_attention
from torch.utils.data import RandomSampler, SequentialSampler
from tqdm.auto import tqdm as auto_tqdm
from tqdm.std import tqdm as std_tqdm
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    Cache,
    DynamicCache,
    DynamicLayer,
    Trainer,
    TrainingArguments,
)

from recipe import attention
from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import InstructionTrainingArguments
from recipe.console import close_progress_bars
from recipe.generation import BlockwiseLayer
from recipe.model import pad_left
from recipe.templates import load_template, to_messages
from recipe.trainer import InstructionTrainer
from recipe.training.collator_choice import attention_of, default_attention
from recipe.training.layout_check import takes_boolean_mask
from recipe.training.trainer import LAST_HIDDEN_STATES

# --- recipe.attention -----------------------------------------------------------------------------------------------


def test_torch_tells_whether_flash_attention_runs():
    """`SDPAParams` is public, but torch documents neither its arguments nor their order."""
    query, key = torch.zeros(1, 4, 8, 16), torch.zeros(1, 2, 8, 16)
    params = SDPAParams(query, key, key, None, 0.0, False, True)
    assert (params.query.shape, params.key.shape) == (query.shape, key.shape)
    assert (params.attn_mask, params.dropout, params.is_causal, params.enable_gqa) == (None, 0.0, False, True)
    assert can_use_flash_attention(params) is False  # on a CPU


# --- recipe.data ----------------------------------------------------------------------------------------------------


def test_datasets_names_its_records_by_a_fingerprint():
    """`recipe.data.encode` names its cache by it: it must change with the records, and with nothing else."""
    texts = {"text": ["a", "b", "c"]}
    first, again = (Dataset.from_dict(texts) for _ in range(2))
    assert isinstance(first._fingerprint, str) and first._fingerprint == again._fingerprint
    assert first._fingerprint != first.select([0, 2])._fingerprint
    assert first.map(lambda row: row, new_fingerprint="named")._fingerprint == "named"


# --- recipe.evaluation ----------------------------------------------------------------------------------------------


def test_sacrebleu_counts_the_n_grams_of_characters():
    """`extract_all_char_ngrams` has no page in sacrebleu's documentation: one count for each order, blanks left out."""
    assert extract_all_char_ngrams("aa b", 2, False) == [{"a": 2, "b": 1}, {"aa": 1, "ab": 1}]


# --- recipe.generation ----------------------------------------------------------------------------------------------


def test_layers_of_transformers_caches():
    """Which layers a model caches, and a subclass of `DynamicLayer` in a `Cache`."""

    def layers(architecture: str, **options) -> set[type]:
        config = AutoConfig.for_model(architecture, num_hidden_layers=2, **options)
        return {type(layer) for layer in DynamicCache(config=config).layers}

    assert layers("gpt2") == layers("llama") == {DynamicLayer}
    assert DynamicLayer not in layers("mistral", sliding_window=8) | layers("mamba")
    cache, states = Cache(layers=[BlockwiseLayer()]), torch.randn(2, 3, 5, 4)
    assert cache.get_seq_length() == 0
    assert all(torch.equal(states, kept) for kept in cache.update(states, states, 0))
    assert cache.get_seq_length() == 5 and cache.get_mask_sizes(1, 0) == (6, 0)
    cache.batch_select_indices(torch.tensor([1]))
    assert cache.layers[0].keys.shape == (1, 3, 5, 4)


def test_accelerate_knows_when_memory_ran_out():
    text = "CUDA out of memory. Tried to allocate 20.00 MiB."
    assert should_reduce_batch_size(RuntimeError(text)) and not should_reduce_batch_size(RuntimeError("a shape"))


# --- recipe.model ---------------------------------------------------------------------------------------------------


def test_a_tokenizer_saves_the_settings_that_init_kwargs_names(tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    tokenizer.padding_side = "left"
    tokenizer.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    assert "padding_side" not in saved, "transformers saves it now: `pad_left` needs no init_kwargs any more"
    pad_left(tokenizer)
    tokenizer.save_pretrained(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path).padding_side == "left"


# --- recipe.templates -----------------------------------------------------------------------------------------------


def test_apply_chat_template_renders_as_templates_do(demo_tokenizer):
    template = load_template("alpaca", demo_tokenizer)
    records = [{"instruction": "Make it plural.", "input": "cat"}, {"instruction": "Name a colour.", "input": ""}]
    rendered = demo_tokenizer.apply_chat_template(
        [to_messages(record) for record in records], chat_template=template.chat_template, tokenize=False,
        add_generation_prompt=True,
    )  # fmt: skip
    assert rendered == template.prompts(records)


# --- recipe.training ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["gpt2", "llama"])
def test_the_last_hidden_states_can_be_had_alone(architecture):
    """transformers' `output_hidden_states=-1`: what the head is applied to, and no other layer's."""
    sizes = {"num_hidden_layers": 2, "num_attention_heads": 2, "hidden_size": 16, "vocab_size": 50}
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(architecture, **sizes)).eval()
    outputs = model(input_ids=torch.arange(8)[None], **LAST_HIDDEN_STATES)
    *others, last = outputs.hidden_states
    if Version(transformers.__version__) >= Version("5.23"):  # 5.17 keeps the hidden states of all layers
        assert others == [None, None]
    assert torch.equal(model.get_output_embeddings()(last), outputs.logits)


def test_how_a_model_attends_can_be_read():
    """transformers' `config._attn_implementation`, and `_supports_sdpa` of a model's class."""
    for name in ("sdpa", "eager"):
        config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=50)
        model = AutoModelForCausalLM.from_config(config, attn_implementation=name)
        assert attention_of(model) == name and takes_boolean_mask(model)
    config = AutoConfig.for_model(
        "gpt_neo", hidden_size=16, num_heads=2, num_layers=1, attention_types=[[["global"], 1]]
    )
    assert not takes_boolean_mask(AutoModelForCausalLM.from_config(config))


@pytest.mark.parametrize(("model_type", "by_name"), [("llama", True), ("falcon", False), ("gptj", False)])
def test_a_class_tells_whether_it_takes_attentions_by_name(model_type, by_name):
    """transformers' `_supports_attention_backend`; a class without it fails with a KeyError or ignores the name."""
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "rotary_dim": 4}
    config = AutoConfig.for_model(model_type, intermediate_size=16, **sizes)
    assert (default_attention(config) == attention.NAME) == by_name
    if by_name:
        assert (
            attention_of(AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)) == attention.NAME
        )
    else:
        with pytest.raises(KeyError):
            AutoModelForCausalLM.from_config(config, attn_implementation=attention.NAME)


def test_torch_reads_whether_to_use_huge_pages_after_the_script_has_said_so():
    """`THP_MEM_ALLOC_ENABLE` is read once, when torch is loaded, and documented nowhere but in its source."""
    program = """
import importlib.abc, os, sys
class Watch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name == "torch":
            print(os.environ.get("THP_MEM_ALLOC_ENABLE"))
sys.meta_path.insert(0, Watch())
import scripts.train
"""
    for given, expected in (({}, "1"), ({"THP_MEM_ALLOC_ENABLE": "0"}, "0")):
        variables = {name: value for name, value in os.environ.items() if name != "THP_MEM_ALLOC_ENABLE"} | given
        ran = subprocess.run([sys.executable, "-c", program], env=variables, cwd=ROOT, capture_output=True, text=True)
        assert set(ran.stdout.split()) == {expected}  # torch is looked for more than once


def test_a_batch_size_that_is_lowered_reaches_the_plan_of_batches(tmp_path):
    """transformers' `Trainer._train_batch_size`, which `auto_find_batch_size` halves when memory is short."""

    class Small(InstructionTrainer):
        def compute_loss(self, model, inputs, *args, **kwargs):
            if len(inputs["input_ids"]) > 2:
                raise RuntimeError("CUDA out of memory.")
            return super().compute_loss(model, inputs, *args, **kwargs)

    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    rows = [{"input_ids": [1, 2, 3], "labels": [1, 2, 3], "length": 3}] * 8
    args = InstructionTrainingArguments(
        str(tmp_path), use_cpu=True, auto_find_batch_size=True, per_device_train_batch_size=8, max_steps=8,
        train_sampling_strategy="group_by_length", save_strategy="no", report_to="none", disable_tqdm=True,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config)
    trainer = Small(model, args, DataCollatorForInstructionTuning(0), train_dataset=Dataset.from_list(rows))
    trainer.train()
    assert max(map(len, trainer.train_batches())) <= 2


def test_the_trainer_orders_records_and_counts_tokens_in_methods_of_its_own(tmp_path):
    """transformers' `Trainer._get_train_sampler`, and `Trainer._track_num_input_tokens`, which ours replaces."""
    for strategy, order in (("random", RandomSampler), ("sequential", SequentialSampler)):
        args = TrainingArguments(str(tmp_path), use_cpu=True, train_sampling_strategy=strategy)
        trainer = Trainer(torch.nn.Linear(1, 1), args, train_dataset=Dataset.from_dict({"row": [1, 2]}))
        assert type(trainer._get_train_sampler()) is order
    trainer.args.include_num_input_tokens_seen = "all"
    trainer._track_num_input_tokens({"input_ids": torch.zeros(2, 3)})
    assert trainer.state.num_input_tokens_seen == 6


def test_the_trainer_clips_gradients_in_a_method_of_its_own(tmp_path):
    """transformers' `Trainer._clip_grad_norm`, called with the model once a step; its result is the logged norm."""
    norms = []

    class Clipped(Trainer):
        def _clip_grad_norm(self, model):
            norms.append(super()._clip_grad_norm(model))
            return norms[-1]

    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=2, logging_steps=1, report_to="none")
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 16)
    trainer = Clipped(AutoModelForCausalLM.from_config(config), args, train_dataset=rows)
    trainer.train()
    logged = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    assert logged == [norm.item() for norm in norms] and len(norms) == 2


def test_the_trainer_saves_a_checkpoint_in_a_method_of_its_own_below_a_folder_of_its_own(tmp_path):
    """transformers' `Trainer._save_checkpoint` and `Trainer._get_output_dir`, between which a save goes aside."""

    class Aside(Trainer):
        def _get_output_dir(self, trial):
            return str(tmp_path / "aside")

    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=2, n_embd=16, vocab_size=50)
    args = TrainingArguments(str(tmp_path / "run"), use_cpu=True, save_total_limit=1, report_to="none")
    rows = Dataset.from_list([{"input_ids": [1, 2, 3], "labels": [1, 2, 3]}] * 2)
    trainer = Aside(AutoModelForCausalLM.from_config(config), args, train_dataset=rows)
    trainer.create_optimizer_and_scheduler(1)
    for step in (1, 2):  # all files of each, and the older one removed
        trainer.state.global_step = step
        trainer._save_checkpoint(trainer.model, None)
    assert not list((tmp_path / "run").rglob("*"))
    assert [path.name for path in (tmp_path / "aside").iterdir()] == ["checkpoint-2"]
    assert {path.name for path in (tmp_path / "aside" / "checkpoint-2").iterdir()} >= {
        "model.safetensors", "optimizer.pt", "scheduler.pt", "rng_state.pth", "trainer_state.json", "training_args.bin",
    }  # fmt: skip


# --- recipe.console -------------------------------------------------------------------------------------------------


def test_tqdm_knows_the_bars_that_are_open(capsys):
    """`tqdm._instances`: all bars, of `tqdm.auto` and `tqdm.std` alike, until they are closed."""
    bars = [auto_tqdm(total=3, desc="one"), std_tqdm(total=3, desc="other")]
    close_progress_bars()
    assert all(bar.disable for bar in bars) and not {*bars} & {*std_tqdm._instances}
    assert capsys.readouterr().err.endswith("\n")
