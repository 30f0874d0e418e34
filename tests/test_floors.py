"""The architecture: a folder of `recipe/` is a stage, imports only go down, and the collator stays light."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

FLOORS = ["top", "recipe.generation", "recipe.data", "recipe.evaluation", "recipe.training", "recipe.publishing"]
OUTSIDE = ["scripts", "benchmarks"]  # above all floors
DOOR = "recipe.trainer"  # the public address of a class that lives in recipe/training/
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in ("recipe", *OUTSIDE)
    for path in (ROOT / folder).rglob("*.py")
    if "demo" not in path.parts and path != ROOT / "recipe" / "__init__.py"
}


def imported_modules(path: Path) -> set[str]:
    """The modules of `recipe` that a file imports, at its top and in its functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name if name in MODULES else name.rpartition(".")[0] for name in found if name.startswith("recipe.")}
    return names & MODULES.keys()


GRAPH = {name: imported_modules(path) for name, path in MODULES.items()}


def floor(module: str) -> int:
    if module.partition(".")[0] in OUTSIDE:
        return len(FLOORS)
    stage = next((stage for stage in FLOORS if module == stage or module.startswith(f"{stage}.")), "top")
    return FLOORS.index(stage)


@pytest.mark.parametrize("module", sorted(set(MODULES) - {DOOR}))
def test_imports_go_down(module):
    assert not {other for other in GRAPH[module] if floor(other) > floor(module)} - {DOOR}
    if floor(module) < FLOORS.index("recipe.training"):
        assert DOOR not in GRAPH[module]


def test_the_door_holds_nothing_of_its_own():
    assert GRAPH[DOOR] == {"recipe.training.trainer"}
    assert len(MODULES[DOOR].read_text(encoding="utf-8").splitlines()) < 10


def test_no_module_imports_itself_over_others():
    graph = dict(GRAPH)
    while graph:
        leaves = {name for name, imports in graph.items() if not imports & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: imports for name, imports in graph.items() if name not in leaves}


def test_a_stage_imports_nothing_when_it_is_named():
    """So that `import recipe.collator` needs torch and numpy alone; only `recipe.data` hands on its public names."""
    for path in (ROOT / "recipe").rglob("__init__.py"):
        if path.parent.name not in ("data", "demo"):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            assert not any(isinstance(node, ast.Import | ast.ImportFrom) for node in nodes), path


def test_importing_the_collator_imports_no_other_library_than_torch():
    code = "import sys, recipe.collator; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = done.stdout.split()
    assert "torch" in modules
    assert not {"transformers", "datasets", "evaluate", "accelerate", "matplotlib", "pandas"} & set(modules)
