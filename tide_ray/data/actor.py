"""The class that Ray Data runs in each actor: one engine, and an async generator over it.

Ray runs many ``__call__`` at once, one batch each, all on one event loop. They share the engine, so a finished row is
replaced by a row of whichever batch is next; a batch is yielded whole, rows in input order, once its last row is done.
(Ray 2.60 collects everything that a call yields before it passes it on, so yielding parts of a batch gains nothing;
what keeps the engine full behind a slow row is that more batches run at once, see ``processor.concurrent_batches``.)
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import pyarrow as pa
import ray
import torch

from tide_ray.config import EngineConfig
from tide_ray.data.ledger import DeathLedger
from tide_ray.data.logs import JobLog
from tide_ray.data.metrics import MetricsPublisher
from tide_ray.data.prompts import PARAMS_COLUMN, non_default_params, parse_messages, parse_sampling_params
from tide_ray.data.reports import Reporter
from tide_ray.data.schema import (
    DEPTHS,
    DRAFT_COLUMNS,
    ERROR_COLUMN,
    EXITS_ON_COLUMN,
    GATE_SCORES_COLUMN,
    OPTIONAL_SCHEMA,
    SHADOW_LOSS_COLUMN,
    TIMES,
    TOKEN_IDS,
)
from tide_ray.data.shadow import DriftGuard, ShadowOptions
from tide_ray.engine.async_engine import AsyncEngine
from tide_ray.engine.engine import TideEngine
from tide_ray.engine.exit_setup import certificate_of
from tide_ray.engine.memory import peak_memory
from tide_ray.types import Prompt, RequestOutput, SamplingParams, UserError

logger = logging.getLogger(__name__)

RESULT_SCHEMA = pa.schema(
    [
        ("prompt", pa.string()),
        ("prompt_token_ids", TOKEN_IDS),
        ("num_input_tokens", pa.int32()),
        ("generated_tokens", TOKEN_IDS),
        ("generated_text", pa.string()),
        ("num_generated_tokens", pa.int32()),
        ("exit_layers", DEPTHS),
        ("token_times_us", TIMES),
        ("mean_exit_layer", pa.float32()),
        ("finish_reason", pa.string()),
        ("queue_time_us", pa.int64()),
        ("total_time_us", pa.int64()),
        ("request_id", pa.string()),
        ("batch_uuid", pa.string()),
        ("time_taken_llm", pa.float64()),
        ("params", pa.string()),
        (ERROR_COLUMN, pa.string()),
    ]
)
"""Columns that every row gets, the same for rejected rows, beside the input's own columns."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GeneratorOptions:
    """How rows become requests.

    Args:
        wraps_strings: a string prompt becomes one user message when the tokenizer has a chat template.
        system_prompt: put before chat prompts that have no system message.
        apply_chat_template: ``messages`` are used at all.
        returns_given_prompt: the ``prompt`` column is the prompt as given (JSON for messages), not as rendered.
        continues_on_error: a rejected row gets its reason in the error column; otherwise it fails the data set.
        ledger_folder: where to note rows that are being run, to give up on rows that kill the process.
        ledger_key: the column that identifies rows there.
        shadow: watch for drift on some rows, told by ``ledger_key``; needs an engine with a certificate.
        optional_columns: of ``OPTIONAL_SCHEMA``, which ones rows get as well.
        reports_folder: where the actor reports what it has done; see ``reports``.
        job: names the job in logs and metrics; None: Ray's own id does.
    """

    wraps_strings: bool = False
    system_prompt: str | None = None
    apply_chat_template: bool = True
    returns_given_prompt: bool = False
    continues_on_error: bool = False
    ledger_folder: str | None = None
    ledger_key: str = "row_id"
    shadow: ShadowOptions | None = None
    optional_columns: tuple[str, ...] = ()
    reports_folder: str | None = None
    job: str | None = None


