"""Opens files, here or on the Hub; what a file is that should be text and is not, by its first bytes."""

from __future__ import annotations

from typing import BinaryIO

import fsspec

SAVE = "save it as UTF-8 (in Excel: CSV UTF-8)"
BEGINNINGS = {  # the longer before the shorter that it begins with
    b"\xff\xfe\x00\x00": f"is UTF-32 text, not UTF-8; {SAVE}",
    b"\x00\x00\xfe\xff": f"is UTF-32 text, not UTF-8; {SAVE}",
    b"\xff\xfe": f"is UTF-16 text, not UTF-8; {SAVE}",
    b"\xfe\xff": f"is UTF-16 text, not UTF-8; {SAVE}",
    b"\x1f\x8b": "is not UTF-8 text: it is compressed with gzip; unpack it",
    b"\x28\xb5\x2f\xfd": "is not UTF-8 text: it is compressed with zstd; unpack it",
    b"\xfd7zXZ\x00": "is not UTF-8 text: it is compressed with xz; unpack it",
    b"BZh": "is not UTF-8 text: it is compressed with bzip2; unpack it",
    b"PK\x03\x04": "is not UTF-8 text: it is a zip archive or an Excel file; unpack it, or save it as CSV UTF-8",
    b"PAR1": "is not UTF-8 text: it is a Parquet file; give it the ending .parquet",
}


def not_text(start: bytes) -> str | None:
    """Why a file that begins so is not UTF-8 text, and what to do; None if it may be.

    >>> not_text("instruction".encode("utf-16"))
    'is UTF-16 text, not UTF-8; save it as UTF-8 (in Excel: CSV UTF-8)'
    """
    for beginning, said in BEGINNINGS.items():
        if start.startswith(beginning) and not (beginning == b"BZh" and start[4:10] != b"1AY&SY"):
            return said
    zeros = [byte == 0 for byte in start[:4]]  # of Latin letters, UTF-16 has each other byte zero
    return BEGINNINGS[b"\xff\xfe"] if zeros in ([True, False] * 2, [False, True] * 2) else None


def open_bytes(path: str) -> BinaryIO:
    """A file to read from: a path, or an address such as `hf://datasets/owner/name/train.jsonl`, read as it comes."""
    return fsspec.open(path, "rb").open() if "://" in path else open(path, "rb")
