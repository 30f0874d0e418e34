"""Which files hold the records of which split: files, globs, folders, Hub datasets, folders of `save_to_disk`."""

from __future__ import annotations

import difflib
import glob
import os
import re
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath

from datasets import Dataset, DatasetDict, DownloadManager, load_dataset, load_dataset_builder, load_from_disk
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError

from recipe.config import UserError
from recipe.data.columns import Columns
from recipe.data.readers import read_dataset, read_file

# by file name extension, in any case; the reader of each is in recipe/data/readers.py
FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
# data too, but not read: they are named when a folder has them
OTHER_DATA = {".tsv", ".txt", ".xlsx", ".xls", ".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".feather", ".pkl"}
SPLITS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev", "devel", "development", "eval", "evaluation"),
    "test": ("test", "testing", "tests"),
}
ALIASES = {alias: split for split, aliases in SPLITS.items() for alias in aliases}
SHARD = re.compile(r"(.+)-\d{5}-of-\d{5}(-.*)?")  # how the Hub names the files of a split

Read = Callable[[Columns], Dataset]  # the records with the columns that are needed
Source = dict[str, list[tuple[str, Read]]]  # by split: the name of each file, and how it is read


def find_source(source: str | list[str], notes: list[str]) -> Source:
    """The files of a source by split, not yet read; appends to `notes` what is left out.

    Raises:
        UserError: no such file, folder or dataset, or a format that is not known.
    """
    patterns = [source] if isinstance(source, str) else source
    name = patterns[0]
    if all(Path(pattern).is_dir() for pattern in patterns):
        if saved := [pattern for pattern in patterns if _is_saved_to_disk(Path(pattern))]:
            return _saved_to_disk(saved[0]) if len(patterns) == 1 else _one_saved_only(saved[0])
        return _as_source(_files_by_split(patterns, notes))
    if len(patterns) > 1 or Path(name).is_file() or _kind(name) or glob.escape(name) != name:
        return _as_source({"train": [file for pattern in patterns for file in _expand(pattern)]})
    try:
        return _on_the_hub(name, notes)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"data {name!r}: not a file here, and no dataset that datasets can load ({error}); check the name, "
            "run `hf auth login` if it is private, or give a .json, .jsonl, .csv or .parquet file"
        ) from error


def split_name(name: str) -> str:
    """The split that a name means: `val`, `dev` and `validation_sft` are `validation`; other names stay.

    >>> [split_name(name) for name in ("Valid", "train_sft", "test_unseen")]
    ['validation', 'train', 'test_unseen']

    Raises:
        UserError: it is close to one of the names, but none of them.
    """
    plain = name.lower().removesuffix("_sft")
    if plain in ALIASES:
        return ALIASES[plain]
    near = difflib.get_close_matches(plain, ALIASES, n=1, cutoff=0.8)
    near = near or [alias for alias in ALIASES if sorted(alias) == sorted(plain)]
    if near and not plain.startswith(near[0]):
        raise UserError(f"data, split {name!r}: did you mean {near[0]!r}? a split of its own needs a name of its own")
    return name


def _as_source(files_by_split: Mapping[str, list[str]]) -> Source:
    return {split: [_local_file(file) for file in files] for split, files in files_by_split.items()}


def _local_file(file: str) -> tuple[str, Read]:
    kind = _kind(file)
    return file, lambda columns: read_file(file, kind, columns)


def _kind(name: str) -> str:
    return FORMATS.get(PurePosixPath(name).suffix.lower(), "")


def _expand(pattern: str) -> list[str]:
    """The files that a name or a glob stands for."""
    is_file = Path(pattern).is_file()
    files = [pattern] if is_file else sorted(filter(os.path.isfile, glob.glob(pattern, recursive=True)))
    if not files:
        folder = Path(pattern).parent
        near = difflib.get_close_matches(Path(pattern).name, [file.name for file in folder.glob("*")], n=1)
        hint = f"; did you mean {str(folder / near[0])!r}?" if near else ""
        raise UserError(f"data {pattern!r}: no such file{hint}")
    for file in files:
        if not _kind(file):
            hint = "; save it with commas, as .csv" if file.lower().endswith(".tsv") else ""
            raise UserError(f"data {file!r}: unknown format; give one of {', '.join(FORMATS)}{hint}")
        if _is_saved_to_disk(Path(file).parent):
            raise UserError(f"data {file!r}: part of a folder of save_to_disk; give the folder {Path(file).parent}")
    return files


