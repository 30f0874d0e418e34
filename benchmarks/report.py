"""The table and the plots of a results file that `benchmarks/benchmark.py` wrote."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import matplotlib
import peers
from matplotlib.figure import Figure

Measurement = dict[str, Any]
Results = dict[str, Any]

STYLE: dict[Any, Any] = {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "bench"}
COLORS = {
    "recipe_shared_prefix": "#4c72b0", "recipe_padded": "#8fb0e0", "trainer_shared_mask": "#6a8caf",
    "trainer_padded": "#c05f26", "trainer_by_length": "#dd8452", "trl_default": "#59636e",
    "trl_by_length": "#7a838e", "trl_padding_free": "#aab2bb", "plain_loop": "#2e8b57",
}  # fmt: skip
GRID = "#d9dde2"
TITLES = {
    "batch_8": "Batch 8",
    "batch_32": "Batch 32",
    "long_responses": "Long responses",
    "system_prompt": "A long system prompt that all records share",
}


# --- one measurement ------------------------------------------------------------------------------------------------


def timed(measurement: Measurement, name: str) -> list[Any]:
    """A column of the timed steps, without the warm-up."""
    return measurement[name][measurement["warmup"] :]


def seconds_per_step(measurement: Measurement) -> float:
    """All time of the timed steps by their number: a batch of long rows counts as one of short ones."""
    return statistics.mean(timed(measurement, "seconds"))


def progress(measurement: Measurement) -> str:
    """A measurement in one line."""
    what = " · ".join(
        str(part)
        for part in (
            measurement["part"],
            label(measurement),
            measurement["precision"],
            f"round {measurement['round'] + 1}",
        )
        if part is not None
    )
    if "error" in measurement:
        return f"{what}: {measurement['error']}"
    if measurement["kind"] != "training":
        return f"{what}: {statistics.median(measurement['seconds']):.2f} s"
    losses = measurement["losses"]
    return (
        f"{what}: {seconds_per_step(measurement):.3f} s/step, loss {losses[0]:.4f} to {losses[-1]:.4f}, "
        f"{measurement['peak_memory'] / 1e9:.2f} GB"
    )


def label(measurement: Measurement) -> str:
    name = measurement["contender"]
    tables: dict[str, Callable[[], str]] = {
        "training": lambda: peers.CONTENDERS[name].label + (", compiled" if measurement["compile"] else ""),
        "preprocessing": lambda: peers.PREPARATIONS[name][0],
        "generation": lambda: GENERATORS[name],
        "startup": lambda: peers.STARTS[name][0],
    }
    return tables[measurement["kind"]]()


def is_ours(measurement: Measurement) -> bool:
    """Whether the recipe's code runs in it: peers are what they were when it changes."""
    name = measurement["contender"]
    if measurement["kind"] == "training":
        return peers.CONTENDERS[name].ours
    return name.startswith("recipe") or name.endswith("_help")


GENERATORS = {"recipe": "this recipe, batches with a cache", "seed": "the seed's loop: one by one, no cache"}


# --- training -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """A contender's rounds of a part, in one precision."""

    contender: str
    label: str
    precision: str
    seconds: float  # a step, median of the rounds
    low: float
    high: float
    step_quartiles: tuple[float, float]  # of the single steps of all rounds
    targets_per_second: float
    tokens_per_second: float
    positions: float  # computed, by tokens without padding
    memory: int  # bytes, the most of all rounds
    flops_per_second: float
    matmul: float  # share of the machine's matrix product
    losses: tuple[float, float]
    rounds: int

    @property
    def ours(self) -> bool:
        return peers.CONTENDERS[self.contender].ours


def training_rows(results: Results, part: str) -> list[Row]:
    """The rows of a part, fastest first."""
    groups: dict[tuple, list[Measurement]] = {}
    for m in results["measurements"]:
        if m["kind"] == "training" and m["part"] == part and "error" not in m:
            groups.setdefault((m["contender"], m["precision"], m["compile"]), []).append(m)
    return sorted((training_row(group, results["machine"]) for group in groups.values()), key=lambda row: row.seconds)


