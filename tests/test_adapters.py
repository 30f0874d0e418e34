"""A run with an adapter as a user has it: trained, resumed, asked beside its base, merged, pushed, loaded elsewhere."""

import json
import os
import re
import runpy
import shutil
import sys
import warnings
from pathlib import Path

import processes
import pytest
import torch
from conftest import DEMO, ROOT
from loopback_hub import WRITE_TOKEN, LoopbackHub, serve_hub
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, pipeline

from recipe.adapters import base_of, load_adapter, merged, target_modules
from recipe.config import LoraArguments, ModelArguments, UserError
from recipe.generation import generate_responses
from recipe.manifest import find_damage
from recipe.model import load_tokenizer
from recipe.provenance import weights_hash
from recipe.templates import load_template

peft = pytest.importorskip("peft", reason="the extra `lora` installs it")
RECORDS = [
    json.loads(line) for line in (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:90]
]
LORA = ["--lora_r", "8", "--lora_alpha", "16", "--lora_target_modules", "c_attn", "c_fc", "--lora_dropout", "0.1"]
RUN = ["--max_steps", "12", "--per_device_train_batch_size", "8", "--learning_rate", "1e-2", "--lr_scheduler_type",
       "constant", "--batching", "shared_prefix", "--save_strategy", "steps", "--save_steps", "4", "--eval_strategy",
       "steps", "--eval_steps", "4", "--save_total_limit", "2", "--load_best_model_at_end", "true",
       "--metric_for_best_model", "loss", "--num_sample_generations", "1", "--report_to", "none", "--use_cpu", "true",
       "--bf16", "false"]  # fmt: skip


