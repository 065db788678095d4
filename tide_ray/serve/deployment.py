"""The Ray Serve application: one deployment for each model, and a front that speaks HTTP.

``build_openai_app`` is what ``serve run`` and a Serve config file call, as in ``ray.serve.llm``; the front is then
behind Ray Serve's proxies. ``tide-ray serve`` calls ``make_application`` with the address that its front listens at.
"""

from __future__ import annotations

import logging
from collections.abc import AsyncGenerator, Mapping
from contextlib import aclosing
from typing import Any

import ray
from ray import serve
from ray.serve._private.constants import SERVE_LOGGER_NAME
from ray.serve.handle import DeploymentHandle

from tide_ray.data.metrics import MetricsPublisher
from tide_ray.data.nodes import live_nodes
from tide_ray.data.placement import plan_placement
from tide_ray.serve.app import Server
from tide_ray.serve.backend import Limits, ModelFacts
from tide_ray.serve.calls import Call
from tide_ray.serve.config import LLMConfig, LLMServingArgs, ServerConfig
from tide_ray.serve.errors import Failure
from tide_ray.serve.handle_backend import HandleBackend
from tide_ray.serve.keys import KeyRing, read_keys
from tide_ray.serve.listener import Address, Listener
from tide_ray.serve.mailbox import Courier, Item, Label, Mailbox, Sent
from tide_ray.startup import quick_imports
from tide_ray.types import RequestOutput, UserError

FRONT = "TideFront"
MAX_ONGOING = 8192
"""Of Serve's own limits, which answer in another shape than OpenAI's: models refuse what is too much well before."""
HEALTH_CHECKS = {"health_check_period_s": 2.0, "health_check_timeout_s": 30.0}


def log_to_serve() -> None:
    """Write this package's log lines to the files of the Ray Serve replica that this process is."""
    ours, serves = logging.getLogger("tide_ray"), logging.getLogger(SERVE_LOGGER_NAME)
    ours.setLevel(logging.INFO)
    ours.handlers = serves.handlers
    ours.propagate = False


class TideModel:
    """A replica: one engine. Ray Serve sends it requests only once it has warmed up."""

    def __init__(self, config: LLMConfig, limits: Limits) -> None:
        log_to_serve()
        with quick_imports():  # here, as a front is a process that needs neither torch nor transformers
            from tide_ray.serve.model_server import ModelServer
        self._server = ModelServer(config, limits)
        self._courier = Courier()
        if config.log_engine_metrics:
            self._metrics = MetricsPublisher(config.model_id)
            self._metrics.watch(self._server.engine.engine)

    async def facts(self) -> ModelFacts | Failure:
        return await self._server.facts()

    async def is_alive(self) -> bool:
        return await self._server.is_alive()

    async def generate(self, call: Call) -> list[RequestOutput] | Failure:
        return await self._server.generate(call)

    async def stream(self, call: Call, label: Label | None) -> AsyncGenerator[Item | Sent]:
        """What is new as it comes, or to the front's mailbox and then how much it was."""
        async with aclosing(self._server.stream(call)) as items, aclosing(self._courier.send(items, label)) as left:
            async for item in left:
                yield item

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if not self._server.is_healthy:
            raise RuntimeError("the engine failed or hangs")


class TideFront:
    """The replica that speaks HTTP: to Ray Serve's proxy or, with an address, to whoever connects there.

    ``drain`` makes it refuse what is new.
    """

    def __init__(
        self, handles: Mapping[str, DeploymentHandle[Any]], config: ServerConfig, address: Address | None = None
    ) -> None:
        log_to_serve()
        self._mailbox = Mailbox()
        backends = {name: HandleBackend(handle, self._mailbox) for name, handle in handles.items()}
        self._server = Server(backends, config, KeyRing(config.api_keys))
        self._listener = None if address is None else Listener(self._server.app, address)

    def __serve_build_asgi_app__(self) -> Any:
        return self._server.app

    async def drain(self) -> int:
        """Refuse new requests with 503 from now on. Returns how many are still being answered."""
        self._server.app.is_draining = True
        return self._server.app.num_in_flight

    def __del__(self) -> None:
        self._mailbox.close()

    async def check_health(self) -> None:
        """Ray Serve replaces a replica that raises here."""
        if self._listener is not None and not self._listener.is_open:
            raise RuntimeError("the listener ended")


