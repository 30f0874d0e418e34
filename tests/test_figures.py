"""Figures: what they show, in both themes, legibly and without a word of the data read as markup or mathematics."""

import base64
import re
import xml.etree.ElementTree as ElementTree

import pytest
from conftest import ROOT
from evaluation_samples import LOG_HISTORY
from matplotlib.colors import to_rgb

from recipe import figures
from recipe.evaluation.report.figures import (
    DARK,
    draw_deltas,
    draw_outcomes,
    forest_groups,
    make_picture,
)
from recipe.figures import draw_loss


def difference(label: str, delta: float, low: float, high: float, better: str = "higher", n: int = 400) -> tuple:
    ci95 = [low / 100, high / 100]
    return label, {"tuned": 0.5, "delta": delta / 100, "ci95": ci95, "better": better, "n": n}


GROUPS = {
    "Scores": [difference("Exact match", 40, 30, 50), difference("chrF", -1, -3, 1)],
    "Families": [difference("plural", -20, -35, -5)],
}
GROUNDS = {"light": "#ffffff", "dark": "#14171a"}  # --ground of report.css


def svg_of(uri: str) -> str:
    head, _, body = uri.partition(",")
    assert head == "data:image/svg+xml;base64"
    return base64.b64decode(body).decode()


def words_of(svg: str) -> list[str]:
    return [element.text for element in ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}text")]


def contrast(one: str, other: str) -> float:
    """By WCAG 2.2, from 1 to 21."""

    def luminance(color: str) -> float:
        channels = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return sum(weight * channel for weight, channel in zip((0.2126, 0.7152, 0.0722), channels, strict=True))

    bright, dim = sorted((luminance(one), luminance(other)), reverse=True)
    return (bright + 0.05) / (dim + 0.05)


def test_a_picture_is_a_png_and_two_svgs_that_differ_in_colours_only(tmp_path):
    picture = make_picture(lambda: draw_deltas(GROUPS), "A plot.", tmp_path / "deltas.png")
    assert (tmp_path / "deltas.png").read_bytes().startswith(b"\x89PNG")
    light, dark = svg_of(picture.light), svg_of(picture.dark)
    assert words_of(light) == words_of(dark)
    assert {"Exact match", "chrF", "plural", "Families"} <= set(words_of(light))
    assert light != dark
    assert re.sub("#[0-9a-f]{6}", "", light) == re.sub("#[0-9a-f]{6}", "", dark)
    assert figures.TEXT in light and figures.TEXT not in dark and DARK[figures.TEXT] in dark
    assert picture.alt == "A plot." and picture.width > picture.height > 0


def test_the_same_figure_gives_the_same_picture(tmp_path):
    pictures = [make_picture(lambda: draw_deltas(GROUPS), "", tmp_path / "deltas.png") for _ in range(2)]
    assert pictures[0] == pictures[1]


def test_the_page_has_the_colours_of_the_figures():
    style = (ROOT / "recipe" / "evaluation" / "report" / "report.css").read_text(encoding="utf-8")
    names = {"ground": None, "text": figures.TEXT, "muted": figures.MUTED, "line": figures.LINE}
    names |= {"baseline": figures.BASELINE_COLOR, "tuned": figures.TUNED_COLOR, "orange": figures.WORSE_COLOR}
    for name, light in names.items():
        pair = tuple(GROUNDS.values()) if light is None else (light, DARK[light])
        assert f"--{name}: light-dark({pair[0]}, {pair[1]});" in style


