"""Write the generated parts of the documentation, or with --check say which have drifted.

    python docs/generate.py [--check]

Generated: cli.md (the help of every command), operations.md (the kernels' operators), methods/index.md (the table of
methods), and generated/KIND-NAME.md (a method's settings, which its page includes).
"""

from __future__ import annotations

import importlib
import inspect
import sys
from pathlib import Path
from typing import Any

import click

from fairlead import registry
from fairlead.cli import cli

HERE = Path(__file__).resolve().parent
OURS = ("fairlead", "fairlead-watermark", "fairlead-decoding", "fairlead-training", "fairlead-zoo")
NOTE = "<!-- made by docs/generate.py; do not edit -->\n\n"
PAGES = {
    "watermark-alignment-resampling": "alignment-resampling",
    "refusal-phrases": "rewards",
    "world": "zoo",
    "world-model": "zoo",
    "worst-of-n": "best-of-n",
    "soft-best-of-n": "best-of-n",
    "rejection": "best-of-n",
    "blockwise": "best-of-n",
    "transfer-q-star": "token-search",
    "controlled-decoding": "token-search",
    "args": "token-search",
    "genarm": "token-search",
    "draft-alignment": "speculative",
    "keyword-coverage": "deal",
    "length-limit": "deal",
}


def command_line() -> str:
    """Help texts of all commands, in order."""
    parts = [NOTE + "# Command line\n"]

    def describe(command: click.Command, path: str, parent: click.Context | None) -> None:
        name = path.split()[-1]
        width = {"terminal_width": 100, "max_content_width": 100}
        context = click.Context(command, info_name=name, parent=parent, **{**command.context_settings, **width})
        parts.append(f"## {path}\n\n```text\n{command.get_help(context).rstrip()}\n```\n")
        if isinstance(command, click.Group):
            for child_name in command.list_commands(context):
                child = command.get_command(context, child_name)
                if child is not None:
                    describe(child, f"{path} {child_name}", context)

    describe(cli, "fairlead", None)
    return "\n".join(parts)


def page_of(method: Any) -> str:
    """The page, in docs/methods, that describes a method."""
    shared = {"reward": "rewards", "objective": "objectives"}
    return PAGES.get(method.name, shared.get(method.kind, method.name))


def ours() -> list[Any]:
    """What our packages register; a plugin that happens to be installed stays out."""
    return [m for m in registry.methods() if m.package in OURS]


def method_table() -> str:
    """What our packages register."""
    lines = [NOTE + "# Methods\n", "What is installed with our packages; `fairlead methods` shows yours as well.\n"]
    lines += ["| kind | name | package | paper | what it does |", "|---|---|---|---|---|"]
    for m in ours():
        paper = f"[{m.paper}](https://arxiv.org/abs/{m.paper})" if m.paper else ""
        lines.append(f"| {m.kind} | [`{m.name}`]({page_of(m)}.md) | {m.package} | {paper} | {m.summary} |")
    return "\n".join(lines) + "\n"


def settings(config: Any) -> str:
    """The settings of a method as a table."""
    lines = [NOTE + "| setting | default | what it is |", "|---|---|---|"]
    for name, field in config.model_fields.items():
        default = "required" if field.is_required() else f"`{field.get_default(call_default_factory=True)!r}`"
        allowed = ", ".join(_bound(m) for m in field.metadata if _bound(m))
        text = (field.description or "").replace("|", "\\|")
        lines.append(
            f"| `{name}` | {default.replace('|', chr(92) + '|')} | {text}{f' ({allowed})' if allowed else ''} |"
        )
    return "\n".join(lines) + "\n"


def _bound(constraint: Any) -> str:
    """A pydantic bound in words; "" for anything else."""
    signs = {"gt": ">", "ge": "≥", "lt": "<", "le": "≤"}
    return next(
        (f"{sign} {getattr(constraint, name):g}" for name, sign in signs.items() if hasattr(constraint, name)), ""
    )


def operations() -> str:
    """The kernels' operators: what each does, its backends, its signature."""
    from fairlead_kernels import library, ops

    lines = [NOTE + "# Operations\n", "The public functions of `fairlead_kernels` and the operators beneath them.\n"]
    for folder in sorted(Path(ops.__file__).parent.iterdir()):
        if not (folder / "spec.py").exists():
            continue
        module = importlib.import_module(f"fairlead_kernels.ops.{folder.name}")
        specs = importlib.import_module(f"fairlead_kernels.ops.{folder.name}.spec").SPECS
        first, _, rest = (inspect.getdoc(module) or "").partition("\n\n")
        lines += [f"## {folder.name}\n", " ".join(first.split()) + "\n"]
        if rest:
            lines += ["```text\n" + rest.rstrip() + "\n```\n"]
        for name in library.public_names():
            function = library.public(name)
            if inspect.isfunction(function) and function.__module__ == module.__name__:
                lines.append(f"- `{name}{_plain_signature(function)}`")
        lines.append("")
        for spec in specs:
            backends = ", ".join(sorted(spec.implementations))
            gradient = "differentiable" if spec.backward else "no gradient"
            lines.append(f"- operator `torch.ops.fairlead.{spec.name}`: {backends}; {gradient}")
        lines.append("")
    return "\n".join(lines)


def _plain_signature(function: Any) -> str:
    """Parameters and defaults; the names' suffixes say the shapes."""
    signature = inspect.signature(function)
    plain = [p.replace(annotation=inspect.Parameter.empty) for p in signature.parameters.values()]
    return str(signature.replace(parameters=plain, return_annotation=inspect.Signature.empty))


def wanted() -> dict[Path, str]:
    """Every generated file and what it should hold."""
    pages = {HERE / "cli.md": command_line(), HERE / "methods" / "index.md": method_table()}
    pages[HERE / "operations.md"] = operations()
    for m in ours():
        if m.config is not None and m.config.model_fields:
            pages[HERE / "generated" / f"{m.kind}-{m.name}.md"] = settings(m.config)
    return pages


def main() -> int:
    drifted = []
    files = wanted()
    for path, text in files.items():
        if "--check" in sys.argv:
            if not path.exists() or path.read_text(encoding="utf-8") != text:
                drifted.append(str(path.relative_to(HERE.parent)))
        else:
            path.parent.mkdir(exist_ok=True)
            path.write_text(text, encoding="utf-8")
    drifted += [
        f"{p.relative_to(HERE.parent)} (of a method that is gone)"
        for p in (HERE / "generated").glob("*")
        if p not in files
    ]
    drawn = (HERE / "methods" / "img" / "objectives.svg").read_text(encoding="utf-8")
    drifted += [
        f"docs/methods/img/objectives.svg (without {m.name}; python docs/objective_curves.py draws it)"
        for m in ours()
        if m.kind == "objective" and f"{m.name}</text>" not in drawn and f"<!-- {m.name} -->" not in drawn
    ]
    for name in drifted:
        sys.stderr.write(f"{name} has drifted; run: python docs/generate.py\n")
    return 1 if drifted else 0


if __name__ == "__main__":
    sys.exit(main())
