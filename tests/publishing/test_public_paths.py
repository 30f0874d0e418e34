"""What a push sends names no folder of this machine; the files here keep theirs."""

import base64
import json
from pathlib import Path

import pytest

from recipe.publishing.hub import files_to_push, open_repository, push_files
from recipe.publishing.public_paths import _paths_in, _shortened, public_files, shorten_paths

pytest_plugins = ["hub_fixtures"]

HOME = "/home/zaphod.b"  # of a user, whose name is in no file of the tests otherwise
SHORT = {
    f"{HOME}/data/a b.jsonl": "…/a b.jsonl",
    "/home/J D/secret/x.json": "…/x.json",
    "/Users/zaphod/x.json": "…/x.json",
    "C:\\Users\\zaphod\\a.json": "…/a.json",
    "C:/Users/zaphod/a.json": "…/a.json",
    "~/zaphod/a.json": "…/a.json",
    "../../zaphod/a.json": "…/a.json",
    "/mnt/zaphod/models/base/": "…/base",
    HOME: "…/",
    f"x.py --data={HOME}/a.jsonl '/home/J D/x.json' --out=../zaphod/o": "x.py --data=…/a.jsonl '…/x.json' --out=…/o",
    f"['{HOME}/a.jsonl', '/x/zaphod']": "['…/a.jsonl', '…/zaphod']",
    f"cannot read {HOME}/x/y.json: no such file": "cannot read …/y.json: no such file",
    f"file://{HOME}/x": "file://…/x",
    f'{{"train": "{HOME}/a.jsonl"}}': '{"train": "…/a.jsonl"}',
    f"python x.py --output_dir {HOME}": "python x.py --output_dir …/",
    f"python x.py --output_dir={HOME}/ --seed 1": "python x.py --output_dir=…/ --seed 1",
    f"in '{HOME}', \"{HOME}\", ({HOME})": "in '…/', \"…/\", (…/)",
    f"in {HOME}, {HOME}/x and {HOME}": "in …/, …/x and …/",
    f"file://{HOME}": "file://…/",
    f"file://localhost{HOME}/x": "file://localhost…/x",
    "file:///C:/Users/zaphod/x": "file://…/x",
    "file:///Users/zaphod": "file://…/",
    "C:\\Users\\zaphod": "…/",
    "C:\\users\\zaphod\\": "…/",
    "in D:/Users/zaphod or /Users/zaphod": "in …/ or …/",
    "~zaphod": "…/",
    "~zaphod/": "…/",
    "from /mnt/c/Users/zaphod and /var/home/zaphod": "from …/ and …/",
    "\\\\server\\Users\\zaphod": "…/",
    "/data/users/records.jsonl": "…/records.jsonl",
    f"'--output_dir={HOME}/J D/x y' --seed 1": "'--output_dir=…/x y' --seed 1",
    "/data/a.jsonl, https://example.org/data/a.jsonl": "…/a.jsonl, https://example.org/data/a.jsonl",
    "see /data/a.jsonl as my/data/a.jsonl, ./data/a.jsonl": "see …/a.jsonl as my/data/a.jsonl, ./data/a.jsonl",
    f"{HOME}/a.jsonl {HOME}/b.jsonl": "…/a.jsonl …/b.jsonl",
    "in /x/base/ is /x/base/config.json": "in …/base is …/config.json",
}
# a text in which these paths were found elsewhere
FOUND = {
    ("/home/zaphod", "/home/zaphod.b and /home/zaphods, /home/zaphod/x"): "/home/zaphod.b and /home/zaphods, …/x",
    ("/x/base/", "/x/base/config.json and /x/base/"): "…/base/config.json and …/base",
    ("/x/out", "/x/out/report.html, /x/out2"): "…/out/report.html, …/out2",
    ("/x/y", '{"a": "see \\"/x/y\\"\\n/x/y\\n"}'): '{"a": "see \\"…/y\\"\\n…/y\\n"}',
    ("C:\\Users\\zaphod\\", '"C:\\\\Users\\\\zaphod\\\\"'): '"…/"',
    ("/x/a b", "<code>&#x27;/x/a b&#x27;</code>"): "<code>&#x27;…/a b&#x27;</code>",
}  # fmt: skip
KEPT = [
    "recipe/demo/base", "outputs/demo", "openai-community/gpt2", "https://huggingface.co/a/b/c", "a/b/c 1/2/3",
    "and / or / not", "{{ '</s>' }}</s>/x", "<|user|>", "50/100", "data/*.jsonl", "N/A", "/", "about ~ten minutes",
    "http://127.0.0.1:1/v1#m", "https://example.org/home/someone", "https://example.org:80/Users/someone/x", "./home/x",
]  # fmt: skip


