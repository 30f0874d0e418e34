"""Words of every script: right answers score 1, and what SQuAD and ROUGE lose is kept where it means something."""

import random
import re
import string
import time
import unicodedata

import pytest
import sacrebleu
from rouge_score.tokenize import tokenize

from recipe.evaluation.comparison import compare
from recipe.evaluation.measures import METRICS, rouge_l, score, score_responses, token_f1
from recipe.evaluation.words import answer_words, normalized, words

ANSWERS = {  # two answers of each kind, one of a word or two and one of a sentence
    "Chinese": ("北京", "长江是中国最长的河流，全长6300公里。"),
    "Japanese": ("富士山", "カタカナとひらがなで書いてください。"),
    "Korean": ("부산", "제주도는 한국에서 가장 큰 섬입니다."),
    "Arabic": ("الرياض", "النيل هو أطول نهر في أفريقيا."),
    "Hebrew": ("ירושלים", "הים התיכון נמצא ממערב לישראל."),
    "Hindi": ("गंगा", "हिमालय दुनिया की सबसे ऊँची पर्वत शृंखला है।"),
    "Thai": ("กรุงเทพฯ", "แม่น้ำเจ้าพระยาไหลผ่านกรุงเทพมหานคร"),
    "Russian": ("Ёж", "Волга впадает в Каспийское море."),
    "Greek": ("Ἀθῆναι", "Ο Όλυμπος είναι το ψηλότερο βουνό της Ελλάδας."),
    "Vietnamese": ("Huế", unicodedata.normalize("NFD", "Sông Hồng chảy qua thủ đô Hà Nội của Việt Nam.")),
    "emoji": ("🇫🇷", "👩🏽‍🚀 🎉🎉 ❤️"),
    "code": ("!=", "for (int i = 0; i < n; i++) { x[i] += -1.5e-3; }"),
    "numbers": ("-5", "3.14, 1,000 and 2/3 of 50 %"),
    "one sign": ("C", "#"),
    "Khmer and Burmese": ("ភ្នំពេញ", "ရန်ကုန်မြို့သည် မြန်မာနိုင်ငံ၏ အကြီးဆုံးမြို့ဖြစ်သည်။"),
    "Persian": ("می‌خواهم", "تهران پایتخت ایران است و می‌درخشد."),
}


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_right_answer_scores_one_in_every_script(kind):
    short, long = ANSWERS[kind]
    for answers in ((short,), (long,), (short, long), (short,) * 30):
        lines = [
            {"id": str(n), "output": text, "tuned": {"text": text}, "baseline": {"text": "I do not know."}}
            for n, text in enumerate(answers)
        ]
        found = compare(lines)["metrics"]
        for name in ("exact_match", "token_f1", "rouge_l", "chrf"):
            assert found[name]["tuned"] == pytest.approx(1, abs=1e-12), name
            assert found[name]["baseline"] < 0.5, name
        bleu = found["bleu"]["tuned"]
        assert bleu == pytest.approx(1) if bleu is not None else "four words" in found["bleu"]["reason"]


@pytest.mark.parametrize("kind", ANSWERS)
def test_a_composed_answer_is_its_decomposed_reference(kind):
    """The same characters, as another keyboard writes them."""
    for text in ANSWERS[kind]:
        there, here = (unicodedata.normalize(form, text) for form in ("NFC", "NFD"))
        assert all(
            value == pytest.approx(1)
            for name, value in score_responses([there], [here]).items()
            if name in METRICS and value is not None
        )


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ("5", "-5"), ("-7", "7"), ("314", "3.14"), ("25", "2.5"), ("25", ".25"), ("C", "C++"), ("C", "C#"), ("A", "A+"),
        ("12", "1/2"), ("1030", "10:30"), ("1e5", "1e-5"), ("xy", "x+y"), ("a<b", "a>b"), ("<", ">"), ("==", "!="),
        ("", "A"), ("", "the"), ("an", "a"), ("!", "?"), ("35", "3-5"), ("20240102", "2024-01-02"),
        ("x", "-x"), ("π", "-π"), ("∞", "-∞"), ("x", "\u2212x"), ("2x", "-2x"), ("(x+1)", "-(x+1)"), ("pi", "-pi"),
        ("inf", "-inf"), ("y=x", "y=-x"), ("i", "--i"), ("i", "++i"), ("i", "i--"), ("2x", "2/x"), ("xy", "x/y"),
        ("2π", "π/2"), ("x1", "x-1"), ("x1", "x_1"), ("snakecase", "snake_case"), ("Cl", "Cl-"), ("OH", "OH-"),
        ("NO3", "NO3-"), ("5", "5%"), ("5", "5 %"), ("5", "5‰"), ("5", "5!"), ("n", "n!"), ("x", "x'"), ("x'", "x''"),
        ("fx", "f(x)"), ("f(x)", "f'(x)"), ("2x+1", "2(x+1)"), ("x1", "x[1]"), ("x", "|x|"), ("xy", "x,y"),
        ("net", ".NET"), ("gitignore", ".gitignore"),
    ],
)  # fmt: skip
def test_what_means_something_else_is_not_the_same_answer(wrong, right):
    assert token_f1(wrong, right) == 0
    assert token_f1(right, right) == 1
    if any(map(str.isalnum, right)):
        assert token_f1(f"{right}.", right) == token_f1(f' "{right}", ', right) == 1


