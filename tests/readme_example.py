"""Run the Python examples of a README, as one program: `python tests/readme_example.py packages/core/README.md`."""

from __future__ import annotations

import re
import sys
from pathlib import Path


def examples(path: Path) -> str:
    """All ```python blocks of a Markdown file, joined."""
    return "\n".join(re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL))


if __name__ == "__main__":
    source = examples(Path(sys.argv[1]))
    if not source:
        sys.exit(f"{sys.argv[1]}: no python example")
    exec(compile(source, sys.argv[1], "exec"), {"__name__": "__main__"})
