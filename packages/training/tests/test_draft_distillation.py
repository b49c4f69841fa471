"""Distillation of a draft: tiles against dense losses, stored targets, the data set, training, and acceptance."""

from __future__ import annotations

import copy
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import TrainingArguments

from fairlead import registry
from fairlead.errors import InputError
from fairlead.generation import generate
from fairlead.testing import tiny_model
from fairlead_training.draft_distillation import (
    acceptance,
    distill,
    distillation_loss,
    expected_tokens,
    make_distillation_set,
    path_tokens,
    shared_vocabulary,
    top_k_targets,
)
from fairlead_training.objectives.chunked_distillation import BINS, FromHead, TopK, chunked_distillation
from fairlead_training.objectives.distillation import DISTILLATION, tvd

KINDS = tuple(BINS)
ROWS = [{"prompt_ids": [3 + i, 5, 7], "completion_ids": [[10 + i, 11, 12, 20 + i][: 2 + i % 3]]} for i in range(8)]


def states(seed: int = 0, shape: tuple[int, ...] = (3, 5), width: int = 4, vocabulary: int = 9, dtype: torch.dtype = torch.float64) -> Any:
    """(hidden, weight, bias) of a draft, (hidden, weight, bias) of a wider target."""
    g = torch.Generator().manual_seed(seed)
    return [
        [torch.randn(*s, generator=g, dtype=torch.float64).to(dtype) for s in ((*shape, d), (vocabulary, d), (vocabulary,))]
        for d in (width, width + 3)
    ]


