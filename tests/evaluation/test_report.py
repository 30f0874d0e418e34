"""The report in a real browser: from a file, without network, in both themes, on a phone, and with hostile texts."""

import contextlib
import doctest
import json
import os
import re
import time
from itertools import pairwise
from pathlib import Path
from urllib.parse import unquote

import pytest
from conftest import SHARED
from evaluation_samples import LOG_HISTORY, PROMPT, make_judge, make_judge_rows, make_metrics, make_predictions
from playwright.sync_api import Browser, Page, sync_playwright

import recipe.evaluation.report.examples
import recipe.evaluation.tables
from recipe.config import UserError
from recipe.console import visible
from recipe.evaluation.comparison import example_scores
from recipe.evaluation.judge.summary import summarize_pairs
from recipe.evaluation.report.examples import embed_json
from recipe.evaluation.report.figures import forest_groups
from recipe.evaluation.report.page import pairs_sentence, write_report
from recipe.evaluation.verdict import direction

CHROMIUM = Path("/usr/bin/chromium")
FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
         "--disable-component-update", "--disable-sync"]  # fmt: skip
MODELS = ("baseline", "tuned", "checkpoint-300")


@pytest.fixture(scope="module")
def browser():
    if not CHROMIUM.is_file():
        message = f"the report is looked at in Chromium, which is not at {CHROMIUM}"
        if os.environ.get("CI"):
            pytest.fail(message)
        pytest.skip(message)
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)  # in a user folder of its own
        browser.new_context(viewport={"width": 1200, "height": 900}).new_page()
        yield browser
        browser.close()


@contextlib.contextmanager
def opened(browser: Browser, report: Path, fragment: str = "", **context_options):
    """A page on a report; on leaving, it must not have said, thrown or fetched anything."""
    # a page and a storage of its own only where a context is described: one page for all saves half the time
    context = browser.new_context(**context_options) if context_options else browser.contexts[0]
    page = context.new_page() if context_options else context.pages[0]
    page.goto("about:blank")
    page.set_default_timeout(10_000)
    troubles, files = [], []
    listeners = {
        "console": lambda m: m.type in ("error", "warning") and troubles.append(f"{m.type}: {m.text}"),
        "pageerror": lambda error: troubles.append(f"thrown: {error}"),
        "dialog": lambda dialog: (troubles.append(f"dialog: {dialog.message}"), dialog.dismiss()),
        "request": lambda r: r.url.startswith("data:") or files.append(r.url.partition("#")[0]),
    }
    for event, listener in listeners.items():
        page.on(event, listener)
    try:
        page.goto(report.as_uri() + fragment, wait_until="domcontentloaded")  # the figures can follow
        yield page
    finally:
        for event, listener in listeners.items():
            page.remove_listener(event, listener)
        if context_options:
            context.close()
    assert troubles == []
    assert set(files) == {report.as_uri()}


@pytest.fixture(scope="module")
def evaluation():
    """120 records of two splits, three models, a judge who left three scores out."""
    predictions = make_predictions(120, models=MODELS)
    predictions[7]["tuned"] |= {"text": "", "tokens": 0}
    predictions[8]["tuned"] |= {"text": "x" * 100_000, "stop_reason": "length"}
    rows = make_judge_rows(predictions, missing=3)
    return predictions, make_metrics(predictions, make_judge(rows)), rows


@pytest.fixture(scope="module")
def report(evaluation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("evaluation")
    predictions, metrics, rows = evaluation
    (folder / "metrics.json").write_text(json.dumps(metrics), encoding="utf-8")
    write_report(folder, predictions, metrics, rows, LOG_HISTORY, 600)
    return folder / "report.html"


@pytest.fixture(scope="module")
def scores(evaluation):
    """label → score → id → value, for what the filters should show."""
    predictions, _, _ = evaluation
    ids = [prediction["id"] for prediction in predictions]
    return {
        label: {
            name: dict(zip(ids, values, strict=True)) for name, values in example_scores(predictions, label).items()
        }
        for label in MODELS
    }


def shown_ids(page: Page) -> list[str]:
    """Ids of all pages of the list, in order."""
    return page.evaluate(
        """() => {
            const [ids, next] = [[], document.getElementById('next')];
            for (;;) {
                ids.push(...[...document.querySelectorAll('.example .id')].map(id => id.textContent));
                if (document.getElementById('pages').hidden || next.disabled) return ids;
                next.click();
            }
        }"""
    )


def state_of(page: Page) -> dict[str, str]:
    fragment = page.evaluate("location.hash.slice(1)")
    return dict(map(unquote, part.split("=", 1)) for part in fragment.split("&") if part)


@pytest.mark.parametrize("trouble", ["<script>console.error(1)</script>", "<img src=http://192.0.2.1/x.png>"])
def test_the_watch_over_the_pages_sees_trouble(browser, tmp_path, trouble):
    (tmp_path / "report.html").write_text(f"<!doctype html>{trouble}", encoding="utf-8")
    with pytest.raises(AssertionError), opened(browser, tmp_path / "report.html") as page:
        page.wait_for_timeout(100)


# --- what the page says -----------------------------------------------------------------------------------------------


def test_the_verdict_comes_first_and_everything_is_there(browser, report):
    with opened(browser, report) as page:
        said = page.locator("h1").text_content().replace("\N{NO-BREAK SPACE}", " ")
        assert said.startswith("The tuned model is better: exact match ")
        assert page.locator("main > *").first.locator("h1").count() == 1
        assert page.locator("html").get_attribute("lang") == "en"
        headings = page.locator("h2").all_text_contents()
        for heading in ("Got better", "Got worse", "Before you rely on this", "Figures", "Scores", "Judge", "Examples",
                        "Provenance"):  # fmt: skip
            assert any(heading in text for text in headings), heading
        better, worse = (page.locator(f".card.{kind}").bounding_box() for kind in ("better", "worse"))
        assert (better["width"], better["height"], better["y"]) == (worse["width"], worse["height"], worse["y"])
        assert re.search(r"93 of 96 tuned responses scored; .* \(3 timeout\)",
                         page.locator(".cautions").text_content().replace("\N{NO-BREAK SPACE}", " "))  # fmt: skip
        assert page.locator("#shown").text_content() == "120 examples"
        facts = page.locator("#provenance").text_content()
        for fact in ("sha256:0123456789abcdef", "sha256:fedcba9876543210", "f639a785bf6ce6ca", "max_new_tokens 128",
                     "torch 2.11.0", "x86_64, 2 cores", "python scripts/eval.py", "### Instruction:"):  # fmt: skip
            assert fact in facts
        assert page.locator(".files a").all_text_contents() == [
            "metrics.json", "deltas.png", "outcomes.png", "loss.png",
        ]  # fmt: skip


def test_the_tables_hold_the_scores(browser, report, evaluation):
    _, metrics, _ = evaluation
    with opened(browser, report) as page:
        tables = page.locator("#scores .split").nth(1).locator("table")
        row = tables.first.locator("tbody tr").first.locator("th, td").all_text_contents()
        score = metrics["splits"]["test_unseen"]["metrics"]["exact_match"]
        other = metrics["other_models"]["checkpoint-300"]["test_unseen"]["metrics"]["exact_match"]
        assert row[0] == "Exact match"
        assert [float(cell.rstrip(" %")) / 100 for cell in row[1:4]] == pytest.approx(
            [score["baseline"], score["tuned"], score["delta"]], abs=5e-4
        )
        assert [float(bound) / 100 for bound in row[4].split(" to ")] == pytest.approx(score["ci95"], abs=5e-4)
        assert row[5] == "▲ better"
        assert float(row[6].split(" %")[0]) / 100 == pytest.approx(other["tuned"], abs=5e-4)
        assert page.locator("#scores .split table").count() == 6  # metrics, behaviour, families of two splits
        families = page.locator("#scores .split").first.locator("table").nth(2).locator("tbody tr")
        changes = [float(row.locator("td").nth(3).text_content().replace("−", "-")) for row in families.all()]
        assert changes == sorted(changes) and len(changes) == 4


def test_every_figure_is_in_the_page_and_beside_it(browser, report):
    with opened(browser, report) as page:
        for name in ("deltas", "outcomes", "loss"):
            assert (report.parent / f"{name}.png").read_bytes().startswith(b"\x89PNG")
            images = page.locator(f"#figure-{name} img")
            assert images.count() == 2
            for image in images.all():
                assert len(image.get_attribute("alt")) > 30
                assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 300


def test_headings_do_not_skip_a_level_and_every_control_has_a_name(browser, report):
    with opened(browser, report) as page:
        levels = [int(tag[1]) for tag in page.eval_on_selector_all(
            "h1, h2, h3", "headings => headings.map(heading => heading.tagName)")]  # fmt: skip
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after - before <= 1 for before, after in pairwise(levels))
        nameless = page.eval_on_selector_all(
            "button, input, select, a",
            "all => all.filter(e => !(e.ariaLabel || e.textContent.trim() || e.closest('label')?.textContent.trim()))"
            ".map(e => e.outerHTML)",
        )
        assert nameless == []


