"""The routes: /v1/models, /v1/completions, /v1/chat/completions, /health, /metrics, as one FastAPI application.

A request is answered by `Hearing` its job: until it is done, its time is up or its client has left. The status of a stream is
chosen when the first text, or the first fault, is there. Leaves keys and bodies to `limits`, connections to `server`.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncIterator, Callable
from typing import Any

from fastapi import Depends, FastAPI, Request
from fastapi.concurrency import run_in_threadpool
from fastapi.exceptions import RequestValidationError
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, Response, StreamingResponse
from fastapi.security import HTTPBearer
from starlette.exceptions import HTTPException
from starlette.types import Receive, Scope, Send

from .. import __version__
from .jobs import Event, Failed, Finished, Job
from .limits import CLIENT_LEFT, ApiKeys, Gate, Observed, error_body
from .schema import (
    ChatCompletion,
    ChatRequest,
    Completion,
    CompletionRequest,
    ErrorBody,
    Health,
    ModelCard,
    ModelList,
    describe,
)
from .service import BadRequest, Service
from .worker import Refused

_Responses = dict[int | str, dict[str, Any]]
_ERRORS: _Responses = {
    status: {"model": ErrorBody, "description": words}
    for status, words in (
        (400, "The request asks for what cannot be had; `param` names the field"), (401, "No valid key"), (404, "No such model"),
        (408, "The body came too slowly"), (413, "The body is too large"), (415, "The body is not JSON"),
        (429, "The queue is full; Retry-After says when to come again"), (500, "The model could not answer"),
        (503, "The server is stopping"), (504, "The time was up before the answer was there"),
    )
}  # fmt: skip
_EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"], "description": "one event"}
_WRITTEN: _Responses = {200: {"content": {"text/event-stream": {"schema": _EVENT}}, "description": "The answer; server-sent events with stream=true"}}


class Gone:
    """The client has left."""


class Hearing:
    """What a job tells, for the one who asked; as a context manager it watches whether the client is still there."""

    def __init__(self, service: Service, receive: Receive) -> None:
        self._service, self._receive = service, receive
        self._events: asyncio.Queue[Event | Gone] = asyncio.Queue()
        self._loop = asyncio.get_running_loop()
        self._deadline = time.monotonic() + service.limits.timeout
        self.job: Job | None = None

    def tell(self, event: Event) -> None:
        """Called from the worker's thread."""
        with contextlib.suppress(RuntimeError):  # the loop has ended
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)

    def attend(self, job: Job) -> None:
        """Hear this job, and watch the client."""
        self.job = job
        self._watch = asyncio.create_task(self._watched())

    def leave(self) -> None:
        """Nobody listens any more: a job that is not done is cancelled."""
        self._watch.cancel()
        if self.job is not None:
            self._service.cancel(self.job)

    async def _watched(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass
        assert self.job is not None
        self._service.cancel(self.job)
        self._events.put_nowait(Gone())

    async def next(self) -> Event | Gone:
        """The next event; Failed(504) where the time is up."""
        left = self._deadline - time.monotonic()
        if left > 0:
            try:
                return await asyncio.wait_for(self._events.get(), left)
            except asyncio.TimeoutError:
                pass
        assert self.job is not None
        self._service.cancel(self.job, "timeout")
        return Failed(504, f"the answer was not there within {self._service.limits.timeout:g} s")


class EventStream(StreamingResponse):
    """Server-sent events. The watch over the client is `Hearing`'s; `end` is called whatever happens."""

    media_type = "text/event-stream"

    def __init__(self, content: AsyncIterator[bytes], end: Callable[[], None]) -> None:
        super().__init__(content, headers={"cache-control": "no-cache", "x-accel-buffering": "no"})
        self._end = end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self.stream_response(send)
        finally:
            self._end()


class _Written:
    """How one request's answers look: whole, and in pieces."""

    def __init__(self, asked: CompletionRequest | ChatRequest, job: Job, name: str) -> None:
        self.job, self.chat = job, isinstance(asked, ChatRequest)
        self.usage_wanted = asked.stream_options is not None and asked.stream_options.include_usage
        self.head = {"id": ("chatcmpl-" if self.chat else "cmpl-") + secrets.token_hex(12), "created": int(time.time()), "model": name}

    @property
    def usage(self) -> dict[str, int]:
        read, written = self.job.prompt_tokens, self.job.completion_tokens
        return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}

    def whole(self) -> dict[str, Any]:
        """A Completion or ChatCompletion."""
        choices = []
        for line in self.job.lines:
            said = {"message": {"role": "assistant", "content": line.text}} if self.chat else {"text": line.text}
            judged = {} if line.reward is None else {"reward": line.reward}
            choices.append({"index": line.number, **said, "finish_reason": line.reason, "logprobs": None, **judged})
        kind = "chat.completion" if self.chat else "text_completion"
        return {**self.head, "object": kind, "choices": choices, "usage": self.usage}

    def opening(self) -> list[bytes]:
        """The first chunk of each answer of a chat says who speaks."""
        return [self._chunk(line.number, {"role": "assistant", "content": ""}) for line in self.job.lines] if self.chat else []

    def piece(self, number: int, text: str) -> bytes:
        return self._chunk(number, {"content": text} if self.chat else text)

    def closing(self) -> list[bytes]:
        """Why each answer ended, the usage where it was asked for, and the end."""
        chunks = [self._chunk(line.number, {} if self.chat else "", line.reason, line.reward) for line in self.job.lines]
        if self.usage_wanted:
            chunks.append(_event({**self._kind, "choices": [], "usage": self.usage}))
        return [*chunks, b"data: [DONE]\n\n"]

    @property
    def _kind(self) -> dict[str, Any]:
        return {**self.head, "object": "chat.completion.chunk" if self.chat else "text_completion"}

    def _chunk(self, number: int, new: Any, reason: str | None = None, reward: float | None = None) -> bytes:
        choice = {"index": number, "delta" if self.chat else "text": new, "finish_reason": reason, "logprobs": None}
        if reward is not None:
            choice["reward"] = reward
        return _event({**self._kind, "choices": [choice], **({"usage": None} if self.usage_wanted else {})})


