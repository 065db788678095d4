"""The class that Ray Data runs in each actor: one engine, and an async generator over it.

Ray runs many ``__call__`` at once, one batch each, all on one event loop. They share the engine, so a finished row is
replaced by a row of whichever batch is next; a batch is yielded whole, rows in input order, once its last row is done.
(Ray 2.60 collects everything that a call yields before it passes it on, so yielding parts of a batch gains nothing;
what keeps the engine full behind a slow row is that more batches run at once, see ``processor.concurrent_batches``.)

Drivers import this module to name the class, so what needs torch or transformers' models is imported in the actor.
"""

from __future__ import annotations

import asyncio
import logging
import os
import time
import uuid
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import ray

from tide_ray.config import EngineConfig
from tide_ray.data.drain import Drainable
from tide_ray.data.ledger import DeathLedger
from tide_ray.data.logs import JobLog
from tide_ray.data.metrics import MetricsPublisher
from tide_ray.data.nodes import this_node
from tide_ray.data.placement import Placement
from tide_ray.data.prompts import PARAMS_COLUMN, parse_messages, parse_sampling_params
from tide_ray.data.reports import Reporter, Reports, engine_counters
from tide_ray.data.result_rows import attach, failed_row, finished_row, given_prompt
from tide_ray.data.schema import ERROR_COLUMN, EXITS_ON_COLUMN, SHADOW_LOSS_COLUMN
from tide_ray.data.storage import off_loop
from tide_ray.startup import quick_imports
from tide_ray.types import Prompt, SamplingParams, UserError

if TYPE_CHECKING:
    from tide_ray.data.shadow import DriftGuard, ShadowOptions
    from tide_ray.engine.engine import TideEngine

logger = logging.getLogger(__name__)

DEFAULT_STEP_TIMEOUT = 600.0


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
        drain_path: where the job asks for an end; rows that are dropped then are missing from what is yielded.
        step_timeout: seconds after which a step of the engine that has not ended ends the process.
        placement: gives the engine its share of the node that the actor comes to; None: the engine has all of it.
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
    drain_path: str | None = None
    step_timeout: float = DEFAULT_STEP_TIMEOUT
    placement: Placement | None = None


