"""``load``: the outputs of jobs as SQL views in a DuckDB that can do nothing but read them.

Memory is bounded: files are read as queries go, lists are unnested on the way, and what does not fit is spilled to a
folder that is removed at the end. A query is one SELECT; DuckDB opens no other file, whatever the query says.
"""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import duckdb
import pyarrow as pa

from tide_ray.analytics import views
from tide_ray.analytics.outputs import JobOutput, find_outputs
from tide_ray.analytics.vocabulary import VOCABULARY_SCHEMA, Vocabulary
from tide_ray.data.object_path import ObjectPath
from tide_ray.data.storage import StoragePath
from tide_ray.messages import one_line
from tide_ray.types import JobError, UserError

if TYPE_CHECKING:
    from tide_ray.analytics.object_files import ObjectFiles

DEFAULT_MEMORY_LIMIT = "2GB"
BATCH_ROWS = 65_536
_MEMORY = re.compile(r"\d+(\.\d+)? ?([KMGT]i?B)", re.IGNORECASE)
_TOKENS = re.compile(r"(?<!\bas\s)\btokens\b", re.IGNORECASE)
"""Perhaps the view: what is only named so, ``AS tokens``, is not."""


def load(
    outputs: str | Path | Sequence[str | Path],
    *,
    memory_limit: str = DEFAULT_MEMORY_LIMIT,
    threads: int | None = None,
    spill_folder: str | Path | None = None,
) -> Analytics:
    """The outputs of jobs, ready to be queried.

    Args:
        outputs: folders of jobs, or globs of folders; also on object stores, as ``s3://BUCKET/KEY``.
        memory_limit: what DuckDB may hold before it spills, like ``2GB``.
        threads: CPU threads; default: all cores.
        spill_folder: where a folder for what does not fit is made; default: the system's temporary folder.

    Raises:
        UserError: there is no such output, it cannot be read, or a setting is wrong.
        UnavailableError: an object store stopped answering.
    """
    paths = [outputs] if isinstance(outputs, str | Path) else list(outputs)
    if not paths:
        raise UserError("output: name at least one folder")
    if not _MEMORY.fullmatch(memory_limit):
        raise UserError(f"memory_limit must be a number and a unit like 2GB, got {memory_limit!r}")
    if threads is not None and threads < 1:
        raise UserError(f"threads must be at least 1, got {threads!r}")
    return Analytics(find_outputs(paths), memory_limit=memory_limit, threads=threads, spill_folder=spill_folder)


