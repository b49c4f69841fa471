"""The text that every Python carries."""

import sysconfig
from pathlib import Path

import pytest
import torch

from fairlead import letters
from fairlead.errors import InputError


def test_the_text_is_letters_in_the_order_of_the_library() -> None:
    text = letters.corpus()
    assert len(text) >= letters.LEAST and int(text.min()) >= 0 and int(text.max()) < len(letters.LETTERS) == 29
    assert "  " not in letters.written(text[:5000])
    letters.corpus.cache_clear()
    assert torch.equal(text, letters.corpus())


def test_a_library_without_its_sources_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    letters.corpus.cache_clear()
    with pytest.raises(InputError, match=r"has 0 letters of docstrings, 100000 are needed; is its source installed\?"):
        letters.corpus()


def test_a_model_depends_on_its_seed_alone() -> None:
    first, again, other = (letters.letter_model(1, 16, 2, seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[k], again[k]) for k in first)
    assert not torch.equal(first["lm_head.weight"], other["lm_head.weight"])
