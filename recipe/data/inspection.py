"""What stands in the data, before anything is trained on it: lengths, what would be cut, repetition, odd records.

Nothing is changed. Rows count from 0, as `dataset[i]` does, in the split's own source.
"""

from __future__ import annotations

import itertools
import re
import unicodedata
from collections import Counter
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
import pyarrow as pa
from datasets import Dataset
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from recipe.config import UserError
from recipe.console import UNSEEN, shorten
from recipe.data.encode import token_ids
from recipe.data.records import FIELDS
from recipe.figures import BASELINE_COLOR, LINE, MUTED, STYLE, TEXT, TUNED_COLOR, WORSE_COLOR, save_png
from recipe.templates import Template

SHINGLE = 5  # characters
PERMUTATIONS = 128  # hash functions of a MinHash
RECALL = 0.99  # of the pairs at the very threshold that become candidates; of more similar ones, more
MOST_PAIRS = 2_000_000  # that one table of buckets may have for all of its pairs to be compared
PARTNERS = 2  # else: records of its bucket that each is compared with, in each table
ODD = re.compile(f"{UNSEEN.pattern}|\ufffd")  # U+FFFD stands for bytes that were no text
PARTS = ("prompt", "response", "whole")
LONGEST_EXAMPLE = 500  # characters of a text in the report


# --- lengths ----------------------------------------------------------------------------------------------------------


class Lengths(NamedTuple):
    """Of each record of a split, (records,): tokens of the prompt, tokens of the response with its end-of-text token,
    and whether prompt and response would be other tokens if they were tokenized in one go."""

    prompt: np.ndarray
    response: np.ndarray
    boundary: np.ndarray

    @property
    def whole(self) -> np.ndarray:
        return self.prompt + self.response


def measure_lengths(
    records: Dataset, template: Template, tokenizer: PreTrainedTokenizerBase, name: str = "records"
) -> Lengths:
    """Tokenize a split as `recipe.data.encode_batch` does, nothing cut; `name` stands beside the progress bar."""
    lengths, boundaries = [], []
    with tqdm(total=len(records), desc=f"Tokenizing {name}", unit="record") as progress:
        for batch in records.select_columns(list(FIELDS)).iter(batch_size=1000):
            prompts = template.prompts(
                [
                    {"instruction": instruction, "input": text}
                    for instruction, text in zip(batch["instruction"], batch["input"], strict=True)
                ]
            )
            pairs = list(zip(prompts, batch["output"], strict=True))
            tokens, apart = token_ids(tokenizer, list(itertools.chain.from_iterable(pairs)))
            in_one_go, together = token_ids(tokenizer, ["".join(pair) for pair in pairs])
            apart = apart.reshape(-1, 2)
            boundary = apart.sum(axis=1) != together
            alike = np.flatnonzero(~boundary)  # in number; which tokens they are is compared now
            owner = np.repeat(alike, together[alike])
            tokens = tokens[np.repeat(~boundary, apart.sum(axis=1))]
            in_one_go = in_one_go[np.repeat(~boundary, together)]
            boundary[owner[tokens != in_one_go]] = True
            lengths.append(apart + np.array([0, 1]))
            boundaries.append(boundary)
            progress.update(len(prompts))
    prompt, response = np.concatenate(lengths).T
    return Lengths(prompt, response, np.concatenate(boundaries))