def build_openai_app(args: Mapping[str, Any] | LLMServingArgs) -> serve.Application:
    """The application for ``serve.run``, or for ``import_path: tide_ray.serve:build_openai_app`` in a config file.

    Args:
        args: ``llm_configs`` and, if one likes, ``ingress_cls_config`` (fields of ServerConfig) and
            ``ingress_deployment_config`` (options of the front's deployment).

    Raises:
        UserError: a value that cannot be used, or no API key where one is required.
    """
    return make_application(args if isinstance(args, LLMServingArgs) else LLMServingArgs.build(args))


def make_application(args: LLMServingArgs, address: Address | None = None) -> serve.Application:
    """``build_openai_app``, with a front that listens at ``address``, on this process's node, if one is given."""
    front = args.ingress_cls_config
    keys = read_keys(front.api_keys, front.api_keys_file)
    if front.require_api_key and not len(keys):
        raise UserError("api_keys: a key is required (tide-ray api-key makes one), or require_api_key: false")
    # Replicas get the hashes: they may run where neither the file nor the environment is.
    front = front.model_copy(update={"api_keys": keys.entries, "api_keys_file": None})
    limits = Limits(front.max_prompt_tokens, front.max_completion_tokens)
    num_replicas = sum(_num_replicas(config) for config in args.llm_configs)
    handles = {config.model_id: _model_application(config, limits, num_replicas) for config in args.llm_configs}
    options = {
        "name": FRONT,
        "max_ongoing_requests": MAX_ONGOING,
        "graceful_shutdown_timeout_s": 60.0,
        **HEALTH_CHECKS,
        **args.ingress_deployment_config,
    }
    actor = {"num_cpus": 0, **options.pop("ray_actor_options", {})}
    if address is not None:
        here = {"ray.io/node-id": ray.get_runtime_context().get_node_id()}
        actor["label_selector"] = {**actor.get("label_selector", {}), **here}
    return serve.deployment(ray_actor_options=actor, **options)(serve.ingress()(TideFront)).bind(
        handles, front, address
    )


def _num_replicas(config: LLMConfig) -> int:
    scaling = config.deployment_config.get("autoscaling_config") or {}
    count = config.deployment_config.get("num_replicas") or scaling.get("min_replicas", 1)
    return max(1, count) if isinstance(count, int) else 1


def _model_application(config: LLMConfig, limits: Limits, num_replicas: int) -> serve.Application:
    """Args: num_replicas: of all models together, to share a node's cores and memory among."""
    engine = config.engine_config
    given = dict(config.deployment_config)
    actor = dict(given.pop("ray_actor_options", {}))
    # What is asked for may be on nodes that an autoscaler has still to bring; what is not is planned on those there.
    if not {"num_cpus", "num_gpus"} & set(actor) and ray.is_initialized():
        nodes = live_nodes(ray.nodes())
        placement = plan_placement(nodes, num_actors=num_replicas, device=engine.device)
        actor |= {"num_gpus": placement.num_gpus, "num_cpus": placement.num_cpus}
        # Ray would give an engine as many threads as CPUs were set aside for it, which on a GPU's node are none. Which
        # node a replica comes to is not known here.
        shares = [placement.share_of(engine, node) for node in nodes if node.get("CPU", 0) >= 1]
        names = ("num_threads", "kv_memory_fraction") if shares else ()
        shared = {name: min(getattr(share, name) for share in shares) for name in names}
        config = config.model_copy(update={"engine_kwargs": {**config.engine_kwargs, **shared}})
    if config.accelerator_type is not None:
        actor["accelerator_type"] = config.accelerator_type
    if config.runtime_env is not None:
        actor["runtime_env"] = config.runtime_env
    options = {
        "name": f"{TideModel.__name__}:{config.model_id.replace('/', '--')}",
        "max_ongoing_requests": MAX_ONGOING,
        **HEALTH_CHECKS,
        "graceful_shutdown_timeout_s": 60.0,
        **given,
    }
    return serve.deployment(ray_actor_options=actor, **options)(TideModel).bind(config, limits)
