"""The contracts over registered methods: what `pytest --fairlead-contracts NAME` collects in place of a folder."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from fairlead import registry
from fairlead.errors import ConfigError, InputError
from fairlead.registry import Method
from fairlead.testing import contracts
from fairlead.testing.selection import Given

HINT = "give what it needs by --fairlead-given"


def _factory(method: Method, given: Given) -> Callable[..., Any]:
    """Builds the method; skips, with the reason, where it needs settings that nobody gave."""

    def make(**settings: Any) -> Any:
        try:
            return registry.create(method.kind, method.name, **given.settings, **settings)
        except (ConfigError, InputError) as error:
            if given.settings or "is required" not in str(error):
                raise
            pytest.skip(f"{error}; {HINT}")

    return make


def _contracts(method: Method, given: Given) -> list[type]:
    found = [contracts.registered_contract(method.kind, method.name)]
    make = _factory(method, given)
    texts = {k: v for k, v in (("prompts", given.prompts), ("responses", given.responses)) if v is not None}
    if method.kind == "recipe":
        found.append(contracts.recipe_contract(method.name))
    elif method.kind == "watermark":
        found.append(contracts.watermark_contract(make))
    elif method.kind == "decoder":
        found.append(contracts.decoder_contract(make))
    elif method.kind == "objective":
        found.append(contracts.objective_contract(make))
    elif method.kind == "rewriter":
        found.append(contracts.rewriter_contract(make, **{k: v for k, v in texts.items() if k == "prompts"}))
    elif method.kind == "reward":
        found.append(contracts.reward_contract(make, **texts))
    elif method.kind == "guard":
        found.append(contracts.guard_contract(make, **texts))
    return found


def pytest_generate_tests(metafunc: Any) -> None:
    known: dict[str, Given] = getattr(metafunc.config, "fairlead_given", {})
    cases = []
    for method in getattr(metafunc.config, "fairlead_methods", []):
        given = known.get(f"{method.kind}:{method.name}", Given())
        for contract in _contracts(method, given):
            checks = sorted(name for name in vars(contract) if name.startswith("test_"))
            name = f"{method.kind}-{method.name}"
            cases += [pytest.param(contract, check, given, id=f"{name}-{check}") for check in checks]
    metafunc.parametrize(("contract", "check", "given"), cases)


def test_contract(contract: type, check: str, given: Given) -> None:
    try:
        getattr(contract(), check)()
    except InputError as error:
        if given != Given():
            raise
        pytest.skip(f"{error}; {HINT}")  # a method for particular texts refuses the contract's own
