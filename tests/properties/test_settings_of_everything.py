"""Any setting of any registered method, from Python or from the command line, is taken or refused in one line."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead import registry
from fairlead.cli import parse_settings
from fairlead.errors import FairleadError

SECRET = int("5EC2E7C0FFEE1234", 16)  # not written as a number: hypothesis tries those that it finds in a file
JUNK = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)


def configurable() -> list[Any]:
    return [pytest.param(m, id=f"{m.kind}-{m.name}") for m in registry.methods() if m.config is not None]


def base(method: Any) -> dict[str, Any]:
    return {"vocab_size": 64, "key": SECRET} if method.kind == "watermark" else {}


@pytest.mark.parametrize("method", configurable())
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_any_value_of_any_setting_is_taken_or_refused(method: Any, data: st.DataObject) -> None:
    names = [*method.config.model_fields, "no_such_setting"]
    chosen = data.draw(st.dictionaries(st.sampled_from(names), JUNK, min_size=1, max_size=2))
    try:
        method.config(**{**base(method), **chosen})
    except FairleadError as error:
        text = str(error)
        assert text
        assert "\n" not in text
        assert str(SECRET) not in text
        assert f"{SECRET:x}" not in text


@given(st.lists(st.text(max_size=20), max_size=4))
@settings(deadline=None)
def test_any_words_after_set_are_settings_or_an_error_of_one_line(pairs: list[str]) -> None:
    try:
        assert isinstance(parse_settings(tuple(pairs)), dict)
    except FairleadError as error:
        assert "--set" in str(error)


@given(st.integers() | st.booleans() | st.floats(allow_nan=False, allow_infinity=False))
@settings(deadline=None)
def test_numbers_go_through_set_unharmed(value: float) -> None:
    assert parse_settings((f"a.b={value!r}",)) == {"a": {"b": value}} or "e" in repr(value)  # YAML reads 1e5 as text
