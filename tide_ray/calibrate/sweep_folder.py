"""One model's files in a sweep: what each phase has left, and what it was left for.

- ``_job.json``: by phase, the settings that its files depend on
- ``answers-NN.parquet``: the examples of one shard of the prompts
- ``sums-NN.safetensors``: statistics of the shards that one task went through, NN the first of them
- ``done.json``: what the sweep tells of the finished checkpoint

A file is complete from the moment it can be seen. How prompts and examples are divided into shards depends on their
number alone, so that another number of workers changes neither answers nor statistics.
"""

from __future__ import annotations

import itertools
import json
import os
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from tide_ray.calibrate.corpus import Example
from tide_ray.data.storage import commit_file
from tide_ray.messages import one_line
from tide_ray.types import UserError

PHASES = ("answers", "fit", "routers")
PHASE_FILES = {"answers": "answers-*.parquet", "fit": "sums-*.safetensors", "routers": "done.json"}
JOB_FILE, DONE_FILE = "_job.json", "done.json"
MAX_SHARDS, MIN_SHARD = 8, 16
EXAMPLE_SCHEMA = pa.schema([("number", pa.int32()), ("token_ids", pa.list_(pa.int32())), ("first_judged", pa.int32())])


def shards(num_items: int) -> list[range]:
    """Neighbouring items in at most MAX_SHARDS parts of nearly equal size, MIN_SHARD at least where there are more."""
    count = max(1, min(MAX_SHARDS, num_items // MIN_SHARD))
    bounds = [num_items * number // count for number in range(count + 1)]
    return [range(start, stop) for start, stop in itertools.pairwise(bounds)]


class ModelFolder:
    """Files of one model.

    Args:
        path: its work folder.
        scratch: where this attempt writes before it commits; it is not made here, so that writers of an attempt that
            is over (which took its folder with it) fail.
    """

    def __init__(self, path: str | Path, scratch: str | Path) -> None:
        self.path = Path(path)
        self.scratch = Path(scratch)

    def adopt(self, settings: Mapping[str, Mapping[str, Any]]) -> str:
        """Bind the folder to ``settings`` by phase; from the first phase on that was made with others, files go.

        Returns:
            What differed and where the model starts again, or "".
        """
        self.path.mkdir(parents=True, exist_ok=True)
        job = self.path / JOB_FILE
        before = json.loads(job.read_text(encoding="utf-8")) if job.exists() else {}
        now = json.loads(json.dumps(settings))
        for number, phase in enumerate(PHASES):
            old, new = before.get(phase, {}), now[phase]
            differing = [name for name in {**old, **new} if old.get(name) != new.get(name)]
            if not differing:
                continue
            for later in PHASES[number:]:
                for file in self.path.glob(PHASE_FILES[later]):
                    file.unlink()
            self._write_json(JOB_FILE, now)
            changes = "; ".join(f"{name} was {old.get(name)!r}, now {new.get(name)!r}" for name in differing)
            return f"starts again with the phase {phase}: {changes}" if before else ""
        return ""

    # ---- answers ----

    def answered_shards(self) -> set[int]:
        return {_number(file) for file in self.path.glob(PHASE_FILES["answers"])}

    def write_answers(self, shard: int, examples: Mapping[int, Example], seconds: float) -> None:
        """Commit a shard's examples, by the number of their prompt."""
        columns = [
            list(examples),
            [example.token_ids for example in examples.values()],
            [example.first_judged for example in examples.values()],
        ]
        schema = EXAMPLE_SCHEMA.with_metadata({"seconds": f"{seconds:.3f}"})
        arrays = [pa.array(column, item.type) for column, item in zip(columns, schema, strict=True)]
        table = pa.Table.from_arrays(arrays, schema=schema)
        self._commit(f"answers-{shard:02d}.parquet", lambda file: pq.write_table(table, file, compression="zstd"))

    def answers(self) -> tuple[list[Example], float]:
        """All examples in the order of their prompts, and the seconds that workers spent on them together."""
        found: dict[int, Example] = {}
        seconds = 0.0
        for file in sorted(self.path.glob(PHASE_FILES["answers"])):
            table = pq.read_table(file)
            seconds += float(table.schema.metadata[b"seconds"])
            for row in table.to_pylist():
                found[row["number"]] = Example(row["token_ids"], row["first_judged"])
        return [found[number] for number in sorted(found)], seconds

    # ---- statistics ----

    def fitted_shards(self) -> set[int]:
        """Shards whose statistics are in a file.

        Raises:
            UserError: a file is damaged, or two files hold the same shard.
        """
        done = [shard for first in self.sums_files() for shard in self.sums_of(first)[0]]
        if len(done) != len(set(done)):
            raise UserError(f"output: statistics in {str(self.path)!r} overlap; remove its sums-* files")
        return set(done)

    def sums_of(self, first: int) -> tuple[list[int], float]:
        """The shards in the file of the task that began with shard ``first``, and their seconds; no file: none."""
        file = self._sums_file(first)
        if not file.exists():
            return [], 0.0
        with _opened(file) as stored:
            facts = stored.metadata()
        return json.loads(facts["shards"]), float(facts["seconds"])

    def write_sums(self, first: int, tensors: Mapping[str, Tensor], done: Sequence[int], seconds: float) -> None:
        """Commit the statistics of the shards ``done``, in place of those that the same task wrote before."""
        facts = {"shards": json.dumps(list(done)), "seconds": f"{seconds:.3f}"}
        contiguous = {name: tensor.contiguous() for name, tensor in tensors.items()}
        self._commit(self._sums_file(first).name, lambda file: save_file(contiguous, file, metadata=facts))

    def sums_files(self) -> list[int]:
        """The first shard of each file of statistics."""
        return sorted(_number(file) for file in self.path.glob(PHASE_FILES["fit"]))

    def read_sums(self, first: int) -> dict[str, Tensor]:
        with _opened(self._sums_file(first)) as stored:
            return {name: stored.get_tensor(name) for name in stored.keys()}  # noqa: SIM118

    def _sums_file(self, first: int) -> Path:
        return self.path / f"sums-{first:02d}.safetensors"

    # ---- the checkpoint ----

    def write_done(self, facts: Mapping[str, Any]) -> None:
        self._write_json(DONE_FILE, facts)

    def done(self) -> dict[str, Any] | None:
        """What was written of the finished checkpoint, None if there is none."""
        file = self.path / DONE_FILE
        return json.loads(file.read_text(encoding="utf-8")) if file.exists() else None

    def _write_json(self, name: str, values: Mapping[str, Any]) -> None:
        text = json.dumps(values, indent=2) + "\n"
        self._commit(name, lambda file: file.write_text(text, encoding="utf-8"))

    def _commit(self, name: str, write: Callable[[Path], object]) -> None:
        temporary = self.scratch / f"{name}.{uuid.uuid4().hex}"
        try:
            write(temporary)
            commit_file(temporary, self.path / name)
        finally:
            temporary.unlink(missing_ok=True)


def _opened(file: Path) -> Any:
    try:
        return safe_open(os.fspath(file), framework="pt")
    except Exception as error:  # safetensors raises its own type and OSError for what is no such file
        raise UserError(f"output: {str(file)!r} is damaged: {one_line(error)}") from None


def _number(file: Path) -> int:
    return int(file.stem.rpartition("-")[2])
