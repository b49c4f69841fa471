"""A key is seen nowhere: not in errors, not in nested settings, not in copies, pickles or processors."""

from __future__ import annotations

import copy
import json
import pickle
import traceback
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fairlead import registry
from fairlead.errors import FairleadError
from fairlead_watermark import KGW, AlignmentResampling, Gumbel, ModifiedGumbel

SECRET = 0x5EC2E7C0FFEE1234
FORMS = (str(SECRET), hex(SECRET)[2:], str(SECRET - (1 << 64)), repr(SECRET.to_bytes(8, "big"))[2:-1])
MARKS: dict[str, Callable[..., Any]] = {
    "lefthash": lambda **s: KGW(**s),
    "selfhash": lambda **s: KGW(scheme="selfhash", **s),
    "hf-selfhash": lambda **s: KGW(scheme="hf-selfhash", **s),
    "gumbel": lambda **s: Gumbel(**s),
    "modified-gumbel": lambda **s: ModifiedGumbel(**s),
}


def seen(text: str) -> bool:
    return any(form in text for form in FORMS)


def everything(value: Any, depth: int = 4) -> str:
    """repr of an object and of what its attributes hold, some levels down."""
    text = repr(value)
    if depth and hasattr(value, "__dict__"):
        text += "".join(everything(v, depth - 1) for v in vars(value).values())
    return text


@pytest.mark.parametrize("name", MARKS)
def test_marks_processors_and_samplers_do_not_show_their_key(name: str) -> None:
    mark = MARKS[name](vocab_size=64, key=SECRET)
    mark.processor()(torch.tensor([[1, 2, 3, 4]]), torch.zeros(1, 64))
    mark.detect(torch.arange(20)[None])
    for value in (mark, mark.config, mark.processor(), mark.sampler(), mark.profile()):
        assert not seen(everything(value))
    assert "key-" in json.dumps(mark.profile().settings)


@pytest.mark.parametrize("name", MARKS)
def test_copies_work_and_pickles_do_not(name: str) -> None:
    mark = MARKS[name](vocab_size=64, key=SECRET)
    ids = torch.arange(40)[None]
    for twin in (copy.copy(mark), copy.deepcopy(mark)):
        assert torch.equal(twin.detect(ids).p_value, mark.detect(ids).p_value)
        assert not seen(everything(twin))
    with pytest.raises(TypeError, match="SecretKey"):
        pickle.dumps(mark.config)


@pytest.mark.parametrize(
    "settings", [{"vocab_size": 1}, {"gamma": 3.0}, {"gama": 0.5}, {"scheme": "none"}, {"vocab_size": None}]
)
def test_errors_about_other_settings_do_not_show_the_key(settings: dict[str, Any]) -> None:
    for build in (
        lambda: KGW(**{"vocab_size": 64, "key": SECRET, **settings}),
        lambda: registry.create("watermark", "kgw", **{"vocab_size": 64, "key": SECRET, **settings}),
        lambda: AlignmentResampling(watermark={"name": "kgw", "vocab_size": 64, "key": SECRET, **settings}, reward=len),
        lambda: AlignmentResampling(watermark=[{"key": SECRET}], reward=len),
        lambda: KGW(vocab_size=64, key=-SECRET),
        lambda: KGW(vocab_size=64, key=SECRET << 8),
        lambda: KGW(vocab_size=64, key=float(SECRET)),
    ):
        with pytest.raises(FairleadError) as error:
            build()
        assert not seen(str(error.value))
        assert not seen("".join(traceback.format_exception_only(error.value)))


def test_saved_settings_of_resampling_name_its_parts_without_the_key() -> None:
    def reward(prompts: list[str], responses: list[str]) -> list[float]:
        return [0.0] * len(responses)

    decoder = AlignmentResampling(watermark=KGW(vocab_size=64, key=SECRET), reward=reward, n=2)
    saved = json.dumps(decoder.config.public_dict())
    assert not seen(saved)
    assert json.loads(saved)["watermark"]["name"] == "kgw"
    assert "reward" in json.loads(saved)["reward"]
    assert not seen(repr(decoder))
