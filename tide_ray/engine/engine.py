"""The engine: continuous batching over one model, driven by three verbs (schedule, run, commit).

``generate`` answers a list of prompts; ``stream`` one prompt, token by token; ``add_request`` / ``step`` are for
callers with their own loop. Not thread-safe: one thread drives an engine (see ``async_engine``).
"""

from __future__ import annotations

import itertools
import time
from collections import deque
from collections.abc import Iterator
from collections.abc import Sequence as Seq
from typing import Any

import torch

from tide_kernels import gpu
from tide_kernels.paged_attention import unfit_heads
from tide_ray.config import EngineConfig
from tide_ray.engine.admission import RequestMaker, as_list, params_for_each
from tide_ray.engine.committer import Committer
from tide_ray.engine.exit_setup import certificate_of, describe_costs, describe_exits, install_exits, load_routers
from tide_ray.engine.launch import Launch
from tide_ray.engine.memory import keep_freed_memory, plan_memory, return_freed_memory
from tide_ray.engine.prefix_cache import PrefixCache
from tide_ray.engine.preparation import memory_and_graphs, position_limit, prepared, runs_ahead
from tide_ray.engine.request_book import RequestBook
from tide_ray.engine.requests import PromptEncoder, to_output
from tide_ray.engine.runner import Runner
from tide_ray.engine.scheduler import Scheduler
from tide_ray.engine.selfcheck import selfcheck
from tide_ray.engine.sequence import now_us
from tide_ray.engine.stages import plan_stages
from tide_ray.exits.checkpoint import Routers
from tide_ray.models.loading import LoadedModel, load_as, missing_kernels_as_user_errors
from tide_ray.types import EngineStats, Prompt, RequestOutput, SamplingParams

WARM_UP_ROWS = 16


