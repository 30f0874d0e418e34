"""Records that appear more than once, exactly or nearly, within a split and across splits. Nothing is changed."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, NamedTuple

import numpy as np
from datasets import Dataset
from tqdm.auto import tqdm

from recipe.config import UserError
from recipe.data.conversations import select_texts, text_of, texts_of
from recipe.data.split import group_hashes

SHINGLE = 5  # characters
PERMUTATIONS = 128  # hash functions of a MinHash
WEIGHTS = (0.02, 0.98)  # penalties for false candidates and for missed pairs; finds 98 % of the pairs at 0.8
MOST_CANDIDATES = 50  # a record is compared with at most 50 others in each split

Record = dict[str, Any]  # split, row, instruction, input, output, and the messages of a conversation


class Match(NamedTuple):
    """A record, a similar one in an earlier split or earlier in the same split, and how similar they are, 0 to 1."""

    record: Record
    other: Record
    similarity: float = 1.0


def flatten(splits: Mapping[str, Dataset]) -> list[Record]:
    """The records of all splits, one after another; a null input becomes an empty one."""
    return [
        {"split": name, **{k: v for k, v in record.items() if v or k != "messages"}, "input": record["input"] or ""}
        for name, split in splits.items()
        for record in select_texts(split, "row")
    ]


def inspect_duplicates(
    given: Mapping[str, Dataset], trained: Mapping[str, Dataset], threshold: float, show: int
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Records that appear more than once: leaks into held-out splits first, then within each split; see docs/data.md.

    Args:
        given: the splits before `recipe.data.split.drop_cross_split_duplicates`.
        trained: the splits after it; near-duplicates are looked for among these.
        threshold: the lowest similarity of near-duplicates; 0 looks for none.
        show: how many examples to report of each finding.

    Returns:
        the report, and every pair of near-duplicates, most similar first: similarity, splits, rows.
    """
    near, complete = near_duplicates(flatten(trained), threshold) if threshold else ([], True)
    records = {name: flatten({name: split}) for name, split in given.items()}
    groups = group_hashes(given)
    conversations = any("messages" in record for each in records.values() for record in each)
    report = []
    for earlier, later in [*itertools.combinations(given, 2), *zip(given, given, strict=True)]:
        same_prompt = _equal_records(records[later], records[earlier], 2)
        by_kind = {"exact": _equal_records(records[later], records[earlier], 3)}
        if conversations:
            by_kind["same_beginning"] = _alike(records, groups, later, earlier)
        by_kind |= {
            "same_prompt": [match for match in same_prompt if match.record["output"] != match.other["output"]],
        }
        if threshold:
            by_kind["near"] = _most_similar(near, later, earlier)
        counts = {kind: len(matches) for kind, matches in by_kind.items()}
        examples = {
            kind: [{"similarity": match.similarity, "records": match[:2]} for match in matches[:show]]
            for kind, matches in by_kind.items()
        }
        splits = {"records_of": later, "found_in": earlier, "records": len(records[later])}
        report.append({**splits, **counts, "examples": examples})
    pairs = [
        {"similarity": similarity, "splits": [record["split"], other["split"]], "rows": [record["row"], other["row"]]}
        for record, other, similarity in near
    ]
    return {"threshold": threshold or None, "complete": complete, "splits": report}, pairs


def _equal_records(records: Sequence[Record], others: Sequence[Record], fields: int) -> list[Match]:
    """Each record with the first of `others` that has the same first texts and is not the record itself."""
    first: dict[tuple[str, ...], Record] = {}
    for other in others:
        first.setdefault(texts_of(other)[:fields], other)
    pairs = [(record, first.get(texts_of(record)[:fields])) for record in records]
    return [Match(record, other) for record, other in pairs if other is not None and other is not record]


