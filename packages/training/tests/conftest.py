"""Lets the tests of objectives share their batches, and starts what runs on two processes."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

HERE = str(Path(__file__).parent)
BEFORE = "import sys\nfrom pathlib import Path\nsys.path.insert(0, {here!r})\nfolder = Path({folder!r})\n"
# Leave together, by the launcher's store: gloo aborts a process that talks to one that has left, and its threads one that ends by itself.
AFTER = """
import os
import torch.distributed as dist
if dist.is_initialized():
    store = dist.distributed_c10d._get_default_store()
    store.set(f"left {dist.get_rank()}", "")
    store.wait([f"left {rank}" for rank in range(dist.get_world_size())])
sys.stdout.flush()
os._exit(0)
"""
sys.path.insert(0, HERE)
torch.set_num_threads(1)


@pytest.fixture
def on_two_processes(tmp_path: Path) -> Callable[..., str]:
    """Runs a script, or with "-m" a module with its arguments, on two processes of one thread that talk by gloo; what they print.

    A script finds the tests' modules and its own folder, `tmp_path`, as `folder`.
    """

    def run(*what: str) -> str:
        if len(what) == 1:
            script = tmp_path / "two_processes.py"
            script.write_text(BEFORE.format(here=HERE, folder=str(tmp_path)) + what[0] + AFTER)
            what = (str(script),)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-8000:]
        return done.stdout

    return run
