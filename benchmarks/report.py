"""The tables of a results file that `benchmark.py` wrote, saved beside it as RESULTS.md: report.py RESULTS.json"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from recipe.config import UserError
from recipe.files import read_json, write_whole

Measurement = dict[str, Any]
Row = dict[str, Any]  # all rounds of one contender on one part, in one precision
Groups = dict[tuple[str, str], list[Row]]  # by part and precision, fastest first

SAME_LOSS = 1e-3  # relative, also in bf16
OURS = ("recipe", "trainer_shared_mask")  # contenders with code of the recipe; their names begin so


def write(path: Path) -> None:
    """Save the tables beside the results file, and print them."""
    text = tables(read_json(path))
    write_whole(path.with_suffix(".md"), text)
    print(f"\n{text}\nSaved beside {path}")


def summarize(measurements: Iterable[Measurement]) -> Groups:
    """The rows of each part and precision; measurements that failed are left out."""
    rounds: dict[tuple, dict[str, list[Measurement]]] = {}
    for m in measurements:
        if "error" not in m:
            rounds.setdefault((m["part"], m["precision"]), {}).setdefault(m["contender"], []).append(m)
    return {
        key: sorted(map(summarize_rounds, contenders.values()), key=lambda row: row["seconds"])
        for key, contenders in rounds.items()
    }


def summarize_rounds(rounds: Sequence[Measurement]) -> Row:
    """Medians over the rounds; `memory` in bytes, the most of all rounds; `work` in records, tokens and targets."""
    first, seconds = rounds[0], [seconds_of(m) for m in rounds]
    median = statistics.median(seconds)
    records, tokens, targets, positions = (
        sum(timed(first, name)) for name in ("records", "tokens", "targets", "positions")
    )
    return {
        "contender": first["contender"],
        "seconds": median,
        "range": f"{min(seconds):.3f}–{max(seconds):.3f} ({len(seconds)})",
        "memory": max(m["peak_memory"] for m in rounds),
        "work": (records, tokens, targets),
        "tokens": tokens / len(timed(first, "seconds")) / median,  # per second, without padding
        "positions": positions / tokens,  # that the model computes for each token
        "first_loss": first["losses"][0],  # before any update, on the same rows for all
        "losses": f"{first['losses'][0]:.4f}–{first['losses'][-1]:.4f}",
    }


def is_same_work(rows: Sequence[Row]) -> bool:
    """Whether all contenders of a part learned as many targets and had the same first loss, but for rounding."""
    losses = [row["first_loss"] for row in rows]
    return len({row["work"] for row in rows}) == 1 and max(losses) - min(losses) <= SAME_LOSS * min(losses)


def timed(measurement: Measurement, name: str) -> list[Any]:
    """A column of the timed steps, without the warm-up."""
    return measurement[name][measurement["warmup"] :]


def seconds_of(measurement: Measurement) -> float:
    """The mean of the timed steps, so that batches of long and of short records count equally."""
    return statistics.mean(timed(measurement, "seconds"))


def in_one_line(measurement: Measurement) -> str:
    names = [str(measurement[name]) for name in ("part", "contender", "precision", "round")]
    return f"{' · '.join(names)}: {measurement.get('error') or f'{seconds_of(measurement):.3f} s'}"


def tables(results: dict[str, Any]) -> str:
    """All results as Markdown."""
    settings, measurements = results["settings"], results["measurements"]
    groups = summarize(measurements)
    versions = ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
    days = ", ".join(sorted({m["date"][:10] for m in measurements}))
    hashes = ", ".join(sorted({m["code"] for m in measurements if m["contender"].startswith(OURS)}))
    different = [part for (part, _), rows in groups.items() if not is_same_work(rows)]
    lines = [
        f"# {settings['model']}, {settings['parameters'] / 1e6:.0f}M parameters, on {settings['device']}",
        "",
        f"Threads: {settings['threads']}; {versions}. Data: {settings['data']} ({settings['data_hash']}), template "
        f"{settings['template']}. Measured on {days}; hash of the recipe's code then: {hashes}.",
        "",
        *(f"    {command}" for command in results["commands"]),
        "",
        *comparison(groups),
        "",
        *(f"**Not the same work for all contenders:** {part}\n" for part in different),
        *all_rows(groups),
        *(f"\nFailed: {in_one_line(m)}" for m in measurements if "error" in m),
    ]
    return "\n".join(lines) + "\n"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """The lines of a Markdown table; columns whose name begins with "<" are aligned to the left."""
    ruler = ["---" if name.startswith("<") else "---:" for name in columns]
    head = [name.removeprefix("<") for name in columns]
    return [f"| {' | '.join(line)} |" for line in (head, ruler, *rows)]


def comparison(groups: Groups) -> list[str]:
    """One line per part and precision: the recipe at its fastest beside the fastest peer, and beside TRL at its best.

    The stock `Trainer` with our collator counts as neither: it shows what the recipe gives without its trainer.
    """
    lines = []
    for key, rows in groups.items():
        peers = [row for row in rows if not row["contender"].startswith(OURS)]
        ours = [row for row in rows if row["contender"].startswith("recipe")]
        if not ours or not peers:
            continue
        best, trl = ours[0], [row for row in peers if row["contender"].startswith("trl")]
        records, tokens, targets = best["work"]
        work = f"{tokens / records:.1f} ({targets / records:.1f})"
        times = [f"**{r['seconds'] / best['seconds']:.2f}** ({r['contender']})" for r in (*peers[:1], *trl[:1])]
        memory = f"{best['memory'] / min(row['memory'] for row in peers):.2f}"
        lines.append([*key, work, f"{best['seconds']:.3f}", times[0], times[1] if trl else "not measured", memory])
    columns = ["<part", "<precision", "tokens per record (supervised)", "seconds, recipe"]
    columns += ["<times as fast as the fastest peer", "<times as fast as the fastest TRL"]
    return table([*columns, "memory relative to the leanest peer"], lines)


def all_rows(groups: Groups) -> list[str]:
    """One line per part, precision and contender."""
    lines = []
    for (part, precision), rows in groups.items():
        for row in rows:
            name = f"**{row['contender']}**" if row["contender"].startswith(OURS) else row["contender"]
            seconds, tokens = [f"{row['seconds']:.3f}", row["range"]], f"{row['tokens']:,.0f}"
            positions, memory = f"{row['positions']:.0%}", f"{row['memory'] / 1e9:.2f}"
            lines.append([part, precision, name, *seconds, tokens, positions, memory, row["losses"]])
    columns = ["<part", "<precision", "<contender", "seconds", "lowest–highest (rounds)", "tokens/s"]
    return table([*columns, "positions computed", "peak memory, GB", "loss, first–last step"], lines)


if __name__ == "__main__":
    try:
        write(Path(sys.argv[1]))
    except (UserError, OSError, IndexError) as error:
        sys.exit(f"error: {error}; give the results file that benchmark.py wrote")