# --- the example browser ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["exact_match", "chrf"])
def test_show_filters_what_its_name_says(browser, report, evaluation, scores, score):
    predictions, _, rows = evaluation
    base, tuned = scores["baseline"][score], scores["tuned"][score]
    exact = {label: scores[label]["exact_match"] for label in MODELS}
    unscored = {row["id"] for row in rows if row["status"] != "scored"}
    expected = {
        "all": lambda p: True,
        "better": lambda p: tuned[p["id"]] > base[p["id"]],
        "worse": lambda p: tuned[p["id"]] < base[p["id"]],
        "right": lambda p: exact["baseline"][p["id"]] == exact["tuned"][p["id"]] == 1,
        "wrong": lambda p: exact["baseline"][p["id"]] == exact["tuned"][p["id"]] == 0,
        "cut": lambda p: p["tuned"]["stop_reason"] == "length",
        "empty": lambda p: not p["tuned"]["text"],
        "unscored": lambda p: p["id"] in unscored,
    }
    with opened(browser, report, f"#score={score}") as page:
        values = page.eval_on_selector_all("#show input", "all => all.map(input => input.value)")
        assert values == list(expected)
        for show, matches in expected.items():
            page.locator(f"#show input[value={show}]").check(force=True)
            ids = [prediction["id"] for prediction in predictions if matches(prediction)]
            assert shown_ids(page) == ids, show
            assert ids or show in ("worse",), f"{show} would be tested on nothing"
            assert page.locator(f"#show label:has(input[value={show}]) small").text_content() == str(len(ids))
            assert page.locator("#shown").text_content() == (
                "120 examples" if len(ids) == 120 else f"{len(ids)} of 120"
            )


def test_sort_orders_by_the_chosen_score_of_the_chosen_model(browser, report, evaluation, scores):
    predictions, _, _ = evaluation
    ids = [prediction["id"] for prediction in predictions]
    gain = {i: round(scores["checkpoint-300"]["chrf"][i], 6) - round(scores["baseline"]["chrf"][i], 6) for i in ids}
    length = {prediction["id"]: len(prediction["checkpoint-300"]["text"]) for prediction in predictions}
    with opened(browser, report) as page:
        page.locator("select[name=model]").select_option("checkpoint-300")
        page.locator("select[name=score]").select_option("chrf")
        for sort, order in {
            "win": sorted(ids, key=lambda i: -gain[i]),
            "regression": sorted(ids, key=lambda i: gain[i]),
            "longest": sorted(ids, key=lambda i: -length[i]),
            "original": ids,
        }.items():
            page.locator("select[name=sort]").select_option(sort)
            assert shown_ids(page) == order, sort


def test_the_judge_can_be_compared_by_and_what_it_left_out_goes_last(browser, report, evaluation):
    predictions, _, rows = evaluation
    given = {(row["id"], row["model"]): row["score"] for row in rows if row["prompt"] == PROMPT}
    gains = {
        i: given[i, "tuned"] - given[i, "baseline"]
        for i, model in given
        if model == "tuned" and None not in (given[i, "tuned"], given[i, "baseline"])
    }
    with opened(browser, report, f"#score=judge:{PROMPT}&sort=regression") as page:
        ids = shown_ids(page)
        assert ids[: len(gains)] == sorted(gains, key=lambda i: (gains[i], list(gains).index(i)))
        assert set(ids[len(gains) :]) == {p["id"] for p in predictions} - gains.keys()


def test_family_split_and_search_narrow_the_list_together(browser, report, evaluation):
    predictions, _, _ = evaluation
    with opened(browser, report) as page:
        page.locator("select[name=family]").select_option("plural")
        page.locator("select[name=split]").select_option("test")
        kept = [p for p in predictions if p["family"] == "plural" and p["split"] == "test"]
        assert shown_ids(page) == [p["id"] for p in kept]
        page.locator("input[name=q]").fill("  IS LEAF ")
        page.wait_for_function("() => location.hash.includes('q=')")
        kept = [p for p in kept if "is leaf" in json.dumps(p).lower()]
        assert shown_ids(page) == [p["id"] for p in kept] != []
        assert page.evaluate("CSS.highlights.get('found').size") > 0
        page.locator("#reset").click()
        assert page.locator("#shown").text_content() == "120 examples"
        page.locator("input[name=q]").fill("matches the reference")  # a judge's words
        page.wait_for_function("() => document.querySelector('#shown').textContent !== '120 examples'")
        assert 0 < len(shown_ids(page)) < 120
        page.locator("input[name=q]").fill("no text holds this")
        page.wait_for_function("() => document.querySelector('#shown').textContent === '0 of 120'")
        assert page.locator(".example").count() == 0


