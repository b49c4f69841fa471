"""Fisher diagonals and gradient norms against loops of per-sample autograd, on any way a layer may be used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from fairlead.curvature import fisher, gradient_norms
from fairlead.errors import InputError

VOCABULARY = 40


def llama(tied: bool = False) -> Any:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, attention_bias=True, tie_word_embeddings=tied, initializer_range=0.3, pad_token_id=0,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()



def gpt2() -> Any:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_positions=16, initializer_range=0.3, bos_token_id=1,
        eos_token_id=2, tie_word_embeddings=True,
    )  # fmt: skip
    return GPT2LMHeadModel(config).eval()


def batch(rows: int = 3) -> dict[str, torch.Tensor]:
    ids = torch.randint(1, VOCABULARY, (rows, 7), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    mask[1, 5:], mask[2, :2] = 0, 0
    ids[mask == 0] = 0
    return {"input_ids": ids, "attention_mask": mask}


def nll(model: Any, row: dict[str, torch.Tensor]) -> torch.Tensor:
    logits = model(**row).logits[0, :-1]
    labels = row["input_ids"][0, 1:].clone()
    labels[(row["attention_mask"][0, 1:] * row["attention_mask"][0, :-1]) == 0] = -100
    return nn.functional.cross_entropy(logits, labels, ignore_index=-100, reduction="sum")


def loop(model: Any, data: dict[str, torch.Tensor], names: list[str], loss: Callable[..., torch.Tensor] = nll) -> list[dict[str, torch.Tensor]]:
    """Gradients of every sample by themselves."""
    parameters = dict(model.named_parameters(remove_duplicate=False))
    found = []
    for i in range(len(data["input_ids"])):
        model.zero_grad()
        loss(model, {k: v[i : i + 1] for k, v in data.items()}).backward()
        found.append({n: parameters[n].grad.clone() for n in names})
    model.zero_grad()
    return found


def assert_is_the_loop(model: Any, data: dict[str, torch.Tensor], diagonal: dict[str, torch.Tensor]) -> None:
    single = loop(model, data, list(diagonal))
    for name, value in diagonal.items():
        expected = torch.stack([g[name] for g in single]).square().mean(0)
        torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-5 * float(expected.max()), msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("make", [llama, lambda: llama(tied=True), gpt2], ids=["llama", "tied head", "Conv1D"])
def test_the_empirical_diagonal_is_the_loop_of_per_sample_gradients(make: Callable[[], Any]) -> None:
    model, data = make(), batch()
    found = fisher(model, [data])
    assert found.samples == 3
    assert any(name.endswith(".bias") for name in found.diagonal)
    assert any("head" in name for name in found.diagonal)
    assert_is_the_loop(model, data, found.diagonal)


def test_several_batches_are_one(  # the mean is over samples, not over batches
) -> None:
    model, data = llama(), batch()
    parts = [{k: v[:1] for k, v in data.items()}, {k: v[1:] for k, v in data.items()}]
    whole, split = fisher(model, [data]), fisher(model, parts)
    for name, value in whole.diagonal.items():
        torch.testing.assert_close(split.diagonal[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_whose_hooks_run_twice_changes_nothing(reentrant: bool) -> None:
    model, data = llama(tied=True), batch()
    plain = fisher(model, [data]).diagonal
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    checkpointed = fisher(model, [data]).diagonal
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6 * float(value.max()))


def test_gradient_norms_are_those_of_the_loop() -> None:
    model, data = llama(), batch()
    names = list(fisher(model, [data]).diagonal)
    single = loop(model, data, names)
    expected = torch.stack([torch.stack([g.square().sum() for g in grads.values()]).sum().sqrt() for grads in single])
    torch.testing.assert_close(gradient_norms(model, [data]), expected, rtol=1e-4, atol=1e-4)


def test_the_trace_is_the_mean_of_the_squared_norms() -> None:
    model, data = llama(), batch()
    trace = sum(float(v.sum()) for v in fisher(model, [data]).diagonal.values())
    assert trace == pytest.approx(float(gradient_norms(model, [data]).square().mean()), rel=1e-4)


def test_lora_layers_and_the_frozen_weights_under_them_are_both_seen() -> None:
    peft = pytest.importorskip("peft", reason="pip install peft to test LoRA layers")
    data = batch()
    wrapped = peft.get_peft_model(llama(), peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)).eval()
    found = fisher(wrapped, [data], layers=r"layers\.0\.self_attn\.q_proj")
    assert sorted(n.rsplit("q_proj.", 1)[1] for n in found.diagonal) == [
        "base_layer.bias", "base_layer.weight", "lora_A.default.weight", "lora_B.default.weight",
    ]  # fmt: skip
    for parameter in wrapped.parameters():
        parameter.requires_grad_(True)
    assert_is_the_loop(wrapped, data, found.diagonal)


def test_a_layer_used_twice_adds_its_gradients_before_squaring() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(5, 5)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            return self.layer(torch.tanh(self.layer(input_ids)))

    torch.manual_seed(0)
    model, x = Twice(), torch.randn(4, 5)
    found = fisher(model, [{"input_ids": x}], loss=lambda out, _: out.square().sum(-1))
    single = loop(model, {"input_ids": x}, list(found.diagonal), lambda m, row: m(**row).square().sum())
    for name, value in found.diagonal.items():
        torch.testing.assert_close(value, torch.stack([g[name] for g in single]).square().mean(0), rtol=1e-4, atol=1e-6)


class Softmax(nn.Module):
    def __init__(self, classes: int = 4) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(6, classes)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(x)


def test_the_enumerated_fisher_of_a_softmax_head_is_its_closed_form() -> None:
    model, x = Softmax(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    p = model(x).softmax(-1).detach()
    expected = (p * (1 - p)).T @ x.square() / 9
    found = fisher(model, [{"x": x}], kind="enumerated")
    torch.testing.assert_close(found.diagonal["head.weight"], expected, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(found.diagonal["head.bias"], (p * (1 - p)).mean(0), rtol=1e-4, atol=1e-6)


def test_drawn_labels_converge_to_the_enumerated_fisher_at_the_rate_of_the_mean() -> None:
    model, x = Softmax(), torch.randn(9, 6, generator=torch.Generator().manual_seed(1))
    exact = fisher(model, [{"x": x}], kind="enumerated").diagonal["head.weight"]
    errors = {
        draws: float((fisher(model, [{"x": x}], kind="true", draws=draws, seed=3).diagonal["head.weight"] - exact).norm() / exact.norm())
        for draws in (4, 400)
    }
    assert errors[400] < 0.08
    assert errors[400] < errors[4]


def test_the_same_seed_draws_the_same_labels() -> None:
    model, data = llama(), batch()
    one, two, other = (fisher(model, [data], kind="true", seed=s, layers="lm_head").diagonal["lm_head.weight"] for s in (1, 1, 2))
    assert torch.equal(one, two)
    assert not torch.equal(one, other)


def test_near_a_perfect_fit_the_empirical_fisher_vanishes_and_the_true_one_does_not() -> None:
    model, x = Softmax(), torch.eye(6)[:4] * 3
    with torch.no_grad():
        model.head.weight.zero_()
        model.head.weight[:, :4] = torch.eye(4) * 3
        model.head.bias.zero_()
    data = {"x": x, "labels": torch.arange(4)}
    empirical = float(fisher(model, [data]).diagonal["head.weight"].sum())
    true = float(fisher(model, [data], kind="enumerated").diagonal["head.weight"].sum())
    assert empirical < true / 100


def test_the_token_fisher_is_another_quantity_and_says_so() -> None:
    model, data = llama(), batch()
    sequence, token = fisher(model, [data], layers="lm_head"), fisher(model, [data], kind="token", layers="lm_head")
    assert (sequence.kind, token.kind) == ("empirical", "token")
    difference = (sequence.diagonal["lm_head.weight"] - token.diagonal["lm_head.weight"]).norm()
    assert float(difference / sequence.diagonal["lm_head.weight"].norm()) > 0.05


def test_a_declared_mean_is_undone_and_an_undeclared_one_refused() -> None:
    model, x = Softmax(), torch.randn(5, 6)

    def each(out: torch.Tensor, _: Any) -> torch.Tensor:
        return out.square().sum(-1)

    def mean(out: torch.Tensor, _: Any) -> torch.Tensor:
        return each(out, _).mean()

    expected = fisher(model, [{"x": x}], loss=each).diagonal["head.weight"]
    found = fisher(model, [{"x": x}], loss=mean, reduction="mean").diagonal["head.weight"]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-6)
    with pytest.raises(InputError, match="reduction"):
        fisher(model, [{"x": x}], loss=mean)


def test_the_model_is_left_as_it_was() -> None:
    model, data = llama(), batch()
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = {n: (p.requires_grad, p.clone()) for n, p in model.named_parameters()}
    fisher(model, [data])
    assert all(m.training for m in model.modules())
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == before[name][0], name
        assert torch.equal(parameter, before[name][1]), name
        assert parameter.grad is None, name
    assert not any(m._forward_hooks for m in model.modules())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "exact"}, "kind"),
        ({"layers": "nothing_is_called_so"}, "no linear layer"),
        ({"layers": "("}, "regular expression"),
        ({"layers": ["model.layers.9.mlp"]}, "no linear layer of this model"),
        ({"draws": 0, "kind": "true"}, "draws"),
        ({"kind": "enumerated"}, "classifier"),
        ({"loss": lambda out, _: out.logits.sum(-1)}, "per sample"),
    ],
)
def test_bad_requests_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        fisher(llama(), [batch()], **options)


def test_no_batches_and_labels_of_another_shape_are_refused() -> None:
    with pytest.raises(InputError, match="batches"):
        fisher(llama(), [])
    with pytest.raises(InputError, match="labels"):
        fisher(llama(), [{**batch(), "labels": torch.zeros(3, 2, dtype=torch.int64)}])
