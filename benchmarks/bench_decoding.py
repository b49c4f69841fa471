"""Decoders against the same algorithms as loops of `model.generate`: shared prompts, batched roll-outs, packed rewards."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from harness import Row

from fairlead.scoring import RewardBatcher
from fairlead_decoding import BestOfN, DeAL, TransferQStar

N, PROMPT, NEW, VOCABULARY = 16, 512, 64, 8000
SMALL, SHORT, STEPS, WIDTH, K = 1000, 64, 16, 64, 10


def llama(vocabulary: int, width: int, layers: int, scale: float, labels: int = 0) -> Any:
    """A random Llama, or a classifier with `labels`; it has no end token, so every answer is as long as it may be."""
    from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocabulary, hidden_size=width, intermediate_size=4 * width, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=4, max_position_embeddings=1024, pad_token_id=0, bos_token_id=None, eos_token_id=None,
        **({"num_labels": labels} if labels else {}),
    )  # fmt: skip
    model = (LlamaForSequenceClassification if labels else LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        (model.score if labels else model.lm_head).weight.normal_(0, scale * width**-0.5)
    return model


@functools.lru_cache(maxsize=1)
def large() -> tuple[Any, Any, torch.Tensor]:
    """A model of four layers, a reward model of two, and a prompt."""
    prompt = torch.randint(1, VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(0))
    return llama(VOCABULARY, 256, 4, 3.0), llama(VOCABULARY, 128, 2, 1.0, labels=1), prompt


def packed_rewards(judge: Any) -> Callable[[Any, Any], Any]:
    batcher = RewardBatcher(judge, token_budget=PROMPT + N * NEW, advantage=None)
    return lambda prompts, responses: batcher.score([prompts[0]], [list(responses)]).reward_S


@torch.inference_mode()
def rewards_one_by_one(judge: Any, prompt: torch.Tensor, answers: Sequence[torch.Tensor]) -> list[float]:
    return [float(judge(input_ids=torch.cat([prompt, a])[None], use_cache=False).logits) for a in answers]


def best_of_n(temperature: float = 1.0) -> Callable[[], Any]:
    model, judge, prompt = large()
    decoder, reward = BestOfN(n=N), packed_rewards(judge)
    return lambda: decoder.generate(model, None, [prompt], reward=reward, max_new_tokens=NEW, temperature=temperature)


def generate_and_score(sample: bool = True) -> Callable[[], Any]:
    model, judge, prompt = large()

    def call() -> torch.Tensor:
        torch.manual_seed(0)
        draws = {"top_k": 0, "num_return_sequences": N} if sample else {}
        found = model.generate(
            prompt[None],
            attention_mask=torch.ones(1, PROMPT, dtype=torch.int64),
            max_new_tokens=NEW,
            do_sample=sample,
            **draws,
        )
        answers = found[:, PROMPT:]
        scores = rewards_one_by_one(judge, prompt, list(answers))
        return answers[max(range(len(scores)), key=scores.__getitem__)]

    return call


def check_best_of_n() -> None:
    """The greedy answer is the same; of sampled ones the rewards are those of one by one, and the best is chosen."""
    _, judge, prompt = large()
    if best_of_n(0.0)().generations[0].ids.tolist() != generate_and_score(False)().tolist():
        raise AssertionError("greedy answers differ")
    made = best_of_n()()
    right = rewards_one_by_one(judge, prompt, [g.ids for g in made.candidates[0]])
    torch.testing.assert_close(
        torch.tensor([g.reward for g in made.candidates[0]]), torch.tensor(right), rtol=1e-4, atol=1e-5
    )
    if made.generations[0].ids.tolist() != made.candidates[0][right.index(max(right))].ids.tolist():
        raise AssertionError("another answer than the best was chosen")


@functools.lru_cache(maxsize=1)
def small() -> tuple[Any, torch.Tensor, Callable[[Any, Any], Any]]:
    """A model of two layers, a prompt, and a reward: the mean of a table's entries at the answer's tokens."""
    generator = torch.Generator().manual_seed(1)
    table = torch.rand(SMALL, generator=generator, dtype=torch.float64)
    prompt = torch.randint(1, SMALL, (SHORT,), generator=generator)
    return llama(SMALL, WIDTH, 2, 2.0), prompt, lambda prompts, responses: [float(table[r].mean()) for r in responses]


def search(kind: str) -> Callable[[], torch.Tensor]:
    model, prompt, reward = small()
    if kind == "deal":
        decoder: Any = DeAL(heuristics=[reward], lam=20.0, top_k=K, lookahead=8)
        return lambda: decoder.generate(model, None, [prompt], max_new_tokens=STEPS).generations[0].ids
    decoder = TransferQStar(alpha=0.05, top_k=K, horizon=16)
    return lambda: decoder.generate(model, None, [prompt], reward=reward, max_new_tokens=STEPS).generations[0].ids


def generate_each(horizon: int) -> Callable[[], torch.Tensor]:
    """argmax over the k likeliest tokens of log p + 20 r(continuation), every continuation a call of `generate`."""
    model, prompt, reward = small()

    @torch.inference_mode()
    def call() -> torch.Tensor:
        ids = prompt
        for step in range(STEPS):
            logp, tokens = model(input_ids=ids[None], use_cache=False).logits[0, -1].log_softmax(-1).topk(K)
            values = []
            for token in tokens:
                text = torch.cat([ids, token[None]])
                room = min(horizon, STEPS - step - 1)
                if room:
                    mask = torch.ones(1, len(text), dtype=torch.int64)
                    text = model.generate(text[None], attention_mask=mask, max_new_tokens=room, do_sample=False)[0]
                values.append(reward([prompt], [text[SHORT:]])[0])
            best = int((logp.double() + 20 * torch.tensor(values, dtype=torch.float64)).argmax())
            ids = torch.cat([ids, tokens[best][None]])
        return ids[SHORT:]

    return call


def check_search(kind: str, horizon: int) -> None:
    ours, right = search(kind)().tolist(), generate_each(horizon)().tolist()
    model, prompt, _ = small()
    greedy = model.generate(
        prompt[None], attention_mask=torch.ones(1, SHORT, dtype=torch.int64), max_new_tokens=STEPS, do_sample=False
    )
    if ours != right:
        raise AssertionError(f"answers differ: {ours} and {right}")
    if ours == greedy[0, SHORT:].tolist():
        raise AssertionError("the search changed nothing, so equal answers say nothing")


def rows() -> Iterator[Row]:
    yield Row(
        operation=f"best-of-n, n = {N}, with rewards",
        shape=f"prompt {PROMPT}, {NEW} new tokens",
        dtype="float32",
        ours=best_of_n,
        peers={"generate x 16, scored one by one": generate_and_score},
        baseline="generate x 16, scored one by one",
        at_least=1.5,
        memory=True,
        most_mib=150,  # the cache of 16 rows takes 72
        check=check_best_of_n,
        peer_repeats=3,
    )
    for kind, horizon in (("transfer-q-star", 16), ("deal", 8)):
        yield Row(
            operation=f"{kind}, {K} candidates, look-ahead {horizon}",
            shape=f"prompt {SHORT}, {STEPS} new tokens",
            dtype="float32",
            ours=functools.partial(search, kind),
            peers={"generate for each candidate": functools.partial(generate_each, horizon)},
            baseline="generate for each candidate",
            at_least=5.0,
            check=functools.partial(check_search, kind, horizon),
            peer_repeats=3,
        )