def test_a_view_can_be_shared_by_its_address(browser, report):
    with opened(browser, report) as page:
        page.locator("select[name=score]").select_option("token_f1")
        page.locator("select[name=sort]").select_option("win")
        page.locator("select[name=family]").select_option("past tense")
        page.locator("input[name=q]").fill("100 % & #=?")
        page.wait_for_function("() => location.hash.includes('q=')")
        page.locator("input[name=q]").fill("answer")
        page.wait_for_function("() => location.hash.includes('q=answer')")
        assert state_of(page) == {"score": "token_f1", "sort": "win", "family": "past tense", "q": "answer"}
        fragment, ids = page.evaluate("location.hash"), page.locator(".example .id").all_text_contents()
        page.locator("input[name=q]").fill("100 % & #=?")
        page.wait_for_function("() => !location.hash.includes('q=answer')")
        awkward = page.evaluate("location.hash")
    with opened(browser, report, fragment) as page:
        assert page.locator(".example .id").all_text_contents() == ids
        assert page.locator("select[name=family]").input_value() == "past tense"
    with opened(browser, report, awkward) as page:
        assert page.locator("input[name=q]").input_value() == "100 % & #=?"
    with opened(browser, report, "#show=nonsense&sort=__proto__&page=-1&family=%E0%A4%A&x=1") as page:
        assert page.locator("#shown").text_content() == "120 examples"


INHERITED = ("constructor", "__proto__", "toString", "valueOf", "hasOwnProperty", "__lookupSetter__")


@pytest.mark.parametrize("name", INHERITED[:3])
def test_names_that_every_object_has_mean_nothing_in_the_address(browser, report, name):
    keys = ("show", "model", "score", "sort", "family", "split", "id", "diff", "page")
    for fragment in (*(f"#{key}={name}" for key in keys), f"#{name}=1", f"#{name}"):
        with opened(browser, report, fragment) as page:
            assert page.locator("#shown").text_content() == "120 examples"
            assert page.locator(".example").count() == 25
            assert page.locator("#show input:checked").input_value() == "all"


def test_names_that_every_object_has_are_names_in_the_data(browser, tmp_path):
    predictions = make_predictions(6)
    for prediction, name in zip(predictions, INHERITED, strict=False):
        prediction["id"] = prediction["family"] = name
    write_report(tmp_path, predictions, make_metrics(predictions))
    with opened(browser, tmp_path / "report.html", "#family=constructor") as page:
        assert page.locator(".example .id").all_text_contents() == ["constructor"]
    with opened(browser, tmp_path / "report.html", "#id=__proto__") as page:
        assert page.locator(".example.linked .id").all_text_contents() == ["__proto__"]


def test_the_page_says_what_was_looked_at_and_why_a_score_is_missing(browser, tmp_path):
    predictions = make_predictions(150)
    for prediction in predictions:
        prediction["output"] = prediction["output"].split()[-1]  # one word: no 4-gram
        del prediction["tuned"]["stop_reason"]
    metrics = make_metrics(predictions)
    metrics["provenance"]["headline"] = "chrf"
    write_report(tmp_path, predictions, metrics)
    with opened(browser, tmp_path / "report.html") as page:
        said = page.locator("main").text_content().replace("\N{NO-BREAK SPACE}", " ")
        assert f"{metrics['comparisons']} differences were looked at" in said
        assert (
            page.locator("#scores tr", has_text="BLEU").first.locator(".why").text_content().startswith("no reference")
        )
        assert page.locator("#scores tr", has_text="Stop rate").first.locator(".why").count() == 1
        assert "scored higher in chrF" in said and "chrF by family" in said
        assert "chrF" in page.locator("h1").text_content()


def test_the_got_worse_card_leads_to_the_examples(browser, report, evaluation, scores):
    predictions, _, _ = evaluation
    base, tuned = scores["baseline"]["exact_match"], scores["tuned"]["exact_match"]
    lost = [p["id"] for p in predictions if p["split"] == "test" and base[p["id"]] == 1 and tuned[p["id"]] == 0]
    with opened(browser, report, "#show=empty") as page:
        link = page.locator(".card.worse .turned a")
        assert link.text_content().split()[0] == str(len(lost)) != "0"
        link.click()
        page.wait_for_function("() => location.hash.startsWith('#show=worse')")
        assert shown_ids(page) == lost
        assert page.locator("#examples").evaluate("e => Math.abs(e.getBoundingClientRect().top)") < 400


def test_a_permalink_opens_on_its_example(browser, report, evaluation):
    predictions, _, _ = evaluation
    with opened(browser, report, "#id=test/95") as page:  # on the fourth page
        linked = page.locator(".example.linked")
        assert linked.locator(".id").text_content() == "test/95"
        assert linked.evaluate("e => document.activeElement === e")
        page.wait_for_function(
            "() => Math.abs(document.querySelector('.linked').getBoundingClientRect().top - 150) < 150"
        )
        # by click: the address names the example alone, and the list stays as it is
        page.locator("#show input[value=wrong]").check(force=True)
        before = page.locator(".example .id").all_text_contents()
        page.locator(".example a").nth(2).click()
        page.wait_for_selector(".linked")
        assert page.evaluate("location.hash") == f"#id={before[2]}"
        assert page.locator(".example .id").all_text_contents() == before
        # what the filters hide is shown all the same
        hidden = next(p["id"] for p in predictions if p["id"] not in before)
        page.evaluate("id => { location.hash = 'id=' + id; }", hidden)
        page.wait_for_function("id => document.querySelector('.linked .id')?.textContent === id", arg=hidden)
        assert page.locator("#shown").text_content() == "120 examples"
        page.evaluate("location.hash = 'id=nobody'")
        page.wait_for_function("() => !document.querySelector('.linked')")


def test_pages_hold_25_examples(browser, report, evaluation):
    predictions, _, _ = evaluation
    ids = [prediction["id"] for prediction in predictions]
    with opened(browser, report) as page:
        assert page.locator(".example .id").all_text_contents() == ids[:25]
        assert page.locator("#previous").is_disabled()
        page.locator("#next").click()
        assert page.locator(".example .id").all_text_contents() == ids[25:50]
        assert page.locator("#range").text_content() == "26–50 of 120"
        assert state_of(page) == {"page": "2"}
        page.locator("#show input[value=right]").check(force=True)
        assert "page" not in state_of(page)


