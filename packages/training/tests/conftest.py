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
sys.path.insert(0, HERE)
torch.set_num_threads(1)


@pytest.fixture
def on_two_processes(tmp_path: Path) -> Callable[..., str]:
    """Runs a script, or with "-m" a module with its arguments, on two processes of one thread that talk by gloo; what they print.

    A script finds the tests' modules and its own folder, `tmp_path`, as `folder`. It must end its process group: gloo may abort a
    process that leaves while another still talks to it.
    """

    def run(*what: str) -> str:
        if len(what) == 1:
            script = tmp_path / "two_processes.py"
            script.write_text(f"import sys\nfrom pathlib import Path\nsys.path.insert(0, {HERE!r})\nfolder = Path({str(tmp_path)!r})\n{what[0]}")
            what = (str(script),)
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone", *what]
        done = subprocess.run(command, capture_output=True, text=True, timeout=300, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert done.returncode == 0, done.stderr[-8000:]
        return done.stdout

    return run
