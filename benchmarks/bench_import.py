"""Import time of fairlead_watermark beyond importing torch, and what it must not import."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any

from harness import Row

HEAVY = ("transformers", "scipy", "pyarrow", "matplotlib", "triton")


def run(code: str) -> Callable[[], Any]:
    return lambda: _spend(
        float(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    )


def _spend(seconds: float) -> None:
    """Burn as much CPU time here as the child measured for itself, so that the harness sees it."""
    import time

    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def ours() -> Callable[[], Any]:
    return run(
        "import torch, time; t = time.process_time(); import fairlead_watermark as f; f.KGW, f.Gumbel; print(time.process_time() - t)"
    )


def half_a_second() -> Callable[[], Any]:
    return lambda: _spend(0.5)


def check() -> None:
    code = f"import sys, fairlead_watermark as f; f.KGW, f.Gumbel, f.ModifiedGumbel; print([m for m in {HEAVY} if m in sys.modules])"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
    if found != "[]":
        raise AssertionError(f"import fairlead_watermark imports {found}")


def rows() -> Iterator[Row]:
    yield Row(
        "import fairlead_watermark",
        "beyond torch",
        "-",
        ours,
        {"half a second": half_a_second},
        "half a second",
        1.0,
        check=check,
    )
