"""The wheel holds the package, all of it, and nothing else."""

import ast
import email
import json
import subprocess
import sys
import zipfile
from email.message import Message
from importlib.metadata import packages_distributions

import pytest
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import recipe


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", ROOT]
    done = subprocess.run([*command, "--wheel-dir", folder], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    [path] = folder.glob("*.whl")
    return zipfile.ZipFile(path)


@pytest.fixture
def names(wheel) -> set[str]:
    return set(wheel.namelist())


@pytest.fixture
def metadata(wheel, names) -> Message:
    [path] = [name for name in names if name.endswith(".dist-info/METADATA")]
    return email.message_from_bytes(wheel.read(path))


def test_it_holds_every_file_of_the_package_and_nothing_else(names):
    files = (path.relative_to(ROOT) for path in (ROOT / "recipe").rglob("*") if path.is_file())
    expected = {path.as_posix() for path in files if "__pycache__" not in path.parts}
    assert {name for name in names if ".dist-info/" not in name} == expected


def test_it_holds_what_is_not_python(names):
    needed = {
        "recipe/py.typed", "recipe/chat_templates/alpaca.jinja", "recipe/chat_templates/phi3.jinja",
        "recipe/evaluation/report/report.html.jinja", "recipe/evaluation/report/report.css",
        "recipe/evaluation/report/report.js", "recipe/publishing/card.md.jinja",
        "recipe/evaluation/judge/prompt_templates/score_0_100.jinja",
        "recipe/evaluation/judge/prompt_templates/rubric_1_5.jinja",
        "recipe/evaluation/judge/prompt_templates/pairwise.jinja", "recipe/demo/base/model.safetensors",
        "recipe/demo/base/tokenizer.json", "recipe/demo/records/train.jsonl", "recipe/demo/records/test_unseen.jsonl",
    }  # fmt: skip
    assert needed <= names
    assert any(name.endswith(".dist-info/licenses/LICENSE") for name in names)
    pickles = (".bin", ".pt", ".pkl", ".pyc")
    assert not [name for name in names if name.startswith("tests/") or name.endswith(pickles)]


def test_demo_files_are_whole(wheel):
    for name in ("recipe/demo/base/model.safetensors", "recipe/demo/records/train.jsonl"):
        assert wheel.read(name) == (ROOT / name).read_bytes()
    lines = wheel.read("recipe/demo/records/train.jsonl").decode().splitlines()
    assert {"instruction", "input", "output"} <= json.loads(lines[0]).keys()


def test_metadata_name_version_licence_and_python(metadata):
    assert metadata["Name"] == "gpt2-instruction-recipe"
    assert metadata["Version"] == recipe.__version__
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"


def test_everything_that_is_imported_is_declared(metadata):
    """What recipe/ and scripts/ import is a dependency of ours by name, not by way of another one; what their functions
    and benchmarks/ import may come with an extra."""
    requirements = [Requirement(line) for line in metadata.get_all("Requires-Dist")]
    core = {canonicalize_name(found.name) for found in requirements if found.marker is None}
    everything = {canonicalize_name(found.name) for found in requirements}
    distributions, missing = packages_distributions(), set()
    for folder, in_functions, declared in (
        ("recipe", False, core),
        ("recipe", True, everything),
        ("scripts", False, core),
        ("scripts", True, everything),
        ("benchmarks", True, everything),
    ):
        for path in (ROOT / folder).rglob("*.py"):
            for package in imported_packages(path, in_functions) - sys.stdlib_module_names:
                names = {canonicalize_name(name) for name in distributions.get(package, [package])}
                of_ours = package == "recipe" or (path.parent / f"{package}.py").is_file()
                if not of_ours and not names & declared:
                    missing.add(f"{path.relative_to(ROOT)} imports {package}")
    assert not missing, "\n".join(sorted(missing))


def imported_packages(path, in_functions: bool) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = []
    for node in ast.walk(tree) if in_functions else tree.body:
        names += [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module and not node.level else []
    return {name.split(".")[0] for name in names}
