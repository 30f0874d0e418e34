"""Where weights and tokenizers come from, and the messages where they cannot be loaded."""

import copy
import json
import os

import pytest
import torch
from conftest import DEMO
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, pipeline

from recipe import attention
from recipe.config import ModelArguments, UserError
from recipe.model import (
    check_folder,
    check_weights,
    context_length,
    fuse_activations,
    load_config,
    load_model,
    load_tokenizer,
    prepare_for_chat,
)
from recipe.templates import load_template

BASE = str(DEMO / "base")


def test_folder_is_loaded_in_float32(demo_tokenizer):
    model, origin = load_model(ModelArguments(model_name_or_path=BASE), demo_tokenizer)
    assert origin == BASE
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    model, _ = load_model(ModelArguments(model_name_or_path=BASE, dtype="bfloat16"), demo_tokenizer)
    assert model.dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("gpt2", "n_layer=1,n_embd=32,n_head=2,n_positions=64,resid_pdrop=0.0"),
        (
            "llama",
            "num_hidden_layers=1,hidden_size=32,intermediate_size=64,num_attention_heads=2,num_key_value_heads=1",
        ),
    ],
)
def test_random_weights_from_a_config(demo_tokenizer, model_type, overrides):
    config = ModelArguments(model_type=model_type, tokenizer_name=BASE, config_overrides=overrides)
    model, origin = load_model(config, load_tokenizer(config))
    assert origin == f"random weights ({model_type})"
    assert model.config.model_type == model_type
    assert model.config.vocab_size == len(demo_tokenizer)
    assert model.config.eos_token_id == demo_tokenizer.eos_token_id
    assert context_length(model.config) == (64 if model_type == "gpt2" else 2048)


