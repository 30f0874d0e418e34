"""docs/api.md says what there is, docstrings say what is so, and their examples run."""

import ast
import doctest
import importlib
import inspect
import json
import re

import pytest
import torch
from conftest import DEMO, ROOT
from transformers import AutoModelForCausalLM, AutoTokenizer

from recipe.collator import DataCollatorForInstructionTuning
from recipe.config import DataArguments, InstructionTrainingArguments
from recipe.data import load_splits

PAGE = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
SECTIONS = {
    module: dict(re.findall(r"^\| `(\w+).*?` \| (.*) \|$", text, flags=re.MULTILINE))
    for module, text in re.findall(r"^### \[`([\w.]+)`\].*?\n(.*?)(?=^### |\Z)", PAGE, flags=re.MULTILINE | re.DOTALL)
}
PUBLIC = [(module, name) for module, names in SECTIONS.items() for name in names]
LONGEST_SIGNATURE = 140
FACES = {  # addresses that hand on what is defined elsewhere
    "recipe.data": ("recipe.data.encode", "recipe.data.split"),
    "recipe.trainer": ("recipe.training.trainer",),
}


def row(name: str, thing: object) -> str:
    """How the page tells of a class or function: without types, which its docstring and its annotations give."""
    signature = ""
    if not (isinstance(thing, type) and issubclass(thing, Exception)):
        found = inspect.signature(thing)
        bare = [parameter.replace(annotation=inspect.Parameter.empty) for parameter in found.parameters.values()]
        signature = str(found.replace(parameters=bare, return_annotation=inspect.Signature.empty))
        signature = signature if len(signature) <= LONGEST_SIGNATURE else "(...)"
    summary = " ".join(inspect.getdoc(thing).split("\n\n")[0].split())
    return f"| `{name}{signature}` | {summary} |"


@pytest.mark.parametrize(("module", "name"), PUBLIC)
def test_each_name_is_there_as_the_page_says(module, name):
    thing = getattr(importlib.import_module(module), name)
    if callable(thing):
        assert thing.__module__ in FACES.get(module, (module,))
        assert row(name, thing) in PAGE.splitlines(), f"docs/api.md should say\n{row(name, thing)}"


@pytest.mark.parametrize("module", SECTIONS)
def test_every_public_name_of_a_listed_module_has_a_docstring(module):
    loaded = importlib.import_module(module)
    assert f"### [`{module}`](../{file_of(module)})" in PAGE
    for name, thing in vars(loaded).items():
        if callable(thing) and getattr(thing, "__module__", None) == module and not name.startswith("_"):
            docstring = thing.__doc__ or ""
            assert len(docstring) > 10 and not docstring.startswith(f"{name}("), f"{module}.{name}"  # dataclass's own


def file_of(module: str) -> str:
    path = module.replace(".", "/")
    return f"{path}.py" if (ROOT / f"{path}.py").is_file() else f"{path}/__init__.py"


def imported_names(source: str) -> set[tuple[str, str]]:
    nodes = [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.ImportFrom)]
    return {(node.module, alias.name) for node in nodes for alias in node.names if node.module.startswith("recipe")}


def test_what_examples_and_readme_import_is_public():
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "examples").glob("*.py")]
    sources += re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(encoding="utf-8"), flags=re.DOTALL)
    used = set().union(*map(imported_names, sources))
    assert len(used) > 10
    modules = {(module.rpartition(".")[0], module.rpartition(".")[2]) for module in SECTIONS}
    assert used <= {*PUBLIC, *modules}


# --- docstrings -----------------------------------------------------------------------------------------------------

WITH_PROMPTS = [
    ".".join(path.relative_to(ROOT).with_suffix("").parts)
    for path in sorted((ROOT / "recipe").rglob("*.py"))
    if ">>> " in path.read_text("utf-8")
]


@pytest.mark.parametrize("module", WITH_PROMPTS)
def test_examples_with_a_prompt_give_what_they_show(module):
    failed, run = doctest.testmod(importlib.import_module(module), optionflags=doctest.NORMALIZE_WHITESPACE)
    assert run and not failed


def examples(docstring: str) -> list[str]:
    """The blocks of code of a docstring, each behind a line that ends in `::`."""
    lines, blocks = inspect.cleandoc(docstring).splitlines(), []
    for number, line in enumerate(lines):
        if line.endswith("::"):
            rest = "\n".join(lines[number + 1 :])
            blocks.append(inspect.cleandoc(re.match(r"(\n|    .*(\n|$))+", rest).group()))
    return blocks


def source(module: str) -> ast.Module:
    return ast.parse((ROOT / file_of(module)).read_text(encoding="utf-8"))


def documented(module: str) -> dict[str, str]:
    """The docstrings of a module and of its public names; nothing is imported for it."""
    nodes = [node for home in FACES.get(module, (module,)) for node in source(home).body]
    things = [node for node in nodes if getattr(node, "name", None) in SECTIONS[module]]
    docstrings = {f"{module}.{node.name}": ast.get_docstring(node) for node in things}
    return {module: ast.get_docstring(source(module))} | docstrings


BLOCKS = {
    name: block
    for module in SECTIONS
    for name, docstring in documented(module).items()
    for block in examples(docstring or "")
}


def run_block(block: str, space: dict) -> object:
    """Run a block; what its last line comes to, if that is an expression."""
    body = ast.parse(block).body
    last = body.pop() if isinstance(body[-1], ast.Expr) else None
    exec(compile(ast.Module(body, []), "docstring", "exec"), space)
    return None if last is None else eval(compile(ast.Expression(last.value), "docstring", "eval"), space)


def namespace(module: str) -> dict:
    return dict(vars(importlib.import_module(module)))


