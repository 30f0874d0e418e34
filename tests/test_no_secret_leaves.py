"""An evaluation and a push with three secrets, which the endpoints send back in all spellings: none is anywhere."""

import json
import os
import subprocess
import sys

import processes
from conftest import DEMO, ROOT
from loopback_hub import WRITE_TOKEN, LoopbackHub
from secret_samples import SECRETS, spellings
from stub_endpoint import Say, Status, serve_stub

LEAKS = {f"{name}, {kind}": text for name, (_, key) in SECRETS.items() for kind, text in spellings(key).items()}
ECHO = "\n".join(f"[{text}]" for text in LEAKS.values())


def run(*command: str, **variables: str) -> subprocess.CompletedProcess:
    secrets = {name: raw for name, (raw, _) in SECRETS.items()}
    done = processes.run(
        [sys.executable, *command], cwd=ROOT, capture_output=True, text=True, encoding="utf-8", timeout=200,
        env={**os.environ, "PYTHONUTF8": "1", "HF_TOKEN": WRITE_TOKEN, **secrets, **variables},
    )  # fmt: skip
    assert "Traceback" not in done.stderr, done.stderr[-3000:]
    return done


def leaks(text: str) -> list[str]:
    return [name for name, leak in LEAKS.items() if leak in text] + ["HF_TOKEN"] * (WRITE_TOKEN in text)


def test_none_is_in_any_file_or_message_or_request(tmp_path):
    records = [{"instruction": f"do:{name} {ECHO[:2000]}", "input": "", "output": "a"} for name in ("bad", "odd", "ok")]
    (tmp_path / "records.json").write_text(json.dumps(records), encoding="utf-8")
    evaluation, base = tmp_path / "evaluation", str(DEMO / "base")
    bad = Status(400, body=json.dumps({"error": {"message": f"Illegal header: {ECHO}"}}))
    script = {"": [Say("85")], "bad": [bad], "odd": [Say(ECHO)], "ok": [Say("85")]}
    with serve_stub({"": [Say(f"the answer is {ECHO}")]}) as model, serve_stub(script) as judge:
        done = run(
            "scripts/eval.py", "--model", f"{model.url}#m", "--data", str(tmp_path / "records.json"), "--split", "all",
            "--judge", f"{judge.url}#j", "--output_dir", str(evaluation),
        )  # fmt: skip
        assert set(judge.keys + model.keys) == {f"Bearer {SECRETS['OPENAI_API_KEY'][1]}"}
    assert done.returncode == 1 and "the judge left scores out" in done.stderr
    assert "OPENAI_API_KEY: left out a line break around it" in done.stderr
    assert leaks(done.stdout + done.stderr) == []
    files = {path.name: path.read_bytes().decode("utf-8", "replace") for path in evaluation.iterdir()}
    assert {"judge.jsonl", "judge_cache.jsonl", "metrics.json", "predictions.jsonl", "report.html"} <= files.keys()
    assert {name: leaks(text) for name, text in files.items() if leaks(text)} == {}
    assert files["judge.jsonl"].count("***") > 10 and files["predictions.jsonl"].count("***") > 10
    for line in files["predictions.jsonl"].splitlines() + files["judge.jsonl"].splitlines():
        json.loads(line)

    with LoopbackHub() as hub:
        address = {"HF_ENDPOINT": hub.endpoint, "HF_HUB_OFFLINE": "0", "HF_HUB_DISABLE_XET": "1"}
        flags = ("--evaluation", str(evaluation), "--repo_id", "someone/model")
        pushed = run("scripts/publish.py", base, *flags, **address, HF_TOKEN=f"“{WRITE_TOKEN}”\r")
        assert pushed.returncode == 0 and "Pushed: " in pushed.stdout, pushed.stderr
        assert leaks(pushed.stdout + pushed.stderr) == []
        assert [leaks(request.path + request.body.decode("utf-8", "replace")) for request in hub.requests if leaks(
            request.path + request.body.decode("utf-8", "replace"))] == []  # fmt: skip
