"""Settings of the kernels' tests: one thread, specs found once, and who runs where."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from fairlead_kernels import library

os.environ.setdefault("TRITON_DEFAULT_FP_FUSION", "0")  # as Triton 3.10 will have it
torch.set_num_threads(1)
settings.register_profile("kernels", deadline=None, max_examples=30, derandomize=True)
settings.load_profile("kernels")
SPECS = library.load_all()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "triton: runs in Triton's interpreter; a process of its own, TRITON_INTERPRET=1")


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`spec_dtype`: every operation at every dtype of its floating inputs. `spec`: every operation."""
    if "spec_dtype" in metafunc.fixturenames:
        cases = [(spec, dtype) for spec in SPECS.values() for dtype in spec.dtypes or (torch.int64,)]
        names = [f"{spec.name}-{str(dtype).removeprefix('torch.')}" for spec, dtype in cases]
        metafunc.parametrize("spec_dtype", cases, ids=names)
    elif "spec" in metafunc.fixturenames:
        metafunc.parametrize("spec", list(SPECS.values()), ids=list(SPECS))
