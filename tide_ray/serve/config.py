"""What is served and how: the field names of ``ray.serve.llm`` for models, ours for the front.

Values that a user typed come in through ``LLMServingArgs.build``: every mistake is a one-line UserError.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from tide_ray.config import EngineConfig
from tide_ray.data.job_config import read_yaml_mapping
from tide_ray.serve.keys import check_stored
from tide_ray.types import UserError

DEFAULT_STREAM_INTERVAL_MS = 50.0
"""ray.serve.llm's own default."""
_MODEL_ID = re.compile(r"[\w.:/@+-]{1,200}")
_DEPLOYMENT_FIELDS = (
    "num_replicas", "autoscaling_config", "ray_actor_options", "max_ongoing_requests", "max_queued_requests",
    "health_check_period_s", "health_check_timeout_s", "graceful_shutdown_timeout_s",
    "graceful_shutdown_wait_loop_s", "max_constructor_retry_count", "logging_config",
)  # fmt: skip


class _Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, protected_namespaces=())


class ModelLoadingConfig(_Settings):
    """Which model, and under which name it is served."""

    model_id: str = Field(description="the name that requests use")
    model_source: str | None = Field(default=None, description="hub id, folder, .gguf file or 'demo'; None: model_id")

    @field_validator("model_id")
    @classmethod
    def _check_model_id(cls, value: str) -> str:
        # It goes into responses, metrics and the name of an actor.
        if not _MODEL_ID.fullmatch(value):
            raise UserError(f"model_id must have up to 200 of letters, digits and _ . : / @ + -, got {value!r}")
        return value


class LLMConfig(_Settings):
    """One model with its routers (``engine_kwargs.exits``) and its replicas."""

    model_loading_config: ModelLoadingConfig
    engine_kwargs: dict[str, Any] = Field(default_factory=dict, description="fields of EngineConfig")
    deployment_config: dict[str, Any] = Field(
        default_factory=dict, description=f"options of its Ray Serve deployment: {', '.join(_DEPLOYMENT_FIELDS)}"
    )
    accelerator_type: str | None = Field(default=None, description="Ray accelerator type that replicas need")
    runtime_env: dict[str, Any] | None = Field(default=None, description="Ray runtime environment of replicas")
    max_queued_requests: int = Field(
        default=256, ge=0, description="completions that may wait in a replica beside the resident ones; more get 429"
    )
    stream_batching_interval_ms: float = Field(
        default=DEFAULT_STREAM_INTERVAL_MS, ge=0, description="least time between two chunks of a stream"
    )
    stream_ms_per_stream: float = Field(
        default=2.0,
        ge=0,
        description="the same for each open stream, if that is more: streams share the chunks of a second",
    )
    log_engine_metrics: bool = Field(
        default=True,
        description="publish the engine's counters through Ray, as jobs do, with the model's name for a job",
    )
    hang_seconds: float = Field(default=120.0, gt=0, description="an engine step that takes longer is taken to hang")

    @field_validator("engine_kwargs")
    @classmethod
    def _check_engine_kwargs(cls, value: dict[str, Any]) -> dict[str, Any]:
        make_engine_config(value)
        return value

    @field_validator("deployment_config")
    @classmethod
    def _check_deployment_config(cls, value: dict[str, Any]) -> dict[str, Any]:
        for name in value:
            if name not in _DEPLOYMENT_FIELDS:
                raise UserError(
                    f"deployment_config: unknown field {name!r}; known: {', '.join(sorted(_DEPLOYMENT_FIELDS))}"
                )
        return value

    @property
    def model_id(self) -> str:
        """The name that requests ask for."""
        return self.model_loading_config.model_id

    @property
    def model_source(self) -> str:
        """Hub id, folder, ``.gguf`` file or ``demo``; ``model_id`` where none is given."""
        return self.model_loading_config.model_source or self.model_id

    @property
    def engine_config(self) -> EngineConfig:
        """What each replica's engine is made with. Raises UserError for a value that it cannot have."""
        return make_engine_config(self.engine_kwargs)


