"""scripts/eval.py as people run it: stages, resuming, several models, recorded answers, gates, bad input."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import processes
import pytest
import torch
from conftest import DEMO, ROOT, SHARED
from serve import chat_folder, served_demo, server  # noqa: F401
from stub_endpoint import Say, Status, serve_stub
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.config import UserError

TEST = json.dumps({"test": str(DEMO / "records" / "validation.jsonl")})


@pytest.fixture(scope="module")
def other_model(tmp_path_factory) -> Path:
    """The demo's base with its weights shaken, so that it answers differently."""
    folder = tmp_path_factory.mktemp("models") / "shaken"
    model = AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)
    torch.manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(DEMO / "base").save_pretrained(folder)
    return folder


@pytest.fixture
def few(tmp_path) -> str:
    """Eight records."""
    lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)[:8]
    (tmp_path / "few.jsonl").write_text("".join(lines), encoding="utf-8")
    return json.dumps({"test": str(tmp_path / "few.jsonl")})


def rows_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()]


def without_time(rows: list[dict]) -> list[dict]:
    """Rows without what a second run measures anew: seconds, and the last digits of a loss in another batch."""
    rows = json.loads(json.dumps(rows))
    for row in rows:
        for answer in row.values():
            if isinstance(answer, dict):
                del answer["seconds"]
                answer["reference_loss"] = pytest.approx(answer["reference_loss"], rel=1e-4)
    return rows


def command(*flags: str) -> list[str]:
    return [sys.executable, "scripts/eval.py", *flags]


def environment(cache: Path) -> dict[str, str]:
    return {**os.environ, "HF_DATASETS_CACHE": str(cache)}