def test_an_example_shows_its_texts_scores_and_judgements(browser, report, evaluation, scores):
    predictions, _, rows = evaluation
    first = predictions[0]
    with opened(browser, report, "#diff=off") as page:
        example = page.locator(".example").first
        assert example.locator(".instruction").text_content() == first["instruction"]
        assert example.locator(".input").text_content() == first["input"]
        assert example.locator(".reference .text").text_content() == first["output"]
        for label in MODELS:
            answer = example.locator(f"[data-label='{label}']")
            assert answer.locator(".response").text_content() == first[label]["text"]
            assert f"{first[label]['tokens']} tokens" in answer.locator(".badge").text_content()
            value = scores[label]["chrf"][first["id"]]
            assert answer.locator(".points div").nth(3).text_content() == f"chrF{100 * value:.0f}"
        base, tuned = (example.locator(f"[data-label={label}] .judged").text_content() for label in MODELS[:2])
        assert "timeout" in tuned
        score = next(row["score"] for row in rows if row["model"] == "baseline")
        assert f"{PROMPT} {score} of 100" in base
        assert "base first → " in example.locator(".pair").text_content()
        long = page.locator(".example").nth(8).locator("[data-label=tuned]")
        assert "hit the cap" in long.locator(".badge").text_content()
        assert len(long.locator(".response").text_content()) < 1000
        long.locator("button", has_text="Show all 100,000 characters").click()
        assert long.locator(".response").text_content() == "x" * 100_000
        assert page.evaluate("document.documentElement.scrollWidth") <= 1200
        assert page.locator(".example").nth(7).locator("[data-label=tuned] .none").text_content() == "empty"


def test_the_word_diff_marks_what_differs_from_the_reference(browser, tmp_path):
    pairs = [
        ("The quick brown fox jumps.", "The quick red fox leaps high."),  # (reference, response)
        ("one two three", "one three"),
        ("a b c", "x y z"),  # nothing in common
        ("same text", "same text"),
        (" ".join(f"a{i}" for i in range(600)) + " end", " ".join(f"b{i}" for i in range(600)) + " end"),  # too long
        ("a b", "a <b>b</b>"),
    ]
    predictions = make_predictions(len(pairs), models=("tuned",))
    for prediction, (reference, response) in zip(predictions, pairs, strict=True):
        prediction["output"], prediction["tuned"]["text"] = reference, response
    write_report(tmp_path, predictions, make_metrics(predictions))
    marked = [
        ["The quick ", "-brown", " ", "+red", " fox ", "-jumps.", " ", "+leaps high."],
        ["one ", "-two", " three"],
        None, None, None,
        ["a ", "-b", " ", "+<b>b</b>"],
    ]  # fmt: skip
    with opened(browser, tmp_path / "report.html") as page:
        for example, expected in zip(page.locator(".example").all(), marked, strict=True):
            parts = example.locator(".response").evaluate(
                "e => [...e.childNodes].map(n => ({INS: '+', DEL: '-'}[n.nodeName] ?? '') + n.textContent)"
            )
            if expected is None:
                assert example.locator("ins, del").count() == 0
            else:
                joined = [parts[0]]
                for part in parts[1:]:
                    plain = part[0] not in "+-" and joined[-1][0] not in "+-"
                    joined = [*joined[:-1], joined[-1] + part] if plain else [*joined, part]
                assert joined == expected
        page.locator("input[name=diff]").uncheck()
        assert page.locator("ins, del").count() == 0
        assert page.locator(".example").first.locator(".response").text_content() == pairs[0][1]
        assert state_of(page) == {"diff": "off"}


# --- themes and screens -----------------------------------------------------------------------------------------------


def test_the_theme_follows_the_system_and_the_button(browser, report):
    def look(page):
        shown = page.locator("#figure-deltas img").evaluate_all(
            "all => all.filter(i => i.offsetHeight).map(i => i.className)"
        )
        return page.evaluate("getComputedStyle(document.body).backgroundColor"), *shown

    light, dark = ("rgb(255, 255, 255)", "light-only"), ("rgb(20, 23, 26)", "dark-only")
    with opened(browser, report, color_scheme="light") as page:
        assert look(page) == light
        page.emulate_media(color_scheme="dark")
        assert look(page) == dark
        page.locator("#theme").click()
        assert look(page) == light
        page.reload()
        assert look(page) == light  # kept
        page.locator("#theme").click()
        assert look(page) == dark
        page.emulate_media(color_scheme="light")
        assert look(page) == light  # follows the system again
        page.locator("#theme").click()
        assert look(page) == dark
        page.emulate_media(media="print")
        assert look(page) == light


@pytest.mark.parametrize("width", [320, 360, 768])
def test_a_small_screen_needs_no_sideways_scrolling(browser, report, width):
    with opened(browser, report, viewport={"width": width, "height": 740}) as page:
        page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
        page.locator("button.more").first.click()
        assert page.evaluate("document.documentElement.scrollWidth") == width
        spilling = page.evaluate(
            "width => [...document.querySelectorAll('main *')].filter(e => e.getBoundingClientRect().right > width + 1"
            " && !e.closest('.scroll, .hidden, .skip')).map(e => e.outerHTML.slice(0, 80))", width
        )  # fmt: skip
        assert spilling == []
        if width < 768:
            assert page.locator(".figures img:visible").first.bounding_box()["width"] > 0.85 * width


def test_the_page_can_be_used_by_keyboard(browser, report):
    with opened(browser, report) as page:
        page.keyboard.press("Tab")
        assert page.evaluate("document.activeElement.className") == "skip"
        page.locator("#show input[value=all]").focus()
        page.keyboard.press("ArrowRight")
        assert state_of(page) == {"show": "better"}
        page.locator("#next").focus()
        page.keyboard.press("Enter")
        assert state_of(page) == {"show": "better", "page": "2"}


# --- other evaluations ------------------------------------------------------------------------------------------------


def test_without_a_baseline_nothing_is_compared(browser, tmp_path):
    predictions = make_predictions(30, models=("tuned",))
    for prediction in predictions:
        del prediction["family"]
    write_report(tmp_path, predictions, make_metrics(predictions))
    assert {path.name for path in tmp_path.iterdir()} == {"report.html"}
    with opened(browser, tmp_path / "report.html") as page:
        assert page.locator("#figures").count() == page.locator("a[href='#figures']").count() == 0
        assert "no baseline" in page.locator("h1").text_content()
        assert page.locator(".card").count() == page.locator("select[name=family]").count() == 0
        values = page.eval_on_selector_all("#show input", "all => all.map(input => input.value)")
        assert values == ["all", "right", "wrong", "cut", "empty"]
        assert page.locator("select[name=sort] option").count() == 2
        right = sum(p["tuned"]["text"] == p["output"] for p in predictions)
        page.locator("#show input[value=right]").check(force=True)
        assert page.locator("#shown").text_content() == f"{right} of 30"


