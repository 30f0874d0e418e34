"""The architecture: imports go down, and the collator stays light."""

import ast
import subprocess
import sys

from conftest import ROOT

FLOORS = {
    0: {"config", "templates", "attention"},
    1: {
        "collator",
        "sources",
        "records",
        "data",
        "sampling",
        "loss",
        "model",
        "generation",
        "metrics",
        "provenance",
        "answers",
        "gates",
        "endpoints",
        "likelihood",
        "memory",
        "measures",
        "comparison",
        "judge",
        "judge_prompts",
        "judge_summary",
        "verdict",
        "console",
    },
    2: {"trainer", "samples", "evaluation", "report", "figures", "hub", "inspection", "model_card", "model_index"},
}
FLOOR_OF = {module: floor for floor, modules in FLOORS.items() for module in modules}


def imported_modules(path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
        found |= {name.split(".")[1] for name in names if name.startswith("recipe.")}
    return found


def test_every_module_has_a_floor_and_imports_from_its_own_or_below():
    files = {path.stem: path for path in (ROOT / "recipe").glob("*.py") if path.stem != "__init__"}
    assert files.keys() == FLOOR_OF.keys()
    graph = {name: imported_modules(path) for name, path in files.items()}
    for name, imports in graph.items():
        assert all(FLOOR_OF[other] <= FLOOR_OF[name] for other in imports), (name, imports)
    while graph:  # no cycles: there is always a module whose imports are all gone
        leaves = {name for name, imports in graph.items() if not imports & graph.keys()}
        assert leaves, f"a cycle among {sorted(graph)}"
        graph = {name: imports for name, imports in graph.items() if name not in leaves}


def test_importing_the_collator_imports_no_other_library_than_torch():
    code = "import sys, recipe.collator; print(*sorted(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    modules = done.stdout.split()
    assert "torch" in modules
    assert not {"transformers", "datasets", "evaluate", "accelerate", "matplotlib", "pandas"} & set(modules)
