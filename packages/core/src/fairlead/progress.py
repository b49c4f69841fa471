"""Progress bars on a terminal for whatever takes longer than two seconds; silence elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .runs import Run

DELAY = 2.0


class Bar:
    """A bar on stderr that appears after `DELAY` seconds of work, and never where stderr is no terminal."""

    def __init__(self) -> None:
        self._began = time.monotonic()
        self._rich: Any = None
        self._tasks: dict[str, Any] = {}
        self._silent = not sys.stderr.isatty()

    def __call__(self, label: str, done: int, total: int | None = None) -> None:
        """Show `label` at done of total."""
        if self._silent or (self._rich is None and time.monotonic() - self._began < DELAY):
            return
        if self._rich is None:
            from rich.console import Console
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            self._rich = Progress(
                TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn(),
                console=Console(stderr=True), transient=True,
            )  # fmt: skip
            self._rich.start()
        if label not in self._tasks:
            self._tasks[label] = self._rich.add_task(label, total=total)
        self._rich.update(self._tasks[label], completed=done, total=total)

    def close(self) -> None:
        """Take the bar away."""
        if self._rich is not None:
            self._rich.stop()


@contextmanager
def bar() -> Iterator[Bar]:
    """A `Bar` for the length of a block."""
    shown = Bar()
    try:
        yield shown
    finally:
        shown.close()


@contextmanager
def run_progress(run: Run) -> Iterator[None]:
    """Draw the progress of a run's stages."""
    with bar() as shown:
        run.listen(shown)
        yield