def training_row(group: list[Measurement], machine: dict[str, Any]) -> Row:
    first = group[0]
    rounds = [seconds_per_step(m) for m in group]
    steps = [seconds for m in group for seconds in timed(m, "seconds")]
    seconds, count = statistics.median(rounds), len(timed(first, "seconds"))
    tokens, targets = sum(timed(first, "tokens")), sum(timed(first, "targets"))
    quartiles = statistics.quantiles(steps, n=4) if len(steps) > 1 else [steps[0]] * 3
    flops = first["flops"] / count / seconds
    return Row(
        contender=first["contender"],
        label=label(first),
        precision=first["precision"],
        seconds=seconds,
        low=min(rounds),
        high=max(rounds),
        step_quartiles=(quartiles[0], quartiles[2]),
        targets_per_second=targets / count / seconds,
        tokens_per_second=tokens / count / seconds,
        positions=sum(timed(first, "positions")) / tokens,
        memory=max(m["peak_memory"] for m in group),
        flops_per_second=flops,
        matmul=flops / machine["matmul_flops_per_second"][first["precision"]],
        losses=(first["losses"][0], first["losses"][-1]),
        rounds=len(group),
    )


def training_section(results: Results, part: str) -> list[str]:
    rows, info = training_rows(results, part), results["parts"].get(part)
    errors = [m for m in results["measurements"] if m["part"] == part and "error" in m]
    failed = [f"- {label(m)}, {m['precision']}: {m['error']}" for m in errors]
    if not rows or not info:
        return [f"## {TITLES[part]}", "", *failed, ""] if failed else []
    lines = [
        f"## {TITLES[part]}",
        "",
        f"{info['steps']} timed steps of {info['batch_size']} records; {info['tokens_per_record']:g} tokens a record "
        f"(the longest {info['longest']}), {info['targets_per_record']:g} of them supervised.",
        "",
        "| | precision | s / step | rounds: lowest–highest | single steps: middle half | supervised tokens/s "
        "| all tokens/s | positions computed | TFLOP/s, of a matmul | peak memory, GB | loss, first–last step |",
        "| --- " + "| ---: " * 10 + "|",
    ]
    for row in rows:
        lines.append(
            f"| {bold(row.label, row.ours)} | {row.precision} | {row.seconds:.3f} "
            f"| {row.low:.3f}–{row.high:.3f} ({row.rounds}) | {row.step_quartiles[0]:.3f}–{row.step_quartiles[1]:.3f} "
            f"| {row.targets_per_second:,.0f} | {row.tokens_per_second:,.0f} | {row.positions:.0%} "
            f"| {row.flops_per_second / 1e12:.3f} ({row.matmul:.0%}) | {row.memory / 1e9:.2f} "
            f"| {row.losses[0]:.4f}–{row.losses[1]:.4f} |"
        )
    return [*lines, "", *verdict(rows), *same_work(results, part), *failed, ""]


@dataclass(frozen=True)
class Sweep:
    """Parts that differ in one property of the work: `column` of their descriptions."""

    name: str
    title: str
    column: str
    xlabel: str


SWEEPS = [
    Sweep("batch_size", "Batch size", "batch_size", "records in a batch"),
    Sweep("response_length", "Response length", "targets_per_record", "supervised tokens a record"),
    Sweep("prefix_length", "Shared prefix", "system_prompt_tokens", "tokens of the shared system prompt"),
]


def curves_of(results: Results, sweep: Sweep) -> dict[str, dict[float, float]]:
    """Seconds a step of each contender, in its faster precision, at each value of the swept property."""
    curves: dict[str, dict[float, float]] = {}
    for part, info in results["parts"].items():
        if part.startswith(f"{sweep.name}="):
            for row in training_rows(results, part):
                curves.setdefault(row.contender, {}).setdefault(info[sweep.column], row.seconds)
    return curves


