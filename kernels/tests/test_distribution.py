"""What a user installs: the README's example, importing without triton, and what importing costs."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

import fairlead_kernels
from fairlead_kernels import native

KERNELS = Path(__file__).resolve().parents[1]


def run(code: str) -> str:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_example_of_the_readme_finds_the_mark() -> None:
    (code,) = re.findall(r"```python\n(.*?)```", (KERNELS / "README.md").read_text(), flags=re.DOTALL)
    shares = eval(run(code))
    assert len(shares) == 2 and all(0.7 < share < 1 for share in shares)


def test_everything_imports_and_runs_without_triton() -> None:
    code = """
import sys
sys.modules["triton"] = None
import torch, fairlead_kernels
from fairlead_kernels import library
library.load_all()
print(fairlead_kernels.prf(torch.tensor([[17]]), torch.tensor([[0]]), key=42).item())
"""
    assert run(code).strip() == str(0xF311DFB4)


def test_importing_the_package_imports_no_operation_and_no_triton() -> None:
    code = "import sys, fairlead_kernels; print([m for m in sys.modules if m in ('torch', 'triton') or '.ops.' in m])"
    assert run(code).strip() == "[]"


@pytest.mark.skipif(native.why_absent() is not None, reason=str(native.why_absent()))
def test_the_library_has_every_kernel_of_the_sources() -> None:
    for source in KERNELS.glob("src/fairlead_kernels/ops/*/kernel.c"):
        for name in re.findall(r"FL_EXPORT\s+void\s+(\w+)\(", source.read_text()):
            assert native.why_absent(name) is None


def test_the_version_is_that_of_the_distribution() -> None:
    from importlib.metadata import version

    assert version("fairlead-kernels") == fairlead_kernels.__version__