def test_answers_from_a_file_and_a_judge_that_failed(browser, tmp_path):
    predictions = make_predictions(10)
    for prediction in predictions:
        for model in ("baseline", "tuned"):
            prediction[model] = {"text": prediction[model]["text"]}
    judge = {"endpoint": "http://127.0.0.1:9/v1", "model": None, "complete": False, "usage": None, "scores": {},
             "pairwise": None, "error": "no answer from http://127.0.0.1:9/v1"}  # fmt: skip
    write_report(tmp_path, predictions, make_metrics(predictions, judge), [])
    with opened(browser, tmp_path / "report.html") as page:
        cautions = page.locator(".cautions").text_content().replace("\N{NO-BREAK SPACE}", " ")
        for role in ("base", "tuned"):
            assert f"8 of 8 responses (100.0 %) of the {role} model ended in an unknown way" in cautions
        assert "The judge failed: no answer from http://127.0.0.1:9/v1" in cautions
        assert "no answer from http://127.0.0.1:9/v1" in page.locator("#judge").text_content()
        assert page.locator(".badge").count() == 0


def test_scores_over_a_part_of_the_records_have_their_number(browser, tmp_path):
    predictions = make_predictions(150, models=MODELS)
    for number, prediction in enumerate(predictions):
        if number >= 50:
            prediction["tuned"]["reference_loss"] = prediction["tuned"]["reference_tokens"] = None
        if number == 0:
            prediction["checkpoint-300"]["reference_loss"] = None
    metrics = make_metrics(predictions)
    write_report(tmp_path, predictions, metrics)
    with opened(browser, tmp_path / "report.html") as page:
        table = page.locator("#scores .split").first.locator("table").first
        loss, chrf = (table.locator("tbody tr", has_text=name) for name in ("Reference loss", "chrF"))
        assert loss.locator("th .over").text_content() == "n 40 of 120"
        assert loss.locator("td .over").text_content() == "n 119"
        assert chrf.locator(".over").count() == 0
        assert "Reference loss, Perplexity, Bits per byte: measured on 40 of the 120 test records" in (
            page.locator(".cautions").text_content().replace("\N{NO-BREAK SPACE}", " ")
        )
    # by family where the score in the headline is such a one
    metrics["provenance"]["headline"] = "reference_loss"
    write_report(tmp_path, predictions, metrics)
    with opened(browser, tmp_path / "report.html") as page:
        counts = page.locator("#scores .split").first.locator("table").nth(2).locator("tbody td:nth-child(2)")
        assert counts.count() == 4
        parts = [text.split(" of ") for text in counts.all_text_contents()]
        assert sum(int(n) for n, _ in parts) == 40 and sum(int(of) for _, of in parts) == 120


def test_few_records_show_no_difference(browser, tmp_path):
    predictions = make_predictions(30)
    for prediction in predictions:
        prediction["tuned"]["text"], prediction["baseline"]["text"] = prediction["output"], "no"
    judge = make_judge(make_judge_rows(predictions[:3]))
    write_report(tmp_path, predictions, make_metrics(predictions, judge))
    with opened(browser, tmp_path / "report.html") as page:
        test, unseen = page.locator("#scores .split").all()  # 24 and 6 records
        assert test.locator("table").first.locator("tbody tr").first.locator(".word").text_content() == "▲ better"
        words = unseen.locator("table").first.locator(".word").all_text_contents()[1:]
        assert words == ["○ too few"] * 8
        assert set(page.locator("#scores table").nth(2).locator("td.word").all_text_contents()) == {"○ too few"}
        assert page.locator("#judge td.word").first.text_content() == "○ too few"
        said = page.locator(".verdict").text_content().replace("\N{NO-BREAK SPACE}", " ")
        assert "on 6 test_unseen records" in said and "fewer than 20 records are too few to show one." in said
        assert "No family got significantly better." in page.locator(".card.better").text_content()
    families = forest_groups(make_metrics(predictions)["splits"]["test"], "exact_match")["Families"]
    assert {(score["ci95"][0] > 0, direction(score)) for _, score in families} == {(True, "unclear")}


def test_a_model_in_a_folder_called_base_is_told_from_the_base(browser, tmp_path):
    models = ("baseline", "tuned", "base", "Tuned")
    predictions = make_predictions(30, models=models)
    rows = make_judge_rows(predictions)
    rows += [{**row, "model": "base"} for row in rows if row.get("model") == "baseline"]
    write_report(tmp_path, predictions, make_metrics(predictions, make_judge(rows)), rows)
    with opened(browser, tmp_path / "report.html") as page:
        heads = page.locator("#scores table").first.locator("thead th").all_text_contents()
        assert [head for head in heads if "ase" in head or "uned" in head] == ["Base", "Tuned", "“base”", "“Tuned”"]
        names = page.locator(".example").first.locator("h4 bdi").all_text_contents()
        assert names == ["Base", "Tuned", "“base”", "“Tuned”"]
        assert page.locator("select[name=model] option").all_text_contents() == ["Tuned", "“base”", "“Tuned”"]


def test_families_need_not_be_text(browser, tmp_path):
    predictions = make_predictions(40)
    kinds = [3, None, "", " ", "x", True]
    for number, prediction in enumerate(predictions):
        prediction["family"] = kinds[number % len(kinds)]
    metrics = make_metrics(predictions)
    write_report(tmp_path, predictions, metrics)
    with opened(browser, tmp_path / "report.html", "#family=3") as page:
        options = page.locator("select[name=family] option").all_text_contents()
        assert options == ["all families", "3", "x", "True"]
        assert shown_ids(page) == [p["id"] for p in predictions if p["family"] == 3]
        assert page.locator(".example .family").first.text_content() == "3"


def test_rows_are_pairs_by_their_order_and_not_by_the_name_of_the_prompt(browser, tmp_path):
    predictions = make_predictions(30)
    rows = make_judge_rows(predictions)
    judge = make_judge(rows)
    judge["scores"] = {"pairwise": judge["scores"][PROMPT]}
    for row in rows:
        row["prompt"] = "side by side" if "order" in row else "pairwise"
    write_report(tmp_path, predictions, make_metrics(predictions, judge), rows)
    with opened(browser, tmp_path / "report.html") as page:
        example = page.locator(".example").first
        assert f"pairwise {rows[0]['score']} of 100" in example.locator("[data-label=baseline] .judged").text_content()
        assert example.locator(".pair p").count() == 2


