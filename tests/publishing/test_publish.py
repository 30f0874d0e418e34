"""scripts/publish.py as a user runs it: a short run and its evaluation, pushed to a Hub on a loopback port."""

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import processes
import pytest
from conftest import DEMO, ROOT
from huggingface_hub import ModelCard
from loopback_hub import WRITE_TOKEN, LoopbackHub

from recipe.config import UserError


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def made(tmp_path_factory, cache) -> tuple[Path, Path]:
    """A run of two steps and its evaluation on six records."""
    folder = tmp_path_factory.mktemp("publish")
    lines = (DEMO / "records" / "validation.jsonl").read_text(encoding="utf-8").splitlines()[:60]
    (folder / "records.jsonl").write_text("\n".join(lines), encoding="utf-8")
    run, evaluation = folder / "tuned", folder / "evaluation"
    script(
        cache, "scripts/train.py", "--model_name_or_path", str(DEMO / "base"), "--data", str(folder / "records.jsonl"),
        "--output_dir", str(run), "--max_steps", "2", "--per_device_train_batch_size", "4",
    )  # fmt: skip
    script(
        cache, "scripts/eval.py", "--model", str(run), "--baseline", str(DEMO / "base"),
        "--output_dir", str(evaluation), "--max_new_tokens", "4",
    )  # fmt: skip
    return run, evaluation


@pytest.fixture
def run(made, tmp_path) -> Path:
    """The run, in a folder of the test's own."""
    return Path(shutil.copytree(made[0], tmp_path / "tuned"))


def script(cache: Path, *command: str, expect: int = 0, **variables: str) -> subprocess.CompletedProcess:
    done = processes.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, timeout=200,
        env={**os.environ, "HF_DATASETS_CACHE": str(cache), "HF_HOME": str(cache / "home"), **variables},
    )  # fmt: skip
    assert done.returncode == expect and "Traceback" not in done.stderr, f"{done.stdout[-2000:]}\n{done.stderr[-3000:]}"
    return done


def publish(cache: Path, hub: LoopbackHub, *flags: str, expect: int = 0) -> subprocess.CompletedProcess:
    return script(
        cache, "scripts/publish.py", *flags, expect=expect, HF_ENDPOINT=hub.endpoint, HF_HUB_OFFLINE="0",
        HF_HUB_DISABLE_XET="1", HF_TOKEN=WRITE_TOKEN,
    )  # fmt: skip


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_publish_again_and_with_a_new_tag(made, run, cache):
    evaluation = made[1]
    plain = (str(run), "--repo_id", "someone/tuned", "--evaluation", str(evaluation))
    flags = (*plain, "--license", "mit")
    with LoopbackHub() as hub:
        done = publish(cache, hub, *flags, "--private", "true", "--tag", "v1")
        assert f"Pushed: {hub.endpoint}/someone/tuned/tree/v1" in done.stdout
        assert "│ evaluation/report.html" in done.stdout
        repository = hub.repositories["models/someone/tuned"]
        assert repository.private and repository.messages == ["initial commit", "Publish"]
        files = repository.files("v1")
        assert files.keys() - {".gitattributes"} == {
            "README.md", "chat_template.jinja", "config.json", "generation_config.json", "loss.png",
            "model.safetensors", "run.json", "tokenizer.json", "tokenizer_config.json", "trainer_state.json",
            *(f"evaluation/{path.name}" for path in evaluation.iterdir() if path.name not in ("evaluation.json",)),
        }  # fmt: skip
        assert f"{len(files) - 1} files, " in done.stdout
        assert not (run / "training_args.bin").exists() and files["README.md"] == (run / "README.md").read_bytes()
        assert not any(WRITE_TOKEN.encode() in request.body for request in hub.requests)
        assert WRITE_TOKEN not in done.stdout + done.stderr
        card = ModelCard(files["README.md"].decode())
        assert card.data.license == "mit" and card.data.eval_results and "someone/tuned" in card.text

        hub.requests.clear()
        done = publish(cache, hub, *flags, "--private", "true", "--tag", "v1")
        assert f"Nothing left to push: {hub.endpoint}/someone/tuned/tree/v1" in done.stdout
        assert not hub.sent("PUT", "/lfs/") and not hub.sent("POST", "/commit/")

        with open(run / "README.md", "a", encoding="utf-8") as readme:
            readme.write("\nWritten by hand.\n")
        done = publish(cache, hub, *plain, "--card", "false", "--tag", "v1", expect=1)
        assert "--tag v1: someone/tuned has this tag on another commit" in done.stderr
        publish(cache, hub, *plain, "--card", "false", "--tag", "v2", "--revision", "next")
        assert repository.files("next")["README.md"].endswith(b"\nWritten by hand.\n")
        assert repository.files("main") == files