def logits(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.linear(hidden, weight, bias)


def both(kind: str, draft: Any, target: Any, mask: Any, chunk: int, reduction: str, temperature: float) -> list[tuple[torch.Tensor, ...]]:
    """Value and gradients of the tiles and of the dense loss."""
    found = []
    for tiled in (True, False):
        leaves = [x.clone().requires_grad_(True) for x in draft]
        if tiled:
            made = chunked_distillation(
                leaves[0], (leaves[1], leaves[2]), FromHead(target[0], (target[1], target[2])), mask, loss=kind, chunk=chunk,  # type: ignore[arg-type]
                reduction=reduction, temperature=temperature,  # type: ignore[arg-type]
            ).loss  # fmt: skip
        else:
            made = DISTILLATION[kind](logits(*leaves), logits(*target), mask, reduction=reduction, temperature=temperature)
        made.backward()
        found.append((made.detach(), *(x.grad for x in leaves)))
    return found  # type: ignore[return-value]


@pytest.mark.parametrize(("kind", "chunk"), [*itertools.product(KINDS, (1, 7, 64))])
def test_tiles_give_the_dense_loss_and_its_gradients(kind: str, chunk: int) -> None:
    draft, target = states()
    mask = torch.tensor([[1, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    for reduction, temperature in (("token_mean", 1.0), ("sequence_mean", 0.7)):
        tiled, dense = both(kind, draft, target, mask, chunk, reduction, temperature)
        for mine, theirs in zip(tiled, dense, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-12, atol=1e-13)
        assert not bool(tiled[1][~mask].any())


@settings(max_examples=25, deadline=None)
@given(st.sampled_from(KINDS), st.integers(0, 1000), st.integers(1, 9), st.integers(2, 6), st.floats(0.3, 3))
def test_tiles_equal_the_dense_loss_for_any_shape(kind: str, seed: int, chunk: int, vocabulary: int, temperature: float) -> None:
    draft, target = states(seed, shape=(2, 1 + seed % 4), vocabulary=vocabulary)
    tiled, dense = both(kind, draft, target, None, chunk, "token_mean", temperature)
    for mine, theirs in zip(tiled, dense, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "tvdpp"])  # a surrogate's value means nothing
def test_gradients_of_the_tiles_pass_gradcheck(kind: str) -> None:
    draft, target = states(shape=(2, 2), vocabulary=5)
    mask = torch.tensor([[True, True], [True, False]])

    def loss(hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor) -> torch.Tensor:
        return chunked_distillation(hidden, (weight, bias), FromHead(target[0], (target[1], target[2])), mask, loss=kind, beta=0.3, chunk=2, temperature=0.8).loss  # type: ignore[arg-type]

    assert torch.autograd.gradcheck(loss, [x.requires_grad_(True) for x in draft])


def test_padding_does_not_change_the_loss_and_measures_are_those_of_the_unmasked_tokens() -> None:
    draft, target = states()
    mask = torch.tensor([[1, 1, 0, 1, 0], [1, 0, 0, 0, 0], [1, 1, 1, 1, 1]]).bool()
    found = chunked_distillation(draft[0], tuple(draft[1:]), FromHead(target[0], tuple(target[1:])), mask, chunk=4)
    wider = [torch.cat([x[0], 99 * torch.ones(3, 2, x[0].shape[-1], dtype=torch.float64)], 1) for x in (draft, target)]
    padded = chunked_distillation(
        wider[0], tuple(draft[1:]), FromHead(wider[1], tuple(target[1:])), torch.cat([mask, torch.zeros(3, 2, dtype=torch.bool)], 1)
    )
    torch.testing.assert_close(found.loss, padded.loss)
    p, q = logits(*draft).softmax(-1), logits(*target).softmax(-1)
    torch.testing.assert_close(found.acceptance, torch.minimum(p, q).sum(-1) * mask)
    torch.testing.assert_close(found.loss, 1 - found.acceptance[mask].mean())
    assert found.ahead == pytest.approx(float((q > p)[mask].double().mean()))


def test_exact_tvdpp_is_tvd_over_sigma_so_signs_of_the_gradient_agree() -> None:
    draft, target = states(seed=5)
    (_, *scaled), (_, *plain) = (both(k, draft, target, None, 4, "token_mean", 1.0)[0] for k in ("tvdpp", "tvd"))
    r = (logits(*target).log_softmax(-1) > logits(*draft).log_softmax(-1)).double()
    for a, b in zip(scaled, plain, strict=True):
        torch.testing.assert_close(a, b / r.std(correction=0))
        assert torch.equal(a.sign(), b.sign())
    same = chunked_distillation(draft[0].requires_grad_(True), tuple(draft[1:]), FromHead(draft[0], tuple(draft[1:])), loss="tvdpp")
    same.loss.backward()
    assert not bool(draft[0].grad.any()) and float(same.loss.detach()) == 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_half_precision_states_are_summed_in_float32(dtype: torch.dtype) -> None:
    draft, target = states(dtype=dtype)
    exact = tvd(logits(*(x.double() for x in draft)), logits(*(x.double() for x in target)))
    draft[1].requires_grad_(True)
    found = chunked_distillation(draft[0], tuple(draft[1:]), FromHead(target[0], tuple(target[1:])), chunk=4)
    found.loss.backward()
    assert found.loss.dtype == torch.float32 and draft[1].grad.dtype == dtype
    assert float(found.loss.detach()) == pytest.approx(float(exact.detach()), abs=1e-6 if dtype == torch.float32 else 5e-3)


def test_without_a_counted_position_the_loss_is_zero_with_a_warning() -> None:
    draft, target = states()
    draft[0].requires_grad_(True)
    with pytest.warns(UserWarning, match="no position"):
        chunked_distillation(draft[0], tuple(draft[1:]), FromHead(target[0], tuple(target[1:])), torch.zeros(3, 5)).loss.backward()
    assert not bool(draft[0].grad.any())


# -- stored targets


def stored(target: Any, k: int, temperature: float = 1.0) -> tuple[TopK, torch.Tensor]:
    law = (logits(*target) / temperature).log_softmax(-1)
    logp, ids = law.topk(k, -1)
    return TopK(ids, logp, temperature), law


def test_a_stored_target_with_all_tokens_is_the_whole_target() -> None:
    draft, target = states()
    for kind in KINDS:
        top, _ = stored(target, 9)
        leaves = [[x.clone().requires_grad_(True) for x in draft] for _ in range(2)]
        chunked_distillation(leaves[0][0], tuple(leaves[0][1:]), top, loss=kind, chunk=4).loss.backward()  # type: ignore[arg-type]
        chunked_distillation(leaves[1][0], tuple(leaves[1][1:]), FromHead(target[0], tuple(target[1:])), loss=kind).loss.backward()  # type: ignore[arg-type]
        for a, b in zip(*leaves, strict=True):
            torch.testing.assert_close(a.grad, b.grad, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("k", [1, 3, 6])
def test_one_bin_for_the_missing_mass_bounds_the_tvd_from_below_and_dropping_it_is_worse(k: int) -> None:
    draft, target = states(seed=3)
    top, law = stored(target, k)
    whole = chunked_distillation(draft[0], tuple(draft[1:]), FromHead(target[0], tuple(target[1:])))
    binned = chunked_distillation(draft[0], tuple(draft[1:]), top)
    p, q = logits(*draft).softmax(-1), law.exp()
    kept = torch.zeros_like(p).scatter(-1, top.ids, 1.0).bool()
    by_hand = 0.5 * (((p - q).abs() * kept).sum(-1) + ((p - q) * ~kept).sum(-1).abs())
    torch.testing.assert_close(1 - binned.acceptance, by_hand)
    assert bool((binned.acceptance >= whole.acceptance - 1e-12).all())
    dropped = 0.5 * ((p - q).abs() * kept).sum(-1)
    assert bool((dropped <= by_hand + 1e-12).all()) and float((by_hand - dropped).max()) > 0.01
    one_sign = (((q >= p) | kept).all(-1)) | (((q <= p) | kept).all(-1))
    torch.testing.assert_close(binned.acceptance[one_sign], whole.acceptance[one_sign])


@pytest.mark.parametrize("kind", [k for k in KINDS if k != "tvdpp"])
def test_gradients_through_the_bin_pass_gradcheck(kind: str) -> None:
    draft, target = states(shape=(2, 2), vocabulary=6)
    top, _ = stored(target, 3, 0.8)
    assert torch.autograd.gradcheck(
        lambda h, w, b: chunked_distillation(h, (w, b), top, loss=kind, beta=0.3, chunk=3, temperature=0.8).loss,  # type: ignore[arg-type]
        [x.requires_grad_(True) for x in draft],
    )


def test_rows_with_top_k_targets_train_as_the_target_itself() -> None:
    draft, target = tiny_model(seed=1), tiny_model(seed=2)
    rows = top_k_targets(target, ROWS, 63, batch_size=3)
    assert rows[2]["top_ids"].shape == (4, 63) and rows[2]["completion_ids"] == ROWS[2]["completion_ids"]
    found, _ = distillation_loss(draft, None, rows)
    whole, _ = distillation_loss(draft, target, ROWS)
    assert found.loss.item() == pytest.approx(whole.loss.item(), abs=1e-4)


# -- models


def dense_loss(draft: Any, target: Any, kind: str) -> torch.Tensor:
    """From whole logits, one row at a time."""
    parts = []
    for row in ROWS:
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][0]])
        parts.append([m(input_ids=ids).logits[0, 2:-1] for m in (draft, target)])
    return DISTILLATION[kind](torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts]))


