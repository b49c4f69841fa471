"""The benchmark's own bookkeeping: what is measured, what counts as behind. Speeds themselves are not tests."""

from __future__ import annotations

import importlib.util
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from house import ROOT

BENCHMARKS = ROOT / "benchmarks"
WITHOUT_A_PEER_OF_ITS_OWN = {"gumbel_uniform"}
"""Measured against something else that fills as many numbers: there is nothing to be equal to."""


@pytest.fixture()
def harness(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    yield load(BENCHMARKS / "harness.py", "harness")


def load(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    spec.loader.exec_module(module)
    return module


def spin(seconds: float) -> Callable[[], Callable[[], None]]:
    def call() -> None:
        end = time.process_time() + seconds
        while time.process_time() < end:
            pass

    return lambda: call


def row(harness: ModuleType, **changes: Any) -> Any:
    standard = {
        "operation": "spin", "shape": "1", "dtype": "-", "ours": spin(0.002), "peers": {"slow": spin(0.02)},
        "baseline": "slow", "at_least": 2.0,
    }  # fmt: skip
    return harness.Row(**{**standard, **changes})


def test_the_ratio_is_that_of_processor_time(harness: ModuleType) -> None:
    found = harness.measure(row(harness), budget=0.3)
    assert 5 < found.ratio < 20
    assert found.peers_ms["slow"] > found.ours_ms


def test_a_wrong_result_is_never_timed(harness: ModuleType) -> None:
    def check() -> None:
        raise AssertionError("another result")

    with pytest.raises(AssertionError, match="another result"):
        harness.measure(row(harness, check=check, ours=lambda: pytest.fail("was set up")))


def test_the_peak_of_a_call_is_seen_where_torch_allocates(harness: ModuleType) -> None:
    """In a process of its own, as the benchmark measures: a high-water mark never falls."""
    import subprocess
    import sys

    if harness._high_water() == 0:
        pytest.skip("the system does not say how much memory was used")
    code = "import torch, harness; print(harness.peak_mib(lambda: lambda: torch.ones(16 << 20).sum()))"
    done = subprocess.run([sys.executable, "-c", code], cwd=BENCHMARKS, capture_output=True, text=True, check=True)
    assert 60 < float(done.stdout) < 100


def test_what_falls_behind_is_said_for_speed_and_memory(harness: ModuleType) -> None:
    run = load(BENCHMARKS / "run.py", "fairlead_benchmarks_run")
    good = {"name": "x", "ratio": 3.0, "best_ratio": 3.1, "at_least": 2.0, "most_mib": 50, "peak_mib": 40}
    good |= {"less_memory": 4.0, "peer_peak_mib": 161}
    assert run._behind(good) == []
    assert len(run._behind({**good, "ratio": 1.5, "best_ratio": 1.6})) == 1
    assert run._behind({**good, "ratio": 1.9, "best_ratio": 2.1}) == []
    assert len(run._behind({**good, "peak_mib": 51, "peer_peak_mib": 300})) == 1
    assert run._behind({**good, "peer_peak_mib": 120}) == ["x: 3.0x less memory, 4x is asked"]
    assert run._behind({**good, "peer_peak_mib": 40, "less_memory": 0.0}) == []
    assert run._behind({**good, "peak_mib": None}) == []


def test_the_machine_is_named_by_its_processor_not_by_its_host(harness: ModuleType) -> None:
    import platform
    import re

    name = load(BENCHMARKS / "run.py", "fairlead_benchmarks_run").machine()
    assert re.fullmatch(r"[a-z0-9-]+", name)
    assert platform.node().lower() not in name or not platform.node()


@pytest.mark.parametrize("path", sorted(BENCHMARKS.glob("bench_*.py")), ids=lambda p: p.stem)
def test_every_row_names_its_baseline_and_has_a_check(path: Path, harness: ModuleType) -> None:
    rows = list(load(path, path.stem).rows())
    assert rows
    assert len({r.name for r in rows}) == len(rows), "names are keys of the history"
    for r in rows:
        assert r.baseline in r.peers
        assert r.check is not None or r.operation in WITHOUT_A_PEER_OF_ITS_OWN
        assert r.most_mib is None or r.memory
