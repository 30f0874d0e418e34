"""Files that are written whole or not at all."""

import resource

import pytest
from matplotlib.figure import Figure

from recipe.figures import save_png
from recipe.provenance import write_whole


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
