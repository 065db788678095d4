"""Few large part files in place of many small ones, with the same rows.

A job commits small parts so that an interruption costs little; whoever analyses them reads large ones faster. New files
are complete under ``_compacted/`` before a journal says what replaces what; from then on the replacement, manifest
included, is finished by whoever owns the folder next, so that no row is lost or doubled wherever it was interrupted.
"""

from __future__ import annotations

import json
from collections.abc import Iterator

import pyarrow as pa
import pyarrow.parquet as pq

from tide_ray.data.adoption import disown, own_prefix
from tide_ray.data.manifest import MANIFEST_FILE, make_manifest, part_files
from tide_ray.data.parts import KINDS, write_parquet
from tide_ray.data.reading import fetched, for_arrow
from tide_ray.data.storage import StoragePath, commit_file, make_folder, name_below, remove_folder, writing

STAGING_FOLDER = "_compacted"
JOURNAL_FILE = "_compacted.json"
ROWS_PER_GROUP = 16_384
DEFAULT_FILE_BYTES = 256 << 20


def compact_parts(
    folder: StoragePath, *, name: str, file_bytes: int = DEFAULT_FILE_BYTES
) -> dict[str, tuple[int, int]]:
    """Merge the parts of ``data/`` and of ``errors/`` into files of about ``file_bytes``.

    The caller owns the folder, whose job is finished and verified: a file that is copied gets a checksum of its own.

    Args:
        name: the attempt's, part of the new files' names.

    Returns:
        For each of the two kinds that has parts, their number before and after.
    """
    remove_folder(folder / STAGING_FOLDER)
    plan: dict[str, list[str]] = {}
    counts = {}
    for kind in KINDS:
        paths = part_files(folder, kind)
        groups = [group for group in _groups(paths, file_bytes) if len(group) > 1]
        for number, group in enumerate(groups):
            target = folder / STAGING_FOLDER / kind / f"{own_prefix(name)}{number:06d}.parquet"
            make_folder(target.parent)
            with writing(target) as stream:
                write_parquet(stream, pq.read_schema(for_arrow(group[0])), _row_groups(group))
            plan[name_below(folder / STAGING_FOLDER, target)] = [name_below(folder, path) for path in group]
        if paths:
            counts[kind] = (len(paths), len(paths) - sum(len(group) - 1 for group in groups))
    if plan:
        draft = folder / STAGING_FOLDER / JOURNAL_FILE
        draft.write_text(json.dumps(plan, indent=2) + "\n", encoding="utf-8")
        commit_file(draft, folder / JOURNAL_FILE)
        finish_pending(folder)
    return counts


def has_pending(folder: StoragePath) -> bool:
    """Whether a replacement of parts was begun and not finished."""
    return (folder / JOURNAL_FILE).exists()


def finish_pending(folder: StoragePath) -> None:
    """Do what is left of a replacement that was begun; nothing when there is none."""
    if has_pending(folder):
        plan: dict[str, list[str]] = json.loads((folder / JOURNAL_FILE).read_text(encoding="utf-8"))
        disown(folder, [old for replaced in plan.values() for old in replaced])
        for name, replaced in plan.items():
            for old in replaced:
                (folder / old).unlink(missing_ok=True)
            if (folder / STAGING_FOLDER / name).exists():
                commit_file(folder / STAGING_FOLDER / name, folder / name)
        manifest = folder / STAGING_FOLDER / MANIFEST_FILE
        manifest.write_text(json.dumps(make_manifest(folder)) + "\n", encoding="utf-8")
        commit_file(manifest, folder / MANIFEST_FILE)
        (folder / JOURNAL_FILE).unlink()
    remove_folder(folder / STAGING_FOLDER)


def _groups(paths: list[StoragePath], file_bytes: int) -> Iterator[list[StoragePath]]:
    group: list[StoragePath] = []
    size = 0
    for path in paths:
        if group and size + path.stat().st_size > file_bytes:
            yield group
            group, size = [], 0
        group.append(path)
        size += path.stat().st_size
    if group:
        yield group


def _row_groups(paths: list[StoragePath]) -> Iterator[pa.Table]:
    waiting: list[pa.Table] = []
    num_rows = 0
    for path in paths:
        with fetched(path) as file:
            table = pq.read_table(file, partitioning=None)  # a folder NAME=VALUE above it is no column
        waiting.append(table.replace_schema_metadata(None))
        num_rows += table.num_rows
        if num_rows >= ROWS_PER_GROUP:
            yield pa.concat_tables(waiting).combine_chunks()
            waiting, num_rows = [], 0
    if waiting:
        yield pa.concat_tables(waiting).combine_chunks()