class Analytics:
    """Views ``rows``, ``tokens``, ``errors`` and ``run`` over outputs of jobs. Made by ``load``; close it, or use it in
    a ``with`` block. One query at a time.

    Attributes:
        outputs: what is loaded, in the order given.
    """

    def __init__(
        self, outputs: list[JobOutput], *, memory_limit: str, threads: int | None, spill_folder: str | Path | None
    ) -> None:
        self.outputs = outputs
        self._vocabularies: list[Vocabulary] | None = None
        self._groups = _same_tokenizer(outputs)
        try:
            spill = tempfile.mkdtemp(prefix="tide-ray-", dir=spill_folder)
        except OSError as error:
            raise UserError(f"spill_folder: cannot write {str(spill_folder)!r}: {error.strerror}") from None
        self._removal = weakref.finalize(self, shutil.rmtree, spill, ignore_errors=True)
        self._objects: ObjectFiles | None = None
        with self._one_line("output"):
            self._connection = duckdb.connect(
                ":memory:",
                config={
                    "memory_limit": memory_limit,
                    "threads": threads or len(os.sched_getaffinity(0)),
                    "temp_directory": spill,
                    "autoinstall_known_extensions": "false",
                    "autoload_known_extensions": "false",
                    "python_enable_replacements": "false",  # or a query could read the variables of its caller
                    "preserve_insertion_order": "false",
                },
            )
            self._open_objects()
            self._make_views()
            self._shut()

    def arrow(self, query: str) -> pa.Table:
        """The result of one SELECT, all of it in memory.

        Raises:
            UserError: for what is wrong with ``query``.
            JobError: an object store stopped answering.
        """
        with self._one_line("sql"):
            return self._relation(query).to_arrow_table()

    def pandas(self, query: str) -> Any:
        """The result as a ``pandas.DataFrame``. Raises as ``arrow`` does."""
        with self._one_line("sql"):
            return self._relation(query).df()

    def records(self, query: str) -> list[dict[str, Any]]:
        """The result as Python values, a dict for each row. Raises as ``arrow`` does."""
        return self.arrow(query).to_pylist()

    @contextmanager
    def batches(self, query: str) -> Iterator[pa.RecordBatchReader]:
        """The result batch by batch as it is computed, for results of any size. Raises as ``arrow`` does, its reader
        too."""
        with self._one_line("sql"):
            reader = self._relation(query).to_arrow_reader(BATCH_ROWS)

        def batches() -> Iterator[pa.RecordBatch]:
            with self._one_line("sql"):
                yield from reader

        yield pa.RecordBatchReader.from_batches(reader.schema, batches())

    @property
    def notes(self) -> list[str]:
        """What could not be loaded and is NULL, in a line each; known once ``tokens`` was asked for."""
        found = [one.note for one in self._vocabularies or () if one.note is not None]
        return list(dict.fromkeys(found))

    def vocabulary(self, run: str) -> Vocabulary:
        """The tokenizer of the run of that name."""
        number = next(number for number, names in enumerate(self._groups) if run in names)
        return self._load_vocabularies()[number]

    def close(self) -> None:
        """Free everything; what was spilled is removed."""
        self._connection.close()
        self._removal()

    def __enter__(self) -> Analytics:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _relation(self, query: str) -> duckdb.DuckDBPyRelation:
        statements = self._connection.extract_statements(query)
        if len(statements) != 1 or statements[0].type != duckdb.StatementType.SELECT:
            raise UserError(f"sql must be one SELECT, got {one_line(query)!r}")
        if _TOKENS.search(query):
            self._load_vocabularies()
        # As a part of another query it cannot have a WITH clause that writes: those must be at the top.
        return self._connection.sql(f"SELECT * FROM (\n{statements[0].query.rstrip('; ')}\n)")

    @contextmanager
    def _one_line(self, field: str) -> Iterator[None]:
        """What DuckDB says of a query or a file becomes a UserError in one line, of an object store a JobError."""
        try:
            yield
        except (duckdb.Error, pa.ArrowException, OSError) as error:  # OSError: what it says amid a stream of batches
            if self._objects is not None and (failure := self._objects.failure) is not None:
                self._objects.failure = None
                raise JobError(f"output: cannot read {failure.filename!r}: {failure.strerror}") from error
            raise UserError(f"{field}: {one_line(error)}") from error

    def _load_vocabularies(self) -> list[Vocabulary]:
        """The tokenizers, with their tokens in the tables behind ``tokens``. Loaded once, when first needed."""
        if self._vocabularies is None:
            self._vocabularies = []
            for number, names in enumerate(self._groups):
                facts = next(output.facts for output in self.outputs if output.name == names[0])
                vocabulary = Vocabulary(facts.get("model"), facts.get("revision"))
                self._insert(f"{views.VOCABULARY}_{number}", vocabulary.table())
                self._vocabularies.append(vocabulary)
        return self._vocabularies

    def _open_objects(self) -> None:
        """Have DuckDB read object stores through our client."""
        files = [file for file in self._files() if isinstance(file, ObjectPath)]
        if files:
            from tide_ray.analytics.object_files import ObjectFiles

            self._objects = ObjectFiles(files)
            self._connection.register_filesystem(self._objects)

    def _files(self) -> list[StoragePath]:
        return [file for output in self.outputs for file in (*output.data, *output.errors)]

    def _make_views(self) -> None:
        self._create(views.NO_ROWS, views.ROWS_SCHEMA.empty_table())
        self._create(views.NO_ERRORS, views.ERRORS_SCHEMA.empty_table())
        self._create(views.RUN_FACTS, views.run_table(self.outputs))
        for number in range(len(self._groups)):
            self._create(f"{views.VOCABULARY}_{number}", VOCABULARY_SCHEMA.empty_table())
        for view in (
            views.rows_view(self.outputs),
            views.tokens_view(self._groups),
            views.errors_view(self.outputs),
            views.run_view(),
        ):
            self._connection.execute(view)

    def _shut(self) -> None:
        """From now on: these files and nothing else, and no way back."""
        # It does not know how long lists are, and would hold all unnested tokens in order to look their texts up.
        self._connection.execute("SET disabled_optimizers = 'build_side_probe_side'")
        names = [
            views.literal(name) for file in self._files() for name in dict.fromkeys((str(file), views.pattern(file)))
        ]
        self._connection.execute(f"SET allowed_paths = [{', '.join(names)}]")
        self._connection.execute("SET enable_external_access = false")
        self._connection.execute("SET lock_configuration = true")

    def _create(self, name: str, table: pa.Table) -> None:
        self._connection.register("_given", table)
        self._connection.execute(f"CREATE TABLE {name} AS SELECT * FROM _given")
        self._connection.unregister("_given")

    def _insert(self, name: str, table: pa.Table) -> None:
        self._connection.register("_given", table)
        self._connection.execute(f"INSERT INTO {name} SELECT * FROM _given")
        self._connection.unregister("_given")


def _same_tokenizer(outputs: Sequence[JobOutput]) -> list[list[str]]:
    """Names of outputs, those of one model together."""
    groups: dict[tuple[Any, ...], list[str]] = {}
    for output in outputs:
        key = tuple(output.facts.get(name) for name in ("model", "revision", "model_identity"))
        groups.setdefault(key, []).append(output.name)
    return list(groups.values())