def test_killed_in_the_middle_and_resumed_gives_what_an_undisturbed_run_gives(tmp_path, other_model, datasets_cache):
    flags = (
        "--model",
        str(other_model),
        "--baseline",
        str(DEMO / "base"),
        "--data",
        TEST,
        "--batch_size",
        "8",
        "--max_new_tokens",
        "32",
    )
    killed, whole, two = (tmp_path / name for name in ("killed", "whole", "two"))
    process = processes.start(
        command(*flags, "--output_dir", str(killed)), cwd=ROOT, env=environment(datasets_cache), start_new_session=True,
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    journal = killed / "predictions.jsonl"
    deadline = time.monotonic() + 120
    while not (journal.exists() and journal.read_text(encoding="utf-8").count('"baseline"') >= 40):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    content = journal.read_bytes()
    journal.write_bytes(content[:-9])  # and the last write cut in its middle
    before = [json.loads(line) for line in content[:-9].split(b"\n") if line.endswith(b"}")]
    assert 30 <= len(before) < 200

    for folder, count in ((killed, 1), (whole, 1), (two, 2)):
        done = processes.run_ranks(
            "scripts/eval.py", count, *flags, "--output_dir", str(folder), cwd=ROOT, env=environment(datasets_cache)
        )
        assert done.returncode == 0, done.stderr[-3000:]
        if folder is killed:
            assert f"{len(before)} of 200 answers of baseline are there already" in done.stdout
        assert done.stdout.count("The tuned model") + done.stdout.count("No significant difference") == 1

    resumed = rows_of(killed)
    assert without_time(resumed) == without_time(rows_of(whole)) == without_time(rows_of(two))
    seconds = {row["id"]: row["baseline"]["seconds"] for row in resumed}
    assert all(seconds[row["id"]] == row["baseline"]["seconds"] for row in before)  # not asked again
    assert len({row["id"] for row in resumed}) == len(resumed) == 200
    reports = {folder: json.loads((folder / "metrics.json").read_text(encoding="utf-8")) for folder in (whole, two)}
    for name, score in reports[whole]["metrics"].items():
        other = reports[two]["metrics"][name]
        assert (score["tuned"], *score["ci95"]) == pytest.approx((other["tuned"], *other["ci95"]), rel=1e-3), name


@pytest.mark.parametrize("ending", ["{eos}", " {eos}\n"])
def test_an_end_of_text_in_the_references_is_no_part_of_them(ending, tmp_path, evaluate, few):
    """A perfect answer is an exact match, and the reference loss counts one end, whatever the data has written."""
    eos = AutoTokenizer.from_pretrained(DEMO / "base").eos_token
    plain = [json.loads(line) for line in (tmp_path / "few.jsonl").read_text(encoding="utf-8").splitlines()]
    ended = [{**record, "output": record["output"] + ending.format(eos=eos)} for record in plain]
    perfect = [{**record, "model_response": answer["output"]} for record, answer in zip(ended, plain, strict=True)]
    for name, records in (("perfect", perfect), ("ended", ended)):
        content = "".join(json.dumps(record) + "\n" for record in records)
        (tmp_path / f"{name}.jsonl").write_text(content, encoding="utf-8")
    data, flags = (
        json.dumps({"test": str(tmp_path / "ended.jsonl")}),
        ("--max_new_tokens", "8", "--model", DEMO / "base"),
    )
    evaluate(*flags, tmp_path / "perfect.jsonl", "--data", data, "--output_dir", tmp_path / "ended")
    evaluate(*flags, "--data", few, "--output_dir", tmp_path / "plain")
    rows = rows_of(tmp_path / "ended")
    assert [row["output"].rstrip() for row in rows] == [record["output"] for record in plain]
    metrics = json.loads((tmp_path / "ended" / "metrics.json").read_text(encoding="utf-8"))
    [other] = metrics["other_models"].values()
    assert other["test"]["metrics"]["exact_match"]["tuned"] == 1
    if ending == "{eos}":
        expected = without_time([{"tuned": row["tuned"]} for row in rows_of(tmp_path / "plain")])
        assert without_time([{"tuned": row["tuned"]} for row in rows]) == expected


def test_each_stage_runs_alone_from_the_files_before_it(tmp_path, evaluate, few, other_model):
    flags = ("--model", other_model, "--data", few, "--output_dir", tmp_path / "e", "--max_new_tokens", "8")
    with pytest.raises(UserError, match="holds no finished answers; run the generate stage"):
        evaluate("--stages", "score", "--output_dir", tmp_path / "e")
    evaluate(*flags, "--stages", "generate", "score")
    written = {path.name for path in (tmp_path / "e").iterdir()}
    assert written == {"predictions.jsonl", "evaluation.json", "metrics.json"}
    before = (tmp_path / "e" / "predictions.jsonl").read_bytes()
    evaluate("--stages", "report", "--output_dir", tmp_path / "e")
    assert (tmp_path / "e" / "report.html").stat().st_size > 10_000
    (tmp_path / "e" / "metrics.json").unlink()
    with pytest.raises(UserError, match="holds no scores; run the score stage"):
        evaluate("--stages", "report", "--output_dir", tmp_path / "e")
    evaluate("--stages", "score", "report", "--output_dir", tmp_path / "e")
    assert (tmp_path / "e" / "predictions.jsonl").read_bytes() == before
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["n"] == 8 and metrics["judge"] is None
    assert metrics["metrics"]["exact_match"]["delta"] is None and metrics["provenance"]["splits"] == {"test": 8}


def test_a_further_model_is_added_and_the_others_are_not_asked_again(tmp_path, evaluate, few, other_model, capsys):
    folder = tmp_path / "e"
    flags = ("--baseline", DEMO / "base", "--data", few, "--output_dir", folder, "--max_new_tokens", "8")
    evaluate("--model", other_model, *flags)
    first = rows_of(folder)
    evaluate("--model", other_model, DEMO / "base", "echo", *flags)
    assert "8 of 8 answers of tuned are there already" in capsys.readouterr().out
    second = rows_of(folder)
    assert [list(row)[-4:] for row in second] == [["baseline", "tuned", "demo/base", "echo"]] * 8
    assert all(row["tuned"] == earlier["tuned"] for row, earlier in zip(second, first, strict=True))
    assert [row["demo/base"]["text"] for row in second] == [row["baseline"]["text"] for row in second]
    assert [row["echo"]["text"] for row in second] == [row["input"] or row["instruction"] for row in second]
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["other_models"].keys() == {"demo/base", "echo"}
    same = metrics["other_models"]["demo/base"]["test"]["metrics"]["chrf"]
    assert same["delta"] == 0 and same["ci95"] == [0, 0]
    assert metrics["other_models"]["echo"]["test"]["metrics"]["perplexity"]["tuned"] is None


def test_another_evaluation_in_the_folder_is_refused_unless_asked(tmp_path, evaluate, few, other_model):
    folder = tmp_path / "e"
    flags = ("--data", few, "--output_dir", folder, "--max_new_tokens", "4", "--stages", "generate")
    evaluate("--model", other_model, *flags)
    before = (folder / "predictions.jsonl").read_bytes()
    for changed, word in (
        (("--model", DEMO / "base", *flags), "model 'tuned'"),
        (("--model", other_model, *flags, "--max_new_tokens", "5"), "generation"),
        (("--model", other_model, *flags, "--template", "phi3"), "template of 'tuned'"),
        (("--model", other_model, *flags, "--data", TEST), "data_hash"),
    ):
        with pytest.raises(UserError, match=f"with another {word}; add --overwrite_output_dir"):
            evaluate(*changed)
    assert (folder / "predictions.jsonl").read_bytes() == before
    evaluate("--model", DEMO / "base", *flags, "--overwrite_output_dir")
    assert (folder / "predictions.jsonl").read_bytes() != before
    (folder / "evaluation.json").unlink()
    with pytest.raises(UserError, match=r"holds answers, but no evaluation\.json"):
        evaluate("--model", DEMO / "base", *flags)


def test_real_predictions_beside_an_echo_of_the_input(tmp_path, evaluate, capsys):
    path = SHARED / "data" / "gpt2-medium-responses.json"
    if not path.is_file():
        pytest.skip(f"the real predictions are not at {path}")
    evaluate("--model", path, "--baseline", "echo", "--output_dir", tmp_path / "e")
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text(encoding="utf-8"))
    match = metrics["metrics"]["exact_match"]
    assert metrics["n"] == 110 and match["tuned"] == 17 / 110
    echoed = sum((r["input"] or r["instruction"]).split() == r["output"].split() for r in rows_of(tmp_path / "e"))
    assert match["baseline"] == echoed / 110
    assert metrics["behaviour"]["stop_rate"]["tuned"] is None and metrics["metrics"]["perplexity"]["tuned"] is None
    assert "on 110 " in capsys.readouterr().out
    assert (tmp_path / "e" / "report.html").is_file()


