"""The modules of the `evaluate` library: alone, combined, and without the network."""

import math
import socket

import evaluate
import pytest

from recipe.evaluation.measures import BEHAVIOUR, METRICS, score_responses
from recipe.evaluation.metrics import (
    BitsPerByte,
    Bleu,
    ChrF,
    Distinct2,
    EmptyRate,
    ExactMatch,
    LengthRatio,
    Perplexity,
    ReferenceLoss,
    Repeated4Grams,
    RougeL,
    StopRate,
    TokenF1,
)

PAIR = {"predictions": ["A cat."], "references": ["The cat."]}
EXAMPLES = [  # metric, columns, score
    (ExactMatch, {"predictions": ["A cat.", "Two  cats."], "references": ["The cat.", "Two cats."]}, 0.5),
    (TokenF1, PAIR, 1.0),
    (RougeL, PAIR, 0.5),
    (ChrF, {"predictions": ["abcd", "x"], "references": ["abcd", "y"]}, 0.95),  # 4 of 5 letters, all 2-, 3-, 4-grams
    (Bleu, {"predictions": ["a b c d"], "references": ["a b c d"]}, 1.0),
    (ReferenceLoss, {"loss_sums": [2.0, 4.0, None], "token_counts": [1, 3, None]}, 1.5),
    (Perplexity, {"loss_sums": [0.0, 0.0], "token_counts": [1, 3]}, 1.0),
    (BitsPerByte, {"loss_sums": [math.log(2) * 6, None], "references": ["né", "x"]}, 2.0),  # 6 bits, 3 bytes
    (StopRate, {"stop_reasons": ["eos", "eos", "length", "context"]}, 0.5),
    (LengthRatio, {"predictions": ["one two three"], "references": ["one two"]}, 1.5),
    (Distinct2, {"predictions": ["a b a b", "a b"]}, 0.5),  # "a b", "b a" of four
    (Repeated4Grams, {"predictions": ["a a a a a", "a b c"]}, 0.25),  # a half, and none
    (EmptyRate, {"predictions": ["", "\n", "a", "b"]}, 0.5),
]
ALL = dict(zip([*METRICS, *BEHAVIOUR], [metric for metric, _, _ in EXAMPLES], strict=True))


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.mark.parametrize(("metric", "columns", "expected"), EXAMPLES)
def test_each_metric_scores_its_example(metric, columns, expected):
    [(name, value)] = metric().compute(**columns).items()
    assert ALL[name] is metric and value == pytest.approx(expected)
    info = metric()._info()
    assert list(info.features) == list(columns) and info.citation and metric.__doc__.startswith(info.description)


def test_text_modules_combine_without_the_network(no_network):
    combined = evaluate.combine([ExactMatch(), TokenF1(), RougeL(), ChrF(), Bleu(), LengthRatio(), Distinct2()])
    predictions, references = ["A cat.", "He goes home."], ["The cat.", "He goes home."]
    result = combined.compute(predictions=predictions, references=references)
    assert (result["exact_match"], result["token_f1"], result["rouge_l"]) == (0.5, 1.0, 0.75)
    assert result == {name: score_responses(predictions, references)[name] for name in result}


def test_all_modules_combine_and_each_takes_its_features(no_network, tmp_path):
    result = evaluate.combine([module() for module in ALL.values()]).compute(
        predictions=["cats", "a dog"],
        references=["cats", "dogs"],
        stop_reasons=["eos", "length"],
        loss_sums=[3.0, None],
        token_counts=[2, None],
    )
    assert list(result) == list(ALL)
    assert (result["exact_match"], result["stop_rate"], result["reference_loss"]) == (0.5, 0.5, 1.5)
    assert result["perplexity"] == pytest.approx(math.exp(1.5))
    evaluate.save(tmp_path / "result.json", **result)  # refuses what is not plain JSON


def test_batches_may_be_added_one_after_another():
    module = ExactMatch()
    module.add(prediction="a", reference="a")
    module.add_batch(predictions=["b", "c"], references=["b", "x"])
    assert module.compute() == {"exact_match": pytest.approx(2 / 3)}


def test_what_is_not_known_is_none():
    assert Bleu().compute(predictions=["Paris"], references=["Paris"]) == {"bleu": None}
    assert BitsPerByte().compute(loss_sums=[None], references=["x"]) == {"bits_per_byte": None}
    assert StopRate().compute(stop_reasons=["eos", None]) == {"stop_rate": None}
    assert Perplexity().compute(loss_sums=[None], token_counts=[None]) == {"perplexity": None}


def test_nothing_to_score_is_an_error():
    for module in (ExactMatch(), Bleu(), ChrF(), LengthRatio()):
        with pytest.raises(ValueError, match="no predictions"):
            module.compute(predictions=[], references=[])