def _alike(
    records: Mapping[str, Sequence[Record]], groups: Mapping[str, np.ndarray], later: str, earlier: str
) -> list[Match]:
    """Each record of one split with the first of the other that begins as it does, if none there says all that it says.

    Within a split, each with the first of its group.
    """
    first: dict[int, Record] = {}
    for other, group in zip(records[earlier], groups[earlier].tolist(), strict=True):
        first.setdefault(group, other)
    whole = set() if later == earlier else set(map(texts_of, records[earlier]))
    pairs = [
        (record, first[group])
        for record, group in zip(records[later], groups[later].tolist(), strict=True)
        if group in first and texts_of(record) not in whole
    ]
    return [Match(record, other) for record, other in pairs if texts_of(record) != texts_of(other)]


def _most_similar(near: Sequence[Match], later: str, earlier: str) -> list[Match]:
    """Each record of one split with its most similar record of the other; `near` has the most similar pairs first."""
    best: dict[int, Match] = {}
    for match in near:
        if (match.record["split"], match.other["split"]) == (later, earlier):
            best.setdefault(match.record["row"], match)
    return list(best.values())


def near_duplicates(records: Sequence[Record], threshold: float) -> tuple[list[Match], bool]:
    """Pairs of different records that have nearly the same characters in nearly the same order.

    Similarity is the Jaccard similarity of the records' sets of shingles, runs of 5 characters: the number in
    both divided by the number in either (Broder 1997). datasketch finds candidates by MinHash and locality-sensitive
    hashing, with fixed seeds; the similarity of each is then computed exactly. See docs/data.md.

    Returns:
        the pairs, most similar first, and whether all candidates were compared: see `MOST_CANDIDATES`.

    Raises:
        UserError: datasketch is not installed.

    >>> texts = ["The cat sat there.", "A dog.", "the  cat sat here."]
    >>> records = [{"split": "train", "instruction": text, "input": "", "output": ""} for text in texts]
    >>> [match], complete = near_duplicates(records, 0.5)
    >>> match.record["instruction"], match.other["instruction"], match.similarity  # 9 shingles in both, of 14 + 13 - 9
    ('the  cat sat here.', 'The cat sat there.', 0.5)
    """
    try:
        from datasketch import MinHash, MinHashLSH  # optional, and it imports scipy: half a second
    except ImportError as error:
        raise UserError(
            "finding near-duplicates needs datasketch, which is not installed: pip install datasketch, or leave them "
            "out with --near_duplicates 0"
        ) from error
    different: dict[tuple[str, str], Record] = {}  # by split and text
    for record in records:
        different.setdefault((record["split"], text_of(record)), record)
    indexes = {
        name: MinHashLSH(min(threshold, 0.9), PERMUTATIONS, WEIGHTS)  # close to 1, MinHashLSH finds no settings
        for name in dict.fromkeys(split for split, _ in different)
    }
    settings = {"num_perm": PERMUTATIONS, "hashfunc": lambda shingle: zlib.crc32(shingle.encode())}
    hashes = MinHash.generator((_shingles(text) for _, text in different), **settings)
    matches, complete = [], True
    for (split, text), minhash in zip(different, tqdm(hashes, "Near-duplicates", len(different)), strict=True):
        for name, index in indexes.items():
            candidates = sorted(index.query(minhash))
            complete = complete and len(candidates) < MOST_CANDIDATES
            for other in candidates[:MOST_CANDIDATES]:
                similarity = _similarity(text, other)
                if similarity >= threshold and other != text:
                    matches.append(Match(different[split, text], different[name, other], similarity))
            if name == split and len(candidates) < MOST_CANDIDATES:
                index.insert(text, minhash, check_duplication=False)
    return sorted(matches, key=lambda match: -match.similarity), complete


def _similarity(text: str, other: str) -> float:
    first, second = _shingles(text), _shingles(other)
    return len(first & second) / len(first | second)


@lru_cache(maxsize=1000)
def _shingles(text: str) -> frozenset[str]:
    plain = " ".join(text.lower().split())
    return frozenset(plain[start : start + SHINGLE] for start in range(max(1, len(plain) - SHINGLE + 1)))