def test_every_block_of_code_is_run_below():
    assert BLOCKS.keys() == RUN.keys()


def run_load_splits(block, tmp_path):
    for written, here in (("openai-community/gpt2", DEMO / "base"), ("instruction-data.json", TRAINING)):
        assert written in block
        block = block.replace(written, str(here))
    assert (
        run_block(block, {**namespace("recipe.data"), "DataArguments": DataArguments, "AutoTokenizer": AutoTokenizer})
        is True
    )


def run_linear_cross_entropy(block, tmp_path):
    torch.manual_seed(0)
    head, hidden = torch.nn.Linear(4, 7), torch.randn(5, 4, requires_grad=True)
    targets = torch.tensor([3, -100, 0, 6, 1])
    space = {**namespace("recipe.training.loss"), "head": head, "hidden": hidden, "targets": targets}
    run_block(block, space)
    gradient = hidden.grad
    hidden.grad = None
    expected = torch.nn.functional.cross_entropy(head(hidden), targets)
    expected.backward()
    assert space["loss"].item() == pytest.approx(expected.item())
    assert torch.allclose(gradient, hidden.grad, atol=1e-6)


def run_trainer(block, tmp_path):
    tokenizer, model = load()
    splits = load_splits(DataArguments(data=str(TRAINING)), tokenizer)
    arguments = InstructionTrainingArguments(str(tmp_path), max_steps=2, report_to="none", save_strategy="no")
    space = namespace("recipe.trainer") | {
        "model": model, "tokenizer": tokenizer, "splits": splits, "training_args": arguments,
        "DataCollatorForInstructionTuning": DataCollatorForInstructionTuning,
    }  # fmt: skip
    run_block(block, space)
    assert space["trainer"].state.global_step == 2


def run_add_adapter(block, tmp_path):
    pytest.importorskip("peft", reason="the extra `lora` installs it")
    assert run_block(block, namespace("recipe.adapters") | {"model": load()[1]}) == (["c_attn"], 6 * 16 * (128 + 384))


def run_samples(block, tmp_path):
    from recipe.data import load_records
    from recipe.templates import load_template
    from recipe.trainer import InstructionTrainer

    tokenizer, model = load()
    data = DataArguments(data=str(TRAINING))
    records, rows = load_records(data)[0]["train"].to_list(), load_splits(data, tokenizer)["validation"]
    trainer = InstructionTrainer(
        model, InstructionTrainingArguments(str(tmp_path), report_to="none"), eval_dataset=rows,
        data_collator=DataCollatorForInstructionTuning(tokenizer.eos_token_id), processing_class=tokenizer,
    )  # fmt: skip
    space = namespace("recipe.training.samples") | {"trainer": trainer, "records": records}
    run_block(block, space | {"template": load_template("alpaca")})
    trainer.evaluate()
    assert len((tmp_path / "samples.jsonl").read_text(encoding="utf-8").splitlines()) == 3


def run_generation(block, tmp_path):
    from recipe.templates import load_template

    tokenizer, model = load()
    space = {
        **namespace("recipe.generation"), **namespace("recipe.tokens"), "load_template": load_template,
        "tokenizer": tokenizer, "model": model,
    }  # fmt: skip
    text, stop_reason = run_block(block, space)
    assert isinstance(text, str) and stop_reason in ("eos", "length", "context")


def run_likelihood(block, tmp_path):
    from recipe.templates import load_template

    tokenizer, model = load()
    space = {
        **namespace("recipe.evaluation.likelihood"),
        **namespace("recipe.tokens"),
        "load_template": load_template,
        "tokenizer": tokenizer,
        "model": model,
    }
    assert run_block(block, space) > 0
    assert space["targets"] == len(tokenizer.encode("Blue.")) + 1


def run_compare(block, tmp_path):
    lines = (ROOT / "examples" / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    found = run_block(
        block, {**namespace("recipe.evaluation.comparison"), "predictions": [json.loads(line) for line in lines]}
    )
    [shown] = re.findall(r"# (\{.*\})", block)
    assert found.keys() == ast.literal_eval(shown).keys()


def run_metrics(block, tmp_path):
    [shown] = re.findall(r"# (\{.*\})", block)
    assert run_block(block, namespace("recipe.evaluation.metrics")) == ast.literal_eval(shown)


def run_answers(block, tmp_path):
    path = tmp_path / "predictions.jsonl"
    path.write_text(" ".join(block.split()) + "\n", encoding="utf-8")
    [(id_, row)] = importlib.import_module("recipe.evaluation.answers").read_answers(path, strict=True).items()
    assert row["id"] == id_ == "test/0" and row["tuned"]["text"] == "cats"


TRAINING = DEMO / "records" / "validation.jsonl"
RUN = {
    "recipe.data.load_splits": run_load_splits,
    "recipe.training.loss.linear_cross_entropy": run_linear_cross_entropy,
    "recipe.trainer.InstructionTrainer": run_trainer,
    "recipe.adapters.add_adapter": run_add_adapter,
    "recipe.training.samples.SampleGenerations": run_samples,
    "recipe.generation.generate_responses": run_generation,
    "recipe.evaluation.likelihood.reference_losses": run_likelihood,
    "recipe.evaluation.comparison.compare": run_compare,
    "recipe.evaluation.metrics": run_metrics,
    "recipe.evaluation.answers": run_answers,
}


def load() -> tuple:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / "base")
    return tokenizer, AutoModelForCausalLM.from_pretrained(DEMO / "base", dtype=torch.float32)


@pytest.mark.parametrize("name", BLOCKS)
def test_examples_in_blocks_run(name, tmp_path):
    RUN[name](BLOCKS[name], tmp_path)
