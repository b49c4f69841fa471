"""Rows of the benchmark and how they are measured: ways interleaved in one process, one thread, CPU time.

A speed is worth nothing without a right result, so each row checks itself before it is timed. Ratios are taken within one
run; times of different runs on a shared machine are not comparable closer than tens of per cent.
"""

from __future__ import annotations

import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Setup = Callable[[], Callable[[], Any]]
"""Prepares the inputs and returns what is timed."""


@dataclass(frozen=True)
class Row:
    """One line of the table.

    operation, shape, dtype: what is measured. ours, peers: setups by name. baseline: the peer that the ratio is taken
    against. at_least: how many times faster than it ours must be (below 1: how much slower it may be); 0 = no demand.
    floor: a setup that moves the least bytes, or None. check: raises when ours and the peer disagree.
    memory: also measure the peak of extra memory, in a process of its own; most_mib: what that may be, None = no demand;
    less_memory: how many times less than the baseline's it must be, 0 = no demand.
    peer_repeats: fewer for slow peers.
    """

    operation: str
    shape: str
    dtype: str
    ours: Setup
    peers: dict[str, Setup]
    baseline: str
    at_least: float
    floor: Any = None
    memory: bool = False
    check: Callable[[], None] | None = None
    peer_repeats: int | None = None
    most_mib: float | None = None
    less_memory: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.operation} | {self.shape} | {self.dtype} | {self.baseline}"


@dataclass
class Measured:
    """Medians in milliseconds of CPU time; ratio = baseline / ours, of the medians and of the minima (`best_ratio`)."""

    name: str
    ours_ms: float
    peers_ms: dict[str, float] = field(default_factory=dict)
    floor_ms: float | None = None
    ratio: float = 0.0
    best_ratio: float = 0.0
    peak_mib: float | None = None
    peer_peak_mib: float | None = None


def _once(call: Callable[[], Any]) -> float:
    start = time.process_time()
    call()
    return (time.process_time() - start) * 1e3


def measure(row: Row, budget: float = 8.0, most: int = 15) -> Measured:
    """Check, warm up, then time all ways in turn until the budget of seconds is spent (at least 3 rounds)."""
    if row.check is not None:
        row.check()
    ways: dict[str, Callable[[], Any]] = {"ours": row.ours()}
    ways.update({f"peer {name}": setup() for name, setup in row.peers.items()})
    if callable(row.floor):
        ways["floor"] = row.floor()
    first = {name: _once(call) for name, call in ways.items()}
    # A call below the clock's resolution is repeated inside one measurement.
    inner = {name: max(1, min(1000, int(2.0 / max(ms, 1e-3)))) for name, ms in first.items()}
    limit = {name: most for name in ways}
    for name, ms in first.items():
        if name.startswith("peer") and ms > 1500:
            limit[name] = row.peer_repeats or 2
    times: dict[str, list[float]] = {name: [] for name in ways}
    start = time.monotonic()
    for turn in range(most):
        if turn >= 3 and time.monotonic() - start > budget:
            break
        for name, call in ways.items():
            if len(times[name]) < limit[name]:
                begin = time.process_time()
                for _ in range(inner[name]):
                    call()
                times[name].append((time.process_time() - begin) * 1e3 / inner[name])
    medians = {name: statistics.median(values) for name, values in times.items()}
    ours, base = medians["ours"], medians[f"peer {row.baseline}"]
    return Measured(
        name=row.name, ours_ms=ours, peers_ms={n[5:]: t for n, t in medians.items() if n.startswith("peer ")},
        floor_ms=medians.get("floor"), ratio=base / ours, best_ratio=min(times[f"peer {row.baseline}"]) / min(times["ours"]),
    )  # fmt: skip


def peak_mib(setup: Setup) -> float:
    """Peak resident memory that one call adds to what its inputs take, in MiB; meant for a fresh process.

    torch allocates outside Python, so tracemalloc sees nothing of it. On Linux the kernel's high-water mark is set back
    before the call, elsewhere a peak of the setup can hide that of the call.
    """
    call = setup()
    before = _lower_high_water()
    call()
    return (_high_water() - before) / 1024


def _lower_high_water() -> float:
    """Set the mark to what is resident now where that can be done; the mark in KiB."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError:
        pass
    return _high_water()


def _high_water() -> float:
    """Largest resident memory so far, in KiB; 0 where the system does not say."""
    status = Path("/proc/self/status")
    if status.exists():
        for line in status.read_text(encoding="utf-8").splitlines():
            if line.startswith("VmHWM:"):
                return float(line.split()[1])
    try:
        import resource
    except ImportError:  # Windows
        return 0.0
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform == "darwin" else 1)
