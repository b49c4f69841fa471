"""pytest plugin: the marker of the contract tests, and `pytest --fairlead-contracts NAME` for what is registered.

Imports nothing of fairlead until the option is given, so that it costs other people's test runs nothing.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any


def pytest_addoption(parser: Any) -> None:
    group = parser.getgroup("fairlead", "contract tests of fairlead's kinds")
    group.addoption(
        "--fairlead-contracts", action="append", metavar="NAME",
        help="run the contracts of the registered method NAME (or KIND:NAME, or all those of a distribution, or 'all') "
        "in place of the folder's tests; may be repeated",
    )  # fmt: skip
    group.addoption(
        "--fairlead-given", metavar="FILE",
        help="YAML file {KIND:NAME: {settings: {...}, prompts: [...], responses: [...]}} for methods that need settings "
        "or judge particular texts",
    )  # fmt: skip


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "fairlead_contract: contract test of a fairlead kind")
    wanted = config.getoption("fairlead_contracts")
    if wanted:
        import pytest

        from fairlead.errors import FairleadError
        from fairlead.testing import selection

        try:
            config.fairlead_methods = selection.chosen(wanted)
            config.fairlead_given = selection.given(config.getoption("fairlead_given"))
        except FairleadError as error:
            raise pytest.UsageError(str(error)) from None
        config.args[:] = [str(Path(__file__).with_name("registered.py"))]
