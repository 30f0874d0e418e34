"""The model card of a fine-tuned model."""

from __future__ import annotations

import glob
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCard, ModelCardData

CARD_TEMPLATE = Path(__file__).with_name("model_card.md.jinja")


def write_model_card(output_dir: Path, run: Mapping[str, Any]) -> None:
    """Write `README.md` beside the weights, from what `run.json` holds."""
    model, data = run["config"]["model"], run["config"]["data"]
    base_model = model["model_name_or_path"]
    card_data = ModelCardData(
        base_model=base_model if is_hub_id(base_model) else None,
        datasets=[data["data"]] if is_hub_id(data["data"]) else None,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["instruction-tuning", "sft"],
    )
    card = ModelCard.from_template(
        card_data, template_path=str(CARD_TEMPLATE), name=output_dir.name, run=run, data=data
    )
    card.save(output_dir / "README.md")


def is_hub_id(source: Any) -> bool:
    """Whether a model or data source is named by its id on the Hub."""
    return bool(source) and isinstance(source, str) and not glob.has_magic(source) and not Path(source).exists()