class Generator:
    """Generates for tables of prompts.

    Args:
        model: what ``TideEngine.from_pretrained`` takes.
        config: the engine's settings.
        options: how rows become requests.
    """

    def __init__(self, model: str, config: EngineConfig, options: GeneratorOptions) -> None:
        self._options = options
        start = time.perf_counter()
        name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
        self._reporter = Reporter(options.reports_folder, name) if options.reports_folder else None
        job = options.job or ray.get_runtime_context().get_job_id()
        self._log, self._metrics = JobLog(logger, job), MetricsPublisher(job)
        try:
            self._async_engine = AsyncEngine(partial(self._make_engine, model, config))
            self._engine = self._async_engine.engine
            self._check_options()
        except UserError as error:
            self._report_failure(error)
            raise
        self._drift = self._make_drift_guard()
        self._ledger = DeathLedger(options.ledger_folder) if options.ledger_folder else None
        facts, seconds = self._engine.describe(), time.perf_counter() - start
        self._log.event("engine started", seconds=round(seconds, 3), engine=facts)
        if self._reporter is not None:
            self._reporter.engine_started(facts, seconds)

    def _make_engine(self, model: str, config: EngineConfig) -> TideEngine:
        engine = TideEngine.from_pretrained(model, config)
        engine.warm_up()
        self._metrics.watch(engine)
        return engine

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Generate for each row. Yields one table: ``batch``'s columns and RESULT_SCHEMA's, rows in input order."""
        wanted = ("prompt", "messages", "prompt_token_ids", PARAMS_COLUMN, self._options.ledger_key)
        names = [name for name in wanted if name in batch.column_names]
        if self._reporter is not None:
            self._reporter.rows_arrived()
        rows = batch.select(names).to_pylist() if names else [{} for _ in range(batch.num_rows)]
        batch_uuid = uuid.uuid4().hex
        try:
            if self._ledger is None:
                results = await asyncio.gather(*(self._generate(row, batch_uuid) for row in rows))
            else:
                keys = batch[self._options.ledger_key].to_pylist()
                runs = [lambda row=row: self._generate(row, batch_uuid) for row in rows]
                results = await self._ledger.run(keys, runs, lambda i, e: _failed_row(rows[i], e, batch_uuid))
        except UserError:
            raise
        except Exception as error:
            self._leave_if_fatal(error)
            self._report_failure(error)
            raise
        self._report_batch(results)
        if not self._engine.has_unfinished_requests():
            self._metrics.publish()  # nothing may come any more, and Ray ends the process without a word
        yield _attach(batch, results, self._options.optional_columns)

    async def _generate(self, row: dict[str, Any], batch_uuid: str) -> dict[str, Any]:
        start = time.perf_counter()
        try:
            prompt, params = self._request(row)
            generate = partial(self._async_engine.generate, prompt, params)
            loss, exits_on = None, True
            if self._drift is None:
                output = await generate()
            else:
                row_id = str(row[self._options.ledger_key])
                output, loss, exits_on = await self._drift.answer(row_id, params, generate)
            if output.error:
                raise UserError(output.error)
        except UserError as error:
            if not self._options.continues_on_error:
                self._report_failure(error)
                raise
            return _failed_row(row, str(error), batch_uuid)
        result = _finished_row(output, params, batch_uuid, time.perf_counter() - start)
        result |= {SHADOW_LOSS_COLUMN: loss, EXITS_ON_COLUMN: exits_on}
        if self._options.returns_given_prompt:
            result["prompt"] = _given_prompt(row)
        return result

    def _request(self, row: dict[str, Any]) -> tuple[Prompt, SamplingParams]:
        params = SamplingParams.from_mapping(parse_sampling_params(row.get(PARAMS_COLUMN)))
        if params.n != 1 or params.logprobs is not None:
            raise UserError(f"n must be 1 and logprobs none for rows, got n={params.n}, logprobs={params.logprobs}")
        prompt, messages, token_ids = row.get("prompt"), row.get("messages"), row.get("prompt_token_ids")
        if token_ids is not None:
            return [int(token_id) for token_id in token_ids], params
        if messages is not None and self._options.apply_chat_template:
            return self._with_system_prompt(parse_messages(messages)), params
        if not isinstance(prompt, str):
            raise UserError(f"prompt must be a string, got {type(prompt).__name__}")
        if self._options.wraps_strings and self._has_chat_template:
            return self._with_system_prompt([{"role": "user", "content": prompt}]), params
        return prompt, params

    @property
    def _has_chat_template(self) -> bool:
        return bool(getattr(self._engine.tokenizer, "chat_template", None))

    def _with_system_prompt(self, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
        system = self._options.system_prompt
        if system is None or messages[0]["role"] == "system":
            return messages
        return [{"role": "system", "content": system}, *messages]

    def _check_options(self) -> None:
        if self._options.system_prompt is not None and not self._has_chat_template:
            raise UserError("system_prompt needs a chat template, the model's tokenizer has none")

    def _make_drift_guard(self) -> DriftGuard | None:
        if self._options.shadow is None:
            return None
        certificate = certificate_of(self._engine.config, self._engine.routers)
        assert certificate is not None, "the job has checked that there is one"
        return DriftGuard(self._async_engine, certificate, self._options.shadow, self._log)

    def _report_batch(self, results: Sequence[dict[str, Any]]) -> None:
        totals = {
            "rows": len(results),
            "errors": sum(bool(result[ERROR_COLUMN]) for result in results),
            "tokens": sum(result["num_generated_tokens"] for result in results),
            "depths": sum(sum(result["exit_layers"]) for result in results),
        }
        self._log.event("batch done", **totals)
        if self._reporter is None:
            return
        stats = self._engine.stats
        engine = {
            "rows_through_layer": list(stats.rows_through_layer),
            "num_prompt_tokens": stats.num_prompt_tokens,
            "num_cached_tokens": stats.num_cached_tokens,
            "num_steps": stats.num_steps,
            "num_preemptions": stats.num_preemptions,
            "launches": dict(stats.launches),
            "num_filled_rows": stats.num_filled_rows,
            "num_prefill_exits": stats.num_prefill_exits,
            "num_dropped_tokens": stats.num_dropped_tokens,
            "num_accepted_drafts": stats.num_accepted_drafts,
            "num_rejected_drafts": stats.num_rejected_drafts,
            "deferred_rows": dict(stats.deferred_rows),
            "tokens_at_depth": {str(depth): count for depth, count in sorted(stats.tokens_at_depth.items())},
        }
        memory = peak_memory(self._engine.model.device)
        drift = None if self._drift is None else self._drift.facts()
        self._reporter.batch_done(totals, engine, self._engine.describe_exits(), memory, drift)

    def _report_failure(self, error: Exception) -> None:
        self._log.error("engine failed", error=str(error))
        if self._reporter is not None:
            self._reporter.failed(f"{error}", isinstance(error, UserError))

    def _leave_if_fatal(self, error: Exception) -> None:
        cause = error.__cause__ if error.__cause__ is not None else error
        if not isinstance(cause, torch.AcceleratorError):
            return
        # The CUDA context is gone for good. Raising would send the retry to this same broken process; only a process
        # that dies is replaced, and only this kind of death lets Ray run the batch again elsewhere.
        logger.error("fatal device error, leaving so that the actor is restarted: %s", cause)
        os._exit(1)


def _finished_row(output: RequestOutput, params: SamplingParams, batch_uuid: str, seconds: float) -> dict[str, Any]:
    completion = output.outputs[0]
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "num_input_tokens": len(output.prompt_token_ids),
        "generated_tokens": completion.token_ids,
        "generated_text": completion.text,
        "num_generated_tokens": len(completion.token_ids),
        "exit_layers": completion.exit_layers,
        GATE_SCORES_COLUMN: completion.gate_scores,
        **{name: getattr(completion, name) for name in DRAFT_COLUMNS},
        "token_times_us": completion.token_times_us,
        "mean_exit_layer": completion.mean_exit_layer,
        "finish_reason": completion.finish_reason,
        "queue_time_us": output.queue_time_us,
        "total_time_us": output.total_time_us,
        "request_id": output.request_id,
        "batch_uuid": batch_uuid,
        "time_taken_llm": seconds,
        "params": json.dumps(non_default_params(params)),
        ERROR_COLUMN: "",
    }


def _failed_row(row: dict[str, Any], error: str, batch_uuid: str) -> dict[str, Any]:
    return {
        "prompt": _given_prompt(row),
        "prompt_token_ids": [],
        "num_input_tokens": 0,
        "generated_tokens": [],
        "generated_text": "",
        "num_generated_tokens": 0,
        "exit_layers": [],
        GATE_SCORES_COLUMN: [],
        **dict.fromkeys(DRAFT_COLUMNS, 0),
        "token_times_us": [],
        "mean_exit_layer": 0.0,
        "finish_reason": "error",
        "queue_time_us": 0,
        "total_time_us": 0,
        "request_id": "",
        "batch_uuid": batch_uuid,
        "time_taken_llm": -1.0,
        "params": "",
        ERROR_COLUMN: error,
    }


def _given_prompt(row: dict[str, Any]) -> str | None:
    """The prompt as the input has it: the string, messages as JSON, None for token ids."""
    messages = row.get("messages")
    if isinstance(row.get("prompt"), str):
        return row["prompt"]
    return messages if messages is None or isinstance(messages, str) else json.dumps(messages, default=str)


def _attach(batch: pa.Table, results: Sequence[dict[str, Any]], optional_columns: Sequence[str]) -> pa.Table:
    added = pa.schema([*RESULT_SCHEMA, *(OPTIONAL_SCHEMA.field(name) for name in optional_columns)])
    made = pa.Table.from_pylist(list(results), schema=added)
    carried = [name for name in batch.column_names if name not in added.names]
    schema = pa.schema([*(batch.schema.field(name) for name in carried), *added])
    return pa.Table.from_arrays([*(batch[name] for name in carried), *made.columns], schema=schema)
