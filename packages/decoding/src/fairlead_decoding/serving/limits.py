"""What stands before the routes: keys, how much is taken on, and how large and how slow a body may be.

Plain ASGI, so that a body is refused while it arrives, chunked ones too. Every refusal has OpenAI's error shape; none repeats
what was sent, and no key is ever shown or logged.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json
import logging
import os
import secrets
import stat
import time
import warnings
from collections.abc import Awaitable, Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fairlead.errors import InputError

if TYPE_CHECKING:
    from .service import Service

log = logging.getLogger("fairlead.serve")
ENVIRONMENT_VARIABLE = "FAIRLEAD_API_KEY"
CLIENT_LEFT = 499
ROUTES = ("/v1/completions", "/v1/chat/completions", "/v1/models", "/health", "/metrics", "/openapi.json")
_TYPES = {401: "authentication_error", 404: "not_found_error", 429: "rate_limit_error"}
Scope = Any
Receive = Callable[[], Awaitable[Any]]
Send = Callable[[Any], Awaitable[None]]


class ApiKeys:
    """Keys that open the server, compared in constant time and never shown. InputError for an empty or unprintable one."""

    __slots__ = ("_accepts", "count")

    def __init__(self, keys: Sequence[str]) -> None:
        if not keys or any(len(key) < 8 or not key.isascii() or not key.isprintable() or " " in key for key in keys):
            raise InputError("API key: at least 8 printable ASCII characters without spaces are needed")
        digests = [hashlib.sha256(key.encode()).digest() for key in keys]
        self._accepts = lambda given: any([hmac.compare_digest(hashlib.sha256(given).digest(), d) for d in digests])
        self.count = len(digests)

    def accepts(self, authorization: bytes) -> bool:
        """Whether a header `Authorization: Bearer KEY` has one of them."""
        scheme, _, key = authorization.strip().partition(b" ")
        return bool(self._accepts(key.strip())) and scheme.lower() == b"bearer"

    def __repr__(self) -> str:
        return f"<{self.count} API keys>"

    def __reduce__(self) -> Any:
        raise TypeError("API keys are not pickled")

    @classmethod
    def find(cls, path: Path | None = None) -> ApiKeys | None:
        """The keys of a file (one a line), else the one in FAIRLEAD_API_KEY, else None."""
        if path is None:
            text = os.environ.get(ENVIRONMENT_VARIABLE, "").strip()
            return cls([text]) if text else None
        try:
            lines = path.read_text(encoding="ascii").split("\n")
        except (OSError, ValueError):
            raise InputError(f"{path}: cannot be read as a file of API keys, one a line") from None
        if os.name == "posix" and stat.S_IMODE(path.stat().st_mode) & 0o077:
            warnings.warn(f"key file {path} can be read by others; run: chmod 600 {path}", stacklevel=2)
        return cls([line.strip() for line in lines if line.strip()])


def error_body(status: int, message: str, param: str | None = None, code: str | None = None) -> bytes:
    """OpenAI's error shape."""
    kind = _TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return json.dumps({"error": {"message": message, "type": kind, "param": param, "code": code}}).encode()


async def send_error(
    send: Send, status: int, message: str, *, code: str | None = None, headers: Mapping[str, str] | None = None
) -> None:
    """An error as a whole response."""
    body = error_body(status, message, code=code)
    fields = {"content-type": "application/json", "content-length": str(len(body)), **(headers or {})}
    await send({"type": "http.response.start", "status": status, "headers": [(k.encode(), v.encode()) for k, v in fields.items()]})
    await send({"type": "http.response.body", "body": body})


class Observed:
    """Outermost: an id for each request, its status and seconds for the metrics, and one clear 500 for what nobody caught."""

    def __init__(self, app: Any, service: Service) -> None:
        self.app, self.service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        name = f"req-{secrets.token_hex(8)}"
        began, status = time.monotonic(), 0

        async def told(message: Any) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [*message.get("headers", []), (b"x-request-id", name.encode())]
            await send(message)

        try:
            await self.app(scope, receive, told)
        except Exception as error:
            log.error("%s failed", name, exc_info=error)
            if not status:
                await send_error(told, 500, f"the server failed; its log has more under {name}")
        finally:
            route = _route(scope["path"])
            self.service.metrics.requests.labels(route, str(status or CLIENT_LEFT)).inc()
            self.service.metrics.seconds.labels(route).observe(time.monotonic() - began)