def _files_by_split(folders: list[str], notes: list[str]) -> dict[str, list[str]]:
    """The files of folders by the split that their names give, as on the Hub: train.jsonl, data/test-00000.parquet."""
    found: dict[str | None, list[str]] = {}
    others = []
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            inner = path.relative_to(folder)
            if not path.is_file() or any(part.startswith((".", "__")) for part in inner.parts):
                continue
            if _kind(path.name):
                found.setdefault(_split_of_file(inner), []).append(str(path))
            elif path.suffix.lower() in OTHER_DATA:
                others.append(str(path))
    if not found:
        raise UserError(f"data {', '.join(folders)}: no files in a known format; give one of {', '.join(FORMATS)}")
    unnamed = found.pop(None, [])
    if not found:
        found, unnamed = {"train": unnamed}, []
    if left_out := [*unnamed, *others]:
        notes.append(f"not read: {', '.join(left_out)} (no split in the name, or another format)")
    order = dict.fromkeys([*SPLITS, *filter(None, found)])
    return {split: found[split] for split in order if split in found}


def _split_of_file(path: Path) -> str | None:
    """The split that a file's name gives, or else that of its folder; None if neither does."""
    for part in (path.stem, *reversed(path.parts[:-1])):
        if shard := SHARD.fullmatch(part):
            return split_name(shard[1])
        words = re.split(r"[^a-z]+", part.lower())
        for word in words:
            if word in ALIASES:
                return ALIASES[word]
    return None


# --- Hub and save_to_disk -------------------------------------------------------------------------------------------


def _on_the_hub(name: str, notes: list[str]) -> Source:
    """The files of a Hub dataset, downloaded; what no reader of ours knows is loaded by `datasets`."""
    builder = load_dataset_builder(name)
    data_files = builder.config.data_files or {}
    urls = {str(split): list(map(str, files)) for split, files in data_files.items()}
    if not urls or not all(_kind(url) for files in urls.values() for url in files):
        return {
            split: [_loaded(f"{name} {split}", dataset)]
            for split, dataset in _by_meaning(load_dataset(name), name, notes).items()
        }
    urls = _by_meaning(urls, name, notes)
    manager = DownloadManager(dataset_name=name)
    return {
        split: [
            _downloaded(f"{name} {PurePosixPath(url).name}", path, _kind(url))
            for url, path in zip(files, manager.download(files), strict=True)
        ]
        for split, files in urls.items()
    }


def _by_meaning(by_split: Mapping, name: str, notes: list[str]) -> dict:
    """The splits under the names they mean; beside `train_sft`, others such as `train_gen` are left out."""
    if any(str(split).lower() == "train_sft" for split in by_split):
        others = [str(split) for split in by_split if not str(split).lower().endswith("_sft")]
        if others:
            notes.append(f"{name}: splits for other ways of training are not read: {', '.join(others)}")
        by_split = {split: value for split, value in by_split.items() if str(split) not in others}
    return merge_splits({str(split): value for split, value in by_split.items()}, name)


def merge_splits(by_split: Mapping, subject: str) -> dict:
    """Splits under the names they mean.

    Raises:
        UserError: two names mean the same split.
    """
    named: dict[str, str] = {}
    for name in by_split:
        meaning = split_name(name)
        if meaning in named:
            raise UserError(f"{subject}: {named[meaning]!r} and {name!r} both mean the {meaning} split; keep one")
        named[meaning] = name
    return {meaning: by_split[name] for meaning, name in named.items()}


def _downloaded(name: str, path: str, kind: str) -> tuple[str, Read]:
    return name, lambda columns: read_file(path, kind, columns)


def _loaded(name: str, dataset: Dataset) -> tuple[str, Read]:
    return name, lambda columns: read_dataset(dataset, columns)


def _is_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _saved_to_disk(folder: str) -> Source:
    try:
        loaded = load_from_disk(folder)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"data {folder!r}: a folder of save_to_disk that cannot be loaded ({error})") from error
    if not isinstance(loaded, DatasetDict):
        return {"train": [_loaded(folder, loaded)]}
    splits: Iterable[tuple[str, Dataset]] = merge_splits(loaded, f"data {folder!r}").items()
    return {split: [_loaded(f"{folder} {split}", dataset)] for split, dataset in splits}


def _one_saved_only(folder: str) -> Source:
    raise UserError(f"data {folder!r}: a folder of save_to_disk; give it alone, or save the data as Parquet")
