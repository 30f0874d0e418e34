"""Files of our own, edited or damaged: they are read right, or refused in a line that names them; never other numbers.

`make chaos` tries 1,000 edits with each of three seeds; docs/results/fuzz-outputs.json has what came of them.
"""

import json
import os
import random
import shutil
import subprocess
import traceback
from pathlib import Path

import edits
import fuzz_outputs
import pytest
from conftest import DEMO
from evaluation_samples import LOG_HISTORY, make_judge, make_judge_rows, make_metrics, make_predictions
from safetensors.torch import save_file
from torch import zeros

from recipe.config import ModelArguments, UserError
from recipe.evaluation import stored
from recipe.evaluation.answers import read_answers
from recipe.evaluation.judge.run import answers_hash, read_cache
from recipe.files import (
    file_hash,
    parse_json,
    read_json,
    read_json_lines,
    read_sealed,
    sealed,
    write_json_lines,
    write_sealed,
)
from recipe.manifest import Seal, check_unchanged, read_manifest
from recipe.model import check_finite, load_tokenizer
from recipe.provenance import read_run
from recipe.publishing.hub import files_to_push, refuse_local_folders
from recipe.publishing.public_paths import public_files
from recipe.shapes import COUNT, check_shape, fits

EVALUATION = ("eval/predictions.jsonl", "eval/metrics.json", "eval/judge.jsonl", "eval/evaluation.json")


@pytest.mark.parametrize("reader", ["report", "score"])
def test_edits_end_well(folder, evaluate, monkeypatch, capsys, reader, tmp_path_factory):
    """A sample of the long form, in this process and without figures, on an evaluation that is made up."""
    monkeypatch.setattr("recipe.evaluation.report.page.draw_pictures", lambda *_: {})
    monkeypatch.chdir(tmp_path_factory.mktemp("cases"))
    stages = ("score", "report") if reader == "score" else ("report",)

    def result() -> tuple[dict, subprocess.CompletedProcess]:
        code, error = 0, ""
        try:
            evaluate("--stages", *stages, "--output_dir", "eval")
        except (UserError, OSError) as raised:
            code, error = 1, f"error: {raised}"
        except Exception:
            code, error = 1, traceback.format_exc()
        said = capsys.readouterr()
        done = subprocess.CompletedProcess([], code, said.out.encode(), (said.err + error).encode())
        return fuzz_outputs.found(reader, Path(), done), done

    shutil.copytree(folder, "eval")
    expected, done = result()
    assert done.returncode == 0 and done.stderr == b""
    expected["said"], draw, bad = fuzz_outputs.words_of(done), random.Random(7), []
    readers = {file: (reader,) for file in EVALUATION if reader in fuzz_outputs.READERS[file]}
    endings = set()
    for _ in range(25):
        case = fuzz_outputs.draw_case(draw, readers)
        shutil.rmtree("eval")
        shutil.copytree(folder, "eval")
        edits.apply(Path(case.file), case.edit, random.Random(case.seed), case.unsealed)
        ending = fuzz_outputs.judged(case, expected, *result())
        endings.add(ending.how)
        bad += [(case, ending)] if ending.how in fuzz_outputs.BAD else []
    assert not bad and {"refused", "told"} <= endings


def test_an_ending_is_told_from_another():
    """What the long form counts as bad: a traceback, an error that names no file, other results and no word of it."""
    case, same = fuzz_outputs.Case("eval/metrics.json", "null", "report", 0), {"page": "a", "said": set()}

    def ending(code: int, errors: str, results: dict) -> str:
        done = subprocess.CompletedProcess([], code, b"", errors.encode())
        return fuzz_outputs.judged(case, same, results, done).how

    assert ending(0, "", {"page": "a"}) == "same" and ending(0, "", {"page": "b"}) == "silent"
    assert ending(0, "note: eval/metrics.json holds", {"page": "b"}) == "told"
    assert ending(1, "error: eval/metrics.json: n is null", {}) == "refused"
    assert ending(1, "error: n is null", {}) == "unclear"
    assert ending(1, "Traceback (most recent call last):\n", {}) == ending(-11, "", {}) == "traceback"