def script(name: str, *flags: str | Path, expect: int = 0, **environment: str):
    done = processes.run(
        [sys.executable, f"scripts/{name}.py", *map(str, flags)], cwd=ROOT, capture_output=True, text=True,
        timeout=240, env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == expect and "Traceback" not in done.stderr, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> Path:
    """A base model's folder, records, and a run with an adapter in `adapter`."""
    folder = tmp_path_factory.mktemp("adapters")
    shutil.copytree(DEMO / "base", folder / "base")
    (folder / "records.json").write_text(json.dumps(RECORDS), encoding="utf-8")
    cache = {"HF_DATASETS_CACHE": str(folder / "cache")}
    flags = ("--model_name_or_path", folder / "base", "--data", folder / "records.json", *RUN, *LORA)
    done = script("train", *flags, "--output_dir", folder / "adapter", **cache)
    assert "Adapter: 55,296 parameters on c_attn, c_fc; no others are trained" in done.stdout
    return folder


@pytest.fixture
def adapter(work, tmp_path) -> Path:
    """The adapter's folder, as the test's own."""
    return Path(shutil.copytree(work / "adapter", tmp_path / "adapter"))


@pytest.fixture(scope="module")
def whole(work) -> Path:
    script("merge", work / "adapter", "--output_dir", work / "merged")
    return work / "merged"


def loaded(folder: Path, **changes):
    config = ModelArguments(str(folder), **changes)
    return load_adapter(config, base_of(str(folder)), load_tokenizer(config))[0].eval()


PROMPTS = load_template("alpaca").prompts(RECORDS[60:70])


def answers(model, folder: Path) -> list[list[int]]:
    """By `generate` of transformers or PEFT, prompt by prompt: nothing of this recipe is asked."""
    tokenizer, found = AutoTokenizer.from_pretrained(folder), []
    for prompt in PROMPTS:
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        with torch.no_grad():
            output = model.generate(
                input_ids=ids, max_new_tokens=20, do_sample=False, pad_token_id=tokenizer.eos_token_id
            )
        found.append(output[0, ids.shape[1] :].tolist())
    return found


@pytest.fixture(scope="module")
def expected(work) -> list[list[int]]:
    """What plain PEFT answers."""
    model = peft.AutoPeftModelForCausalLM.from_pretrained(work / "adapter", dtype=torch.float32).eval()
    found = answers(model, work / "adapter")
    assert found != answers(
        AutoModelForCausalLM.from_pretrained(work / "base", dtype=torch.float32), work / "adapter"
    )  # it does something
    return found


# --- training -------------------------------------------------------------------------------------------------------


def test_the_folder_holds_the_adapter_and_what_it_belongs_to(work):
    folder = work / "adapter"
    names = {path.name for path in folder.iterdir()}
    assert names >= {
        "adapter_model.safetensors", "adapter_config.json", "generation_config.json", "tokenizer.json",
        "chat_template.jinja", "run.json", "README.md", "loss.png", "manifest.json", "trainer_state.json",
        "samples.jsonl",
    }  # fmt: skip
    assert not names & {"config.json", "model.safetensors", "training_args.bin"} and find_damage(folder) is None
    assert not (folder / "checkpoint-12" / "README.md").exists()  # a card by PEFT, which names the folder of the base
    settings = json.loads((folder / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(work / "base")
    assert (settings["r"], settings["lora_alpha"], settings["lora_dropout"]) == (8, 16, 0.1)
    assert sorted(settings["target_modules"]) == ["c_attn", "c_fc"] and settings["fan_in_fan_out"] is True
    run = json.loads((folder / "run.json").read_text())
    assert run["adapter"] == {
        "targets": ["c_attn", "c_fc"], "trained": 55296, "frozen": 2074752,
        "base_weights": weights_hash(str(work / "base")),
    }  # fmt: skip
    assert run["config"]["lora"]["lora_r"] == 8
    count = sum(tensor.numel() for tensor in load_file(folder / "adapter_model.safetensors").values())
    assert count == 55296
    card = (folder / "README.md").read_text(encoding="utf-8")
    assert "library_name: peft" in card and "| adapter | LoRA of rank 8, alpha 16, on c\\_attn, c\\_fc |" in card


def test_the_best_adapter_is_kept_and_older_checkpoints_go(work):
    folder = work / "adapter"
    state = json.loads((folder / "trainer_state.json").read_text())
    assert len(list(folder.glob("checkpoint-*"))) == 2
    best, final = (load_file(place / "adapter_model.safetensors") for place in (
        folder / Path(state["best_model_checkpoint"]).name, folder
    ))  # fmt: skip
    assert best.keys() == final.keys() and all(torch.equal(tensor, final[name]) for name, tensor in best.items())


def test_resumed_in_the_middle_it_is_the_same_to_the_bit(work, tmp_path):
    """With dropout in the adapter; its rank, and the weights of its base, cannot change."""
    flags = ["--model_name_or_path", work / "base", "--data", work / "records.json", *RUN, *LORA, "--save_total_limit",
             "9", "--load_best_model_at_end", "false", "--output_dir", tmp_path / "run"]  # fmt: skip
    cache = {"HF_DATASETS_CACHE": str(work / "cache")}
    script("train", *flags, **cache)
    whole = (tmp_path / "run" / "adapter_model.safetensors").read_bytes()
    for name in ("checkpoint-8", "checkpoint-12"):
        shutil.rmtree(tmp_path / "run" / name)
    resume = (*flags, "--resume_from_checkpoint", "true")
    done = script("train", *resume, "--lora_r", "4", "--allow_changed", "lora_r", expect=1, **cache)
    assert "lora_r: 8 → 4" in done.stderr
    script("train", *resume, **cache)
    assert (tmp_path / "run" / "adapter_model.safetensors").read_bytes() == whole

    shutil.rmtree(tmp_path / "run" / "checkpoint-12")
    weights = load_file(work / "base" / "model.safetensors")
    other = Path(shutil.copytree(work / "base", tmp_path / "base"))
    (other / "manifest.json").unlink(missing_ok=True)
    weights["transformer.ln_f.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    changed = [other if flag == work / "base" else flag for flag in resume]
    done = script("train", *changed, "--allow_changed", "model_name_or_path", expect=1, **cache)
    assert re.search(r"base_weights: sha256:\w+ → sha256:\w+", done.stderr)


@pytest.fixture(scope="module")
def train():
    return runpy.run_path(str(ROOT / "scripts" / "train.py"))["main"]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ("--lora_alpha 16 --use_dora true", "--lora_alpha, --use_dora: for adapters alone; add --lora_r 16"),
        ("--lora_r 0", "--lora_r 0: give at least 1"),
        ("--lora_r 4 --lora_dropout 1.5", "--lora_dropout 1.5: give at least 0, at most 1"),
        (
            "--lora_r 4 --lora_target_modules c_attn q_proj attn",
            "--lora_target_modules q_proj attn: the model has c_attn, c_fc, c_proj, lm_head, wpe, wte, all-linear",
        ),
        ("--lora_r 4 --load_in_4bit true", "--load_in_4bit: bitsandbytes needs a CUDA GPU, and there is none"),
        ("--lora_r 4 --config_overrides resid_pdrop=0.1,n_layer=1", "changes the model (n_layer), and the adapter"),
        ("--lora_r 4 --push_to_hub true", "a folder that nobody else has; train from a Hub id, or push later"),
        ("--lora_r 4 --model_type gpt2", "an adapter is saved without its model, which must be there"),
        ("--model_name_or_path ADAPTER", "is an adapter, not a whole model; make one: python scripts/merge.py"),
    ],
)  # fmt: skip
def test_mistakes_are_told_before_anything_is_written(flags, message, train, work, tmp_path, monkeypatch):
    if "4bit" in flags and torch.cuda.is_available():
        pytest.skip("it has what 4 bits need")
    words = flags.replace("ADAPTER", str(work / "adapter")).split()
    base = ["--tokenizer_name" if "--model_type" in words else "--model_name_or_path", str(work / "base")]
    out = tmp_path / "out"
    with pytest.raises(UserError) as told:
        train([*base, "--data", str(work / "records.json"), "--output_dir", str(out), *RUN, *words])
    assert message in str(told.value) and "\n" not in str(told.value)
    assert not out.exists() or [path.name for path in out.iterdir()] in ([], [".lock"])


def test_without_peft_it_says_what_to_install(train, work, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    flags = ["--model_name_or_path", str(work / "base"), "--data", str(work / "records.json"), "--lora_r", "4"]
    with pytest.raises(UserError, match=r"need PEFT, which is not installed: pip install 'gpt2-.*\[lora\]'"):
        train([*flags, "--output_dir", str(tmp_path / "out")])
    with pytest.raises(UserError, match="need PEFT, which is not installed"):
        loaded(work / "adapter")


def test_which_layers_are_adapted_by_default_and_by_name(demo_model):
    assert target_modules(demo_model, None) == ["c_attn"]  # PEFT's, for GPT-2
    assert target_modules(demo_model, ["attn.c_proj"]) == ["attn.c_proj"]
    assert target_modules(demo_model, ["all-linear"]) == "all-linear"
    demo_model.config.model_type = "of nobody"
    with pytest.raises(UserError, match="no layers to adapt by default for of nobody: give --lora_target_modules, of"):
        target_modules(demo_model, None)


def test_only_training_asks_for_a_rank():
    assert LoraArguments().lora_r is None
    with pytest.raises(UserError, match="--use_rslora: for adapters alone"):
        LoraArguments(use_rslora=True)


# --- evaluation -----------------------------------------------------------------------------------------------------


def texts(folder: Path, label: str) -> list[tuple]:
    rows = map(json.loads, (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines())
    kept = ("text", "tokens", "stop_reason", "reference_loss")
    return [tuple(row[label][name] for name in kept) for row in rows]


def test_an_adapter_and_its_base_are_asked_as_one_model(work, whole, evaluate, tmp_path, monkeypatch):
    """The base, with the adapter off, answers as it does alone; the adapter as the merged model. One is loaded."""
    opened = []
    load = AutoModelForCausalLM.from_pretrained

    def counted(name, *args, **kwargs):
        opened.append(str(name))
        return load(name, *args, **kwargs)

    asked = ["--split", "all", "--max_new_tokens", "16", "--batch_size", "7", "--dtype", "float32"]
    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    evaluate("--model", work / "adapter", "--output_dir", tmp_path / "one", *asked)
    assert opened == [str(work / "base")]
    evaluate("--model", whole, "--baseline", work / "base", "--output_dir", tmp_path / "two", *asked)
    assert opened[1:] == [str(work / "base"), str(whole)]
    assert texts(tmp_path / "one", "baseline") == texts(tmp_path / "two", "baseline")
    one, two = texts(tmp_path / "one", "tuned"), texts(tmp_path / "two", "tuned")
    assert [row[:3] for row in one] == [row[:3] for row in two]
    assert [row[3] for row in one] == pytest.approx([row[3] for row in two], abs=2e-4)  # 4 digits are kept
    assert texts(tmp_path / "one", "tuned") != texts(tmp_path / "one", "baseline")
    models = json.loads((tmp_path / "one" / "evaluation.json").read_text())["models"]
    assert models["baseline"]["name"] == str(work / "base")
    assert models["baseline"]["weights"] == weights_hash(str(work / "base"))
    assert models["tuned"]["weights"] == weights_hash(str(work / "adapter"))

    evaluate("--model", work / "adapter", "--baseline", DEMO / "base", "--output_dir", tmp_path / "three", *asked)
    assert texts(tmp_path / "three", "baseline") == texts(tmp_path / "one", "baseline")
    assert texts(tmp_path / "three", "tuned") == texts(tmp_path / "one", "tuned")


def test_a_checkpoint_is_asked_too(work, evaluate, tmp_path):
    checkpoint = next((work / "adapter").glob("checkpoint-*"))
    evaluate("--model", checkpoint, "--split", "test", "--max_new_tokens", "2", "--output_dir", tmp_path / "out")
    assert (tmp_path / "out" / "report.html").is_file()


def test_a_base_that_is_gone_or_another_is_named(work, adapter, tmp_path, evaluate):
    settings = adapter / "adapter_config.json"
    written = json.loads(settings.read_text())
    gone = str(tmp_path / "gone" / "base")
    settings.write_text(json.dumps(written | {"base_model_name_or_path": gone}))
    with pytest.raises(UserError) as told:
        evaluate("--model", adapter, "--output_dir", tmp_path / "out", "--max_new_tokens", "2")
    assert gone in str(told.value) and "no such folder" in str(told.value) and "\n" not in str(told.value)
    assert not (tmp_path / "out" / "predictions.jsonl").exists()

    other = shutil.copytree(work / "base", tmp_path / "other")
    weights = load_file(other / "model.safetensors")
    weights["transformer.ln_f.bias"] += 1e-3
    save_file(weights, other / "model.safetensors", metadata={"format": "pt"})
    (other / "manifest.json").unlink(missing_ok=True)
    settings.write_text(json.dumps(written | {"base_model_name_or_path": str(other)}))
    with pytest.raises(UserError, match=r"its weights are others \(sha256:\w+\) than those it was trained with"):
        loaded(adapter)

    settings.write_text(json.dumps(written))
    lacking = {name: t for name, t in load_file(adapter / "adapter_model.safetensors").items() if ".h.0." not in name}
    save_file(lacking, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match=r"does not fit the model .*: Found missing adapter keys"):
        loaded(adapter)


def test_what_ends_an_answer_is_saved_with_the_adapter(work, adapter):
    """PEFT saves the adapter alone; the base model stops at its own ends again when the adapter is off."""
    config = GenerationConfig.from_pretrained(adapter)
    assert config.do_sample is False and config.eos_token_id == AutoTokenizer.from_pretrained(adapter).eos_token_id
    config.eos_token_id = [config.eos_token_id, 17]
    config.save_pretrained(adapter)
    arguments = ModelArguments(str(adapter))
    model, own = load_adapter(arguments, base_of(str(adapter)), load_tokenizer(arguments))
    assert model.generation_config.eos_token_id == config.eos_token_id
    assert own.eos_token_id == GenerationConfig.from_pretrained(work / "base").eos_token_id


def test_it_generates_with_the_cache_of_a_common_start(work, monkeypatch):
    """As a whole model: the answers are those of one prompt at a time by PEFT, and the start is computed once."""
    model, tokenizer = loaded(work / "adapter"), AutoTokenizer.from_pretrained(work / "adapter")
    widths = []
    model.get_base_model().transformer.register_forward_pre_hook(
        lambda _, args, kwargs: widths.append((args[0] if args else kwargs["input_ids"]).shape), with_kwargs=True
    )
    responses = generate_responses(model, tokenizer, PROMPTS, max_new_tokens=20)
    assert widths[0][0] == 1 and widths[0][1] > 10  # the common start, as one row
    widths.clear()
    for response, tokens in zip(responses, answers(model, work / "adapter"), strict=True):
        assert response.token_ids == [token for token in tokens if token != tokenizer.eos_token_id]


# --- as one model, and elsewhere --------------------------------------------------------------------------------------


def test_merged_it_answers_as_before_and_says_how_it_was_made(work, whole, expected):
    assert answers(AutoModelForCausalLM.from_pretrained(whole), whole) == expected
    names = {path.name for path in whole.iterdir()}
    assert names >= {"model.safetensors", "config.json", "chat_template.jinja", "run.json", "README.md", "loss.png"}
    assert not any("adapter" in name for name in names) and find_damage(whole) is None
    run = json.loads((whole / "run.json").read_text())
    assert run["merged"]["adapter_weights"] == weights_hash(str(work / "adapter"))
    card = (whole / "README.md").read_text(encoding="utf-8")
    assert "; merged into these weights |" in card and "| parameters | 2,074,752 |" in card
    assert "library_name: transformers" in card
    before = (whole / "model.safetensors").read_bytes()
    done = script("merge", work / "adapter", "--output_dir", whole, expect=1)
    assert "holds files already, and nothing is replaced" in done.stderr
    assert (whole / "model.safetensors").read_bytes() == before
    done = script("merge", whole, "--output_dir", work / "again", expect=1)
    assert "no adapter is there" in done.stderr


def test_an_adapted_head_that_shares_its_weight_is_not_merged(demo_model):
    """Merged, the weight of the embedding would change with it. One that is zero changes nothing."""
    lora = peft.LoraConfig(target_modules=["lm_head"], task_type="CAUSAL_LM")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(demo_model, lora)
    for parameter in model.parameters():
        if parameter.requires_grad:
            torch.nn.init.normal_(parameter, std=0.1)
    with pytest.raises(UserError, match=r"it: merged, the logits are off by \S+ of their size; keep the adapter"):
        merged(model, "it")


def test_prompt_tuning_cannot_be_merged(demo_model):
    model = peft.get_peft_model(demo_model, peft.PromptTuningConfig(num_virtual_tokens=3, task_type="CAUSAL_LM"))
    with pytest.raises(UserError, match="put tokens before a text, which no weights can hold"):
        merged(model, "it")


def test_transformers_alone_gives_the_same_answers(work, expected):
    folder = str(work / "adapter")
    assert answers(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32), folder) == expected
    generator = pipeline("text-generation", model=folder, tokenizer=folder, device="cpu", dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for record, tokens in zip(RECORDS[60:70], expected, strict=True):
        message = {"role": "user", "content": record["instruction"], "input": record["input"]}
        [found] = generator([message], max_new_tokens=20, do_sample=False)
        assert found["generated_text"][-1]["content"] == tokenizer.decode(tokens, skip_special_tokens=True)


def test_its_files_are_what_vllm_takes(work):
    """By what vLLM's `lora/peft_helper.py` and `parse_fine_tuned_lora_name` read and refuse; it was not run."""
    settings = json.loads((work / "adapter" / "adapter_config.json").read_text())
    assert settings["bias"] == "none" and not settings["modules_to_save"] and not settings["use_dora"]
    assert settings["r"] <= 512 and isinstance(settings["lora_alpha"], int)  # the largest --max-lora-rank
    names = load_file(work / "adapter" / "adapter_model.safetensors").keys()
    modules = [re.fullmatch(r"base_model\.model\.(.+)\.lora_([AB])\.weight", name) for name in names]
    assert all(modules) and {found[1].rpartition(".")[2] for found in modules} == set(settings["target_modules"])
    assert {found[2] for found in modules} == {"A", "B"}


# --- the Hub --------------------------------------------------------------------------------------------------------


def test_a_pushed_adapter_names_its_base_on_the_hub(work, adapter, tmp_path):
    with LoopbackHub() as hub:
        environment = {
            "HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITE_TOKEN,
            "HF_HOME": str(tmp_path / "home"),
        }  # fmt: skip
        flags = (adapter, "--repo_id", "someone/adapter")
        done = script("publish", *flags, expect=1, **environment)
        assert "scripts/publish.py --base HUB_ID; or push what scripts/merge.py makes" in done.stderr
        assert not hub.sent("POST", "/commit/")
        before = (adapter / "adapter_config.json").read_bytes()
        script("publish", *flags, "--base", "someone/base", **environment)
        files = hub.repositories["models/someone/adapter"].files()
        assert json.loads(files["adapter_config.json"])["base_model_name_or_path"] == "someone/base"
        assert (adapter / "adapter_config.json").read_bytes() == before
        assert "base_model: someone/base" in files["README.md"].decode()
        assert files.keys() >= {"adapter_model.safetensors", "generation_config.json", "tokenizer.json", "run.json"}
        assert not any(str(work).encode() in content for content in files.values())
        done = script("publish", work / "base", "--repo_id", "someone/x", "--base", "a/b", "--dry_run", expect=1)
        assert "a whole model needs no base" in done.stderr
    pushed = tmp_path / "pushed"
    pushed.mkdir()
    for name, content in files.items():
        (pushed / name).write_bytes(content)
    with serve_hub({"models/someone/adapter": pushed, "models/someone/base": work / "base"}) as endpoint:
        environment |= {"HF_ENDPOINT": endpoint, "HF_HOME": str(tmp_path / "other")}
        asked = ("--data", work / "records.json", "--split", "all", "--max_new_tokens", "8", "--dtype", "float32")
        script("eval", "--model", "someone/adapter", *asked, "--output_dir", tmp_path / "hub", **environment)
    script("eval", "--model", adapter, *asked, "--output_dir", tmp_path / "here")
    for label in ("baseline", "tuned"):
        assert texts(tmp_path / "hub", label) == texts(tmp_path / "here", label)


def test_trained_from_the_hub_it_names_the_commit(work, tmp_path):
    with serve_hub({"models/someone/base": work / "base"}) as endpoint:
        environment = {
            "HF_ENDPOINT": endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1",
            "HF_HOME": str(tmp_path / "home"), "HF_DATASETS_CACHE": str(work / "cache"),
        }  # fmt: skip
        script(
            "train", "--model_name_or_path", "someone/base", "--data", work / "records.json", "--lora_r", "2",
            "--output_dir", tmp_path / "run", "--max_steps", "1", "--use_cpu", "true", "--report_to", "none",
            **environment,
        )  # fmt: skip
        settings = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        commit = json.loads((tmp_path / "run" / "run.json").read_text())["hub"]["base_commit"]
        assert settings["base_model_name_or_path"] == "someone/base"
        assert settings["revision"] == commit and re.fullmatch("[0-9a-f]{40}", commit)
        assert base_of(str(tmp_path / "run")).revision == commit
        asked = ("--model", tmp_path / "run", "--split", "test", "--max_new_tokens", "2")
        script("eval", *asked, "--output_dir", tmp_path / "out", **environment)
    models = json.loads((tmp_path / "out" / "evaluation.json").read_text())["models"]
    assert models["baseline"]["name"] == "someone/base" and models["baseline"]["weights"] == commit
