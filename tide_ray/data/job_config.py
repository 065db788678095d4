"""Every setting of the generation job in one typed model; flags, YAML and Python build the same object.

``GenerateJobConfig.build`` is the door for values that a user typed: every mistake becomes a one-line UserError that
names the field and the value.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from tide_ray.config import EngineConfig
from tide_ray.data.nodes import check_labels
from tide_ray.data.storage import storage_path
from tide_ray.messages import one_line
from tide_ray.types import SamplingParams, UserError

SAMPLING_FIELDS = (
    "max_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty",
    "min_tokens", "stop", "stop_token_ids", "ignore_eos", "seed",
)  # fmt: skip
ENGINE_FIELDS = (
    "dtype", "device", "revision", "trust_remote_code", "max_num_seqs", "max_model_len", "max_num_batched_tokens",
    "policy", "exits", "mode", "exit_threshold", "exit_error", "max_disagreement", "certified_loss", "exit_min_depth",
    "exits_when", "confidence_measure", "capacity", "kv_policy", "prefill_share", "prefill_tail", "exit_layer",
    "skip_layers", "static_cost", "compile", "cuda_graphs", "async_scheduling", "num_threads", "prefix_caching",
)  # fmt: skip

Settings = TypeVar("Settings", bound=BaseModel)


class GenerateJobConfig(BaseModel):
    """What to generate, with which model, how it is sampled, and where it runs.

    An empty ``prompts`` means the bundled demo prompts. ``num_gpus_per_actor`` and ``num_cpus_per_actor`` left at None
    are planned from the cluster; ``address`` None means this machine.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: str = Field(default="demo", min_length=1, description="hub id, folder, .gguf file or 'demo'")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    prompts: list[str] = Field(
        default_factory=list, description="files, folders, globs (also s3://BUCKET/KEY) or data sets (hf:NAME)"
    )
    prompt_column: str | None = Field(default=None, description="column that holds the prompts")
    id_column: str | None = Field(default=None, description="column that holds unique row ids")
    length_column: str | None = Field(
        default=None, description="column with how many tokens each answer may take: the longest start first"
    )
    raw: bool = Field(default=False, description="use string prompts as they are, without the chat template")
    system_prompt: str | None = Field(default=None, description="system message put before every chat prompt")
    output: str = Field(default="./tide-output", min_length=1, description="output folder, or s3://BUCKET/KEY")
    limit: int | None = Field(default=None, ge=1, description="read only this many prompts")
    keep_columns: list[str] | Literal["all"] = Field(default_factory=list, description="input columns to keep, or all")
    gate_scores: bool = Field(default=False, description="also write every token's gate score (needs exits)")
    dry_run: bool = Field(
        default=False, description="write nothing; say what the job would take, from a probe of a few rows"
    )
    hourly_cost: float | None = Field(
        default=None, ge=0, description="what an actor's share of a machine costs per hour, for dry_run"
    )
    max_errors: int | float | None = Field(
        default=None, description="stop when more rows than this are rejected: a number, or a share like 0.05 or 5%"
    )
    retry_errors: bool = Field(default=False, description="try rows again that an earlier run rejected")
    force_new_run: bool = Field(
        default=False, description="when the output folder belongs to a different job, start beside it: OUTPUT-2"
    )
    rows_per_part: int | None = Field(default=None, ge=1, description="rows per Parquet part")

    max_tokens: int = Field(default=128, description="most tokens to generate per prompt")
    temperature: float = Field(default=0.0, description="0 is greedy")
    top_p: float = Field(default=1.0, description="nucleus sampling, in (0, 1]")
    top_k: int = Field(default=0, description="keep the k likeliest tokens; 0 keeps all")
    min_p: float = Field(default=0.0, description="drop tokens less likely than this share of the likeliest")
    repetition_penalty: float = Field(default=1.0, description="above 1 discourages repetition")
    min_tokens: int = Field(default=0, description="fewest tokens to generate per prompt")
    stop: list[str] = Field(default_factory=list, description="strings that end the text")
    stop_token_ids: list[int] = Field(default_factory=list, description="further token ids that end the text")
    ignore_eos: bool = Field(default=False, description="generate past the end-of-sequence token")
    seed: int | None = Field(
        default=None, description="makes a sampled run reproducible; each row derives its own seed"
    )

    dtype: str = Field(default="auto", description="auto, float32, bfloat16 or float16")
    device: str = Field(default="auto", pattern=r"^(auto|cpu|cuda(:\d+)?)$", description="auto, cpu, cuda or cuda:N")
    trust_remote_code: bool = Field(default=False, description="run modelling code that comes with the weights")
    max_num_seqs: int | None = Field(default=None, description="most resident sequences per actor")
    max_model_len: int | None = Field(default=None, description="most tokens of prompt plus answer")
    max_num_batched_tokens: int = Field(default=2048, description="most rows of one engine step")
    prefix_caching: bool = Field(default=True, description="compute what prompts begin with alike only once")
    policy: str = Field(
        default="auto", description="auto, full, static, or with exits: router, confidence, capacity, posthoc"
    )
    exits: str | None = Field(default=None, description="folder of a router checkpoint: tokens exit early")
    mode: str = Field(
        default="exits",
        description="exits: tokens that exit count; verified: they are drafts, answers are full depth's",
    )
    exit_threshold: float | None = Field(default=None, description="score from which tokens exit, in [0, 1]")
    exit_error: float | None = Field(
        default=None, description="use the thresholds calibrated for this error among exits; default 0.02"
    )
    max_disagreement: float | None = Field(
        default=None, description="use the settings certified for at most this share of tokens unlike full depth's"
    )
    certified_loss: str = Field(default="tokens", description="what that bounds: tokens, answers or task")
    shadow: float | None = Field(
        default=None,
        description="share of rows to answer at full depth as well; exits stop once more disagrees than certified",
    )
    exit_min_depth: int = Field(default=0, description="tokens exit only after at least this many layers")
    exits_when: str = Field(default="pays", description="pays: only where exits save time; always")
    confidence_measure: str = Field(default="probability", description="probability, margin or entropy")
    capacity: float | None = Field(default=None, description="policy capacity: share of rows that goes deeper")
    kv_policy: str | None = Field(default=None, description="K/V of skipped layers: fitted, copy or deferred")
    prefill_share: float | None = Field(default=None, description="share of prompt tokens that stop early, in (0, 1]")
    prefill_tail: int = Field(default=32, description="last prompt tokens that always run every layer")
    exit_layer: int | None = Field(default=None, description="static: every token stops at this depth")
    skip_layers: list[int] = Field(default_factory=list, description="static: layers that no token runs")
    static_cost: float | None = Field(default=None, description="static: share of layers to keep, in (0, 1]")
    compile: str = Field(default="auto", description="auto: known layers run as compiled kernels; off")
    cuda_graphs: str = Field(default="auto", description="auto: on a GPU decoding is replayed from CUDA graphs; off")
    async_scheduling: str = Field(default="auto", description="auto: on a GPU steps are queued ahead; on; off")
    num_threads: int | None = Field(default=None, description="CPU threads per actor")

    num_actors: int = Field(default=1, ge=1, description="engines, one Ray actor each")
    max_actors: int | None = Field(
        default=None, ge=1, description="more actors join, up to this many, while rows wait and the cluster has room"
    )
    num_gpus_per_actor: float | None = Field(default=None, ge=0, description="GPUs per actor")
    num_cpus_per_actor: float | None = Field(default=None, ge=0, description="CPUs that Ray sets aside per actor")
    accelerator_type: str | None = Field(
        default=None, min_length=1, description="Ray accelerator type that actors' nodes must have, such as A100"
    )
    labels: dict[str, str] = Field(default_factory=dict, description="labels that actors' nodes must have")
    wait_for_nodes: float = Field(
        default=0.0, ge=0, description="seconds for an autoscaler to make room for the actors"
    )
    batch_size: int | None = Field(
        default=None, ge=1, description="rows per Ray Data batch and block; default: 32, up to 128 where rows are many"
    )
    address: str | None = Field(default=None, description="Ray cluster address")
    rejected_rows_ok: bool = Field(default=False, description="exit code 0, not 3, where rows were rejected")
    drain_seconds: float = Field(
        default=25.0, ge=0, description="after SIGTERM, how long answers in progress may take before they are dropped"
    )
    step_timeout: float = Field(
        default=600.0, gt=0, description="seconds after which an engine's step that has not ended is taken for hung"
    )
    verbose: bool = Field(default=False, description="show Ray's own logs and progress bars")
    log_format: Literal["text", "json"] = Field(default="text", description="text, or json: a record per line")

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> GenerateJobConfig:
        """Validate user-given values.

        Raises:
            UserError: an unknown name, a wrong type or a value outside its range.
        """
        config = validated(cls, values)
        config.sampling_params()
        config.engine_config()
        if config.max_actors is not None and config.max_actors < config.num_actors:
            raise UserError(f"max_actors must be at least num_actors, {config.num_actors}, got {config.max_actors}")
        check_labels(config.labels)
        if config.raw and config.system_prompt is not None:
            raise UserError("system_prompt needs the chat template, got raw=True")
        if config.shadow is not None:
            if not 0 < config.shadow <= 1:
                raise UserError(f"shadow must be in (0, 1], got {config.shadow!r}")
            if config.max_disagreement is None:
                raise UserError(f"shadow needs max_disagreement, a certified bound to watch, got {config.shadow!r}")
            if config.length_column is not None:  # its test takes rows as they come for like those that will come
                raise UserError(f"length_column must not be given with shadow, got {config.length_column!r}")
        if config.gate_scores and config.exits is None:
            raise UserError("gate_scores needs exits, a router checkpoint, got none")
        limit = config.max_errors
        if limit is not None and not (limit >= 0 if isinstance(limit, int) else 0 < limit < 1):
            raise UserError(f"max_errors must be a number of rows or a share between 0 and 1, got {limit!r}")
        storage_path(config.output, "output")
        for prompts in config.prompts:
            if "://" in prompts:
                storage_path(prompts, "prompts")
        return config

    @classmethod
    def from_yaml(cls, path: str, overrides: Mapping[str, Any] | None = None) -> GenerateJobConfig:
        """Read a YAML mapping of field names; ``overrides`` (the flags given) win.

        Raises:
            UserError: the file is missing or not such a mapping, or ``build`` refuses the values.
        """
        return cls.build({**read_yaml_mapping(path), **(overrides or {})})

    @property
    def most_actors(self) -> int:
        """How many actors there may be at once."""
        return self.max_actors or self.num_actors

    def most_errors(self, num_rows: int) -> int | None:
        """How many of ``num_rows`` rows may be rejected; None for any number."""
        return int(self.max_errors * num_rows) if isinstance(self.max_errors, float) else self.max_errors

    def sampling_params(self) -> SamplingParams:
        """The defaults of every row; a row's own ``sampling_params`` override them."""
        return SamplingParams(**{name: getattr(self, name) for name in SAMPLING_FIELDS})

    def engine_config(self) -> EngineConfig:
        """What each actor's engine is made with. Raises UserError for a value that it cannot have."""
        values = {name: getattr(self, name) for name in ENGINE_FIELDS}
        values["skip_layers"] = tuple(self.skip_layers)
        return EngineConfig(**values)


def read_yaml_mapping(path: str) -> dict[str, Any]:
    """The mapping in a YAML file. Raises UserError when there is none."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"config: cannot read {path!r}: {reason}") from None
    try:
        values = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise UserError(f"config: {path!r} is not YAML: {one_line(error)}") from None
    if values is None:
        return {}
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise UserError(f"config: {path!r} must hold a mapping of field names to values")
    return values


def validated(model: type[Settings], values: Mapping[str, Any]) -> Settings:
    """``model`` with these values.

    Raises:
        UserError: an unknown name, a wrong type or a value outside its range.
    """
    try:
        return model.model_validate(dict(values))
    except ValidationError as error:
        raise UserError(first_problem(error, model)) from None


def first_problem(error: ValidationError, model: type[BaseModel]) -> str:
    """What pydantic found first, in one line that names the field and the value."""
    problem = error.errors()[0]
    name = str(problem["loc"][0]) if problem["loc"] else "config"
    if problem["type"] == "extra_forbidden":
        known = ", ".join(model.model_fields)
        return f"config: unknown field {name!r}; known: {known}"
    message = problem["msg"][0].lower() + problem["msg"][1:]
    return f"{name}: {message}, got {problem['input']!r}"
