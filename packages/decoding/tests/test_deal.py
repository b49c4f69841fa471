"""DeAL: its score by hand, exhaustive and beam searches as oracles, heuristics."""

from __future__ import annotations

import copy
import itertools
from typing import Any

import pytest
import torch

from fairlead.errors import ConfigError, InputError
from fairlead.generation import generate
from fairlead.testing import tiny_model
from fairlead.testing.contracts import small_ids
from fairlead_decoding import DeAL, KeywordCoverage, LengthLimit
from fairlead_decoding.enumerable import all_answers, answer_logprobs, tiny_llama, trainable_answer_logprobs

PROMPT = torch.tensor([1, 2, 3])


def decode(decoder: DeAL, model: Any, room: int, reward: Any = None, prompts: Any = None, **options: Any) -> Any:
    return decoder.generate(model, None, prompts or [PROMPT], reward=reward, max_new_tokens=room, **options)


@pytest.mark.parametrize(("lam", "best"), [(0, 0), (2, 0), (3, 2)])
def test_the_score_is_log_probability_plus_lambda_times_the_heuristic(lam: float, best: int) -> None:
    """Candidates with p = (.6, .3, .1) and h = (.2, .5, 1): the arithmetic of one step."""

    class Law(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            from transformers import PretrainedConfig

            self.config = PretrainedConfig(vocab_size=3)
            self.device = torch.device("cpu")

        def get_output_embeddings(self) -> None:
            return None

        def forward(self, input_ids: torch.Tensor, attention_mask: torch.Tensor) -> Any:
            from types import SimpleNamespace

            return SimpleNamespace(logits=torch.tensor([0.6, 0.3, 0.1]).log().expand(*input_ids.shape, 3))

    h = [0.2, 0.5, 1.0]
    decoder = DeAL(heuristics=[lambda p, r: [h[int(x[0])] for x in r]], lam=lam, top_k=3, lookahead=0, trace=True)
    made = decode(decoder, Law(), 1, prompts=[torch.tensor([0])]).generations[0]
    assert int(made.ids[0]) == best
    logp = [-0.5108, -1.2040, -2.3026]
    if lam:
        assert made.provenance["score"] == pytest.approx(logp[best] + lam * h[best], abs=1e-4)
        assert made.provenance["heuristics"] == pytest.approx([h[best]])


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_a_beam_without_weight_is_transformers_beam_search(seed: int) -> None:
    model = copy.deepcopy(tiny_model(seed=seed)).double()
    expected = model.generate(
        PROMPT[None], attention_mask=torch.ones(1, 3, dtype=torch.long), num_beams=3, do_sample=False, max_new_tokens=10, length_penalty=0.0,
        return_dict_in_generate=True, output_scores=True,
    )  # fmt: skip
    made = decode(DeAL(lam=0, beam=3, top_k=3), model, 10).generations[0]
    assert made.ids.tolist() == expected.sequences[0, 3:].tolist()
    assert made.provenance["score"] == pytest.approx(float(expected.sequences_scores[0]), abs=1e-5)


def test_a_beam_without_pruning_finds_the_best_of_all_answers() -> None:
    vocab, length, lam = 5, 4, 3.0
    model, prompt = tiny_llama(vocab, head_scale=10.0, seed=2), torch.tensor([vocab])
    answers = all_answers(vocab, length)
    h = torch.tensor([float((a * torch.tensor([1, -1, 1, -1])).sum()) / 4 for a in answers])
    score = answer_logprobs(model, prompt, answers).double() + lam * h
    heuristic = lambda p, r: [float((x * torch.tensor([1, -1, 1, -1])[: len(x)]).sum()) / 4 for x in r]  # noqa: E731
    made = decode(DeAL(heuristics=[heuristic], lam=lam, top_k=vocab, lookahead=0, beam=vocab**length), model, length, prompts=[prompt])
    assert made.generations[0].ids.tolist() == answers[int(score.argmax())].tolist()
    assert made.generations[0].provenance["score"] == pytest.approx(float(score.max()), abs=1e-4)


def test_a_full_look_ahead_judges_the_greedy_completion() -> None:
    vocab, length, lam = 5, 4, 2.0
    model, prompt = tiny_llama(vocab, head_scale=10.0, seed=4), torch.tensor([vocab])
    heuristic = lambda p, r: [float(x.sum()) / 10 for x in r]  # noqa: E731
    scores = []
    for c in range(vocab):
        rest = generate(model, None, [torch.cat([prompt, torch.tensor([c])])], temperature=0, max_new_tokens=length - 1)[0][0].ids
        whole = torch.cat([torch.tensor([c]), rest])
        first = float(trainable_answer_logprobs(model, prompt, torch.tensor([[c]])))
        scores.append(first + lam * float(whole.sum()) / 10)
    made = decode(DeAL(heuristics=[heuristic], lam=lam, top_k=vocab, lookahead=length, trace=True), model, length, prompts=[prompt])
    step = made.generations[0].provenance["trace"][0]
    found = {c: lp + lam * v for c, lp, v in zip(step["candidates"], step["logp"], step["values"], strict=True)}
    assert [found[c] for c in range(vocab)] == pytest.approx(scores, abs=1e-4)


def test_constants_and_exchanged_scales_change_nothing() -> None:
    model = tiny_model()
    scaled = lambda a, b: lambda p, r: [a * x + b for x in small_ids(p, r)]  # noqa: E731
    base = decode(DeAL(lam=3.0, top_k=5, lookahead=3), model, 10, small_ids).generations[0].ids.tolist()
    assert base != decode(DeAL(lam=0, top_k=5), model, 10).generations[0].ids.tolist()
    assert decode(DeAL(lam=3.0, top_k=5, lookahead=3), model, 10, scaled(1.0, 5.0)).generations[0].ids.tolist() == base
    assert decode(DeAL(lam=1.5, top_k=5, lookahead=3), model, 10, scaled(2.0, 0.0)).generations[0].ids.tolist() == base
    assert decode(DeAL(lam=3.0, top_k=5), model, 10, lambda p, r: [0.5] * len(r)).generations[0].ids.tolist() == (
        decode(DeAL(lam=0, top_k=5), model, 10).generations[0].ids.tolist()
    )


def test_the_combination_is_linear_and_its_parts_are_told() -> None:
    model = tiny_model()
    other = lambda p, r: [float((x % 3 == 0).float().mean()) for x in r]  # noqa: E731
    alone = decode(DeAL(heuristics=[small_ids], lam=3.0, top_k=5, lookahead=2), model, 10).generations[0]
    both = decode(DeAL(heuristics=[small_ids, other], weights=[1.0, 0.0], lam=3.0, top_k=5, lookahead=2), model, 10).generations[0]
    assert both.ids.tolist() == alone.ids.tolist()
    assert both.provenance["heuristics"] == pytest.approx([small_ids([0], [both.ids])[0], other([0], [both.ids])[0]], abs=1e-6)


@pytest.mark.parametrize("beam", [1, 3])
def test_every_text_is_judged_once(beam: int) -> None:
    seen: list[tuple[Any, ...]] = []

    def spy(prompts: Any, responses: Any, finished: Any) -> list[float]:
        seen.extend((tuple(r.tolist()), f) for r, f in zip(responses, finished, strict=True))
        return small_ids(prompts, responses)

    made = decode(DeAL(heuristics=[spy], lam=2.0, top_k=4, lookahead=2, beam=beam), tiny_model(), 6)
    assert len(seen) == len(set(seen)) == made.cost.reward_calls
    if beam == 1:
        assert len(seen) <= 4 * 6


def test_a_beam_stops_when_no_live_answer_can_win() -> None:
    class Bounded(LengthLimit):
        accepts_ids = True

        def setup(self) -> None:
            self.bounds = (0.0, 1.0)

        def __call__(self, prompts: Any, responses: Any, finished: Any = None, **more: Any) -> torch.Tensor:
            return torch.tensor([1.0 if end else 0.0 for end in finished])

    model = tiny_model()
    ends = list(range(0, 64, 2))
    made = decode(DeAL(heuristics=[Bounded()], lam=50.0, top_k=8, lookahead=0, beam=2), model, 40, ends=ends)
    assert made.generations[0].finished
    assert len(made.generations[0].ids) < 4


def test_coverage_of_keywords() -> None:
    text, words = ["The dog is running."], ["run", "dog", "park"]
    score = lambda **s: float(KeywordCoverage(keywords=words, **s)([""], text)[0])  # noqa: E731
    assert score(match="exact") == pytest.approx(1 / 3)
    assert score(match="prefix") == pytest.approx(2 / 3)
    assert score(match=lambda w: {"running": "run"}.get(w, w)) == pytest.approx(2 / 3)
    assert score(match="prefix", hard=True) == 0
    assert float(KeywordCoverage(keywords=["og"])([""], ["dog dog"])[0]) == 0
    assert float(KeywordCoverage(keywords=["dog"])([""], ["dog Dog DOGS"])[0]) == 1
    assert float(KeywordCoverage(keywords=["dog"])(["a dog?"], ["no"])[0]) == 0


def test_the_length_limit() -> None:
    twelve = " ".join("word" for _ in range(12))
    assert float(LengthLimit(words=10)([""], [twelve])[0]) == pytest.approx(-0.2)
    assert float(LengthLimit(words=12)([""], [twelve])[0]) == 0
    strict = LengthLimit(words=12, graded=False)
    assert strict(["", ""], [twelve, twelve], [True, False]).tolist() == [1.0, 0.0]


def test_an_instruction_goes_before_the_prompt_and_is_not_judged() -> None:
    decoder = DeAL(lam=1.0, instruction="Be brief.")
    assert decoder.start("Why?") == "Be brief.\n\nWhy?"
    assert decoder.start([{"role": "user", "content": "Why?"}])[0] == {"role": "system", "content": "Be brief."}
    with pytest.raises(InputError, match="give prompts as text"):
        decode(decoder, tiny_model(), 4, small_ids)


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"heuristics": [small_ids], "weights": [0.0]}, "weights: are all zero"),
        ({"heuristics": [small_ids], "weights": [1.0, 2.0]}, "weights: 2 are given for 1 heuristics"),
        ({"lookahead": -1}, "lookahead: should be greater than or equal to 0"),
        ({"beam": 2, "mode": "sample"}, "a beam is searched greedily"),
    ],
)
def test_settings_that_cannot_be_are_refused(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        DeAL(**settings)
    with pytest.raises(ConfigError, match="must hold at least one word"):
        KeywordCoverage(keywords=[])
    with pytest.raises(ConfigError, match="must be single words, got '--'"):
        KeywordCoverage(keywords=["--"])


def test_without_a_heuristic_there_is_nothing_to_search_for() -> None:
    with pytest.raises(InputError, match="DeAL: heuristics are required"):
        decode(DeAL(lam=1.0), tiny_model(), 4)


def test_a_beam_finds_more_than_greed_on_a_random_world() -> None:
    model = tiny_model()
    pairs = itertools.product([1, 4], range(4))
    found = {(b, s): decode(DeAL(lam=0, beam=b, top_k=8), model, 8, prompts=[torch.tensor([s + 1])]).generations[0] for b, s in pairs}
    gains = [found[4, s].provenance["score"] - found[1, s].provenance["score"] for s in range(4)]
    assert max(gains) > 0


def beam_by_hand(model: Any, prompt: torch.Tensor, beam: int, k: int, room: int, ends: set[int]) -> tuple[list[int], float]:
    """Beam search without heuristics, one text at a time: finished answers leave the beam, which shrinks by them."""
    live: list[tuple[list[int], float]] = [([], 0.0)]
    pool: list[tuple[list[int], float]] = []
    width = beam
    while live:
        grown = []
        for tokens, total in live:
            with torch.inference_mode():
                logp = model(input_ids=torch.cat([prompt, torch.tensor(tokens, dtype=torch.int64)])[None]).logits[0, -1].log_softmax(-1)
            values, found = logp.topk(k)
            grown += [([*tokens, int(t)], total + float(v)) for v, t in zip(values, found, strict=True)]
        picked = sorted(grown, key=lambda item: -item[1])[:width]
        done = [item for item in picked if item[0][-1] in ends]
        width -= len(done)
        cut = [item for item in picked if item not in done and len(item[0]) == room]
        pool += done + cut
        live = [item for item in picked if item not in done and item not in cut]
    return max(pool, key=lambda item: item[1])


@pytest.mark.parametrize("prompt", [1, 2, 3, 4, 5, 6])
def test_answers_that_end_leave_the_beam_which_shrinks_by_them(prompt: int) -> None:
    model, ends = copy.deepcopy(tiny_model()).double(), set(range(0, 64, 3))
    ids, score = beam_by_hand(model, torch.tensor([prompt]), 4, 4, 8, ends)
    made = decode(DeAL(lam=0, beam=4, top_k=4), model, 8, prompts=[torch.tensor([prompt])], ends=sorted(ends))
    pool = made.candidates[0]
    assert made.generations[0].ids.tolist() == ids
    assert made.generations[0].provenance["score"] == pytest.approx(score, abs=1e-5)
    assert len(pool) == 4  # every place of the beam ends once: as a finished answer or at the limit
