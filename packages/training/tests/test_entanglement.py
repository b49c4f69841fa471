"""Gradient entanglement: its numbers by hand, its inner products by autograd, its monitor and its remedies in training."""

from __future__ import annotations

import copy
import json
import logging
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead import registry
from fairlead.errors import InputError
from fairlead.testing import tiny_model
from fairlead_training import PreferenceConfig, PreferenceTrainer, sequence_stats
from fairlead_training.entanglement import MEANING, Coupling, EntanglementMonitor, entanglement, state_of
from fairlead_training.pair_gradients import Probe, head_gram, selected, token_cosines, token_gradients
from fairlead_training.pair_weights import NormalizedPairs, balanced, sparse_rows, sparse_weights

PAIRS = [
    {"prompt_ids": [3 + i, 5, 7], "completion_ids": [[10 + i, 11, 12], [20 + i, 11]], "role": [1, -1]} for i in range(4)
]


def referenced(model: Any, rows: Any = PAIRS, shift: float = 1.0) -> list[dict[str, Any]]:
    """The rows with a reference that differs from the model's log-probabilities by pair."""
    with torch.no_grad():
        logp = sequence_stats(model, rows).logp.tolist()
    return [{**row, "ref_logp": [logp[2 * i] - shift * i, logp[2 * i + 1] + shift]} for i, row in enumerate(rows)]


def double() -> Any:
    return copy.deepcopy(tiny_model()).double()


