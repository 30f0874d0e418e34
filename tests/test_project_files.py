"""What stands around the code: it parses, and it says the same everywhere."""

import ast
import re
import tomllib
from pathlib import Path

import pytest
import yaml
from conftest import ROOT
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), flags=re.MULTILINE))
FORMS = sorted((ROOT / ".github" / "ISSUE_TEMPLATE").glob("*.yml"))


def load(path):
    return yaml.safe_load(path.read_text(encoding="utf-8"))


def test_one_version_everywhere():
    changelog = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    newest = re.search(r"^## (\S+?),? ", changelog, flags=re.MULTILINE)
    assert PROJECT["project"]["version"] == load(ROOT / "CITATION.cff")["version"] == newest[1]


def test_the_lowest_versions_are_those_that_are_declared():
    """`make test-lowest` installs what pyproject.toml promises to work with, torch apart: CI has one build of it."""
    pinned = dict(
        line.split("==") for line in (ROOT / "constraints-lowest.txt").read_text().splitlines() if "==" in line
    )
    pinned = {canonicalize_name(name): version for name, version in pinned.items()}
    for line in PROJECT["project"]["dependencies"]:
        requirement = Requirement(line)
        [lowest] = [clause.version for clause in requirement.specifier if clause.operator == ">="]
        if requirement.name != "torch":
            assert Version(pinned[canonicalize_name(requirement.name)]) == Version(lowest), requirement.name
        assert requirement.specifier.contains(pinned[canonicalize_name(requirement.name)])


def test_the_citation_has_what_its_schema_requires():
    """cff-version 1.2.0: authors, cff-version, message and title; an ISBN is checked by its last digit."""
    citation = load(ROOT / "CITATION.cff")
    assert citation["cff-version"] == "1.2.0" and citation["type"] == "software" and citation["message"]
    assert citation["title"] and all(author.get("name") or author["family-names"] for author in citation["authors"])
    assert citation["license"] == PROJECT["project"]["license"]
    [book] = citation["references"]
    assert sum(int(digit) * (3 if place % 2 else 1) for place, digit in enumerate(book["isbn"])) % 10 == 0


def test_the_guide_names_commands_that_exist():
    guide = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    named = set(re.findall(r"\bmake ([\w-]+)", guide + (ROOT / ".github" / "pull_request_template.md").read_text()))
    assert {"setup", "test", "lint", "demo"} <= named <= TARGETS
    files = set(re.findall(r"`((?:\.ci|docs|scripts|tests|recipe|benchmarks)/[\w./]+)`", guide))
    assert len(files) >= 12 and all((ROOT / file).exists() for file in files)
    for name, file in re.findall(r"`(\w+)` (?:in|of) `((?:recipe|benchmarks)/[\w./]+\.py)`", guide):
        assert re.search(rf"^(?:def |class )?{name}\b", (ROOT / file).read_text(encoding="utf-8"), re.MULTILINE), name
    readme = (ROOT / "README.md").read_text(encoding="utf-8") + (ROOT / "docs" / "log.md").read_text(encoding="utf-8")
    assert not re.findall(r"\b[A-Z]+_(?:TABLE|ROW)\b", readme)


def test_every_promise_of_security_names_its_test():
    promises = [line for line in (ROOT / "SECURITY.md").read_text(encoding="utf-8").splitlines() if "`tests/" in line]
    files = [re.findall(r"`(tests/[\w/]+\.py)`", line) for line in promises]
    assert len(promises) >= 8 and all(files) and all((ROOT / file).is_file() for row in files for file in row)


def test_pre_commit_runs_the_lint_of_the_makefile():
    """With the tools of the virtual environment, so that nothing is downloaded and the versions are those of CI."""
    [repository] = load(ROOT / ".pre-commit-config.yaml")["repos"]
    assert repository["repo"] == "local" and all(hook["language"] == "system" for hook in repository["hooks"])
    recipe = (ROOT / "Makefile").read_text(encoding="utf-8").split("\nlint: $(VENV)/.dev\n")[1].split("\n\n")[0]
    tools = {tuple(re.sub(r" --check| \.$", "", line.strip()).split("/")[1].split()) for line in recipe.splitlines()}
    entries = (hook["entry"].removeprefix(".venv/bin/").replace(" --force-exclude", "") for hook in repository["hooks"])
    assert {tuple(entry.split()) for entry in entries} == tools == {("ruff", "format"), ("ruff", "check"), ("mypy",)}


@pytest.mark.parametrize("path", [path for path in FORMS if path.name != "config.yml"], ids=lambda path: path.stem)
def test_issue_forms_are_forms(path):
    """The keys that GitHub's syntax for issue forms requires, and an id of its own for each question."""
    form = load(path)
    assert form["name"] and form["description"] and form["body"]
    assert form.keys() <= {"name", "description", "title", "labels", "assignees", "projects", "type", "body"}
    for question in form["body"]:
        assert question["type"] in ("markdown", "textarea", "input", "dropdown", "checkboxes", "upload")
        assert question["attributes"].keys() <= {"label", "description", "placeholder", "value", "render"}
        assert question["attributes"]["label"] and re.fullmatch(r"[\w-]+", question["id"])
        assert question.keys() <= {"type", "id", "attributes", "validations"}
    ids = [question["id"] for question in form["body"]]
    assert len(set(ids)) == len(ids)
    assert any(question.get("validations", {}).get("required") for question in form["body"])


def test_a_report_asks_for_what_repeats_it():
    questions = {question["id"] for question in load(ROOT / ".github/ISSUE_TEMPLATE/wrong_result.yml")["body"]}
    assert {"command", "versions", "run"} <= questions
    assert load(ROOT / ".github/ISSUE_TEMPLATE/config.yml").keys() <= {"blank_issues_enabled", "contact_links"}


# --- size -----------------------------------------------------------------------------------------------------------


def python_files() -> list[Path]:
    files = [path for folder in ("recipe", "scripts", "benchmarks") for path in (ROOT / folder).rglob("*.py")]
    return [path for path in files if "demo" not in path.parts]


@pytest.mark.parametrize("path", python_files(), ids=lambda path: path.relative_to(ROOT).as_posix())
def test_files_and_functions_are_short(path):
    text = path.read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 400
    functions = [n for n in ast.walk(ast.parse(text)) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]
    assert not {f.name: f.end_lineno - f.lineno + 1 for f in functions if f.end_lineno - f.lineno >= 60}


def test_the_training_path_is_short():
    """What runs when a model is trained: at most 8,850 lines, docstrings included; 1,000 for more kinds of data."""
    attention = ("segments", "attention", "attention_products", "attention_flash")
    parts = ["scripts/train.py", *(f"recipe/{n}.py" for n in ("collator", *attention, "templates", "model", "config"))]
    paths = [ROOT / part for part in parts] + list((ROOT / "recipe" / "training").glob("*.py"))
    paths += [
        path
        for path in (ROOT / "recipe" / "data").glob("*.py")
        if path.stem not in ("duplicates", "inspection", "inspection_tables")
    ]
    assert sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths) <= 8850
