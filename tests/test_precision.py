"""A run computes in what its device has instructions for, unless it is told otherwise."""

import doctest
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from conftest import ROOT

import recipe.precision
from recipe.config import DataArguments, InstructionTrainingArguments, ModelArguments, parse_arguments
from recipe.precision import is_native
from recipe.training.checks import about_precision

OLD, NEW = {"avx2", "avx512_f", "fma3"}, {"avx2", "avx512_f", "avx512_bf16"}
NATIVE = is_native(torch.bfloat16, "cpu")  # here


@pytest.fixture
def without_onednn() -> Iterator[None]:
    """What computes in bfloat16 is off, so that this machine has no fast way to do it, whatever its CPU."""
    before = torch.backends.mkldnn.set_flags(_enabled=False)
    yield
    torch.backends.mkldnn.set_flags(_enabled=before[0])


def settings(*flags: str, **defaults) -> InstructionTrainingArguments:
    """As scripts/train.py reads them."""
    types = [ModelArguments, DataArguments, InstructionTrainingArguments]
    return parse_arguments(types, [*flags, "--output_dir", "x", "--use_cpu", "true"], "", {"bf16": None} | defaults)[2]


@pytest.mark.parametrize(
    ("instructions", "dtype", "native"),
    [
        (NEW, torch.bfloat16, True),
        (OLD, torch.bfloat16, False),
        (set(), torch.bfloat16, False),
        ({"amx_bf16", "amx_tile"}, torch.bfloat16, True),
        ({"neon", "bf16"}, torch.bfloat16, True),
        ({"neon", "dot"}, torch.bfloat16, False),
        (NEW, torch.float16, False),
        ({"avx512_fp16"}, torch.float16, True),
        (OLD, torch.float32, True),
    ],
)
def test_a_type_is_native_where_the_cpu_has_instructions_for_it(instructions, dtype, native):
    assert is_native(dtype, "cpu", instructions) is native


def test_of_this_cpu_the_system_says_the_same():
    path = Path("/proc/cpuinfo")
    if not path.is_file():
        pytest.skip("the system has no /proc/cpuinfo to compare with")
    flags = {word for line in path.read_text().splitlines() for word in line.split()}
    assert NATIVE is bool(flags & {"avx512_bf16", "amx_bf16", "bf16", "svebf16"})


def test_devices_of_which_nothing_is_known_are_not_native():
    assert not is_native(torch.bfloat16, "mps") and not is_native(torch.bfloat16, "npu", NEW)
    assert is_native(torch.float32, "npu")


def test_unset_the_cpu_decides():
    args = settings()
    assert args.mixed_precision == ("bf16" if NATIVE else "no") and args.bf16 is None  # what was asked


def test_unset_and_without_the_kernels_it_is_float32(without_onednn):
    args = settings()
    assert args.mixed_precision == "no" and args.bf16 is None
    [line] = about_precision(args, torch.float32)
    assert line.startswith("Precision: fp32, as this CPU has no known instructions for bfloat16")


@pytest.mark.parametrize(
    ("flags", "mixed"),
    [(["--bf16", "true"], "bf16"), (["--bf16", "false"], "no"), (["--fp16", "true"], "fp16"), (["--bf16"], "bf16")],
)
def test_a_flag_decides(flags, mixed):
    args = settings(*flags)
    assert args.mixed_precision == mixed and args.bf16 is ("--bf16" in flags and flags[-1] != "false")


@pytest.mark.parametrize(("text", "mixed"), [("bf16: true", "bf16"), ("bf16: false", "no"), ("fp16: true", "fp16")])
def test_a_config_file_decides(text, mixed, tmp_path):
    (tmp_path / "run.yaml").write_text(f"{text}\n")
    assert settings(str(tmp_path / "run.yaml")).mixed_precision == mixed


@pytest.mark.parametrize(("said", "mixed"), [("bf16", "bf16"), ("fp16", "fp16"), ("no", "bf16" if NATIVE else "no")])
def test_accelerates_file_decides_where_it_names_a_precision(said, mixed, monkeypatch):
    """`accelerate launch` says "no" where nothing is said."""
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", said)
    args = settings()
    assert args.mixed_precision == mixed and (args.bf16 is None) is (said == "no")
    assert settings("--bf16", "false").mixed_precision == said


def test_in_python_nothing_is_chosen_unless_it_is_asked():
    assert InstructionTrainingArguments("x", use_cpu=True).mixed_precision == "no"
    asked = InstructionTrainingArguments("x", use_cpu=True, bf16=None)
    assert asked.mixed_precision == settings().mixed_precision


@pytest.mark.parametrize("path", sorted((ROOT / "configs").glob("*.yaml")), ids=lambda path: path.stem)
def test_no_shipped_config_asks_for_what_a_machine_may_not_have(path):
    content = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert not content.get("bf16") and not content.get("fp16") and "mixed_precision" not in content


@pytest.mark.parametrize(
    ("flags", "weights", "instructions", "lines"),
    [
        (["--bf16", "true"], torch.float32, NEW, []),
        (["--bf16", "true"], torch.float32, OLD, ["bfloat16, which can make it very slow: try --bf16 false"]),
        (["--fp16", "true"], torch.float32, NEW, ["float16, which can make it very slow: try --fp16 false"]),
        (["--bf16", "false"], torch.bfloat16, OLD, ["bfloat16, which can make it very slow: try --dtype float32"]),
        (["--bf16", "false"], torch.bfloat16, NEW, []),
        (["--bf16", "false"], torch.float32, OLD, []),
    ],
)
def test_what_is_asked_for_and_slow_is_said(flags, weights, instructions, lines):
    said = about_precision(settings(*flags), weights, instructions)
    assert said == [f"This CPU has no known instructions for {line}" for line in lines]


def test_the_way_out_of_accelerates_precision_is_its_file(monkeypatch):
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "bf16")
    [line] = about_precision(settings(), torch.float32, OLD)
    assert line.endswith("""try mixed_precision: "no" in accelerate's file""")


def test_the_examples_in_the_docstrings():
    assert doctest.testmod(recipe.precision) == (0, 2)