@pytest.mark.parametrize("kind", KINDS)
def test_the_loss_of_a_batch_of_rows_is_that_of_the_logits_that_predict_answer_tokens(kind: str) -> None:
    target = tiny_model(seed=2)
    grads = []
    for fused in (True, False):
        draft = copy.deepcopy(tiny_model(seed=1))
        value = distillation_loss(draft, target, ROWS, loss=kind, chunk=5)[0].loss if fused else dense_loss(draft, target, kind)
        value.backward()
        grads.append([value.detach(), *(p.grad for p in draft.parameters())])
    for mine, theirs in zip(*grads, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=2e-4, atol=1e-5)
    assert all(p.grad is None for p in target.parameters())


def test_logits_of_all_tokens_never_exist_together() -> None:
    draft, target = states(shape=(1, 400), vocabulary=50)
    largest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            nonlocal largest
            out = func(*args, **(kwargs or {}))
            for x in out if isinstance(out, (tuple, list)) else [out]:
                if isinstance(x, torch.Tensor):
                    largest = max(largest, x.numel())
            return out

    draft[1].requires_grad_(True)
    with Watch():
        chunked_distillation(draft[0], tuple(draft[1:]), FromHead(target[0], tuple(target[1:])), chunk=8).loss.backward()
    assert largest <= 400 * 7  # the hidden states of the target; logits would be 400 x 50


