"""What ``tide-ray serve`` can be told: flags and a YAML file, to the application's arguments and the listener's."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from tide_ray.data.job_config import read_yaml_mapping, validated
from tide_ray.serve.config import LLMServingArgs, ServerConfig
from tide_ray.serve.keys import read_keys
from tide_ray.types import UserError

LOOPBACK = ("127.0.0.1", "localhost", "::1")
ENGINE_FIELDS = (
    "dtype", "device", "revision", "trust_remote_code", "max_num_seqs", "max_model_len", "exits", "exit_threshold",
    "max_disagreement", "num_threads",
)  # fmt: skip
SERVER_FIELDS = (
    "api_keys_file", "max_body_bytes", "request_timeout_s", "requests_per_minute", "max_prompt_tokens",
    "max_completion_tokens",
)  # fmt: skip

TLS_FIELDS = ("ssl_keyfile", "ssl_certfile", "ssl_keyfile_password", "ssl_ca_certs")


def _application_args(values: dict[str, Any]) -> dict[str, Any]:
    """The arguments in a file: as they are, or of the one application of a Ray Serve config."""
    if "applications" not in values:
        return values
    applications = values["applications"]
    if not isinstance(applications, list) or len(applications) != 1 or not isinstance(applications[0], dict):
        raise UserError(f"applications must be a list of one, got {str(applications)[:100]!r}")
    args = applications[0].get("args")
    if not isinstance(args, dict):
        raise UserError(f"applications: args must be a mapping, got {args!r}")
    return args


class ServeSettings(BaseModel):
    """Flags of the command. Of ``None`` the defaults of EngineConfig and ServerConfig are taken."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    model: list[str] = Field(
        default_factory=list, description="hub id, folder, .gguf file or 'demo', or NAME=ONE [demo]"
    )
    host: str = Field(default="127.0.0.1", min_length=1, description="address to listen on; others need an API key")
    port: int = Field(default=8000, ge=1, le=65535, description="port to listen on")
    ssl_keyfile: str | None = Field(default=None, description="TLS key")
    ssl_certfile: str | None = Field(default=None, description="TLS certificate")
    ssl_keyfile_password: str | None = Field(default=None, description="password of the TLS key")
    ssl_ca_certs: str | None = Field(default=None, description="certificates that clients must be signed by")
    num_replicas: int = Field(default=1, ge=1, description="engines of each model")
    max_queued_requests: int | None = Field(
        default=None, ge=0, description="completions that may wait in a replica; more get 429 [256]"
    )
    drain_timeout_s: float = Field(default=60.0, ge=0, description="seconds that open requests get at shutdown")
    address: str | None = Field(default=None, description="Ray cluster address")
    verbose: bool = Field(default=False, description="show Ray's own logs")

    dtype: str | None = Field(default=None, description="auto, float32, bfloat16 or float16")
    device: str | None = Field(default=None, description="auto, cpu, cuda or cuda:N")
    revision: str | None = Field(default=None, description="branch, tag or commit of a hub model")
    trust_remote_code: bool | None = Field(default=None, description="run modelling code that comes with the weights")
    max_num_seqs: int | None = Field(default=None, description="most resident sequences of a replica")
    max_model_len: int | None = Field(default=None, description="most tokens of prompt plus answer")
    exits: str | None = Field(default=None, description="folder of a router checkpoint: tokens exit early")
    exit_threshold: float | None = Field(default=None, description="score from which tokens exit, in [0, 1]")
    max_disagreement: float | None = Field(
        default=None, description="use the settings certified for at most this share of tokens unlike full depth's"
    )
    num_threads: int | None = Field(default=None, description="CPU threads of a replica")

    api_keys_file: str | None = Field(default=None, description="file of API keys, which tide-ray api-key makes")
    max_body_bytes: int | None = Field(default=None, description="larger bodies get 413 [1048576]")
    request_timeout_s: float | None = Field(default=None, description="a longer request is ended [600]")
    requests_per_minute: float | None = Field(default=None, description="rate limit of each key")
    max_prompt_tokens: int | None = Field(default=None, description="longer prompts are refused")
    max_completion_tokens: int | None = Field(default=None, description="most tokens of one completion")

    @classmethod
    def build(cls, values: Mapping[str, Any]) -> ServeSettings:
        """Validate user-given values.

        Raises:
            UserError: an unknown name, a wrong type or a value outside its range.
        """
        settings = validated(cls, values)
        if (settings.ssl_keyfile is None) != (settings.ssl_certfile is None):
            raise UserError("ssl_keyfile and ssl_certfile go together, got one of them")
        for name in ("ssl_keyfile", "ssl_certfile", "ssl_ca_certs"):
            path = getattr(settings, name)
            if path is not None and not Path(path).is_file():
                raise UserError(f"{name}: no such file, got {path!r}")
        return settings

    @property
    def is_loopback(self) -> bool:
        return self.host in LOOPBACK

    @property
    def url(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.ssl_certfile else 'http'}://{host}:{self.port}"

    def serving_args(self, config: str | None = None) -> LLMServingArgs:
        """The application's arguments: those of the YAML file ``config``, with the flags given over them.

        Raises:
            UserError: a value that cannot be used, or an address that needs a key and has none.
        """
        values = _application_args(read_yaml_mapping(config)) if config is not None else {}
        if "llm_configs" in values:
            given = [name for name in ("model", *ENGINE_FIELDS) if getattr(self, name) not in (None, [])]
            if given:
                raise UserError(f"{given[0]} and the llm_configs of {config!r} exclude each other")
        else:
            values["llm_configs"] = [self._llm_config(model) for model in self.model or ["demo"]]
        front = dict(values.get("ingress_cls_config") or {})
        front |= {name: getattr(self, name) for name in SERVER_FIELDS if getattr(self, name) is not None}
        front.setdefault("require_api_key", not self.is_loopback)
        args = LLMServingArgs.build({**values, "ingress_cls_config": front})
        return args.model_copy(update={"ingress_cls_config": self._checked(args.ingress_cls_config)})

    def _checked(self, front: ServerConfig) -> ServerConfig:
        keys = read_keys(front.api_keys, front.api_keys_file)
        if not len(keys) and (front.require_api_key or not self.is_loopback):
            raise UserError(
                f"host: {self.host!r} can be reached from other machines, so an API key is required: "
                "tide-ray api-key NAME --file KEYS makes one, --api-keys-file KEYS uses it"
            )
        # Without keys the browser is the only way in from elsewhere, through a name that resolves to this machine.
        return front.model_copy(update={"loopback_only": front.loopback_only or not len(keys)})

    def _llm_config(self, model: str) -> dict[str, Any]:
        name, separator, source = model.partition("=")
        if not separator:
            name, source = Path(model).name if Path(model).exists() else model, model
        engine = {name: getattr(self, name) for name in ENGINE_FIELDS if getattr(self, name) is not None}
        values: dict[str, Any] = {
            "model_loading_config": {"model_id": name, "model_source": source},
            "engine_kwargs": engine,
            # What cannot be loaded now will not be either when it is tried twenty times, as Ray Serve does.
            "deployment_config": {"num_replicas": self.num_replicas, "max_constructor_retry_count": 1},
        }
        if self.max_queued_requests is not None:
            values["max_queued_requests"] = self.max_queued_requests
        return values
