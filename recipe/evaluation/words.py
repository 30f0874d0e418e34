"""Words of any script, and the words of an answer as SQuAD compares them, with their signs.

Two things are called words here. `words` are for counting and for ROUGE: runs of letters, marks and digits, which for
a-z and 0-9 are the words of the package `rouge_score`. `answer_words` are for token F1: SQuAD's words, but a sign that
belongs to a number, a variable or a name stays: the minus of `-5` and `-x`, the point of `3.14`, the per cent of `5%`,
the plus signs of `C++`. A sentence's own punctuation goes. Scripts that write no spaces between words (Chinese,
Japanese, Thai, ...) are taken by characters in both.
"""

from __future__ import annotations

import functools
import re
import string
import unicodedata
from typing import Literal, NamedTuple

# scripts without spaces between words: Thai, Lao, Myanmar, Khmer, Tai Le to Tai Tham, Balinese, Javanese, Tai Viet,
# kana, bopomofo, Chinese characters, Yi
SPACELESS = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u1950-\u19df\u1a20-\u1aaf\u1b00-\u1b7f\ua980-\ua9ff\uaa60-\uaadf"
    "\u3005-\u3007\u3021-\u3029\u3031-\u3035\u3038-\u303c\u3041-\u3096\u3099-\u30ff\u3105-\u312f\u31a0-\u31bf"
    "\u31f0-\u31ff\u3400-\u4dbf\u4e00-\u9fff\ua000-\ua48f\uf900-\ufaff\uff66-\uff9f\U0001b000-\U0001b16f"
    "\U00020000-\U0003ffff"
)
WIDE_PUNCTUATION = "\u3001-\u3004\u3008-\u3020\u3030\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff65"
MOST_MARKS = 30  # in a row, as Unicode recommends (stream-safe text): more are no text of any script
LAST_MARK = 0x1FFFF  # planes above hold no marks, symbols or punctuation but variation selectors, which change no word
# What a sign belongs to: a number, a variable (a letter alone, which may have an index), a symbol such as infinity.
# A rule reads: a sign beside one of these stays. The text has its upper-case letters still: `Cl-` is an ion.
_LETTER = r"[^\W\d_]"
_BEFORE = rf"(?:(?<=\d)|(?<=\b{_LETTER})|(?<=∞)|(?<=[\d\])][)\]])|(?<=\b{_LETTER}[)\]]))"  # an operand ends here
_AFTER = rf"(?=\.?\d|{_LETTER}(?![^\W\d_])|[∞√∂∫∑∇(\[])"  # an operand begins here
KEPT = "|".join(
    (
        r"(?<=\d)[^\w\s](?=\d)",  # 3.14, 1/2, 10:30, 3-5
        rf"(?<![\w-])-+(?:(?=[$€£¥])|{_AFTER})",  # -5, -x, --i, -$5
        rf"(?<![\w+])\+\++{_AFTER}",  # ++i
        r"\A\s*-+(?=[^\W_]\S*\s*\Z)",  # -pi alone
        r"(?<=[=(,<>*/^+])-+(?=\w)",  # y=-sin(x)
        rf"{_BEFORE}/{_AFTER}|{_BEFORE}(?<![A-Z])-{_AFTER}",  # 2/x, x-1, but no B-12
        rf"(?<=\b{_LETTER}),(?={_LETTER}\b)",  # x,y
        rf"{_BEFORE}(?:[%‰‱٪]|!+|\*(?!\*)|--|['\"′″‴]+)(?!\w)",  # 5%, n!, a*, i--, x', 5"
        rf"(?<![\w*])(?:\*(?!\*)|[&|])(?=\d|{_LETTER}\b)|{_BEFORE}\|",  # *p, &x, |x|
        r"(?:(?<=\d)|(?<=\b[^\W\d_]))[(\[](?=[\w(+-])",  # 2(x+1), f(x), x[1]
        r"(?<=[^\W_])_+(?=[^\W_])",  # x_1
        r"(?<!\S)(?:[<>]=?|[~!])(?=\w)",  # <5, !x
        r"(?<![\w.)\]])\.(?=\w)",  # .5, .NET
        r"(?<=\d[eE])-(?=\d)",  # 1e-5
        r"(?<=\w)(?:\++|\#)(?!\w)",  # C++, C#, A+
        r"(?<=\b[^\W\d_])-(?!\w)",  # A-
        r"(?:(?<=\b[A-Z][a-z])|(?<=\b[A-Z]{2})|(?<=[A-Za-z)\]]\d)|(?<=\^\d))-(?!\w)",  # Cl-, OH-, NO3-
        r"(?<=[\w)\]])(?:[<>=!]=|[<>=^+*|&~%])(?=[\w(\[-])",  # x+1, a<b
        r"(?<!\S)(?:[<>=!]=+|[<>=^+~]|&&|\|\|)(?!\S)",  # x < 5
        r"(?<=\d\s)[-*/](?=\s\d)",  # 5 - 3
    )
)
# what stands in quotation marks or Markdown's asterisks: these are of the sentence, and no primes or products
QUOTED = re.compile(r"(?<!\w)(['\"])(?=\S)((?:(?!\1).)*(?<=\S))\1(?![\w'\"])")
EMPHASIZED = re.compile(r"(?<![\w*])(\*{1,3})(?=[^\s*])([^*\n]*(?<=\S))\1(?![\w*])")
SAME_SIGNS = str.maketrans({"\u2212": "-", "\u2018": "'", "\u2019": "'", "\u201c": '"', "\u201d": '"', "％": "%"})
THOUSANDS = re.compile(r"(?<![\w.,])([-$]{0,4}\d{1,3})((?:,\d{3})+)(?![\w,])")
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


