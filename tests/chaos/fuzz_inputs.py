"""Inputs that nobody would write by hand: each is read right, or refused in one clear message, and in time.

Record files, configs with flags, and chat templates are damaged or built from odd values, from a seed, and go through
the code that training runs before its first step, in forked processes with a time limit. As a program, this is the long
form, which `make chaos` runs:

    python tests/chaos/fuzz_inputs.py --records 10000 --configs 1000 --templates 1000 --output outputs/chaos/inputs.json
"""

import argparse
import json
import os
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
ROOT = Path(__file__).parent.parent.parent
sys.path[:0] = [str(ROOT), str(Path(__file__).parent)]

import fuzz_records  # noqa: E402
import fuzz_settings  # noqa: E402
import fuzz_templates  # noqa: E402
from fuzzing import FINE, Case, Result, run_cases  # noqa: E402

from recipe.provenance import versions  # noqa: E402


@dataclass(frozen=True)
class Campaign:
    """Inputs of one kind: what makes them and what reads them, the seconds for each, and how many share a process."""

    maker: Callable[[Any, str], Any]
    prepare: Callable[[], Any]
    limit: float
    each: int


CAMPAIGNS = {
    "records": Campaign(fuzz_records.Maker, fuzz_records.prepare, limit=60, each=50),
    "configs": Campaign(fuzz_settings.Maker, fuzz_settings.prepare, limit=180, each=1),
    "templates": Campaign(fuzz_templates.Maker, fuzz_records.prepare, limit=60, each=20),
}
BATCH = 200  # inputs that are made before they are tried


@dataclass
class Found:
    """What became of the inputs of a campaign."""

    outcomes: Counter[str] = field(default_factory=Counter)
    kinds: dict[str, Counter[str]] = field(default_factory=dict)
    faults: list[tuple[Case, Result]] = field(default_factory=list)
    slowest: float = 0.0  # seconds
    slowest_input: Case | None = None
    lines: set[tuple[str, int]] = field(default_factory=set)  # of recipe/data that were reached


def try_inputs(name: str, count: int, seed: str) -> Found:
    """Try `count` inputs of a campaign; from the same seed, the same code makes the same ones."""
    campaign, found = CAMPAIGNS[name], Found()
    maker = campaign.maker(campaign.prepare(), f"{name} {seed}")
    with tempfile.TemporaryDirectory() as folder:
        while (rest := count - found.outcomes.total()) > 0:
            cases = maker.cases(min(BATCH, rest))
            seen = found.lines if name == "records" else None
            results = run_cases(cases, Path(folder), campaign.limit, seen, campaign.each)
            for case, result in zip(cases, results, strict=True):
                found.outcomes[result.outcome] += 1
                found.kinds.setdefault(case.kind, Counter())[result.outcome] += 1
                if result.seconds > found.slowest:
                    found.slowest, found.slowest_input = result.seconds, case
                if result.outcome not in FINE:
                    found.faults.append((case, result))
                if result.lines:
                    found.lines.update(map(tuple, result.lines))
                    maker.learn(case)
    return found


def keep(found: Found, folder: Path) -> None:
    """Write the inputs that failed, and what was said of each; and the slowest one."""
    folder.mkdir(parents=True, exist_ok=True)
    if found.slowest_input is not None:
        (folder / "slowest.input").write_bytes(found.slowest_input.content)
    for number, (case, result) in enumerate(found.faults):
        (folder / f"{number}.input").write_bytes(case.content)
        text = f"{case.kind}: {result.outcome}\n{result.said}\n"
        (folder / f"{number}.txt").write_text(text, encoding="utf-8", errors="backslashreplace")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    for name, count in (("records", 10_000), ("configs", 1_000), ("templates", 1_000)):
        parser.add_argument(f"--{name}", type=int, default=count)
    parser.add_argument("--seed", default="0")
    parser.add_argument("--output", type=Path, help="counts, as JSON")
    parser.add_argument("--keep", type=Path, help="a folder for the inputs that fail")
    arguments = parser.parse_args()
    command = " ".join(f"--{name} {getattr(arguments, name)}" for name in (*CAMPAIGNS, "seed"))
    content: dict[str, Any] = {"command": f"python tests/chaos/fuzz_inputs.py {command}", "versions": versions()}
    for name in CAMPAIGNS:
        begun = time.monotonic()
        found = try_inputs(name, getattr(arguments, name), arguments.seed)
        content[name] = {
            "inputs": found.outcomes.total(), "outcomes": dict(found.outcomes), "slowest_seconds": found.slowest,
            "seconds": round(time.monotonic() - begun),
            "by_kind": {kind: dict(n) for kind, n in sorted(found.kinds.items())},
        }  # fmt: skip
        print(name, dict(found.outcomes), flush=True)
        for case, result in found.faults[:10]:
            print(f"  {case.kind}: {result.outcome}: {result.said[-300:]!a}", flush=True)
        if arguments.keep:
            keep(found, arguments.keep / name)
        if arguments.output:
            arguments.output.parent.mkdir(parents=True, exist_ok=True)
            arguments.output.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.exit(any(content[name]["outcomes"].keys() - set(FINE) for name in CAMPAIGNS))


if __name__ == "__main__":
    main()
