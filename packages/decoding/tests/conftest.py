"""What the tests of decoding share: a tiny model with its tokenizer on disk."""

from __future__ import annotations

from pathlib import Path

import pytest

from fairlead.testing import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder
