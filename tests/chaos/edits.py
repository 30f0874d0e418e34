"""Ways in which a file can be another than the one that was written: edited by hand, damaged, replaced."""

import copy
import json
import os
import random
from pathlib import Path

DEEP, LONG, PLACE = 100_000, 5_000, "@place@"
VALUES = {  # in the place of one; texts that are no JSON of Python's own writing are put in afterwards
    "null": None, "true": True, "false": False, "zero": 0, "minus one": -1, "a fraction": 0.5, "too large": 1e308,
    "a text": "text", "an empty text": "", "a list": [], "an object": {}, "a list of lists": [[1]],
    "half a character": "\ud83d", "a list of objects": [{"a": 1}],
}  # fmt: skip
RAW = {
    "NaN": "NaN", "Infinity": "-Infinity", "a long number": "1" * LONG, "many digits": "1" * 4000,
    "a float without end": "1e999", "deep nesting": "[" * DEEP + "]" * DEEP,
    "some nesting": '{"a":' * 900 + "1" + "}" * 900,
    "a name twice": None,
}  # fmt: skip
BYTES = (
    "flipped bits", "flipped digit", "cut off", "emptied", "a space", "nulls", "BOM", "CRLF", "invalid UTF-8", "UTF-16",
    "a tail", "another file",
)  # fmt: skip
PLACES = ("removed", "a folder", "a link to itself", "a pipe", "a link to nothing")
TREES = (*VALUES, *RAW, "a name removed", "a name changed", "a foreign name", "another number", "another text")
ROWS = (
    "a row twice",
    "rows in another order",
    "a row removed",
    "half of the rows",
    "a row of another",
    "values swapped",
)


def possible(file: str) -> list[str]:
    """The edits that a file of this name can have; those of values more often."""
    if file.endswith(".json"):
        return [*BYTES, *PLACES, *TREES, *TREES]
    if file.endswith(".jsonl"):
        return [*BYTES, *PLACES, *TREES, *TREES, *ROWS]
    return [*BYTES, *PLACES]


def apply(path: Path, edit: str, draw: random.Random, unsealed: bool = False, other: Path | None = None) -> None:
    """Edit a file as the name of the edit says."""
    content = path.read_bytes()
    path.unlink()  # not written into: the file may be that of another folder, too
    if edit in PLACES:
        replace(path, edit)
        return
    if unsealed:
        values = json.loads(content)
        values.pop("sha256", None)
        content = json.dumps(values, indent=2, ensure_ascii=False).encode()
    is_lines = path.suffix == ".jsonl"
    if edit in BYTES:
        content = edit_bytes(content, edit, draw)
    elif edit in ROWS:
        content = edit_rows(content, edit, draw)
    elif is_lines:
        lines = [line for line in content.splitlines() if line.strip()]
        number = draw.randrange(len(lines))
        lines[number] = edit_tree(lines[number], edit, draw, indent=None)
        content = b"\n".join(lines) + b"\n"
    else:
        content = edit_tree(content, edit, draw, indent=2)
    path.write_bytes(content)


def replace(path: Path, edit: str) -> None:
    if edit == "a folder":
        path.mkdir()
    elif edit == "a link to itself":
        path.symlink_to(path.name)
    elif edit == "a link to nothing":
        path.symlink_to("nothing")
    elif edit == "a pipe":
        os.mkfifo(path)


def edit_bytes(content: bytes, edit: str, draw: random.Random) -> bytes:
    place = draw.randrange(max(1, len(content)))
    if edit == "flipped bits":
        changed = bytearray(content)
        for _ in range(draw.choice((1, 1, 8))):
            changed[draw.randrange(min(len(changed), 100_000))] ^= 1 << draw.randrange(8)
        return bytes(changed)
    if edit == "flipped digit":
        digits = [index for index, byte in enumerate(content[:200_000]) if 48 <= byte <= 57] or [0]
        place = draw.choice(digits)
        return content[:place] + bytes([48 + (content[place] - 47) % 10]) + content[place + 1 :]
    if edit == "CRLF":
        return content.replace(b"\n", b"\r\n")
    if edit == "UTF-16":
        return content.decode("utf-8", "replace").encode("utf-16")
    changed = {
        "cut off": content[:place], "emptied": b"", "a space": b" \n", "nulls": content[:place] + bytes(64),
        "BOM": b"\xef\xbb\xbf" + content, "invalid UTF-8": content[:place] + b"\xff\xfe\x80" + content[place:],
        "a tail": content + b"\n}", "another file": b"\x89PNG\r\n\x1a\n" + bytes(100),
    }  # fmt: skip
    return changed[edit]


def paths_in(value, path=()) -> list[tuple]:
    """Where the values of a JSON value stand; itself too."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(found for key, each in inner for found in paths_in(each, (*path, key)))]


def edit_tree(content: bytes, edit: str, draw: random.Random, indent: int | None) -> bytes:
    """One value replaced, in JSON."""
    tree = {"": json.loads(content)}
    kinds = {"another number": (int, float), "another text": (str,), "a name twice": (dict,), "a foreign name": (dict,)}
    paths = [path for path in paths_in(tree) if path]
    if edit in kinds:
        fitting = [path for path in paths if type(get(tree, path)) in kinds[edit]]
        paths = fitting or paths
    elif edit in ("a name removed", "a name changed"):
        paths = [path for path in paths if len(path) > 1 and isinstance(path[-1], str)] or paths
    depth = draw.choice(sorted({min(len(path), 4) for path in paths}))  # values near the top are few, and matter
    path = draw.choice([path for path in paths if min(len(path), 4) == depth])
    parent, key, value = get(tree, path[:-1]), path[-1], get(tree, path)
    if edit == "a name removed":
        del parent[key]
    elif edit == "a name changed":
        parent[f"{key}_"] = parent.pop(key)
    elif edit == "a foreign name" and isinstance(value, dict):
        value["foreign"] = {"a": [1]}
    elif edit == "another number" and isinstance(value, int | float):
        parent[key] = value + draw.choice((1, 0.25, 1000, -1))
    elif edit == "another text" and isinstance(value, str):
        parent[key] = f"{value} more"
    else:
        parent[key] = copy.deepcopy(VALUES[edit]) if edit in VALUES else PLACE
    text = json.dumps(tree.get("", {}), indent=indent, ensure_ascii="half" in edit)
    raw = RAW.get(edit) or json.dumps(value)
    if edit == "a name twice" and isinstance(value, dict):
        raw = json.dumps({f"{PLACE}{number}": 1 for number in (1, 2)} | value).replace(f"{PLACE}2", f"{PLACE}1")
    return text.replace(f'"{PLACE}"', raw).encode()


def get(tree, path: tuple):
    for key in path:
        tree = tree[key]
    return tree


def edit_rows(content: bytes, edit: str, draw: random.Random) -> bytes:
    lines = [line for line in content.splitlines() if line.strip()]
    number = draw.randrange(len(lines))
    if edit == "a row twice":
        lines.insert(draw.randrange(len(lines)), lines[number])
    elif edit == "rows in another order":
        draw.shuffle(lines)
    elif edit == "a row removed":
        del lines[number]
    elif edit == "half of the rows":
        del lines[len(lines) // 2 :]
    else:
        row, second = (json.loads(lines[index]) for index in (number, number - 1))
        if edit == "a row of another":
            row |= {"id": "elsewhere/7"}
            lines.append(json.dumps(row).encode())
        else:
            key = draw.choice([key for key in row if row[key] != second.get(key)] or [*row])
            row[key], second[key] = second.get(key), row[key]
            lines[number], lines[number - 1] = json.dumps(row).encode(), json.dumps(second).encode()
    return b"\n".join(lines) + b"\n"
