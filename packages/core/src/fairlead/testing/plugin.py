"""pytest plugin: nothing but the marker of the contract tests, so that it costs other people's test runs nothing."""

from __future__ import annotations

from typing import Any


def pytest_configure(config: Any) -> None:
    config.addinivalue_line("markers", "fairlead_contract: contract test of a fairlead kind")
