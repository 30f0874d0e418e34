"""The tables and the picture of a results file that `benchmark.py` wrote: report.py RESULTS.json

They are saved beside it: RESULTS.md and RESULTS-batch_size.png.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import matplotlib
from matplotlib.figure import Figure

from recipe.config import UserError
from recipe.figures import LINE, STYLE, save_png
from recipe.files import read_json, write_whole

Measurement = dict[str, Any]
Row = dict[str, Any]  # all rounds of one contender on one part, in one precision
Parts = dict[str, list[Row]]  # fastest first

OURS = ("recipe", "trainer_shared_mask")  # how the names of contenders begin that run code of the recipe


def write(path: Path) -> None:
    """Save the tables and the picture beside the results file, and print the tables."""
    results = read_json(path)
    text, parts = tables(results), summarize(results)
    write_whole(path.with_suffix(".md"), text)
    with matplotlib.rc_context(STYLE):
        if any(part.startswith("batch_size=") for part in parts):
            save_png(draw_curve(parts, "batch_size"), path.with_name(f"{path.stem}-batch_size.png"), dpi=160)
    print(f"\n{text}\nSaved beside {path}")


# --- measurements ---------------------------------------------------------------------------------------------------


def summarize(results: dict[str, Any]) -> Parts:
    """The rows of each part; measurements that failed are left out."""
    rounds: dict[str, dict[tuple, list[Measurement]]] = {}
    for m in results["measurements"]:
        if "error" not in m:
            part = m["part"] if m["kind"] in ("training", m["part"]) else f"{m['kind']}, {m['part']}"
            rounds.setdefault(part, {}).setdefault((m["contender"], m["precision"]), []).append(m)
    return {
        part: sorted(map(summarize_rounds, groups.values()), key=lambda row: row["seconds"])
        for part, groups in rounds.items()
    }


def summarize_rounds(rounds: Sequence[Measurement]) -> Row:
    """Medians over the rounds; `memory` in bytes, the most of all rounds; `work` in records, tokens and targets."""
    first, seconds = rounds[0], [seconds_of(m) for m in rounds]
    row: Row = {
        "contender": first["contender"],
        "precision": first["precision"] or "",
        "seconds": statistics.median(seconds),
        "range": f"{min(seconds):.3f}–{max(seconds):.3f} ({len(seconds)})",
    }
    if first["kind"] in ("training", "generation"):
        row["memory"] = max(m["peak_memory"] for m in rounds)
    if first["kind"] == "training":
        row["work"] = tuple(sum(timed(first, name)) for name in ("records", "tokens", "targets"))
        row["tokens"] = row["work"][1] / len(timed(first, "seconds")) / row["seconds"]  # a second, without padding
        row["positions"] = sum(timed(first, "positions")) / row["work"][1]  # that the model computes for each token
        row["losses"] = f"{first['losses'][0]:.4f}–{first['losses'][-1]:.4f}"
    return row


def timed(measurement: Measurement, name: str) -> list[Any]:
    """A column of the timed steps, without the warm-up."""
    return measurement[name][measurement["warmup"] :]


def seconds_of(measurement: Measurement) -> float:
    """In training the mean of the timed steps, so that batches of long and of short records weigh alike."""
    if measurement["kind"] == "training":
        return statistics.mean(timed(measurement, "seconds"))
    return statistics.median(measurement["seconds"])


def in_one_line(measurement: Measurement) -> str:
    names = [str(measurement[name]) for name in ("part", "contender", "precision", "round")]
    return f"{' · '.join(names)}: {measurement.get('error') or f'{seconds_of(measurement):.3f} s'}"


# --- tables ---------------------------------------------------------------------------------------------------------


def tables(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    parts, settings, measurements = summarize(results), results["settings"], results["measurements"]
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    days = ", ".join(sorted({m["date"][:10] for m in measurements}))
    states = sorted({m["code"] for m in measurements if m["contender"].startswith(OURS)})
    different = [part for part, rows in parts.items() if len({row.get("work") for row in rows}) > 1]
    lines = [
        f"# {settings['model']}, {settings['parameters'] / 1e6:.0f}M parameters, on {settings['device']}",
        "",
        f"Threads: {settings['threads']}; {versions}. Data: {settings['data']} ({settings['data_hash']}), template "
        f"{settings['template']}. Measured on {days}; hash of the recipe's code then: {', '.join(states)}.",
        "",
        *(f"    {command}" for command in results["commands"]),
        "",
        *comparison(parts),
        "",
        *(f"**Not the same work for all contenders:** {part}\n" for part in different),
        *everything(parts),
        *(f"\nFailed: {in_one_line(m)}" for m in measurements if "error" in m),
    ]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; columns whose name begins with "<" are aligned to the left."""
    ruler = ["---" if name.startswith("<") else "---:" for name in columns]
    head = [name.removeprefix("<") for name in columns]
    return [f"| {' | '.join(line)} |" for line in (head, ruler, *rows)]


