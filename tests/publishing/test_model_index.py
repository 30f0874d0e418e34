"""What the Hub reads of a model's scores."""

import yaml
from huggingface_hub import ModelCardData
from huggingface_hub.repocard_data import model_index_to_eval_results

from recipe.publishing.model_index import eval_results, write_model_index

SCORE = {"baseline": 0.1, "tuned": 0.8, "delta": 0.7, "ci95": [0.6, 0.75], "better": "higher", "n": 100}
METRICS = {
    "splits": {
        "test": {
            "metrics": {"exact_match": SCORE, "perplexity": {**SCORE, "tuned": None}},
            "behaviour": {"stop_rate": None},
        },
        "unseen": {"metrics": {"chrf": {**SCORE, "baseline": None, "delta": None}}, "behaviour": {}},
    },
    "provenance": {"data": {"test": "a.jsonl"}, "models": {"tuned": {"name": "outputs/demo"}}},
}


def test_scores_with_intervals_come_back_from_the_cards_metadata(tmp_path):
    write_model_index(tmp_path / "model-index.yml", METRICS)
    index = yaml.safe_load((tmp_path / "model-index.yml").read_text(encoding="utf-8"))["model-index"]
    name, results = model_index_to_eval_results(index)
    assert name == "demo"
    assert [(r.dataset_split, r.metric_type, r.metric_name, r.metric_value) for r in results] == [
        ("test", "exact_match", "Exact match", 0.8), ("unseen", "chrf", "chrF", 0.8),
    ]  # fmt: skip
    assert results[0].metric_args == {"n": 100, "baseline": 0.1, "delta": 0.7, "ci95": [0.6, 0.75], "ci95_of": "delta"}
    assert results[1].metric_args["ci95_of"] == "tuned"
    data = ModelCardData(model_name="demo", eval_results=eval_results(METRICS))
    assert ModelCardData(**yaml.safe_load(data.to_yaml())).to_dict()["model-index"] == index
