"""The HTTP application: OpenAI's endpoints over any number of models, the same inside Ray Serve and in process."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import Depends, FastAPI, Path, Request
from fastapi.exceptions import RequestValidationError
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.responses import Response

from tide_ray.serve.answers import AsciiJSONResponse, Record, StreamedAnswer, WholeAnswer, failure_response
from tide_ray.serve.backend import Backend, ModelFacts
from tide_ray.serve.calls import Call, chat_call, completion_call
from tide_ray.serve.config import ServerConfig
from tide_ray.serve.errors import UNAVAILABLE, Failure, invalid
from tide_ray.serve.guard import Guard
from tide_ray.serve.keys import KeyRing
from tide_ray.serve.metrics import ServerMetrics
from tide_ray.serve.page import page_response
from tide_ray.serve.protocol import (
    ChatCompletionRequest,
    ChatCompletionResponse,
    CompletionRequest,
    CompletionResponse,
    ErrorResponse,
    ModelCard,
    ModelList,
)
from tide_ray.serve.responses import Answer, ChatWriter, CompletionWriter, Writer

_MEANINGS = {
    400: "The request is not valid",
    401: "No key, or a wrong one",
    403: "Not from here",
    404: "No such model or path",
    405: "No such method",
    408: "The body took too long to arrive",
    413: "The body is too large",
    415: "The body is not JSON",
    429: "Too many requests; see Retry-After",
    500: "The server had an error",
    503: "The model cannot be reached now",
    504: "The request took too long",
}
_ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorResponse, "description": meaning} for status, meaning in _MEANINGS.items()
}
_STREAM = {"text/event-stream": {"schema": {"type": "string", "description": "server-sent events"}}}
_TEXT = {"text/plain": {"schema": {"type": "string", "description": "Prometheus' text format"}}}
# The guard has checked the key before; this is for the schema.
_KEYED = [Depends(HTTPBearer(auto_error=False, description="an API key, where the server has any"))]
_IDENTIFIER = re.compile(r"[A-Za-z_]\w*")


class Server:
    """The application and what it keeps.

    Args:
        backends: the models by the name that requests use.
        config: what is let in.
        keys: who is.
    """

    def __init__(self, backends: Mapping[str, Backend], config: ServerConfig, keys: KeyRing) -> None:
        self.backends = dict(backends)
        self.config = config
        self.metrics = ServerMetrics()
        self._facts: dict[str, ModelFacts] = {}
        self.app = Guard(self._build(), config, keys, self.metrics)

    def _build(self) -> FastAPI:
        app = FastAPI(title="tide_ray", version="1", docs_url=None, redoc_url=None)
        app.add_exception_handler(RequestValidationError, _on_invalid)
        app.add_exception_handler(HTTPException, _on_http_error)
        answers: dict[int | str, dict[str, Any]] = dict(_ERRORS)

        @app.post(
            "/v1/completions", dependencies=_KEYED, response_model=CompletionResponse, responses=_with_stream(answers)
        )
        async def completions(body: CompletionRequest, request: Request) -> Response:
            return await self._answer(request, body, completion_call(body), CompletionWriter())

        @app.post(
            "/v1/chat/completions",
            dependencies=_KEYED,
            response_model=ChatCompletionResponse,
            responses=_with_stream(answers),
        )
        async def chat(body: ChatCompletionRequest, request: Request) -> Response:
            return await self._answer(request, body, chat_call(body), ChatWriter(body.top_logprobs or 0))

        @app.get("/v1/models", dependencies=_KEYED, response_model=ModelList, responses=answers)
        async def models() -> Response:
            cards = [await self._card(name) for name in self.backends]
            failed = next((card for card in cards if isinstance(card, Failure)), None)
            return failure_response(failed) if failed else AsciiJSONResponse({"object": "list", "data": cards})

        @app.get("/v1/models/{model:path}", dependencies=_KEYED, response_model=ModelCard, responses=answers)
        async def model(model: Annotated[str, Path(min_length=1)]) -> Response:
            card = await self._card(model) if model in self.backends else _no_model(model)
            return failure_response(card) if isinstance(card, Failure) else AsciiJSONResponse(card)

        @app.get("/health", responses=answers)
        async def health() -> Response:
            for name, backend in self.backends.items():
                if not await backend.is_alive():
                    return failure_response(Failure(503, f"model {name!r} is not healthy", "unhealthy", retry_after=5))
            return AsciiJSONResponse({"status": "ok", "models": list(self.backends)})

        @app.get("/metrics", dependencies=_KEYED, responses={**answers, 200: {"content": _TEXT}})
        async def metrics() -> Response:
            return Response(self.metrics.text(), media_type=self.metrics.content_type)

        if self.config.page:

            @app.get("/", include_in_schema=False)
            async def page() -> Response:
                return page_response()

        self._name_models(app)
        return app

    def _name_models(self, app: FastAPI) -> None:
        """Put the models' names into the published schema."""
        schemas = app.openapi()["components"]["schemas"]
        for name in (CompletionRequest.__name__, ChatCompletionRequest.__name__):
            schemas[name]["properties"]["model"] = {"type": "string", "enum": list(self.backends)}

    async def _answer(
        self,
        request: Request,
        body: CompletionRequest | ChatCompletionRequest,
        call: Call | Failure,
        writer: Writer,
    ) -> Response:
        backend = self.backends.get(body.model)
        if backend is None:
            return failure_response(_no_model(body.model))
        if isinstance(call, Failure):
            return failure_response(call)
        if call.num_completions > self.config.max_completions:
            most = self.config.max_completions
            return failure_response(invalid(f"a request may have at most {most} completions (prompts times n)", "n"))
        facts = await self._facts_of(body.model)
        if isinstance(facts, Failure):
            return failure_response(facts)
        state = request.scope["state"]
        record = Record(
            metrics=self.metrics,
            answer=Answer(call.request_id, call.params.n, body.model, facts.fingerprint, writer),
            endpoint=request.scope["path"],
            model=body.model,
            owner=state["owner"],
            request_id=state["request_id"],
            start=state.get("start", time.monotonic()),
        )
        timeout_s = self.config.request_timeout_s
        if not body.stream:
            return WholeAnswer(backend, call, record, timeout_s)
        include_usage = body.stream_options is not None and bool(body.stream_options.include_usage)
        return StreamedAnswer(backend, call, record, timeout_s, include_usage=include_usage)

    async def _facts_of(self, model: str) -> ModelFacts | Failure:
        if model not in self._facts:
            facts = await self.backends[model].facts()
            if isinstance(facts, Failure):
                return facts
            self._facts[model] = facts
        return self._facts[model]

    async def _card(self, model: str) -> dict[str, Any] | Failure:
        facts = await self._facts_of(model)
        if isinstance(facts, Failure):
            return facts
        tide = {
            "num_layers": facts.num_layers,
            "boundaries": list(facts.boundaries),
            "policy": facts.policy,
            "certified_disagreements": list(facts.epsilons),
        }
        return {
            "id": model,
            "object": "model",
            "created": facts.created,
            "owned_by": "tide_ray",
            "max_model_len": facts.max_model_len,
            "tide": tide,
        }


