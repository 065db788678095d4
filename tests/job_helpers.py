"""Output folders of jobs, made without Ray and without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.job_folder import JobFolder
from tide_ray.data.parts import write_part
from tide_ray.data.run_facts import job_fields
from tide_ray.data.schema import OUTPUT_SCHEMA
from tide_ray.data.snapshot import Snapshot, read_rows, write_snapshot


def write_prompts(path: Path) -> Path:
    """Five prompts and a line that is none."""
    path.write_text("".join(f'{{"prompt": "{i}"}}\n' for i in range(5)) + "not json\n")
    return path


def start(output: Path, prompts: Path, **settings: Any) -> tuple[JobFolder, Snapshot]:
    """What every attempt does before it generates."""
    config = GenerateJobConfig.build({"prompts": [str(prompts)], "output": str(output), **settings})
    folder = JobFolder(output)
    folder.create()
    folder.begin()
    snapshot = write_snapshot(config, folder.new_input_folder)
    folder.adopt(job_fields(config, "model-digest", snapshot))
    return folder, snapshot


def result_rows(ids: list[str]) -> pa.Table:
    """Rows of two tokens each, with these ids."""
    filled: dict[str, Any] = {
        "generated_text": "four",
        "generated_tokens": [4, 2],
        "exit_layers": [3, 1],
        "token_times_us": [90, 10],
        "num_generated_tokens": 2,
        "mean_exit_layer": 2.0,
    }
    return pa.Table.from_pylist([{"row_id": row_id, **filled} for row_id in ids], schema=OUTPUT_SCHEMA)


def all_ids(folder: JobFolder) -> list[str]:
    return [row_id for table in read_rows(folder.input_folder) for row_id in table["row_id"].to_pylist()]


def finished_job(output: Path, prompts: Path) -> JobFolder:
    """A finished job of ``write_prompts`` in two parts, of three and two rows, and one of errors."""
    folder, snapshot = start(output, prompts)
    ids = all_ids(folder)
    facts = folder.fields()
    folder.write_bad_rows(folder.committed(), facts)
    for name, part in (("a", ids[:3]), ("b", ids[3:5])):
        write_part(folder.scratch, folder.path / "data" / f"part-{name}.parquet", [result_rows(part)], facts)
    folder.finish({}, folder.check_complete(snapshot, folder.committed()))
    folder.clear_uncommitted()
    return folder
