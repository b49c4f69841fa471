"""Public functions given anything: they answer, or refuse in one line."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead_kernels import green_count, prf, watermark_bias

DTYPES = [
    torch.int64,
    torch.int32,
    torch.uint8,
    torch.bool,
    torch.float32,
    torch.bfloat16,
    torch.float64,
    torch.complex64,
]
TENSORS = st.builds(
    lambda shape, dtype, value: torch.full(shape, value).to(dtype),
    st.lists(st.integers(0, 4), max_size=3),
    st.sampled_from(DTYPES),
    st.sampled_from([0.0, 1.0, -1.0, 200.0, math.inf, math.nan]),
)
ANYTHING = st.one_of(
    TENSORS, st.none(), st.integers(-(2**65), 2**65), st.floats(), st.text(max_size=5), st.just([[1]]), st.booleans()
)
IDS = torch.tensor([[3, 4, 5], [5, -1, 4]])
CALLS: list[tuple[Any, dict[str, Any]]] = [
    (prf, {"context_BH": IDS, "tokens_BN": IDS, "key": 5, "function": "mix32"}),
    (
        watermark_bias,
        {"logits_BV": torch.zeros(2, 9), "context_BH": IDS, "key": 5, "gamma": 0.3, "delta": 1.0, "scheme": "minhash",
         "rows": torch.tensor([True, False]), "out": None},
    ),
    (
        green_count,
        {"ids_BT": IDS, "lengths_B": torch.tensor([3, 1]), "key": 5, "gamma": 0.3, "context_width": 2,
         "scheme": "selfhash", "dedup": "pair", "context_BH": IDS, "pad_left": True},
    ),
]  # fmt: skip


@settings(max_examples=400)
@given(call=st.sampled_from(CALLS), data=st.data())
def test_wrong_arguments_are_refused_in_one_line_and_right_ones_served(call: Any, data: st.DataObject) -> None:
    function, arguments = call
    wrong = data.draw(st.sets(st.sampled_from(sorted(arguments)), max_size=2))
    given = {name: data.draw(ANYTHING) if name in wrong else value for name, value in arguments.items()}
    try:
        function(**given)
    except (ValueError, TypeError) as error:
        assert wrong and "\n" not in str(error) and len(str(error)) < 200
        assert any(name in str(error) for name in wrong), (wrong, str(error))
