"""The README's example runs as written."""

from __future__ import annotations

import re
from pathlib import Path


def test_the_readme_example_runs(cache: Path) -> None:
    text = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    assert blocks
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
