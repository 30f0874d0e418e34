"""Real processes against ten lines of PyTorch: the same steps, losses and weights, whatever shares out the records."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from conftest import ROOT
from in_processes import ROWS, be_process, make_model, run
from packaging.version import Version
from torch.nn import functional

from recipe.training.sampling import GroupedByLength

EPOCHS, PER_STEP, LEARNING_RATE, SEED = 2, 6, 1e-2, 5  # as in in_processes.py; records in each optimizer step


def loss_of(model, row) -> tuple[torch.Tensor, int]:
    """Summed over the supervised tokens of one record, each of its examples by itself; and how many there are."""
    total, count, start = torch.zeros((), dtype=torch.float64), 0, 0
    for end in row.get("ends") or [len(row["input_ids"])]:
        logits = model(torch.tensor([row["input_ids"][start:end]])).logits[0, :-1]
        targets = torch.tensor(row["labels"][start + 1 : end])
        total = total + functional.cross_entropy(logits, targets, reduction="sum")
        count, start = count + int((targets != -100).sum()), end
    return total, count


def reference(architecture: str, count: int, order: str, of: str) -> dict:
    """One record at a time: each step's loss is the sum of its records' losses over the count of their targets."""
    model, rows = make_model(architecture), ROWS[of](count)
    orders = [list(range(count))] * EPOCHS
    if order == "random":
        random = [torch.Generator().manual_seed(SEED + epoch) for epoch in range(EPOCHS)]
        orders = [torch.randperm(count, generator=generator).tolist() for generator in random]
    elif order == "group_by_length":
        sampler = GroupedByLength([row["length"] for row in rows], PER_STEP, SEED)
        orders = [sampler.set_epoch(epoch) or list(sampler) for epoch in range(EPOCHS)]
    steps = [each[start : start + PER_STEP] for each in orders for start in range(0, count, PER_STEP)]
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, weight_decay=0.0, eps=1e-4)
    losses = []
    for number, step in enumerate(steps):
        optimizer.param_groups[0]["lr"] = LEARNING_RATE * (1 - number / len(steps))
        parts = [loss_of(model, rows[index]) for index in step]
        loss = sum(part for part, _ in parts) / sum(targets for _, targets in parts)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    tokens = sum(
        len(rows[index]["input_ids"]) - len(rows[index].get("ends") or [1]) for step in steps for index in step
    )
    return {"losses": losses, "steps": [sorted(step) for step in steps], "model": model, "tokens": tokens}


def assert_equal_to_reference(found: dict, scenario: dict) -> None:
    of = scenario.get("of", "instructions")
    expected = reference(
        scenario["architecture"], scenario["records"], scenario.get("train_sampling_strategy", "random"), of
    )
    assert found["steps"] == expected["steps"], scenario
    assert [entry["loss"] for entry in found["log"]] == pytest.approx(expected["losses"], rel=1e-6), scenario
    assert found["log"][-1]["num_input_tokens_seen"] == expected["tokens"], scenario
    for name, weight in expected["model"].named_parameters():
        assert (found["weights"][name] - weight).norm() <= 1e-6 * weight.norm(), (scenario, name)
    for count, loss in found["evaluated"].items():
        with torch.no_grad():
            parts = [loss_of(expected["model"], row) for row in ROWS[of](count, start=100)]
        by_hand = (sum(part for part, _ in parts) / sum(targets for _, targets in parts)).item()
        assert loss == pytest.approx(by_hand, rel=1e-6), (scenario, count)


def assert_all_equal_to_reference(output: str, wanted: list[dict], processes: int) -> None:
    results = torch.load(output, weights_only=False)
    assert {found["processes"] for found in results} == {processes}
    for found, scenario in zip(results, wanted, strict=True):
        assert_equal_to_reference(found, scenario)


def scenarios(sizes: list[tuple[int, int]], counts: list[int]) -> list[dict]:
    """Each layout with each number of records; architectures and batch sizes in turn."""
    cases = [(layout, count) for layout in ("padded", "shared_prefix") for count in counts]
    return [
        {
            "architecture": ("gpt2", "llama")[index % 2],
            "layout": layout,
            "records": count,
            "batch_size": sizes[index % len(sizes)][0],
            "accumulated": sizes[index % len(sizes)][1],
            "validation": [1, 5] if index % 2 else [2, 8],
            "train_sampling_strategy": ("random", "group_by_length", "sequential")[index % 3],
        }
        for index, (layout, count) in enumerate(cases)
    ]


def conversations(batch_size: int, accumulated: int) -> list[dict]:
    """Records of several examples, in each layout."""
    return [
        each | {"of": "conversations", "batch_size": batch_size, "accumulated": accumulated}
        for each in scenarios([(1, 1)], [13])
    ]


@pytest.mark.parametrize(
    "scenario", scenarios([(6, 1), (3, 2), (2, 3), (1, 6)], [1, 13, 8]) + conversations(3, 2), ids=str
)
def test_one_process(scenario):
    assert_equal_to_reference(run(**scenario), scenario)


@pytest.mark.parametrize(("processes", "sizes"), [(2, [(3, 1), (1, 3)]), (3, [(2, 1), (1, 2)])])
def test_several_processes(processes, sizes, tmp_path):
    """Last steps of one record, and of two; fewer records than processes; cut off in the second epoch and resumed."""
    wanted = scenarios(sizes, [1, 13, 8]) + (conversations(*sizes[1]) if processes == 2 else [])
    if Version(transformers.__version__) >= Version("5.18"):  # 5.17 loads the optimizer to "cpu:0"
        wanted.append(wanted[1] | {"stop_at": 4})
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    multiprocessing.set_forkserver_preload(["recipe.trainer"])
    output = str(tmp_path / "results.pt")
    arguments = (processes, port, wanted, output)
    group = torch.multiprocessing.start_processes(
        be_process, arguments, processes, join=False, daemon=True, start_method="forkserver"
    )
    assert any(group.join(timeout=120) for _ in range(processes))  # each waits for the end of another
    assert_all_equal_to_reference(output, wanted, processes)


def test_two_processes_that_share_the_weights(tmp_path):
    """FSDP through `accelerate launch`: a process without records must take part in every exchange of weights."""
    wanted = [each for each in scenarios([(3, 1), (1, 3)], [1, 13, 8]) if each["architecture"] == "gpt2"]
    (tmp_path / "scenarios.json").write_text(json.dumps(wanted))
    output = str(tmp_path / "results.pt")
    command = [
        sys.executable, "-m", "accelerate.commands.launch", "--config_file", "configs/accelerate/fsdp.yaml",
        "--main_process_port", "0", str(Path(__file__).with_name("in_processes.py")), f"{tmp_path}/scenarios.json",
        output,
    ]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_all_equal_to_reference(output, wanted, processes=2)
