"""The queue and the one thread that owns the model.

Requests wait in a bounded queue; the worker takes the first and those behind it that may share its batch, in order, as many as
fit. One that is cancelled leaves the queue at once, or the model at the next token. What a batch raises fails its
requests and not the worker: where several shared it and none was told anything yet, each is tried alone.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable

from fairlead.errors import FairleadError

from .answering import Answerer
from .jobs import Job, Limits, Line

log = logging.getLogger("fairlead.serve")


class Refused(Exception):
    """A request that is not taken: an HTTP status, one line, and when to try again (seconds)."""

    def __init__(self, status: int, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.status, self.message, self.retry_after = status, message, retry_after


class Worker:
    """Answers jobs in a thread of its own. on_batch: told the lines of every batch."""

    def __init__(self, answerer: Answerer, limits: Limits, on_batch: Callable[[int], None] = lambda lines: None) -> None:
        self.answerer, self.limits, self._on_batch = answerer, limits, on_batch
        self._queue: deque[Job] = deque()
        self._change = threading.Condition()
        self._running: list[Job] = []
        self._closed = False
        self._ended = False
        self._batch_seconds = 1.0
        self._thread = threading.Thread(target=self._work, name="fairlead-serve", daemon=True)

    def start(self) -> None:
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    @property
    def closed(self) -> bool:
        """Whether new requests are refused."""
        return self._closed

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        return sum(not job.settled for job in self._running)

    @property
    def idle(self) -> bool:
        """Whether nothing waits and nothing runs."""
        with self._change:
            return not self._queue and not self._running

    def submit(self, job: Job) -> None:
        """Put a job into the queue; Refused where it is full or the worker stops."""
        with self._change:
            if self._closed:
                raise Refused(503, "the server is stopping; try another one", 5)
            if len(self._queue) >= self.limits.queue:
                raise Refused(429, f"{len(self._queue)} requests wait already; try again later", self.retry_after())
            self._queue.append(job)
            self._change.notify_all()

    def withdraw(self, job: Job) -> None:
        """Take a settled job out of the queue."""
        with self._change:
            if job in self._queue:
                self._queue.remove(job)
            self._change.notify_all()

    def retry_after(self) -> int:
        """Seconds after which the queue should have moved on."""
        batches = 1 + len(self._queue) * self.answerer.rows_per_line / self.limits.rows
        return max(1, min(60, math.ceil(batches * self._batch_seconds)))

    def close(self) -> None:
        """Take no more jobs; those that are here are answered."""
        with self._change:
            self._closed = True
            self._change.notify_all()

    def stop(self, timeout: float = 10.0) -> None:
        """Close, fail what waits, cut what runs, and end the thread."""
        self.close()
        with self._change:
            self._ended = True
            rest = [*self._queue, *self._running]
            self._queue.clear()
            self._change.notify_all()
        for job in rest:
            job.fail(503, "the server has stopped")
        if self._thread.ident is not None and self._thread is not threading.current_thread():
            self._thread.join(timeout)

    def _work(self) -> None:
        while True:
            jobs = self._take()
            if jobs is None:
                return
            began = time.monotonic()
            self._answer(jobs)
            self._batch_seconds += 0.2 * (time.monotonic() - began - self._batch_seconds)
            with self._change:
                self._running = []
                self._change.notify_all()

    def _take(self) -> list[Job] | None:
        """The next batch, the first job in the queue and others with its key; None at the end."""
        with self._change:
            while not self._queue:
                if self._ended:
                    return None
                self._change.wait()
        time.sleep(self.limits.gather)
        with self._change:
            taken: list[Job] = []
            lines = width = 0
            for job in list(self._queue):
                if job.settled:
                    self._queue.remove(job)
                    continue
                if taken:
                    if self.answerer.key(job) != self.answerer.key(taken[0]):
                        continue
                    rows = (lines + len(job.lines)) * self.answerer.rows_per_line
                    if rows > self.limits.rows or rows * max(width, job.width) > self.limits.cells:
                        break
                self._queue.remove(job)
                taken.append(job)
                lines, width = lines + len(job.lines), max(width, job.width)
            self._running = taken
            return taken

    def _answer(self, jobs: list[Job]) -> None:
        lines = [line for job in jobs for line in job.lines]
        step = max(1, self.limits.rows // self.answerer.rows_per_line)
        try:
            for start in range(0, len(lines), step):
                wanted = [line for line in lines[start : start + step] if not line.over]
                if wanted:
                    self._on_batch(len(wanted))
                    self.answerer(wanted)
        except Exception as error:  # whatever a model, a reward or a decoder raises must not end the worker
            self._failed(jobs, lines, error)

    def _failed(self, jobs: list[Job], lines: list[Line], error: Exception) -> None:
        left = [job for job in jobs if not job.settled]
        if len(left) > 1 and not any(line.tokens for line in lines):
            for job in left:
                self._answer([job])
            return
        if isinstance(error, FairleadError):
            log.error("a request failed: %s", error)
            message = str(error)
        else:
            log.error("a request failed", exc_info=error)
            message = "the model could not answer; the server's log says why"
        for job in left:
            job.fail(500, message)
