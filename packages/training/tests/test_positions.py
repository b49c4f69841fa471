"""Position ids of LOGO: what they cover, where they stand, and that a model is run with them under a causal mask."""

from __future__ import annotations

import copy
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fairlead.errors import InputError
from fairlead.testing import tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer, sequence_stats
from fairlead_training.positions import covering_starts, position_rows, prompt_positions

ROW = {
    "system_ids": [3, 4], "chunk_ids": [[5, 6, 7, 8], [9, 10, 11, 12], [13, 14, 15, 16]], "question_ids": [17, 18],
    "completion_ids": [[20, 21, 22], [23], [24, 25]], "role": [1, -1, -1],
}  # fmt: skip


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("width", "length", "starts"), [(120, 5, list(range(0, 120, 5))), (10, 4, [0, 3, 6]), (8, 4, [0, 4]), (7, 7, [0])]
)
def test_covering_starts_are_those_of_the_card(width: int, length: int, starts: list[int]) -> None:
    assert covering_starts(width, length) == starts


def test_covering_starts_cover_every_id_of_every_interval_and_no_other() -> None:
    for width in range(1, 65):
        for length in range(1, width + 1):
            starts = covering_starts(width, length)
            assert {i for s in starts for i in range(s, s + length)} == set(range(width)), (width, length)
            assert len(starts) == math.ceil(width / length) == len(set(starts))


layouts = st.fixed_dictionaries({
    "chunk_lens": st.lists(st.integers(1, 9), min_size=1, max_size=6), "system_len": st.integers(0, 5), "question_len": st.integers(0, 5),
    "answer_lens": st.lists(st.integers(1, 6), min_size=1, max_size=4), "separator": st.booleans(),
})  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(layouts, st.sampled_from(["grid", "cumulative", "sparse"]), st.integers(0, 50), st.integers(0, 9))
def test_ids_increase_stay_in_the_window_and_keep_chunks_whole(
    layout: dict[str, Any], mode: Any, slack: int, seed: int
) -> None:
    lens, extra = layout["chunk_lens"], int(layout["separator"])
    tail = layout["question_len"] + max(layout["answer_lens"])
    window = layout["system_len"] + len(lens) * (max(lens) + extra) + tail + slack
    ids = prompt_positions(target_len=window, mode=mode, generator=rng(seed), **layout)
    assert (
        ids.dtype == torch.int64
        and len(ids) == layout["system_len"] + sum(lens) + extra * len(lens) + layout["question_len"]
    )
    assert (ids.diff() > 0).all() and ids[0] >= 0 and ids[-1] < window - max(layout["answer_lens"])
    assert ids[: layout["system_len"]].tolist() == list(range(layout["system_len"]))
    if layout["question_len"]:
        assert ids[-layout["question_len"] :].tolist() == list(
            range(window - tail, window - max(layout["answer_lens"]))
        )
    begin, interval = layout["system_len"], (window - layout["system_len"] - tail) // len(lens)
    for j, length in enumerate(lens):
        piece = ids[begin : begin + length]
        if mode != "sparse":
            assert (piece.diff() == 1).all()
        if mode != "cumulative":
            assert piece[0] >= layout["system_len"] + j * interval
            if extra:
                assert ids[begin + length] == layout["system_len"] + (j + 1) * interval - 1
        begin += length + extra


def test_grid_visits_all_of_the_window_and_cumulative_leaves_its_end() -> None:
    seen = {}
    for mode in ("grid", "cumulative"):
        g = rng()
        drawn = [
            prompt_positions([512] * 16, target_len=65536, question_len=16, generator=g, mode=mode) for _ in range(200)
        ]
        seen[mode] = torch.cat(drawn).unique()
    assert len(seen["grid"]) / 65536 > 0.985
    assert len(seen["cumulative"]) / 65536 < 0.8 and int(seen["cumulative"][seen["cumulative"] < 65000].max()) < 55000


def test_a_sparse_chunk_visits_the_share_that_chance_gives() -> None:
    g = rng()
    drawn = [prompt_positions([512], target_len=4096, generator=g, mode="sparse") for _ in range(20)]
    assert len(torch.cat(drawn).unique()) / 4096 == pytest.approx(1 - (1 - 512 / 4096) ** 20, abs=3 * 0.0035)


def test_the_gaps_of_cumulative_add_up_and_those_of_all_chunks_differ() -> None:
    ids = prompt_positions([2] * 4, target_len=1000, generator=rng(1), mode="cumulative")
    gaps = (ids.diff()[1::2] - 1).tolist()
    assert len(set(gaps)) == 3 and max(gaps) <= (1000 - 8) // 4


