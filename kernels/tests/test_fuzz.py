"""Public functions given anything: they answer, or refuse in one line."""

from __future__ import annotations

import math
from typing import Any

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead_kernels import (
    best_fit,
    fisher_diag_linear,
    grad_norm_linear,
    green_count,
    group_normalize,
    gumbel_sample,
    gumbel_score,
    gumbel_uniform,
    kron_sketch,
    linear_logprob,
    pack,
    prf,
    segment_reduce,
    selective_logprob,
    token_fisher_diag_linear,
    unpack,
    watermark_bias,
)

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
CUTS, ROWS, REWARDS = torch.tensor([0, 2, 4]), torch.ones(4, 3), torch.tensor([1.0, 2.0, 4.0, 4.0])
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
    (
        gumbel_sample,
        {"logits_BV": torch.zeros(2, 9), "context_BH": IDS, "key": 5, "temperature": 0.5, "top_k": 3, "top_p": 0.5,
         "min_p": 0.1, "rows": torch.tensor([True, False]), "return_logprob": True},
    ),
    (
        gumbel_sample,
        {"logits_BV": torch.zeros(2, 9), "seeds": IDS[:, 0], "positions": IDS[:, 1], "temperature": torch.ones(2)},
    ),
    (gumbel_uniform, {"context_BH": IDS, "vocab_size": 9, "key": 5}),
    (
        gumbel_score,
        {"ids_BT": IDS, "lengths_B": torch.tensor([3, 1]), "key": 5, "context_width": 2, "dedup": "pair",
         "context_BH": IDS, "pad_left": True},
    ),
    (selective_logprob, {"logits_NV": torch.zeros(3, 9), "ids_N": CUTS, "temperature": 1.0}),
    (
        linear_logprob,
        {"hidden_ND": torch.ones(3, 2), "weight_VD": torch.ones(9, 2), "target_N": CUTS, "bias": torch.zeros(9),
         "temperature": 0.5},
    ),
    (segment_reduce, {"values_ND": torch.ones(4), "offsets": CUTS, "op": "mean", "mean_of_empty": 0.0}),
    (group_normalize, {"rewards_N": REWARDS, "offsets": CUTS, "kind": "rloo", "eps": 1e-4, "nan": "drop"}),
    (best_fit, {"lengths": [3, 1, 2], "token_budget": 4, "allow_oversize": False}),
    (pack, {"sequences": torch.ones(2, 3), "lengths": [1, 3], "seg_to_group": [0, 1], "response_start": CUTS[:2]}),
    (unpack, {"values_N": torch.ones(4), "batch": CUTS, "fill": 0}),
    (fisher_diag_linear, {"activations_BTI": ROWS, "output_grads_BTO": ROWS, "cu_seqlens": CUTS}),
    (token_fisher_diag_linear, {"activations_BTI": ROWS, "output_grads_BTO": ROWS, "mask_BT": ROWS[:, 0] > 0}),
    (grad_norm_linear, {"activations_BTI": ROWS, "output_grads_BTO": ROWS, "cu_seqlens": CUTS, "method": "ghost"}),
    (kron_sketch, {"activations_BTI": ROWS, "output_grads_BTO": ROWS, "seed": 3, "layer": 1, "size": (2, 3)}),
]  # fmt: skip


@settings(max_examples=500)
@given(call=st.sampled_from(CALLS), data=st.data())
def test_wrong_arguments_are_refused_in_one_line_and_right_ones_served(call: Any, data: st.DataObject) -> None:
    function, arguments = call
    wrong = data.draw(st.sets(st.sampled_from(sorted(arguments)), max_size=2))
    given = {name: data.draw(ANYTHING) if name in wrong else value for name, value in arguments.items()}
    try:
        function(**given)
    except (ValueError, TypeError) as error:
        assert wrong and "\n" not in str(error) and len(str(error)) < 200
        assert any(name in str(error) for name in arguments), (wrong, str(error))  # of two that differ, either
