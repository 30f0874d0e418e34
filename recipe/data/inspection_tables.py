"""What an inspection found, as tables in the terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich.console import Console
from rich.text import Text

from recipe.console import one_line, print_table


def print_report(report: Mapping[str, Any]) -> None:
    """Print the figures as tables, leaks first, and below them the examples."""
    print_repetition(report["repetition"], report["left_out_of_train_as_duplicates"])
    print_lengths(report)
    print_findings(report)


def print_repetition(repetition: Mapping[str, Any], leaked: int) -> None:

    threshold, splits = repetition["threshold"], repetition["splits"]
    columns = ["records of", "that stand in", "records", "exact", "same prompt, other response"]
    rows = [
        [
            found["records_of"],
            "itself" if found["found_in"] == found["records_of"] else found["found_in"],
            *(f"{found[name]:,}" for name in ("records", "exact", "same_prompt")),
            *([f"{found['near']:,}", f"{found['near_pairs']:,}"] if threshold else []),
        ]
        for found in splits
    ]
    notes = [f"{leaked:,} records are left out of training, because a later split holds them too"] if leaked else []
    if not repetition["complete"]:
        notes.append("some records have so many near-duplicates that not all pairs were compared: there are more")
    near = [f"near (from {threshold:g})", "near pairs"] if threshold else []
    print_table("Records that stand twice", [*columns, *near], rows, text_columns=2, caption="; ".join(notes) or None)
    for found in splits:
        inside = found["found_in"] == found["records_of"]
        where = f" within {found['records_of']}" if inside else f" ({found['records_of']} in {found['found_in']})"
        print_examples(f"The same record{where}", found["examples"]["exact"])
        print_examples(f"The same prompt, another response{where}", found["examples"]["same_prompt"])
        near_examples = found["examples"]["near"]
        notes = [f"{pair['similarity']:.3f} alike" for pair in near_examples]
        print_examples(f"Near-duplicates{where}", [pair["records"] for pair in near_examples], notes)


def print_lengths(report: Mapping[str, Any]) -> None:

    splits, settings = report["splits"], report["settings"]
    names = {"prompt": "prompt", "response": "response", "whole": "whole record"}
    rows = [
        [
            f"{name} ({split['records']:,})" if part == "prompt" else "",
            names[part],
            *(f"{lengths[key]:,}" for key in ("shortest", "median")),
            f"{lengths['mean']:,.1f}",
            *(f"{lengths[key]:,}" for key in ("p95", "p99", "longest")),
        ]
        for name, split in splits.items()
        for part, lengths in split["lengths"].items()
    ]
    columns = ["split (records)", "part", "shortest", "median", "mean", "95 %", "99 %", "longest"]
    print_table(
        "Lengths in tokens", columns, rows, text_columns=2, caption="a response has its end-of-text token with it"
    )

    rows = []
    for name, split in splits.items():
        costs = split["batches"]
        rows.append(
            [
                name,
                f"{sum(split['tokens'].values()):,}",
                *(percent(split["shares"][part]) for part in ("preamble", "prompt", "response")),
                f"{costs['padded']:,.0f}",
                percent(costs["padding"]),
                f"{costs['shared_prefix']:,}",
            ]
        )
    columns = ["split", "tokens", "% preamble", "% prompt", "% response"]
    print_table(
        f"Tokens that training sees, and inputs of an epoch in random batches of {settings['batch_size']}",
        [*columns, "inputs, padded", "% padding", "inputs, shared prefix"],
        rows,
    )

    at = f"{settings['max_length']:,} (as trained)"
    rows = [
        [
            name,
            at if cost["limit"] == settings["max_length"] else f"{cost['limit']:,}",
            f"{cost['too_long']:,}",
            percent(cost["too_long"] / split["records"]),
            *(f"{cost[key]:,}" for key in ("cut_prompt_tokens", "cut_response_tokens", "without_end")),
            f"{cost['dropped_tokens']:,}",
        ]
        for name, split in splits.items()
        for cost in split["overflow"]
        if cost["too_long"]
    ]
    harmless = [
        f"{limit:,}"
        for index, limit in enumerate(cost["limit"] for cost in next(iter(splits.values()))["overflow"])
        if not any(split["overflow"][index]["too_long"] for split in splits.values())
    ]
    caption = f"nothing is too long at max_length {', '.join(harmless)}" if harmless else None
    columns = ["split", "max_length", "too long", "%", "prompt tokens cut", "response tokens cut", "without end"]
    title = "Records too long: what truncate would cut, and drop leave out"
    if rows:
        print_table(title, [*columns, "tokens dropped"], rows, text_columns=2, caption=caption)
    elif caption:
        print(caption.capitalize())


def print_findings(report: Mapping[str, Any]) -> None:

    names = {
        "empty_input": "without an input",
        "shared_response": "with the response of another prompt",
        "boundary": "whose tokens change where prompt and response meet",
        "odd_characters": "with control, unseen or replacement characters",
    }
    findings, splits = report["findings"], list(report["splits"])
    rows = [[text, *(f"{findings[name]['by_split'][split]:,}" for split in splits)] for name, text in names.items()]
    print_table("Records", ["", *splits], rows)
    if report["frequent_responses"]:
        rows = [
            [row["response"][:70], f"{row['records']:,}", percent(row["share"]), f"{row['prompts']:,}"]
            for row in report["frequent_responses"]
        ]
        print_table("Most frequent responses", ["response", "records", "% of all", "different prompts"], rows)
    characters = findings["odd_characters"]["characters"]
    if characters:
        rows = [[row["character"], row["name"], f"{row['records']:,}"] for row in characters]
        print_table("Odd characters", ["character", "name", "records"], rows, text_columns=2)
    for name in ("boundary", "odd_characters"):
        print_examples(f"Records {names[name]}", [[record] for record in findings[name]["examples"]])
    for name in ("longest", "shortest"):
        notes = [f"{record['tokens']:,} tokens" for record in report[name]]
        print_examples(f"The {name} records", [[record] for record in report[name]], notes)


def print_examples(title: str, groups: Sequence[Sequence[Mapping[str, Any]]], notes: Sequence[str] = ()) -> None:
    """Print groups of records, each with its split, row and texts, and the note of its group."""

    if not groups:
        return
    console = Console(soft_wrap=True, highlight=False)
    console.print(Text(f"\n{one_line(title)}", style="bold"))
    for index, group in enumerate(groups):
        if notes:
            console.print(Text(f"  {notes[index]}"))
        for record in group:
            question = " | ".join(text for text in (record["instruction"], record["input"]) if text)
            where = f"{one_line(record['split'])} row {record['row']}"
            console.print(Text(f"  {where:<20} {one_line(question, 100)} → {one_line(record['output'], 60)}"))


def percent(share: float | None) -> str:
    return "–" if share is None else f"{share:.1%}"
