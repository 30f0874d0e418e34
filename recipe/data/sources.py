"""Which files hold the records of which split: files, globs, folders, Hub datasets, folders of `save_to_disk`."""

from __future__ import annotations

import difflib
import glob
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path, PurePosixPath
from typing import NamedTuple

from datasets import (
    Dataset,
    DatasetBuilder,
    DatasetDict,
    DownloadManager,
    get_dataset_config_names,
    load_dataset,
    load_dataset_builder,
    load_from_disk,
)
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from huggingface_hub import CacheNotFound, scan_cache_dir

from recipe.config import UserError
from recipe.data.columns import Columns
from recipe.data.readers import read_dataset, read_file
from recipe.data.split_names import by_meaning, file_split, only_test, split_name

# by file name extension, in any case; the reader of each is in recipe/data/readers.py
FORMATS = {".json": "json", ".jsonl": "json", ".ndjson": "json", ".csv": "csv", ".parquet": "parquet"}
# data too, but not read: they are named when a folder has them
OTHER_DATA = {".tsv", ".txt", ".xlsx", ".xls", ".gz", ".zst", ".xz", ".bz2", ".zip", ".arrow", ".feather", ".pkl"}


class File(NamedTuple):
    """A file of records: what it is called, and how it is read. `path` and `kind` are None for what is no file."""

    name: str
    read: Callable[[Columns], Dataset]  # the records with the columns that are needed
    path: str | None = None
    kind: str | None = None


Files = dict[str, list[File]]  # by split


def find_source(source: str | list[str], notes: list[str], download: bool = True) -> Files:
    """The files of a source by split, not yet read; appends to `notes` what is left out.

    Without `download`, files on the Hub have their address for a path, and are read as they come.

    Raises:
        UserError: no such file, folder or dataset, or a format that is not known.
    """
    patterns = [source] if isinstance(source, str) else source
    name = patterns[0]
    if all(Path(pattern).is_dir() for pattern in patterns):
        if saved := [pattern for pattern in patterns if _is_saved_to_disk(Path(pattern))]:
            return _saved_to_disk(saved[0], notes) if len(patterns) == 1 else _one_saved_only(saved[0])
        return _as_source(_files_by_split(patterns, notes))
    if len(patterns) > 1 or Path(name).is_file() or Path(name).is_symlink() or _kind(name) or glob.escape(name) != name:
        return _as_source({"train": [file for pattern in patterns for file in _expand(pattern)]})
    try:
        return _on_the_hub(name, notes, download)
    except (DatasetNotFoundError, DatasetGenerationError, ConnectionError, FileNotFoundError, ValueError) as error:
        raise UserError(
            f"data {name!r}: not a file here, and no dataset that datasets can load ({error}); check the name, "
            "run `hf auth login` if it is private, or give a .json, .jsonl, .csv or .parquet file"
        ) from error


def _as_source(files_by_split: Mapping[str, list[str]]) -> Files:
    return {split: [_local_file(file) for file in files] for split, files in files_by_split.items()}


def _local_file(file: str) -> File:
    return _file(file, file, _kind(file))


def _kind(name: str) -> str:
    return FORMATS.get(PurePosixPath(name).suffix.lower(), "")


def _expand(pattern: str) -> list[str]:
    """The files that a name or a glob stands for."""
    path = Path(pattern)
    if path.is_dir():
        raise UserError(
            f"data {pattern!r}: a folder in a list with files; give the files of the folder ({path / '*.jsonl'}), or "
            "folders only"
        )
    found = [pattern] if path.is_file() or path.is_symlink() else sorted(glob.glob(pattern, recursive=True))
    _refuse_broken_links(found)
    files = list(filter(os.path.isfile, found))
    if not files:
        folder = path.parent
        near = difflib.get_close_matches(path.name, [file.name for file in folder.glob("*")], n=1)
        hint = f"; did you mean {str(folder / near[0])!r}?" if near else ""
        raise UserError(f"data {pattern!r}: no such file{hint}")
    for file in files:
        if not _kind(file):
            hint = "; save it with commas, as .csv" if file.lower().endswith(".tsv") else ""
            hint = "; unpack it" if file.lower().endswith((".gz", ".zst", ".xz", ".bz2", ".zip")) else hint
            raise UserError(f"data {file!r}: unknown format; give one of {', '.join(FORMATS)}{hint}")
        if _is_saved_to_disk(Path(file).parent):
            raise UserError(f"data {file!r}: part of a folder of save_to_disk; give the folder {Path(file).parent}")
    return files


def _refuse_broken_links(paths: Iterable[str | Path]) -> None:
    """Refuse a link to a file that is not there: left out, its records would be missing without a word."""
    for path in map(Path, paths):
        if path.is_symlink() and not path.exists():
            raise UserError(f"data {str(path)!r}: a link to {str(path.readlink())!r}, where there is nothing")