def test_a_dry_run_asks_nobody_and_writes_nothing(made, run, cache):
    before = contents(run)
    with LoopbackHub() as hub:
        done = publish(cache, hub, "--model", str(run), "--evaluation", str(made[1]), "--dry_run")
        assert hub.requests == []
    assert "│ model.safetensors" in done.stdout and "│ evaluation/metrics.json" in done.stdout
    assert "nothing was written, asked or sent" in done.stdout and "training_args.bin" not in done.stdout
    assert "README.md is written anew; --card false keeps" in done.stdout
    assert contents(run) == before


def test_mistakes_are_told(made, run, tmp_path):
    main = runpy.run_path(str(ROOT / "scripts" / "publish.py"))["main"]
    for flags, message in [
        ([], "which run\\?"),
        ([str(run)], "where to\\? add --repo_id owner/name"),
        ([str(run), "--repo_id", "tuned"], "where to\\? add --repo_id owner/name"),
        ([str(tmp_path / "none"), "--dry_run"], "none: no such folder"),
        (["--model", str(tmp_path / "none"), "--dry_run"], "none: no such folder"),
        ([str(run), "--evaluation", str(tmp_path / "none"), "--dry_run"], "none: no such folder"),
        (
            [str(run), "--card", "false", "--license", "mit", "--dry_run"],
            "none is written \\(--card false\\)",
        ),
        ([str(DEMO / "base"), "--language", "en", "--dry_run"], "no run.json in .*base"),
        ([str(run), "--license", WRITE_TOKEN, "--dry_run"], r"the new README\.md line \d+: holds a token of the Hub"),
        ([str(run), "--evaluation", str(tmp_path), "--dry_run"], "holds no scores; run the score stage"),
        ([str(run), "--repo_id", "someone/tuned"], "unset the `HF_HUB_OFFLINE`"),
    ]:
        with pytest.raises(UserError, match=message):
            main(flags)
    weights = (run / "model.safetensors").read_bytes()
    (run / "model.safetensors").write_bytes(weights[:-1] + bytes([weights[-1] ^ 1]))
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written .* or remove manifest\.json"):
        main([str(run), "--dry_run"])
    (run / "manifest.json").unlink()
    for flags in ([], ["--card", "false"]):
        with pytest.raises(UserError, match="with other weights"):
            main([str(run), "--evaluation", str(made[1]), "--dry_run", *flags])


def test_a_checkpoint_gets_no_card_of_the_finished_run(run, capsys):
    main = runpy.run_path(str(ROOT / "scripts" / "publish.py"))["main"]
    names = ("config.json", "model.safetensors", "trainer_state.json", "tokenizer.json", "tokenizer_config.json")
    checkpoint = run / "checkpoint-1"
    checkpoint.mkdir()
    for name in names:
        shutil.copy(run / name, checkpoint / name)
    main([str(checkpoint), "--dry_run"])
    assert "README.md" not in capsys.readouterr().out
    with pytest.raises(UserError, match="need a new card"):
        main([str(checkpoint), "--license", "mit", "--dry_run"])


def test_nothing_is_written_before_it_may_be_pushed(run, cache):
    before = contents(run)
    with LoopbackHub() as hub:
        done = publish(cache, hub, str(run), "--repo_id", "other/tuned", expect=1)
        assert "may not write there (403)" in done.stderr and contents(run) == before


def test_a_secret_stops_it_before_a_repository_is_made(run, cache):
    record = json.loads((run / "run.json").read_text())
    del record["sha256"]  # as an earlier version wrote it
    (run / "run.json").write_text(json.dumps({**record, "command": f"--hub_token {WRITE_TOKEN}"}))
    before = contents(run)
    with LoopbackHub() as hub:
        done = publish(cache, hub, str(run), "--repo_id", "someone/tuned", expect=1)
        assert hub.requests == [] and contents(run) == before
    note, *lines = done.stderr.splitlines()
    assert note == f"note: {run / 'run.json'} holds no hash of itself, so whether it was changed is not known"
    what = "holds a token of the Hub and the value of HF_TOKEN"
    assert re.fullmatch(rf"the new README\.md line \d+: {what}", lines.pop(1))  # which has the command
    assert lines == [
        f"error: {run / 'run.json'} line 1: {what}",
        "nothing was pushed: take it out of the file, or the file out of the folder",
    ]
    assert WRITE_TOKEN not in done.stdout