def test_judgements_that_the_scores_have_no_word_of_are_left_out(browser, tmp_path):
    predictions = make_predictions(30)
    rows = make_judge_rows(predictions)
    (tmp_path / "judge.jsonl").write_text("", encoding="utf-8")
    write_report(tmp_path, predictions, make_metrics(predictions), rows)
    with opened(browser, tmp_path / "report.html") as page:
        assert page.locator(".judged, #judge, #show input[value=unscored]").count() == 0
        assert page.locator("select[name=score] option").count() == 4
    other = [{**row, "prompt": "rubric_1_5", "score": 3} for row in rows if "model" in row]
    unknown = {**rows[0], "id": "of other records"}
    write_report(tmp_path, predictions, make_metrics(predictions, make_judge(rows)), [*rows, *other, unknown])
    with opened(browser, tmp_path / "report.html") as page:
        assert page.locator(".example").first.locator("[data-label=tuned] .judged").count() == 1
        assert page.locator(".example").first.locator(".pair p").count() == 2
        assert "judge.jsonl" in page.locator(".files a").all_text_contents()


def test_drawings_of_an_earlier_report_are_removed(browser, tmp_path):
    predictions = make_predictions(30)
    write_report(tmp_path, predictions, make_metrics(predictions), log_history=LOG_HISTORY)
    for prediction in predictions:
        del prediction["baseline"]
    (tmp_path / "mine.png").write_bytes(b"")
    write_report(tmp_path, predictions, make_metrics(predictions))
    assert {path.name for path in tmp_path.iterdir()} == {"report.html", "mine.png"}
    with opened(browser, tmp_path / "report.html") as page:
        assert page.locator(".files a").count() == 0


def test_the_real_predictions_are_reported(browser, tmp_path):
    path = SHARED / "data" / "gpt2-medium-responses.json"
    if not path.is_file():
        pytest.skip(f"the real responses are not at {path}; made-up ones are reported instead")
    records = json.loads(path.read_text(encoding="utf-8"))
    predictions = [
        {"id": f"all/{row}", "split": "all", "tuned": {"text": record["model_response"]},
         "baseline": {"text": record["input"] or record["instruction"]},  # an echo of the input
         **{key: record[key] for key in ("instruction", "input", "output")}}
        for row, record in enumerate(records)
    ]  # fmt: skip
    write_report(tmp_path, predictions, make_metrics(predictions))
    with opened(browser, tmp_path / "report.html") as page:
        assert " on 110 records " in page.locator("h1").text_content()
        assert len(shown_ids(page)) == 110


def test_twenty_thousand_examples_open_and_are_searched(browser, report, tmp_path):
    """The page of 120 examples with each of them 167 times, and responses as long as 128 tokens are."""
    copies, padding = 167, " and so on" * 40
    head, begin, rest = report.read_text(encoding="utf-8").partition('<script type="application/json" id="data">')
    data, end, tail = rest.partition("</script>")
    content = json.loads(data)
    content["answers"]["tuned"]["text"][8] = "short"  # instead of 100 kB

    def repeated(value):
        if isinstance(value, dict):
            return {key: repeated(inner) for key, inner in value.items()}
        return value * copies if isinstance(value, list) and len(value) == 120 else value

    content = repeated(content)
    content["id"] = [f"{id_}/{number}" for number, id_ in enumerate(content["id"])]
    content["answers"]["baseline"]["text"] = [text + padding for text in content["answers"]["baseline"]["text"]]
    path = tmp_path / "report.html"
    path.write_text(head + begin + str(embed_json(content)) + end + tail, encoding="utf-8")
    opening, searching = [], []
    for _ in range(2):
        start = time.perf_counter()
        with opened(browser, path) as page:
            page.wait_for_selector(".example")
            opening.append(time.perf_counter() - start)
            page.locator("input[name=q]").fill("number 1")  # the first search makes the lower-case texts
            page.wait_for_function("() => location.hash.includes('q=')")
            start = time.perf_counter()
            page.locator("input[name=q]").fill("number 17 ")
            page.wait_for_function("() => location.hash.includes('17')")
            searching.append(time.perf_counter() - start)
            assert page.locator("#shown").text_content() == "167 of 20,040"
    print(
        f"20,040 examples, {path.stat().st_size / 1e6:.1f} MB: open {min(opening):.2f} s, search {min(searching):.2f} s"
    )
    assert min(opening) < 2  # measured 0.4 to 1.2 s, and 0.2 s, while two cores did other work as well
    assert min(searching) < 0.5


def test_scores_of_other_predictions_are_refused_and_nothing_is_written(tmp_path):
    predictions = make_predictions(10)
    metrics = make_metrics(predictions)
    with pytest.raises(UserError, match=r"metrics.json covers .*predictions.jsonl holds .* score again"):
        write_report(tmp_path, predictions[:-1], metrics)
    assert list(tmp_path.iterdir()) == []


def test_the_examples_in_the_docstrings():
    for module in (recipe.evaluation.report.examples, recipe.evaluation.tables, recipe.evaluation.verdict):
        assert doctest.testmod(module).failed == 0


# --- hostile texts ----------------------------------------------------------------------------------------------------