def _event(value: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


async def _pieces(service: Service, hearing: Hearing, written: _Written, event: Event | Gone) -> AsyncIterator[bytes]:
    """The stream, from its first event on."""
    service.metrics.first_text.observe(time.monotonic() - written.job.arrived)
    for chunk in written.opening():
        yield chunk
    while True:
        if isinstance(event, Gone):
            return
        if isinstance(event, Failed):
            yield b"data: " + error_body(event.status, event.message) + b"\n\n"
            return
        if isinstance(event, Finished):
            for chunk in written.closing():
                yield chunk
            return
        for number, text in event.pieces:
            yield written.piece(number, text)
        event = await hearing.next()


async def _answer(service: Service, request: Request, asked: CompletionRequest | ChatRequest) -> Response:
    hearing = Hearing(service, request.receive)
    job = await run_in_threadpool(service.job, asked, hearing.tell)
    service.submit(job)
    hearing.attend(job)
    written = _Written(asked, job, service.name)
    streaming = False
    try:
        event = await hearing.next()
        if isinstance(event, Failed):
            return _failed(event.status, event.message)
        if isinstance(event, Gone):
            return Response(status_code=CLIENT_LEFT)
        if job.stream:
            streaming = True
            return EventStream(_pieces(service, hearing, written, event), hearing.leave)
        return JSONResponse(written.whole())
    finally:
        if not streaming:
            hearing.leave()


def _failed(
    status: int, message: str, param: str | None = None, code: str | None = None, headers: dict[str, str] | None = None
) -> Response:
    return Response(error_body(status, message, param, code), status, headers, "application/json")


def build_app(service: Service, keys: ApiKeys | None = None) -> FastAPI:
    """The application. service: entered by the caller, before the first request. keys: None lets everybody in."""
    bearer = [Depends(HTTPBearer(auto_error=False, description="the server's key"))] if keys is not None else []
    app = FastAPI(title="fairlead serve", version=__version__, docs_url=None, redoc_url=None)  # both would fetch from elsewhere
    app.add_middleware(Gate, service=service, keys=keys)
    app.add_middleware(Observed, service=service)
    responses = {**_WRITTEN, **_ERRORS}
    refused: _Responses = {status: _ERRORS[status] for status in (401, 429)}

    @app.post("/v1/completions", response_model=Completion, responses=responses, dependencies=bearer)
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        """Continue a prompt, or each of several."""
        return await _answer(service, request, asked)

    @app.post("/v1/chat/completions", response_model=ChatCompletion, responses=responses, dependencies=bearer)
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        """Answer a chat."""
        return await _answer(service, request, asked)

    @app.get("/v1/models", responses=refused, dependencies=bearer)
    async def models() -> ModelList:
        """The one model that is served."""
        return ModelList(data=[ModelCard(id=service.name, created=service.created)])

    @app.get("/v1/models/{name:path}", responses={**refused, 404: _ERRORS[404]}, dependencies=bearer)
    async def model(name: str) -> ModelCard:
        """A model by name."""
        if name != service.name:
            raise BadRequest(f"there is no such model here; this server has {service.name!r}", "model", "model_not_found", 404)
        return ModelCard(id=service.name, created=service.created)

    unwell: _Responses = {503: {"model": Health, "description": "Stopping, or broken"}}
    counted: _Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}, **refused}

    @app.get("/health", response_model=Health, responses=unwell)
    async def health() -> JSONResponse:
        """Whether requests are taken. Needs no key."""
        worker = service.worker
        status = "stopping" if worker.closed else "ok" if worker.alive else "failed"
        body = Health(status=status, model=service.name, waiting=worker.waiting, running=worker.running)  # type: ignore[arg-type]
        return JSONResponse(body.model_dump(), 200 if status == "ok" else 503)

    @app.get("/metrics", response_class=Response, responses=counted, dependencies=bearer)
    async def metrics() -> Response:
        """Counters for Prometheus."""
        return Response(service.metrics.render(), media_type=service.metrics.content_type)

    _handle_errors(app)
    app.openapi = lambda: _described(app)  # type: ignore[method-assign]
    return app