@pytest.mark.parametrize("edit", [*edits.BYTES, *edits.PLACES, *dict.fromkeys(edits.TREES)])
def test_each_edit_changes_a_file(tmp_path, edit):
    path = tmp_path / "a.json"
    content = json.dumps({"n": 12, "words": ["a", "b"], "inner": {"x": 0.25}}, indent=2) + "\n"
    path.write_text(content)
    edits.apply(path, edit, random.Random(1))
    assert edit in edits.PLACES or path.read_bytes() != content.encode()


# --- an evaluation's folder -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    """A finished evaluation, with a judge."""
    tmp_path = tmp_path_factory.mktemp("made")
    predictions = make_predictions(40)
    rows = make_judge_rows(predictions)
    write_json_lines(tmp_path / "predictions.jsonl", predictions)
    write_json_lines(tmp_path / "judge.jsonl", rows)
    labels = ["baseline", "tuned"]
    of_answers = {"labels": labels, "answers": answers_hash(predictions, labels)}
    judge = make_judge(rows) | of_answers | {"rows_hash": file_hash(tmp_path / "judge.jsonl")}
    metrics = make_metrics(predictions, judge)
    begun = {**metrics["provenance"], "predictions_hash": file_hash(tmp_path / "predictions.jsonl")}
    write_sealed(tmp_path / "evaluation.json", begun)
    write_sealed(tmp_path / "metrics.json", {**metrics, "provenance": {**begun, "edited": False}})
    return tmp_path


@pytest.fixture
def folder(made, tmp_path) -> Path:
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def edited(path: Path, *place: str | int, value: object, seal: bool = False) -> None:
    """A file with another value in one place; without its hash, or with that of what it holds now."""
    content = json.loads(path.read_text(encoding="utf-8"))
    inner = content
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    content.pop("sha256")
    path.write_text(json.dumps(sealed(content) if seal else content), encoding="utf-8")


def refused(error: pytest.ExceptionInfo) -> str:
    assert "\n" not in str(error.value)
    return str(error.value)


def test_what_is_whole_is_read_as_it_was_written(folder, capsys):
    predictions, metrics = stored.read_predictions(folder), stored.read_metrics(folder)
    assert predictions == make_predictions(40) and metrics["n"] == 32
    stored.check_scored(folder, predictions, metrics)
    assert len(stored.read_judgements(folder, metrics["judge"])) == 4 * 32
    assert stored.provenance_of(predictions, folder)["edited"] is False
    assert capsys.readouterr() == ("", "")