class TideEngine:
    """One model with its K/V memory, generating for many requests at a time.

    Args:
        model: what ``tide_ray.models.load`` returned. The engine takes over its attention and, on a CPU, its linear
            layers' weights and its norms.
        config: how to run it.
        routers: calibrated for this model, in place of the checkpoint that ``config.exits`` names.

    Raises:
        UserError: the model or the configuration cannot be run; the message names what.
    """

    def __init__(self, model: LoadedModel, config: EngineConfig | None = None, routers: Routers | None = None) -> None:
        self.model = model
        self.config = config = config or EngineConfig()
        if config.num_threads is not None:
            torch.set_num_threads(config.num_threads)
        adapter = prepared(model, config)
        if model.device.type == "cpu":
            return_freed_memory()
            keep_freed_memory()
        routers = load_routers(config, model, adapter) if routers is None else routers
        self.certificate = certificate = certificate_of(config, routers)
        stops_as_certified = certificate is not None and certificate.prefill_threshold is not None
        stages = plan_stages(config, adapter.num_layers, routers.depths if routers is not None else ())
        windows = selfcheck(adapter) if config.selfcheck else None
        plan = plan_memory(config, adapter, model_limit=position_limit(adapter.config, windows))
        self.num_layers = adapter.num_layers
        self.max_model_len = plan.max_model_len
        self.max_num_seqs = plan.max_num_seqs
        self.num_kv_pages = plan.num_pages
        self.stats = EngineStats(rows_through_layer=[0] * adapter.num_layers)
        with missing_kernels_as_user_errors():
            pools, graphs = memory_and_graphs(config, adapter, stages, plan)
        self.scheduler = Scheduler(
            PrefixCache(plan.num_pages, config.page_size, is_on=config.prefix_caching and not stops_as_certified),
            max_residents=plan.max_num_seqs,
            max_rows=config.max_num_batched_tokens,
            full_depth=stages[-1].depth,
            prefill_tail=config.prefill_tail,
            clock=now_us,
        )
        self.runner = Runner(
            adapter,
            stages,
            pools,
            self.stats,
            waiting=self.scheduler.waiting_for_stage,
            max_residents=plan.max_num_seqs,
            prefill_tail=config.prefill_tail,
            graphs=graphs,
        )
        self.routers = routers
        with missing_kernels_as_user_errors():
            for head_dim in {shape.head_dim for shape in adapter.kv_shapes}:
                gpu.runs(adapter.device, adapter.dtype, unfit_heads(head_dim))
            if routers is not None:
                install_exits(config, routers, self.runner, self.max_num_seqs)
        self.committer = Committer(
            self.scheduler,
            self.stats,
            now_us,
            full_depth=stages[-1].depth if config.mode == "verified" else None,
            judged=self.runner.drafts_judged,
        )
        self.runs_ahead = runs_ahead(config, self.runner)
        self._in_flight: deque[Launch] = deque()  # queued and not read, oldest first
        self.encoder = PromptEncoder(model.tokenizer, adapter.config.vocab_size)
        maker = RequestMaker(
            model,
            config,
            routers,
            max_model_len=plan.max_model_len,
            num_kv_tokens=plan.num_pages * config.page_size,
            vocab_size=adapter.config.vocab_size,
        )
        self.requests = RequestBook(self.encoder, maker, self.scheduler, self.stats, model.tokenizer)
        self._numbers = itertools.count()

    @classmethod
    def from_pretrained(cls, model: str, config: EngineConfig | None = None) -> TideEngine:
        """Load ``model`` (hub id, folder, .gguf file or ``demo``) and make an engine for it."""
        config = config or EngineConfig()
        loaded = load_as(model, config)
        return cls(loaded, config)

    def warm_up(self) -> None:
        """Answer a short prompt and forget it, so that the first request waits for nothing that only happens once.

        That is loading compiled kernels, touching the weights and starting threads, and on a GPU capturing graphs:
        seconds. To be called while nothing runs; counters start from zero afterwards, and no prompt is remembered.
        """
        prompt = [0] * min(WARM_UP_ROWS, self.max_model_len - 2)
        if self.runner.graphs is not None:
            self.runner.graphs.capture_all()
        # A certificate does not hold for ignored EOS tokens; a request for full depth needs none.
        policy = "full" if self.config.max_disagreement is not None else None
        self.generate(prompt, SamplingParams(temperature=0, max_tokens=2, ignore_eos=True, exit_policy=policy))
        self.scheduler.pool.clear()
        self.stats.reset()

    @property
    def tokenizer(self) -> Any:
        """The model's tokenizer, or None when it has none."""
        return self.model.tokenizer

    # ---- whole answers ----

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[RequestOutput]:
        """Answer every prompt; outputs are in the order of the prompts.

        A prompt that cannot be run (too long, not a prompt) comes back with ``error`` set; the others are answered.

        Args:
            prompts: one prompt or a list of them; see ``tide_ray.types.Prompt``.
            sampling_params: one for all, or one for each prompt.

        Raises:
            UserError: ``sampling_params`` are not that, or not as many as the prompts.
        """
        many = as_list(prompts)
        each = params_for_each(sampling_params, len(many))
        ids = [f"generate-{next(self._numbers)}" for _ in many]
        try:
            for request_id, prompt, one in zip(ids, many, each, strict=True):
                self.requests.add(request_id, prompt, one, is_claimed=True)
            for request_id in reversed(ids):
                while self.requests.get(request_id) is not None:
                    self._advance()
            return [self.requests.pop(request_id) for request_id in ids]
        finally:
            for request_id in ids:
                self.abort(request_id)

    def stream(self, prompt: Prompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Answer one prompt, yielding the output so far after every token; the last one has ``finished`` set."""
        request_id = f"stream-{next(self._numbers)}"
        num_seen = 0
        try:
            params = sampling_params or SamplingParams()
            self.requests.add(request_id, prompt, params, is_claimed=True, streaming=True)
            while (request := self.requests.get(request_id)) is not None:
                self._advance()
                num_tokens = sum(len(sequence.output_ids) for sequence in request.sequences)
                if num_tokens > num_seen and not request.is_finished:
                    num_seen = num_tokens
                    yield to_output(request, self.tokenizer, finished=False)
            yield self.requests.pop(request_id)
        finally:
            self.abort(request_id)

    # ---- the loop ----

    def add_request(
        self,
        request_id: str,
        prompt: Prompt,
        params: SamplingParams,
        *,
        streaming: bool = False,
        delta_interval_us: int | None = None,
    ) -> None:
        """Queue a prompt. One that cannot be run is returned by the next ``step`` with ``error`` set.

        Args:
            request_id: unique among running requests.
            prompt: see ``tide_ray.types.Prompt``.
            params: how to sample.
            streaming: the text so far will be asked for before the end.
            delta_interval_us: ``step`` returns what is new of it, at most this often; see ``engine.deltas``.

        Raises:
            UserError: ``request_id`` is in use.
        """
        self.requests.add(request_id, prompt, params, streaming=streaming, delta_interval_us=delta_interval_us)

    def abort(self, request_id: str) -> None:
        """Forget a request and free what it holds; nothing happens when it is unknown."""
        self.requests.remove(request_id)

    def has_unfinished_requests(self) -> bool:
        """Whether ``step`` still has something to run or to return."""
        return self.requests.has_unclaimed

    def step(self) -> list[RequestOutput]:
        """Schedule, run and commit one launch; returns the requests that finished (or were rejected).

        Of requests added with ``delta_interval_us`` it returns what is new instead, ``finished`` with the last of it.
        Where launches are queued ahead, the one before is committed. Requests of a ``generate`` or ``stream`` that
        runs meanwhile advance too, and are left for it.
        """
        self._advance()
        return self.requests.take()

    def _advance(self) -> None:
        """Queue a step, then take in the one before, or, where steps do not run ahead, the same."""
        start, num_tokens = time.perf_counter(), self.stats.num_generated_tokens
        try:
            while self._in_flight and not self.runner.may_run_ahead:
                self._take_in_oldest()
            spans = self.scheduler.schedule()
            launch = None
            if spans or any(sequence.stage for sequence in self.scheduler.residents):
                launch = self.runner.run(spans, self._in_flight[-1] if self._in_flight else None)
                self._in_flight.append(launch)
            self.scheduler.launched(spans, launch.sequences if launch is not None else ())
            runs_ahead = self.runs_ahead and launch is not None and launch.may_be_read_later
            while len(self._in_flight) > (runs_ahead and self.runner.may_run_ahead and self.requests.has_running):
                self._take_in_oldest()
            self.runner.stepped(time.perf_counter() - start, self.stats.num_generated_tokens - num_tokens)
        except BaseException:
            self.scheduler.launch_failed([sequence for launch in self._in_flight for sequence in launch.sequences])
            self._in_flight.clear()
            raise

    def _take_in_oldest(self) -> None:
        """Read and commit the oldest step in flight."""
        self.requests.finish(self.committer.commit(self._in_flight[0].read()))
        self._in_flight.popleft()

    def describe(self) -> dict[str, Any]:
        """Facts of this engine for run records: model, policy, limits, threads."""
        config = self.config
        return {
            "model": self.model.source,
            "revision": self.model.revision,
            "model_fingerprint": self.model.fingerprint,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "device": str(self.model.device),
            "device_name": torch.cuda.get_device_name(self.model.device) if self.model.device.type == "cuda" else None,
            "mode": config.mode,
            "policy": "router" if self.routers is not None and config.policy == "auto" else config.resolved_policy,
            "exits": self.describe_exits(),
            "costs": describe_costs(self.runner),
            "stages": [
                {"name": stage.name, "layers": list(stage.layers), "depth": stage.depth} for stage in self.runner.stages
            ],
            "num_layers": self.num_layers,
            "num_fused_layers": len(self.runner.adapter.fused_layers),
            "async_scheduling": self.runs_ahead,
            "cuda_graphs": None if self.runner.graphs is None else self.runner.graphs.num_captured,
            "max_num_seqs": self.max_num_seqs,
            "max_model_len": self.max_model_len,
            "max_num_batched_tokens": config.max_num_batched_tokens,
            "num_kv_pages": self.num_kv_pages,
            "page_size": config.page_size,
            "prefix_caching": self.scheduler.pool.is_on,
            "num_threads": torch.get_num_threads(),
        }

    def stop_exits(self) -> None:
        """From the next step on, and for good, every token runs every layer. What has exited stays as it is."""
        if self.runner.exits is not None and self.runner.planner is not None:
            self.runner.exits.prefill_thresholds = [None] * len(self.runner.exits.boundaries)
            self.runner.planner.stop()

    def describe_exits(self) -> dict[str, Any] | None:
        """The checkpoint, the settings of exits and the launch plan as it is now; None without exits."""
        return describe_exits(self.config, self.routers, self.runner)
