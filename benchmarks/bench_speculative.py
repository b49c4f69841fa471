"""Speculative sampling against transformers' assisted generation (one prompt) and against the target alone (eight prompts).

The draft is the first of the target's 14 layers with its embedding and head; the other 13 add a small perturbation, sized so
that about 65 % of the proposals are accepted in greedy search and 80 % in sampling. Eight rows keep a core busy with
arithmetic, so fewer proposals pay there. `python benchmarks/bench_speculative.py` tells the tokens a call, counted and by
the theory.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from typing import Any

import torch
from harness import Row

from fairlead.generation import generate
from fairlead_decoding.speculative import Speculative, block_efficiency, memory_bound_speedup

VOCABULARY, WIDTH, LAYERS, TOKENS = 1000, 256, 14, 96
PERTURBATION, SHARPNESS = 0.05, 0.16


@functools.lru_cache(maxsize=1)
def models() -> tuple[Any, Any]:
    """(target of 15.3 million parameters, draft of 1.6 million), random weights, next-token laws of about 3 nats."""
    from transformers import LlamaConfig, LlamaForCausalLM

    def model(layers: int) -> Any:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY, hidden_size=WIDTH, intermediate_size=4 * WIDTH, num_hidden_layers=layers, num_attention_heads=4,
            num_key_value_heads=4, tie_word_embeddings=False, bos_token_id=None, eos_token_id=None, pad_token_id=0,
            initializer_range=0.06,
        )  # fmt: skip
        return LlamaForCausalLM(config).eval()

    target, draft = model(LAYERS), model(1)
    with torch.no_grad():
        target.lm_head.weight.normal_(0, SHARPNESS)
        for layer in target.model.layers[1:]:
            layer.self_attn.o_proj.weight.mul_(PERTURBATION)
            layer.mlp.down_proj.weight.mul_(PERTURBATION)
    own = draft.state_dict()
    draft.load_state_dict({name: target.state_dict()[name] for name in own})
    return target, draft


@functools.lru_cache(maxsize=2)
def prompts(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (12 + i,), generator=generator) for i in range(count)]


def ours(count: int, gamma: int, temperature: float) -> Callable[[], Any]:
    target, draft = models()
    decoder = Speculative(draft=draft, gamma=gamma)
    return lambda: decoder.generate(target, None, prompts(count), temperature=temperature, max_new_tokens=TOKENS)


def assisted(gamma: int, temperature: float) -> Callable[[], Any]:
    """The seed is one under which 96 sampled tokens take 28 calls of the target, as ours do: luck is not to be timed."""
    target, draft = models()
    draft.generation_config.num_assistant_tokens = gamma
    draft.generation_config.num_assistant_tokens_schedule = "constant"
    draft.generation_config.assistant_confidence_threshold = 0.0
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {"do_sample": False}
    (prompt,) = prompts(1)

    def call() -> torch.Tensor:
        torch.manual_seed(1)
        made: torch.Tensor = target.generate(
            prompt[None], attention_mask=torch.ones(1, len(prompt)), max_new_tokens=TOKENS, assistant_model=draft, **options
        )
        return made[0, len(prompt) :]

    return call


def alone(count: int, temperature: float) -> Callable[[], Any]:
    target, _ = models()
    return lambda: generate(target, None, prompts(count), temperature=temperature, max_new_tokens=TOKENS)


def transformers_alone(count: int, temperature: float) -> Callable[[], Any]:
    target, _ = models()
    options: dict[str, Any] = {"do_sample": True, "top_k": 0, "temperature": temperature} if temperature else {"do_sample": False}
    width = max(map(len, prompts(count)))
    ids = torch.stack([torch.cat([p.new_zeros(width - len(p)), p]) for p in prompts(count)])
    return lambda: target.generate(ids, attention_mask=(ids != 0).long(), max_new_tokens=TOKENS, **options)


def check(count: int, gamma: int) -> None:
    """Greedy answers are those of assisted generation and of the target alone."""
    made = [g.ids.tolist() for g in ours(count, gamma, 0.0)().generations]
    expected = [group[0].ids.tolist() for group in alone(count, 0.0)()]
    if made != expected:
        raise AssertionError("greedy answers of the draft and target differ from the target's")
    if count == 1 and assisted(gamma, 0.0)().tolist() != made[0]:
        raise AssertionError("greedy answers differ from transformers' assisted generation")


def rows() -> Iterator[Row]:
    for temperature, name in ((0.0, "greedy"), (1.0, "sampled")):
        yield Row(
            operation=f"speculative decoding, {name}, gamma 4",
            shape=f"1 prompt, {TOKENS} tokens, draft 1/10",
            dtype="float32",
            ours=functools.partial(ours, 1, 4, temperature),
            peers={
                "transformers assisted": functools.partial(assisted, 4, temperature),
                "target alone": functools.partial(alone, 1, temperature),
            },
            baseline="transformers assisted",
            at_least=1.0,
            check=functools.partial(check, 1, 4),
        )
    for temperature, name in ((0.0, "greedy"), (1.0, "sampled")):
        yield Row(
            operation=f"speculative decoding, {name}, gamma 2",
            shape=f"8 prompts, {TOKENS} tokens, draft 1/10",
            dtype="float32",
            ours=functools.partial(ours, 8, 2, temperature),
            peers={
                "target alone": functools.partial(alone, 8, temperature),
                "transformers, target alone": functools.partial(transformers_alone, 8, temperature),
            },
            baseline="target alone",
            at_least=1.0,
            check=functools.partial(check, 8, 2),
        )


def tell() -> None:
    """Tokens a call, counted, without the noise of the verdicts, and by the formula of independent acceptance."""
    for count, gamma, temperature in ((1, 4, 0.0), (1, 4, 1.0), (8, 2, 0.0), (8, 2, 1.0)):
        found = ours(count, gamma, temperature)().figures
        ratio, acceptance = found["parameter_ratio"], found["mean_acceptance"]
        tau = block_efficiency(acceptance, gamma)
        print(
            f"{count} prompts, gamma {gamma}, temperature {temperature:g}: tokens a call {found['block_efficiency']:.2f} counted, "
            f"{found['block_efficiency_low_variance']:.2f} expected, {tau:.2f} by the formula at acceptance {acceptance:.2f}; "
            f"memory-bound speed-up {found['memory_bound_speedup']:.2f} counted, {memory_bound_speedup(tau, ratio, gamma):.2f} by the formula"
        )


if __name__ == "__main__":
    torch.set_num_threads(1)
    tell()
