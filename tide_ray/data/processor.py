"""``build_processor``: generation as a step of any Ray Data pipeline, with the names and row contract of ray.data.llm.

Rows bring ``messages``, ``prompt`` or ``prompt_token_ids``, and ``sampling_params`` if they like; they leave with the
columns of ``result_rows.RESULT_SCHEMA`` beside their own. Strings are used as they are, messages through the template.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from pydantic import BaseModel, ConfigDict, Field, field_validator
from ray.data import ActorPoolStrategy, Dataset

from tide_ray.config import EngineConfig
from tide_ray.data.actor import Generator, GeneratorOptions
from tide_ray.data.nodes import ACCELERATOR_PREFIX, ACCELERATOR_SHARE, check_labels, live_nodes
from tide_ray.data.pacing import Pacing
from tide_ray.data.placement import Placement, plan_placement, wait_for_placement
from tide_ray.data.row_functions import RowFunction, unless_rejected, with_request
from tide_ray.types import UserError

ROWS_IN_FLIGHT_PER_RESIDENT = 4
USUAL_RESIDENTS = 256
MAX_CONCURRENT_BATCHES = 128


class TideProcessorConfig(BaseModel):
    """A model, its engine and the actors that run it."""

    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())

    model_source: str = Field(description="hub id, folder, .gguf file or 'demo'")
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="fields of EngineConfig")
    batch_size: int = Field(default=32, ge=1, description="rows per batch and block")
    concurrency: int | tuple[int, int] = Field(
        default=1, description="actors: a number, or (min, max) to scale between"
    )
    accelerator_type: str | None = Field(default=None, description="Ray accelerator type that actors need")
    labels: dict[str, str] = Field(default_factory=dict, description="labels that an actor's node must have")
    runtime_env: dict[str, Any] | None = Field(default=None, description="Ray runtime environment of the actors")
    max_concurrent_batches: int | None = Field(
        default=None, ge=1, description="batches in one actor at a time; None keeps the engine full behind slow rows"
    )
    should_continue_on_error: bool = Field(
        default=False, description="put a row's error in its row instead of raising it"
    )
    num_gpus_per_actor: float | None = Field(default=None, ge=0, description="None: 1 if the cluster has GPUs to use")
    num_cpus_per_actor: float | None = Field(default=None, ge=0, description="None: leaves CPUs to reads and writes")
    apply_chat_template: bool = Field(default=True, description="use the messages column, through the model's template")
    wait_for_nodes_s: float = Field(default=0.0, ge=0, description="time for an autoscaler to make room for the actors")

    @field_validator("engine_kwargs")
    @classmethod
    def _check_engine_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        make_engine_config(value)
        return value

    @field_validator("concurrency")
    @classmethod
    def _check_concurrency(cls, value: int | tuple[int, int]) -> int | tuple[int, int]:
        low, high = (value, value) if isinstance(value, int) else value
        if not 1 <= low <= high:
            raise UserError(f"concurrency must be a positive number or (min, max), got {value!r}")
        return value

    @field_validator("labels")
    @classmethod
    def _check_labels(cls, value: dict[str, str]) -> dict[str, str]:
        check_labels(value)
        return value

    @property
    def num_actors(self) -> int:
        """Actors that must be able to run at once."""
        return self.concurrency if isinstance(self.concurrency, int) else self.concurrency[0]

    @property
    def max_actors(self) -> int:
        """The most actors that may run at once."""
        return self.concurrency if isinstance(self.concurrency, int) else self.concurrency[1]


def make_engine_config(engine_kwargs: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from a mapping. Raises UserError for an unknown field or a bad value."""
    known = [f.name for f in dataclasses.fields(EngineConfig)]
    for name in engine_kwargs:
        if name not in known:
            raise UserError(f"engine_kwargs: unknown field {name!r}; known: {', '.join(known)}")
    return EngineConfig(**engine_kwargs)


