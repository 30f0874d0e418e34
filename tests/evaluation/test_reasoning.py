"""Reasoning kept apart from answers: in answers only where a text begins with it, in a judge's reply wherever it is."""

import time

import pytest

from recipe.reasoning import final_part, split_answer

PAIRS = [
    ("<think>", "</think>"),
    ("<Thinking>", "</THINKING>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<analysis>", "</analysis>"),
    ("<reflection>", "</reflection>"),
    ("<scratchpad>", "</scratchpad>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "<|return|><|start|>assistant<|channel|>final <|message|>"),
    ("analysis", "assistantfinal"),
]


@pytest.mark.parametrize("opening, closing", PAIRS, ids=lambda mark: mark)
def test_what_a_text_begins_with_is_reasoning(opening, closing):
    whole = f"{opening}Red? Or\n\nblue?{closing}\n\nBlue."
    assert split_answer(whole) == ("Blue.", "Red? Or\n\nblue?")
    assert split_answer(f" \n{whole}") == ("Blue.", "Red? Or\n\nblue?")
    assert final_part(whole).strip() == "Blue."
    unfinished = f"{opening}Red? Or\n\nBlue."
    assert split_answer(unfinished) == ("", "Red? Or\n\nBlue.")
    assert final_part(unfinished) is None


@pytest.mark.parametrize("opening, closing", PAIRS[:11], ids=lambda mark: mark)
def test_marks_elsewhere_are_text_of_an_answer_but_never_of_a_verdict(opening, closing):
    about = f"The tag {opening} is closed by {closing}, always."
    assert split_answer(about) == (about, None)
    assert split_answer(f"{opening}Hm.{closing}{about}") == (about, "Hm.")
    assert final_part(about) == ", always."
    assert final_part(f"85\n{opening}Or is it 20?") is None
    assert split_answer(f"Red? Or blue?{closing}Blue.") == ("Blue.", "Red? Or blue?")
    assert final_part(f"Red? Or blue?{closing}Blue.") == "Blue."
    assert split_answer(f"{opening}It says {opening}, not this.{closing}Blue.")[0] == "Blue."


@pytest.mark.parametrize(
    "text, answer, reasoning",
    [
        ("<think></think>\n\nBlue.", "Blue.", ""),
        ("<think>a</think>\n<reflection>b</reflection>\nBlue.", "Blue.", "a\n\nb"),
        ("<think>a <think>b</think> c</think>Blue.", "Blue.", "a <think>b</think> c"),
        ("<think>The <reasoning> is open.</think>Blue.", "Blue.", "The <reasoning> is open."),
        ("<think>a</reasoning>b", "", "a</reasoning>b"),
        ("It ends with `</think>`.", "It ends with `</think>`.", None),
        ("<thinker>Rodin</thinker>", "<thinker>Rodin</thinker>", None),
        ("analysis of the finals", "analysis of the finals", None),
        ("Analysis\n\nGood.", "Analysis\n\nGood.", None),
        ("analysisWe sawassistantcommentaryOne momentassistantfinalBlue.", "Blue.",
         "We sawassistantcommentaryOne moment"),
        ("<|channel|>commentary<|message|>a<|end|><|start|>assistant<|channel|>analysis<|message|>b", "", "a\n\nb"),
        ("<|channel|>final<|message|>Blue.", "Blue.", ""),
        (" Blue.\n", " Blue.\n", None),
        ("", "", None),
    ],
)  # fmt: skip
def test_answers_by_hand(text, answer, reasoning):
    assert split_answer(text) == (answer, reasoning)


@pytest.mark.parametrize(
    "text, expected",
    [
        ("<think>a</think>b<thinking>c</thinking>Score: 3", "Score: 3"),
        ("<think>It has <reasoning> in it.</think>85", "85"),
        ("<think>It has </reasoning>85", None),
        ("<think>It quotes <think>x</think>85", None),
        ("<|channel|>final<|message|>85<|end|><|start|>assistant<|channel|>analysis<|message|>But", None),
        ("<|channel|>analysis<|message|>85<|end|><|start|>assistant<|chan", None),
        ("<|channel|>final", None),
        ("analysisIt is 85.assistantfinal20assistantanalysisOr", None),
        ("analysisWell.\n85", None),
        ("Analysis: good\nScore: 85", "Analysis: good\nScore: 85"),
        ("85", "85"),
    ],
)
def test_verdicts_by_hand(text, expected):
    assert final_part(text) == expected


@pytest.mark.parametrize("before", ["", "<think>", "analysis", "<|channel|>"])
@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<think></think>", "<think><think></think>", "<think <", "a_", "[THINK]", "assistantfinal",
     "<|channel|>", "<|channel|>final<|message|>", "\n", "<think></reasoning>"],
)  # fmt: skip
def test_hostile_texts_take_a_time_that_grows_with_their_length(unit, before):
    """Quadratic code takes a minute for 250 KB."""
    text = before + unit * (250_000 // len(unit))
    started = time.process_time()
    split_answer(text)
    final_part(text)
    split_answer(before + "<think>" * 20_000 + "</reasoning>" * 20_000)
    assert final_part("<think>" * 20_000 + "</reasoning>" * 20_000) is None
    assert time.process_time() - started < 5
