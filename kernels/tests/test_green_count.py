"""Oracles of green_count: a naive detector, the lists of watermark_bias, and the rules of what is scored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead_kernels import green_count, native, use_backend, watermark_bias

BACKENDS = ["reference"] + (["c"] if native.why_absent() is None else [])
SCHEMES = ("lefthash", "minhash", "selfhash")
KEY, VOCABULARY = 77, 40


def is_green(context: list[int], token: int, scheme: str) -> bool:
    row = torch.tensor([context], dtype=torch.int64).reshape(1, len(context))
    return bool(watermark_bias(torch.zeros(1, VOCABULARY), row, key=KEY, delta=1.0, scheme=scheme)[0, token])


def naive(ids: list[int], width: int, scheme: str, pad_left: bool, known: list[int]) -> list[int]:
    """Marks without dedup, one token at a time."""
    width -= scheme == "selfhash"
    line, marks = [-1] * width + known + ids, []
    line = line[len(line) - len(ids) - width :]
    for t, token in enumerate(ids):
        context = line[t : t + width]
        scored = token >= 0 and (pad_left or all(w >= 0 for w in context))
        marks.append(int(is_green(context, token, scheme)) if scored else -1)
    return marks


@given(data=st.data())
def test_counts_are_those_of_a_naive_detector(data: st.DataObject) -> None:
    scheme = data.draw(st.sampled_from(SCHEMES))
    width = data.draw(st.integers(1, 6))
    pad_left = data.draw(st.booleans())
    ids = st.lists(st.integers(-1, VOCABULARY - 1), min_size=12, max_size=12)
    rows = data.draw(st.lists(ids, min_size=1, max_size=3))
    known = data.draw(st.sampled_from([[], [3], [-1, 5, 9, 1, 2, 7, 8]]))
    lengths = torch.tensor([data.draw(st.integers(0, 12)) for _ in rows])
    context = torch.tensor([known] * len(rows), dtype=torch.int64).reshape(len(rows), -1) if known else None
    settings = {"key": KEY, "context_width": width, "scheme": scheme, "pad_left": pad_left, "context_BH": context}
    for backend in BACKENDS:
        with use_backend(backend):
            count, scored, marks = green_count(torch.tensor(rows), lengths, dedup="none", **settings)
            paired = green_count(torch.tensor(rows), lengths, dedup="pair", **settings)
        for row, line in enumerate(rows):
            right = naive(line[: int(lengths[row])], width, scheme, pad_left, known)
            assert marks[row].tolist() == right + [-1] * (12 - len(right))
            assert int(count[row]) == right.count(1) and int(scored[row]) == len(right) - right.count(-1)
        assert bool((paired[2] == marks)[paired[2] >= 0].all()) and bool((paired[1] <= scored).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("width", [1, 3])
def test_each_pair_is_scored_the_first_time_only(backend: str, width: int) -> None:
    ids = torch.randint(0, 4, (5, 80), generator=torch.Generator().manual_seed(0))
    with use_backend(backend):
        pairs, contexts = (green_count(ids, key=KEY, context_width=width, dedup=how)[2] for how in ("pair", "context"))
    for row, line in enumerate(ids.tolist()):
        for marks, size in ((pairs, width + 1), (contexts, width)):
            seen: set[tuple[int, ...]] = set()
            for t in range(width, 80):
                part = tuple(line[t - width : t - width + size])
                assert (int(marks[row, t]) >= 0) == (part not in seen)
                seen.add(part)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("scheme", ["minhash", "selfhash"])
def test_one_draw_is_one_piece_of_evidence_whatever_window_it_came_from(backend: str, scheme: str) -> None:
    ids = torch.randint(0, 5, (4, 200), generator=torch.Generator().manual_seed(1))
    with use_backend(backend):
        _, scored, _ = green_count(ids, key=KEY, context_width=4, scheme=scheme)
    draws = 5 * 5 + 5  # (selected context token, token), and for selfhash the token under the empty context
    assert int(scored.max()) <= draws


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("scheme", "columns"), [("lefthash", 1), ("lefthash", 4), ("minhash", 4), ("selfhash", 3)])
def test_text_under_a_hard_list_is_green_throughout(backend: str, scheme: str, columns: int) -> None:
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 500, (3, columns), generator=generator)
    for _ in range(60):
        logits = torch.randn(3, 500, generator=generator)
        biased = watermark_bias(logits, ids[:, -columns:], key=5, delta=math.inf, scheme=scheme)
        ids = torch.cat([ids, biased.argmax(1, keepdim=True)], 1)
    width = columns + (scheme == "selfhash")
    with use_backend(backend):
        count, scored, marks = green_count(ids, key=5, context_width=width, scheme=scheme)
        assert torch.equal(count, scored) and int(scored.min()) > 40 and bool((marks[:, :columns] == -1).all())
        count, scored, _ = green_count(ids, key=6, context_width=width, scheme=scheme)
        assert float(count.sum() / scored.sum()) < 0.45


@pytest.mark.parametrize("backend", BACKENDS)
def test_rows_are_scored_alike_alone_and_padded_on_either_side(backend: str) -> None:
    ids = torch.randint(0, 50, (1, 30), generator=torch.Generator().manual_seed(2))
    for scheme in SCHEMES:
        settings = {"key": KEY, "context_width": 3, "scheme": scheme}
        with use_backend(backend):
            alone = green_count(ids, **settings)
            right = green_count(torch.nn.functional.pad(ids, (0, 9), value=7), torch.tensor([30]), **settings)
            left = green_count(torch.nn.functional.pad(ids, (9, 0), value=-1), **settings)
        for padded in (right, left):
            assert int(padded[0]) == int(alone[0]) and int(padded[1]) == int(alone[1])
        assert torch.equal(right[2][:, :30], alone[2]) and torch.equal(left[2][:, 9:], alone[2])


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_known_context_continues_the_text(backend: str) -> None:
    ids = torch.randint(0, 50, (2, 40), generator=torch.Generator().manual_seed(4))
    for scheme in SCHEMES:
        settings = {"key": KEY, "context_width": 4, "scheme": scheme, "dedup": "none"}
        with use_backend(backend):
            whole = green_count(ids, **settings)[2]
            rest = green_count(ids[:, 10:], context_BH=ids[:, :10], **settings)[2]
        assert torch.equal(whole[:, 10:], rest)


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"ids_BT": torch.zeros(2, 5)}, TypeError, "ids_BT: integer ids"),
        (
            {"lengths_B": torch.zeros(3, dtype=torch.int64)},
            ValueError,
            r"lengths_B: integer \[2\] on cpu is needed, not int64 \[3\]",
        ),
        ({"context_BH": torch.zeros(1, 4, dtype=torch.int64)}, ValueError, "context_BH"),
        ({"gamma": 1.0}, ValueError, "gamma"),
        ({"scheme": "x"}, ValueError, "scheme: one of"),
        ({"dedup": "yes"}, ValueError, "dedup: one of pair, context, none is needed, not 'yes'"),
        (
            {"context_width": 0, "scheme": "selfhash"},
            ValueError,
            "context_width: 1 to 4096 is needed for selfhash, not 0",
        ),
        ({"key": -5}, ValueError, "key"),
    ],
)
def test_bad_input_is_refused_in_one_line(change: dict[str, Any], error: type[Exception], message: str) -> None:
    call = {"ids_BT": torch.zeros(2, 5, dtype=torch.int64), "key": 1, **change}
    with pytest.raises(error, match=message) as raised:
        green_count(**call)
    assert "\n" not in str(raised.value)