def normalized(form: Literal["NFC", "NFKC"], text: str) -> str:
    """The text in a form of Unicode, of which a run of marks beyond `MOST_MARKS` is taken in pieces.

    A piece is sorted, in a time quadratic in its length.

    >>> normalized("NFKC", "Ａe\\u0301")
    'Aé'
    """
    return "".join(unicodedata.normalize(form, piece) for piece in _many_marks().split(text))


@functools.cache
def _many_marks() -> re.Pattern[str]:
    marks = "".join(chr(code) for code in range(0x80, LAST_MARK + 1) if unicodedata.combining(chr(code)))
    return re.compile(f"([{marks}]{{{MOST_MARKS}}})")


def composed(text: str) -> str:
    """The text in Unicode's composed form (NFC), in which the same characters are the same code points.

    >>> composed("cafe\\u0301") == "café"
    True
    """
    return text if text.isascii() else normalized("NFC", text)


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

    What SQuAD's rule loses stays: a sign beside a number or a variable (a letter alone), `+` and `#` behind a word,
    operators between operands. Quotation marks, apostrophes and hyphens of words go.
    An article is one only before another word, so that `A` may be an answer. Punctuation of every script is left out.
    A text of nothing but punctuation is taken by white space.

    >>> answer_words("The U.S. cat!"), answer_words("-5 or 3.14"), answer_words("C++"), answer_words("Option A.")
    (['us', 'cat'], ['-5', 'or', '3.14'], ['c++'], ['option', 'a'])
    """
    text = composed(text).translate(SAME_SIGNS)  # the true minus, typographic quotation marks
    text = re.sub(r"(?<!\w)[\u2013\uff0d](?=\.?\w)", "-", text)  # a dash or a wide sign in its place
    text = THOUSANDS.sub(lambda match: match[1] + match[2].replace(",", ""), text)
    text = re.sub(r"(?<=\d)\s(?=[%‰])", "", QUOTED.sub(r"\2", EMPHASIZED.sub(r"\2", text)))  # 50 %
    bare = _classes().punctuation.sub(lambda match: match["kept"] or "", text)
    found = apart(composed(bare.lower())).split() or composed(text.lower()).split()
    return [word for index, word in enumerate(found) if word not in ARTICLES or index == len(found) - 1]
