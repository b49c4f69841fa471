"""The documentation says what is there: generated parts are current, every method has a page, examples run."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import pytest
from house import DISTRIBUTIONS, ROOT, environment

from fairlead import registry
from fairlead.cli import cli

DOCS = ROOT / "docs"
WITHOUT_RECIPE = {
    "world": "the recipe's own judge and reward: it is exercised by the recipe of another method",
    "world-model": "learned stand-in of world, compared with it where the zoo is tested",
}


def blocks(path: Path, language: str = "python") -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


def pages() -> list[Path]:
    return [*sorted(ROOT.glob("*.md")), *sorted(DOCS.rglob("*.md")), *(ROOT / d / "README.md" for d in DISTRIBUTIONS)]


def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fairlead_docs_generate", DOCS / "generate.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_generated_parts_are_current() -> None:
    stale = [
        p.name for p, text in generator().wanted().items() if not p.exists() or p.read_text(encoding="utf-8") != text
    ]
    assert stale == [], "run: python docs/generate.py"


def test_every_method_has_a_page_that_names_it() -> None:
    module = generator()
    for method in module.ours():
        page = DOCS / "methods" / f"{module.page_of(method)}.md"
        assert page.exists(), f"{method.kind} {method.name}: no page {page.name}"
        text = page.read_text(encoding="utf-8")
        assert method.name in text or method.factory.rpartition(":")[2] in text, (
            f"{page.name} does not name {method.name}"
        )
        if method.paper:
            assert method.paper in text, f"{page.name} does not cite {method.paper}"


def test_every_page_of_a_scheme_has_its_equation() -> None:
    for name in ("kgw", "hf-kgw", "gumbel", "modified-gumbel", "alignment-resampling"):
        assert "$$" in (DOCS / "methods" / f"{name}.md").read_text(encoding="utf-8"), name


def test_every_watermark_and_decoder_stands_in_a_recipe() -> None:
    source = "".join(p.read_text(encoding="utf-8") for p in ROOT.glob("packages/*/src/*/recipes/*.py"))
    for method in generator().ours():
        if method.kind in ("watermark", "decoder"):
            built_by_name = f'"{method.name}"' in source
            built_by_class = method.factory.rpartition(":")[2] in source
            assert built_by_name or built_by_class, f"{method.kind} {method.name} is in no recipe"


def test_the_plugin_page_shows_the_template_itself() -> None:
    text = (DOCS / "plugin.md").read_text(encoding="utf-8")
    included = re.findall(r'^--8<-- "(.+)"$', text, re.MULTILINE)
    assert {Path(name).name for name in included} == {"pyproject.toml", "__init__.py", "test_fixed_list.py"}
    assert all((ROOT / name).is_file() for name in included)


def test_every_page_is_in_the_navigation() -> None:
    nav = (ROOT / "mkdocs.yml").read_text(encoding="utf-8").partition("nav:")[2]
    missing = [
        str(p.relative_to(DOCS))
        for p in DOCS.rglob("*.md")
        if p.parent.name != "generated" and str(p.relative_to(DOCS)) not in nav
    ]
    assert missing == []


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_examples_are_python_and_import_what_exists(page: Path) -> None:
    for block in blocks(page):
        if "--8<--" in block:
            continue
        for node in ast.walk(ast.parse(block)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fairlead"):
                module = importlib.import_module(str(node.module))
                for alias in node.names:
                    assert hasattr(module, alias.name) or _is_module(f"{node.module}.{alias.name}"), (
                        f"{node.module}.{alias.name}"
                    )


def _is_module(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except ModuleNotFoundError:
        return False


@pytest.mark.parametrize("page", pages(), ids=lambda p: str(p.relative_to(ROOT)))
def test_commands_and_options_in_examples_exist(page: Path) -> None:
    import click

    for line in "\n".join(blocks(page, "bash")).replace("\\\n", " ").splitlines():
        words = line.split("#")[0].split()
        if not words or words[0] != "fairlead":
            continue
        command: click.Command = cli
        context = click.Context(cli)
        for word in words[1:]:
            child = command.get_command(context, word) if isinstance(command, click.Group) else None
            if child is None:
                break
            command = child
        assert command is not cli or len(words) == 1, f"no such command: {line}"
        options = {o for p in command.params for o in (*p.opts, *p.secondary_opts)} | {"--help"}
        assert {w.partition("=")[0] for w in words if w.startswith("--")} <= options, line


def test_methods_named_in_commands_are_registered() -> None:
    known = {m.name for m in registry.methods()} | {"example-fixed-list"}
    for page in pages():
        for name in re.findall(r"--watermark ([\w-]+)|fairlead run ([\w-]+)", "\n".join(blocks(page, "bash"))):
            assert (name[0] or name[1]) in known, f"{page}: {name}"


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/quickstart.md", *(f"{d}/README.md" for d in DISTRIBUTIONS)])
def test_the_examples_of_a_page_run(page: str, tmp_path: Path) -> None:
    """Several seconds each: a process of its own imports torch and generates."""
    command = [sys.executable, str(ROOT / "tests" / "readme_example.py"), str(ROOT / page)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, env=environment())
    assert done.returncode == 0, done.stderr


class TestEquations:
    """docs/equations.py turns LaTeX into MathML."""

    def convert(self, text: str) -> str:
        pytest.importorskip("latex2mathml")
        spec = importlib.util.spec_from_file_location("fairlead_docs_equations", DOCS / "equations.py")
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        converted = module.to_mathml(text)
        assert isinstance(converted, str)
        return converted

    @pytest.mark.parametrize("page", sorted(DOCS.rglob("*.md")), ids=lambda p: str(p.relative_to(DOCS)))
    def test_every_equation_of_a_page_can_be_set(self, page: Path) -> None:
        self.convert(page.read_text(encoding="utf-8"))

    def test_a_paragraph_and_a_phrase(self) -> None:
        assert 'display="block"' in self.convert("a\n\n$$x^2$$\n")
        assert 'display="inline"' in self.convert("with $x$ in it")

    def test_code_and_money_are_left_alone(self) -> None:
        for text in ("`$HOME and $x$`", "```bash\necho $PATH $x$\n```", "costs $5 and then $6 more"):
            assert self.convert(text) == text

    @pytest.mark.parametrize("slip", ["$$\\left( a$$", "$$a^$$", "$$\\fracc{a}{b}$$"])
    def test_a_slip_is_an_error_that_shows_it(self, slip: str) -> None:
        with pytest.raises(ValueError, match="a"):
            self.convert(slip)