@pytest.mark.parametrize("mode", ["grid", "cumulative"])
@pytest.mark.parametrize("separator", [False, True])
def test_a_window_of_the_real_length_gives_the_default_ids(mode: Any, separator: bool) -> None:
    window = 2 + 3 * (4 + separator) + 2 + 3
    ids = prompt_positions(
        [4] * 3,
        target_len=window,
        generator=rng(),
        mode=mode,
        system_len=2,
        question_len=2,
        answer_lens=[3, 1],
        separator=separator,
    )
    assert ids.tolist() == list(range(window - 3))
    model = copy.deepcopy(tiny_model()).double()
    (row,) = position_rows(
        [ROW], target_len=window, generator=rng(), mode=mode, sparse_share=0, separator_id=19 if separator else None
    )
    plain = {k: row[k] for k in ("prompt_ids", "completion_ids")}
    assert row["completion_position"] == len(row["prompt_ids"])
    assert torch.allclose(sequence_stats(model, [row]).logp, sequence_stats(model, [plain]).logp, atol=1e-6)


def test_rows_hold_the_separators_every_draw_and_their_other_columns() -> None:
    rows = position_rows(
        [{**ROW, "weight": [2.0, 1.0, 1.0]}], target_len=200, generator=rng(), samples_per_row=5, separator_id=19
    )
    assert len(rows) == 5 and len({tuple(r["prompt_position_ids"]) for r in rows}) == 5
    for row in rows:
        assert row["prompt_ids"] == [3, 4, 5, 6, 7, 8, 19, 9, 10, 11, 12, 19, 13, 14, 15, 16, 19, 17, 18]
        assert len(row["prompt_position_ids"]) == len(row["prompt_ids"])
        assert row["prompt_position_ids"][-2:] == [195, 196] and row["completion_position"] == 197
        assert set(row) == {
            "prompt_ids",
            "completion_ids",
            "role",
            "weight",
            "prompt_position_ids",
            "completion_position",
        }
    again = position_rows(
        [{**ROW, "weight": [2.0, 1.0, 1.0]}], target_len=200, generator=rng(), samples_per_row=5, separator_id=19
    )
    assert again == rows


def test_one_draw_in_ten_is_sparse() -> None:
    def broken(share: float) -> int:
        rows = position_rows([ROW], target_len=900, generator=rng(), samples_per_row=400, sparse_share=share)
        ids = torch.tensor([r["prompt_position_ids"] for r in rows])
        return int((ids[:, 2:6].diff(dim=1) != 1).any(1).sum())

    assert broken(0) == 0 and broken(1) > 390
    assert broken(0.1) == pytest.approx(40, abs=3 * 6)


@pytest.mark.parametrize("packed", [True, False])
def test_a_score_depends_on_the_ids_on_every_chunk_and_on_no_later_token(packed: bool) -> None:
    model = copy.deepcopy(tiny_model()).double()
    (row,) = position_rows([ROW], target_len=400, generator=rng(), sparse_share=0)
    assert int(torch.tensor(row["prompt_position_ids"]).diff().max()) > 1

    def logp(completion: list[int], **changed: Any) -> torch.Tensor:
        one = {**row, "completion_ids": [completion], "role": [1], **changed}
        found = sequence_stats(model, [one], packed=packed, tokens=True).extra["token_logp"][0]
        return found.detach()

    base = logp([20, 21])
    assert float((base - logp([20, 21], prompt_position_ids=None, completion_position=None)).abs().min()) > 1e-4
    for place in (0, 2, 6, 10, 14):  # the system, each chunk, the question
        ids = list(row["prompt_ids"])
        ids[place] = 40
        assert float((base - logp([20, 21], prompt_ids=ids)).abs().min()) > 1e-7, place
    assert torch.allclose(base[:1], logp([20, 22])[:1], atol=1e-12) and torch.allclose(base[:1], logp([20]), atol=1e-12)
    together = sequence_stats(model, [row], packed=packed).logp
    alone = [float(logp(answer).sum()) for answer in row["completion_ids"]]
    assert together.tolist() == pytest.approx(alone, abs=1e-9)


