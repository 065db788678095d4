"""The life of an output folder: what was asked, what is committed, what is left, and when it is finished.

- ``_job.json``: the job's fingerprint, what must not change between attempts
- ``_input/``: the snapshot of the prompts
- ``data/``, ``errors/``: committed parts; the row ids in them are done
- ``_retried/``: parts of ``errors/`` whose rows were given another try
- ``run.json``, ``_manifest.json``, ``_SUCCESS``: facts, part files and counts of the finished job
- ``_lock``, ``_tmp/``: the owner, and files not committed yet
- ``_attempt.json``: on an object store, which parts count; see ``adoption``
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from tide_ray.data.adoption import adopt_parts, disown, late_parts, own_prefix
from tide_ray.data.committed import RETRIED_FOLDER, Committed, past_attempts, read_committed, tokens_and_depths
from tide_ray.data.compact import finish_pending
from tide_ray.data.manifest import MANIFEST_FILE, load_manifest, make_manifest, part_files, read_parts
from tide_ray.data.parts import ERRORS_FOLDER, KINDS, make_error_table, write_part
from tide_ray.data.schema import ATTEMPTS_COLUMN
from tide_ray.data.snapshot import SNAPSHOT_FILE, Snapshot, longest_first, read_rows
from tide_ray.data.storage import (
    StoragePath,
    absolute,
    commit_file,
    committing,
    make_folder,
    move_folder,
    name_below,
    open_attempt,
    prepare_output,
    remove_folder,
    storage_path,
    writing,
)
from tide_ray.types import JobError, UserError

JOB_FILE = "_job.json"
INPUT_FOLDER = "_input"
RUN_FILE = "run.json"
SUCCESS_FILE = "_SUCCESS"
TMP_FOLDER = "_tmp"
MAX_REMOVALS = 100


class DifferentJobError(UserError):
    """The output folder belongs to a job with other fields."""


class JobFolder:
    """One attempt at the job in ``path``. Its owner holds the lock; see ``tide_ray.data.lock``."""

    def __init__(self, path: str | StoragePath) -> None:
        self.path = absolute(storage_path(path, "output"))
        self.attempt = uuid.uuid4().hex[:12]

    @classmethod
    def existing(cls, path: str | StoragePath) -> JobFolder:
        """The folder of a job that is there. Raises UserError if there is none."""
        folder = cls(path)
        try:
            is_there = (folder.path / JOB_FILE).is_file()
        except OSError as error:
            raise UserError(f"output: cannot read {str(path)!r}: {error.strerror}") from None
        if not is_there:
            raise UserError(f"output: no job in {str(path)!r}")
        return folder

    def fields(self) -> dict[str, Any]:
        """What identifies the job; see ``adopt``."""
        return self._read_json(self.path / JOB_FILE)

    @property
    def input_folder(self) -> StoragePath:
        return self.path / INPUT_FOLDER

    @property
    def scratch(self) -> StoragePath:
        """What this attempt writes and has not committed."""
        return self.path / TMP_FOLDER / self.attempt

    @property
    def new_input_folder(self) -> StoragePath:
        """Where this attempt writes its snapshot before it is compared with the one that may be there."""
        return self.scratch / "input"

    def create(self) -> None:
        """Make the folder, or accept it if it is empty or holds a job.

        Raises:
            UserError: it holds something else, or it cannot be written.
        """
        try:
            prepare_output(self.path)
            names = {entry.name for entry in self.path.iterdir()}
            foreign = {name for name in names if not name.startswith("_")}
            if foreign and JOB_FILE not in names:
                raise UserError(f"output: {str(self.path)!r} holds other files ({min(foreign)}) and no job")
        except OSError as error:
            raise UserError(f"output: cannot write {str(self.path)!r}: {error.strerror}") from None

    def begin(self) -> None:
        """Shut out writers of attempts that are gone, and make room for this one. The caller owns the folder."""
        self.clear_uncommitted()
        finish_pending(self.path)
        adopt_parts(self.path, self.attempt, KINDS, self._finished_parts)
        open_attempt(self.scratch)

    def adopt(self, fields: Mapping[str, Any]) -> None:
        """Bind the folder to a job, or check that it is this one; then move a new snapshot into place.

        Args:
            fields: what identifies the job, JSON values by name.

        Raises:
            DifferentJobError: the folder belongs to a job with other fields; names each with both values.
        """
        path = self.path / JOB_FILE
        fields = json.loads(json.dumps(fields))
        if path.exists():
            before = self._read_json(path)
            differing = [name for name in {**before, **fields} if before.get(name) != fields.get(name)]
            if differing:
                details = "; ".join(f"{name} was {before.get(name)!r}, now {fields.get(name)!r}" for name in differing)
                raise DifferentJobError(
                    f"output: {str(self.path)!r} belongs to a different job (choose another folder, or --force-new-run "
                    f"for one beside it): {details}"
                )
        if not (self.input_folder / SNAPSHOT_FILE).exists():
            move_folder(self.new_input_folder, self.input_folder, last=SNAPSHOT_FILE)
        if not path.exists():
            self._write_json(JOB_FILE, fields)

    def committed(self) -> Committed:
        """The ids in committed parts. Raises UserError for a part that cannot be read."""
        return read_committed(self.path)

    def write_bad_rows(self, committed: Committed, facts: Mapping[str, Any]) -> None:
        """Commit the snapshot's unusable rows to ``errors/``."""
        tables = []
        for table in read_rows(self.input_folder, committed.errors):
            bad = table.filter(pc.not_equal(table["error"], ""))
            ids = [None if ids is None else json.dumps(ids) for ids in bad["prompt_token_ids"].to_pylist()]
            inputs = pc.coalesce(bad["prompt"], bad["messages"], pa.array(ids, pa.string()))
            tables.append(make_error_table(bad["row_id"], bad["error"], inputs))
            committed.errors.update(bad["row_id"].to_pylist())
        if tables:
            name = f"{own_prefix(self.attempt)}input.parquet"
            write_part(self.scratch, self.path / ERRORS_FOLDER / name, tables, facts)

    def write_todo(self, committed: Committed, *, sorts_by_length: bool = False) -> tuple[StoragePath, int]:
        """The snapshot's rows that are left, as Parquet in a folder of this attempt. Returns it and their number.

        Column ``attempts`` has how often each was tried before and ended as an error. ``sorts_by_length``: each file
        begins with its longest answers and ends with the shortest, so the job, whichever file is its last, does too.
        """
        folder = self.scratch / "todo"
        make_folder(folder)
        num_rows = 0
        attempts = past_attempts(self.path)
        for number, table in enumerate(read_rows(self.input_folder, committed.ids)):
            past = [attempts.get(row_id, 0) for row_id in table["row_id"].to_pylist()]
            table = table.append_column(ATTEMPTS_COLUMN, pa.array(past, pa.int32()))
            if sorts_by_length:
                table = longest_first(table)
            with writing(folder / f"part-{number:05d}.parquet") as stream:
                pq.write_table(table, stream, compression="zstd")
            num_rows += table.num_rows
        return folder, num_rows

    def take_back_errors(self) -> int:
        """Have the rows in ``errors/`` done again: they are not committed any more. Returns their number.

        Rows that never reached an engine are committed as errors again, since the snapshot is what it was.
        """
        num_rows = sum(table.num_rows for table in read_parts(self.path, ERRORS_FOLDER, ["row_id"]))
        if num_rows:
            for name in (SUCCESS_FILE, MANIFEST_FILE):
                (self.path / name).unlink(missing_ok=True)
            make_folder(self.path / RETRIED_FOLDER)
            paths = part_files(self.path, ERRORS_FOLDER)
            disown(self.path, [name_below(self.path, path) for path in paths])
            for path in paths:
                commit_file(path, self.path / RETRIED_FOLDER / f"{self.attempt}-{path.name}")
        return num_rows

    def remove_late_parts(self) -> list[str]:
        """Remove parts that attempts wrote after they were over (see ``adoption``). Returns their names."""
        paths = late_parts(self.path, KINDS)
        for path in paths:
            path.unlink(missing_ok=True)
        return [name_below(self.path, path) for path in paths]

    def finished(self) -> dict[str, Any] | None:
        """The counts of the finished job, None if it is not finished."""
        path = self.path / SUCCESS_FILE
        return self._read_json(path) if path.exists() else None

    def check_complete(self, snapshot: Snapshot, committed: Committed) -> dict[str, Any]:
        """Rows, errors, tokens and mean depth of a job that is done. Raises JobError if it is not.

        Args:
            committed: what there is now; the caller has it, and two copies of all ids are the most that a job holds.
        """
        if not committed.num_ids == committed.num_rows == snapshot.num_rows:
            raise JobError(
                f"output: {str(self.path)!r} holds {committed.num_rows} rows with {committed.num_ids} ids of "
                f"{snapshot.num_rows} prompts"
            )
        tokens, depths = tokens_and_depths(self.path)
        counts = {"rows": len(committed.data), "errors": len(committed.errors), "tokens": tokens}
        return {**counts, "mean_depth": round(depths / tokens, 4) if tokens else 0.0}

    def finish(self, run: Mapping[str, Any], counts: Mapping[str, Any]) -> None:
        """Write the facts and the manifest, then the mark that the job is finished."""
        self._write_json(RUN_FILE, run)
        self._write_json(MANIFEST_FILE, make_manifest(self.path))
        self._write_json(SUCCESS_FILE, counts)

    def clear_uncommitted(self) -> None:
        """Remove files that were never committed, of this attempt and of dead ones."""
        # A writer that is still alive can put a file into a folder while it is being removed.
        for _ in range(MAX_REMOVALS):
            remove_folder(self.path / TMP_FOLDER)
            if not (self.path / TMP_FOLDER).is_dir():
                return
        raise JobError(f"output: cannot remove {str(self.path / TMP_FOLDER)!r}; is another job writing there?")

    def _finished_parts(self) -> list[str] | None:
        manifest = load_manifest(self.path) if (self.path / SUCCESS_FILE).exists() else None
        return None if manifest is None else list(manifest)

    def _read_json(self, path: StoragePath) -> dict[str, Any]:
        try:
            return json.loads(path.read_text(encoding="utf-8"))
        except ValueError:
            raise UserError(f"output: {str(path)!r} is damaged") from None

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        lines = ",\n".join(f"  {json.dumps(key)}: {json.dumps(value, default=str)}" for key, value in values.items())
        with committing(self.scratch, self.path / name) as stream:
            stream.write(f"{{\n{lines}\n}}\n".encode())