# each would call fire(), show a dialog, fetch something, or leave an element with data-hit
PAYLOADS = [
    "<script>fire(1)</script>",
    "</script><script>fire(2)</script>",
    "</SCRIPT ><script data-hit>fire(3)</script>",
    "<!--<script>fire(4)</script>",
    "<!--<script>",
    "--><script>fire(5)</script><!--",
    "]]><script>fire(6)</script>",
    "<![CDATA[<script>fire(7)</script>]]>",
    "<img src=x onerror=fire(8)>",
    "<img data-hit src='http://192.0.2.1/x.png'>",
    '"><img src=x onerror=fire(9)>',
    "'><img src=x onerror=fire(10)>",
    "`><img src=x onerror=fire(11)>",
    '" onmouseover="fire(12)" autofocus onfocus="fire(13)" x="',
    "' onfocus='fire(14)' autofocus='",
    "<svg onload=fire(15)>",
    "<svg><script>fire(16)</script></svg>",
    "<svg><animate onbegin=fire(17) attributeName=x dur=1s>",
    "<svg><style><img src=x onerror=fire(18)></style></svg>",
    "<math><mtext></p><style><img src=x onerror=fire(19)></style></math>",
    "<math><mtext><table><mglyph><style><!--</style><img title='--&gt;&lt;img src=1 onerror=fire(20)&gt;'>",
    "<noscript><p title='</noscript><img src=x onerror=fire(21)>'>",
    "<iframe srcdoc='<script>parent.fire(22)</script>'></iframe>",
    "<iframe src=javascript:parent.fire(23)></iframe>",
    "<object data=javascript:fire(24)></object>",
    "<embed src=javascript:fire(25)>",
    "<a data-hit href=javascript:fire(26)>x</a>",
    "javascript:fire(27)",
    "java\tscript:fire(28)",
    "data:text/html,<script>fire(29)</script>",
    "<body onload=fire(30)>",
    "<details open ontoggle=fire(31)>x</details>",
    "<video><source onerror=fire(32)></video>",
    "<marquee onstart=fire(33)>x</marquee>",
    "<select autofocus onfocus=fire(34)>",
    "<form data-hit action=javascript:fire(35)><button>x</button></form>",
    "<base data-hit href='http://192.0.2.1/'>",
    "<meta data-hit http-equiv=refresh content='0;url=http://192.0.2.1/'>",
    "<link data-hit rel=stylesheet href='http://192.0.2.1/x.css'>",
    "<style data-hit>*{display:none!important}</style>",
    "</style><script>fire(36)</script>",
    "</title><script>fire(37)</script>",
    "</textarea><script>fire(38)</script>",
    "</template><template shadowrootmode=open><script>fire(39)</script></template>",
    "{{7*7}} ${fire(40)} #{fire(41)} <%= fire(42) %>",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}{% raw %}{# x #}",
    "{{constructor.constructor('fire(43)')()}}",
    "\\u003cscript\\u003efire(44)\\u003c/script\\u003e",
    "\\x3cscript\\x3efire(45)\\x3c/script\\x3e",
    "&lt;script&gt;fire(46)&lt;/script&gt; &#60;script&#62; &amp;amp;",
    "\"});fire(47);({\"a\":\"",
    "';fire(48);//",
    "\\\";fire(49);//",
    "<scr\x00ipt>fire(50)</scr\x00ipt>\x00.",
    "\u2028fire(51)\u2029fire(52)",
    "\ufeff<script>fire(53)</script>\ufffe\uffff",
    "+ADw-script+AD4-fire(54)+ADw-/script+AD4-",
    "＜script＞fire(55)＜/script＞",
    "<ScRiPt/src=data:,fire(56)></sCrIpT>",
    "<p style='background:url(javascript:fire(57))' data-hit>x",
    "\u202e<tpircs>\u202c شكرا \u2066\u200bend\x1b[31m\x08\x7f\x85",
    "lone \ud800 surrogate \udfff",
    "__proto__",
    "constructor",
    "a\r\nb\rc\n\n  d\t e  ",
]  # fmt: skip


@pytest.fixture(scope="module")
def hostile(tmp_path_factory):
    """A report in which every text of every input is hostile, and what was put where."""
    folder = tmp_path_factory.mktemp("hostile")
    label = PAYLOADS[8]
    splits = [PAYLOADS[10], PAYLOADS[0]]
    predictions, rows = [], []
    for number, payload in enumerate(PAYLOADS):
        answer = {"text": payload, "tokens": 3, "stop_reason": "eos", "reference_loss": 1.0, "reference_tokens": 2}
        predictions.append(
            {"id": f"{number}/{payload}", "split": splits[number % 2], "instruction": payload, "input": payload,
             "output": f"reference {payload}", "family": payload, "baseline": answer,
             "tuned": {**answer, "text": f"tuned {payload}"}, label: answer}
        )  # fmt: skip
        for model in ("baseline", "tuned", label):
            rows.append({"id": predictions[-1]["id"], "prompt": payload, "model": model, "status": payload,
                         "score": None if number % 3 else 50, "reason": payload, "error": payload})  # fmt: skip
        for order in ("baseline_first", "tuned_first"):
            rows.append({"id": predictions[-1]["id"], "prompt": "pairwise", "order": order, "status": payload,
                         "winner": payload if number % 2 else None, "reason": payload})  # fmt: skip
    everything = "\n".join(PAYLOADS)
    entry = {"scale": [0, 100], "n": 9, "scored": {"baseline": 9, "tuned": 8, label: 9}, "missing": {everything: 1},
             "empty": {}, "baseline": 5.0, "tuned": None, "delta": None, "ci95": None, "other_models": {label: 1.0},
             "bounds": {model: [0, 1] for model in ("baseline", "tuned", label)}}  # fmt: skip
    metrics = make_metrics(predictions)
    metrics["judge"] = {
        "endpoint": everything, "model": everything, "complete": False, "usage": None, "error": everything,
        "scores": dict.fromkeys(PAYLOADS, entry),
        "pairwise": summarize_pairs([row for row in rows if "order" in row], allow_missing=True),
    }  # fmt: skip
    metrics["provenance"] = {
        "models": {
            name: {"name": everything, "weights": everything, "template_name": everything, "template": everything}
            for name in ("baseline", "tuned", label)
        },
        "data": everything, "data_hash": everything, "splits": {everything: 1},
        "generation": {everything: everything, "max_new_tokens": 8}, "command": everything,
        "versions": {everything: everything}, "hardware": everything,
    }  # fmt: skip
    write_report(folder, predictions, metrics, rows)
    return folder / "report.html", predictions, label


PROBE = "window.fired = []; window.fire = number => window.fired.push(number);"


def armed(browser: Browser, **options):
    context = browser.new_context(**options)
    context.add_init_script(PROBE)
    return context


def test_the_probe_sees_what_an_unsafe_page_would_run(browser, tmp_path):
    """The same payloads, unescaped: if nothing fired here, the test of the report would mean nothing."""
    unsafe = tmp_path / "unsafe.html"
    unsafe.write_text(
        "<!doctype html><meta charset=utf-8>" + "\n".join(PAYLOADS[:36]).replace("<!--", ""), encoding="utf-8"
    )
    context = armed(browser)
    page = context.new_page()
    page.on("dialog", lambda dialog: dialog.dismiss())
    page.goto(unsafe.as_uri())
    page.wait_for_function("() => window.fired.length >= 8")
    assert {1, 2, 8, 15} <= set(page.evaluate("window.fired"))
    assert page.locator("[data-hit]").count() > 0
    context.close()


