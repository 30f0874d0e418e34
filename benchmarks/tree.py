"""A picture of one batch of `DataCollatorWithSharedPrefix`: which tokens its examples share, and which are learned.

python benchmarks/tree.py --output docs/tree.png            four conversations, with reasoning that the history lacks
python benchmarks/tree.py --data mine.json --tokenizer_name NAME --template tokenizer --records 4 --output tree.png
"""

from __future__ import annotations

import itertools
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from transformers import PreTrainedTokenizerBase

from recipe.collator import DataCollatorWithSharedPrefix
from recipe.config import DataArguments, ModelArguments, parse_arguments, setting
from recipe.data import load_splits
from recipe.figures import BASELINE_COLOR, LINE, MUTED, STYLE, TEXT, TUNED_COLOR, WORSE_COLOR, canvas, save_png
from recipe.files import write_json_lines
from recipe.model import load_tokenizer

BASE = Path(__file__).parents[1] / "recipe" / "demo" / "base"
# writes turns as many models do that reason: what was thought before the last question is left out of the history
TEMPLATE = """\
{%- set last = namespace(question=-1) -%}
{%- for m in messages if m.role == 'user' -%}{%- set last.question = loop.index -%}{%- endfor -%}
{%- set asked = namespace(count=0) -%}
{%- for m in messages -%}
{%- if m.role == 'user' -%}{%- set asked.count = asked.count + 1 -%}{%- endif -%}
{%- set text = m.content if asked.count == last.question else m.content.split('</think>')[-1].lstrip() -%}
{{- m.role + ': ' + (text if m.role == 'assistant' else m.content) + (eos_token if m.role == 'assistant' else '')
    + '\\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'assistant: ' -}}{%- endif -%}"""
SYSTEM = "You are a guide in a small town. Answer in one sentence."
RIVER = ("Where is the river?", "The bridge is north. </think> The river is north of the church.")
CONVERSATIONS = [
    [RIVER, ("How far is it?", "Ten minutes on foot. </think> It is ten minutes on foot."),
     ("Is there a boat?", "The boat goes in the summer. </think> Yes, in the summer there is a boat.")],
    [RIVER, ("Who lives there?", "An old fisher has a house. </think> An old fisher lives there.")],
    [("Where is the market?", "It is on the square. </think> The market is on the square."),
     ("When does it open?", "Monday, in the morning. </think> It opens on Monday in the morning.")],
    [("Where is the museum?", "The museum has moved. </think> The museum is in the old school.")],
]  # fmt: skip


@dataclass
class TreeArguments:
    """Which records, and where the picture goes."""

    output: str = setting("outputs/tree.png", "The PNG to write.")
    records: int = setting(4, "The first records of the training split make the batch.")


class Run(NamedTuple):
    """What an example adds to the row of a batch."""

    name: str  # of the examples that end in it
    start: int  # the position of its first token: so many it shares with examples above it
    examples: np.ndarray  # (tokens,), how many examples of the batch have each token
    targets: np.ndarray  # (tokens,), how many of them learn something there
    parent: int  # the run in which the token before its first one is; -1 if there is none


def runs_of(batch: Mapping[str, Any]) -> list[Run]:
    """The runs of a row, from the top, as a collator with `attention="segments"` returns them for rows with `row`.

    The last input of each example must predict a target, as that of a whole response does.
    """
    time = batch["input_ids"].shape[1]
    run_of, paths, places, end = np.zeros(time, dtype=int), [], np.empty(0, dtype=int), 0
    for shared, length in batch["segments"]:
        places = np.concatenate([places[:shared], np.arange(end, end + length)])  # of all that its last token sees
        run_of[end : end + length] = len(paths)
        paths.append(places)
        end += length
    owners, kept = batch["example"].numpy(), batch["logits_to_keep"].numpy()
    users, names = np.zeros(time, dtype=int), [[] for _ in paths]  # type: np.ndarray, list[list[str]]
    records = batch["row"].tolist()
    for example, length in enumerate(batch["lengths"].tolist()):
        run = run_of[kept[owners == example][-1]]
        users[paths[run][:length]] += 1
        number = f", example {records[: example + 1].count(records[example])}"
        names[run].append(f"record {records[example]}" + (number if records.count(records[example]) > 1 else ""))
    targets = np.bincount(kept, minlength=time)
    return [
        Run(
            "\n".join(name), shared, users[path[shared:]], targets[path[shared:]],
            int(run_of[path[shared - 1]]) if shared else -1,
        )
        for name, path, (shared, _) in zip(names, paths, batch["segments"], strict=True)
    ]  # fmt: skip


