"""The headline score of an evaluation: which score decides its verdict, fixed before any answer is seen.

A score that is chosen after looking at the answers can be the one that happens to look well. So the choice follows from
the references alone, or from `--headline`, and is written into `evaluation.json` before a model is asked.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from recipe.config import UserError
from recipe.evaluation.words import SPACELESS, words

SHORT = 10  # words; the references of closed tasks (a name, a number, a sentence that is rewritten) are no longer
ALL_BUT = 0.1  # the share of references that may be longer
SPACELESS_WORD = re.compile(f"[{SPACELESS}]")


def choose_headline(references: Sequence[str]) -> str:
    """Exact match where nine of ten references are short answers, else chrF.

    Short is one line of at most 10 words; two characters of a script without spaces count as one word.

    >>> choose_headline(["Paris", "He goes to school."]), choose_headline(["First open the lid.\\nThen look inside."])
    ('exact_match', 'chrf')
    """
    longer = sum(not is_short(reference) for reference in references)
    return "exact_match" if longer <= ALL_BUT * len(references) else "chrf"


def is_short(reference: str) -> bool:
    """Whether a reference is one line of at most `SHORT` words."""
    text = reference.strip()
    found = words(text)
    characters = sum(bool(SPACELESS_WORD.match(word)) for word in found)
    return len(text.splitlines()) <= 1 and len(found) - characters + math.ceil(characters / 2) <= SHORT


def check_headline(name: str | None) -> None:
    """Refuse a headline that is no score of answers against references.

    Raises:
        UserError: with the scores that there are.
    """
    from recipe.evaluation.measures import METRICS  # here: --help needs none of its libraries

    if name is not None and name not in METRICS:
        raise UserError(f"--headline {name}: there are {', '.join(METRICS)}")


def headline_of(metrics: Mapping[str, Any]) -> str:
    """The name of the headline score of an evaluation, from the content of `metrics.json`.

    >>> headline_of({"provenance": {"headline": "chrf"}}), headline_of({"provenance": {}})
    ('chrf', 'exact_match')
    """
    return metrics.get("provenance", {}).get("headline") or "exact_match"  # as before headlines were written down
