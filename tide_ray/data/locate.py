"""From what a user wrote after ``--prompts`` to sources: files, folders, globs, saved and hub data sets."""

from __future__ import annotations

import glob
import re
from collections.abc import Iterator, Sequence
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa

from tide_ray.data.object_path import ObjectPath
from tide_ray.data.sources import ROWS_PER_BATCH, ArrowSource, LineSource, Source, csv_source, parquet_source
from tide_ray.data.storage import StoragePath, name_below, storage_path
from tide_ray.messages import named
from tide_ray.types import UserError

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

JSON_SUFFIX = ".json"
JSON_SUFFIXES = (".jsonl", ".ndjson", JSON_SUFFIX)
TEXT_SUFFIXES = (".txt", ".text")
PARQUET_SUFFIXES = (".parquet", ".pq")
CSV_SUFFIXES = (".csv", ".tsv")
SUFFIXES = (*JSON_SUFFIXES, *TEXT_SUFFIXES, *PARQUET_SUFFIXES, *CSV_SUFFIXES)
HUB_PREFIX = "hf:"
SAVED_DATASET_FILES = ("dataset_info.json", "dataset_dict.json")
HUB_NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?")


def open_sources(prompts: Sequence[str], text_columns: Sequence[str] = ()) -> list[Source]:
    """One source per file or data set, in the order given; the bundled demo prompts for an empty list.

    ``text_columns`` are read as strings where the format does not say what a value is (CSV).

    Raises:
        UserError: a path that does not exist, an unknown kind of file, a data set that cannot be loaded.
    """
    if not prompts:
        return [LineSource(Path(str(files("tide_ray.data") / "demo_prompts.jsonl")), is_text=False)]
    return [source for value in prompts for source in _open_one(value, text_columns)]


def _open_one(value: str, text_columns: Sequence[str]) -> list[Source]:
    if value.startswith(HUB_PREFIX):
        return [_hub_source(value.removeprefix(HUB_PREFIX), value)]
    path = storage_path(value, "prompts")
    try:
        return _found_sources(value, path, text_columns)
    except OSError as error:
        raise UserError(f"prompts: cannot read {value!r}: {error.strerror}") from None


def _found_sources(value: str, path: StoragePath, text_columns: Sequence[str]) -> list[Source]:
    if path.is_dir():
        if isinstance(path, Path) and any((path / name).exists() for name in SAVED_DATASET_FILES):
            return [_saved_source(path)]
        found = sorted(file for file in path.rglob("*") if _is_input(file, path))
        if not found:
            raise UserError(f"prompts: folder {value!r} holds no {', '.join(SUFFIXES)} file")
        return [_file_source(file, text_columns) for file in found]
    if path.exists():
        return [_file_source(path, text_columns)]
    if glob.has_magic(value):
        matches = _matches(path)
        if not matches:
            raise UserError(f"prompts: no file matches {value!r}")
        return [_file_source(match, text_columns) for match in matches if match.is_file()]
    if isinstance(path, ObjectPath) or _kind(path) or not HUB_NAME.fullmatch(value):
        raise UserError(f"prompts: file not found: {value!r}")
    return [_hub_source(value, value)]


def _matches(path: StoragePath) -> Sequence[StoragePath]:
    if isinstance(path, ObjectPath):
        return path.matches()
    return sorted(Path(match) for match in glob.glob(str(path), recursive=True))


def _kind(path: StoragePath) -> str:
    """The suffix that decides the reader, "" for none of ours."""
    suffix = Path(path.stem).suffix if path.suffix == ".gz" else path.suffix
    known = (*JSON_SUFFIXES, *TEXT_SUFFIXES) if path.suffix == ".gz" else SUFFIXES
    return suffix.lower() if suffix.lower() in known else ""


def _is_input(file: StoragePath, folder: StoragePath) -> bool:
    parts = Path(name_below(folder, file)).parts
    return file.is_file() and bool(_kind(file)) and not any(part.startswith((".", "_")) for part in parts)


def _file_source(path: StoragePath, text_columns: Sequence[str]) -> Source:
    kind = _kind(path)
    if kind in PARQUET_SUFFIXES:
        return parquet_source(path)
    if kind in CSV_SUFFIXES:
        return csv_source(path, text_columns)
    if kind in JSON_SUFFIXES or kind in TEXT_SUFFIXES:
        source = LineSource(path, is_text=kind in TEXT_SUFFIXES)
        if kind == JSON_SUFFIX and source.starts_an_array():
            raise UserError(f"prompts: {source.name!r} is a JSON array, one object per line is needed (jq -c '.[]')")
        return source
    raise UserError(f"prompts: {str(path)!r} is none of {', '.join(SUFFIXES)}")


def _saved_source(path: Path) -> Source:
    import datasets

    try:
        loaded = datasets.load_from_disk(str(path))
    except Exception as error:  # datasets raises many types for a damaged folder; each of them is the folder's fault
        raise UserError(f"prompts: cannot load the saved data set {str(path)!r}: {named(error)}") from None
    if isinstance(loaded, datasets.DatasetDict):
        loaded = loaded[_only_split(list(loaded), str(path))]
    return _dataset_source(loaded, str(path))


def _hub_source(value: str, given: str) -> Source:
    """``name[:config][:split]``; one extra part is a configuration if the data set has one of that name."""
    import datasets

    name, *parts = value.split(":")
    if not HUB_NAME.fullmatch(name) or len(parts) > 2:
        raise UserError(f"prompts: a hub data set is hf:NAME[:CONFIG][:SPLIT], got {given!r}")
    try:
        if len(parts) == 2:
            config, split = parts[0] or None, parts[1] or None
        elif len(parts) == 1:
            is_config = parts[0] in datasets.get_dataset_config_names(name)
            config, split = (parts[0], None) if is_config else (None, parts[0])
        else:
            config, split = None, None
        split = split or _only_split(datasets.get_dataset_split_names(name, config), given)
        return _dataset_source(datasets.load_dataset(name, config, split=split, streaming=True), given)
    except UserError:
        raise
    except Exception as error:  # the hub client raises many types: no network, no such data set, no access
        raise UserError(
            f"prompts: {given!r} is neither a file nor a folder, and no data set by that name can be loaded: "
            f"{named(error)}"
        ) from None


def _only_split(splits: list[str], given: str) -> str:
    if len(splits) == 1:
        return splits[0]
    if "train" in splits:
        return "train"
    raise UserError(f"prompts: {given!r} has the splits {', '.join(splits)}; name one with hf:NAME:SPLIT or its folder")


def _dataset_source(dataset: Dataset | IterableDataset, name: str) -> ArrowSource:
    features = dataset.features or dataset._resolve_features().features
    schema = features.arrow_schema.remove_metadata()

    def open_tables(columns: list[str]) -> Iterator[pa.Table]:
        batches: Any = dataset.select_columns(columns).with_format("arrow").iter(batch_size=ROWS_PER_BATCH)
        for table in batches:
            yield table.select(columns)

    return ArrowSource(name, schema, open_tables)