def exact() -> Any:
    """A tiny GPT-2 in float64 throughout: Llama's norms fall back to float32."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(vocab_size=64, n_positions=32, n_embd=16, n_layer=2, n_head=2, tie_word_embeddings=False, initializer_range=0.2)
    return GPT2LMHeadModel(config).double().eval()


def gradients(model: Any, row: dict[str, Any], names: Any = None) -> list[list[torch.Tensor]]:
    """g of each completion of a row, by plain autograd on dense logits."""
    found = []
    parameters = [p for n, p in model.named_parameters() if names is None or n in names]
    for answer in row["completion_ids"]:
        ids = torch.tensor([row["prompt_ids"] + answer])
        table = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
        start = len(row["prompt_ids"])
        total = sum(table[0, t - 1, ids[0, t]] for t in range(start, ids.shape[1]))
        found.append(list(torch.autograd.grad(total, parameters)))
    return found


def inner(a: list[torch.Tensor], b: list[torch.Tensor]) -> float:
    return float(sum((x * y).sum() for x, y in zip(a, b, strict=True)))


# -- the numbers ----------------------------------------------------------------------------------------------------------


def test_a_softmax_of_three_answers_is_disentangled_until_tokens_are_shared() -> None:
    logits = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64).log().requires_grad_(True)
    g_w, g_l = (torch.autograd.grad(logits.log_softmax(0)[k], logits)[0] for k in (0, 1))
    dot, square_w, square_l = float(g_w @ g_l), float(g_w @ g_w), float(g_l @ g_l)
    assert (dot, square_w, square_l) == pytest.approx((-0.42, 0.38, 0.78))
    expected = {0: -1.105, 1: -0.053, 2: 0.298, 4: 0.579, 16: 0.876}
    for t, ratio in expected.items():
        shared = 0.38 * t
        found = Coupling(dot + shared, math.sqrt(square_w + shared), math.sqrt(square_l + shared))
        assert found.ratio_min == pytest.approx(ratio, abs=5e-4)


@pytest.mark.parametrize(
    ("d_w", "d_l", "ds_w", "ds_l", "state"),
    [
        (1, 1, -0.5, -2.5, "both falling"), (0.1, 0.2, -0.20, -0.65, "both falling"), (0.2, 0.1, 0.05, -0.10, "apart"),
        (2, 1, 0.5, -1.0, "apart"), (0.15, 0.05, 0.075, 0.025, "both rising"), (-1, -1, 0.5, 2.5, "both rising"),
    ],
)  # fmt: skip
def test_each_objective_of_the_card_moves_the_pair_as_computed_by_hand(d_w: float, d_l: float, ds_w: float, ds_l: float, state: str) -> None:
    found = Coupling(1.5, 1.0, 2.0, d_w, d_l)
    assert (found.ds_w, found.ds_l) == pytest.approx((ds_w, ds_l))
    assert state_of(found.ds_w, found.ds_l) == state
    assert found.inside_band == (state == "apart")
    assert (found.cos, *found.band) == pytest.approx((0.75, 1.5, 8 / 3))


def test_balanced_weights_move_that_pair_apart() -> None:
    d_w, d_l = balanced(torch.ones(1), torch.ones(1), 1.0, 2.0)
    found = Coupling(1.5, 1.0, 2.0, float(d_w), float(d_l))
    assert found.r == pytest.approx(2.0) and float(d_w * d_l) == pytest.approx(1.0)
    scale = found.ds_w / 0.25  # the step g_w/|g_w| - g_l/|g_l| gives +0.25 and -0.5
    assert scale > 0 and found.ds_l == pytest.approx(-0.5 * scale)


numbers = st.floats(-3, 3, allow_nan=False)
vectors = st.lists(numbers, min_size=3, max_size=3).filter(lambda v: sum(x * x for x in v) > 1e-6)
positive = st.floats(0.01, 10)


def coupling(a: list[float], b: list[float], d_w: float = 1.0, d_l: float = 1.0) -> Coupling:
    dot = sum(x * y for x, y in zip(a, b, strict=True))
    return Coupling(dot, math.hypot(*a), math.hypot(*b), d_w, d_l)


@given(vectors, vectors)
def test_equal_weights_widen_the_margin_and_every_case_is_one_of_three(a: list[float], b: list[float]) -> None:
    c = coupling(a, b)
    slack = 1e-9 * (c.norm_w + c.norm_l) ** 2
    assert c.ds_w - c.ds_l >= -slack
    assert c.dot <= max(c.norm_w, c.norm_l) ** 2 + slack  # above both norms is impossible
    w, l = c.norm_w**2, c.norm_l**2  # noqa: E741
    if min(abs(c.dot - w), abs(c.dot - l)) > slack:
        case = "apart" if c.dot < min(w, l) else "both falling" if w < c.dot else "both rising"
        assert state_of(c.ds_w, c.ds_l) == case


@given(vectors, vectors, positive, positive)
def test_the_band_says_what_the_prediction_says(a: list[float], b: list[float], d_w: float, d_l: float) -> None:
    c = coupling(a, b, d_w, d_l)
    slack = 1e-9 * (c.norm_w + c.norm_l) ** 2 * (d_w + d_l)
    if min(abs(c.ds_w), abs(c.ds_l)) > slack:
        assert c.inside_band == (c.ds_w >= 0 and c.ds_l <= 0)


@given(vectors, vectors, positive, positive)
def test_swapping_the_sides_swaps_the_changes_and_their_signs(a: list[float], b: list[float], d_w: float, d_l: float) -> None:
    c, swapped = coupling(a, b, d_w, d_l), coupling(b, a, d_l, d_w)
    assert (swapped.ds_w, swapped.ds_l) == pytest.approx((-c.ds_l, -c.ds_w), abs=1e-9)
    assert (swapped.ratio_min, swapped.cos) == pytest.approx((c.ratio_min, c.cos))
    assert c.ratio_min == pytest.approx(c.dot / min(c.norm_w**2, c.norm_l**2))  # the published script divides by the chosen norm


@given(vectors, vectors, positive)
def test_balanced_weights_never_move_a_pair_the_wrong_way(a: list[float], b: list[float], d: float) -> None:
    c = coupling(a, b)
    d_w, d_l = (float(x) for x in balanced(torch.tensor([d]).double(), torch.tensor([d]).double(), c.norm_w, c.norm_l))
    moved = coupling(a, b, d_w, d_l)
    slack = 1e-9 * d * (c.norm_w + c.norm_l) ** 2
    assert moved.ds_w >= -slack and moved.ds_l <= slack


def test_balanced_weights_are_the_old_ones_for_equal_norms_reversed_pairs_and_zero_gradients() -> None:
    d_w, d_l = torch.tensor([0.3, -0.1, 0.2]), torch.tensor([0.3, -0.1, 0.0])
    for new, old in zip(balanced(d_w, d_l, 2.0, 2.0), (d_w, d_l), strict=True):
        torch.testing.assert_close(new, old)
    new_w, new_l = balanced(d_w, d_l, 1.0, 4.0)
    assert new_w.tolist() == pytest.approx([0.6, -0.1, 0.2]) and new_l.tolist() == pytest.approx([0.15, -0.1, 0.0])
    assert balanced(d_w, d_l, 0.0, 4.0)[0] is d_w


def test_a_zero_gradient_is_degenerate_and_raises_nothing() -> None:
    found = Coupling(0.0, 0.0, 2.0)
    record = found.record()
    assert record["degenerate"] and math.isnan(record["cos"]) and math.isnan(record["ratio_min"])
    assert record["inside_band"] and record["predicted_ds_l"] == -4.0


# -- inner products -------------------------------------------------------------------------------------------------------


def test_the_gradient_of_dpo_is_the_weighted_difference() -> None:
    model = exact()
    (row,) = referenced(model, PAIRS[:1])
    batch = sequence_stats(model, [row])
    out = registry.create("objective", "dpo", beta=0.3)(batch)
    parameters = list(model.parameters())
    whole = torch.autograd.grad(out.loss, parameters)
    g_w, g_l = gradients(model, row)
    z = 0.3 * float((batch.logp - batch.ref_logp).detach() @ torch.tensor([1.0, -1.0]).double())
    d = 0.3 / (1 + math.exp(z))
    assert max(float((g + d * (a - b)).abs().max()) for g, a, b in zip(whole, g_w, g_l, strict=True)) < 1e-8
    found = entanglement(model, [row], registry.create("objective", "dpo", beta=0.3))
    assert (found.whole.d_w, found.whole.d_l) == pytest.approx((d, d))
    assert found.whole.dot == pytest.approx(inner(g_w, g_l)) and found.whole.norm_l**2 == pytest.approx(inner(g_l, g_l))


@pytest.mark.parametrize("packed", [True, False])
def test_pairs_batch_and_layers_are_those_of_dense_gradients(packed: bool) -> None:
    model = double()
    rows = [{**PAIRS[0], "completion_ids": PAIRS[0]["completion_ids"][::-1], "role": [-1, 1]}, *PAIRS[1:3]]
    found = Probe(model, rows, params="all", packed=packed).products()
    each = [gradients(model, row) if i else gradients(model, row)[::-1] for i, row in enumerate(rows)]
    for products, (g_w, g_l) in zip(found.pairs, each, strict=True):
        assert products == pytest.approx((inner(g_w, g_l), inner(g_w, g_w), inner(g_l, g_l)))
    mean_w, mean_l = ([sum(gs) / 3 for gs in zip(*(pair[k] for pair in each), strict=True)] for k in (0, 1))
    assert sum(p[0] for p in found.layers.values()) == pytest.approx(inner(mean_w, mean_l))
    names = [n for n, _ in model.named_parameters()]
    assert set(found.layers) == {"embeddings", "layer 0", "layer 1", "head", "other"}
    for layer, part in (("layer 1", "layers.1."), ("embeddings", "embed"), ("head", "lm_head")):
        own = [i for i, n in enumerate(names) if part in n]
        assert found.layers[layer][1] == pytest.approx(inner([mean_w[i] for i in own], [mean_w[i] for i in own]))


def test_the_head_without_a_backward_pass_equals_autograd() -> None:
    g = torch.Generator().manual_seed(0)
    hidden, weight = torch.randn(12, 8, generator=g).double(), torch.randn(50, 8, generator=g).double()
    bias, targets = torch.randn(50, generator=g).double().requires_grad_(True), torch.randint(0, 50, (12,), generator=g)
    weight.requires_grad_(True)
    logp = (hidden @ weight.T + bias).log_softmax(-1)[torch.arange(12), targets]
    parts = [torch.autograd.grad(logp[part].sum(), (weight, bias), retain_graph=True) for part in (slice(0, 5), slice(5, 12))]
    gram = head_gram(hidden, weight.detach(), targets, bias.detach())
    assert float(gram[:5, 5:].sum()) == pytest.approx(inner(list(parts[0]), list(parts[1])), abs=1e-10)
    plain = head_gram(hidden, weight.detach(), targets, bias.detach(), (True, False))
    assert float(plain[:5, :5].sum()) == pytest.approx(inner([parts[0][0]], [parts[0][0]]), abs=1e-10)


@pytest.mark.parametrize(("objective", "packed"), [("dpo", True), ("dpo", False), ("simpo", True), ("ld-dpo", True), ("wpo", True)])
def test_the_cheap_mode_gives_the_record_of_autograd_on_the_head(objective: str, packed: bool) -> None:
    model = double()
    rows = referenced(model)
    judge = registry.create("objective", objective)
    cheap, exact = (entanglement(model, Probe(model, rows, judge, params, packed=packed), judge) for params in ("head", "lm_head"))
    assert Probe(model, rows, judge, "head").by_head and not Probe(model, rows, judge, "lm_head").by_head
    first, second = cheap.record(0.1), exact.record(0.1)
    assert first.pop("layers")["head"] == pytest.approx(second.pop("layers")["head"], rel=1e-6)
    assert first == pytest.approx(second, rel=1e-6)


def test_the_vocabulary_in_chunks_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    model = double()
    whole = Probe(model, PAIRS, params="head").products().layers["head"]
    monkeypatch.setattr("fairlead_training.pair_gradients.VOCABULARY_CHUNK", 7)
    assert Probe(model, PAIRS, params="head").products().layers["head"] == pytest.approx(whole, rel=1e-10)


@pytest.mark.parametrize("objective", ["dpo", "simpo", "cpo", "slic"])
def test_a_plain_step_does_what_was_predicted_to_first_order(objective: str) -> None:
    start = exact()
    rows = referenced(start, PAIRS[:1])
    judge = registry.create("objective", objective)
    found = entanglement(start, rows, judge)
    errors = []
    for eta in (1e-5, 1e-6):
        model = copy.deepcopy(start)
        judge(sequence_stats(model, rows)).loss.backward()
        torch.optim.SGD(model.parameters(), lr=eta).step()
        with torch.no_grad():
            ds = (sequence_stats(model, rows).logp.tolist()[k] - s for k, s in enumerate((found.mean_w, found.mean_l)))
        errors.append(max(abs(a / eta - b) for a, b in zip(ds, (found.whole.ds_w, found.whole.ds_l), strict=True)))
    assert 5 < errors[0] / errors[1] < 20
    assert errors[1] < 0.05 * abs(found.whole.ds_w)


def test_a_completion_against_itself_is_wholly_entangled() -> None:
    row = {"prompt_ids": [1, 2], "completion_ids": [[3, 4], [3, 4]], "role": [1, -1], "ref_logp": [-1.0, -1.0]}
    found = entanglement(double(), [row]).whole
    assert (found.cos, found.ratio_min) == pytest.approx((1.0, 1.0))
    assert (found.ds_w, found.ds_l) == pytest.approx((0.0, 0.0), abs=1e-9)


def test_a_shared_continuation_entangles_and_the_first_tokens_do_not() -> None:
    found = [
        entanglement(double(), [{"prompt_ids": [1, 2], "completion_ids": [[3, *tail], [4, *tail]], "role": [1, -1]}], "simpo")
        for tail in ([], [5, 6, 7, 8])
    ]
    assert found[0].whole.cos < 0 < found[1].whole.cos


def test_looking_moves_neither_the_objective_nor_the_model() -> None:
    model, judge = double(), registry.create("objective", "bco")
    before = copy.deepcopy(judge.state_dict()), [p.clone() for p in model.parameters()]
    model.train()
    rows = referenced(model)
    entanglement(model, rows, judge)
    assert judge.state_dict() == before[0] and judge.training and model.training
    assert all(torch.equal(a, b) and b.grad is None for a, b in zip(before[1], model.parameters(), strict=True))


def test_token_gradients_add_up_and_equal_tokens_have_cosine_one() -> None:
    model = exact()
    found = token_gradients(model, [1, 2], [3, 4, 5], "all")
    row = {"prompt_ids": [1, 2], "completion_ids": [[3, 4, 5]]}
    (g,) = gradients(model, row)
    torch.testing.assert_close(found.sum(0), torch.cat([x.flatten() for x in g]))
    cosines = token_cosines(model, [1, 2], [3, 4, 5], [3, 9])
    assert cosines.shape == (3, 2)
    assert float(cosines[0, 0]) == pytest.approx(1.0) and float(cosines.abs().max()) <= 1 + 1e-9


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ("lora", "params: the parameters of 'lora' do not exist"), ("lm_head", "params: the parameters of 'lm_head' are frozen"),
        ("(", "params: '\\(' is no regular expression"), (lambda name, p: False, "params: the parameters of the function .* do not exist"),
    ],
)  # fmt: skip
def test_parameters_that_are_absent_or_frozen_are_refused(params: Any, message: str) -> None:
    model = double()
    model.lm_head.requires_grad_(False)
    with pytest.raises(ValueError, match=message):
        selected(model, params)
    assert issubclass(InputError, ValueError)


def test_rows_that_are_no_pairs_are_refused() -> None:
    with pytest.raises(InputError, match=r"row 0: one chosen and one rejected completion are compared, its roles are \[1\]"):
        entanglement(double(), [{"prompt_ids": [1], "completion_ids": [[2]], "role": [1]}], "simpo")
    with pytest.raises(InputError, match="rows: no pair"):
        entanglement(double(), [], "simpo")
    with pytest.raises(InputError, match="lacks ref_logp"):
        entanglement(double(), PAIRS, "dpo")


# -- in training ----------------------------------------------------------------------------------------------------------


def trainer(folder: Path, *callbacks: Any, objective: Any = "dpo", model: Any = None, **settings: Any) -> PreferenceTrainer:
    options = {k: settings.pop(k) for k in ("peft_config", "objective_settings") if k in settings}
    rows = settings.pop("rows", PAIRS)
    chosen = {
        "per_device_train_batch_size": 4, "max_steps": 4, "learning_rate": 1e-2, "logging_steps": 1, "report_to": [], "use_cpu": True,
        "disable_tqdm": True, "save_strategy": "no", "ref_cache_dir": str(folder / "cache"), "lr_scheduler_type": "constant",
        "optim": "sgd", "max_grad_norm": 0.0,
    }  # fmt: skip
    args = PreferenceConfig(output_dir=str(folder / "out"), **{**chosen, **settings})
    model = copy.deepcopy(tiny_model()) if model is None else model
    return PreferenceTrainer(model, objective, args, [dict(row) for row in rows], callbacks=list(callbacks), **options)


def weights(run: PreferenceTrainer) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in run.model.parameters()])


def lines(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "entanglement.jsonl").read_text().splitlines()]


def test_the_monitor_predicts_what_plain_steps_do_and_changes_nothing(tmp_path: Path) -> None:
    watched = trainer(tmp_path / "a", EntanglementMonitor(every=2, pairs=8, params="all"), learning_rate=1e-4)
    watched.train()
    plain = trainer(tmp_path / "b", learning_rate=1e-4)
    plain.train()
    assert torch.equal(weights(watched), weights(plain))
    found = lines(tmp_path / "a")
    assert [line["step"] for line in found] == [1, 3]
    for line in found:
        assert line["measured_ds_w"] == pytest.approx(line["predicted_ds_w"], rel=0.1, abs=3e-6)
        assert line["measured_ds_l"] == pytest.approx(line["predicted_ds_l"], rel=0.1, abs=3e-6)
        assert line["state"] in MEANING and line["pairs"] == 4 and line["seconds"] > 0
        assert {"dot", "norm_w", "norm_l", "cos", "ratio_min", "pair_ratio_min", "r", "band_low", "inside_band", "degenerate"} <= set(line)
        assert {"embeddings", "layer 0", "layer 1", "head"} <= set(line["layers"])
    logged = [entry for entry in watched.state.log_history if "entanglement/cos" in entry]
    assert [entry["step"] for entry in logged] == [1, 3]
    assert logged[0]["entanglement/measured_ds_w"] == found[0]["measured_ds_w"]


def test_a_resumed_training_goes_on_with_its_file(tmp_path: Path) -> None:
    saved = {"save_strategy": "steps", "save_steps": 2}
    trainer(tmp_path, EntanglementMonitor(every=1), **saved).train()
    whole = lines(tmp_path)
    path = tmp_path / "out" / "entanglement.jsonl"
    path.write_text("\n".join(json.dumps(line) for line in whole[:3]) + '\n{"step": 4, "do')
    import shutil

    shutil.rmtree(tmp_path / "out" / "checkpoint-4")
    trainer(tmp_path, EntanglementMonitor(every=1), **saved).train(resume_from_checkpoint=True)
    again = lines(tmp_path)
    assert [line["step"] for line in again] == [1, 2, 3, 4]
    assert [line["measured_ds_w"] for line in again] == [line["measured_ds_w"] for line in whole]
    trainer(tmp_path, EntanglementMonitor(every=3)).train()
    assert [line["step"] for line in lines(tmp_path)] == [1, 4]  # a training from the start starts its file


def test_the_monitor_watches_given_pairs_with_adapters_by_default(tmp_path: Path) -> None:
    from peft import LoraConfig

    lora = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    other = [{"prompt_ids": [40, 41], "completion_ids": [[42], [43, 44]], "role": [1, -1]}]
    monitor = EntanglementMonitor(other, every=3)
    run = trainer(tmp_path, monitor, peft_config=lora, precompute_ref_log_probs=False)
    run.train()
    assert monitor.probe is not None and all("lora_" in name for name in monitor.probe.parameters)
    first, last = lines(tmp_path)
    assert first["pairs"] == 1 and set(first["layers"]) == {"layer 0", "layer 1"}
    assert first["d_w"] == pytest.approx(0.05, abs=1e-6)  # the policy is its reference at the first step
    assert last["d_w"] != first["d_w"]


def test_a_change_of_direction_is_said_once_in_plain_words(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    monitor = EntanglementMonitor(every=1)
    run = trainer(tmp_path, monitor, max_steps=1)
    run.train()
    record = lines(tmp_path)[0]
    states = iter([("both falling", -1.0, -2.0), ("both falling", -1.0, -2.0), ("apart", 1.0, -1.0), ("both rising", 2.0, 1.0)])
    monitor.state = None
    with caplog.at_level(logging.WARNING, "fairlead"):
        for state, w, l in states:  # noqa: E741
            monitor._record = {**record, "state": state, "measured_ds_w": w, "measured_ds_l": l}
            monitor.on_step_end(run.args, run.state, run.control)
    said = [r.getMessage() for r in caplog.records if r.name == "fairlead"]
    assert [MEANING[s] in m for s, m in zip(("both falling", "apart", "both rising"), said, strict=True)] == [True] * 3
    assert "chosen falls with rejected" in said[0] and "(-1, -2)" in said[0]


def test_the_monitor_refuses_what_it_cannot_watch(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="every: must be at least 1, got 0"):
        EntanglementMonitor(every=0)
    run = trainer(tmp_path)
    run.add_callback(EntanglementMonitor())
    with pytest.raises(InputError, match=r"give it to PreferenceTrainer\(callbacks"):
        run.train()
    with pytest.raises(InputError, match="monitor_dataset: row 0 has no role"):
        trainer(tmp_path, EntanglementMonitor([{"prompt_ids": [1], "completion_ids": [[2], [3]]}]))


def test_normalised_pairs_step_along_the_difference_of_unit_gradients(tmp_path: Path) -> None:
    run = trainer(tmp_path, NormalizedPairs())
    model = copy.deepcopy(run.model)
    run.current_gradient_accumulation_steps = 1
    run.training_step(run.model, run.data_collator(run.train_dataset))
    each = [gradients(model, row) for row in PAIRS]
    g_w, g_l = ([sum(gs) / 4 for gs in zip(*(pair[k] for pair in each), strict=True)] for k in (0, 1))
    norm_w, norm_l = math.sqrt(inner(g_w, g_w)), math.sqrt(inner(g_l, g_l))
    step = 0.05 * math.sqrt(norm_w * norm_l)  # d = beta / 2 where the policy is its reference
    for p, a, b in zip(run.model.parameters(), g_w, g_l, strict=True):
        torch.testing.assert_close(p.grad, -step * (a / norm_w - b / norm_l), rtol=1e-4, atol=1e-6)


def test_running_norms_move_in_the_logarithm(tmp_path: Path) -> None:
    remedy = NormalizedPairs(smoothing=0.75)
    assert remedy._smoothed(1.0, 4.0) == pytest.approx((1.0, 4.0))
    assert remedy._smoothed(16.0, 4.0) == pytest.approx((2.0, 4.0))
    with pytest.raises(InputError, match="smoothing: must be at least 0 and below 1, got 1"):
        NormalizedPairs(smoothing=1)
    with pytest.raises(InputError, match="SFT does not compare pairs"):
        trainer(tmp_path, NormalizedPairs(), objective="sft")


def test_sparse_weights_keep_the_tokens_that_differ() -> None:
    rows = [{"prompt_ids": [1], "completion_ids": [[5, 6, 7, 8], [5, 9, 7, 8, 2]]}, {"prompt_ids": [1], "completion_ids": [[3], [4]]}]
    assert sparse_weights(rows).tolist() == [[0, 1, 0, 0, 0], [0, 1, 0, 0, 1], [1, 0, 0, 0, 0], [1, 0, 0, 0, 0]]
    with pytest.raises(InputError, match="row 0: 1 completions"):
        sparse_weights([{"prompt_ids": [1], "completion_ids": [[3]]}])


def test_leaving_out_equal_tokens_in_equal_contexts_keeps_the_margin() -> None:
    rows = [{"prompt_ids": [1, 2], "completion_ids": [[5, 6, 3], [5, 6, 4]], "role": [1, -1]}]
    probe = Probe(double(), rows, params="head")
    found = probe.products().stats
    plain, sparse = found.sum_S(), found.sum_S(sparse_weights(rows))
    assert float(plain[0] - plain[1]) == pytest.approx(float(sparse[0] - sparse[1]))
    assert float(sparse[0]) > float(plain[0])


def test_training_on_sparse_rows_leaves_the_shared_tokens_out(tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1, 2 + i], "completion_ids": [[5, 6, 3], [5, 9, 3, 4]], "role": [1, -1]} for i in range(4)]
    run = trainer(tmp_path, rows=sparse_rows(rows), max_steps=3)
    stats = run.statistics(run.model, run.train_dataset)
    tokens = sequence_stats(run.model, rows, tokens=True).extra["token_logp"]
    assert stats.logp.tolist() == pytest.approx((tokens * sparse_weights(rows)).sum(1).tolist(), abs=1e-5)
    assert stats.ref_logp is not None
    assert stats.ref_logp.tolist() == pytest.approx(stats.logp.tolist(), abs=1e-5)  # the reference leaves them out as well
    run.train()
    assert run.state.log_history[-2]["rewards/margins"] > 0
    plain = trainer(tmp_path, rows=rows, max_steps=1)  # another data set: its reference is not that of the sparse rows
    assert plain.train_dataset[0]["ref_logp"] != run.train_dataset[0]["ref_logp"]
    with pytest.raises(InputError, match="token_weights: every completion needs one weight for each of its tokens"):
        sequence_stats(run.model, [{**rows[0], "token_weights": [[1.0], [1.0] * 4]}])


@pytest.mark.parametrize(("batch", "accumulated", "expected"), [(1, 1, 1), (2, 1, 1), (2, 2, 2), (4, 16, 8)])
def test_a_monitor_looks_at_half_of_a_steps_pairs_and_at_most_eight(batch: int, accumulated: int, expected: int, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1, 2 + i], "completion_ids": [[5, 6, 3], [7, 9, 3]], "role": [1, -1]} for i in range(24)]
    monitor = EntanglementMonitor()
    trainer(tmp_path, monitor, rows=rows, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulated)
    assert len(monitor.rows) == expected


@pytest.mark.parametrize("params", ["head", "all"])
def test_the_monitor_sees_the_loss_of_sparse_rows(params: str, tmp_path: Path) -> None:
    rows = [{"prompt_ids": [1, 2 + i], "completion_ids": [[5, 6, 3], [5, 9, 3, 4]], "role": [1, -1]} for i in range(4)]
    run = trainer(tmp_path, EntanglementMonitor(every=1, pairs=4, params=params), rows=sparse_rows(rows), max_steps=1, learning_rate=0.0)
    run.train()
    (record,) = lines(tmp_path)
    assert record["measured_ds_w"] == pytest.approx(0, abs=1e-5) and record["measured_ds_l"] == pytest.approx(0, abs=1e-5)
    stats = sequence_stats(run.model, sparse_rows(rows))
    chosen = list(selected(run.model, params).values())
    grads = torch.autograd.grad(stats.logp[0::2].mean(), chosen)
    assert record["norm_w"] == pytest.approx(float(torch.cat([g.flatten() for g in grads]).norm()), rel=1e-3)


def watched(folder: Path, **settings: Any) -> None:
    """Two steps with monitor and remedy; leaves the record and the weights."""
    run = trainer(folder, EntanglementMonitor(every=1, params="all"), NormalizedPairs(), max_steps=2, **settings)
    run.train()
    if run.accelerator.is_main_process:
        torch.save(weights(run), folder / "weights.pt")


def test_two_processes_see_what_one_sees(tmp_path: Path, on_two_processes: Any) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    watched(one)
    on_two_processes('import test_entanglement as t\nt.watched(folder / "two", per_device_train_batch_size=2, ddp_backend="gloo")')
    assert torch.allclose(*(torch.load(folder / "weights.pt", weights_only=True) for folder in (one, two)), atol=2e-5)
    for first, second in zip(lines(one), lines(two), strict=True):
        for name in ("dot", "norm_w", "norm_l", "d_w", "d_l", "pair_ratio_min", "s_w", "measured_ds_w", "measured_ds_l"):
            assert first[name] == pytest.approx(second[name], rel=1e-3, abs=1e-5), name
