"""What the names of splits and of files mean: `val`, `dev.jsonl` and `validation` are one split."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from pathlib import PurePath
from typing import TypeVar

from recipe.config import UserError

T = TypeVar("T")  # what a split has: files, a dataset
WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tests"),
}
MEANING = {word: split for split, words in WORDS.items() for word in words}
OTHER_STAGES = ("gen", "prefs")  # beside `train_sft`: records for other ways of training
PARTS = ("part", "shard", "chunk", "of")  # in names of files that make up one split
SHARD = re.compile(r"(.+?)-\d{5}-of-\d{5}")  # as on the Hub: train-00000-of-00002.parquet


def split_name(name: str, subject: str = "data") -> str:
    """The split that a name means; names of one's own, such as `test_unseen`, stay what they are.

    >>> [split_name(name) for name in ("dev", "train_sft", "Test", "test_unseen", "holdout")]
    ['validation', 'train', 'test', 'test_unseen', 'holdout']

    Raises:
        UserError: it is close to a known name, and would be a split that nobody uses.
    """
    words = name_words(name)
    split = MEANING.get(words[0]) if words else None
    if split == "test":
        rest = name.lower()[len(words[0]) :].strip("-_. ")
        return "test" if rest in ("", "sft") else name
    if split:
        return split
    known = [MEANING[word] for word in words if MEANING.get(word, "test") != "test"]
    if near := known or difflib.get_close_matches(name.lower(), MEANING, n=1, cutoff=0.75):
        raise UserError(
            f"{subject}, split {name!r}: did you mean {near[0]!r}? a split of its own needs a name of its own"
        )
    return name


def name_words(name: str) -> list[str]:
    return [word for word in re.split(r"[\W\d_]+", name.lower()) if word]


def by_meaning(by_name: Mapping[str, T], subject: str, notes: list[str]) -> dict[str, T]:
    """Splits under the names they mean. Beside `train_sft`, such as `train_gen` are left out, and named in `notes`.

    Raises:
        UserError: two names mean one split, or one is misspelt.
    """
    names = list(by_name)
    if any(name_words(name)[-1:] == ["sft"] for name in names):
        others = [name for name in names if set(name_words(name)[-1:]) & set(OTHER_STAGES)]
        names = [name for name in names if name not in others]
        if others:
            notes.append(f"{subject}: splits for other ways of training are not read: {', '.join(others)}")
    named: dict[str, str] = {}
    for name in names:
        split = split_name(name, subject)
        if split in named:
            raise UserError(f"{subject}: {named[split]!r} and {name!r} both mean the {split} split; keep one")
        named[split] = name
    order = dict.fromkeys([*WORDS, *named])
    return {split: by_name[named[split]] for split in order if split in named}


def file_split(path: PurePath) -> str | None:
    """The name of a split in the name of a file, or else of a folder above it; None without one.

    >>> [file_split(PurePath(path)) for path in ("my-train_2.json", "dev/0.json", "test_unseen.csv", "all.json")]
    ['train', 'dev', 'test_unseen', None]
    """
    if shard := SHARD.match(path.stem):
        return shard[1]
    for name in (path.stem, *reversed(path.parent.parts)):
        words = [word for word in name_words(name) if word not in PARTS]
        for index, word in enumerate(words):
            if word in MEANING:
                own_name = MEANING[word] == "test" or words[-1] in ("sft", *OTHER_STAGES)
                return "_".join(words[index:]) if own_name else word
    return None


def only_test(by_name: Mapping[str, T]) -> dict[str, T]:
    """`test_data.json` is the test split if it is the only one of its kind; beside `test.json` it keeps its name."""
    tests = [name for name in by_name if name_words(name)[:1] == ["test"]]
    return {"test" if tests == [name] else name: value for name, value in by_name.items()}