def comparison(parts: Parts) -> list[str]:
    """One line a part: the recipe at its fastest beside the fastest peer, and beside TRL at its best.

    The stock `Trainer` with our collator counts as neither: it shows what the recipe gives without its trainer.
    """
    lines = []
    for part, rows in parts.items():
        others = [row for row in rows if not row["contender"].startswith(OURS)]
        precisions = {row["precision"] for row in others}
        ours = [row for row in rows if row["contender"].startswith("recipe") and row["precision"] in precisions]
        if not ours:
            continue
        best, trl = ours[0], [row for row in others if row["contender"].startswith("trl")]
        records, tokens, targets = best.get("work", (0, 0, 0))
        work = f"{tokens / records:.1f} ({targets / records:.1f})" if records else ""
        times = [f"**{r['seconds'] / best['seconds']:.2f}** ({r['contender']})" for r in (*others[:1], *trl[:1])]
        memory = f"{best['memory'] / min(row['memory'] for row in others):.2f}" if "memory" in best else ""
        lines.append([part, work, f"{best['seconds']:.3f}", times[0], times[1] if trl else "not measured", memory])
    columns = ["<part", "tokens a record (supervised)", "seconds, recipe", "<times as fast as the fastest peer"]
    return table([*columns, "<times as fast as TRL at its best", "memory by the leanest peer's"], lines)


def everything(parts: Parts) -> list[str]:
    """One line for each contender, part and precision."""
    lines = []
    for part, rows in parts.items():
        for row in rows:
            name = f"**{row['contender']}**" if row["contender"].startswith(OURS) else row["contender"]
            training = [f"{row['tokens']:,.0f}", f"{row['positions']:.0%}"] if "work" in row else ["", ""]
            memory = f"{row['memory'] / 1e9:.2f}" if "memory" in row else ""
            seconds = [f"{row['seconds']:.3f}", row["range"]]
            lines.append([part, name, row["precision"], *seconds, *training, memory, row.get("losses", "")])
    columns = ["<part", "<contender", "<precision", "seconds", "lowest–highest (rounds)", "tokens/s"]
    return table([*columns, "positions computed", "peak memory, GB", "loss, first–last step"], lines)


# --- picture --------------------------------------------------------------------------------------------------------


def draw_curve(parts: Parts, name: str) -> Figure:
    """Seconds a step of each contender on the parts `NAME=VALUE`, against the value."""
    curves: dict[str, dict[int, float]] = {}
    for part, rows in parts.items():
        if part.startswith(f"{name}="):
            for row in rows:  # the fastest precision comes first
                curves.setdefault(row["contender"], {}).setdefault(int(part.partition("=")[2]), row["seconds"])
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for contender, curve in sorted(curves.items()):
        width = 2.2 if contender.startswith(OURS) else 1.4
        axes.plot(sorted(curve), [curve[x] for x in sorted(curve)], "o-", label=contender, linewidth=width)
    axes.set(xlabel=name.replace("_", " "), ylabel="seconds per optimizer step", xlim=(0, None), ylim=(0, None))
    axes.grid(color=LINE, linewidth=0.6)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1]))
    except (UserError, OSError, IndexError) as error:
        sys.exit(f"error: {error}; give the results file that benchmark.py wrote")
