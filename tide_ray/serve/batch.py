"""OpenAI's batch files through the offline job: requests in, answers out, failures in a file of their own.

Lines become rows of a job (``batch_requests``), and the rows' results become a response as the server writes it. The
job's folder stays beside the output, so that an interrupted batch goes on where it stopped.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from rich.console import Console

from tide_ray.data.job import EXIT_OK, EXIT_ROW_ERRORS, run_generate
from tide_ray.data.job_config import GenerateJobConfig
from tide_ray.data.parts import DATA_FOLDER, ERRORS_FOLDER
from tide_ray.data.schema import METADATA_PREFIX
from tide_ray.exits.certificates import pick
from tide_ray.exits.checkpoint_files import read_certificates
from tide_ray.files import appearing
from tide_ray.serve.batch_requests import CHAT_URL, KEPT, custom_id_of, lines_of, write_rows
from tide_ray.serve.calls import PARAM_NAMES
from tide_ray.serve.errors import Failure, from_user_error
from tide_ray.serve.responses import Answer, ChatWriter, CompletionWriter, fingerprint_text
from tide_ray.types import CompletionOutput, RequestOutput, UserError

FOLDER_SUFFIX = ".job"
AS_MANY_AS_FIT = 2**31 - 1
"""In a row, where null is the job's own limit."""
_FIXED = (
    "prompts",
    "prompt_column",
    "id_column",
    "length_column",
    "raw",
    "system_prompt",
    "output",
    "limit",
    "keep_columns",
    "gate_scores",
)


@dataclass(frozen=True, slots=True)
class BatchPaths:
    """The files of a batch. ``errors`` None is ``OUT`` with ``.errors`` before its ending."""

    source: Path
    target: Path
    errors: Path

    @classmethod
    def of(cls, source: str, target: str, errors: str | None) -> BatchPaths:
        """Raises UserError for a missing input, or an output that is there and not of this batch."""
        found = Path(target)
        made = cls(Path(source), found, Path(errors) if errors else found.with_suffix(f".errors{found.suffix}"))
        if not made.source.is_file():
            raise UserError(f"input: no such file, got {source!r}")
        if made.target.exists() and not made.folder.is_dir():
            raise UserError(f"output: {target!r} is there already and is not of this batch")
        if made.source.resolve() in (made.target.resolve(), made.errors.resolve()):
            raise UserError(f"output must not be the input, got {target!r}")
        return made

    @property
    def folder(self) -> Path:
        return self.target.with_name(self.target.name + FOLDER_SUFFIX)


def run_batch(
    paths: BatchPaths, values: Mapping[str, Any], model_id: str | None, console: Console | None = None
) -> int:
    """Answer a batch file.

    Args:
        paths: the files.
        values: settings of the job (GenerateJobConfig) but for prompts and output.
        model_id: the name that bodies use for the model; None: as ``values`` name it.

    Returns:
        The exit code: 0 all lines answered, 3 some not (they are in the errors file), 130 interrupted.

    Raises:
        UserError: a setting that cannot be used, or no line at all.
        JobError: the job stopped; the same call goes on from there.
    """
    console = console or Console(stderr=True)
    for name in values:
        if name in _FIXED:
            raise UserError(f"{name} is settled by the batch file, got {values[name]!r}")
    probe = GenerateJobConfig.build(values)
    model_id = model_id or probe.model
    paths.folder.mkdir(parents=True, exist_ok=True)
    rows = paths.folder / "requests.jsonl"
    num_lines, failures = write_rows(paths.source, rows, model_id, _certified_tokens(probe))
    job = paths.folder / "rows"
    if rows.stat().st_size:
        settings = {
            "prompts": [str(rows)],
            "output": str(job),
            "id_column": "id",
            "raw": True,
            "keep_columns": list(KEPT),
        }
        code = run_generate(GenerateJobConfig.build({**values, **settings}), console)
        if code not in (EXIT_OK, EXIT_ROW_ERRORS):
            return code
    failures |= _row_failures(job)
    num_answers = _write_answers(paths, job, model_id, failures)
    _write_failures(paths, failures)
    console.print(f"{num_answers} of {num_lines} requests answered in {paths.target}", highlight=False)
    if failures:
        console.print(f"{len(failures)} failed, in {paths.errors}", highlight=False)
    return EXIT_ROW_ERRORS if failures else EXIT_OK