def test_a_model_whose_logits_are_more_than_a_head_is_read_through_them(monkeypatch: pytest.MonkeyPatch) -> None:
    draft, target = tiny_model(seed=1), tiny_model(seed=2)
    fused, _ = distillation_loss(draft, target, ROWS, loss="gkd", temperature=0.7)
    monkeypatch.setattr("fairlead_training.draft_distillation.linear_head", lambda model: None)
    plain, _ = distillation_loss(draft, target, ROWS, loss="gkd", temperature=0.7)
    torch.testing.assert_close(plain.loss, fused.loss)
    torch.testing.assert_close(plain.acceptance, fused.acceptance)
    assert plain.ahead == pytest.approx(fused.ahead)


def arguments(folder: Path, **more: Any) -> TrainingArguments:
    chosen = {"max_steps": 24, "learning_rate": 1e-2, "per_device_train_batch_size": 8, "logging_steps": 6, "disable_tqdm": True, "save_strategy": "no"}
    return TrainingArguments(output_dir=str(folder), use_cpu=True, report_to=[], **{**chosen, **more})


@pytest.mark.parametrize("kind", ["tvd", "tvdpp", "fkl"])
def test_distillation_raises_the_acceptance_and_logs_it(tmp_path: Path, kind: str) -> None:
    draft, target = copy.deepcopy(tiny_model(seed=1)), tiny_model(seed=2)
    before = acceptance(draft, target, ROWS)
    trainer = distill(draft, target, ROWS, loss=kind, args=arguments(tmp_path))
    after = acceptance(draft, target, ROWS)
    assert after.shape == (8,) and float((after - before).mean()) > 0.1
    logged = [entry for entry in trainer.state.log_history if "acceptance" in entry]
    assert len(logged) == 4 and logged[-1]["acceptance"] > logged[0]["acceptance"] and 0 < logged[0]["target_ahead"] < 1
    assert not draft.training and all(p.grad is None for p in target.parameters())
    if kind == "tvd":
        held = [{**row, "completion_ids": [row["completion_ids"][0][:2]]} for row in ROWS]
        expected = 1 - float(acceptance(draft, target, held).mean())
        assert trainer.evaluate(held)["eval_loss"] == pytest.approx(expected, abs=1e-4)


def test_acceptance_is_one_minus_the_tvd_of_each_row(tmp_path: Path) -> None:
    draft, target = tiny_model(seed=1), tiny_model(seed=2)
    found = acceptance(draft, target, ROWS, batch_size=3, temperature=0.6)
    for row, value in zip(ROWS, found, strict=True):
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"][0]])
        expected = 1 - tvd(draft(input_ids=ids).logits[0, 2:-1], target(input_ids=ids).logits[0, 2:-1], temperature=0.6)
        assert float(value) == pytest.approx(expected.item(), abs=1e-5)
    torch.testing.assert_close(acceptance(draft, draft, ROWS), torch.ones(8, dtype=torch.float64), rtol=1e-5, atol=1e-5)


# -- the data set


def test_the_set_holds_the_targets_own_answers_once(tmp_path: Path) -> None:
    target = tiny_model(seed=2)
    prompts = [torch.tensor([3, 4, 5]), torch.tensor([7, 8])]
    rows = make_distillation_set(target, None, prompts, temperatures=(0.0, 1.0), top_p=None, n=3, max_new_tokens=6)
    greedy = generate(target, None, prompts, temperature=0.0, max_new_tokens=6)
    assert [r["completion_ids"][0] for r in rows if r["temperature"] == 0] == [g[0].ids.tolist() for g in greedy]  # three equal ones are one
    assert len([r for r in rows if r["temperature"] == 1]) == 6 and {tuple(r["prompt_ids"]) for r in rows} == {(3, 4, 5), (7, 8)}


