"""Every decoder keeps the contract of its kind, in the settings in which people use it."""

from __future__ import annotations

from typing import Any

import pytest

from fairlead.testing import decoder_contract, tiny_model
from fairlead.testing.contracts import small_ids
from fairlead_decoding import (
    ARGS,
    BestOfN,
    Blockwise,
    ControlledDecoding,
    DeAL,
    GenARM,
    Rejection,
    SoftBestOfN,
    TransferQStar,
    WorstOfN,
)


def other_model() -> Any:
    return tiny_model(seed=5)


TestBestOfN = decoder_contract(lambda: BestOfN(n=3))
TestWorstOfN = decoder_contract(lambda: WorstOfN(n=3))
TestSoftBestOfN = decoder_contract(lambda: SoftBestOfN(n=3, alpha=0.05))
TestRejection = decoder_contract(lambda: Rejection(threshold=0.3, n=6))
TestTransferQStar = decoder_contract(lambda: TransferQStar(alpha=0.1, top_k=4, horizon=3))
TestTransferQStarSampled = decoder_contract(
    lambda: TransferQStar(alpha=0.1, top_k=4, horizon=3, rollouts=2, mode="sample", rollout=other_model())
)
TestIndirect = decoder_contract(
    lambda: TransferQStar(alpha=0.1, top_k=3, horizon=3, rollouts=3, baseline_reward=lambda p, r: [0.5 for _ in r], beta=0.5)
)
TestControlledDecoding = decoder_contract(lambda: ControlledDecoding(alpha=0.1, top_k=4, horizon=3, rollouts=2))
TestARGS = decoder_contract(lambda: ARGS(w=2.0, top_k=4))
TestARGSSampled = decoder_contract(lambda: ARGS(w=2.0, top_k=4, mode="sample"))
TestDeAL = decoder_contract(lambda: DeAL(lam=2.0, top_k=4, lookahead=3))
TestBlockwise = decoder_contract(lambda: Blockwise(n=3, block=4))


class TestGenARM(decoder_contract(lambda: GenARM(reward_model=other_model(), mode="sample"))):  # type: ignore[misc]
    test_under_a_constant_reward_it_is_plain_generation = None  # its guide is a model, not the reward
    test_a_watermark_composes_and_is_found = None  # below: the guide takes tokens too


@pytest.mark.parametrize("beam", [2, 3])
def test_a_beam_depends_on_neither_the_batch_nor_the_seed(beam: int) -> None:
    import torch

    model = tiny_model()
    prompts = [torch.arange(1, n) for n in (5, 9, 7)]
    decoder = DeAL(lam=2.0, top_k=4, lookahead=2, beam=beam)
    whole = decoder.generate(model, None, prompts, reward=small_ids, max_new_tokens=8)
    for i, prompt in enumerate(prompts):
        alone = decoder.generate(model, None, [prompt], reward=small_ids, max_new_tokens=8, seed=9)
        assert alone.generations[0].ids.tolist() == whole.generations[i].ids.tolist()