def sweep_section(results: Results, sweep: Sweep) -> list[str]:
    curves = curves_of(results, sweep)
    if not curves:
        return []
    batch_sizes = {info["batch_size"] for part, info in results["parts"].items() if part.startswith(f"{sweep.name}=")}
    batch = f", batch {batch_sizes.pop()}" if len(batch_sizes) == 1 else ""
    names = [bold(peers.CONTENDERS[name].label, peers.CONTENDERS[name].ours) for name in curves]
    lines = [
        f"## {sweep.title}: seconds per step{batch}",
        "",
        f"| {sweep.xlabel} | {' | '.join(names)} |",
        "| ---: " * (1 + len(names)) + "|",
    ]
    for x in sorted({x for curve in curves.values() for x in curve}):
        cells = [f"{curve[x]:.3f}" if x in curve else "" for curve in curves.values()]
        lines.append(f"| {x:g} | {' | '.join(cells)} |")
    return [*lines, ""]


def verdict(rows: Sequence[Row]) -> list[str]:
    """Our trainer at its fastest beside the fastest peer, and beside TRL at its best.

    The stock `Trainer` with our collator is neither: what of the recipe can be had without its trainer.
    """
    ours = [row for row in rows if row.contender.startswith("recipe")]
    peers = [row for row in rows if not row.ours]
    if not ours or not peers:
        return []
    best, lean = ours[0], min(peers, key=lambda row: row.memory)
    lines = [f"{best.label} ({best.precision}) takes {best.seconds:.3f} s a step:"]
    trl = [row for row in peers if row.contender.startswith("trl")]
    for name, row in (("the fastest peer", peers[0]), *((("TRL at its best flags", trl[0]),) if trl else ())):
        lines.append(f"- **{row.seconds / best.seconds:.2f} times** as fast as {name}: {row.label} ({row.precision})")
    lines.append(f"- {best.memory / lean.memory:.2f} of the peak memory of the leanest peer: {lean.label}")
    return lines


def same_work(results: Results, part: str) -> list[str]:
    """Whether all took the same tokens and targets, and how far their losses of the first step lie apart."""
    found = [m for m in results["measurements"] if m["kind"] == "training" and m["part"] == part and "error" not in m]
    work = {(sum(timed(m, "records")), sum(timed(m, "tokens")), sum(timed(m, "targets"))) for m in found}
    if len(work) > 1:
        return [f"- **not the same work**: (records, tokens, targets) {sorted(work)}"]
    [(records, tokens, targets)] = work
    text = f"- the same work: {records:,} records, {tokens:,} tokens, {targets:,} targets for each"
    for precision in ("fp32", "bf16"):
        losses = [m["losses"][0] for m in found if m["precision"] == precision]
        if len(losses) > 1:
            spread = (max(losses) - min(losses)) / min(losses)
            text += f"; first losses in {precision} within {spread:.0e} of each other"
    return [text]


# --- the rest -------------------------------------------------------------------------------------------------------


def table(results: Results) -> str:
    """All results as Markdown."""
    settings, machine = results["settings"], results["machine"]
    rates = ", ".join(f"{name} {rate / 1e12:.2f}" for name, rate in machine["matmul_flops_per_second"].items())
    lines = [
        f"# {settings['model']}, {settings['parameters'] / 1e6:.0f}M parameters, on {machine['processor']}",
        "",
        f"{machine['cores']} cores, {machine['threads']} threads, {machine['memory'] / 1e9:.0f} GB; matrix products in "
        f"TFLOP/s: {rates}; memory is copied at {machine['copy_bytes_per_second'] / 1e9:.0f} GB/s. "
        + ", ".join(f"{name} {version}" for name, version in settings["versions"].items())
        + f". Data: {settings['data']} ({settings['data_hash']}), template {settings['template']}.",
        "",
        *(f"    {command}" for command in results["commands"]),
        "",
    ]
    if len({m["code"] for m in results["measurements"] if is_ours(m)}) > 1:
        lines += ["**Not all of ours was measured with the same state of the code:** `--again` measures anew.", ""]
    for part in TITLES:
        lines += training_section(results, part)
    for sweep in SWEEPS:
        lines += sweep_section(results, sweep)
    return "\n".join([*lines, *preprocessing(results), *generation(results), *startup(results)]).rstrip() + "\n"


