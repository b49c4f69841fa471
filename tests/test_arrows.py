"""Imports point one way: kernels <- core <- packages, and no package imports a sibling."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest
from house import DISTRIBUTIONS, ROOT, environment

pytest.importorskip("importlinter")

LINT = "from importlinter.cli import lint_imports; raise SystemExit(lint_imports(config_filename={!r}, cache_dir=None))"


def lint(config: Path, path: str = "") -> subprocess.CompletedProcess[str]:
    env = {**environment(), "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, "-c", LINT.format(str(config))], cwd=ROOT, capture_output=True, text=True, env=env
    )


def test_imports_point_one_way() -> None:
    done = lint(ROOT / "pyproject.toml")
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("package", "imported"),
    [
        ("fairlead", "fairlead_watermark"),
        ("fairlead_zoo", "fairlead_watermark"),
        ("fairlead_decoding", "fairlead_watermark"),
    ],
)
def test_an_import_against_the_arrow_is_caught(package: str, imported: str, tmp_path: Path) -> None:
    for name in ("fairlead", "fairlead_watermark", "fairlead_decoding", "fairlead_training", "fairlead_zoo"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "__init__.py").write_text(
            f"import {imported}\n" if name == package else "", encoding="utf-8"
        )
    done = lint(ROOT / "pyproject.toml", path=str(tmp_path))
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{package} -> {imported}" in " ".join(done.stdout.split())


def test_no_source_is_beyond_the_linter() -> None:
    """The linter knows every package; one more would be unwatched."""
    found = {p.parent.name for d in DISTRIBUTIONS for p in (ROOT / d / "src").glob("*/__init__.py")}
    config = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert all(f'"{name}"' in config for name in found)
    assert {
        p.parent.as_posix() for p in map(lambda f: f.relative_to(ROOT), ROOT.glob("packages/*/pyproject.toml"))
    } <= set(DISTRIBUTIONS)


def test_siblings_are_not_reached_through_import_module() -> None:
    """importlib hides an import from the linter; by name the registry is the way."""
    siblings = {"packages/watermark": "fairlead_watermark", "packages/decoding": "fairlead_decoding"}
    siblings |= {"packages/training": "fairlead_training", "packages/zoo": "fairlead_zoo"}
    pairs = [(d, s) for d in siblings for other, s in siblings.items() if other != d]
    for distribution, sibling in [*pairs, ("kernels", "fairlead"), ("packages/core", "fairlead_decoding")]:
        for path in (ROOT / distribution / "src").rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
                if (
                    isinstance(node, ast.Call)
                    and getattr(node.func, "attr", getattr(node.func, "id", "")) == "import_module"
                ):
                    named = [a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str)]
                    assert not any(n == sibling or n.startswith(sibling + ".") for n in named), (
                        f"{path}: imports {sibling}"
                    )