def test_recorded_answers_to_other_records_are_refused(tmp_path, evaluate, few, other_model):
    recorded = [{"instruction": "Nobody asked.", "input": "", "output": "No.", "model_response": "Yes."}]
    (tmp_path / "answers.json").write_text(json.dumps(recorded), encoding="utf-8")
    flags = ("--data", few, "--output_dir", tmp_path / "e", "--max_new_tokens", "4")
    with pytest.raises(UserError, match=r"answers\.json has no answer to 8 of 8 records"):
        evaluate("--model", other_model, "--baseline", tmp_path / "answers.json", *flags)


def test_gates_decide_the_exit(tmp_path, evaluate, few):
    flags = ("--model", "echo", "--data", few, "--output_dir", tmp_path / "e")
    evaluate(*flags, "--gate", "exact_match>=0", "empty_rate<=0")
    with pytest.raises(UserError, match=r"^gate exact_match>=0.99: it is 0(.|\n)*gate perplexity<9: not measured$"):
        evaluate(*flags, "--gate", "exact_match>=0.99", "perplexity<9", "chrf>0")
    assert (tmp_path / "e" / "report.html").is_file()  # the evidence is there
    done = processes.run(
        command("--stages", "score", "--output_dir", str(tmp_path / "e"), "--gate", "exact_match>=0.99"), cwd=ROOT,
        capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stderr.strip()) == (1, "error: gate exact_match>=0.99: it is 0")


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--model", "echo", "--gate", "exact_macth>1"), "did you mean 'exact_match'"),
        (("--model", "echo", "--stages", "scoer"), "--stages scoer: there are generate, score, judge, report"),
        (("--model", "echo", "--split", "dev"), "--split dev: the data has test"),
        (("--model", "echo", "--temperature", "-1"), "give a temperature from 0 up"),
        (("--model", "echo", "echo"), "--model echo: named twice"),
        (("--model", "http://127.0.0.1:9/v1#m", "--endpoint_timeout", "2"), "connection"),
        (
            ("--model", "echo", "--baseline", "http://me:secret@127.0.0.1:9/v1#m"),
            "'http://127.0.0.1:9/v1#m': write http",
        ),
        (("--baseline", "echo"), "say what to score: --model"),
        (("--model", "echo", "--stages", "generate", "--gate", "chrf>0"), "--gate needs scores"),
    ],
)
def test_bad_flags_are_refused_and_nothing_is_scored(tmp_path, evaluate, few, flags, message):
    with pytest.raises(UserError, match=message):
        evaluate(*flags, "--data", few, "--output_dir", tmp_path / "e")
    assert not (tmp_path / "e" / "metrics.json").exists()