class ServerConfig(_Settings):
    """What the front lets in.

    ``api_keys`` holds names and SHA-256 hashes (see ``keys``), never keys. Rates and counts are kept by each replica of
    the front.
    """

    api_keys: tuple[str, ...] = Field(default=(), description="entries NAME:sha256:HEX")
    api_keys_file: str | None = Field(default=None, description="file with one such entry a line")
    require_api_key: bool = Field(default=True, description="refuse to start without keys")
    loopback_only: bool = Field(
        default=False, description="refuse requests whose Host header is not this machine's loopback"
    )
    max_body_bytes: int = Field(default=2**20, ge=1, description="larger request bodies get 413")
    body_timeout_s: float = Field(default=30.0, gt=0, description="a body that takes longer to arrive gets 408")
    request_timeout_s: float = Field(default=600.0, gt=0, description="a request that takes longer is ended")
    requests_per_minute: float | None = Field(default=None, gt=0, description="rate limit of each key")
    max_prompt_tokens: int | None = Field(default=None, ge=1, description="longer prompts are refused")
    max_completion_tokens: int | None = Field(default=None, ge=1, description="most tokens of one completion")
    max_completions: int = Field(default=128, ge=1, description="most completions of one request: prompts times n")
    page: bool = Field(default=True, description="show the page at /")

    @field_validator("api_keys")
    @classmethod
    def _check_keys(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        for entry in value:
            check_stored(entry)
        return value


class LLMServingArgs(_Settings):
    """The argument of ``build_openai_app``."""

    llm_configs: tuple[LLMConfig, ...] = Field(min_length=1, description="the models: mappings, or paths of YAML files")
    ingress_cls_config: ServerConfig = Field(default_factory=ServerConfig, description="what the front lets in")
    ingress_deployment_config: dict[str, Any] = Field(
        default_factory=dict, description="options of the front's Ray Serve deployment"
    )

    @field_validator("llm_configs", mode="before")
    @classmethod
    def _read_files(cls, value: Any) -> Any:
        if not isinstance(value, (list, tuple)):
            return value
        return tuple(read_yaml_mapping(item) if isinstance(item, str) else item for item in value)

    @field_validator("llm_configs")
    @classmethod
    def _check_ids(cls, value: tuple[LLMConfig, ...]) -> tuple[LLMConfig, ...]:
        ids = [config.model_id for config in value]
        if twice := sorted({name for name in ids if ids.count(name) > 1}):
            raise UserError(f"llm_configs: model_id must be unique, got {twice[0]!r} more than once")
        return value

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> LLMServingArgs:
        """Validate user-given values.

        Raises:
            UserError: an unknown name, a wrong type or a value outside its range.
        """
        try:
            return cls.model_validate(dict(values))
        except ValidationError as error:
            raise UserError(_first_problem(error)) from None


def make_engine_config(values: Mapping[str, Any]) -> EngineConfig:
    """EngineConfig from the mapping of a YAML file.

    Raises:
        UserError: an unknown field or a bad value.
    """
    known = [field.name for field in dataclasses.fields(EngineConfig)]
    for name in values:
        if name not in known:
            raise UserError(f"engine_kwargs: unknown field {name!r}; known: {', '.join(known)}")
    if isinstance(values.get("skip_layers"), list):
        values = {**values, "skip_layers": tuple(values["skip_layers"])}
    return EngineConfig(**values)


def _first_problem(error: ValidationError) -> str:
    problem = error.errors()[0]
    name = ".".join(str(part) for part in problem["loc"]) or "config"
    message = problem["msg"].removeprefix("Value error, ")
    if problem["type"] == "value_error":
        return message if message.startswith(str(problem["loc"][-1])) else f"{name}: {message}"
    return f"{name}: {message[0].lower()}{message[1:]}, got {str(problem['input'])[:100]!r}"
