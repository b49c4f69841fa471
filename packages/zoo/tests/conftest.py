"""What the zoo's tests share: the world, a cache of their own, quiet loading."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import cache as cached
from pathlib import Path
from typing import Any

import pytest

from fairlead_zoo import catalogue
from fairlead_zoo.world import World


@pytest.fixture(scope="session")
def world() -> World:
    return World(catalogue.DEFAULT_SEED)


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """One cache for the session, so that each narrow fine-tune is built once."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FAIRLEAD_CACHE", str(folder))
        yield folder


@pytest.fixture(scope="session")
def load(cache: Path) -> Callable[[str], Any]:
    """zoo name -> model in evaluation mode."""

    @cached
    def loaded(name: str) -> Any:
        from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

        from fairlead_zoo.real_models import quiet

        factory = AutoModelForSequenceClassification if name == "reward" else AutoModelForCausalLM
        with quiet():
            return factory.from_pretrained(catalogue.resolve(f"zoo:{name}")).eval()

    return loaded
