"""Packing: best-fit bins, positions and edges, and that unpack undoes pack for any shape, side and dtype."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import PackedBatch, best_fit, native, pack, segment_reduce, unpack, use_backend

BACKENDS = ["reference", *(["c"] if native.why_absent() is None else [])]


def slow_best_fit(lengths: list[int], budget: int) -> list[list[int]]:
    """The definition, bin by bin."""
    bins: list[list[int]] = []
    for i in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        room = [budget - sum(lengths[j] for j in members) - lengths[i] for members in bins]
        fits = [at for at, left in enumerate(room) if left >= 0]
        if fits:
            bins[min(fits, key=lambda at: (room[at], at))].append(i)
        else:
            bins.append([i])
    return bins


def test_known_bins() -> None:
    assert best_fit([4, 7, 1, 5, 3], token_budget=8) == [[1, 2], [3, 4], [0]]
    assert best_fit(torch.tensor([2, 2, 2]), token_budget=4) == [[0, 1], [2]]
    assert best_fit([9, 1], token_budget=4, allow_oversize=True) == [[0], [1]]
    assert best_fit([], token_budget=4) == []


@given(lengths=st.lists(st.integers(1, 20), max_size=40), budget=st.integers(20, 60))
def test_bins_are_those_of_the_definition(lengths: list[int], budget: int) -> None:
    bins = best_fit(lengths, budget)
    assert bins == slow_best_fit(lengths, budget)
    assert sorted(i for members in bins for i in members) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in members) <= budget for members in bins)


@pytest.mark.parametrize(
    ("lengths", "budget", "text"),
    [
        ([3, 9], 8, "a sequence of 9 tokens is above the token_budget of 8"),
        ([3, 0], 8, "number 1 is 0"),
        ([3, 2.5], 8, "number 1 is 2.5"),
        ([3], 0, "token_budget"),
    ],
)
def test_what_cannot_be_packed_is_refused(lengths: Any, budget: int, text: str) -> None:
    with pytest.raises(ValueError, match=text):
        best_fit(lengths, budget)


def test_a_list_of_sequences_becomes_one_row_with_restarting_positions() -> None:
    batch = pack(
        [[5, 6, 7], torch.tensor([8], dtype=torch.int32), [9, 9]], seg_to_group=[0, 0, 1], response_start=[1, 1, 0]
    )
    assert batch.input_ids.tolist() == [5, 6, 7, 8, 9, 9]
    assert batch.position_ids.tolist() == [0, 1, 2, 0, 0, 1]
    assert batch.cu_seqlens.tolist() == [0, 3, 4, 6] and batch.cu_seqlens.dtype == torch.int32
    assert (len(batch), batch.max_length, batch.lengths.tolist()) == (3, 3, [3, 1, 2])
    assert batch.seg_to_group is not None and batch.seg_to_group.dtype == torch.int32
    assert unpack(batch.input_ids, batch, fill=-1).tolist() == [[5, 6, 7], [8, -1, -1], [9, 9, -1]]
    assert unpack(batch.input_ids, batch, fill=-1, left=True, width=4)[1].tolist() == [-1, -1, -1, 8]
    assert segment_reduce(batch.input_ids.float(), batch.cu_seqlens, "last").tolist() == [7, 8, 9]
    assert batch.to("cpu").input_ids.tolist() == batch.input_ids.tolist()


@given(
    lengths=st.lists(st.integers(0, 5), max_size=5),
    room=st.integers(0, 3),
    tail=st.lists(st.integers(1, 3), max_size=2),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int64, torch.uint8, torch.bool]),
    left=st.booleans(),
    backend=st.sampled_from(BACKENDS),
)
def test_unpack_undoes_pack(
    lengths: list[int], room: int, tail: list[int], dtype: torch.dtype, left: bool, backend: str
) -> None:
    width = max(lengths, default=0) + room
    padded = torch.randint(1, 99, (len(lengths), width, *tail), generator=torch.Generator().manual_seed(0)).to(dtype)
    for row, length in zip(padded, lengths, strict=True):
        row[: width - length] = row[: width - length] if not left else 0
        row[length:] = row[length:] if left else 0
    with use_backend(backend):
        batch = pack(padded, lengths, left=left)
        assert torch.equal(unpack(batch.input_ids, batch, width=width, left=left), padded)
    assert batch.input_ids.shape == (sum(lengths), *tail)
    assert batch.position_ids.tolist() == [t for length in lengths for t in range(length)]


def test_gradients_go_to_the_tokens_and_not_to_the_padding() -> None:
    padded = torch.randn(2, 3, 2, requires_grad=True)
    pack(padded, [1, 3], left=True).input_ids.sum().backward()
    assert padded.grad is not None
    assert padded.grad[:, :, 0].tolist() == [[0, 0, 1], [1, 1, 1]]
    rows = torch.randn(4, requires_grad=True)
    unpack(rows, torch.tensor([0, 1, 4]), width=5).sum().backward()
    assert rows.grad is not None and rows.grad.tolist() == [1, 1, 1, 1]


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: pack([[1], []]), "number 1 is empty"),
        (lambda: pack([[1], [1.5]]), "integer"),
        (lambda: pack(["ab"]), "sequences: lists of integers"),
        (lambda: pack([[1]], [1]), "lengths: only for a padded tensor"),
        (lambda: pack(torch.ones(2, 3)), "lengths: a padded tensor needs"),
        (lambda: pack(torch.ones(2, 3), [1, 4]), "lengths: in [0, 3] are needed, not 4"),
        (lambda: pack(torch.ones(2, 3), [-1, 3]), "not -1"),
        (lambda: pack([[1], [2]], seg_to_group=[0]), "seg_to_group: integers [2]"),
        (lambda: pack([[1], [2]], response_start=[0, 2]), "response_start: at most"),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 2])), "from 0 to 3 is needed"),
        (lambda: unpack(torch.ones(3), torch.tensor([0, 3]), width=2), "at least the longest sequence, 3"),
    ],
)
def test_wrong_input_is_refused_in_one_line(call: Any, text: str) -> None:
    with pytest.raises((ValueError, TypeError), match=re.escape(text)):
        call()


def test_a_batch_is_not_changed_by_accident() -> None:
    batch = pack([[1, 2]])
    with pytest.raises(AttributeError):
        batch.max_length = 7  # type: ignore[misc]
    assert isinstance(batch, PackedBatch)