def _files_by_split(folders: list[str], notes: list[str]) -> dict[str, list[str]]:
    """The files of folders by the split that their names give, as on the Hub: train.jsonl, data/test-00000.parquet."""
    found: dict[str | None, list[str]] = {}
    others = []
    for folder in folders:
        for path in sorted(Path(folder).rglob("*")):
            inner = path.relative_to(folder)
            if any(part.startswith((".", "__")) for part in inner.parts):
                continue
            if _kind(path.name):
                _refuse_broken_links([path])
            if not path.is_file():
                continue
            if _kind(path.name):
                found.setdefault(file_split(inner), []).append(str(path))
            elif path.suffix.lower() in OTHER_DATA:
                others.append(str(path))
    if not found:
        raise UserError(f"data {', '.join(folders)}: no files in a known format; give one of {', '.join(FORMATS)}")
    where = f"data {', '.join(folders)}"
    unnamed = found.pop(None, [])
    if not found:
        found, unnamed = {"train": unnamed}, []
    for file in unnamed:
        split_name(Path(file).stem, where)  # refuses a misspelt one
    if left_out := [*unnamed, *others]:
        notes.append(f"not read: {', '.join(left_out)} (no split in the name, or another format)")
    return by_meaning(only_test({name: files for name, files in found.items() if name is not None}), where, notes)


# --- Hub and save_to_disk -------------------------------------------------------------------------------------------


def _on_the_hub(name: str, notes: list[str], download: bool) -> Files:
    """The files of a Hub dataset, downloaded; what no reader of ours knows is loaded by `datasets`."""
    builder = _builder(name)
    data_files = builder.config.data_files or {}
    urls = {str(split): list(map(str, files)) for split, files in data_files.items()}
    if not urls or not all(_kind(url) for files in urls.values() for url in files):
        return {
            split: [_loaded(f"{name} {split}", dataset)]
            for split, dataset in by_meaning(load_dataset(name), f"data {name!r}", notes).items()
        }
    urls = by_meaning(urls, f"data {name!r}", notes)
    manager = DownloadManager(dataset_name=name)
    return {
        split: [
            _file(f"{name} {PurePosixPath(url).name}", path, _kind(url))
            for url, path in zip(files, manager.download(files) if download else files, strict=True)
        ]
        for split, files in urls.items()
    }


def _builder(name: str) -> DatasetBuilder:
    """What datasets knows of a dataset; without a connection, of the copy in the Hub's cache on this machine."""
    try:
        return load_dataset_builder(name)
    except ConnectionError:
        if not (copy := _newest_copy(name)):
            raise
        return load_dataset_builder(copy)
    except ValueError as error:
        if len(configurations := get_dataset_config_names(name)) < 2:
            raise
        raise UserError(
            f"data {name!r}: it has several configurations ({', '.join(configurations)}); download one with "
            f"`hf download {name} --repo-type dataset --local-dir FOLDER`, and give its files"
        ) from error


def _newest_copy(name: str) -> str | None:
    """The folder of the newest revision of a dataset in the Hub's cache that holds data."""
    try:
        repositories = scan_cache_dir().repos
    except CacheNotFound:
        return None
    copies = [
        revision
        for repository in repositories
        if (repository.repo_type, repository.repo_id) == ("dataset", name)
        for revision in repository.revisions
        if any(_kind(file.file_name) for file in revision.files)
    ]
    return str(max(copies, key=lambda copy: copy.last_modified).snapshot_path) if copies else None


def _file(name: str, path: str, kind: str) -> File:
    return File(name, lambda columns: read_file(path, kind, columns), path, kind)


def _loaded(name: str, dataset: Dataset) -> File:
    return File(name, lambda columns: read_dataset(dataset, columns))


def _is_saved_to_disk(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (
        (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file()
    )


def _saved_to_disk(folder: str, notes: list[str]) -> Files:
    try:
        loaded = load_from_disk(folder)
    except Exception as error:  # whatever comes of features of another type, as an AttributeError
        raise UserError(
            f"data {folder!r}: a folder of save_to_disk that cannot be loaded ({' '.join(str(error).split())})"
        ) from error
    if not isinstance(loaded, DatasetDict):
        return {"train": [_loaded(folder, loaded)]}
    splits = by_meaning({str(split): dataset for split, dataset in loaded.items()}, f"data {folder!r}", notes)
    return {split: [_loaded(f"{folder} {split}", dataset)] for split, dataset in splits.items()}


def _one_saved_only(folder: str) -> Files:
    raise UserError(f"data {folder!r}: a folder of save_to_disk; give it alone, or save the data as Parquet")