@pytest.mark.parametrize(
    ("model_type", "overrides"),
    [
        ("qwen2", {"num_hidden_layers": 3, "hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 2}),
        ("gemma3_text", {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 8, "sliding_window": 16}),
        ("llama", {"num_hidden_layers": 1, "hidden_size": 32, "intermediate_size": 8, "num_attention_heads": 2}),
        ("gpt2", {"n_layer": 1, "n_embd": 16, "n_head": 2, "vocab_size": 2000}),
    ],
)
def test_what_follows_from_an_override_does(demo_tokenizer, model_type, overrides):
    """The types of layers, the size of a head: as if the configuration had been made with these values."""
    text = ",".join(f"{name}={value}" for name, value in overrides.items())
    config = load_config(ModelArguments(model_type=model_type, config_overrides=text), demo_tokenizer)
    ids = {f"{name}_token_id": getattr(demo_tokenizer, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    expected = AutoConfig.for_model(model_type, **{"vocab_size": len(demo_tokenizer)} | ids | overrides)
    assert config.to_dict() == expected.to_dict()


@pytest.mark.parametrize(
    "name",
    ["pytorch_model.bin", "pytorch_model-00001-of-00002.bin", "model.pt", "epoch=1.ckpt", "tf_model.h5", "q.gguf"],
)
def test_weights_that_can_run_code_are_refused_with_a_way_on(tmp_path, demo_tokenizer, name):
    AutoConfig.from_pretrained(BASE).save_pretrained(tmp_path)
    (tmp_path / "training_args.bin").touch()  # no weights
    check_weights(str(tmp_path))
    (tmp_path / name).touch()
    with pytest.raises(UserError, match=f"its weights in {name}, and only safetensors .*save_pretrained"):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)), demo_tokenizer)
    (tmp_path / "model.safetensors").touch()  # with safetensors beside them, they are not read
    check_weights(str(tmp_path))


def test_the_way_on_works(tmp_path, demo_model, demo_tokenizer):
    """What the message says to do, done to a folder of pickled weights."""
    old, new = tmp_path / "old", tmp_path / "new"
    demo_model.config.save_pretrained(old)
    torch.save(demo_model.state_dict(), old / "pytorch_model.bin")
    AutoModelForCausalLM.from_pretrained(old).save_pretrained(new)
    model, _ = load_model(ModelArguments(model_name_or_path=str(new)), demo_tokenizer)
    assert torch.equal(model.lm_head.weight, demo_model.lm_head.weight)


def test_a_config_without_a_limit_of_positions():
    assert context_length(AutoConfig.for_model("xlnet")) is None  # it says -1


def test_overrides_change_a_trained_models_dropout(demo_tokenizer):
    config = ModelArguments(model_name_or_path=BASE, config_overrides="resid_pdrop=0.25")
    model, _ = load_model(config, demo_tokenizer)
    assert model.transformer.h[0].mlp.dropout.p == 0.25


def test_an_adapter_alone_is_refused(tmp_path, demo_tokenizer):
    demo_tokenizer.save_pretrained(tmp_path)
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"is an adapter, not a whole model; make one: python scripts/merge\.py"):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)), demo_tokenizer)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({}, "name the model"),
        ({"model_name_or_path": BASE, "model_type": "gpt2"}, "name the model"),
        (
            {"model_type": "gpt2", "tokenizer_name": BASE, "config_overrides": "activation_function=geluu"},
            "--config_overrides activation_function=geluu: it does not know 'geluu'",
        ),
        ({"model_type": "gpt2", "tokenizer_name": BASE, "config_overrides": "n_head=0"}, "n_head=0: integer division"),
        (
            {"model_type": "gpt2", "tokenizer_name": BASE, "config_overrides": "n_layer=99999999"},
            "99,999,999 layers of",
        ),
        (
            {
                "model_type": "llama",
                "tokenizer_name": BASE,
                "config_overrides": "num_hidden_layers=9,hidden_size=999936",
            },
            "9 layers of width 999,936 need 143,982 GB or more",
        ),
        ({"model_type": "gpt22", "tokenizer_name": BASE}, "unknown --model_type 'gpt22'"),
        ({"model_name_or_path": "no/such-model", "tokenizer_name": BASE}, "model 'no/such-model'"),
        ({"model_name_or_path": BASE, "config_overrides": "n_layers=3"}, "n_layers"),
        ({"model_name_or_path": BASE, "config_overrides": "n_embd=96"}, f"model '{BASE}'"),
        ({"model_name_or_path": BASE, "config_overrides": "n_layer=6"}, "they would be random"),
        ({"model_name_or_path": BASE, "attn_implementation": "flash_attention_2"}, "model '"),
        (
            {
                "model_type": "falcon",
                "tokenizer_name": BASE,
                "attn_implementation": attention.NAME,
                "config_overrides": "num_hidden_layers=1,hidden_size=8,num_attention_heads=1",
            },
            "model 'falcon', .*--attn_implementation shared_prefix: it does not know 'shared_prefix'",
        ),
        (
            {
                "model_type": "gpt2",
                "tokenizer_name": BASE,
                "config_overrides": "vocab_size=10,n_layer=1,n_embd=8,n_head=1",
            },
            "10 embeddings",
        ),
    ],
)
def test_models_that_cannot_be_are_refused(demo_tokenizer, options, message):
    with pytest.raises(UserError, match=message):
        load_model(ModelArguments(**options), demo_tokenizer)


def test_tokenizers_that_cannot_be_are_refused(tmp_path, demo_tokenizer):
    with pytest.raises(UserError, match="give --tokenizer_name"):
        load_tokenizer(ModelArguments(model_type="gpt2"))
    with pytest.raises(UserError, match="tokenizer 'no/such'"):
        load_tokenizer(ModelArguments(tokenizer_name="no/such"))
    with pytest.raises(UserError, match="no such folder"):
        load_tokenizer(ModelArguments(tokenizer_name="./no/such/folder"))
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    tokenizer.eos_token = None
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="has no end-of-text token"):
        load_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)))


@pytest.mark.parametrize("role", ["eos_token", "bos_token", "pad_token"])
def test_a_special_token_that_the_tokenizer_lacks_is_not_taken_for_the_unknown_one(tmp_path, role):
    AutoTokenizer.from_pretrained(BASE).save_pretrained(tmp_path)
    content = json.loads((tmp_path / "tokenizer_config.json").read_text())
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(content | {role: ""}))
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert getattr(loaded, f"{role}_id") == loaded.unk_token_id
    with pytest.raises(UserError, match=f"its {role}, '', is no token of its vocabulary"):
        load_tokenizer(ModelArguments(tokenizer_name=str(tmp_path)))


