"""What the tests of the whole repository share: where it is, its files, its command line in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
DISTRIBUTIONS = (
    "kernels",
    "packages/core",
    "packages/watermark",
    "packages/decoding",
    "packages/training",
    "packages/zoo",
)
LEFT_OUT = {"build", "dist", "runs", "site", "venv", "__pycache__"}


def tracked_files() -> list[Path]:
    """Files under version control; everything but build outputs and dot folders where git or the history is absent."""
    try:
        listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError):
        return [p for p in ROOT.rglob("*") if p.is_file() and not _left_out(p.relative_to(ROOT))]
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def _left_out(path: Path) -> bool:
    return any(
        part in LEFT_OUT or (part.startswith(".") and part != ".ci") or part.endswith(".egg-info")
        for part in path.parts
    )


def fairlead(*arguments: str | Path, cwd: Path, **options: object) -> subprocess.CompletedProcess[str]:
    """Run `fairlead ARGUMENTS` and hand back what happened."""
    command = [sys.executable, "-m", "fairlead", *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, env=environment(), **options)  # type: ignore[call-overload, no-any-return]


def environment() -> dict[str, str]:
    """This environment with one thread and without a key or forced backend of the person who runs the tests."""
    kept = {k: v for k, v in os.environ.items() if k not in ("FAIRLEAD_WATERMARK_KEY", "FAIRLEAD_KERNELS")}
    return {**kept, "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}