def measured(results: Results, kind: str) -> dict[tuple, list[Measurement]]:
    """Measurements of a kind without errors: rounds by (part, contender, precision)."""
    groups: dict[tuple, list[Measurement]] = {}
    for m in results["measurements"]:
        if m["kind"] == kind and "error" not in m:
            groups.setdefault((m["part"], m["contender"], m["precision"]), []).append(m)
    return groups


def median_seconds(group: Iterable[Measurement]) -> float:
    return statistics.median(seconds for m in group for seconds in m["seconds"])


def preprocessing(results: Results) -> list[str]:
    groups = measured(results, "preprocessing")
    if not groups:
        return []
    lines = [
        "## Preprocessing",
        "",
        "| records | | seconds | records/s | times tokenizers alone | peak private memory, MB |",
        "| ---: | --- " + "| ---: " * 4 + "|",
    ]
    for (part, name, _), group in sorted(groups.items(), key=lambda item: (item[1][0]["records"], item[0][1])):
        seconds, records = median_seconds(group), group[0]["records"]
        raw = groups.get((part, "raw", None))
        ratio = f"{seconds / median_seconds(raw):.2f}" if raw else ""
        memory = max(m["peak_memory"] for m in group) / 1e6
        lines.append(
            f"| {records:,} | {bold(label(group[0]), name.startswith('recipe'))} | {seconds:.2f} "
            f"| {records / seconds:,.0f} | {ratio} | {memory:,.0f} |"
        )
    return [*lines, ""]


def generation(results: Results) -> list[str]:
    groups = measured(results, "generation")
    if not groups:
        return []
    seed = groups.get(("generation", "seed", "fp32"))
    lines = [
        "## Generation",
        "",
        "| | precision | seconds for all prompts | times as fast as the seed's loop | prompts timed | tokens made "
        "| answers as the seed's | peak memory, GB |",
        "| --- " + "| ---: " * 7 + "|",
    ]
    for (_, name, precision), group in groups.items():
        seconds, first = median_seconds(group), group[0]
        ratio = f"{median_seconds(seed) / seconds:.1f}" if seed else ""
        pairs = list(zip(first["answers"], seed[0]["answers"], strict=True)) if seed else []
        same = f"{sum(one == other for one, other in pairs)} of {len(pairs)}" if pairs else ""
        lines.append(
            f"| {bold(label(first), name == 'recipe')} | {precision} | {seconds:.1f} | {ratio} "
            f"| {first['measured_prompts']} of {first['prompts']} | {first['new_tokens']} | {same} "
            f"| {first['peak_memory'] / 1e9:.2f} |"
        )
    return [*lines, "", "Where not all prompts are timed, the time is scaled to all of them.", ""]


def startup(results: Results) -> list[str]:
    groups = measured(results, "startup")
    if not groups:
        return []
    lines = ["## Start-up", "", "| | seconds, median | lowest–highest |", "| --- | ---: | ---: |"]
    for group in groups.values():
        seconds = [value for m in group for value in m["seconds"]]
        median = statistics.median(seconds)
        lines.append(f"| `{label(group[0])}` | {median:.2f} | {min(seconds):.2f}–{max(seconds):.2f} |")
    return [*lines, ""]


def bold(text: str, ours: bool) -> str:
    return f"**{text}**" if ours else text


# --- plots ----------------------------------------------------------------------------------------------------------