def test_a_number_that_was_edited_is_not_shown_as_computed(folder, capsys):
    path = folder / "metrics.json"
    text = path.read_text(encoding="utf-8")
    path.write_text(text.replace('"n": 32', '"n": 33', 1), encoding="utf-8")
    with pytest.raises(
        UserError, match=r"metrics\.json was changed after it was written .* run the score stage"
    ) as error:
        stored.read_metrics(folder)
    assert "take the line 'sha256' out" in refused(error)
    edited(path, "splits", "test", "n", value=32)  # as an earlier version wrote it
    assert stored.read_metrics(folder)["splits"]["test"]["n"] == 32
    assert capsys.readouterr().err == f"note: {path} holds no hash of itself, so whether it was changed is not known\n"


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("splits", "test", "metrics", "chrf", "tuned"), "0.5", r"chrf\.tuned is '0\.5', not a number or null"),
        (("splits", "test", "metrics", "exact_match", "ci95"), [0.1], r"ci95 is a list of 1, not a list of 2;"),
        (("splits", "test", "n"), True, r"splits\.test\.n is true, not a whole number from 0 up"),
        (("splits", "test", "metrics", "exact_match", "p"), 10**400, r"exact_match\.p is 1000"),
        (("splits", "test", "families"), None, r"families is null, not an object"),
        (("splits",), {}, "no splits"),
        (("splits", "test", "metrics", "my_score"), "copy", "an unknown score, 'my_score'"),
        (("splits", "test", "metrics"), {}, "no exact_match of test, the headline score"),
        (("other_models",), {"x": {}}, "a model without scores of a split"),
        (("judge",), [], r"judge is a list of 0, not an object or null"),
        (("judge", "scores", "score_0_100", "bounds"), {}, "a judge's score without its scale or its bounds"),
        (("provenance", "models", "tuned", "name"), 7, r"provenance\.models\.tuned\.name is 7, not text"),
        (("provenance", "headline"), "best", r"provenance\.headline is 'best', not 'bits_per_byte' or"),
        (("provenance",), None, "provenance is null, not an object"),
    ],
)  # fmt: skip
def test_scores_of_another_shape_are_refused(folder, place, value, message):
    if value == "copy":
        value = read_json(folder / "metrics.json")["splits"]["test"]["metrics"]["chrf"]
    edited(folder / "metrics.json", *place, value=value, seal=True)
    with pytest.raises(UserError, match=message) as error:
        stored.read_metrics(folder)
    assert refused(error).startswith(f"{folder / 'metrics.json'}: ")


def test_scores_of_other_answers_are_refused(folder):
    predictions, metrics = stored.read_predictions(folder), stored.read_metrics(folder)
    path = folder / "predictions.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.replace(b'"seconds": 0.1', b'"seconds": 0.2', 1))
    with pytest.raises(UserError, match=r"predictions\.jsonl was changed after it was scored"):
        stored.check_scored(folder, predictions, metrics)
    with pytest.raises(UserError, match=r"covers .*score again"):
        stored.check_scored(folder, predictions[:-1], metrics)
    with pytest.raises(UserError, match=r"covers tuned, predictions.jsonl holds baseline, tuned, more"):
        stored.check_scored(folder, [{**p, "more": p["tuned"]} for p in predictions], metrics)


def test_answers_that_were_cut_off_are_not_scored_as_if_they_were_all(folder):
    rows = make_predictions(40)
    for some, message in ((rows[:20], r"\{'test': 16, 'test_unseen': 4\} records, not \{'test': 32"), (
        [{name: value for name, value in row.items() if name != "baseline"} for row in rows],
        "answers of tuned, not of baseline, tuned",
    )):  # fmt: skip
        write_json_lines(folder / "predictions.jsonl", some)
        with pytest.raises(UserError, match=message) as error:
            stored.provenance_of(stored.read_predictions(folder), folder)
        assert "run the generate stage again" in refused(error)


def test_answers_that_were_changed_are_scored_as_they_are_and_the_report_says_so(folder, capsys):
    from recipe.evaluation.verdict import cautions

    rows = make_predictions(40)
    rows[0]["tuned"]["text"] = "another answer"
    write_json_lines(folder / "predictions.jsonl", rows)
    provenance = stored.provenance_of(rows, folder)
    assert provenance["edited"] and provenance["predictions_hash"] == file_hash(folder / "predictions.jsonl")
    assert capsys.readouterr().err.startswith(f"note: {folder / 'predictions.jsonl'} was changed after the models had")
    said = cautions({**make_metrics(rows), "provenance": provenance}, rows, ["baseline", "tuned"])
    assert any(line.startswith("predictions.jsonl was changed after the models had answered") for line in said)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"family": ["a"]}, r"line 3: 'family' is \['a'\], not text"),
        ({"tuned": None}, "'test/2' has no answer of 'tuned'; run the generate stage"),
        ({"instruction": None}, r"line 3: 'instruction' is None"),
        ({"tuned": {"text": "a", "reference_loss": float("nan")}}, r"line 3: 'reference_loss' of 'tuned' is nan"),
        ({"tuned": {"text": "a", "tokens": -1}}, r"line 3: 'tokens' of 'tuned' is -1"),
        ({"tuned": {"text": "a", "reference_tokens": 10**300}}, r"line 3: 'reference_tokens' of 'tuned' is 1000"),
        ({"tuned": {"text": "a", "stop_reason": []}}, r"line 3: 'stop_reason' of 'tuned' is \[\]"),
    ],
)
def test_answers_of_another_shape_are_refused(folder, change, message):
    rows = make_predictions(40)
    rows[2] |= change
    write_json_lines(folder / "predictions.jsonl", rows)
    with pytest.raises(UserError, match=message):
        stored.read_predictions(folder)


