"""Write the generated parts of the documentation, or with --check say which have drifted.

    python docs/generate.py [--check]

Generated: docs/cli.md (the help of every command) and docs/methods/index.md (the table of methods).
"""

from __future__ import annotations

import sys
from pathlib import Path

import click

from fairlead import registry
from fairlead.cli import cli

HERE = Path(__file__).resolve().parent
OURS = ("fairlead", "fairlead-watermark", "fairlead-zoo")
NOTE = "<!-- made by docs/generate.py; do not edit -->\n\n"


def command_line() -> str:
    """Help texts of all commands, in order."""
    parts = [NOTE + "# Command line\n"]

    def describe(command: click.Command, path: str, parent: click.Context | None) -> None:
        context = click.Context(command, info_name=path.split()[-1], parent=parent, terminal_width=100, max_content_width=100)
        parts.append(f"## {path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
        if isinstance(command, click.Group):
            for name in command.list_commands(context):
                child = command.get_command(context, name)
                if child is not None:
                    describe(child, f"{path} {name}", context)

    describe(cli, "fairlead", None)
    return "\n".join(parts)


def method_table() -> str:
    """What our packages register."""
    lines = [NOTE + "# Methods\n", "What is installed with our packages; `fairlead methods` shows yours as well.\n"]
    lines += ["| kind | name | package | paper | what it does |", "|---|---|---|---|---|"]
    for m in registry.methods():
        if m.package in OURS:
            paper = f"[{m.paper}](https://arxiv.org/abs/{m.paper})" if m.paper else ""
            lines.append(f"| {m.kind} | `{m.name}` | {m.package} | {paper} | {m.summary} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    wanted = {HERE / "cli.md": command_line(), HERE / "methods" / "index.md": method_table()}
    drifted = []
    for path, text in wanted.items():
        if "--check" in sys.argv:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                drifted.append(str(path.relative_to(HERE.parent)))
        else:
            path.write_text(text, encoding="utf-8")
    for name in drifted:
        sys.stderr.write(f"{name} has drifted; run: python docs/generate.py\n")
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
