"""The picture of a batch as a tree: what it draws, against the starts of the examples counted one by one."""

import random
import re
import sys
from collections import Counter
from pathlib import Path

from conftest import ROOT
from PIL import Image

from recipe.collator import DataCollatorWithSharedPrefix

sys.path.insert(0, str(ROOT / "benchmarks"))
import tree


def branching_rows(seed: int) -> list[dict]:
    """Rows of one to three examples that often begin alike, each with one learned run at its end."""
    draw = random.Random(seed)
    rows = []
    for number in range(6):
        ids, labels, ends = [], [], []
        for _ in range(draw.randint(1, 3)):
            tokens = [draw.choice([5, 6]) for _ in range(draw.randint(3, 7))] + [7] * draw.randint(0, 2)
            learned = draw.randint(1, len(tokens) - 1)
            ids += tokens
            labels += [-100] * (len(tokens) - learned) + tokens[-learned:]
            ends.append(len(ids))
        rows.append({"input_ids": ids, "labels": labels, "ends": ends, "row": number})
    return rows


def test_each_start_is_drawn_once_with_the_examples_that_have_it():
    for seed in range(20):
        rows = branching_rows(seed)
        users, targets, names = Counter(), Counter(), Counter()
        for row in rows:
            for number, (start, end) in enumerate(zip([0, *row["ends"]], row["ends"], strict=False), start=1):
                tokens, labels = row["input_ids"][start:end], row["labels"][start:end]
                starts = [tuple(tokens[: index + 1]) for index in range(len(tokens) - 1)]
                users.update(starts)
                targets.update(each for each, label in zip(starts, labels[1:], strict=True) if label != -100)
                names[f"record {row['row']}" + (f", example {number}" if len(row["ends"]) > 1 else "")] += 1
        wanted = Counter((len(each) - 1, users[each], targets[each]) for each in users)
        runs = tree.runs_of(DataCollatorWithSharedPrefix(0, "segments")(rows))
        found = Counter(
            (run.start + index, int(run.examples[index]), int(run.targets[index]))
            for run in runs
            for index in range(len(run.examples))
        )
        assert found == wanted and Counter("\n".join(run.name for run in runs).split("\n")) == names
        for run in runs:
            above = runs[run.parent]
            assert (run.start == 0) == (run.parent == -1)
            assert run.start == 0 or above.start < run.start <= above.start + len(above.examples)


def test_the_page_shows_what_the_command_draws(tmp_path: Path, capsys):
    tree.main(["--output", str(tmp_path / "tree.png")])
    drawn, kept = Image.open(tmp_path / "tree.png"), Image.open(ROOT / "docs" / "tree.png")
    assert drawn.size == kept.size and (ROOT / "docs" / "tree.png").stat().st_size < 100_000
    computed, tokens, padded = re.findall(r"[\d,]+(?= positions|  ?tokens|$)", capsys.readouterr().out.splitlines()[0])
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    assert "![The tree of a batch](tree.png)" in page and "python benchmarks/tree.py --output docs/tree.png" in page
    assert f"{computed} positions for {tokens} tokens, where padding would compute {padded}" in " ".join(page.split())
