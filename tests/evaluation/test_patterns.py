"""No pattern that reads what models wrote takes more than a time linear in its length.

A piece of one to three characters of a text that the pattern reads is repeated, at each place of it, before the rest of
that text and before what does not fit. Patterns for short texts, such as the name of a tag, get as much as they can.
"""

import re
import time

import pytest

from recipe import reasoning
from recipe.evaluation import words
from recipe.evaluation.judge import quotations, reading

NAME = 120  # characters of a tag's name, see TAG
EVERYWHERE, BEGINNING, WHOLE = "finditer", "match", "fullmatch"  # how a pattern is used
USES = {
    reasoning.TAG: (EVERYWHERE, None, ['< /think x="1">', "[THINK]", "<|channel>thought\n", "<unused94>thought",
                                       "<|im_start|>think\n"]),
    reasoning.ATTRIBUTES: (EVERYWHERE, NAME, ["think a.b = 'x'"]),
    reasoning.REASONING_NAME: (WHOLE, NAME, ["to my inner think 1 step x", "own self reflect process1 pad", "思考"]),
    reasoning.ANSWER_NAME: (WHOLE, NAME, ["my final answer"]),
    reasoning.DIRECTION: (WHOLE, NAME, ["end of thought", "the thought end"]),
    reasoning.TOKEN: (EVERYWHERE, None, ["<|start|>a"]),
    reasoning.BEGINS_CHANNEL: (BEGINNING, None, [" <|start|> assistant <|channel|>"]),
    reasoning.BARE_START: (BEGINNING, None, [" assistantanalysisThe"]),
    reasoning.BARE_CHANNEL: (EVERYWHERE, None, ["a assistantfinalB"]),
    reasoning.BARE_OPEN: (BEGINNING, None, [" analysisThe"]),
    reasoning.BARE_MAYBE_OPEN: (BEGINNING, None, [" Analysisthe", " analysis\n"]),
    reasoning.SPACE: (BEGINNING, None, [" \n\ufeffa"]),
    reasoning.SPECIAL: (BEGINNING, None, [" <|end|>\n<|eot_id|>a"]),
    reasoning.FENCE_RUN: (EVERYWHERE, None, ["a ``b``"]),
    quotations.SIGN: (EVERYWHERE, None, ["<!-- \\begin{x} $$ \\)\n===== \n", "<a:b c=1>d</a:b>[quote]",
                                         "a <<\n>> \n<<", "\n- BEGINNING of the response -\n",
                                         ":-( [-1.5, ∞) [a,f(x)) “«'`(", 'a """b']),
    quotations.ELISION: (BEGINNING, 8, ["tis ", "90s"]),
    quotations.FENCE: (BEGINNING, None, ["  1. ```py", "- ~~~~ a`"]),
    quotations.INVISIBLE: (EVERYWHERE, None, ["a*_`~\u00adb"]),
    quotations.PLANTED_SCORE: (EVERYWHERE, None, ["score (0-100) is: **85.0**", "grade of 5,"]),
    quotations.PLANTED_WINNER: (EVERYWHERE, None, ["winner: the response 'a'", "better answer is a tie"]),
    reading.WHOLE: (WHOLE, None, ["-85.00 out of 100", "85 points"]),
    reading.WINNER: (WHOLE, None, ["the response [[A]]", "a tie"]),
    reading.SCORE_LABEL: (BEGINNING, None, ["My overall final score is (0 - 100): 5"]),
    reading.WINNER_LABEL: (BEGINNING, None, ["The better response is: A"]),
    reading.IS_FINAL: (BEGINNING, None, ["My final score"]),
    reading.FINAL_HEADING: (WHOLE, None, ["My overall assessment :"]),
    reading.EMPHASIS: (EVERYWHERE, None, ["### **a** _b_ ***"]),
    reading.OPEN_FENCE: (WHOLE, None, ["  ```  json \t", "``` \t "]),
    reading.CLOSING_FENCE: (WHOLE, None, [" \n``` \n"]),
    words.QUOTED: (EVERYWHERE, None, ["a 'b c' \"d e\" "]),
    words.EMPHASIZED: (EVERYWHERE, None, ["a *p* **b c**"]),
    words.THOUSANDS: (EVERYWHERE, None, ["$-1,000,000.5 a"]),
    words.ASCII_WORD: (EVERYWHERE, None, ["a1 b"]),
    words._many_marks(): (EVERYWHERE, None, ["a\u0301\u0316b"]),
    words._classes().word: (EVERYWHERE, None, ["e\u0301a 中\u0301 \U0001f469\U0001f3fd\u200d\U0001f680 🇫🇷🇫"]),
    words._classes().apart: (EVERYWHERE, None, ["中\u0301。a"]),
    words._classes().punctuation: (EVERYWHERE, None, [" -pi", "x-1, --i -$5 2/x 3.14 n!** i-- x''", "y=-sin(x) C++ Cl-",
                                                      "NO3- x_1 x[1] 1e-5 x < 5", "5 - 3 && |x| .5 A-"]),
}  # fmt: skip


def seconds(pattern: re.Pattern[str], use: str, text: str) -> float:
    started = time.process_time()
    if use == EVERYWHERE:
        sum(1 for _ in pattern.finditer(text))
    else:
        getattr(pattern, use)(text)
    return time.process_time() - started


def pumped(sample: str):
    """A function of a number for each place, piece and rest: the text with about so many characters more."""
    for place in range(len(sample) + 1):
        for piece in {sample[place : place + size] for size in (1, 2, 3)} | {" ", "1", "a"}:
            for rest in (sample[place:], "\0") if piece else ():
                yield lambda n, a=sample[:place], b=piece, c=rest: a + b * (n // len(b)) + c


@pytest.mark.parametrize("pattern", USES, ids=lambda pattern: pattern.pattern[:24])
def test_no_repeated_piece_takes_more_than_linear_time(pattern):
    use, most, samples = USES[pattern]
    for text in (text for sample in samples for text in pumped(sample)):
        assert seconds(pattern, use, text(20)) < 0.02, text(20)  # what is exponential takes seconds for few more
        if most:
            assert seconds(pattern, use, text(most)[:most]) < 0.02, text(most)
        elif (once := seconds(pattern, use, text(2000))) > 0.001 and once > 14 * seconds(pattern, use, text(250)):
            few, many = (min(seconds(pattern, use, text(n)) for _ in range(3)) for n in (2000, 16_000))
            assert many < 24 * few, text(30)  # 8 times as long; what is quadratic takes 64 times


def test_every_pattern_of_these_modules_is_tried():
    there = [thing for module in (reasoning, quotations, reading, words) for thing in vars(module).values()]
    made_when_needed = {words._many_marks(), *words._classes()}
    assert {thing for thing in there if isinstance(thing, re.Pattern)} | made_when_needed == {*USES}