def test_a_killed_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    target, path = tiny_model(seed=2), tmp_path / "set.jsonl"
    prompts = [torch.tensor([3 + i, 4]) for i in range(6)]
    options: dict[str, Any] = {"temperatures": (0.3, 1.0), "max_new_tokens": 5, "batch_size": 2}
    whole = make_distillation_set(target, None, prompts, path=path, **options)
    lines = path.read_text().splitlines(keepends=True)
    assert len(lines) == 1 + 6
    path.write_text("".join(lines[:4]) + lines[4][:9])  # killed within the fourth batch
    done: list[int] = []
    again = make_distillation_set(target, None, prompts, path=path, progress=lambda i, n: done.append(i), **options)
    assert again == whole == make_distillation_set(target, None, prompts, **options) and done == [4, 5, 6]
    assert [json.loads(line) for line in path.read_text().splitlines()[1:]] == [json.loads(line) for line in lines[1:]]
    with pytest.raises(InputError, match="another target"):
        make_distillation_set(tiny_model(seed=3), None, prompts, path=path, **options)
    with pytest.raises(InputError, match="other settings"):
        make_distillation_set(target, None, prompts, path=path, **{**options, "seed": 1})


# -- tokens a call

TARGET = torch.tensor([[0.6, 0.3, 0.1], [0.2, 0.5, 0.3], [0.1, 0.2, 0.7]], dtype=torch.float64)
DRAFT = torch.tensor([[0.4, 0.4, 0.2], [0.3, 0.4, 0.3], [0.3, 0.3, 0.4]], dtype=torch.float64)


def test_tokens_along_the_drafted_path_average_to_the_exact_block() -> None:
    # The chain of three states from state 2 with gamma 4: P(first i accepted) = .7, .54, .428, .3421.
    expected, chances = 0.0, torch.zeros(4, dtype=torch.float64)
    for path in itertools.product(range(3), repeat=4):
        places = list(itertools.pairwise((2, *path)))
        draft, target = (torch.stack([law[a, b] for a, b in places]).log() for law in (DRAFT, TARGET))
        chance = draft.sum().exp()
        expected += float(chance * path_tokens(draft, target))
        chances += chance * (target - draft).clamp(max=0).exp().cumprod(0)
    assert expected == pytest.approx(3.0101, abs=5e-5)
    assert chances.tolist() == pytest.approx([0.7, 0.54, 0.428, 0.3421], abs=5e-5)


def test_a_draft_equal_to_its_target_writes_gamma_plus_one_tokens() -> None:
    model = tiny_model(seed=2)
    found = expected_tokens(model, model, [torch.tensor([3, 4, 5]), torch.tensor([7, 8])], gamma=3)
    torch.testing.assert_close(found, torch.full((2,), 4.0, dtype=torch.float64), rtol=1e-4, atol=1e-4)


def test_expected_tokens_have_the_mean_of_the_first_steps_acceptance() -> None:
    draft, target, context = tiny_model(seed=1), tiny_model(seed=2), torch.tensor([3, 4, 5])
    p, q = (m(input_ids=context[None]).logits[0, -1].double().softmax(-1).detach() for m in (draft, target))
    found = expected_tokens(draft, target, [context] * 2000, gamma=1, batch_size=1000)
    off = float(found.mean()) - 1 - float(torch.minimum(p, q).sum())
    assert abs(off) < 4 * float(found.std()) / math.sqrt(2000)


def test_a_better_draft_writes_more_tokens_under_the_registered_decoder(tmp_path: Path) -> None:
    if not any(m.name == "speculative" for m in registry.methods("decoder")):
        pytest.skip("no decoder named speculative is registered")
    target, drafts = tiny_model(seed=2), [copy.deepcopy(tiny_model(seed=1)) for _ in range(2)]
    prompts = [torch.tensor([3 + i, 5, 7]) for i in range(8)]
    rows = make_distillation_set(target, None, prompts, temperatures=(1.0,), top_p=None, n=4, max_new_tokens=12)
    distill(drafts[1], target, rows, args=arguments(tmp_path, max_steps=40))
    tau = []
    for draft in drafts:
        decoder = registry.create("decoder", "speculative", draft=draft, gamma=3)
        tau.append(decoder.generate(target, None, prompts, max_new_tokens=12).figures["block_efficiency"])
    assert tau[1] > tau[0] + 0.2


# -- bad input


