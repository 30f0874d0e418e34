"""The modules of the `evaluate` library: alone, combined, and without the network."""

import doctest
import math
import socket

import evaluate
import pytest

from recipe.evaluation import metrics
from recipe.evaluation.measures import BEHAVIOUR, METRICS, score_responses
from recipe.evaluation.metrics import (
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

ALL = {
    "exact_match": ExactMatch, "token_f1": TokenF1, "rouge_l": RougeL, "chrf": ChrF, "bleu": Bleu,
    "reference_loss": ReferenceLoss, "perplexity": Perplexity, "stop_rate": StopRate, "length_ratio": LengthRatio,
    "distinct_2": Distinct2, "repeated_4grams": Repeated4Grams, "empty_rate": EmptyRate,
}  # fmt: skip


@pytest.fixture
def no_network(monkeypatch):
    def refuse(*_):
        raise AssertionError("a connection was tried")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


def test_every_score_has_its_module():
    assert list(ALL) == [*METRICS, *BEHAVIOUR]
    for name, module in ALL.items():
        info = module()._info()
        assert module.key == name and list(info.features) == list(module.measure().features)
        assert info.citation and ">>>" in info.description


def test_text_modules_combine_without_the_network(no_network):
    combined = evaluate.combine([ExactMatch(), TokenF1(), RougeL(), ChrF(), Bleu(), LengthRatio(), Distinct2()])
    predictions, references = ["A cat.", "He goes."], ["The cat.", "He goes."]
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
    assert StopRate().compute(stop_reasons=["eos", None]) == {"stop_rate": None}
    assert Perplexity().compute(loss_sums=[None], token_counts=[None]) == {"perplexity": None}


def test_nothing_to_score_is_an_error():
    for module in (ExactMatch(), Bleu(), ChrF(), LengthRatio()):
        with pytest.raises(ValueError, match="no predictions"):
            module.compute(predictions=[], references=[])


def test_docstring_examples():
    failed, run = doctest.testmod(metrics)
    assert run >= len(ALL) and not failed