@pytest.mark.parametrize("bypass_csp", [False, True], ids=["with its policy", "without its policy"])
def test_hostile_texts_run_nothing_and_appear_as_they_are(browser, hostile, bypass_csp):
    """Escaping must hold by itself: the policy, which would stop most payloads too, is switched off in one run."""
    report, predictions, label = hostile
    assert len(PAYLOADS) >= 40
    context = armed(browser, bypass_csp=bypass_csp)
    page = context.new_page()
    page.set_default_timeout(10_000)
    troubles = []
    page.on("console", lambda m: m.type in ("error", "warning") and troubles.append(m.text))
    page.on("pageerror", lambda error: troubles.append(str(error)))
    page.on("dialog", lambda dialog: (troubles.append(dialog.message), dialog.dismiss()))
    page.on("request", lambda r: r.url.startswith(("file:", "data:")) or troubles.append(r.url))
    page.goto(report.as_uri() + "#diff=off")
    seen = []
    for number in range(1 + (len(PAYLOADS) - 1) // 25):
        if number:
            page.locator("#next").click()
        seen += page.evaluate(
            """label => [...document.querySelectorAll('.example')].map(example => {
                const text = selector => example.querySelector(selector)?.textContent ?? null;
                const answer = name => [...example.querySelectorAll('[data-label]')].find(
                    e => e.dataset.label === name);
                return {
                    id: text('.id'), family: text('.family'), instruction: text('.instruction'), input: text('.input'),
                    output: text('.reference .text'),
                    baseline: answer('baseline').querySelector('.response').textContent,
                    tuned: answer('tuned').querySelector('.response').textContent,
                    other: answer(label).querySelector('.response').textContent,
                    name: answer(label).querySelector('h4 bdi').textContent,
                    reasons: [...example.querySelectorAll('.reason')].map(e => e.textContent),
                };
            })""",
            label,
        )
    assert len(seen) == len(PAYLOADS)
    for shown, prediction in zip(seen, predictions, strict=True):
        payload = visible(prediction["family"])
        assert shown == {
            "id": visible(prediction["id"]), "family": payload, "instruction": payload, "input": payload,
            "output": f"reference {payload}", "baseline": payload, "tuned": f"tuned {payload}", "other": payload,
            "name": visible(f"“{label}”"), "reasons": [payload] * 5,
        }  # fmt: skip
    everything = visible("\n".join(PAYLOADS))
    for selector in ("#command", "#provenance details pre", ".error", ".lead bdi >> nth=0", "#provenance dd >> nth=4"):
        assert page.locator(selector).text_content() == everything, selector
    named = page.locator("#judge tbody th bdi").all_text_contents()
    assert {visible(payload) for payload in PAYLOADS} == set(named)
    families = page.locator("#scores .split tbody th bdi").all_text_contents()
    assert {visible(payload) for payload in PAYLOADS} <= set(families)
    options = page.eval_on_selector_all("select[name=family] option", "all => all.map(option => option.textContent)")
    assert options[1:] == [visible(payload) for payload in PAYLOADS]

    page.locator("input[name=diff]").check()  # words through the diff
    page.evaluate(
        "location.hash = 'id=' + encodeURIComponent(JSON.parse(document.querySelector('#data').textContent).id[1])"
    )
    page.wait_for_selector(".linked")
    page.wait_for_timeout(200)
    assert page.evaluate("window.fired") == []
    assert page.locator("[data-hit]").count() == 0
    assert page.locator("iframe, object, embed, svg, math, video, marquee, base, template, #list img").count() == 0
    assert page.locator("script").count() == 2 and page.locator("style").count() == 1
    handlers = page.evaluate(
        "[...document.querySelectorAll('*')].flatMap(e => [...e.attributes]).filter(a => a.name.startsWith('on')"
        " || /^\\s*javascript:/i.test(a.value) && a.name !== 'value').map(a => a.name + '=' + a.value)"
    )
    assert handlers == []
    for image in page.locator("img").all():  # hostile names do not break the figures
        assert image.evaluate("image => image.decode().then(() => image.naturalWidth)") > 100
    assert troubles == []
    context.close()


def test_the_policy_stops_a_script_that_got_in_all_the_same(browser, report):
    context = armed(browser)
    page = context.new_page()
    violations = []
    page.on("console", lambda m: m.type == "error" and violations.append(m.text))
    page.goto(report.as_uri())
    page.evaluate(
        """() => {
            const script = document.createElement('script');
            script.textContent = 'fire(1)';
            document.body.append(script);
            const image = document.createElement('img');
            image.src = 'http://192.0.2.1/x.png';
            document.body.append(image);
            const holder = document.createElement('div');
            holder.innerHTML = '<p onclick="fire(2)" style="color: red">x</p>';
            document.body.append(holder);
            holder.firstChild.click();
        }"""
    )
    page.wait_for_timeout(200)
    assert page.evaluate("window.fired") == []
    assert len(violations) >= 3
    context.close()


def test_right_to_left_text_stays_in_its_place(browser, tmp_path):
    predictions = make_predictions(5, models=("tuned",))
    predictions[0]["id"] = predictions[0]["family"] = "שלום"
    predictions[0]["tuned"]["text"] = "مرحبا بالعالم 123"
    write_report(tmp_path, predictions, make_metrics(predictions))
    with opened(browser, tmp_path / "report.html") as page:
        example = page.locator(".example").first
        response = example.locator(".response")
        assert response.evaluate("e => getComputedStyle(e).direction") == "rtl"
        assert response.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"
        assert example.locator(".instruction").evaluate("e => getComputedStyle(e).direction") == "ltr"
        left = example.locator(".id").bounding_box()["x"]
        assert left < example.locator(".family").bounding_box()["x"]  # the order of the page, not of the texts


def test_what_is_embedded_cannot_end_its_element():
    for payload in PAYLOADS:
        text = embed_json({payload: payload})
        assert not set("<>&\u2028\u2029") & set(text)
        text.encode()  # no lone surrogate is left
        assert json.loads(text) == {payload: payload}
    with pytest.raises(ValueError, match="not JSON compliant"):
        embed_json([float("nan")])


def test_the_file_of_an_earlier_judge_is_not_linked(browser, tmp_path):
    """Answers have changed since: metrics.json holds no judgement any more."""
    predictions = make_predictions(30)
    (tmp_path / "judge.jsonl").write_text("{}\n", encoding="utf-8")
    (tmp_path / "metrics.json").write_text("{}\n", encoding="utf-8")
    write_report(tmp_path, predictions, make_metrics(predictions))
    with opened(browser, tmp_path / "report.html") as page:
        links = page.locator(".files a").all_text_contents()
        assert "metrics.json" in links and "judge.jsonl" not in links


def test_pairs_without_a_win_rate_or_a_question_say_nothing_of_them():
    pairs = {"judged": 0, "win": 0, "tie": 0, "loss": 0, "win_rate": None, "ci95": None, "flips": 0, "decided": 0}
    assert pairs_sentence(pairs).endswith("loses 0.")
    pairs |= {"judged": 4, "win": 3, "tie": 1, "win_rate": 0.875, "decided": 2, "flips": 1}
    assert pairs_sentence(pairs).endswith(
        "Win rate 87.5 %, where a tie counts half. In 1 of the 2 pairs asked about, the order decided."
    )
