"""A Hub on a loopback port, and the folder of a run."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import DEMO
from huggingface_hub import constants
from loopback_hub import WRITE_TOKEN, LoopbackHub
from transformers import TrainingArguments

import recipe.publishing.hub

CARD = "---\nlibrary_name: transformers\n---\n\n# A model\n"


@pytest.fixture
def hub(monkeypatch):
    """All tests but those of whole scripts talk to it in this process, in which the library was told to be offline."""
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(recipe.publishing.hub, "WAITS", (0, 0, 0))
    monkeypatch.setenv("HF_TOKEN", WRITE_TOKEN)
    with LoopbackHub() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.endpoint)  # these two are what HF_ENDPOINT sets
        template = f"{hub.endpoint}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)
        yield hub


@pytest.fixture
def folder(tmp_path) -> Path:
    """What a run leaves, with all that must stay here; `training_args.bin` as the stock Trainer writes it."""
    folder = tmp_path / "run"
    shutil.copytree(DEMO / "base", folder)
    for name, text in {"README.md": CARD, "run.json": "{}\n", "trainer_state.json": "{}\n"}.items():
        (folder / name).write_text(text)
    (folder / "loss.png").write_bytes(b"\x89PNG" + bytes(100))
    torch.save(TrainingArguments(str(folder), hub_token=WRITE_TOKEN), folder / "training_args.bin")
    for name in ("optimizer.pt", "rng_state.pth", "events.out.tfevents.1", "pytorch_model.bin", "run.json.tmp"):
        (folder / name).write_text("stays here")
    for name in ("checkpoint-2/model.safetensors", ".cache/huggingface/x.json", "runs/events", "modeling_own.py"):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("stays here")
    return folder