@pytest.mark.parametrize(
    ("answer", "reference"),
    [("The cat.", "a cat!"), ("1,000,000", "1000000"), ("$5", "5"), ("\u22125", "-5"), ("U.S.", "us"),
     ("(Rome)", "Rome"), ("**Rome**", "Rome"), ("«Рим»", "рим"), ("水。", "水"), ("القاهرة،", "القاهرة"),
     ("नई दिल्ली।", "नई दिल्ली"), ("Yes!", "yes"), ("it’s", "it's"), ("It's", "its"), ("'words'", "words"), ("'A'", "A"),
     ('"5"', "5"), ("well-known", "wellknown"), ("x-ray", "xray"), ("F-16", "F16"), ("rock 'n' roll", "rock n roll"),
     ("-Apples\n-Pears", "Apples\nPears"), ("item(s)", "items"), ("pre- and post-war", "pre and postwar"),
     ("*p*", "p"), ("**5%**", "5%"), ("50 %", "50%"), ("the 1990's", "1990s"), ("...and so on", "and so on"),
     ("“No!”, she said.", "no she said"), ("and/or", "andor"), ("students' books", "students books")],
)  # fmt: skip
def test_what_is_written_another_way_is_the_same_answer(answer, reference):
    assert token_f1(answer, reference) == 1


def test_token_f1_tells_how_much_of_an_answer_is_right_in_scripts_without_spaces():
    assert token_f1("长江很长。", "黄河很长") == 2 / 4
    assert token_f1("แม่น้ำ", "แม่บ้าน") == pytest.approx(2 * 2 / (4 + 5))  # แ ม่ in common of แ ม่ น้ ำ and แ ม่ บ้ า น


def squad_words(text: str) -> list[str]:
    """`normalize_answer` of SQuAD's evaluation script, and its split."""
    text = "".join(character for character in text.lower() if character not in set(string.punctuation))
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", text).split()).split()


def test_a_normal_form_is_that_of_unicode_unless_a_letter_has_dozens_of_marks():
    draw, parts = (
        random.Random(4),
        ["e", "A", "\u0301", "\u0316", "\u0344", "ḍ\u0307", "中", "\u1100", "\u1161", "ﬁ", "Ａ", " "],
    )
    for text in ("".join(draw.choices(parts, k=draw.randint(0, 14))) for _ in range(3000)):
        for form in ("NFC", "NFKC"):
            assert normalized(form, text) == unicodedata.normalize(form, text)
    assert normalized("NFC", "e" + "\u0301" * 1000).startswith("e\u0301")


def random_texts(alphabet: list[str], count: int = 500) -> list[str]:
    draw = random.Random(3)
    return [" ".join(draw.choices(alphabet, k=draw.randint(1, 9))) for _ in range(count)]


def test_words_of_prose_are_those_of_squad():
    alphabet = [
        "The",
        "a",
        "cat,",
        "don't",
        "well-known",
        '"Rome"',
        "U.S.",
        "(42)",
        "7;",
        "dog!",
        "_x_",
        "an",
        "km/h",
    ]
    for text in random_texts(alphabet):
        text += " end"  # at the end an article is an answer
        assert answer_words(text) == squad_words(text)


@pytest.mark.parametrize(
    "unit", ["'", '"', "*", "-", "+", "'a ", "*a ", "a'", "(", "x!", "-x", "1,000", "**a", "_", "!", "\u0315\u0300"]
)
def test_hostile_answers_take_no_seconds(unit):
    """250 KB; what is quadratic takes minutes."""
    started = time.process_time()
    answer_words("a" + unit * (250_000 // len(unit)))
    assert time.process_time() - started < 3


def test_words_of_ascii_are_those_of_rouge():
    alphabet = ["The", "cat,", "don't", "3.14", "-5", "x_1", "C++", "A", '"B"', "a\tb", "  ", "p(x)=1"]
    for text in random_texts(alphabet):
        assert words(text) == tokenize(text, None)


def test_rouge_l_of_another_script_is_that_of_the_same_text_in_latin_letters():
    """Cyrillic letters stand for Latin ones, character by character, so the words are the same."""
    letters = str.maketrans("abcdefghij", "абвгдежзий")
    texts = random_texts(["abc", "bad", "feed,", "cab", "hid", "jig."], 200)
    for one, other in zip(texts, reversed(texts), strict=True):
        assert rouge_l(one.translate(letters), other.translate(letters)) == rouge_l(one, other)


def test_bleu_of_chinese_is_that_of_sacrebleus_tokenizer_for_it():
    predictions = ["长江是中国第二长的河。", "北京的天气很好，我们去公园。", "水的化学式是 H2O。"]
    references = ["长江是中国最长的河流。", "北京天气好，我们去公园玩。", "水的化学式是 H2O 。"]
    expected = sacrebleu.corpus_bleu(predictions, [references], tokenize="zh").score / 100
    assert 0.2 < expected < 0.9
    found = score(METRICS["bleu"], {"predictions": predictions, "references": references})
    assert found == pytest.approx(expected, abs=1e-9)
