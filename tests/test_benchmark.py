"""The benchmark measures the same work for all: run for real on the demo model, and its arithmetic by hand."""

import copy
import functools
import json
import os
import subprocess
import sys

import pytest
import torch
from conftest import DEMO, ROOT
from transformers import AutoConfig, AutoModelForCausalLM

from recipe.config import UserError
from recipe.precision import is_native

sys.path.insert(0, str(ROOT / "benchmarks"))
import benchmark
import peers
import report
import workloads

RUN = [
    "--model_name_or_path", str(DEMO / "base"), "--only", "batch_8", "--precision", "fp32",
    "--rounds", "1", "--steps", "2", "--warmup", "1",
    "--contenders", "recipe_padded", "recipe_shared_prefix", "trainer_padded",
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
    return path


def test_contenders_do_the_same_work_on_the_same_weights(output):
    measurements = json.loads(output.read_text(encoding="utf-8"))["measurements"]
    assert not [m for m in measurements if "error" in m]
    padded, shared, stock = (
        next(m for m in measurements if m["contender"] == name)
        for name in ("recipe_padded", "recipe_shared_prefix", "trainer_padded")
    )
    for ours in (padded, shared):
        assert ours["losses"] == pytest.approx(stock["losses"], rel=1e-4)  # of all steps, the warm-up included
        for count in ("records", "tokens", "targets"):
            assert ours[count] == stock[count]
    assert stock["records"] == [8, 8, 8] and len(stock["seconds"]) == 3 and min(stock["seconds"]) > 0
    assert sum(shared["positions"]) < sum(shared["tokens"]) < sum(stock["positions"])
    assert stock["peak_memory"] > 200e6  # torch alone has as much


def test_a_failed_measurement_is_named():
    failed = benchmark.run_job({"part": "batch_8", "contender": "nobody", "rows": [], "warmup": 1, "batch_size": 8})
    assert "nobody" in failed["error"]


def test_results_name_device_versions_and_command(output):
    results = json.loads(output.read_text(encoding="utf-8"))
    assert results["settings"]["versions"]["torch"] == torch.__version__
    assert results["settings"]["device"]
    assert "benchmarks/benchmark.py" in results["commands"][0]


def test_the_tables_are_written(output):
    text = output.with_suffix(".md").read_text(encoding="utf-8")
    assert "| batch_8 | fp32 | **recipe_shared_prefix** |" in text
    assert "(trainer_padded)" in text and "Not the same work" not in text


def test_what_is_measured_is_not_measured_again(output, capsys):
    before = json.loads(output.read_bytes())["measurements"]
    benchmark.main([*RUN, "--output", str(output)])
    assert json.loads(output.read_bytes())["measurements"] == before
    assert "0 measurements to take" in capsys.readouterr().out


def test_other_settings_are_refused(output):
    with pytest.raises(UserError, match="steps: 2, now 3"):
        benchmark.main([*RUN, "--steps", "3", "--output", str(output)])


def test_unknown_parts_are_refused():
    with pytest.raises(UserError, match="--only: invalid choice: 'batch_9'"):
        benchmark.main(["--only", "batch_9"])


def test_the_precision_is_what_the_device_has_instructions_for():
    device = "cuda" if torch.cuda.is_available() else "cpu"
    expected = "bf16" if is_native(torch.bfloat16, device) else "fp32"
    assert benchmark.BenchmarkArguments().precision == expected
    assert benchmark.BenchmarkArguments(precision="fp32").precision == "fp32"


# --- conversations, and several answers to a prompt -----------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory, demo_tokenizer):
    """A folder with a model of random weights that has room for conversations, and the inputs of all parts."""
    folder = tmp_path_factory.mktemp("tiny")
    config = AutoConfig.for_model("gpt2", vocab_size=len(demo_tokenizer), n_layer=1, n_embd=16, n_head=2,
                                  resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    demo_tokenizer.save_pretrained(folder)
    lines = (DEMO / "records" / "train.jsonl").read_text(encoding="utf-8").splitlines()[:40]
    records = [{key: json.loads(line)[key] for key in ("instruction", "input", "output")} for line in lines]
    return workloads.Inputs(records, demo_tokenizer, "alpaca", 1024, folder)


@pytest.fixture(scope="module")
def made(tiny):
    """What the contenders get of a part, made once."""
    return functools.cache(lambda name: workloads.training_rows(workloads.PARTS[name], 1, 1, tiny))


def measured(contender: str, name: str, tiny, made, most_samples: int = 64) -> dict:
    job = {"contender": contender, "folder": str(tiny.folder), "attention": None, "warmup": 1, "precision": "fp32"}
    part = {"batch_size": workloads.PARTS[name].batch_size, "most_samples": most_samples}
    return peers.measure(copy.deepcopy(job | part | made(name)))


@pytest.mark.parametrize("name", ["conversations_2", "conversations_system_1", "answers_2"])
@pytest.mark.parametrize(
    "contender",
    [
        "recipe_shared_prefix",
        "recipe_padded",
        "trainer_shared_mask",
        "plain_loop",
        "trl_by_length",
        "trl_conversations",
    ],
)
def test_all_learn_the_same_turns_behind_the_same_history(name, contender, tiny, made):
    """The stock Trainer, which takes each turn with its history as a sample, is the independent answer."""
    if contender == "trl_conversations" and name.startswith("answers"):
        pytest.skip("no conversations")
    if contender.startswith("trl"):
        pytest.importorskip("trl")
    stock, other = (measured(each, name, tiny, made) for each in ("trainer_padded", contender))
    assert other["losses"][0] == pytest.approx(stock["losses"][0], rel=1e-5)
    for count in ("records", "tokens", "targets"):
        assert other[count] == stock[count]
    if contender in ("recipe_shared_prefix", "trl_conversations"):
        assert sum(other["positions"]) < sum(stock["positions"]) / 2


@pytest.mark.parametrize("contender", ["trainer_padded", "plain_loop", "trl_by_length"])
def test_gradients_that_are_accumulated_make_the_same_step(contender, tiny, made):
    if contender.startswith("trl"):
        pytest.importorskip("trl")
    at_once, accumulated = (measured(contender, "conversations_2", tiny, made, most) for most in (64, 5))
    assert accumulated["losses"] == pytest.approx(at_once["losses"], rel=1e-5)
    assert accumulated["targets"] == at_once["targets"]
    assert sum(accumulated["positions"]) <= sum(at_once["positions"])


@pytest.mark.parametrize(("name", "turns", "system"), [("conversations_1", 5, 0), ("conversations_system_1", 8, 256)])
def test_conversations_are_what_they_are_called_and_always_the_same(name, turns, system, tiny):
    part = workloads.PARTS[name]
    first, second = (workloads.training_rows(part, 1, 2, tiny) for _ in range(2))
    assert first == second and len(first["rows"]) == 3 and len(first["samples"]) == 3 * turns
    for index, row in enumerate(first["rows"]):
        roles = [message["role"] for message in row["messages"]]
        assert roles == (["system"] if system else []) + ["user", "assistant"] * turns
        samples = first["samples"][index * turns : (index + 1) * turns]
        assert [sample["completion"] for sample in samples] == [
            m["content"] for m in row["messages"] if m["role"] == "assistant"
        ]
        learned = [sum(label != -100 for label in each["labels"]) for each in (*samples, row)]
        assert sum(learned[:-1]) == learned[-1]
        if system:
            [ids] = tiny.token_ids([row["messages"][0]["content"]])
            assert len(ids) == pytest.approx(system, abs=3)


def test_answers_to_one_prompt_stand_together_and_differ(tiny):
    rows = workloads.training_rows(workloads.PARTS["answers_2"], 1, 1, tiny)["rows"]
    groups = [rows[start : start + 4] for start in range(0, 16, 4)]
    assert len(rows) == 16 and all(len({row["prompt"] for row in group}) == 1 for group in groups)
    assert len({group[0]["prompt"] for group in groups}) == 4 and len({row["completion"] for row in rows}) == 16


def test_whole_conversations_are_for_parts_that_have_some():
    args = benchmark.BenchmarkArguments(only=["batch_8", "conversations_1"], contenders=["trl_conversations"], rounds=1)
    assert [key["part"] for key in benchmark.plan(args)] == (["conversations_1"] if benchmark.HAS_TRL else [])


# --- by hand --------------------------------------------------------------------------------------------------------


def test_long_responses_repeat_those_of_the_data(demo_tokenizer, tmp_path):
    inputs = workloads.Inputs([], demo_tokenizer, "alpaca", 1024, tmp_path)
    sentence = "The river is wide, and the water is cold."
    records = [{"output": sentence}, {"output": f"{sentence} {sentence} {sentence}"}]
    longer, _ = workloads.with_long_responses(records, inputs)
    short, long = ([len(ids) for ids in inputs.token_ids([r["output"] for r in each])] for each in (records, longer))
    assert sum(long) / 2 == pytest.approx(workloads.RESPONSE_TOKENS, rel=0.1)
    assert long[1] / long[0] == pytest.approx(short[1] / short[0], rel=0.02)


def test_the_system_prompt_is_as_long_as_it_says(demo_tokenizer, tmp_path):
    records = [{"instruction": "Say it.", "input": "", "output": "It."}]
    inputs = workloads.Inputs(records, demo_tokenizer, "alpaca", 1024, tmp_path)
    _, template = workloads.with_system_prompt(records, inputs)
    [short], [long] = (inputs.token_ids(inputs.prompts(records, name)) for name in ("alpaca", template))
    preamble = 18  # tokens of alpaca's own preamble, which the system message replaces
    assert len(long) - len(short) + preamble == pytest.approx(workloads.SYSTEM_TOKENS, abs=3)


def test_every_other_round_goes_backwards():
    args = benchmark.BenchmarkArguments(only=["batch_8"], contenders=["recipe_padded", "plain_loop"], rounds=2)
    names = [(key["round"], key["contender"]) for key in benchmark.plan(args)]
    assert names == [(0, "recipe_padded"), (0, "plain_loop"), (1, "plain_loop"), (1, "recipe_padded")]


def measurement(contender: str, number: int, seconds: list[float]) -> dict:
    return {
        "part": "batch_8", "contender": contender, "precision": "fp32", "round": number,
        "code": "", "seconds": seconds, "losses": [2.0, 1.5, 1.0], "warmup": 1, "records": [8] * 3,
        "tokens": [400, 500, 300], "targets": [80, 100, 60], "positions": [450, 600, 360], "peak_memory": 10**9,
    }  # fmt: skip


def test_a_row_is_the_median_of_its_rounds_without_the_warm_up():
    rounds = [measurement("plain_loop", n, [99.0, *s]) for n, s in enumerate([[2.0, 4.0], [1.0, 3.0], [9.0, 11.0]])]
    row = report.summarize_rounds(rounds)
    assert row["seconds"] == 3.0 and row["range"] == "2.000–10.000 (3)"
    assert row["tokens"] == pytest.approx(800 / 6) and row["positions"] == pytest.approx(960 / 800)
    assert row["work"] == (16, 800, 160)


def test_the_recipe_is_compared_with_the_fastest_peer_on_the_same_work():
    peer, collator_alone = (
        measurement("trl_by_length", 0, [9, 3, 3]),
        measurement("trainer_shared_mask", 0, [9, 0.5, 0.5]),
    )
    measurements = [measurement("recipe_shared_prefix", 0, [9, 1, 1]), peer, collator_alone]
    line = "| batch_8 | fp32 | 50.0 (10.0) | 1.000 | **3.00** (trl_by_length) | **3.00** (trl_by_length) | 1.00 |"
    assert report.comparison(report.summarize(measurements))[2:] == [line]


def test_contenders_that_learn_something_else_are_named():
    rows = [measurement("recipe_padded", 0, [9, 1, 1]), measurement("trl_conversations", 0, [9, 2, 2])]
    assert report.is_same_work(report.summarize(rows)["batch_8", "fp32"])
    for changed in ({"losses": [2.01, 1.5, 1.0]}, {"targets": [80, 100, 61]}):
        assert not report.is_same_work(report.summarize([rows[0], rows[1] | changed])["batch_8", "fp32"])


def test_docs_say_what_the_committed_results_say():
    """Each table row of the results in docs/performance.md is one that the report makes of a results file."""
    lines = set()
    for path in (ROOT / "docs" / "results").glob("*.json"):
        results = json.loads(path.read_text(encoding="utf-8"))
        if "measurements" not in results:  # of something else than speed
            continue
        text = report.tables(results)
        assert path.with_suffix(".md").read_text(encoding="utf-8") == text
        lines |= set(text.splitlines())
    page = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8").partition("## Results")[2]
    rows = [line for line in page.splitlines() if line.startswith("| ")]
    assert rows and [row for row in rows if row not in lines] == []