def _certified_tokens(config: GenerateJobConfig) -> int:
    """Tokens of an answer whose request gives no limit."""
    if config.max_disagreement is None or config.exits is None:
        return AS_MANY_AS_FIT
    return pick(read_certificates(config.exits), config.max_disagreement, config.certified_loss).max_tokens


def _row_failures(job: Path) -> dict[int, Failure]:
    """What the engine refused, by line."""
    found = {}
    for path in sorted((job / ERRORS_FOLDER).glob("*.parquet")):
        for row in pq.read_table(path, columns=["row_id", "error"]).to_pylist():
            found[int(row["row_id"].split("-")[0])] = from_user_error(row["error"], PARAM_NAMES)
    return found


def _write_answers(paths: BatchPaths, job: Path, model_id: str, failures: Mapping[int, Failure]) -> int:
    """Write a response for every line all of whose rows are there; only requests of several rows are held in memory."""
    waiting: dict[int, list[dict[str, Any]]] = {}
    count = 0
    with appearing(paths.target) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for path in sorted((job / DATA_FOLDER).glob("*.parquet")):
            fingerprint = _fingerprint(path)
            for batch in pq.ParquetFile(path).iter_batches(batch_size=1024):
                for row in batch.to_pylist():
                    if row["batch_line"] in failures:
                        continue
                    rows = waiting.setdefault(row["batch_line"], [])
                    rows.append(row)
                    if len(rows) == row["batch_rows"]:
                        body = _response_body(waiting.pop(row["batch_line"]), model_id, fingerprint)
                        file.write(_answer_line(row["batch_id"], row["batch_line"], 200, body, None))
                        count += 1
    return count


def _fingerprint(part: Path) -> str:
    metadata = pq.read_schema(part).metadata or {}
    return fingerprint_text(metadata.get(f"{METADATA_PREFIX}model_fingerprint".encode(), b"").decode())


def _response_body(rows: list[dict[str, Any]], model_id: str, fingerprint: str) -> dict[str, Any]:
    rows.sort(key=lambda row: (row["batch_prompt"], row["batch_choice"]))
    num_prompts = rows[-1]["batch_prompt"] + 1
    is_chat = rows[0]["batch_url"] == CHAT_URL
    outputs = [
        RequestOutput("", None, [0] * own[0]["num_input_tokens"], [_completion(row) for row in own])
        for own in ([row for row in rows if row["batch_prompt"] == index] for index in range(num_prompts))
    ]
    answer = Answer(
        f"{'chatcmpl' if is_chat else 'cmpl'}-batch-{rows[0]['batch_line']}",
        len(rows) // num_prompts,
        model_id,
        fingerprint,
        ChatWriter(0) if is_chat else CompletionWriter(),
    )
    return answer.whole(outputs)


def _completion(row: Mapping[str, Any]) -> CompletionOutput:
    return CompletionOutput(
        row["batch_choice"],
        row["generated_text"],
        row["generated_tokens"],
        row["exit_layers"],
        row["token_times_us"],
        row["finish_reason"],
    )


def _write_failures(paths: BatchPaths, failures: Mapping[int, Failure]) -> None:
    if not failures:
        paths.errors.unlink(missing_ok=True)
        return
    with appearing(paths.errors) as unfinished, unfinished.open("w", encoding="utf-8") as file:
        for number, line in lines_of(paths.source):
            if (failure := failures.get(number)) is not None:
                file.write(_answer_line(custom_id_of(line), number, failure.status, failure.body, failure))


def _answer_line(
    custom_id: str | None, number: int, status: int, body: Mapping[str, Any], failure: Failure | None
) -> str:
    response = {"status_code": status, "request_id": f"batch_req_{number}", "body": body}
    error = None if failure is None else {"code": failure.code or failure.type, "message": failure.message}
    return (
        json.dumps({"id": f"batch_req_{number}", "custom_id": custom_id, "response": response, "error": error}) + "\n"
    )
