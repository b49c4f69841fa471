"""What the core's tests share: a tiny model with its tokenizer on disk, and a watermark to put on it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import Field

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.errors import InputError
from fairlead.keys import SecretKey
from fairlead.kinds import Detection, TokenSampler, Watermark
from fairlead.registry import Method
from fairlead.testing import save_tiny_model


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of 63 tokens whose logits are 64 wide, and a word tokenizer, saved as a user would have them."""
    folder = tmp_path_factory.mktemp("tiny")
    save_tiny_model(folder)
    return folder


class GreenConfig(MethodConfig):
    """Settings of the test's watermark."""

    vocab_size: int = Field(ge=2)
    key: SecretKey = Field(repr=False)
    delta: float = Field(4.0, ge=0)


class Green(Watermark):
    """Half the vocabulary, keyed by the last token, gets a bonus."""

    Config = GreenConfig
    config: GreenConfig
    name = "test-green"

    def processor(self, **options: Any) -> Any:
        raise NotImplementedError("the tests use the sampler")

    def sampler(self, **options: Any) -> TokenSampler:
        from fairlead.generation import PlainSampler
        from fairlead_kernels import watermark_bias

        draw = PlainSampler(**options)

        def sample(logits_BV: torch.Tensor, ids_BT: torch.Tensor, *, seeds_B: torch.Tensor, positions_B: torch.Tensor) -> torch.Tensor:
            marked = watermark_bias(logits_BV, ids_BT[:, -1:], key=self.config.key.reveal(), gamma=0.5, delta=self.config.delta)
            return draw(marked, ids_BT, seeds_B=seeds_B, positions_B=positions_B)

        return sample

    def detect(self, ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> Detection:
        from scipy.stats import binom

        from fairlead_kernels import green_count

        ids = torch.atleast_2d(ids)
        lengths = torch.full((len(ids),), ids.shape[1]) if attention_mask is None else attention_mask.sum(-1)
        if bool((ids >= self.config.vocab_size).any()):
            raise InputError("ids outside the vocabulary")
        count, scored, _ = green_count(ids, lengths, key=self.config.key.reveal(), gamma=0.5, context_width=1, scheme="lefthash")
        p_value = torch.from_numpy(binom.sf(count.numpy() - 1, scored.numpy(), 0.5)).double()
        return Detection(count.double(), torch.where(scored > 0, p_value, 1.0), scored)


@pytest.fixture()
def green() -> Iterator[str]:
    """The name under which the watermark is registered, for the length of a test."""
    registry.methods()
    registry.add(Method("test-green", "watermark", Green, package="tests"))
    yield "test-green"
    registry.default._methods.pop(("watermark", "test-green"))


@pytest.fixture()
def key_file(tmp_path: Path) -> Path:
    from fairlead.keys import new_key_file

    new_key_file(tmp_path / "my.key")
    return tmp_path / "my.key"
