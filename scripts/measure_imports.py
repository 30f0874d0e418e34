"""What importing parts of this recipe costs: seconds and modules, beside those of torch and transformers.

python scripts/measure_imports.py --output docs/imports.json
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
import tempfile
from importlib.metadata import version
from pathlib import Path

STATEMENTS = (
    "import torch",
    "import recipe.collator",
    "import torch, transformers",
    "from transformers import LlamaForCausalLM",
    "import recipe.attention",
    "from transformers import Trainer, TrainingArguments",
    "import recipe.templates",
)
# packages count by the name they are installed under; what comes with Python, and what has no distribution, does not
PROBE = """
import sys, time
start = time.perf_counter()
{statement}
seconds, modules = time.perf_counter() - start, sorted(sys.modules)
import json
from importlib.metadata import packages_distributions
packages = {{name.split(".")[0] for name in modules}} & packages_distributions().keys()
print(json.dumps([seconds, len(modules), sorted(packages)]))
"""


def main(argv: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", type=Path, required=True, help="JSON file to write")
    parser.add_argument("--rounds", type=int, default=5, help="processes for each statement, after one that warms up")
    options = parser.parse_args(argv)
    found = measure(options.rounds)
    result = {
        "command": f"python scripts/measure_imports.py {shlex.join(argv)}",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "transformers", "numpy")},
        "cores": os.cpu_count(),
        "rounds": options.rounds,
        "imports": found,
    }
    options.output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    for statement, row in found.items():
        print(f"{statement:<55}{row['seconds']:>7.2f} s{row['modules']:>7,} modules")


def measure(rounds: int) -> dict[str, dict]:
    """Of each statement the median of `rounds` fresh processes, the statements taking turns.

    Returns `seconds` from before the statement to behind it, the number of `modules` that are loaded then, those of
    Python itself included, and the third-party `packages` among them.
    """
    runs: dict[str, list] = {statement: [] for statement in STATEMENTS}
    with tempfile.TemporaryDirectory() as elsewhere:  # so that it is the installed package that is imported
        for _ in range(rounds + 1):
            for statement, done in runs.items():
                command = [sys.executable, "-c", PROBE.format(statement=statement)]
                output = subprocess.run(command, cwd=elsewhere, check=True, capture_output=True, text=True).stdout
                done.append(json.loads(output.splitlines()[-1]))
    return {
        statement: {
            "seconds": round(statistics.median(seconds for seconds, *_ in done[1:]), 3),
            "modules": done[-1][1],
            "packages": done[-1][2],
        }
        for statement, done in runs.items()
    }


if __name__ == "__main__":
    main(sys.argv[1:])