def test_an_empty_split_is_refused(tmp_path, evaluate):
    (tmp_path / "empty.jsonl").write_text("", encoding="utf-8")
    data = json.dumps({"test": str(tmp_path / "empty.jsonl")})
    with pytest.raises(UserError, match="empty"):
        evaluate("--model", "echo", "--data", data, "--output_dir", tmp_path / "e")


def test_prompts_longer_than_the_context_are_answered_with_nothing_and_counted(tmp_path, evaluate, other_model):
    rows = [
        {"instruction": "Say it again. " + "word " * 400, "output": "No."},
        {"instruction": "Name a colour.", "output": "Blue."},
    ]
    (tmp_path / "long.json").write_text(json.dumps(rows), encoding="utf-8")
    data = json.dumps({"test": str(tmp_path / "long.json")})
    evaluate("--model", other_model, "--data", data, "--output_dir", tmp_path / "e", "--max_new_tokens", "6")
    long, short = (row["tuned"] for row in rows_of(tmp_path / "e"))
    assert (long["text"], long["tokens"], long["stop_reason"], long["reference_loss"]) == ("", 0, "context", None)
    assert short["tokens"] > 0 and short["reference_tokens"] > 1
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["behaviour"]["empty_rate"]["tuned"] == 0.5
    assert metrics["metrics"]["perplexity"]["n"] == 1


