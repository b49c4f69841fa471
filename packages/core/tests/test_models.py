"""Models by name: folders, names that plugins answer, and one clear line for everything else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fairlead.errors import FairleadError, InputError
from fairlead.models import load, load_tokenizer, logits_width, resolve


def test_a_folder_is_loaded_with_left_padding_in_eval_mode(tiny_folder: Path) -> None:
    model, tokenizer = load(tiny_folder)
    assert not model.training
    assert model.dtype == torch.float32
    assert tokenizer.padding_side == "left"
    assert tokenizer.pad_token_id == 0
    assert logits_width(model) == 64
    assert len(tokenizer) == 63


def test_a_dtype_can_be_asked_for(tiny_folder: Path) -> None:
    assert load(tiny_folder, dtype=torch.bfloat16)[0].dtype == torch.bfloat16


def test_a_name_without_a_scheme_is_itself() -> None:
    assert resolve("some/model") == "some/model"
    assert resolve(Path("folder")) == "folder"


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "empty"),
        ("/no/such/model", "no such model folder"),
        ("./nor/this", "no such model folder"),
        ("nowhere:model", "no plugin answers the scheme 'nowhere'"),
    ],
)
def test_a_wrong_name_is_one_clear_line(name: str, message: str) -> None:
    with pytest.raises(FairleadError, match=message) as caught:
        load_tokenizer(name)
    assert "\n" not in str(caught.value)


def test_a_folder_without_a_config_is_no_model(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no config\.json"):
        load(tmp_path)


def test_a_broken_config_is_one_clear_line(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(FairleadError) as caught:
        load(tmp_path)
    assert "\n" not in str(caught.value)


def test_code_that_comes_with_a_model_is_never_run(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config", "AutoModelForCausalLM": "mine.Model"}}'
    )
    (tmp_path / "mine.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(FairleadError):
        load(tmp_path)
    assert not (tmp_path / "ran").exists()