def kept_lengths(lengths: Lengths, max_length: int, overflow: str) -> tuple[np.ndarray, np.ndarray]:
    """Tokens of prompt and response that training would see, (kept records,) each; see `recipe.data.encode_batch`.

    A prompt of 30 and a response of 90 tokens at 100: the prompt keeps the 50 tokens that are its half, so all of it,
    and 20 tokens are cut off the response.

    >>> one = Lengths(np.array([30]), np.array([90]), np.array([False]))
    >>> kept_lengths(one, 100, "truncate")
    (array([30]), array([70]))
    >>> kept_lengths(one, 100, "drop")
    (array([], dtype=int64), array([], dtype=int64))
    """
    if overflow != "truncate":  # "error" leaves nothing to train on: what would be left without the long ones
        kept = lengths.whole <= max_length
        return lengths.prompt[kept], lengths.response[kept]
    room = np.maximum(max_length - lengths.response, max_length // 2)
    prompt = np.minimum(lengths.prompt, room)
    return prompt, np.minimum(lengths.response, max_length - prompt)


def overflow_at(lengths: Lengths, limit: int) -> dict[str, int]:
    """What `--max_length limit` would cost a split: with `truncate` tokens cut off prompts and off responses, and
    responses that lose their end; with `drop` (and `error`, which stops) the tokens of all `too_long` records."""
    prompt, response = kept_lengths(lengths, limit, "truncate")
    too_long = lengths.whole > limit
    return {
        "limit": limit,
        "too_long": int(too_long.sum()),
        "cut_prompt_tokens": int((lengths.prompt - prompt).sum()),
        "cut_response_tokens": int((lengths.response - response).sum()),
        "without_end": int((response < lengths.response).sum()),
        "dropped_tokens": int(lengths.whole[too_long].sum()),
    }


def batch_costs(lengths: np.ndarray, batch_size: int, shared: int) -> dict[str, float | int | None]:
    """Input tokens of one epoch of random batches: laid out in padded rows, and in rows with shared prefixes.

    A record of n tokens has n - 1 inputs. `padded` is the expectation over all orders of the records, no estimate;
    `padding` is the share of it that is padding. With `--batching shared_prefix` there is no padding, and the `shared`
    tokens that all prompts begin with stand once a batch: `shared_prefix` is what that leaves, at most, because prompts
    that have more in common share more.

    Args:
        lengths: of each record in tokens, as training sees it (records,).

    Two records of 5 and 3 tokens, one batch: two rows of 4 inputs, 2 of the 8 padding; shared 2, a row of 4 + 2 - 2.

    >>> batch_costs(np.array([5, 3]), 2, shared=2)
    {'inputs': 6, 'padded': 8.0, 'padding': 0.25, 'shared_prefix': 4}
    """
    inputs = np.sort(lengths) - 1
    batches, rest = divmod(len(inputs), batch_size)
    padded = batches * batch_size * expected_longest(inputs, batch_size) if batches else 0.0
    padded += rest * expected_longest(inputs, rest) if rest else 0.0
    real = int(inputs.sum())
    return {
        "inputs": real,
        "padded": padded,
        "padding": 1 - real / padded if padded else None,
        "shared_prefix": real - shared * (len(inputs) - batches - bool(rest)),
    }


def expected_longest(values: np.ndarray, count: int) -> float:
    """The expected largest of `count` values drawn without replacement; `values` are sorted, smallest first.

    The k-th smallest of n is the largest with probability C(k - 1, count - 1) / C(n, count).

    >>> expected_longest(np.array([1, 2, 6]), 2)  # of {1, 2}, {1, 6}, {2, 6}
    4.666666666666667
    """
    rank = np.arange(len(values), 1, -1)
    steps = np.maximum(rank - count, 0) / (rank - 1)  # from the probability of one rank to that of the one below
    return float(np.dot(values[::-1], count / len(values) * np.cumprod([1, *steps])))


def _describe_lengths(values: np.ndarray, edges: np.ndarray) -> dict[str, Any]:
    median, p95, p99 = (int(value) for value in np.quantile(values, [0.5, 0.95, 0.99], method="inverted_cdf"))
    return {
        "shortest": int(values.min()),
        "mean": float(values.mean()),
        "median": median,
        "p95": p95,
        "p99": p99,
        "longest": int(values.max()),
        "histogram": np.histogram(values, edges)[0].tolist(),
    }


def bin_edges(lengths: Iterable[Lengths]) -> np.ndarray:
    """Edges in tokens, whole numbers at like ratios, for the histograms of all splits and parts."""
    every = np.concatenate([values for of in lengths for values in (of.prompt, of.response, of.whole)])
    return np.unique(np.geomspace(every.min(), every.max() + 1, 41).round().astype(int))


def inspect_lengths(
    lengths: Mapping[str, Lengths],
    limits: Sequence[int],
    max_length: int,
    overflow: str,
    batch_size: int,
    preamble: int,
    ending: int,
    mask_prompt: bool = True,
) -> dict[str, Any]:
    """Histograms, what limits cost, and what the tokens that training sees are, of each split; see docs/data.md.

    Args:
        preamble: tokens that begin every prompt, from `recipe.data.template_overhead`; so is `ending`, the tokens that
            end it and that no cut takes.
        mask_prompt: without it the last preamble token has a target of the record's own, and is not shared.
    """
    edges = bin_edges(lengths.values())
    report: dict[str, Any] = {"bin_edges": edges.tolist(), "splits": {}}
    for name, of in lengths.items():
        prompt, response = kept_lengths(of, max_length, overflow)
        begun = np.full(len(prompt), preamble)  # tokens of the preamble that are left
        if overflow == "truncate":
            cut = prompt < of.prompt
            begun[cut] = np.minimum(preamble, prompt[cut] - ending)
        tokens = {
            "preamble": int(begun.sum()),
            "prompt": int(prompt.sum() - begun.sum()),
            "response": int(response.sum()),
        }
        shared = int(begun.min(initial=preamble)) - (not mask_prompt)
        total = sum(tokens.values())
        report["splits"][name] = {
            "records": len(of.prompt),
            "trained_records": len(prompt),
            "too_long": int((of.whole > max_length).sum()),
            "tokens": tokens,
            "shares": {part: count / total if total else None for part, count in tokens.items()},
            "batches": batch_costs(prompt + response, batch_size, max(0, shared)),
            "overflow": [overflow_at(of, limit) for limit in limits],
            "lengths": {part: _describe_lengths(getattr(of, part), edges) for part in PARTS},
        }
    return report


# --- the same, and nearly the same ------------------------------------------------------------------------------------


class Records(NamedTuple):
    """The records of all splits in one row: `split` is the number of the split's name, `row` the record's there."""

    names: list[str]
    split: np.ndarray
    row: np.ndarray
    instruction: list[str]
    input: list[str]
    output: list[str]

    def example(self, index: int) -> dict[str, Any]:
        """A record to show, long texts cut."""
        texts = {field: shorten(getattr(self, field)[index], LONGEST_EXAMPLE) for field in FIELDS}
        return {"split": self.names[self.split[index]], "row": int(self.row[index]), **texts}


def flatten(splits: Mapping[str, Dataset]) -> Records:
    """The records of all splits, one after another; an input that is null is an empty one."""
    texts = {field: [text or "" for split in splits.values() for text in split[field]] for field in FIELDS}
    return Records(
        list(splits),
        np.repeat(np.arange(len(splits)), [len(split) for split in splits.values()]),
        np.concatenate([split.with_format("numpy")["row"][:] for split in splits.values()]),
        **texts,
    )


def numbered(values: Iterable[Hashable]) -> np.ndarray:
    """A number for each value, the same for equal ones.

    >>> numbered(["a", "b", "a"])
    array([0, 1, 0])
    """
    numbers: dict[Hashable, int] = {}
    return np.array([numbers.setdefault(value, len(numbers)) for value in values])


def near_duplicates(texts: Sequence[str], threshold: float) -> tuple[np.ndarray, np.ndarray, bool]:
    """Pairs of texts that have nearly the same characters in nearly the same order.

    Two texts are as similar as their sets of shingles are, by Jaccard: shingles in both over shingles in either (Broder
    1997, "On the resemblance and containment of documents"). Shingles are runs of 5 characters, in lower case and with
    one blank for any white space: they work in any script, and 5 is what Leskovec, Rajaraman and Ullman advise for
    short texts ("Mining of Massive Datasets", section 3.2.2). MinHash and locality-sensitive hashing (`datasketch`)
    find candidates, with fixed seeds; the similarity of each is then computed from its shingles, so that it is exact.

    Returns:
        pairs (pairs, 2) of positions in `texts`, the smaller one first, most similar first; the similarity of each, at
        least `threshold`; and whether all candidates were compared. Thousands of texts that are all alike would make
        too many: each is then compared with a few, so that there are more pairs than these.

    Raises:
        UserError: datasketch is not installed.

    >>> pairs, similarity, _ = near_duplicates(["The cat sat there.", "A dog.", "the  cat sat here."], 0.5)
    >>> pairs, similarity  # 9 shingles in both, of 14 + 13 - 9
    (array([[0, 2]]), array([0.5]))
    """
    candidates, shingles, complete = _candidates(texts, threshold)
    similarity = _jaccard(candidates, shingles)
    found = similarity >= threshold
    pairs, similarity = candidates[found], similarity[found]
    order = np.lexsort((pairs[:, 1], pairs[:, 0], -similarity))
    return pairs[order], similarity[order], complete


def _candidates(texts: Sequence[str], threshold: float) -> tuple[np.ndarray, list[np.ndarray], bool]:
    """Pairs that share a bucket, (pairs, 2), the shingles of each text, and whether no bucket was overfull."""
    try:
        from datasketch import MinHash, MinHashLSH  # here: an extra, and scipy behind it takes half a second
    except ImportError as error:
        raise UserError(
            "near-duplicates are found by datasketch, which is not installed: pip install datasketch, or leave them "
            "out with --near_duplicates 0"
        ) from error
    shingles = shingle_sets(texts)
    index = MinHashLSH(num_perm=PERMUTATIONS, params=bands(threshold))
    hashes = MinHash.generator((of.tolist() for of in shingles), num_perm=PERMUTATIONS, hashfunc=int)
    for position, minhash in enumerate(tqdm(hashes, "Near-duplicates", len(texts), unit="record")):
        index.insert(position, minhash, check_duplication=False)

    complete = all(
        sum(count * (count - 1) // 2 for count in counts.values()) <= MOST_PAIRS for counts in index.get_counts()
    )
    order = np.random.default_rng(0).permutation(len(texts))
    rank = np.argsort(order)
    found = [np.empty(0, dtype=np.int64)]  # of a pair: position of the one * texts + of the other
    for table in tqdm(index.hashtables, "Comparing buckets", unit="table"):
        codes = found[:1]
        for members in filter(lambda members: len(members) > 1, map(table.get, table.keys())):
            bucket = order[np.sort(rank[list(members)])]  # a crowd that several tables have makes the same pairs
            one, other = np.triu_indices(len(bucket), 1) if complete else _neighbours(len(bucket))
            low, high = np.sort(bucket[np.stack([one, other])], axis=0)
            codes.append(low * len(texts) + high)
        found.append(np.unique(np.concatenate(codes)))
    pairs = np.divmod(np.unique(np.concatenate(found)), max(1, len(texts)))
    return np.stack(pairs, axis=1), shingles, complete


def _neighbours(count: int) -> tuple[np.ndarray, np.ndarray]:
    """Each of `count` places with the next `PARTNERS`, around the end."""
    partners = min(PARTNERS, count - 1)
    one = np.repeat(np.arange(count), partners)
    return one, (one + np.tile(np.arange(1, partners + 1), count)) % count


def bands(threshold: float) -> tuple[int, int]:
    """Bands and rows of a MinHash: as many rows as leave a pair at the threshold its chance to be found, `RECALL`.

    A pair of similarity s shares a bucket with probability 1 - (1 - s^rows)^bands ("Mining of Massive Datasets",
    section 3.4.2).

    >>> bands(0.8)
    (21, 6)
    """
    for rows in range(PERMUTATIONS // 2, 0, -1):
        count = PERMUTATIONS // rows
        if 1 - (1 - threshold**rows) ** count >= RECALL:
            return count, rows
    raise UserError(f"a similarity of {threshold} is found in too many pairs; give 0.5 or more")


def shingle_sets(texts: Sequence[str]) -> list[np.ndarray]:
    """The different runs of 5 characters of each text as sorted numbers, the same number in all texts; a text that is
    shorter is one run.

    >>> [of.tolist() for of in shingle_sets(["abcdef", "ABCDE", "ab"])]
    [[0, 1], [0], [2]]
    """
    plain = [" ".join(text.lower().split()).ljust(SHINGLE, "\0") for text in texts]
    lengths = np.array([len(text) for text in plain])
    characters = np.frombuffer("".join(plain).encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    within = np.ones(len(characters), dtype=bool)  # no run goes on into the next text
    within[(lengths.cumsum()[:, None] - np.arange(1, SHINGLE)).ravel()] = False
    # a code point has 21 bits: three fit, and two numbered threes that overlap make the five
    wide = characters.astype(np.uint64)
    threes = wide[:-2] | wide[1:-1] << np.uint64(21) | wide[2:] << np.uint64(42)
    del wide  # 8 bytes a character, as what follows
    numbers = _numbered_integers(threes)
    threes = numbers.astype(np.uint64)
    fives = threes[:-2] << np.uint64(32) | threes[2:]
    del threes
    numbers = _numbered_integers(fives[within[: len(fives)]])
    return [np.unique(of) for of in np.split(numbers, (lengths - SHINGLE + 1).cumsum()[:-1])]


def _numbered_integers(values: np.ndarray) -> np.ndarray:
    """`numbered`, for many integers at once, as int32."""
    return pa.array(values).dictionary_encode().indices.to_numpy()


def _jaccard(pairs: np.ndarray, shingles: Sequence[np.ndarray]) -> np.ndarray:
    """Shingles in both over shingles in either, (pairs,); `pairs` are sorted."""
    if not len(pairs):
        return np.empty(0)
    sizes = np.array([len(of) for of in shingles])
    common = np.empty(len(pairs), dtype=np.int64)
    present = np.zeros(max(int(of[-1]) for of in shingles) + 1, dtype=bool)
    starts = [*np.flatnonzero(np.diff(pairs[:, 0], prepend=-1)).tolist(), len(pairs)]
    for start, end in tqdm(itertools.pairwise(starts), "Comparing candidates", len(starts) - 1, unit="record"):
        one, others = shingles[pairs[start, 0]], pairs[start:end, 1]
        present[one] = True
        hits = present[np.concatenate([shingles[other] for other in others])]
        common[start:end] = np.add.reduceat(hits, sizes[others].cumsum() - sizes[others], dtype=np.int64)
        present[one] = False
    return common / (sizes[pairs].sum(axis=1) - common)


def inspect_repetition(
    given: Mapping[str, Dataset], trained: Mapping[str, Dataset], threshold: float, show: int
) -> tuple[dict[str, Any], Iterator[dict[str, Any]]]:
    """Records that stand twice, within a split and in two: leaks into held-out splits first; see docs/data.md.

    Args:
        given: the splits before `recipe.data.without_leaks`.
        trained: and after it; the near-duplicates are those among these.
        threshold: of near-duplicates; 0 looks for none.
        show: examples of each finding.

    Returns:
        the report, and every pair of near-duplicates: similarity, splits, rows.
    """
    records = flatten(given)
    prompt = numbered(zip(records.instruction, records.input, strict=True))
    record = numbered(zip(prompt.tolist(), records.output, strict=True))
    _, first = np.unique(np.stack([records.split, record]), axis=1, return_index=True)  # of each record in its split
    pairs, similarity, complete = np.empty((0, 2), dtype=np.int64), np.empty(0), True
    if threshold:
        rows = {name: split.with_format("numpy")["row"][:] for name, split in trained.items()}
        kept = [np.isin(records.row[records.split == number], rows[name]) for number, name in enumerate(given)]
        candidates = np.sort(first[np.concatenate(kept)[first]])
        texts = ["\n".join((records.instruction[i], records.input[i], records.output[i])) for i in candidates]
        pairs, similarity, complete = near_duplicates(texts, threshold)
        pairs = candidates[pairs]
        different = record[pairs[:, 0]] != record[pairs[:, 1]]  # the same in two splits is no near-duplicate
        pairs, similarity = pairs[different], similarity[different]

    found, order = [], []
    for earlier, later in _split_pairs(records.names):
        mine, theirs = (np.flatnonzero(records.split == number) for number in (later, earlier))
        same = _first_equal(record, mine, theirs)
        same_prompt = np.where(same < 0, _first_equal(prompt, mine, theirs), -1)
        near = np.flatnonzero((records.split[pairs] == (earlier, later)).all(axis=1))
        near_records, nearest = np.unique(pairs[near, 1], return_index=True)
        examples = {
            name: [[records.example(one) for one in (mine[i], partner[i])] for i in np.flatnonzero(partner >= 0)[:show]]
            for name, partner in (("exact", same), ("same_prompt", same_prompt))
        }
        found.append(
            {
                "records_of": records.names[later],
                "found_in": records.names[earlier],
                "records": len(mine),
                "exact": int((same >= 0).sum()),
                "same_prompt": int((same_prompt >= 0).sum()),
                "near": len(near_records) if threshold else None,
                "near_pairs": len(near) if threshold else None,
                "examples": {
                    **examples,
                    "near": [
                        {
                            "similarity": float(similarity[i]),
                            "records": [records.example(one) for one in pairs[i][::-1]],
                        }
                        for i in near[np.sort(nearest)[:show]]
                    ],
                },
            }
        )
        order.append(near)
    every_pair = (
        {
            "similarity": float(similarity[i]),
            "splits": [records.names[split] for split in records.split[pairs[i][::-1]]],
            "rows": records.row[pairs[i][::-1]].tolist(),
        }
        for i in np.concatenate(order)
    )
    return {"threshold": threshold or None, "complete": complete, "splits": found}, every_pair


def _split_pairs(names: Sequence[str]) -> list[tuple[int, int]]:
    """Which splits are compared, earlier and later: train with the test splits first, each with itself at the end."""
    across = itertools.combinations(range(len(names)), 2)
    ordered = sorted(across, key=lambda pair: (pair[0], names[pair[1]] == "validation"))
    return [*ordered, *((number, number) for number in range(len(names)))]


def _first_equal(values: np.ndarray, mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    """For each of `mine` the first of `theirs` that has the same value and is another one; -1 without."""
    known, first = np.unique(values[theirs], return_index=True)
    at = np.searchsorted(known, values[mine]).clip(max=len(known) - 1)
    partner = theirs[first[at]]
    return np.where((known[at] == values[mine]) & (partner != mine), partner, -1)


# --- records to look at -----------------------------------------------------------------------------------------------


def inspect_records(trained: Mapping[str, Dataset], lengths: Mapping[str, Lengths], show: int) -> dict[str, Any]:
    """The longest and the shortest records, the most frequent responses, and what is odd; see docs/data.md.

    Args:
        lengths: of the same splits, from `measure_lengths`.
        show: examples of each finding.
    """
    records = flatten(trained)
    prompt = numbered(zip(records.instruction, records.input, strict=True))
    response = numbered(records.output)
    different = np.unique(response * len(prompt) + prompt)  # pairs of response and prompt
    prompts_of = np.bincount(different // len(prompt))  # of each response
    odd = [
        set(ODD.findall("\n".join(texts)))
        for texts in zip(records.instruction, records.input, records.output, strict=True)
    ]
    whole = np.concatenate([of.whole for of in lengths.values()])
    by_length = np.argsort(whole, kind="stable")
    return {
        "longest": [{"tokens": int(whole[i]), **records.example(i)} for i in by_length[::-1][:show]],
        "shortest": [{"tokens": int(whole[i]), **records.example(i)} for i in by_length[:show]],
        "frequent_responses": [
            {
                "response": shorten(text, LONGEST_EXAMPLE),
                "records": count,
                "share": count / len(prompt),
                "prompts": int(prompts_of[response[records.output.index(text)]]),
            }
            for text, count in Counter(records.output).most_common(show)
            if count > 1
        ],
        "findings": {
            "empty_input": _finding(records, np.array([not text.strip() for text in records.input]), show),
            "shared_response": _finding(records, prompts_of[response] > 1, show),
            "boundary": _finding(records, np.concatenate([of.boundary for of in lengths.values()]), show),
            "odd_characters": {
                **_finding(records, np.array([bool(characters) for characters in odd]), show),
                "characters": [
                    {
                        "character": f"U+{ord(character):04X}",
                        "name": unicodedata.name(character, "control character"),
                        "records": count,
                    }
                    for character, count in Counter(itertools.chain.from_iterable(map(sorted, odd))).most_common()
                ],
            },
        },
    }


def _finding(records: Records, concerned: np.ndarray, show: int) -> dict[str, Any]:
    """How many records of which splits are concerned, (records,) bool, and a few of them."""
    counts = np.bincount(records.split[concerned], minlength=len(records.names)).tolist()
    return {
        "records": sum(counts),
        "by_split": dict(zip(records.names, counts, strict=True)),
        "examples": [records.example(i) for i in np.flatnonzero(concerned)[:show]],
    }


# --- the picture ------------------------------------------------------------------------------------------------------


def plot_lengths(report: Mapping[str, Any], max_length: int, path: Path) -> None:
    """Draw the histograms of `inspect_lengths` to a PNG, one row a split."""
    with matplotlib.rc_context(STYLE):
        save_png(draw_histograms(report, max_length), path, dpi=150)


def draw_histograms(report: Mapping[str, Any], max_length: int) -> Figure:
    """Histograms on one logarithmic axis of tokens: bars whose areas are shares of a split's records."""
    edges, splits = np.array(report["bin_edges"]), report["splits"]
    figure = Figure(figsize=(9, 1.0 + 0.95 * len(splits)), layout="constrained")
    panels = figure.subplots(len(splits), len(PARTS), sharex=True, squeeze=False)
    titles = {
        "prompt": "prompt",
        "response": "response and end of text",
        "whole": f"whole record; line: max_length {max_length:,}",
    }
    colors = {"prompt": BASELINE_COLOR, "response": TUNED_COLOR, "whole": TEXT}
    for row, (name, split) in zip(panels, splits.items(), strict=True):
        row[0].set_ylabel(
            f"{name}\n{split['records']:,} records", rotation=0, ha="right", va="center", color=TEXT, labelpad=10
        )
        for axes, part in zip(row, PARTS, strict=True):
            lengths = split["lengths"][part]
            heights = np.array(lengths["histogram"]) / np.diff(np.log(edges))
            axes.stairs(heights, edges, fill=True, color=colors[part])
            axes.set_ylim(0, 1.5 * heights.max())  # room for the words
            note = f"median {lengths['median']:,}, longest {lengths['longest']:,}"
            if part == "whole":
                axes.axvline(max_length, ymax=0.75, color=WORSE_COLOR, linewidth=1.2)  # below the words
                note += f"; {split['too_long']:,} too long"
            axes.text(0.01, 0.98, note, transform=axes.transAxes, va="top", color=MUTED, fontsize=8)
            _paint(axes)
    for axes, part in zip(panels[0], PARTS, strict=True):
        axes.set_title(titles[part], color=TEXT, fontsize=9)
    for axes in panels[-1]:
        axes.set_xlabel("tokens", color=MUTED)
    return figure


def _paint(axes: Axes) -> None:
    axes.set_xscale("log", base=2)
    axes.xaxis.set_major_locator(LogLocator(base=2, numticks=8))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda tokens, _: f"{tokens:,.0f}"))
    axes.set_yticks([])
    axes.spines["left"].set_visible(False)
    axes.spines["bottom"].set_color(LINE)
    axes.tick_params(axis="x", colors=MUTED, labelsize=8)