@pytest.mark.parametrize("name", ["config.json", "tokenizer_config.json", "chat_template.jinja", "model.safetensors"])
@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("nothing")])
def test_what_is_no_file_is_named_before_a_library_opens_it(tmp_path, name, make):
    make(tmp_path / name)
    with pytest.raises(UserError, match=f"{name}: a folder, a pipe or a link to nothing, not a file"):
        check_folder(str(tmp_path))


def test_weights_named_as_openai_community_gpt2_names_them(tmp_path, demo_model, demo_tokenizer):
    """Those are of the bare transformer: no `transformer.` before each name, no head, and old attention buffers."""
    weights = {name: tensor.clone() for name, tensor in demo_model.transformer.state_dict().items()}
    weights["h.0.attn.bias"] = torch.ones(1, 1, 256, 256)
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    demo_model.config.save_pretrained(tmp_path)
    model, _ = load_model(ModelArguments(model_name_or_path=str(tmp_path)), demo_tokenizer)
    ids = torch.tensor([demo_tokenizer("The teacher walks to the park.")["input_ids"]])
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(ids).logits, demo_model.eval()(ids).logits, rtol=1e-5, atol=1e-5)


def test_damaged_weights_and_a_folder_without_a_tokenizer(tmp_path, demo_model, demo_tokenizer):
    demo_model.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="tokenizer"):
        load_tokenizer(ModelArguments(model_name_or_path=str(tmp_path)))
    (tmp_path / "model.safetensors").write_bytes((tmp_path / "model.safetensors").read_bytes()[:1000])
    with pytest.raises(UserError, match=str(tmp_path)):
        load_model(ModelArguments(model_name_or_path=str(tmp_path)), demo_tokenizer)


def test_a_model_without_a_limit_of_positions(demo_tokenizer):
    config = ModelArguments(
        model_type="bloom", tokenizer_name=BASE, config_overrides="n_layer=1,hidden_size=32,n_head=2"
    )
    model, _ = load_model(config, demo_tokenizer)
    assert context_length(model.config) is None
    prepare_for_chat(model, AutoTokenizer.from_pretrained(BASE), load_template("alpaca"))
    assert model.generation_config.max_new_tokens == 256


def test_saved_folder_answers_in_a_pipeline_in_batches(tmp_path, demo_model):
    tokenizer = AutoTokenizer.from_pretrained(BASE)
    prepare_for_chat(demo_model, tokenizer, load_template("alpaca"))
    demo_model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    generator = pipeline("text-generation", model=str(tmp_path), dtype=torch.float32, device="cpu")
    chats = [[{"role": "user", "content": text}] for text in ("Name a colour.", "Write the plural of this word: cat")]
    alone = [generator([chat], max_new_tokens=8)[0][0]["generated_text"][-1]["content"] for chat in chats]
    batched = [
        answer[0]["generated_text"][-1]["content"] for answer in generator(chats, batch_size=2, max_new_tokens=8)
    ]
    assert batched == alone and all(isinstance(text, str) for text in alone)
    assert generator.model.generation_config.do_sample is False


def test_the_fused_activation_gives_the_same_logits_and_gradients_and_is_not_saved(demo_model, tmp_path):
    fused = copy.deepcopy(demo_model)
    fuse_activations(fused)
    kinds = {type(layer.mlp.act) for layer in fused.transformer.h}
    assert kinds == {torch.nn.GELU} and {type(layer.mlp.act) for layer in demo_model.transformer.h} != kinds
    ids = torch.arange(40)[None]
    results = []
    for model in (demo_model, fused):
        logits = model(ids).logits
        results.append([logits, *torch.autograd.grad(logits.logsumexp(-1).sum(), list(model.parameters()))])
    for expected, fused_result in zip(*results, strict=True):
        assert (expected - fused_result).norm() <= 1e-5 * expected.norm()
    fused.save_pretrained(tmp_path)
    assert AutoModelForCausalLM.from_pretrained(tmp_path).config.activation_function == "gelu_new"
