"""Words of any script, and the words of an answer as SQuAD compares them, with their signs.

Two things are called words here. `words` are for counting and for ROUGE: runs of letters, marks and digits, which for
a-z and 0-9 are the words of the package `rouge_score`. `answer_words` are for token F1: SQuAD's words, but a sign that
carries meaning stays: the minus of `-5`, the point of `3.14`, the plus signs of `C++`. Scripts that write no spaces
between words (Chinese, Japanese, Thai, ...) are taken by characters in both.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from typing import NamedTuple

# scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Tai Le to Tai Tham, Balinese, Javanese, Tai Viet,
# kana, bopomofo, Chinese characters, Yi
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u3099-\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
WIDE_PUNCTUATION = "\u3001-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
LAST_MARK = 0x1FFFF  # planes above hold no marks, symbols or punctuation but variation selectors, which change no word
# punctuation of an answer that stays, in lower-case text
KEPT = "|".join(
    (
        r"(?<=\d)[^\w\s](?=\d)",  # 3.14, 1/2, 10:30, 3-5
        r"(?<!\w)-(?=[$€£¥]?\.?\d)",  # -5, -$5
        r"(?<!\S)(?:[<>]=?|[~!])(?=\w)",  # <5, !x
        r"(?<![\w.])\.(?=\d)",  # .5
        r"(?<=\de)-(?=\d)",  # 1e-5
        r"(?<=\w)(?:\++|\#)(?!\w)",  # C++, C#, A+
        r"(?<=\b[^\W\d_])-(?!\w)",  # A-
        r"(?<=[\w)\]])(?:[<>=!]=|[<>=^+*|&~%])(?=[\w(\[-])",  # x+1, a<b
        r"(?<!\S)(?:[<>=!]=+|[<>=^+~]|&&|\|\|)(?!\S)",  # x < 5
        r"(?<=\d\s)[-*/](?=\s\d)",  # 5 - 3
    )
)
THOUSANDS = re.compile(r"(?<![\w.,])([-$]*\d{1,3})((?:,\d{3})+)(?![\w,])")
ASCII_WORD = re.compile("[a-z0-9]+")  # twenty times as fast as the pattern for all scripts
ARTICLES = {"a", "an", "the"}


class _Classes(NamedTuple):
    """Compiled patterns over Unicode's general categories, which `re` does not know."""

    word: re.Pattern[str]
    apart: re.Pattern[str]  # a character of a script without spaces, with its marks
    punctuation: re.Pattern[str]  # what may stay in the group `kept`


@functools.cache
def _classes() -> _Classes:
    by_kind: dict[str, list[str]] = {"M": [], "S": [], "P": []}
    for code in range(0x80, LAST_MARK + 1):
        kind = unicodedata.category(chr(code))[0]
        if kind in by_kind:
            by_kind[kind].append(chr(code))
    marks, symbols, punctuation = ("".join(by_kind[kind]) for kind in "MSP")
    character = rf"(?:(?!\W)[{SPACELESS}][{marks}]*)"
    # flags are two letters, and one picture may be several symbols in a row, joined or coloured
    picture = rf"[{symbols}][{marks}\U0001f3fb-\U0001f3ff]*"
    pictures = rf"[\U0001f1e6-\U0001f1ff]{{2}}|{picture}(?:\u200d{picture})*"
    letters = rf"[^\W_{SPACELESS}](?:[^\W_{SPACELESS}]|[{marks}])*"
    ascii_punctuation = re.escape(string.punctuation)
    return _Classes(
        re.compile(f"{character}|{letters}|{pictures}"),
        re.compile(f"{character}|[{WIDE_PUNCTUATION}]"),
        re.compile(f"(?P<kept>{KEPT})|[{ascii_punctuation}{punctuation}]"),
    )


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which the same characters are the same code points.

    >>> composed("cafe\\u0301") == "café"
    True
    """
    return text if text.isascii() else unicodedata.normalize("NFC", text)


def words(text: str) -> list[str]:
    """The words of a text in lower case: runs of letters, marks and digits; characters where a script has no spaces.

    A picture (emoji) or another symbol outside ASCII is a word. A text without any of these, such as `!=`, is taken by
    white space, so that only a blank one has no words. For text of a-z and 0-9 these are the words of `rouge_score`.

    >>> words("He's 3.14 m tall."), words("水是H2O。"), words("भारत की"), words("!=")
    (['he', 's', '3', '14', 'm', 'tall'], ['水', '是', 'h2o'], ['भारत', 'की'], ['!='])
    """
    lowered = composed(composed(text).lower())
    pattern = ASCII_WORD if lowered.isascii() else _classes().word
    return pattern.findall(lowered) or lowered.split()


def apart(text: str) -> str:
    """The text with spaces around each character of a script that writes none, for scorers that split at spaces.

    >>> apart("水是 H2O。")
    ' 水  是  H2O 。 '
    """
    return text if text.isascii() else _classes().apart.sub(r" \g<0> ", text)


def answer_words(text: str) -> list[str]:
    """The words of an answer as in SQuAD (Rajpurkar et al. 2016): lower case, without punctuation and articles.

    What SQuAD's rule loses stays: signs and points of numbers, `+` and `#` behind a word, operators between operands.
    An article is one only before another word, so that `A` may be an answer. Punctuation of every script is left out.
    A text of nothing but punctuation is taken by white space.

    >>> answer_words("The U.S. cat!"), answer_words("-5 or 3.14"), answer_words("C++"), answer_words("Option A.")
    (['us', 'cat'], ['-5', 'or', '3.14'], ['c++'], ['option', 'a'])
    """
    lowered = composed(composed(text).lower()).replace("\u2212", "-")  # the true minus
    lowered = re.sub(r"(?<!\w)[\u2013\uff0d](?=\.?\d)", "-", lowered)  # a dash or a wide sign in its place
    lowered = THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), lowered)
    bare = _classes().punctuation.sub(lambda match: match["kept"] or "", lowered)
    found = apart(bare).split() or lowered.split()
    return [word for index, word in enumerate(found) if word not in ARTICLES or index == len(found) - 1]