def test_an_answer_that_is_none_is_asked_again(tmp_path):
    path = tmp_path / "predictions.jsonl"
    write_json_lines(
        path, [{"id": "a", "tuned": None, "baseline": {"text": "x"}}, {"id": "b", "tuned": {"text": 5}}, [1]]
    )
    assert read_answers(path) == {"a": {"id": "a", "baseline": {"text": "x"}}, "b": {"id": "b"}}


def test_judgements_that_are_not_those_of_the_scores_are_refused(folder, capsys):
    judge = stored.read_metrics(folder)["judge"]
    path = folder / "judge.jsonl"
    rows = make_judge_rows(make_predictions(40))
    write_json_lines(path, [{**rows[0], "score": 3}, *rows[1:]])
    with pytest.raises(
        UserError, match=r"judge\.jsonl was changed after the judge had answered .* run the judge stage"
    ):
        stored.read_judgements(folder, judge)
    path.unlink()
    assert stored.read_judgements(folder, judge) is None
    assert (
        capsys.readouterr().err
        == f"note: {path} is missing: the report holds the judge's means, but none of its words\n"
    )
    del judge["rows_hash"]  # of an earlier version
    for row, message in (
        ([], "row 0: it is a list of 0"),
        ({**rows[0], "score": "3"}, "row 0: score is '3', not a whole"),
    ):
        write_json_lines(path, [row, *rows[1:]])
        with pytest.raises(UserError, match=message):
            stored.read_judgements(folder, judge)


def test_replies_that_were_changed_are_asked_for_again(tmp_path):
    reply = {"text": "85", "finish_reason": "stop", "model": "m", "usage": None, "seconds": 0.5, "reasoning": None}
    entries = [sealed({"key": key, "reply": reply, "left_out": []}) for key in ("whole", "changed", "usage")]
    entries[1]["reply"] = {**reply, "text": "35"}
    entries += [sealed({"key": "usage", "reply": {**reply, "usage": 1e9}}), {"key": "earlier", "reply": reply}, [], 5]
    del entries[2]
    write_json_lines(tmp_path / "judge_cache.jsonl", entries)
    assert read_cache(tmp_path / "judge_cache.jsonl").keys() == {"whole", "earlier"}


# --- a run's folder -------------------------------------------------------------------------------------------------


def test_a_log_that_was_changed_draws_no_curve(tmp_path):
    path = tmp_path / "trainer_state.json"
    path.write_text(json.dumps({"log_history": LOG_HISTORY, "global_step": 800}), encoding="utf-8")
    assert stored.read_log(path, file_hash(path))["global_step"] == 800
    with pytest.raises(UserError, match=r"trainer_state\.json was changed after the run had ended"):
        stored.read_log(path, "sha256:0")
    for log, message in (([1], r"log_history\[0\] is 1"), ([{"step": 0}], "step is 0, not a whole number from 1 up")):
        path.write_text(json.dumps({"log_history": log}), encoding="utf-8")
        with pytest.raises(UserError, match=message):
            stored.read_log(path)
    path.write_text("[]", encoding="utf-8")
    with pytest.raises(UserError, match="it is a list of 0, not an object"):
        stored.read_log(path)