def _with_stream(answers: dict[int | str, dict[str, Any]]) -> dict[int | str, dict[str, Any]]:
    return {**answers, 200: {"description": "The answer, or with stream its events", "content": _STREAM}}


def _no_model(model: str) -> Failure:
    return Failure(404, f"the model {model[:200]!r} does not exist", "model_not_found", "model")


async def _on_invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    problem = error.errors()[0]
    if problem["type"] == "json_invalid":
        return failure_response(invalid("the body is not valid JSON", code="invalid_json"))
    path = [str(part) for part in problem["loc"][1:]]
    # The alternatives of a union are named in the path after the field; what follows is ours, not the client's.
    kept = []
    for part in path:
        if not (part.isdigit() or _IDENTIFIER.fullmatch(part)) or part in ("str", "int", "none", "nullable"):
            break
        kept.append(part)
    param = ".".join(kept)[:200] or None
    codes = {"missing": "missing_required_parameter", "extra_forbidden": "unknown_parameter"}
    message = {
        "missing": "this parameter is required",
        "extra_forbidden": "this parameter is not known here",
    }.get(problem["type"], problem["msg"])
    code = codes.get(problem["type"], "invalid_value")
    return failure_response(invalid(f"{param or 'body'}: {message}", param, code))


async def _on_http_error(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    known = {404: "no such path", 405: "this path has no such method", 400: "the body cannot be read"}
    failure = Failure(error.status_code, known.get(error.status_code, "the request cannot be answered"))
    if error.status_code >= 500:
        failure = UNAVAILABLE
    response = failure_response(failure)
    response.headers.update(error.headers or {})
    return response
