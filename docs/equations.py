"""Equations of the documentation: `$...$` and a `$$...$$` paragraph become MathML, which browsers draw themselves.

Made when the site is built, so that a reader's browser fetches no script. Code is left alone.
"""

from __future__ import annotations

import re
from typing import Any

_PARTS = re.compile(
    r"(?P<code>^(?P<fence>```+|~~~+).*?^(?P=fence)\s*?$|(?P<tick>`+).+?(?P=tick))"
    r"|\$\$(?P<block>.+?)\$\$"
    r"|(?<![\\\w$])\$(?P<line>[^\s$](?:[^$\n]*[^\s$\\])?)\$(?![\w$])",
    re.MULTILINE | re.DOTALL,
)


def to_mathml(markdown: str) -> str:
    """Markdown with its equations as MathML. ValueError names an equation that is not LaTeX."""
    return _PARTS.sub(_convert, markdown)


def _convert(found: re.Match[str]) -> str:
    if found["code"]:
        return found[0]
    from latex2mathml.converter import convert

    latex, display = (found["block"], "block") if found["block"] else (found["line"], "inline")
    try:
        mathml = convert(latex.strip(), display=display)
    except Exception as error:  # the converter raises classes of its own for each kind of slip
        raise ValueError(f"equation {latex.strip()!r}: {type(error).__name__} {error}") from error
    unknown = re.search(r"\\[a-zA-Z]+", mathml)
    if unknown:
        raise ValueError(f"equation {latex.strip()!r}: unknown command {unknown[0]}")
    return f'\n<div class="equation">{mathml}</div>\n' if display == "block" else mathml


def on_page_markdown(markdown: str, **_: Any) -> str:
    """The event that mkdocs calls per page."""
    return to_mathml(markdown)
