"""What `make demo` promises, checked on what it left; run after it: `pytest -n 0 tests/acceptance`."""

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
METRICS = ROOT / "outputs" / "demo-eval" / "metrics.json"


@pytest.fixture(scope="module")
def splits() -> dict:
    assert METRICS.is_file(), "run `make demo` first"
    return json.loads(METRICS.read_text(encoding="utf-8"))["splits"]


def test_base_cannot_and_tuned_can(splits):
    match = splits["test"]["metrics"]["exact_match"]
    assert splits["test"]["n"] == 400
    assert match["baseline"] <= 0.02
    assert match["tuned"] >= 0.80
    assert match["ci95"][0] > 0.70


def test_tuned_stops_by_itself_although_padding_is_the_end_of_text_token(splits):
    assert splits["test"]["behaviour"]["stop_rate"]["tuned"] >= 0.95


def test_every_family_is_listed_and_unseen_stands_beside_it(splits):
    assert len(splits["test"]["families"]) == 14
    assert splits["test_unseen"]["n"] == 200
    assert splits["test_unseen"]["families"].keys() == splits["test"]["families"].keys()
    assert 0 < splits["test_unseen"]["metrics"]["exact_match"]["tuned"] <= 1


def test_training_left_its_picture_and_its_record():
    run = json.loads((ROOT / "outputs" / "demo" / "run.json").read_text(encoding="utf-8"))
    assert run["result"]["eval"]["eval_loss"] < 0.2
    assert (ROOT / "outputs" / "demo" / "loss.png").stat().st_size > 10_000


def test_the_demo_ends_with_a_report_that_opens_without_a_network_or_an_error():
    from playwright.sync_api import sync_playwright

    said, asked = [], []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path="/usr/bin/chromium",
            args=["--no-sandbox", "--disable-gpu", "--disable-background-networking"],
        )
        page = browser.new_page()
        page.on("console", lambda message: said.append(message.text))
        page.on("pageerror", lambda error: said.append(str(error)))
        page.on("request", lambda request: asked.append(request.url))
        page.goto((METRICS.parent / "report.html").as_uri())
        page.wait_for_selector(".example")
        assert "The tuned model is better: exact match" in page.locator("h1").text_content()
        assert page.locator(".example").count() == 25
        browser.close()
    assert said == []
    assert [url for url in asked if not url.startswith(("file:", "data:"))] == []


def test_every_answer_of_both_models_is_kept():
    lines = (METRICS.parent / "predictions.jsonl").read_text(encoding="utf-8").split("\n")
    rows = [json.loads(line) for line in lines if line]
    assert len(rows) == len({row["id"] for row in rows}) == 600
    assert all(
        row[label]["seconds"] > 0 and row[label]["tokens"] >= 0 for row in rows for label in ("baseline", "tuned")
    )


def test_the_model_answers_the_readmes_question(capsys, monkeypatch):
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    [code] = [block for block in readme.split("```") if block.startswith("python\nfrom transformers import pipeline")]
    monkeypatch.chdir(ROOT)
    exec(compile(code.removeprefix("python"), "README.md", "exec"), {})
    assert capsys.readouterr().out == "The plural of cat is cats.\n"