@pytest.mark.parametrize("scrambled", [False, True])
def test_the_causal_mask_follows_the_order_of_tokens_not_their_ids(scrambled: bool) -> None:
    model = copy.deepcopy(tiny_model()).double()
    positions = prompt_positions([4] * 3, target_len=300, generator=rng(), question_len=2)
    if scrambled:
        positions = positions[torch.randperm(len(positions), generator=rng(1))]
    ids = torch.arange(5, 5 + len(positions))

    def logits(ids: torch.Tensor, positions: torch.Tensor = positions) -> torch.Tensor:
        given = {"input_ids": ids[None], "position_ids": positions[None], "attention_mask": torch.ones_like(ids)[None]}
        with torch.no_grad():
            return model(**given, use_cache=False).logits[0]

    base = logits(ids)
    assert float((base - logits(ids, torch.arange(len(ids))))[-1].abs().max()) > 1e-4
    for t in range(len(ids)):
        other = ids.clone()
        other[t] = 40
        moved = (logits(other) - base).abs().amax(-1)
        assert float(moved[:t].sum()) == 0 and float(moved[t]) > 1e-7 and float(moved[-1]) > 1e-7


def test_a_constant_added_to_all_ids_changes_nothing() -> None:
    model = tiny_model()
    (row,) = position_rows([ROW], target_len=200, generator=rng())
    moved = {
        **row,
        "prompt_position_ids": [i + 100 for i in row["prompt_position_ids"]],
        "completion_position": row["completion_position"] + 100,
    }
    with torch.no_grad():
        assert torch.allclose(sequence_stats(model, [row]).logp, sequence_stats(model, [moved]).logp, atol=1e-4)


@pytest.mark.parametrize("pack", [True, False])
def test_rows_train_with_logo_and_their_ids_reach_the_model(pack: bool, tmp_path: Path) -> None:
    rows = position_rows([ROW] * 2, target_len=300, generator=rng(), samples_per_row=2)
    model = copy.deepcopy(tiny_model())
    seen: list[torch.Tensor] = []
    masks: list[Any] = []

    def note(_: Any, __: Any, given: dict[str, Any]) -> None:
        seen.append(given["position_ids"].flatten())
        masks.append(given.get("attention_mask"))

    config = PreferenceConfig(
        output_dir=str(tmp_path), per_device_train_batch_size=2, max_steps=2, logging_steps=1, report_to=[], use_cpu=True, disable_tqdm=True,
        save_strategy="no", pack=pack,
    )  # fmt: skip
    run = PreferenceTrainer(model, "logo", config, rows, objective_settings={"beta": 2.5, "gamma": 0.25})
    model.model.register_forward_pre_hook(note, with_kwargs=True)
    run.train()
    losses = [entry["loss"] for entry in run.state.log_history if "loss" in entry]
    assert len(losses) == 2 and all(math.isfinite(x) for x in losses)
    copies = 1 if pack else 3
    wanted = sorted(i for row in rows for i in row["prompt_position_ids"] * copies + [297, 298, 299, 297, 297, 298])
    assert sorted(torch.cat(seen).tolist()) == pytest.approx(
        sorted([*wanted, *[0] * (len(torch.cat(seen)) - len(wanted))])
    )
    assert pack or all(mask is not None and mask.dim() == 2 for mask in masks)


def test_what_does_not_fit_is_refused_in_a_line() -> None:
    def draw(lens: list[int], **given: Any) -> None:
        prompt_positions(lens, **{"target_len": 100, "generator": rng(), **given})

    with pytest.raises(InputError, match="one chunk or more is needed"):
        draw([])
    with pytest.raises(InputError, match="one chunk or more is needed"):
        draw([3, 0])
    with pytest.raises(InputError, match="106 tokens do not fit into 100 ids"):
        draw([30, 30, 30], system_len=4, question_len=5, answer_lens=[7, 2])
    with pytest.raises(InputError, match="a chunk of 40 tokens is longer than its interval of 33 ids"):
        draw([40, 10, 10])
    with pytest.raises(InputError, match="a chunk of 11 tokens is longer than its interval of 10 ids"):
        draw([10] * 9 + [9], separator=True, target_len=109)
    draw([40, 10, 10], mode="cumulative")
    with pytest.raises(InputError, match="grid, cumulative, sparse, got 'dense'"):
        draw([3], mode="dense")
    with pytest.raises(InputError, match="0 or more each"):
        draw([3], question_len=-1)
    with pytest.raises(InputError, match="interval of 4 ids"):
        covering_starts(4, 5)
    with pytest.raises(InputError, match="row 1: target_len"):
        position_rows([ROW, {**ROW, "question_ids": [1] * 200}], target_len=60, generator=rng())
    with pytest.raises(InputError, match="row 0: chunk_ids is missing"):
        position_rows([{"completion_ids": [[1], [2]]}], target_len=60, generator=rng())
    with pytest.raises(InputError, match="samples_per_row"):
        position_rows([ROW], target_len=60, generator=rng(), samples_per_row=0)
    with pytest.raises(InputError, match="sparse_share"):
        position_rows([ROW], target_len=60, generator=rng(), sparse_share=1.5)
