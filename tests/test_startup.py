"""What a command imports before it does any work: help and mistakes answer without waiting for the rest."""

import json
import subprocess
import sys

import pytest
from conftest import ROOT

HEAVY = {
    "datasets", "evaluate", "matplotlib", "openai", "pyarrow", "transformers.trainer",
    "recipe.attention", "recipe.generation", "recipe.model",  # transformers' models, two seconds
}  # fmt: skip
RUN = """
import json, runpy, sys
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("\\n" + json.dumps(sorted(sys.modules)))
"""


def run(*command: str) -> tuple[subprocess.CompletedProcess, set[str]]:
    """A script in a process of its own, and the modules that it has imported in the end."""
    code = f"import sys; sys.argv = {list(command)!r}{RUN}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    return done, set(json.loads(done.stdout.splitlines()[-1]))


@pytest.mark.parametrize("script", ["scripts/train.py", "scripts/eval.py", "scripts/inspect_data.py"])
def test_help_imports_only_what_names_the_flags(script):
    done, modules = run(script, "--help")
    assert done.returncode == 0 and "--max_length" in done.stdout
    assert "recipe.config" in modules and not HEAVY & modules


@pytest.mark.parametrize("script", ["scripts/train.py", "scripts/eval.py", "scripts/inspect_data.py"])
def test_a_mistake_in_the_arguments_is_told_as_fast(script):
    done, modules = run(script, "--max_lenght", "64")
    assert done.returncode == 1 and "did you mean 'max_length'?" in done.stderr
    assert "recipe.config" in modules and not HEAVY & modules


def test_the_collator_needs_torch_and_numpy_alone():
    """Whatever it imports beyond the standard library, `import numpy, torch` has imported already."""
    code = "import json, sys, numpy, torch; before = set(sys.modules); import recipe.collator; "
    code += "print(json.dumps(sorted(set(sys.modules) - before)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    packages = {module.split(".")[0] for module in json.loads(done.stdout)}
    assert "recipe" in packages and packages <= {"recipe", "numpy", "torch", *sys.stdlib_module_names}