def concurrent_batches(
    batch_size: int,
    max_num_seqs: int | None,
    *,
    num_rows: int | None = None,
    num_actors: int = 1,
    max_actors: int | None = None,
) -> int:
    """Batches one actor runs at a time so that its engine stays full, and others get theirs.

    A batch is only over when its slowest row is, and its finished rows occupy no resident meanwhile; four rows in
    flight per resident keep residents busy with answers up to four times longer than the mean.

    Args:
        batch_size: rows in each.
        max_num_seqs: the engine's residents; None: not known.
        num_rows: of the whole data set, if that is known: no actor takes more than its part of them.
        num_actors, max_actors: how many share them. Ray lets a pool grow once all its actors are busy and batches wait;
            so an actor of one that can grow leaves what more actors could do, yet takes enough to fill its residents,
            as they may never come.
    """
    residents = max_num_seqs or USUAL_RESIDENTS
    batches = min(max(2, -(-ROWS_IN_FLIGHT_PER_RESIDENT * residents // batch_size)), MAX_CONCURRENT_BATCHES)
    if num_rows is None:
        return batches
    most = max_actors or num_actors
    part = -(-num_rows // (batch_size * most))
    return min(batches, part if most == num_actors else max(part, -(-residents // batch_size)))


class Processor:
    """Applies to a data set, lazily: ``preprocess``, generation, ``postprocess``. See ``build_processor``."""

    def __init__(
        self,
        config: TideProcessorConfig,
        preprocess: RowFunction | None = None,
        postprocess: RowFunction | None = None,
        *,
        preprocess_map_kwargs: Mapping[str, Any] | None = None,
        postprocess_map_kwargs: Mapping[str, Any] | None = None,
        options: GeneratorOptions | None = None,
        num_rows: int | None = None,
        generator: type[Generator] = Generator,
    ) -> None:
        for name, function in (("preprocess", preprocess), ("postprocess", postprocess)):
            if isinstance(function, type):
                raise UserError(f"{name} must be a function of a row, got the class {function.__name__}")
        self.config = config
        self._preprocess = preprocess
        self._postprocess = postprocess
        self._preprocess_map_kwargs = dict(preprocess_map_kwargs or {})
        self._postprocess_map_kwargs = dict(postprocess_map_kwargs or {})
        self._options = options or GeneratorOptions(
            apply_chat_template=config.apply_chat_template, continues_on_error=config.should_continue_on_error
        )
        self._num_rows = num_rows
        self._generator = generator

    def __call__(self, dataset: Dataset) -> Dataset:
        """The processed data set. Raises UserError if the cluster cannot place the actors."""
        if self._preprocess is not None:
            dataset = dataset.map(with_request(self._preprocess), **self._preprocess_map_kwargs)
        dataset = self._generate(dataset)
        if self._postprocess is None:
            return dataset
        kept = unless_rejected(self._postprocess, adds_error=self.config.should_continue_on_error)
        return dataset.map(kept, **self._postprocess_map_kwargs)

    def placed(self) -> Placement:
        """Where actors go. Raises UserError if the cluster cannot place them."""
        if not ray.is_initialized():
            ray.init()
        config = self.config
        device = make_engine_config(config.engine_kwargs).device
        has_chosen = bool(config.labels) or config.accelerator_type is not None

        def plan() -> Placement:
            return plan_placement(
                live_nodes(ray.nodes(), config.labels, config.accelerator_type),
                num_actors=config.num_actors,
                max_actors=config.max_actors,
                device=device,
                num_gpus=config.num_gpus_per_actor,
                num_cpus=config.num_cpus_per_actor,
                where="the nodes asked for have" if has_chosen else "the cluster has",
            )

        if not config.wait_for_nodes_s:
            return plan()
        amounts = {"GPU": config.num_gpus_per_actor, "CPU": config.num_cpus_per_actor}
        each = {name: amount for name, amount in amounts.items() if amount} or {"CPU": 1.0}
        if config.accelerator_type is not None:
            each[ACCELERATOR_PREFIX + config.accelerator_type] = ACCELERATOR_SHARE
        ask = partial(_ask_autoscaler, labels=config.labels)
        return wait_for_placement(plan, ask, [each] * config.num_actors, config.wait_for_nodes_s)

    def ray_options(self, placement: Placement) -> dict[str, Any]:
        """What a task or an actor takes that runs an engine as ``placement`` has it: resources, and where they are."""
        chosen = {"accelerator_type": self.config.accelerator_type, "label_selector": self.config.labels or None}
        given = {name: value for name, value in chosen.items() if value is not None}
        return {"num_gpus": placement.num_gpus or None, "num_cpus": placement.num_cpus, **given}

    def _generate(self, dataset: Dataset) -> Dataset:
        config = self.config
        engine = make_engine_config(config.engine_kwargs)
        placement = self.placed()
        batches = config.max_concurrent_batches or concurrent_batches(
            config.batch_size,
            engine.max_num_seqs,
            num_rows=self._num_rows,
            num_actors=config.num_actors,
            max_actors=placement.max_actors,
        )
        # A block is what Ray retries and hands out, so it is made as large as a batch whatever the input's layout was.
        dataset = dataset.repartition(target_num_rows_per_block=config.batch_size)
        callbacks = dataset.context.custom_execution_callback_classes
        if Pacing not in callbacks:  # two processors in a pipeline share its context, and one pause is enough
            dataset.context.custom_execution_callback_classes = [*callbacks, Pacing]
        if placement.max_actors > config.num_actors:
            # Ray's own threshold, 1.75 batches for each that an actor can run, is never reached where none wait in it.
            scaling = dataset.context.autoscaling_config
            dataset.context.autoscaling_config = replace(scaling, actor_pool_util_upscaling_threshold=1.0)
        return dataset.map_batches(
            self._generator,
            fn_constructor_kwargs={
                "model": config.model_source,
                "config": engine,
                "options": replace(self._options, placement=placement),
            },
            batch_size=config.batch_size,
            batch_format="pyarrow",
            compute=ActorPoolStrategy(
                min_size=config.num_actors,
                max_size=placement.max_actors,
                max_concurrent_calls_per_actor=batches,
                # Rows already queue inside the actor; more tasks waiting there would only be missing elsewhere.
                max_tasks_in_flight_per_actor=batches,
            ),
            runtime_env=config.runtime_env,
            udf_modifying_row_count=False,
            **self.ray_options(placement),
        )


def _ask_autoscaler(bundles: Sequence[Mapping[str, float]], *, labels: Mapping[str, str]) -> None:
    from ray.autoscaler.sdk import request_resources

    selectors = [dict(labels) for _ in bundles] if labels else None
    request_resources(bundles=[dict(bundle) for bundle in bundles], bundle_label_selectors=selectors)


def build_processor(
    config: TideProcessorConfig,
    preprocess: RowFunction | None = None,
    postprocess: RowFunction | None = None,
    preprocess_map_kwargs: Mapping[str, Any] | None = None,
    postprocess_map_kwargs: Mapping[str, Any] | None = None,
) -> Processor:
    """A callable from data set to data set, as ``ray.data.llm.build_processor`` makes.

    Args:
        config: model and actors.
        preprocess: from a row to what is added to it: ``messages``, ``prompt`` or ``prompt_token_ids``, in place of all
            of these that the row had, and ``sampling_params``, whose nulls are defaults. Others are carried over.
        postprocess: from a generated row to the row to keep. With ``should_continue_on_error`` a rejected row passes it
            by, whole, as it does all later steps, and every row has the column ``__inference_error__``, empty where
            nothing went wrong.
        preprocess_map_kwargs, postprocess_map_kwargs: what else ``Dataset.map`` is given, e.g. ``num_cpus``.
    """
    return Processor(
        config,
        preprocess,
        postprocess,
        preprocess_map_kwargs=preprocess_map_kwargs,
        postprocess_map_kwargs=postprocess_map_kwargs,
    )
