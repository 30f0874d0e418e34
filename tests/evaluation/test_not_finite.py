"""Models that compute no numbers are named as that: weights with NaN before anything is asked, and overflows."""

import json
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from safetensors.torch import load_file, save_file
from test_generate import few  # noqa: F401
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.config import ModelArguments, UserError
from recipe.evaluation.verdict import cautions
from recipe.model import check_finite, load_model, load_tokenizer


def changed(folder: Path, **values: float) -> Path:
    """The demo's base with one value of some tensors replaced; `__` stands for a point in their names."""
    AutoModelForCausalLM.from_pretrained(DEMO / "base").save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "base").save_pretrained(folder)
    tensors = load_file(folder / "model.safetensors")
    for name, value in values.items():
        tensors[name.replace("__", ".")].view(-1)[3] = value
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return folder


@pytest.mark.parametrize(("value", "word"), [(float("nan"), "nan"), (float("inf"), "inf"), (float("-inf"), "inf")])
def test_weights_that_are_not_finite_are_refused_by_name(tmp_path, value, word):
    folder = changed(tmp_path / "broken", transformer__h__1__mlp__c_fc__bias=value)
    message = rf"broken': model.safetensors is not finite: transformer.h.1.mlp.c_fc.bias holds {word} \(1 of \d+\)"
    with pytest.raises(UserError, match=message):
        check_finite(str(folder))
    with pytest.raises(UserError, match=r"transformer.h.1.mlp.c_fc.bias holds"):
        model_args = ModelArguments(str(folder))
        load_model(model_args, load_tokenizer(model_args))


def test_weights_of_every_kind_are_looked_at(tmp_path):
    tensors = {"a": torch.ones(3, dtype=torch.int64), "b": torch.ones(3, dtype=torch.bfloat16), "c": torch.ones(3)}
    save_file(tensors, tmp_path / "model-00001-of-00002.safetensors")
    check_finite(str(tmp_path))
    save_file(
        {"d": torch.tensor([1.0, float("nan")]).to(torch.float8_e4m3fn)}, tmp_path / "model-00002-of-00002.safetensors"
    )
    with pytest.raises(UserError, match=r"model-00002-of-00002.safetensors is not finite: d holds nan \(1 of 2\)"):
        check_finite(str(tmp_path))
    check_finite("no/folder")  # an id of the Hub: looked at when it is loaded


def test_a_baseline_with_nan_is_refused_before_anything_is_asked(tmp_path, evaluate, few):  # noqa: F811
    folder, out = changed(tmp_path / "broken", transformer__wte__weight=float("nan")), tmp_path / "out"
    for flags in (["--model", DEMO / "base", "--baseline", folder], ["--model", folder, "--baseline", "echo"]):
        with pytest.raises(
            UserError, match=r"broken': model.safetensors is not finite: transformer.wte.weight holds nan"
        ):
            evaluate(*flags, "--data", few, "--output_dir", out)
        assert not (out / "predictions.jsonl").exists()


def test_weights_too_large_for_float16_say_so(tmp_path):
    folder = changed(tmp_path / "large", transformer__ln_f__weight=1e5)
    check_finite(str(folder))
    model_args = ModelArguments(str(folder), dtype="float16")
    with pytest.raises(
        UserError, match=r"in float16 is not finite: transformer.ln_f.weight holds inf .* --dtype float32"
    ):
        load_model(model_args, load_tokenizer(model_args))


def test_finite_weights_that_overflow_get_a_caution_with_the_true_cause(tmp_path, evaluate, few):  # noqa: F811
    """Two values whose product is beyond float32: the weights are finite, what is computed is not."""
    folder = changed(tmp_path / "overflow", transformer__ln_f__weight=3e38, transformer__ln_f__bias=3e38)
    out = tmp_path / "out"
    evaluate("--model", folder, "--baseline", DEMO / "base", "--data", few, "--output_dir", out, "--max_new_tokens", 4)
    metrics = json.loads((out / "metrics.json").read_text(encoding="utf-8"))
    rows = [json.loads(line) for line in (out / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]
    assert {row["tuned"]["reference_loss"] for row in rows} == {None} and all(
        r["tuned"]["reference_tokens"] for r in rows
    )
    for name in ("reference_loss", "perplexity", "bits_per_byte"):
        assert "NaN or infinite" in metrics["metrics"][name]["reason"]
    said = [text for text in cautions(metrics, rows, ["baseline", "tuned"]) if "NaN or infinite" in text]
    assert any(text.startswith("8 of 8 references gave the tuned model outputs") and "float32" in text for text in said)
    assert not any("base model outputs" in text for text in said)
