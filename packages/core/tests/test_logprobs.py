"""Log-probabilities of completions against the dense log-softmax, padding, gradients, models that cap their logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

from fairlead.errors import InputError
from fairlead.logprobs import completion_logprobs, linear_head, perplexity
from fairlead.packed import packed_attention, why_not_packable

SMALL = {"vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
         "num_key_value_heads": 2, "initializer_range": 0.3}  # fmt: skip


@pytest.fixture(scope="module")
def llama() -> Any:
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**SMALL)).eval()


@pytest.fixture(scope="module")
def gemma() -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0, attn_logit_softcapping=2.0, pad_token_id=0)
    return Gemma2ForCausalLM(config).eval()


def dense(model: Any, ids: list[int], temperature: float = 1.0) -> torch.Tensor:
    with torch.no_grad():
        logp = (model(torch.tensor([ids])).logits[0].float() / temperature).log_softmax(-1)
    return logp[:-1].gather(-1, torch.tensor(ids[1:])[:, None])[:, 0]


@pytest.fixture(scope="module")
def gemma_that_packs() -> Any:
    torch.manual_seed(0)
    config = Gemma2Config(**SMALL, head_dim=8, final_logit_softcapping=1.0, attn_logit_softcapping=None, pad_token_id=0)
    return Gemma2ForCausalLM(config).eval()


ROWS = [[5, 9, 3, 7, 1, 8], [4, 4, 2], [11, 12, 13, 14]]


def batch(side: str) -> tuple[torch.Tensor, torch.Tensor]:
    ids, mask = torch.zeros(3, 8, dtype=torch.int64), torch.zeros(3, 8, dtype=torch.int64)
    for i, row in enumerate(ROWS):
        place = slice(8 - len(row), 8) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = torch.tensor(row), 1
    return ids, mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", ["llama", "gemma"])
def test_they_equal_the_dense_log_softmax_on_either_side_of_padding(
    name: str, side: str, temperature: float, request: pytest.FixtureRequest
) -> None:
    model = request.getfixturevalue(name)
    ids, mask = batch(side)
    with torch.no_grad():
        found = completion_logprobs(model, ids, mask, temperature=temperature)
    for i, row in enumerate(ROWS):
        got = found.token_BT[i][found.mask_BT[i]]
        torch.testing.assert_close(got, dense(model, row, temperature), rtol=1e-4, atol=1e-5)
    assert found.count_B.tolist() == [5, 2, 3]
    assert bool((found.token_BT[~found.mask_BT] == 0).all())


def test_only_the_completion_is_scored(llama: Any) -> None:
    ids, mask = batch("right")
    wanted = torch.zeros_like(mask)
    wanted[0, 3:5], wanted[1, 0] = 1, 1
    found = completion_logprobs(llama, ids, mask, wanted)
    torch.testing.assert_close(found.token_BT[0, 3:5], dense(llama, ROWS[0])[2:4], rtol=1e-4, atol=1e-5)
    assert found.count_B.tolist() == [2, 0, 0], "a first token has no predecessor"
    assert found.mean_B[1] == 0
    assert bool(found.perplexity_B[1].isnan())


def test_gradients_are_those_of_the_dense_loss(llama: Any) -> None:
    ids, mask = batch("left")
    llama.zero_grad()
    completion_logprobs(llama, ids, mask).sum_B.sum().backward()
    mine = llama.lm_head.weight.grad.clone(), llama.model.layers[0].mlp.up_proj.weight.grad.clone()
    llama.zero_grad()
    total = torch.zeros(())
    for row in ROWS:
        logp = llama(torch.tensor([row])).logits[0].log_softmax(-1)
        total = total + logp[:-1].gather(-1, torch.tensor(row[1:])[:, None]).sum()
    total.backward()
    torch.testing.assert_close(mine[0], llama.lm_head.weight.grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(mine[1], llama.model.layers[0].mlp.up_proj.weight.grad, rtol=1e-3, atol=1e-4)
    llama.zero_grad()


def test_capped_logits_are_noticed(llama: Any, gemma: Any) -> None:
    assert linear_head(llama) is not None
    assert linear_head(gemma) is None


def test_capped_attention_keeps_a_model_from_packed_rows_and_capped_logits_do_not(gemma: Any, gemma_that_packs: Any) -> None:
    assert "softcap" in why_not_packable(gemma)
    assert why_not_packable(gemma_that_packs) == ""


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma_that_packs"])
def test_perplexity_is_that_of_the_scored_part(name: str, request: pytest.FixtureRequest) -> None:
    model = request.getfixturevalue(name)
    found = perplexity(model, [*ROWS, [3]], starts=[0, 1, 2, 0])
    expected = [dense(model, ROWS[0]), dense(model, ROWS[1]), dense(model, ROWS[2])[1:]]
    torch.testing.assert_close(found[:3], torch.stack([(-e.mean()).exp() for e in expected]), rtol=1e-4, atol=1e-4)
    assert bool(found[3].isnan())


def test_masks_that_do_not_fit_are_refused(llama: Any) -> None:
    ids, mask = batch("right")
    with pytest.raises(InputError, match="shape"):
        completion_logprobs(llama, ids, mask[:, 1:])
    with pytest.raises(InputError, match="padding"):
        completion_logprobs(llama, ids, mask, torch.ones_like(mask))


def test_a_head_is_tried_with_the_models_own_attention() -> None:
    model = LlamaForCausalLM(LlamaConfig(**SMALL)).eval()
    with packed_attention(model):  # plain inputs fail in here
        assert linear_head(model) is not None


@pytest.mark.parametrize("settings", [{"target_modules": ["q_proj", "lm_head"]}, {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]}])
def test_a_head_with_an_adapter_counts_in_full(settings: dict[str, Any]) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(LlamaForCausalLM(LlamaConfig(**SMALL)), LoraConfig(r=2, **settings)).eval()
    ids, mask = batch("right")
    completion_logprobs(model, ids, mask)  # before anything has moved
    with torch.no_grad():
        for name, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(len(name))))
    for _ in range(2):
        found = completion_logprobs(model, ids, mask)
        own = model(input_ids=ids, attention_mask=mask).logits.log_softmax(-1)[0, :-1].gather(-1, ids[0, 1:, None])[:, 0]
        kept = found.mask_BT[0, 1:]
        torch.testing.assert_close(found.token_BT[0, 1:][kept], own[kept], rtol=1e-4, atol=1e-4)
        assert "forward" not in model.get_base_model().lm_head.__dict__
        model.base_model.disable_adapter_layers()
