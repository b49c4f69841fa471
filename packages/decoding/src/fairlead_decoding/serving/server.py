"""uvicorn, patient with slow peers only so long, and slow itself to leave: what runs is finished, what is new gets a 503.

A connection that does not send its header lines, or does not read its answer, is closed after `Limits.header_seconds` and
`write_seconds`. The first SIGINT or SIGTERM closes the queue, and the server leaves when it is idle or its grace is over; the
second makes it leave at once, and what runs gets a 503.
"""

from __future__ import annotations

import asyncio
import socket
import time
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from .jobs import Limits
from .limits import error_body
from .service import Service


class PatientProtocol(H11Protocol):
    """uvicorn's HTTP/1.1 with an end to its patience."""

    limits = Limits()
    _headers_due: asyncio.TimerHandle | None = None
    _reading_due: asyncio.TimerHandle | None = None

    def connection_made(self, transport: Any) -> None:
        connection = transport.get_extra_info("socket")
        if connection is not None and connection.family in (socket.AF_INET, socket.AF_INET6):
            # asyncio does so only where the listener's protocol number was given; without it every answer waits 40 ms.
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        super().connection_made(transport)
        self._expect_headers()

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._headers_due, self._reading_due):
            if timer is not None:
                timer.cancel()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._expect_headers()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._reading_due = self.loop.call_later(self.limits.write_seconds, self.transport.abort)

    def resume_writing(self) -> None:
        if self._reading_due is not None:
            self._reading_due.cancel()
            self._reading_due = None
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        body = error_body(400, "this is no valid HTTP request")
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        for event in (h11.Response(status_code=400, headers=headers, reason=b"Bad Request"), h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _expect_headers(self) -> None:
        """Between the first byte of a connection or request and the end of its header lines the clock runs."""
        if self.conn.their_state is not h11.IDLE:
            if self._headers_due is not None:
                self._headers_due.cancel()
                self._headers_due = None
        elif self._headers_due is None and not self.transport.is_closing():
            self._headers_due = self.loop.call_later(self.limits.header_seconds, self._late)

    def _late(self) -> None:
        self._headers_due = None
        if self.conn.their_state is h11.IDLE and (self.cycle is None or self.cycle.response_complete):
            self.transport.abort()


class GracefulServer(uvicorn.Server):
    """grace: seconds that running requests may take once the server is told to stop."""

    def __init__(self, config: uvicorn.Config, service: Service, grace: float = 30.0) -> None:
        super().__init__(config)
        self.service, self.grace = service, grace
        self._leaves_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._leaves_at is None:
            self._leaves_at = time.monotonic() + self.grace
            self.service.worker.close()
        elif self._leaves_at > 0:
            self._leaves_at = 0.0
        else:
            super().handle_exit(sig, frame)

    async def on_tick(self, counter: int) -> bool:
        if self._leaves_at is not None and ((self.service.worker.idle and not self.service.open) or time.monotonic() > self._leaves_at):
            self.service.worker.stop(0.0)
            self.should_exit = True
        return await super().on_tick(counter)


def configure(app: Any, service: Service, *, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Config:
    """uvicorn's settings for an application of `build_app`."""
    protocol = type("PatientProtocol", (PatientProtocol,), {"limits": service.limits})
    return uvicorn.Config(
        app, host=host, port=port, http=protocol, ws="none", lifespan="off", log_config=None, access_log=False, server_header=False,
        timeout_keep_alive=30, timeout_graceful_shutdown=5, proxy_headers=False,
    )  # fmt: skip