def test_a_served_model_answers_as_its_weights_do(tmp_path, evaluate, few, served_demo, chat_folder):  # noqa: F811
    flags = ("--data", few, "--output_dir", tmp_path / "e", "--max_new_tokens", "6")
    evaluate("--model", served_demo, "--baseline", chat_folder, *flags)
    for row in rows_of(tmp_path / "e"):
        assert row["tuned"]["text"] == row["baseline"]["text"]
        assert row["tuned"]["stop_reason"] == row["baseline"]["stop_reason"]
    metrics = json.loads((tmp_path / "e" / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["metrics"]["chrf"]["ci95"] == [0, 0]
    described = {"name": served_demo, "weights": None, "tokenizer": None, "template": None}
    assert metrics["provenance"]["models"]["tuned"] == {**described, "template_name": "chat messages"}


def test_an_endpoint_that_answers_half_of_the_prompts_keeps_these_answers(tmp_path, evaluate, few):
    """It fails for every second prompt; the next run asks for these alone."""
    flags = ("--data", few, "--output_dir", tmp_path / "e", "--max_new_tokens", "6", "--endpoint_concurrency", "1")
    asked: list[str] = []

    def answer(prompt: str) -> str:
        asked.append(prompt)
        return "An answer."

    with serve_stub({"": [Say("Hello."), *[Status(404), Say(answer)] * 4, Say(answer)]}) as stub:
        model = f"{stub.url}#m"
        with pytest.raises(UserError, match=r"left 4 of 8 prompts without an answer \(http_404 4\)(.|\n)*test/0"):
            evaluate("--model", model, *flags)
        assert len(asked) == 4 and not (tmp_path / "e" / "metrics.json").exists()
        with pytest.raises(UserError, match="holds no finished answers; run the generate stage"):
            evaluate("--stages", "score", "--output_dir", tmp_path / "e")
        evaluate("--model", model, *flags)
    assert len(set(asked)) == 8 + 1  # and the second warm-up
    assert [row["tuned"]["text"] for row in rows_of(tmp_path / "e")] == ["An answer."] * 8


def test_a_judge_that_fails_loses_nothing_and_is_asked_again_for_what_is_missing(tmp_path, evaluate, few):
    folder = tmp_path / "e"
    flags = ("--model", "echo", "--data", few, "--output_dir", folder, "--judge_concurrency", "1")
    script = {"": [Say("50"), *[Say("60")] * 6, Say("no number"), Say("150"), Say("70")]}
    with serve_stub(script) as stub:
        judge = ("--judge", f"{stub.url}#llama3")
        with pytest.raises(UserError, match="the judge left scores out"):
            evaluate(*flags, *judge, "--gate", "judge.score_0_100>0", "chrf>0")
        metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
        assert metrics["metrics"]["chrf"]["tuned"] > 0 and (folder / "report.html").is_file()
        scores = metrics["judge"]["scores"]["score_0_100"]
        assert scores["tuned"] is None and scores["missing"] == {"unparsable": 1, "out_of_range": 1}
        assert scores["bounds"]["tuned"] == [pytest.approx(6 * 60 / 8), pytest.approx((6 * 60 + 2 * 100) / 8)]
        before = len(stub.bodies)
        evaluate("--stages", "judge", "report", "--output_dir", folder, *judge, "--gate", "judge.score_0_100>=62")
        assert len(stub.bodies) - before == 1 + 2  # the warm-up and the two that were missing
    metrics = json.loads((folder / "metrics.json").read_text(encoding="utf-8"))
    assert metrics["judge"]["scores"]["score_0_100"]["tuned"] == (6 * 60 + 2 * 70) / 8
    with pytest.raises(UserError, match="the judge was not asked: endpoint"):
        evaluate("--stages", "judge", "--output_dir", folder, "--judge", "http://127.0.0.1:9/v1#m")
    assert json.loads((folder / "metrics.json").read_text(encoding="utf-8"))["metrics"] == metrics["metrics"]


def test_answers_are_not_removed_by_the_run_that_is_to_score_them(tmp_path, evaluate, few):
    folder = tmp_path / "e"
    evaluate("--model", "echo", "--data", few, "--output_dir", folder, "--stages", "generate")
    before = (folder / "predictions.jsonl").read_bytes()
    with pytest.raises(UserError, match="--overwrite_output_dir would remove"):
        evaluate("--model", folder / "predictions.jsonl", "--output_dir", folder, "--overwrite_output_dir")
    assert (folder / "predictions.jsonl").read_bytes() == before


def test_a_baseline_that_never_answered_may_be_dropped_or_fixed(tmp_path, evaluate, few):
    flags = ("--model", "echo", "--data", few, "--output_dir", tmp_path / "e", "--endpoint_timeout", "2")
    with pytest.raises(UserError, match="connection"):
        evaluate(*flags, "--baseline", "http://127.0.0.1:9/v1#m")
    evaluate(*flags)
    with serve_stub({"": [Say("An answer.")]}) as stub:
        evaluate(*flags, "--baseline", f"{stub.url}#m")
    assert [row["baseline"]["text"] for row in rows_of(tmp_path / "e")] == ["An answer."] * 8
    evaluation = json.loads((tmp_path / "e" / "evaluation.json").read_text(encoding="utf-8"))
    assert len(evaluation["command"].splitlines()) >= 1 and list(evaluation["models"]) == ["baseline", "tuned"]


def test_a_served_model_is_written_down_by_name_and_another_is_refused(tmp_path, evaluate, few):
    flags = ("--data", few, "--output_dir", tmp_path / "e", "--stages", "generate")
    with serve_stub({"": [Say("An answer.")]}) as stub:
        evaluate("--model", f"{stub.url}#first", *flags)
        with pytest.raises(UserError, match="with another model 'tuned'"):
            evaluate("--model", f"{stub.url}#second", *flags)
        evaluate("--model", f"{stub.url}#first", f"{stub.url}#third", *flags)
    assert [list(row)[-2:] for row in rows_of(tmp_path / "e")] == [["tuned", "third"]] * 8


def test_names_of_roles_are_not_given_to_further_models(tmp_path, evaluate, few, other_model):
    (tmp_path / "a" / "baseline").mkdir(parents=True)
    for path in other_model.iterdir():
        (tmp_path / "a" / "baseline" / path.name).write_bytes(path.read_bytes())
    flags = ("--data", few, "--output_dir", tmp_path / "e", "--max_new_tokens", "2", "--stages", "generate")
    evaluate("--model", "echo", tmp_path / "a" / "baseline", *flags)
    assert list(rows_of(tmp_path / "e")[0])[-2:] == ["tuned", "a/baseline"]


def test_a_judgement_of_other_answers_is_dropped_and_one_of_these_is_kept(tmp_path, evaluate, few):
    folder = tmp_path / "e"
    with serve_stub({"": [Say("50")]}) as stub:
        evaluate("--model", "echo", "--data", few, "--output_dir", folder, "--judge", f"{stub.url}#m")
    with pytest.raises(UserError, match="the judge was not asked"):
        evaluate("--stages", "judge", "report", "--output_dir", folder, "--judge", "http://127.0.0.1:9/v1#m")
    assert json.loads((folder / "judge.jsonl").read_text(encoding="utf-8").split("\n")[0])["score"] == 50
    evaluate("--stages", "score", "report", "--output_dir", folder, "--gate", "judge.score_0_100>=50")
    rows = rows_of(folder)
    rows[0]["tuned"]["text"] = "edited"
    (folder / "predictions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    with pytest.raises(UserError, match=r"gate judge.score_0_100>=50: not measured"):
        evaluate("--stages", "score", "report", "--output_dir", folder, "--gate", "judge.score_0_100>=50")


def test_the_page_of_a_checkpoint_marks_its_own_step(tmp_path, evaluate, few, monkeypatch):
    """Of a run that kept its best step, the folder itself is that step, a checkpoint its own."""
    import eval_script

    run, steps = tmp_path / "run", []
    monkeypatch.setattr("recipe.evaluation.report.page.write_report", lambda *arguments: steps.append(arguments[-1]))
    for folder in (run, run / "checkpoint-40"):
        folder.mkdir()
        state = {"log_history": [], "best_global_step": 20, "global_step": 60 if folder == run else 40}
        (folder / "trainer_state.json").write_text(json.dumps(state), encoding="utf-8")
    config = {"data": {"data": "x"}, "training": {"load_best_model_at_end": True}}
    (run / "run.json").write_text(json.dumps({"config": config, "data_hash": "x"}), encoding="utf-8")
    for name in (str(run), str(run / "checkpoint-40")):
        eval_script.report([], {"provenance": {"models": {"tuned": {"name": name}}}}, tmp_path)
    assert steps == [20, 40]