def test_a_run_of_another_version_is_read(tmp_path, capsys):
    """Its settings become those of the evaluation; one that is unknown here was "unknown flag"."""
    run = {"config": {"data": {"data": "a.jsonl", "shuffle_twice": 3}, "training": {}}, "data_hash": "x"}
    write_sealed(tmp_path / "run.json", run)
    assert read_run(tmp_path)["config"]["data"] == {"data": "a.jsonl"}
    note = f"note: {tmp_path / 'run.json'}: the setting 'shuffle_twice' of the data is unknown to this version"
    assert capsys.readouterr().err == f"{note}, and left out\n"


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("max_length", [5], "max_length is a list of 1, not a whole number or null"),
        ("max_length", 1, r"config\.data: --max_length 1: a record needs at least 2 tokens"),
        ("overflow", "no", "overflow is 'no', not 'drop' or 'error' or 'truncate'"),
        ("validation_ratio", 0.99, "give shares from 0 up, below 1 together"),
        ("data", 5, "data is 5, not"),
        ("mask_prompt", "yes", "mask_prompt is 'yes', not true or false"),
    ],
)
def test_a_run_with_settings_that_are_none_is_refused_by_name(tmp_path, name, value, message):
    data = {"data": "a.jsonl", "test_ratio": 0.1} | {name: value}
    write_sealed(tmp_path / "run.json", {"config": {"data": data, "training": {}}, "data_hash": "x"})
    with pytest.raises(UserError, match=message) as error:
        read_run(tmp_path)
    assert refused(error).startswith(f"{tmp_path / 'run.json'}: ") and "train again or remove it" in refused(error)


@pytest.mark.parametrize("number", ["NaN", "-Infinity", "1e999"])
def test_what_could_not_be_written_again_is_refused_when_it_is_read(tmp_path, number):
    path = tmp_path / "evaluation.json"
    path.write_text('{"models": [{"note": ' + number + "}]}")
    with pytest.raises(UserError, match=r"evaluation\.json: it holds NaN or Infinity, .*; start over"):
        read_sealed(path, {}, "start over")
    path.write_text('{"a": 1}\n\n{"note": [' + number + "]}\n")
    with pytest.raises(UserError, match=r"evaluation\.json line 3: it holds NaN or Infinity"):
        read_json_lines(path)


def test_weights_that_were_changed_are_refused_and_settings_are_told(tmp_path, capsys):
    for name in ("config.json", "generation_config.json"):
        (tmp_path / name).write_text("{}")
    save_file({"a": zeros(3)}, tmp_path / "model.safetensors")
    check_unchanged(tmp_path)  # of another trainer, without a manifest
    Seal(tmp_path).close({})
    check_unchanged(tmp_path)
    assert capsys.readouterr().err == ""
    (tmp_path / "config.json").write_text("[]")
    check_unchanged(tmp_path)
    found = "config.json is not what was written (its SHA-256 differs); it is used as it is"
    assert capsys.readouterr().err == f"note: {tmp_path} is not as it was saved: {found}\n"
    (tmp_path / "config.json").write_text("{}")
    save_file({"a": zeros(3) + 1}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written"):
        check_unchanged(tmp_path)


def test_files_of_a_model_that_are_damaged_are_named(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"\xff" * 20)
    with pytest.raises(UserError, match=r"model\.safetensors: .*header"):
        check_finite(str(tmp_path))
    for text in ("[]", "5", "{"):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(UserError, match=r"config\.json: "):
            refuse_local_folders({"config.json": tmp_path / "config.json"})
    for text in ("{}", '{"weight_map": {"a": 5}}', '{"weight_map": []}'):
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(UserError, match=r"index\.json: weight_map"):
            files_to_push(tmp_path)


def test_a_tokenizer_without_a_length_is_refused(tmp_path):
    """Else it fails where a text is encoded."""
    for path in (DEMO / "base").glob("tokenizer*"):
        shutil.copy(path, tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text(encoding="utf-8"))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config | {"model_max_length": [1]}), encoding="utf-8")
    with pytest.raises(UserError, match=r"model_max_length is \[1\], not a number"):
        load_tokenizer(ModelArguments(str(tmp_path)))