class Generator:
    """Generates for tables of prompts.

    Args:
        model: what ``TideEngine.from_pretrained`` takes.
        config: the engine's settings.
        options: how rows become requests.
    """

    def __init__(self, model: str, config: EngineConfig, options: GeneratorOptions) -> None:
        with quick_imports():
            from tide_ray.data.engine_guard import GuardedEngine
            from tide_ray.engine.memory import peak_memory

        start = time.perf_counter()
        self._options = options
        context = ray.get_runtime_context()
        self._reporter: Reporter | None = None
        if options.reports_folder is not None:
            name = f"{os.getpid()}-{uuid.uuid4().hex[:8]}"
            self._reporter = Reporter(options.reports_folder, name, actor=context.get_actor_id())
        job = options.job or context.get_job_id()
        if options.placement is not None:
            config = options.placement.share_of(config, this_node())
        self._log, self._metrics = JobLog(logger, job), MetricsPublisher(job)
        self._drift: DriftGuard | None = None
        try:
            self._guard = GuardedEngine(
                partial(self._watched_engine, model),
                config,
                step_timeout=options.step_timeout,
                engine_failed=self._metrics.forget,
                engine_changed=self._report_engine,
            )
            facts = self.engine.describe()
            self._peak_memory = partial(peak_memory, self.engine.model.device)
            self._has_chat_template = bool(getattr(self.engine.tokenizer, "chat_template", None))
            self._check_options()
            seconds = time.perf_counter() - start
            self._log.event("engine started", seconds=round(seconds, 3), engine=facts)
            if self._reporter is not None:
                self._reporter.engine_started(facts, seconds, node=context.get_node_id())
                Reports(str(self._reporter.folder)).check_dtypes()
        except UserError as error:
            self._report_failure(error)
            raise
        self._drift = self._make_drift_guard()
        self._ledger = DeathLedger(options.ledger_folder) if options.ledger_folder else None
        self._drain = Drainable(options.drain_path) if options.drain_path else None

    @property
    def engine(self) -> TideEngine:
        """The engine that runs now. Not to be asked for while one is replaced."""
        assert self._guard.engine is not None
        return self._guard.engine

    def _watched_engine(self, model: str, config: EngineConfig) -> TideEngine:
        engine = self._make_engine(model, config)
        if self._drift is not None and self._drift.test.has_tripped:
            engine.stop_exits()  # it takes the place of one whose exits were stopped
        self._metrics.watch(engine)
        return engine

    def _make_engine(self, model: str, config: EngineConfig) -> TideEngine:
        from tide_ray.engine.engine import TideEngine

        engine = TideEngine.from_pretrained(model, config)
        engine.warm_up()
        return engine

    async def __call__(self, batch: pa.Table) -> AsyncIterator[pa.Table]:
        """Generate for each row. Yields one table: ``batch``'s columns and RESULT_SCHEMA's, rows in input order."""
        if self._drain is not None and await self._drain.is_requested():
            yield attach(batch, [None] * batch.num_rows, self._options.optional_columns)
            return
        wanted = ("prompt", "messages", "prompt_token_ids", PARAMS_COLUMN, self._options.ledger_key, ERROR_COLUMN)
        names = [name for name in wanted if name in batch.column_names]
        if self._reporter is not None:
            await off_loop(self._reporter.folder, partial(self._reporter.rows_arrived, batch.num_rows))
        rows = batch.select(names).to_pylist() if names else [{} for _ in range(batch.num_rows)]
        batch_uuid = uuid.uuid4().hex
        try:
            if self._ledger is None:
                results: list[dict[str, Any] | None] = await asyncio.gather(
                    *(self._unless_drained(row, batch_uuid) for row in rows)
                )
            else:
                keys = batch[self._options.ledger_key].to_pylist()
                runs = [lambda row=row: self._unless_drained(row, batch_uuid) for row in rows]
                results = await self._ledger.run(keys, runs, lambda i, e: failed_row(rows[i], e, batch_uuid))
        except UserError:
            raise
        except Exception as error:
            self._report_failure(error)
            raise
        await self._report_batch([result for result in results if result is not None])
        engine = self._guard.engine
        if engine is not None and not engine.has_unfinished_requests():
            self._metrics.publish()  # nothing may come any more, and Ray ends the process without a word
        yield attach(batch, results, self._options.optional_columns)

    async def _unless_drained(self, row: dict[str, Any], batch_uuid: str) -> dict[str, Any] | None:
        """The row's result, None if the job ends before there is one."""
        if self._drain is None:
            return await self._generate(row, batch_uuid)
        return await self._drain.run(lambda: self._generate(row, batch_uuid))

    async def _generate(self, row: dict[str, Any], batch_uuid: str) -> dict[str, Any]:
        if error := row.get(ERROR_COLUMN):  # by an earlier step of the pipeline
            return failed_row(row, error, batch_uuid) | {"prompt": row.get("prompt")}
        start = time.perf_counter()
        try:
            prompt, params = self._request(row)
            generate = partial(self._guard.generate, prompt, params)
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
            return failed_row(row, str(error), batch_uuid)
        result = finished_row(output, params, batch_uuid, time.perf_counter() - start)
        result |= {SHADOW_LOSS_COLUMN: loss, EXITS_ON_COLUMN: exits_on}
        if self._options.returns_given_prompt:
            result["prompt"] = given_prompt(row)
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
        from tide_ray.data.shadow import DriftGuard
        from tide_ray.engine.exit_setup import certificate_of

        certificate = certificate_of(self.engine.config, self.engine.routers)
        assert certificate is not None, "the job has checked that there is one"
        return DriftGuard(self._guard, certificate, self._options.shadow, self._log)

    async def _report_batch(self, results: Sequence[dict[str, Any]]) -> None:
        totals = {
            "rows": len(results),
            "errors": sum(bool(result[ERROR_COLUMN]) for result in results),
            "tokens": sum(result["num_generated_tokens"] for result in results),
            "depths": sum(sum(result["exit_layers"]) for result in results),
        }
        self._log.event("batch done", **totals)
        if self._reporter is None:
            return
        engine = self._guard.engine
        counters = {} if engine is None else engine_counters(engine.stats)
        exits = None if engine is None else engine.describe_exits()
        drift = None if self._drift is None else self._drift.facts()
        report = partial(self._reporter.batch_done, totals, counters, exits, self._peak_memory(), drift)
        await off_loop(self._reporter.folder, report)

    def _report_engine(self, engine: TideEngine) -> None:
        self._log.warning("engine replaced", engine=engine.describe())
        if self._reporter is not None:
            self._reporter.engine_changed(engine.describe())

    def _report_failure(self, error: Exception) -> None:
        self._log.error("engine failed", error=str(error))
        if self._reporter is not None:
            self._reporter.failed(f"{error}", isinstance(error, UserError))