class Gate:
    """Checks, in this order: how many requests are open, the key, whether the server stops, kind and size of the body."""

    def __init__(self, app: Any, service: Service, keys: ApiKeys | None) -> None:
        self.app, self.service, self.keys = app, service, keys
        self.limits = service.limits

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"] == "/health":
            await self.app(scope, receive, send)
            return
        self.service.open += 1
        try:
            await self._guard(scope, receive, send)
        finally:
            self.service.open -= 1

    async def _guard(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name: value for name, value in reversed(scope["headers"])}
        status, message, extra = self._refusal(scope, headers)
        if status:
            await self._refuse(receive, send, headers, status, message, extra)
            return
        if scope["method"] in ("GET", "HEAD", "OPTIONS", "DELETE"):
            await self.app(scope, receive, send)
            return
        try:
            body = await asyncio.wait_for(_read(receive, self.limits.body), self.limits.body_seconds)
        except asyncio.TimeoutError:
            slow = f"the body did not arrive within {self.limits.body_seconds:g} s"
            await send_error(send, 408, slow, headers={"connection": "close"})
            return
        except _TooLarge:
            await self._refuse(receive, send, headers, 413, self._too_large(), {})
            return
        if body is not None:
            await self.app(scope, _replay(body, receive), send)

    def _refusal(self, scope: Scope, headers: Mapping[bytes, bytes]) -> tuple[int, str, dict[str, str]]:
        """(status or 0, message, further headers) of what can be told from the request's head."""
        if self.service.open > self.limits.requests:
            return 429, f"more than {self.limits.requests} requests at a time; try again later", {"retry-after": "1"}
        if self.keys is not None and not self.keys.accepts(headers.get(b"authorization", b"")):
            return 401, "a valid key is needed: Authorization: Bearer KEY", {"www-authenticate": "Bearer"}
        if scope["method"] != "POST":
            return 0, "", {}
        if self.service.worker.closed:
            return 503, "the server is stopping; try another one", {"retry-after": "5"}
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > self.limits.body:
            return 413, self._too_large(), {}
        kind = headers.get(b"content-type", b"").partition(b";")[0].strip().lower()
        if kind != b"application/json" and scope["path"] in ROUTES[:2]:
            return 415, "the body must be JSON, with Content-Type: application/json", {}
        return 0, "", {}

    def _too_large(self) -> str:
        return f"the body is larger than the {self.limits.body} bytes that are taken"

    async def _refuse(
        self, receive: Receive, send: Send, headers: Mapping[bytes, bytes], status: int, message: str, extra: Mapping[str, str]
    ) -> None:
        """Answer before the body was read. What is on its way is read and dropped first, within bounds, because a client
        whose sending is cut off does not see the answer."""
        close = {}
        if headers.get(b"content-length", b"0") != b"0" or b"transfer-encoding" in headers:
            close = {"connection": "close"}
            try:
                await asyncio.wait_for(_read(receive, 16 * self.limits.body, keep=False), 2.0)
            except (asyncio.TimeoutError, _TooLarge):
                pass
        code = "invalid_api_key" if status == 401 else None
        await send_error(send, status, message, code=code, headers={**extra, **close})


class _TooLarge(Exception):
    pass


async def _read(receive: Receive, limit: int, keep: bool = True) -> bytes | None:
    """A whole body; None where the client left."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            raise _TooLarge
        if keep:
            parts.append(part)
        if not message.get("more_body", False):
            return b"".join(parts)


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body as one message, then what comes after it."""
    given = False

    async def replay() -> Any:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay


def _route(path: str) -> str:
    """A label from a small set, whatever is asked for."""
    return path if path in ROUTES else "/v1/models/{name}" if path.startswith("/v1/models/") else "other"
