"""What an inspection found, as tables in the terminal."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from recipe.console import one_line, print_table
from recipe.templates import transcript


def print_report(report: Mapping[str, Any], notes: Sequence[str] = ()) -> None:
    """Print what was not read, then the report as tables, leaks first, each with its examples."""
    for note in [
        *notes,
        *(f"{count:,} bad records left out: {reason}" for reason, count in report["bad_records"].items()),
    ]:
        print(one_line(note))
    print_duplicates(report["repetition"], report["left_out_of_train_as_duplicates"])
    print_lengths(report["splits"])
    print_costs(report["splits"], report["settings"])
    print_records(report)


def print_duplicates(repetition: Mapping[str, Any], dropped: int) -> None:
    kinds = {"exact": "exact", "same_beginning": "same beginning", "same_prompt": "same prompt, other response"}
    kinds = {kind: heading for kind, heading in kinds.items() if kind in repetition["splits"][0]}
    if repetition["threshold"]:
        kinds["near"] = f"near (from {repetition['threshold']:g})"
    lines = [
        [pair["records_of"], pair["found_in"], *(number(pair[name]) for name in ("records", *kinds))]
        for pair in repetition["splits"]
    ]
    notes = [f"{dropped:,} records are left out of training, because a later split has them too"] if dropped else []
    if not repetition["complete"]:
        notes.append("some records have too many near-duplicates to compare them all: there may be more pairs")
    columns = ["records of", "also in", "records", *kinds.values()]
    caption = "; ".join(notes) or None
    print_table("Records that appear more than once", columns, lines, text_columns=2, caption=caption)
    for pair in repetition["splits"]:
        for kind, heading in kinds.items():
            groups = pair["examples"][kind]
            notes = [f"similarity {group['similarity']:.3f}" for group in groups if kind == "near"]
            title = f"{heading.capitalize()}: {pair['records_of']} in {pair['found_in']}"
            print_examples(title, [group["records"] for group in groups], notes)


def print_lengths(splits: Mapping[str, Mapping[str, Any]]) -> None:
    lines = [
        [f"{name} ({split['records']:,})" if part == "prompt" else "", part, *map(number, lengths.values())]
        for name, split in splits.items()
        for part, lengths in split["lengths"].items()
    ]
    columns = ["split (records)", "part", "shortest", "median", "mean", "95 %", "99 %", "longest"]
    caption = "the response includes its end-of-text token"
    print_table("Lengths in tokens", columns, lines, text_columns=2, caption=caption)


def print_costs(splits: Mapping[str, Mapping[str, Any]], settings: Mapping[str, Any]) -> None:
    """Print the tokens that training sees, and what each limit would cut."""
    lines = []
    for name, split in splits.items():
        batches, total = split["batches"], sum(split["tokens"].values())
        shares = [count / total if total else None for count in split["tokens"].values()]
        inputs = [number(batches[layout]) for layout in ("padded", "shared_prefix")]
        lines.append([name, number(total), *map(percent, [*shares, batches["padding"]]), *inputs])
    columns = ["split", "tokens", "% preamble", "% prompt", "% response", "% padding", "inputs, padded"]
    title = f"Tokens that training sees, and inputs of an epoch in random batches of {settings['batch_size']}"
    print_table(title, [*columns, "inputs, shared prefix"], lines)

    costs = [(name, cost) for name, split in splits.items() for cost in split["overflow"] if cost["too_long"]]
    if not costs:
        print("No record is too long at any limit.")
        return
    columns = ["split", "max_length", "too long", "prompt tokens cut", "response tokens cut", "without end"]
    title = f"Records over a length limit, and what truncate would cut (limit in training: {settings['max_length']:,})"
    lines = [[name, *map(number, cost.values())] for name, cost in costs]
    caption = "limits that are not listed cut nothing"
    if any(split["turns"] > split["records"] for split in splits.values()):
        caption += "; of conversations, turns are counted, each with its history"
    print_table(title, columns, lines, caption=caption)


def print_records(report: Mapping[str, Any]) -> None:
    kinds = {
        "empty_input": "without an input",
        "odd_characters": "with control, invisible or replacement characters",
        "special_token_text": "whose text spells a special token, and stays text",
        "own_end_of_text": "whose response ends with the end-of-text token",
    }
    lines = [[kind, *map(number, report[name]["by_split"].values())] for name, kind in kinds.items()]
    print_table("Records", ["", *report["splits"]], lines)
    titles = {
        "odd_characters": "Records with odd characters",
        "special_token_text": "Records that spell a special token",
        "own_end_of_text": "Responses that end with the end-of-text token",
    }
    for name, title in titles.items():
        print_examples(title, [[record] for record in report[name]["examples"]])
    for name in ("longest", "shortest"):
        notes = [f"{record['tokens']:,} tokens" for record in report[name]]
        print_examples(f"The {name} records", [[record] for record in report[name]], notes)


def print_examples(title: str, groups: Sequence[Sequence[Mapping[str, Any]]], notes: Sequence[str] = ()) -> None:
    """Print groups of records, each with its split, row and texts, and the note of its group."""
    if not groups:
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(f"\n{one_line(title)}", style="bold"))
    for group, note in itertools.zip_longest(groups, notes):
        if note:
            console.print(Text(f"  {note}"))
        for record in group:
            prompt = transcript(record) or " | ".join(filter(None, (record["instruction"], record["input"])))
            where = f"{one_line(record['split'])} row {record['row']}"
            console.print(Text(f"  {where:<20} {one_line(prompt, 100)} → {one_line(record['output'], 60)}"))


def number(value: float) -> str:
    return f"{value:,.1f}" if isinstance(value, float) else f"{value:,}"


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