def plot(results: Results, folder: Path, stem: str) -> list[Path]:
    """Draw what there is to draw; each picture as PNG and SVG. Returns the PNGs."""
    pictures: dict[str, Callable[[], Figure | None]] = {"parts": lambda: draw_parts(results)}
    pictures |= {sweep.name: partial(draw_sweep, results, sweep) for sweep in SWEEPS}
    pictures["records"] = lambda: draw_records(results)
    paths = []
    with matplotlib.rc_context(STYLE):
        for name, draw in pictures.items():
            figure = draw()
            if figure is None:
                continue
            for ending in ("svg", "png"):
                path = folder / f"{stem}-{name}.{ending}"
                figure.savefig(path, dpi=160, metadata={"Date": None} if ending == "svg" else None)
            paths.append(path)
    return paths


def draw_parts(results: Results) -> Figure | None:
    """Seconds a step of every contender in its faster precision, one panel a part."""
    parts = [part for part in TITLES if training_rows(results, part)]
    if not parts:
        return None
    best = {part: list({row.label: row for row in training_rows(results, part)[::-1]}.values())[::-1] for part in parts}
    rows = max(map(len, best.values()))
    figure = Figure(figsize=(7, len(parts) * (0.5 + 0.22 * rows)), layout="constrained")
    panels = figure.subplots(len(parts), 1, squeeze=False)[:, 0]
    for axes, part in zip(panels, parts, strict=True):
        shown = sorted(best[part], key=lambda row: row.seconds)
        positions = range(len(shown))
        bars = axes.barh(positions, [r.seconds for r in shown], color=[COLORS[r.contender] for r in shown])
        axes.bar_label(bars, [f"{row.seconds:.2f}  {row.precision}" for row in shown], padding=3, fontsize=8)
        axes.set_yticks(positions, [row.label for row in shown])
        axes.set_ylim(len(shown) - 0.5, -0.5)
        axes.margins(x=0.18)
        axes.set_title(TITLES[part], loc="left", fontsize=9, fontweight="bold")
        axes.tick_params(axis="y", length=0)
    panels[-1].set_xlabel("seconds per optimizer step")
    return figure


def draw_sweep(results: Results, sweep: Sweep) -> Figure | None:
    """Seconds a step against one property of the work."""
    curves = curves_of(results, sweep)
    if not curves:
        return None
    figure = Figure(figsize=(7, 3.4), layout="constrained")
    axes = figure.subplots()
    for name, curve in curves.items():
        contender, x = peers.CONTENDERS[name], sorted(curve)
        style: dict[str, Any] = {"color": COLORS[name], "linewidth": 2.2 if contender.ours else 1.4, "markersize": 4}
        axes.plot(x, [curve[value] for value in x], "o-", label=contender.label, **style)
    axes.set(xlabel=sweep.xlabel, ylabel="seconds per optimizer step", xlim=(0, None), ylim=(0, None))
    axes.grid(color=GRID, linewidth=0.6)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure


def draw_records(results: Results) -> Figure | None:
    """Preprocessing: seconds, and memory, against the number of records."""
    groups = measured(results, "preprocessing")
    if not groups:
        return None
    figure = Figure(figsize=(7, 3), layout="constrained")
    times, memories = figure.subplots(1, 2)
    colors = {"recipe": "#4c72b0", "recipe_processes": "#8fb0e0", "raw": "#2e8b57", "trl": "#7a838e"}
    for name, (text, _) in peers.PREPARATIONS.items():
        points = sorted((group[0]["records"], group) for (_, other, _), group in groups.items() if other == name)
        x = [records for records, _ in points]
        times.plot(x, [median_seconds(group) for _, group in points], marker="o", color=colors[name], label=text)
        memory = [max(m["peak_memory"] for m in group) / 1e6 for _, group in points]
        memories.plot(x, memory, marker="o", color=colors[name])
    for axes, text in ((times, "seconds"), (memories, "peak private memory, MB")):
        axes.set(xlabel="records", ylabel=text, xscale="log")
        axes.grid(color=GRID, linewidth=0.6)
    times.set_yscale("log")
    memories.set_ylim(bottom=0)
    figure.legend(loc="outside upper center", ncols=2, frameon=False)
    return figure