def _handle_errors(app: FastAPI) -> None:
    """Everything that goes wrong has OpenAI's shape."""

    async def bad_request(request: Request, error: Exception) -> Response:
        assert isinstance(error, BadRequest)
        return _failed(error.status, str(error), error.param, error.code)

    async def refused(request: Request, error: Exception) -> Response:
        assert isinstance(error, Refused)
        return _failed(error.status, error.message, code="queue_full" if error.status == 429 else None, headers={"retry-after": str(error.retry_after)})

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        message, param = describe(error.errors())
        return _failed(400, message, param)

    async def other(request: Request, error: Exception) -> Response:
        assert isinstance(error, HTTPException)
        words = {
            400: "the body must be a JSON object", 404: "there is nothing at this address; what is served is in /openapi.json",
            405: "this address does not take this method; what is served is in /openapi.json",
        }  # fmt: skip
        return _failed(error.status_code, words.get(error.status_code, "the request cannot be answered"), headers=dict(error.headers or {}))

    for kind, handler in ((BadRequest, bad_request), (Refused, refused), (RequestValidationError, invalid), (HTTPException, other)):
        app.add_exception_handler(kind, handler)


def _described(app: FastAPI) -> dict[str, Any]:
    """The OpenAPI document; FastAPI's own 422 is not among what this server answers."""
    if app.openapi_schema is None:
        described = get_openapi(title=app.title, version=app.version, routes=app.routes, description="OpenAI-compatible completions of one model.")
        for path in described["paths"].values():
            for operation in path.values():
                operation["responses"].pop("422", None)
        for name in ("HTTPValidationError", "ValidationError"):
            described["components"]["schemas"].pop(name, None)
        app.openapi_schema = described
    return app.openapi_schema