def test_text_and_graphics_stand_out_from_their_ground():
    style = (ROOT / "recipe" / "evaluation" / "report" / "report.css").read_text(encoding="utf-8")
    colors = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w+), (#\w+)\);", style)}
    grounds = ("ground", "raised", "better-wash", "worse-wash", "mark")
    for theme in (0, 1):
        for ground in grounds:
            assert contrast(colors["text"][theme], colors[ground][theme]) >= 7
        for text in ("muted", "better", "worse"):
            for ground in grounds[:4]:
                assert contrast(colors[text][theme], colors[ground][theme]) >= 4.5, (text, ground, theme)
        for graphic in ("baseline", "tuned", "orange"):
            assert contrast(colors[graphic][theme], colors["ground"][theme]) >= 3, (graphic, theme)


def test_a_difference_is_coloured_by_its_direction_and_hollow_without_one():
    figure = draw_deltas(GROUPS)
    markers = [line for line in figure.axes[0].lines if line.get_marker() == "o"]
    assert [m.get_color() for m in markers] == [figures.TUNED_COLOR, figures.MUTED, figures.WORSE_COLOR]
    assert [m.get_markerfacecolor() == "none" for m in markers] == [False, True, False]
    assert [m.get_xdata()[0] for m in markers] == [40, -1, -20]
    low, high = figure.axes[0].get_xlim()
    assert low < -35 and high > 50


def test_more_families_than_fit_are_in_the_table_only():
    score = difference("", 40, 30, 50)[1] | {"baseline": 0.1}
    families = {f"family {number}": {"n": 400, "metrics": {"exact_match": score}} for number in range(25)}
    part = {"metrics": {"exact_match": score}, "families": families}
    assert set(forest_groups(part, "exact_match")) == {"Scores"}
    families.popitem()
    assert set(forest_groups(part, "exact_match")) == {"Scores", "Families"}


def test_the_sign_of_a_difference_does_not_colour_it():
    """Less may be better, and a difference of few records is none."""
    rows = [difference("loss", -2, -3, -1, better="lower"), difference("two records", 100, 100, 100, n=2)]
    _, better, _, unclear, _ = draw_deltas({"Scores": rows}).axes[0].lines
    assert better.get_color() == figures.TUNED_COLOR
    assert (unclear.get_color(), unclear.get_markerfacecolor()) == (figures.MUTED, "none")


@pytest.mark.parametrize("interval", [(0, 0, 0), (100, 100, 100), (-100, -100, -100)])
def test_zero_stays_in_the_picture(interval):
    low, high = draw_deltas({"Scores": [difference("x", *interval)]}).axes[0].get_xlim()
    assert low < 0 < high


def test_outcomes_are_shares_with_their_counts(tmp_path):
    picture = make_picture(lambda: draw_outcomes({"chrF": (30, 60, 10)}), "", tmp_path / "outcomes.png")
    assert {"30", "60", "10", "tuned better", "equal", "tuned worse", "chrF"} <= set(words_of(svg_of(picture.light)))
    widths = [bar.get_width() for bar in draw_outcomes({"chrF": (30, 60, 10)}).axes[0].patches]
    assert widths == pytest.approx([0.3, 0.6, 0.1])
    assert [bar.get_width() for bar in draw_outcomes({"chrF": (0, 0, 0)}).axes[0].patches] == [0, 0, 0]


def test_names_are_text_and_not_mathematics_nor_markup(tmp_path):
    names = ["$x_1^2$", "<script>alert(1)</script>", "a--b -->", "#4c72b0"]
    groups = {"Families": [difference(name, 1, 0.5, 2) for name in names]}
    picture = make_picture(lambda: draw_deltas(groups), "", tmp_path / "deltas.png")
    for svg in (svg_of(picture.light), svg_of(picture.dark)):
        assert set(names) <= set(words_of(svg))
        assert not list(ElementTree.fromstring(svg).iter("{http://www.w3.org/2000/svg}script"))


def test_loss_marks_the_chosen_step():
    axes = draw_loss(LOG_HISTORY, 600).axes[0]
    lines = {line.get_label(): line for line in axes.lines}
    assert set(lines) == {"training", "validation", "chosen: step 600"}
    assert list(lines["chosen: step 600"].get_xdata()) == [600, 600]
    assert list(lines["validation"].get_xdata()) == list(range(100, 801, 100))
    assert len(draw_loss(LOG_HISTORY).axes[0].lines) == 2


def test_a_run_shorter_than_a_log_has_its_mean(tmp_path):
    [line] = draw_loss([{"step": 3, "train_loss": 2.5}]).axes[0].lines
    assert list(line.get_ydata()) == [2.5]
    figures.plot_loss([{"step": 3, "train_loss": 2.5}], tmp_path / "loss.png")
    assert (tmp_path / "loss.png").stat().st_size > 1000