@matplotlib.rc_context(STYLE)
def draw(batch: Mapping[str, Any], path: Path) -> str:
    """Draw a batch to a PNG, positions from left to right and a run in each line; the caption is also returned."""
    runs = runs_of(batch)
    figure, axes = canvas(0.36 * len(runs) + 1.5, 9)
    for line, run in enumerate(runs):
        edges = [0, *np.flatnonzero(np.diff(run.examples)) + 1, len(run.examples)]
        for start, end in itertools.pairwise(edges):
            count = int(run.examples[start])
            color = BASELINE_COLOR if count == 1 else TUNED_COLOR
            axes.barh(
                line,
                end - start,
                left=run.start + start,
                height=0.5,
                color=color,
                edgecolor="white",
                alpha=1 if count > 1 else 0.6,
            )
            if count > 1 and end - start > 4:
                axes.text(run.start + (start + end) / 2, line, f"{count}", color="white", ha="center", va="center",
                          fontsize=7)  # fmt: skip
        learned = run.start + np.flatnonzero(run.targets)
        axes.barh(np.full(len(learned), line + 0.33), 1, left=learned, height=0.12, color=WORSE_COLOR)
        if run.parent >= 0:  # from the run above it
            axes.plot([run.start] * 2, [run.parent + 0.25, line + 0.25], color=MUTED, linewidth=0.8, zorder=0)
    tokens, computed = int(batch["lengths"].sum()), batch["input_ids"].shape[1]
    caption = (
        f"{computed:,} positions are computed for {tokens:,} tokens ({computed / tokens:.0%}); "
        f"padded to the longest, {len(batch['lengths']) * int(batch['lengths'].max()):,}"
    )
    _label(axes, [run.name for run in runs], caption)
    path.parent.mkdir(parents=True, exist_ok=True)
    save_png(figure, path, dpi=130)
    return caption


def _label(axes: Axes, names: Sequence[str], caption: str) -> None:
    axes.set_yticks(range(len(names)), names)
    axes.set(ylim=(len(names) - 0.4, -0.6), xlim=(0, None), xlabel="position of the token in its example")
    axes.set_title(caption, color=TEXT, fontsize=9, loc="left")
    axes.grid(axis="x", color=LINE, linewidth=0.6)
    handles = [
        Patch(color=TUNED_COLOR, label="computed once for so many examples"),
        Patch(color=BASELINE_COLOR, alpha=0.6, label="of one example alone"),
        Line2D([], [], color=WORSE_COLOR, linewidth=3, label="a target is predicted here"),
    ]
    figure: Any = axes.figure
    figure.legend(handles=handles, frameon=False, labelcolor=TEXT, loc="outside lower center", ncols=3)


def collate(data: DataArguments, tokenizer: PreTrainedTokenizerBase, records: int) -> dict[str, Any]:
    """The first records of the training split, as training would lay them out."""
    rows = load_splits(data, tokenizer)["train"]
    assert tokenizer.eos_token_id is not None
    return DataCollatorWithSharedPrefix(tokenizer.eos_token_id, "segments")(
        [rows[index] for index in range(min(records, len(rows)))]
    )


def example_data(folder: Path) -> DataArguments:
    """The conversations above, and the template that leaves their reasoning out of the history."""
    rows = []
    for exchanges in CONVERSATIONS:
        turns = [{"role": "system", "content": SYSTEM}]
        for question, answer in exchanges:
            turns += [{"role": "user", "content": question}, {"role": "assistant", "content": f"<think> {answer}"}]
        rows.append({"messages": turns})
    write_json_lines(folder / "conversations.jsonl", rows)
    (folder / "reasoning.jinja").write_text(TEMPLATE, encoding="utf-8")
    return DataArguments(
        data=str(folder / "conversations.jsonl"),
        template=str(folder / "reasoning.jinja"),
        validation_ratio=0,
        test_ratio=0,
    )


def main(argv: Sequence[str]) -> None:
    assert __doc__ is not None
    model, data, args = parse_arguments(
        [ModelArguments, DataArguments, TreeArguments], list(argv), description=__doc__.partition("\n")[0]
    )
    with tempfile.TemporaryDirectory() as folder:
        if not any(word.startswith("--data") for word in argv):
            data, model = example_data(Path(folder)), ModelArguments(tokenizer_name=str(BASE))
        caption = draw(collate(data, load_tokenizer(model), args.records), Path(args.output))
    print(f"{caption}\nDrawn: {args.output}")


if __name__ == "__main__":
    main(sys.argv[1:])
