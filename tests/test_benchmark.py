"""The benchmark measures the same work for all: run for real on the demo model, and its arithmetic by hand."""

import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT

from recipe.config import UserError

sys.path.insert(0, str(ROOT / "benchmarks"))
import benchmark
import peers
import report

RUN = [
    "--model_name_or_path", str(DEMO / "base"), "--only", "batch_8", "--precision", "fp32", "--rounds", "1",
    "--steps", "2", "--warmup", "1", "--contenders", "recipe_padded", "recipe_shared_prefix", "trainer_padded",
]  # fmt: skip


@pytest.fixture(scope="module")
def output(tmp_path_factory):
    path = tmp_path_factory.mktemp("benchmark") / "results.json"
    done = subprocess.run(
        [sys.executable, "benchmarks/benchmark.py", *RUN, "--output", str(path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"HF_DATASETS_CACHE": str(path.parent / "datasets")},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "this recipe, shared prefix · fp32 · round 1" in done.stdout
    return path


def test_contenders_do_the_same_work_on_the_same_weights(output):
    results = json.loads(output.read_text(encoding="utf-8"))
    padded, shared, stock = (
        next(m for m in results["measurements"] if m["contender"] == name)
        for name in ("recipe_padded", "recipe_shared_prefix", "trainer_padded")
    )
    for ours in (padded, shared):
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-4)  # of all steps, the warm-up included
        for count in ("records", "tokens", "targets"):
            assert ours[count] == stock[count]
    assert stock["records"] == [8, 8, 8] and len(stock["seconds"]) == 3 and min(stock["seconds"]) > 0
    assert sum(shared["positions"]) < sum(shared["tokens"]) < sum(stock["positions"])
    assert stock["peak_memory"] > 200e6  # torch alone has as much


def test_results_name_machine_versions_and_command(output):
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["machine"]["matmul_flops_per_second"]["fp32"] > 1e9
    assert results["settings"]["versions"]["torch"] == torch.__version__
    assert "benchmarks/benchmark.py" in results["commands"][0]
    assert results["parts"]["batch_8"]["batch_size"] == 8


def test_table_and_plot_are_written(output):
    table = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| **this recipe, shared prefix** | fp32 |" in table
    assert "the same work: 16 records" in table and "fastest peer: stock Trainer, padded (fp32)" in table
    assert output.with_name("results-parts.png").stat().st_size > 5000
    assert "<svg" in output.with_name("results-parts.svg").read_text(encoding="utf-8")


def test_what_is_measured_is_not_measured_again(output, capsys):
    before = output.read_bytes()
    results = json.loads(before)
    benchmark.main([*RUN, "--output", str(output)])
    assert json.loads(output.read_bytes())["measurements"] == results["measurements"]
    assert "0 measurements to take" in capsys.readouterr().out


def test_no_measurement_begins_when_the_time_is_over(output, tmp_path, capsys):
    copy = tmp_path / "results.json"
    copy.write_bytes(output.read_bytes())
    more = [*RUN, "--output", str(copy), "--minutes", "0", "--rounds", "2"]
    benchmark.main(more)
    assert "with 3 measurements left" in capsys.readouterr().out


def test_another_setting_is_refused(output):
    with pytest.raises(UserError, match="steps: 2, now 3"):
        benchmark.main([*RUN, "--steps", "3", "--output", str(output)])


def test_unknown_parts_are_refused():
    with pytest.raises(UserError, match="--only batch_9: unknown"):
        benchmark.main(["--only", "batch_9"])


# --- by hand --------------------------------------------------------------------------------------------------------


def test_responses_are_lengthened_by_those_that_follow():
    records = [{"output": "a b"}, {"output": "c"}, {"output": "d e f"}]
    assert [r["output"] for r in benchmark.lengthened(records, 2)] == ["a b c d", "c d", "d e f a b c"]


def test_every_other_round_goes_backwards():
    assert benchmark.turned([1, 2, 3], 0) == [1, 2, 3]
    assert benchmark.turned([1, 2, 3], 1) == [3, 2, 1]


def test_floating_point_operations_of_a_step(demo_model):
    # 4 layers of width 192: 12 x 192 x 192 weights each; a vocabulary of 1,280
    batch = {"positions": 10, "targets": 3, "pairs": 50}
    linear, attention = 6 * 4 * 12 * 192**2 * 10, 12 * 4 * 192 * 50
    everywhere = peers.count_flops(demo_model, [batch], supervised_only=False)
    assert everywhere == linear + attention + 6 * 192 * 1280 * 10
    assert peers.count_flops(demo_model, [batch], supervised_only=True) == linear + attention + 6 * 192 * 1280 * 3


def test_query_key_pairs_of_a_batch():
    padded = {"input_ids": torch.zeros(2, 5)}
    assert peers.attention_pairs(padded) == 2 * 5 * 5
    shared = {"input_ids": torch.zeros(1, 9), "segments": ((4, (2, 3)),)}
    assert peers.attention_pairs(shared) == 4 * 4 + 2 * 3 * (4 + 3)


def measurement(contender: str, number: int, seconds: list[float]) -> dict:
    return {
        "kind": "training", "part": "batch_8", "contender": contender, "precision": "fp32", "compile": False,
        "round": number, "code": "", "seconds": seconds, "losses": [2.0, 1.5, 1.0], "warmup": 1, "records": [8] * 3,
        "tokens": [400, 500, 300], "targets": [80, 100, 60], "positions": [450, 600, 360], "flops": 8_000,
        "peak_memory": 10**9,
    }  # fmt: skip


def test_a_row_is_the_median_of_its_rounds_without_the_warm_up():
    rounds = [measurement("plain_loop", n, [99.0, *s]) for n, s in enumerate([[2.0, 4.0], [1.0, 3.0], [9.0, 11.0]])]
    machine = {"matmul_flops_per_second": {"fp32": 4_000}}
    row = report.training_row(rounds, machine)
    assert (row.seconds, row.low, row.high, row.rounds) == (3.0, 2.0, 10.0, 3)
    assert row.tokens_per_second == pytest.approx(800 / 6) and row.targets_per_second == pytest.approx(160 / 6)
    assert row.positions == pytest.approx(960 / 800)
    assert row.matmul == pytest.approx(8_000 / 6 / 4_000)


def test_the_verdict_says_how_many_times_as_fast_and_whether_the_work_was_the_same():
    ours, peer = measurement("recipe_shared_prefix", 0, [9, 1, 1]), measurement("trl_by_length", 0, [9, 3, 3])
    ours_with_their_trainer = measurement("trainer_shared_mask", 0, [9, 0.5, 0.5])
    results = {
        "machine": {"matmul_flops_per_second": {"fp32": 1}},
        "measurements": [ours, peer, ours_with_their_trainer],
    }
    lines = "\n".join(report.verdict(report.training_rows(results, "batch_8")))
    assert "this recipe, shared prefix (fp32) takes 1.000 s a step" in lines
    assert "**3.00 times** as fast as the fastest peer: TRL, no checkpointing, by length (fp32)" in lines
    assert "the same work: 16 records, 800 tokens, 160 targets" in report.same_work(results, "batch_8")[0]
    peer["targets"] = [80, 100, 61]
    assert "not the same work" in report.same_work(results, "batch_8")[0]


def test_docs_say_what_the_committed_results_say():
    """Each table and each comparison of docs/performance.md is what the report makes of the results file."""
    docs = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    assert files
    for path in files:
        results = json.loads(path.read_text(encoding="utf-8"))
        assert path.with_suffix(".md").read_text(encoding="utf-8") == report.table(results)
        sections = [report.verdict(report.training_rows(results, part)) for part in report.TITLES]
        sections += [report.preprocessing(results), report.generation(results)]
        lines = [line for section in sections for line in section if line.startswith(("- **", "| "))]
        assert lines and [line for line in lines if line not in docs] == []
