"""A run as one self-contained HTML page that a person wants to look at.

Reads the run directory only, so `fairlead report DIR` renders again without the model.
"""

from __future__ import annotations

import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from . import runs
from .files import atomic_write


def write(directory: str | os.PathLike[str]) -> Path:
    """Render `directory` into its report.html and return that path."""
    path = Path(directory) / "report.html"
    html = render(directory)
    with atomic_write(path) as stream:
        stream.write(html)
    return path


def render(directory: str | os.PathLike[str]) -> str:
    """The page as text."""
    import jinja2

    record = runs.read(directory)
    for index, block in enumerate(record["blocks"]):
        if block["kind"] == "figure":
            svg = (Path(directory) / "figures" / block["file"]).read_text(encoding="utf-8")
            block["svg"] = _inline(svg, index)
        if block["kind"] == "section":
            block["paragraphs"] = [part.strip() for part in block["text"].split("\n\n") if part.strip()]
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["numeric"] = _numeric
    checks = record["checks"]
    return environment.from_string(template).render(
        run=record, passed=sum(c["passed"] for c in checks), failed=[c for c in checks if not c["passed"]],
        paper_url=_paper_url(record.get("paper", "")),
    )  # fmt: skip


def _inline(svg: str, index: int) -> str:
    """The <svg> element alone, its ids made unique on the page and its size left to the style sheet."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id|xlink:href|href|clip-path)="(url\(#|#)?([\w-]+)(\))?"', _renamed(index), svg)
    return re.sub(r'(<svg[^>]*?) (?:width)="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) (?:height)="[^"]*"', r"\1", svg, count=1), count=1)


def _renamed(index: int) -> Any:
    def replace(match: re.Match[str]) -> str:
        attribute, head, name, tail = match.groups()
        if attribute != "id" and not head:
            return match.group(0)
        return f'{attribute}="{head or ""}f{index}-{name}{tail or ""}"'

    return replace


def _numeric(value: Any) -> bool:
    return isinstance(value, (int, float)) or bool(re.match(r"^[+\-−]?[\d.]", str(value)))


def _paper_url(paper: str) -> str:
    return f"https://arxiv.org/abs/{paper}" if re.fullmatch(r"\d{4}\.\d{4,5}", paper) else ""