def test_bad_input_is_refused_in_one_line(tmp_path: Path) -> None:
    draft, target = states()
    head, known = tuple(draft[1:]), FromHead(target[0], tuple(target[1:]))
    top, _ = stored(target, 3)
    model, wide = tiny_model(seed=1), tiny_model(vocab_size=80, seed=2)
    calls: list[tuple[Any, str]] = [
        (lambda: chunked_distillation(draft[0], head, known, loss="tvdpp-sampled"), "must be one of"),  # type: ignore[arg-type]
        (lambda: chunked_distillation(draft[0], head, known, chunk=0), "chunk at least 1"),
        (lambda: chunked_distillation(draft[0], head, known, temperature=0), "temperature above 0"),
        (lambda: chunked_distillation(draft[0], head, known, torch.ones(3, 4)), "must agree"),
        (lambda: chunked_distillation(draft[0], head, known, reduction="none"), "token_mean or sequence_mean"),  # type: ignore[arg-type]
        (lambda: chunked_distillation(draft[0] * math.nan, head, known), "not finite"),
        (lambda: chunked_distillation(draft[0], head, FromHead(target[0], (target[1][:7], None))), "has 7 tokens"),
        (lambda: chunked_distillation(draft[0], head, top, temperature=2), "stored at temperature 1.0"),
        (lambda: top_k_targets(model, ROWS, 99), "between 1 and the vocabulary's 64"),
        (lambda: distill(model, wide, ROWS, args=arguments(tmp_path)), "vocabulary of 64, the target one of 80"),
        (lambda: distill(model, model, ROWS, loss="mse", args=arguments(tmp_path)), "must be one of"),
        (lambda: distill(model, model, [], args=arguments(tmp_path)), "none are given"),
        (lambda: distill(model, model, [{"prompt": "text"}], args=arguments(tmp_path)), "row 0: needs prompt_ids"),
        (lambda: distill(model, None, ROWS, args=arguments(tmp_path)), "top_k_targets"),
        (lambda: make_distillation_set(model, None, []), "prompts"),
        (lambda: expected_tokens(model, model, [torch.tensor([3])], gamma=0), "gamma"),
    ]
    for call, match in calls:
        with pytest.raises(InputError, match=match) as error:
            call()
        assert "\n" not in str(error.value)


class Words:
    """A tokenizer as far as its vocabulary goes."""

    def __init__(self, *words: str) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def get_vocab(self) -> dict[str, int]:
        return {word: i for i, word in enumerate(self.words)}


def test_heads_may_differ_by_padding_rows_that_the_tokenizer_shows() -> None:
    draft, target = tiny_model(vocab_size=64, seed=1), tiny_model(vocab_size=70, seed=2)
    assert shared_vocabulary(draft, target, Words("a", "b")) == 64
    with pytest.raises(InputError, match="give it, where only the padding"):
        shared_vocabulary(draft, target)
    with pytest.raises(InputError, match="it has 66 tokens"):
        shared_vocabulary(draft, target, Words(*map(str, range(66))))
    with pytest.raises(InputError, match="other tokens"):
        shared_vocabulary(draft, draft, Words("a"), Words("b"))
    found, _ = distillation_loss(draft, target, ROWS, width=64)
    cut = [torch.cat([m(input_ids=torch.tensor([r["prompt_ids"] + r["completion_ids"][0]])).logits[0, 2:-1, :64] for r in ROWS]) for m in (draft, target)]
    assert found.loss.item() == pytest.approx(tvd(*cut).item(), abs=1e-5)


def test_a_model_in_training_mode_accepts_all_that_it_would_write_itself() -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    noisy = GPT2LMHeadModel(GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, n_positions=32)).train()
    assert acceptance(noisy, noisy, ROWS).tolist() == pytest.approx([1.0] * len(ROWS), abs=1e-6)
    first, second = (top_k_targets(noisy, ROWS, 3) for _ in range(2))
    assert all(torch.equal(a["top_logp"], b["top_logp"]) for a, b in zip(first, second, strict=True))
    assert noisy.training


def test_stored_targets_of_two_kinds_are_refused(tmp_path: Any) -> None:
    target = tiny_model()
    rows = [*top_k_targets(target, ROWS[:4], 3), *top_k_targets(target, ROWS[4:], 3, temperature=0.7)]
    with pytest.raises(InputError, match=r"row 4: its stored target has 3 tokens at temperature 0.7; all must have 3"):
        distill(copy.deepcopy(target), None, rows, args=TrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to=[]))
