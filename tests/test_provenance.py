"""Files that are written whole or not at all."""

import resource
import sys

import pytest
from matplotlib.figure import Figure

from recipe.figures import save_png
from recipe.files import write_whole
from recipe.provenance import command_line


@pytest.fixture
def little_room():
    """No file of this process may be longer than 1,000 bytes: writing fails as on a full disk, in the middle."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("content", ["é" * 2000, b"\0" * 2000])
def test_what_does_not_fit_leaves_the_earlier_file_whole(tmp_path, little_room, content):
    path = tmp_path / "file"
    write_whole(path, "earlier")
    with pytest.raises(OSError, match="file"):
        write_whole(path, content)
    assert path.read_text(encoding="utf-8") == "earlier" and list(tmp_path.iterdir()) == [path]
    write_whole(path, b"later")
    assert path.read_bytes() == b"later"


def test_a_picture_is_whole_or_not_there(tmp_path, little_room):
    with pytest.raises(OSError, match=r"figure\.png"):
        save_png(Figure(), tmp_path / "figure.png", dpi=200)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["t.py", "--hub_token", "s3cret", "--seed", "1"], "t.py --hub_token '<HUB_TOKEN>' --seed 1"),
        (["t.py", "--hub-token=s3cret"], "t.py '--hub-token=<HUB_TOKEN>'"),
        (["t.py", "--judge_api_key", "s3cret", "x"], "t.py --judge_api_key '<JUDGE_API_KEY>' x"),
        (["t.py", "--hub_token", "--seed", "1"], "t.py --hub_token --seed 1"),
        (["t.py", "--note", "my hf_" + "a" * 34], "t.py --note 'my <HUB_TOKEN>'"),
        (["t.py", "--data", "https://me:s3cret@host/a.json"], "t.py --data https://host/a.json"),
        (["t.py", "--data", "https://me:s3/cr?et@host/a.json"], "t.py --data https://host/a.json"),
        (["t.py", "--data=https://me@host/a?b=1&sig=s3cret"], "t.py '--data=https://host/a?b=1&sig=***'"),
        (["t.py", "--judge", "http://host:8000/v1#a@b"], "t.py --judge 'http://host:8000/v1#a@b'"),
        (["t.py", "--max_tokens_per_batch", "512", "--tokenizer_name", "b"],
         "t.py --max_tokens_per_batch 512 --tokenizer_name b"),
    ],
)  # fmt: skip
def test_the_command_line_is_kept_without_its_secrets(monkeypatch, words, line):
    monkeypatch.setattr(sys, "argv", words)
    assert command_line().split(" ", 1)[1] == line
