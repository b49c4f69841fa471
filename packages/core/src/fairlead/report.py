"""A run as one self-contained HTML page that a person wants to look at.

Reads the run directory only, so `fairlead report DIR` renders again without the model.
"""

from __future__ import annotations

import base64
import json
import os
import re
from importlib import resources
from pathlib import Path
from typing import Any

from . import runs
from .errors import InputError
from .files import atomic_write

_LONG = 28
"""Characters beyond which a cell of text may break over lines."""
_NUMBER = 20
"""The same for a cell that starts with a number."""


def write(directory: str | os.PathLike[str]) -> Path:
    """Render `directory` into its report.html and return that path."""
    path = Path(directory) / "report.html"
    html = render(directory)
    with atomic_write(path) as stream:
        stream.write(html)
    return path


def render(directory: str | os.PathLike[str]) -> str:
    """The page as text. InputError when the directory holds no run, or one whose files are gone."""
    import jinja2

    record = runs.read(directory)
    contents = []
    for index, block in enumerate(record["blocks"]):
        block["anchor"] = f"b{index}"
        if block["kind"] == "figure":
            block["markup"] = _figure(Path(directory) / "figures" / block["file"], index, block["caption"] or block["title"])
            continue
        contents.append((block["anchor"], block["title"]))
        if block["kind"] == "section":
            block["paragraphs"] = [part.strip() for part in block["text"].split("\n\n") if part.strip()]
        else:
            block["classes"] = [_column([row[c] for row in block["rows"]]) for c in range(len(block["columns"]))]
    template = resources.files(__package__).joinpath("report.html.jinja").read_text(encoding="utf-8")
    environment = jinja2.Environment(autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(cell=_cell, parts=_parts, duration=_duration)
    checks = record["checks"]
    return environment.from_string(template).render(
        run=record, passed=sum(c["passed"] for c in checks), failed=[c for c in checks if not c["passed"]],
        paper_url=_paper_url(record.get("paper", "")), contents=contents,
        settings=json.dumps(record["config"], indent=2, ensure_ascii=False),
    )  # fmt: skip


def _figure(path: Path, index: int, label: str) -> str:
    """Markup of a figure without reference to a file: the SVG itself, or a PNG as a data URI."""
    from markupsafe import escape

    try:
        if path.suffix == ".png":
            data = base64.b64encode(path.read_bytes()).decode("ascii")
            return f'<img alt="{escape(label)}" src="data:image/png;base64,{data}">'
        svg = _inline(path.read_text(encoding="utf-8"), index)
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: the run's figure cannot be read ({error})") from None
    return svg.replace("<svg", f'<svg role="img" aria-label="{escape(label)}"', 1)


def _inline(svg: str, index: int) -> str:
    """The <svg> element alone, its ids made unique on the page, shown at most at its natural width."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\b(id|xlink:href|href|clip-path)="(url\(#|#)?([\w-]+)(\))?"', _renamed(index), svg)
    head, _, rest = svg.partition(">")
    width = re.search(r'\bwidth="([\d.]+)pt"', head)
    head = re.sub(r'\s(?:width|height)="[^"]*"', "", head)
    style = f' style="max-width:{float(width.group(1)) * 1.75:.0f}px"' if width else ""
    return f"{head}{style}>{rest}"


def _renamed(index: int) -> Any:
    def replace(match: re.Match[str]) -> str:
        attribute, head, name, tail = match.groups()
        if attribute != "id" and not head:
            return match.group(0)
        return f'{attribute}="{head or ""}f{index}-{name}{tail or ""}"'

    return replace


def _column(values: list[Any]) -> str:
    """How a table's column is set: n numbers (right, on one line; w: that may break), s short text (on one line), l long text."""
    shown = [_cell(v) for v in values if v is not None and v != ""]
    if max(map(len, shown), default=0) > _LONG + 12 or any("\n" in text for text in shown):
        return "l"
    if shown and all(re.match(r"^[+\-−]?(\d|\.\d|inf|nan)", text) for text in shown):
        return "n" if max(map(len, shown)) <= _NUMBER else "n w"
    return "s" if max(map(len, shown), default=0) <= _LONG else "l"


def _cell(value: Any) -> str:
    """A value as a reader wants it: four significant digits, words for truth values, a dash for nothing."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def _parts(value: Any) -> list[str]:
    """A long number with something in brackets, "0.236 → 0.231 (-0.005 ± 0.117)", as the lines it is set in."""
    return _cell(value).replace(" (", "\n(").split("\n")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{seconds:.1f} s"


def _paper_url(paper: str) -> str:
    return f"https://arxiv.org/abs/{paper}" if re.fullmatch(r"\d{4}\.\d{4,5}", paper) else ""