def test_a_manifest_that_is_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "manifest.json")
    assert read_manifest(tmp_path) == "manifest.json is not a file"


# --- what all of them stand on --------------------------------------------------------------------------------------


def test_shapes():
    assert not fits(float("nan"), float) and not fits(float("inf"), float) and not fits(10**400, float)
    assert fits(3, float) and not fits(True, float) and not fits(True, int) and not fits(2**60, int)
    assert fits({"a": 1, "b": None}, {str: (None, COUNT)}) and not fits({"a": -1}, {str: (None, COUNT)})
    assert not fits([], {"x"}) and fits([1, "a"], [int, str]) and not fits([1], [int, str])
    with pytest.raises(UserError, match=r"^file: a\.b\[1\]\.c is missing; do this$"):
        check_shape({"a": {"b": [{"c": 1}, {}]}}, {"a": (None, {"b": [{"c": int}]})}, "file", "do this")
    with pytest.raises(UserError, match=r"^file: it is null, not an object; do this$"):
        check_shape(None, {"a": int}, "file", "do this")


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 900 + "1" + "}" * 900, "[1", "", "1" * 5000, b"\xff"])
def test_what_is_no_json_is_no_crash(text, tmp_path):
    with pytest.raises(ValueError):
        parse_json(text)
    (tmp_path / "a.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError, match=r"a\.json: not JSON"):
        read_json(tmp_path / "a.json")


@pytest.mark.parametrize("place", [place for place in edits.PLACES if place != "removed"])
def test_what_is_no_file_is_named_and_nobody_waits_for_it(tmp_path, place):
    edits.replace(tmp_path / "metrics.json", place)
    with pytest.raises(UserError, match=r"metrics\.json: a folder, a pipe or a link to nothing, not a file"):
        stored.read_metrics(tmp_path)


def test_a_hash_holds_for_what_is_on_the_disk(tmp_path, monkeypatch):
    """Secrets are taken out and half characters are written as escapes, after which the content is another."""
    monkeypatch.setenv("WANDB_API_KEY", "0123456789abcdef")
    path = tmp_path / "a.json"
    write_sealed(path, {"key": "0123456789abcdef", "half": "\ud83d", "tuple": (1, 2), "1": {2: 0.1}})
    assert "0123456789abcdef" not in path.read_text(encoding="utf-8")
    expected = {"key": "***", "half": "\ud83d", "tuple": [1, 2], "1": {"2": 0.1}}
    assert read_sealed(path, {}, "") == expected
    path.write_text(path.read_text(encoding="utf-8").replace("0.1", "0.2"), encoding="utf-8")
    with pytest.raises(UserError, match="was changed after it was written"):
        read_sealed(path, {}, "do this")


def test_what_is_sent_holds_the_hash_of_what_is_sent(tmp_path):
    path = tmp_path / "run.json"
    write_sealed(path, {"data": f"{os.sep}home{os.sep}me{os.sep}a.jsonl", "n": 1})
    sent = public_files({"run.json": path})["run.json"]
    (tmp_path / "sent.json").write_bytes(sent)
    assert read_sealed(tmp_path / "sent.json", {}, "") == {"data": "…/a.jsonl", "n": 1}
    path.write_text(path.read_text(encoding="utf-8").replace('"n": 1', '"n": 2'), encoding="utf-8")
    (tmp_path / "sent.json").write_bytes(public_files({"run.json": path})["run.json"])
    with pytest.raises(UserError, match="was changed"):
        read_sealed(tmp_path / "sent.json", {}, "")
