"""Settings: one clear line for a bad value, no key in sight, whatever it is and wherever it lies."""

from __future__ import annotations

import json
import traceback
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field, field_validator

from fairlead.config import Configurable, MethodConfig
from fairlead.errors import ConfigError, InputError
from fairlead.keys import SecretKey

SECRET = 0xDEADBEEFCAFED00D
FORMS = (str(SECRET), f"{SECRET:x}", f"{SECRET:X}", str(SECRET - (1 << 64)))


class InnerConfig(MethodConfig):
    key: SecretKey = Field(repr=False)
    gamma: float = Field(0.5, gt=0, lt=1)


class OuterConfig(MethodConfig):
    n: int = Field(1, ge=1)
    key: SecretKey | None = Field(None, repr=False)
    keys: tuple[SecretKey, ...] | None = Field(None, repr=False)
    named: dict[str, SecretKey] = Field(default_factory=dict, repr=False)
    inner: InnerConfig | None = None
    either: InnerConfig | int | None = None
    anything: Any = None

    @field_validator("anything")
    @classmethod
    def _refuse_tensors(cls, value: Any) -> Any:
        if isinstance(value, (torch.Tensor, str, dict)):
            raise ValueError("must be\nsomething else")
        return value


class Outer(Configurable):
    Config = OuterConfig


BAD: list[dict[str, Any]] = [
    {"key": f"{SECRET}"},
    {"key": f"{SECRET:#x}"},
    {"key": f"{SECRET:x}"},
    {"key": [SECRET]},
    {"key": SECRET + (1 << 64)},
    {"keys": [SECRET, -1]},
    {"keys": [SECRET, "no such file"]},
    {"keys": SECRET},
    {"keys": {"key": SECRET}},
    {"named": {"a": SECRET, "b": 1.5}},
    {"named": [SECRET]},
    {"inner": {"key": SECRET, "gamma": 2}},
    {"inner": {"key": [SECRET]}},
    {"inner": {"key": SECRET, "gama": 0.2}},
    {"inner": [SECRET]},
    {"either": {"key": SECRET, "gamma": 7}},
    {"either": [{"key": SECRET}]},
    {"anything": {"name": "kgw", "key": SECRET}},
    {"anything": {"deep": [{"key": SECRET}]}},
    {"key": SECRET, "n": 0},
    {"kye": SECRET},
]


@pytest.mark.parametrize("settings", BAD, ids=[str(i) for i in range(len(BAD))])
def test_no_error_shows_a_key_also_in_its_traceback(settings: dict[str, Any]) -> None:
    with pytest.raises((ConfigError, InputError)) as error:
        Outer(**settings)
    lines = "".join(traceback.format_exception_only(error.value))
    chained = error.value.__context__ is None or error.value.__suppress_context__
    assert chained
    assert str(SECRET + (1 << 64)) not in lines
    assert not any(form in lines for form in FORMS), lines
    assert "\n" not in str(error.value)


def test_what_is_saved_shows_fingerprints_at_every_depth() -> None:
    built = Outer(key=SECRET, keys=(SECRET, 5), named={"a": SECRET}, inner={"key": SECRET}, anything=[{"name": "kgw", "key": SECRET}])
    public = built.config.public_dict()
    for shown in (json.dumps(public), built.config.model_dump_json(exclude={"anything"}), repr(built), repr(vars(built))):
        assert not any(form in shown for form in FORMS), shown
    for saved in (public["key"], public["keys"][0], public["named"]["a"], public["inner"]["key"], public["anything"][0]["key"]):
        assert saved == SecretKey(SECRET).fingerprint


@pytest.mark.parametrize("value", [torch.zeros(50, 50), "x" * 10_000, "two\nlines"])
def test_a_bad_value_of_any_size_is_one_short_line(value: Any) -> None:
    with pytest.raises(ConfigError) as error:
        Outer(anything=value)
    assert "\n" not in str(error.value)
    assert len(str(error.value)) < 300
    assert "anything: must be something else, got" in str(error.value)


def test_every_fault_is_told_at_once() -> None:
    with pytest.raises(ConfigError, match=r"Outer: n: .*got 0; unknown setting 'innr'; did you mean 'inner'\?"):
        Outer(n=0, innr=None)


def test_settings_given_by_place_are_refused_with_the_names() -> None:
    with pytest.raises(ConfigError, match=r"by name \(n, key, keys.*got a int"):
        Outer(3)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="not both"):
        Outer(OuterConfig(), n=2)
    with pytest.raises(ConfigError, match="must be a OuterConfig"):
        Outer(InnerConfig(key=1))


@given(st.one_of(st.integers(), st.floats(), st.text(max_size=20), st.none(), st.lists(st.integers(), max_size=3), st.binary(max_size=3)))
def test_any_value_is_taken_or_refused_as_a_config_error(value: Any) -> None:
    try:
        built = Outer(n=value)
    except ConfigError as error:
        assert "\n" not in str(error)
        assert str(error).startswith("Outer: n: ")
    else:
        assert built.config.n >= 1  # type: ignore[attr-defined]


@given(st.text(alphabet=st.characters(blacklist_categories=("Cs",)), max_size=30))
def test_any_text_as_a_key_is_taken_or_refused_in_one_line(text: str) -> None:
    try:
        SecretKey(text)
    except InputError as error:
        assert len(str(error).splitlines()) == 1


@given(st.binary(min_size=1, max_size=40))
def test_keys_of_any_bytes_are_whole_numbers_with_a_fingerprint_that_is_no_part_of_them(data: bytes) -> None:
    key = SecretKey(data)
    assert 0 <= key.reveal() < 1 << 64
    assert key == SecretKey(key.reveal())
    assert f"{key.reveal():016x}" not in repr(key)
    assert len({key, SecretKey(data)}) == 1


def test_a_dictionary_key_with_a_line_break_keeps_the_error_on_one_line() -> None:
    class Words(MethodConfig):
        weights: dict[str, float] = Field(default_factory=dict)

    with pytest.raises(ConfigError, match=r"Words: weights\.'\\n': should be a valid number, got None") as caught:
        Words(weights={"\n": None})
    assert "\n" not in str(caught.value)
