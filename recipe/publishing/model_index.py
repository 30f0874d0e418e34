"""Scores as the Hub reads them from a model card: `model-index`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult
from huggingface_hub.repocard_data import eval_results_to_model_index
from huggingface_hub.utils import HFValidationError, validate_repo_id

from recipe.files import write_whole


def is_data_file(source: str) -> bool:
    """Whether a name ends like a file of records."""
    from recipe.data.sources import FORMATS  # here: it brings datasets, and --help needs none of it

    return Path(source).suffix in FORMATS


def is_hub_id(source: Any) -> bool:
    """Whether a model or data source is named by its id on the Hub: `name` or `owner/name`, and no file or folder here.

    >>> [is_hub_id(source) for source in ("openai-community/gpt2", "records.jsonl", "runs/2024/gpt2", "data/*.json")]
    [True, False, False, False]
    """
    try:
        validate_repo_id(source or "")
    except HFValidationError:
        return False
    return not is_data_file(source) and not Path(source).exists()


def eval_results(metrics: Mapping[str, Any]) -> list[EvalResult]:
    """The tuned model's scores on every split as `model-index` entries; with each, its interval, `n` and baseline.

    Example::

        [first, *_] = eval_results(json.loads(Path("outputs/demo-eval/metrics.json").read_text()))
        first.metric_type, first.metric_value  # ('exact_match', 0.9225)
        first.metric_args  # {'n': 400, 'baseline': 0.0, 'delta': 0.9225, 'ci95': [0.895, 0.9475], ...}
    """
    from recipe.evaluation.measures import MEASURES  # here: its libraries take a while, and --help needs none of it

    data = metrics["provenance"]["data"]
    name = Path(data).name if isinstance(data, str) else ""  # a mapping or a list names several files
    return [
        EvalResult(
            task_type="text-generation",
            task_name="Instruction following",
            dataset_type=data if is_hub_id(data) else "instruction-records",
            dataset_name=data if is_hub_id(data) else name or "instruction records",
            dataset_split=split,
            metric_type=metric,
            metric_name=MEASURES[metric].title,
            metric_value=score["tuned"],
            metric_args={
                **{key: score[key] for key in ("n", "baseline", "delta", "ci95")},
                "ci95_of": "tuned" if score["delta"] is None else "delta",
            },
        )
        for split, scores in metrics["splits"].items()
        for metric, score in {**scores["metrics"], **scores["behaviour"]}.items()
        if score is not None and score["tuned"] is not None
    ]


def write_model_index(path: Path, metrics: Mapping[str, Any]) -> None:
    """Write the scores as the YAML block `model-index` that a model card carries."""
    models = metrics["provenance"]["models"]
    index = eval_results_to_model_index(Path(models["tuned"]["name"]).name or "tuned", eval_results(metrics))
    write_whole(path, yaml.safe_dump({"model-index": index}, sort_keys=False, allow_unicode=True))
