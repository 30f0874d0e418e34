"""Reasoning kept apart from answers: in answers only where a text begins with it, in a judge's reply wherever it is."""

import random
import string
import time

import pytest

from recipe.reasoning import code_spans, final_part, split_answer, split_scored

TAGS = [
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
    ("<scratch_pad>", "</scratch_pad>"),
    ("<|think|>", "<|/think|>"),
    ("<|thinking|>", "</|thinking|>"),
    ("<inner_thoughts>", "</inner_thoughts>"),
    ("<chain_of_thought>", "</chain_of_thought>"),
    ("<ChainOfThought>", "</ChainOfThought>"),
    ("<CoT>", "</cot>"),
    ("<thought-process>", "</thought-process>"),
    ("<antThinking>", "</antThinking>"),
    ("<inner monologue>", "</inner monologue>"),
    ("<hidden_reasoning_steps>", "</hidden_reasoning_steps>"),
    ("<rationale>", "</rationale>"),
    ('<think budget="3/4">', "</think>"),
    ("<longcat_think>", "</longcat_think>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|thinking_start|>", "<|thinking_end|>"),
    ("<思考>", "</思考>"),
    ("【think】", "【/think】"),
    ("<|channel>thought\n", "<channel|>"),
]
BY_NUMBER = [("<unused94>thought\n", "<unused95>")]  # the closing one alone means nothing
CHANNELS = [  # marks that begin the answer
    ("<|im_start|>think\n", "<|im_start|>answer\n"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|start|>assistant<|channel|>analysis<|message|>", "<|return|><|start|>assistant<|channel|>final <|message|>"),
    ("analysis", "assistantfinal"),
]
PAIRS = [*TAGS, *BY_NUMBER, *CHANNELS]


@pytest.mark.parametrize("opening, closing", PAIRS, ids=lambda mark: mark)
def test_what_a_text_begins_with_is_reasoning(opening, closing):
    whole = f"{opening}Red? Or\n\nblue?{closing}\n\nBlue."
    assert split_answer(whole) == ("Blue.", "Red? Or\n\nblue?")
    assert split_answer(f" \n{whole}") == ("Blue.", "Red? Or\n\nblue?")
    assert final_part(whole).strip() == "Blue."
    unfinished = f"{opening}Red? Or\n\nBlue."
    assert split_answer(unfinished) == ("", "Red? Or\n\nBlue.")
    assert final_part(unfinished) is None


@pytest.mark.parametrize("opening, closing", TAGS, ids=lambda mark: mark)
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


@pytest.mark.parametrize("opening, closing", [*TAGS, *BY_NUMBER], ids=lambda mark: mark)
def test_texts_about_marks_stay_whole(opening, closing):
    for text in (
        f"Use the {opening.strip()} tag to begin.",
        f"`{closing}` ends it.",
        f"It is written `x {closing}` or so.",
        f"Write:\n```\nHm.\n{closing}\nBlue.\n```\nThat is all.",
    ):
        assert split_answer(text) == (text, None)
        assert split_answer(f"{opening}Hm.{closing}{text}") == (text, "Hm.")


@pytest.mark.parametrize(
    "text",
    ["<thinker>Rodin</thinker>", "<think_tank>Ifo</think_tank>", "<failure_reason>Time</failure_reason>", "<b>x</b>",
     "<ascot>x</ascot>", "<thoughtful/>", "<reason_code>5</reason_code>", "<thought_leader>Ada</thought_leader>",
     "<market_analysis>Up.</market_analysis>", "[Analysis] It is good.", "[Reasoning]\nSo.\n[Score]\n85",
     "if a < think and b > c: pass", "<answer>Blue.</answer>", "[reason](https://example.org)",
     "<unused95> is a token"],
)  # fmt: skip
def test_other_tags_are_no_reasoning(text):
    assert split_answer(text) == (text, None)
    assert final_part(text) == text


@pytest.mark.parametrize(
    "text",
    ["<|START_THINKING|>Red?<|END_THINKING|><|START_RESPONSE|>Blue.<|END_RESPONSE|>",
     "<|begin_of_thought|>Red?<|end_of_thought|>\n\n<|begin_of_solution|>\nBlue.\n<|end_of_solution|>\n",
     "<think>Red?</think><|START_RESPONSE|>Blue.", "<think>Red?</think>\n<answer>Blue.</answer>",
     "<thoughts>Red?</thoughts><final_answer> Blue. </final_answer>",
     "<|START_THINKING|><|END_THINKING|><|START_RESPONSE|>Blue.<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
     "<|START_RESPONSE|>Blue.<|END_RESPONSE|>"],
)  # fmt: skip
def test_the_tags_of_a_whole_answer_go_unless_the_reference_has_them(text):
    assert split_answer(text)[0] == split_scored(text, "Red.")[0] == final_part(text) == "Blue."
    tagged = text[text.rindex("<", 0, text.index("Blue")) :].strip()
    assert split_scored(text, tagged)[0].strip() == tagged


@pytest.mark.parametrize(
    "text, reference, opened, answer",
    [
        ("Red? Or", "Blue.", "<think>", ""),
        ("Red?</think>Blue.", "Blue.", "<think>", "Blue."),
        ("Easy.</think>Blue.", "Easy.</think>Blue.", "<think>", "Easy.</think>Blue."),
        ("Red?<channel|>Blue.", "Blue.", "<|channel>thought", "Blue."),
        ("Red?<unused95>Blue.", "Blue.", "<unused94>thought", "Blue."),
        ("Blue.", "Blue.", "", "Blue."),
    ],
)
def test_a_prompt_may_open_the_reasoning(text, reference, opened, answer):
    assert split_scored(text, reference, opened)[0] == answer


def test_code_is_between_equal_runs_of_backticks():
    assert [text for text in ("`a`", "``a`b``", "`a``b`") if code_spans(text) != [(0, len(text))]] == []
    assert code_spans("a ` b") == code_spans("`` a `") == []
    assert code_spans("` a ``b``") == [(4, 9)]


@pytest.mark.parametrize("before", ["", "<think>", "analysis", "<|channel|>"])
@pytest.mark.parametrize(
    "unit",
    ["<think>", "</think>", "<think></think>", "<think><think></think>", "<think <", "a_", "[THINK]", "assistantfinal",
     "<|channel|>", "<|channel|>final<|message|>", "\n", "<think></reasoning>",
     "<", "`", "<|channel>thought", "<unused94>", "<answer>", "<my self ai "],
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


@pytest.mark.parametrize(
    "before, rest, split",
    [
        ("<think", "x>Blue.", None),
        ("<my reasoning step ", "x>Blue.", None),
        ("<|reflect_", "|x>Blue.", None),
        ("<think", ">Blue.", ("", "Blue.")),
        ("</think process", " pad>Blue.", ("Blue.", "")),
    ],
)
def test_a_number_in_the_name_of_a_tag_takes_no_seconds(before, rest, split):
    """There are 2^99 ways to cut 100 digits into numbers."""
    text, started = before + "1" * 100 + rest, time.process_time()
    assert split_answer(text) == (split or (text, None))
    final_part(text)
    assert time.process_time() - started < 1


def test_tags_of_many_names_take_no_seconds():
    draw, words = random.Random(2), ["my_", "self_", "ai_", "inner", "think_", "step_", "1_", *string.ascii_lowercase]
    text = "".join(f"<{''.join(draw.choices(words, k=40))[:100]}>" for _ in range(2500))
    started = time.process_time()
    assert split_answer(text) == (text, None)
    split_answer("".join("`" * n + "a" for n in range(700)))
    assert time.process_time() - started < 3