@pytest.mark.parametrize("text", SHORT)
def test_paths_outside_are_shortened(text):
    assert shorten_paths(text) == SHORT[text]


@pytest.mark.parametrize(("path", "text"), FOUND)
def test_a_path_that_was_found_elsewhere_is_shortened(path, text):
    assert _shortened(text, _paths_in(path)) == FOUND[path, text]


@pytest.mark.parametrize("text", KEPT)
def test_all_else_stays(text):
    assert shorten_paths(text) == text


def described(folder: Path) -> None:
    """Write into a folder what names a place outside of it, in every file that a push may send."""
    run = json.loads((folder / "run.json").read_text()) | {"command": f"python scripts/train.py --data {HOME}/a.jsonl"}
    run["config"] = {"data": {"data": {"train": f"{HOME}/a.jsonl", "test": [f"{HOME}/é b.jsonl"]}}}
    (folder / "run.json").write_text(json.dumps(run, indent=2, ensure_ascii=False))
    for name, key in (("trainer_state.json", "best_model_checkpoint"), ("tokenizer_config.json", "auto_map")):
        content = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(content | {key: f"{HOME}/outputs/checkpoint-2"}))
    (folder / "README.md").write_text(f"---\ntags: []\n---\nMade from {HOME}/a.jsonl.\n", encoding="utf-8")


def test_no_file_of_a_push_names_the_folder(hub, folder, tmp_path):
    described(folder)
    evaluation = tmp_path / "evaluation"
    evaluation.mkdir()
    provenance = {"data": f"{HOME}/é b.jsonl", "models": {"tuned": {"name": f"{HOME}/out"}}}
    (evaluation / "metrics.json").write_text(json.dumps({"provenance": provenance}))
    (evaluation / "report.html").write_text(f"<code>--data &#x27;{HOME}/é b.jsonl&#x27;</code> {HOME}/out")
    (evaluation / "predictions.jsonl").write_text(json.dumps({"instruction": "Where is /home/data/x?"}))
    files = files_to_push(folder, evaluation)
    before = {path: file.read_bytes() for path, file in files.items()}
    pushed = push_files(files, open_repository("someone/model"), message="Publish")
    assert pushed.sent and {path: file.read_bytes() for path, file in files.items()} == before
    sent = public_files(files)
    assert sum(isinstance(content, bytes) for content in sent.values()) == 6
    lines = [json.loads(line) for request in hub.sent("POST", "/commit/") for line in request.body.splitlines()]
    bodies = [base64.b64decode(line["value"]["content"]) for line in lines if line["key"] == "file"]
    assert len(bodies) > 6 and not [body for body in [*bodies, *(r.body for r in hub.requests)] if b"zaphod" in body]
    contents = {path: content if isinstance(content, bytes) else content.read_bytes() for path, content in sent.items()}
    assert not [path for path, content in contents.items() if b"zaphod" in content]
    assert json.loads(contents["run.json"])["config"]["data"]["data"] == {"train": "…/a.jsonl", "test": ["…/é b.jsonl"]}
    assert contents["evaluation/predictions.jsonl"] == before["evaluation/predictions.jsonl"]
    assert push_files(files, "someone/model", message="Again").sent is False
