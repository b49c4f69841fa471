"""`fairlead run deal`: search with a look-ahead against greedy decoding and against re-ranking as many tokens of samples.

Huang et al., "DeAL: Decoding-time Alignment for Large Language Models" (arXiv 2402.06147). Part one: random bigram models
and six required tokens, one value per model. Part two: a small model of sentences made of word pieces, with and without an
instruction to use the given words, then coverage against brevity over the weights of the two.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any

import numpy as np
import torch
from pydantic import Field, field_validator, model_validator

from fairlead import stats
from fairlead.config import MethodConfig
from fairlead.generation import DecodeResult, generate
from fairlead.kinds import Recipe
from fairlead.runs import Run

from .. import theory
from ..best_of_n import BestOfN
from ..deal import DeAL
from ..heuristics import KeywordCoverage, LengthLimit
from .search_world import (
    INSTRUCTION,
    BigramLM,
    RequiredTokens,
    Sentences,
    bigram_prompts,
    prompt_concepts,
    sentence_prompt,
    sentence_tokenizer,
    train_sentence_model,
)

WEIGHTS = tuple(i / 8 for i in range(8, -1, -1))
BLUE, GREEN, ORANGE, GREY = "#3b5bdb", "#1b7f4d", "#c2571a", "#5b6470"
TEXTS = {"plain": "no instruction", "instructed": "instruction"}


class DeALRecipeConfig(MethodConfig):
    """Sizes of both parts; the defaults take about three minutes on one core."""

    models: int = Field(32, ge=3, description="random bigram models, seeded 32 seed, 32 seed + 1, ... by default")
    prompts: int = Field(20, ge=1, description="prompts of each bigram model")
    vocab: int = Field(32, ge=4, description="tokens of a bigram model, the end token included")
    required: int = Field(6, ge=1, description="tokens that an answer should have")
    concentration: float = Field(0.05, gt=0, description="of the Dirichlet rows of a bigram model; smaller is more peaked")
    end: float = Field(0.06, gt=0, lt=1, description="probability of the end token after every other")
    length: int = Field(24, ge=2, description="longest answer of a bigram model, tokens")
    top_k: int = Field(8, ge=1, description="candidate tokens at each step")
    lam: float = Field(20.0, gt=0, description="weight of the heuristics")
    lookaheads: tuple[int, ...] = Field((0, 1, 2, 4, 6, 12), min_length=2, description="look-aheads tried on bigram models, ascending from 0")
    lookahead: int = Field(6, ge=1, description="the look-ahead that is held against none and against re-ranking")
    sentences: int = Field(64, ge=8, description="prompts of the sentence model")
    concepts: int = Field(6, ge=1, le=12, description="words that a sentence should have")
    vocab_size: int = Field(110, ge=40, description="word pieces of the sentence model")
    sentence_lookaheads: tuple[int, ...] = Field((0, 3, 6, 10), min_length=2, description="look-aheads tried on sentences, ascending from 0")
    steps: int = Field(400, ge=1, description="training steps of the sentence model, of 40 documents each")
    width: int = Field(96, ge=16, multiple_of=8, description="width of the sentence model")
    tokens: int = Field(56, ge=8, description="longest sentence in tokens")
    words: int = Field(6, ge=1, description="words after which a sentence is too long, where brevity counts")
    shared_lam: float = Field(6.0, gt=0, description="weight of the heuristics where two share it")

    @field_validator("lookaheads", "sentence_lookaheads")
    @classmethod
    def _ascends(cls, value: tuple[int, ...]) -> tuple[int, ...]:
        if value[0] != 0 or list(value) != sorted(set(value)):
            raise ValueError("must ascend from 0")
        return value

    @model_validator(mode="after")
    def _has_it(self) -> DeALRecipeConfig:
        if self.lookahead not in self.lookaheads or self.lookahead not in self.sentence_lookaheads:
            raise ValueError(f"lookahead: {self.lookahead} must be among lookaheads and sentence_lookaheads")
        return self

    @property
    def samples(self) -> int:
        """Samples to re-rank: as many as one look-ahead at every token costs, k (l + 1)."""
        return self.top_k * (self.lookahead + 1)


class DeALRecipe(Recipe):
    """Coverage of required tokens by look-ahead, prompting and search together, two objectives at once."""

    Config = DeALRecipeConfig
    config: DeALRecipeConfig

    def __call__(self, run: Run) -> None:
        models = []
        for index in range(self.config.models):
            run.progress("bigram models", index, self.config.models)
            models.append(run.stage(f"bigram-{index}", partial(measure_bigram, self.config, run.seed * self.config.models + index)))

        @cache
        def world() -> SentenceWorld:
            return SentenceWorld(self.config, run.seed, partial(run.progress, "training"))

        texts = {}
        for name in TEXTS:
            run.progress(f"sentences, {TEXTS[name]}", 0, 1)
            texts[name] = run.stage(f"sentences-{name}", partial(_measured, world, name))
        sweep = run.stage("weights", lambda: [world().weighted(w) for w in WEIGHTS])
        bigram_section(run, models, self.config)
        sentence_section(run, texts, self.config)
        weights_section(run, sweep, self.config)
        cost_section(run, models, texts, self.config)


def _measured(world: Callable[[], SentenceWorld], name: str) -> dict[str, Any]:
    return world().measure(name)


def measure_bigram(config: DeALRecipeConfig, seed: int) -> dict[str, Any]:
    """Coverage on one bigram model: greedy, re-ranking, every look-ahead; whether lam = 0 is greedy decoding."""
    model = BigramLM(config.vocab, config.end, config.concentration, seed)
    prompts = bigram_prompts(config.vocab, config.prompts, config.required, seed)
    reward = RequiredTokens()
    run = partial(_timed, model, None, prompts, max_new_tokens=config.length, seed=seed)
    greedy = [g[0] for g in generate(model, None, prompts, temperature=0, max_new_tokens=config.length)]
    plain = run(DeAL(lam=0, top_k=config.top_k))
    same = sum(torch.equal(a.ids, b.ids) for a, b in zip(greedy, plain.generations, strict=True))
    found = {"greedy": _row(plain, reward, prompts), "same": same}
    ranked = run(BestOfN(n=config.samples), reward=reward)
    hits_PK = np.array([[float(g.reward == 1) for g in group] for group in ranked.candidates])
    counts = [config.top_k * (ahead + 1) for ahead in config.lookaheads if ahead <= config.lookahead]
    found["re-rank"] = {**_row(ranked, reward, prompts), "by_n": [float(theory.best_of_n_reward(hits_PK, n).mean()) for n in counts]}
    for ahead in config.lookaheads:
        made = run(DeAL(heuristics=[reward], lam=config.lam, top_k=config.top_k, lookahead=ahead))
        found[f"l={ahead}"] = _row(made, reward, prompts)
    return found


def _timed(model: Any, tokenizer: Any, prompts: Sequence[Any], decoder: Any, **options: Any) -> DecodeResult:
    """All prompts in one batch."""
    return decoder.generate(model, tokenizer, prompts, batch_size=len(prompts) * decoder.rows_per_prompt, **options)


def _row(made: DecodeResult, reward: Any, prompts: Sequence[Any], text: bool = False) -> dict[str, Any]:
    """Soft and hard coverage, and the cost of one prompt."""
    h = reward(prompts, [g.text if text else g.ids for g in made.generations]).double()
    count = len(prompts)
    return {
        "soft": float(h.mean()), "hard": float((h == 1).double().mean()), "tokens": made.cost.model_tokens / count,
        "calls": made.cost.reward_calls / count, "seconds": made.cost.seconds / count,
    }  # fmt: skip


class GivenWords(KeywordCoverage):
    """Keyword coverage where every prompt has keywords of its own: those it gives."""

    def __call__(
        self, prompts: Sequence[Any], responses: Sequence[Any], finished: Sequence[bool] | None = None, **columns: Any
    ) -> torch.Tensor:
        return torch.tensor([float(_coverage(p)([p], [r])[0]) for p, r in zip(prompts, responses, strict=True)])


@cache
def _coverage(prompt: str) -> KeywordCoverage:
    return KeywordCoverage(keywords=prompt_concepts(prompt), match="exact")


class SentenceWorld:
    """A trained model of sentences, its prompts, and what decoders make of them."""

    def __init__(self, config: DeALRecipeConfig, seed: int, progress: Callable[[int, int], None]) -> None:
        began = time.monotonic()
        world, rng = Sentences(seed), np.random.default_rng([seed, 6])
        self.config, self.seed = config, seed
        self.tokenizer = sentence_tokenizer(world, config.vocab_size, config.concepts, seed)
        self.model, self.loss = train_sentence_model(
            self.tokenizer, world, seed, steps=config.steps, concepts=config.concepts, width=config.width, progress=progress
        )
        self.prompts = [sentence_prompt(world.concepts(rng, config.concepts)) for _ in range(config.sentences)]
        self.seconds = time.monotonic() - began

    def measure(self, name: str) -> dict[str, Any]:
        """Greedy, re-ranking and every look-ahead, with the instruction or without."""
        c, reward = self.config, GivenWords()
        instruction = INSTRUCTION if name == "instructed" else None
        asked = [p if instruction is None else f"{instruction}\n\n{p}" for p in self.prompts]
        greedy = [g[0] for g in generate(self.model, self.tokenizer, asked, temperature=0, max_new_tokens=c.tokens)]
        search = partial(DeAL, top_k=c.top_k, instruction=instruction)
        plain = self._run(search(lam=0))
        ways = {"greedy": plain, "re-rank": self._run(BestOfN(n=c.samples), asked, reward=reward)}
        for ahead in c.sentence_lookaheads:
            ways[f"l={ahead}"] = self._run(search(heuristics=[reward], lam=c.lam, lookahead=ahead))
        rows = {way: self._row(made, reward) for way, made in ways.items()}
        same = sum(torch.equal(a.ids, b.ids) for a, b in zip(greedy, plain.generations, strict=True))
        return {"rows": rows, "same": same, "loss": self.loss, "training_seconds": self.seconds, "prompts": self.prompts}

    def weighted(self, weight: float) -> dict[str, Any]:
        """Both objectives under weights (weight, 1 - weight), with the instruction."""
        c = self.config
        parts = [GivenWords(), LengthLimit(words=c.words)]
        made = self._run(
            DeAL(heuristics=parts, weights=[weight, 1 - weight], lam=c.shared_lam, top_k=c.top_k, lookahead=c.lookahead, instruction=INSTRUCTION)
        )
        texts = [g.text for g in made.generations]
        cover, brief = (part(self.prompts, texts).tolist() for part in parts)
        return {
            "weight": weight, "coverage": cover, "brevity": brief, "words": [len(t.split()) for t in texts],
            "text": texts[0], "prompt": self.prompts[0],
        }  # fmt: skip

    def _run(self, decoder: Any, prompts: Sequence[str] | None = None, **options: Any) -> DecodeResult:
        asked = self.prompts if prompts is None else prompts
        return _timed(self.model, self.tokenizer, asked, decoder, max_new_tokens=self.config.tokens, seed=self.seed, **options)

    def _row(self, made: DecodeResult, reward: Any) -> dict[str, Any]:
        texts = [g.text.strip() for g in made.generations]
        return {
            **_row(made, reward, self.prompts, text=True), "texts": texts[:6],
            "hits": [bool(h == 1) for h in reward(self.prompts, texts)],
        }  # fmt: skip



def bigram_section(run: Run, models: list[dict[str, Any]], config: DeALRecipeConfig) -> None:
    """Hard coverage by look-ahead over models, against re-ranking; the thresholds."""
    hard = {way: np.array([m[way]["hard"] for m in models]) for way in models[0] if way != "same"}
    none, search, ranked = hard["l=0"], hard[f"l={config.lookahead}"], hard["re-rank"]
    gain, lead = search - none, search - ranked
    run.section(
        "Does the look-ahead pay?",
        f"In {len(models)} random bigram models an answer should hold {config.required} tokens that the prompt names. Greedy decoding "
        "runs in a circle of likely tokens. The search takes, of the "
        f"{config.top_k} likeliest next tokens, the one whose log-probability plus {config.lam:g} times the coverage reached is "
        "largest, where coverage is counted after a greedy look-ahead.\n\n"
        f"Without a look-ahead it finds all tokens in {none.mean():.0%} of the answers, with {config.lookahead} tokens of it in "
        f"{search.mean():.0%}. Sampling {config.samples} answers and keeping the best, for about as many tokens, manages {ranked.mean():.0%}: "
        "the chance of meeting all of them by luck is small. Most of the gain comes from the first few tokens of look-ahead.\n\n"
        f"Models differ far more than prompts do (standard deviation of the gain over models {gain.std(ddof=1):.2f}), so each model counts once.",
    )  # fmt: skip
    run.figure(
        "coverage", _coverage_figure(models, hard, config),
        f"Left: mean over {len(models)} models with 95 % t intervals; re-ranking of as many samples as the look-ahead costs, k (l + 1). "
        "Right: one dot a model; above the line the look-ahead wins.",
    )  # fmt: skip
    run.table(
        "Coverage of the required tokens, bigram models",
        [
            {
                "way": _named(way, config), "soft": stats.mean([m[way]["soft"] for m in models]), "hard": stats.mean(values),
                "hard, against l = 0": "" if way == "l=0" else _signed(stats.paired_difference(values, none)),
                "hard, against re-rank": "" if way == "re-rank" else _signed(stats.paired_difference(values, ranked)),
            }
            for way, values in hard.items()
        ],
        note=f"Soft: share of the tokens; hard: share of answers with all of them. Means over {len(models)} models of {config.prompts} prompts, "
        "95 % t intervals over models.",
    )  # fmt: skip
    same, count = sum(m["same"] for m in models), len(models) * config.prompts
    run.check("lam = 0 is greedy decoding, token for token", same == count, f"{same} of {count} answers")
    for rival, values, least in (("l = 0", gain, 0.08), (f"re-ranking {config.samples}", lead, 0.2)):
        p = _t_test(values)
        run.check(
            f"hard coverage, l = {config.lookahead} over {rival}: more than {least:g}, paired t-test over models p < .001",
            bool(values.mean() > least and p < 0.001),
            f"{_signed(stats.mean(values))}, p = {p:.1e}, above 0 in {int((values > 0).sum())} of {len(values)} models",
        )  # fmt: skip
    run.headline(f"all {config.required} tokens found, l = {config.lookahead}", stats.mean(search), f"{none.mean():.3f} without look-ahead")
    run.headline("lead over re-ranking", stats.mean(lead), f"best of {config.samples} samples: {ranked.mean():.3f}")
    for way, values in hard.items():
        run.metric("bigram hard coverage", float(values.mean()), way=way, soft=float(np.mean([m[way]["soft"] for m in models])))


def _t_test(differences: np.ndarray) -> float:
    """Two-sided p-value of a mean of 0."""
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def _mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    return stats.mcnemar(a.tolist(), b.tolist())


def _signed(x: stats.Interval) -> str:
    return f"{x.estimate:+.3f} [{x.low:+.3f}, {x.high:+.3f}]"


def _named(way: str, config: DeALRecipeConfig) -> str:
    return {"greedy": "greedy (lam = 0)", "re-rank": f"best of {config.samples} samples"}.get(way, f"search, l = {way[2:]}")


def _axes(width: float, columns: int) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, 3.7), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes


def _coverage_figure(models: list[dict[str, Any]], hard: dict[str, np.ndarray], config: DeALRecipeConfig) -> Any:
    figure, (left, right) = _axes(9.4, 2)
    search = [stats.mean(hard[f"l={ahead}"]) for ahead in config.lookaheads]
    _errorbar(left, config.lookaheads, search, BLUE, "o-", "search")
    by_n = np.array([m["re-rank"]["by_n"] for m in models])
    _errorbar(left, config.lookaheads[: by_n.shape[1]], [stats.mean(column) for column in by_n.T], ORANGE, "s--", "re-rank of k (l + 1) samples")
    left.axhline(float(hard["greedy"].mean()), color=GREY, lw=1, ls=":", label="greedy")
    left.set(xlabel="look-ahead l, tokens", ylabel="answers with all required tokens", ylim=(-0.02, None))
    left.set_xticks(config.lookaheads)
    left.legend(frameon=False, fontsize=8)
    search_M = hard[f"l={config.lookahead}"]
    right.plot([0, 1], [0, 1], color="black", lw=0.8)
    right.plot(hard["l=0"], search_M, "o", color=BLUE, alpha=0.6, label="against l = 0")
    right.plot(hard["re-rank"], search_M, "s", color=ORANGE, alpha=0.6, label=f"against re-ranking {config.samples}")
    right.set(xlabel="hard coverage of the other way", ylabel=f"hard coverage of the search, l = {config.lookahead}")
    right.set(xlim=(-0.03, 1.03), ylim=(-0.03, 1.03))
    right.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _errorbar(axis: Any, x: Sequence[float], values: Sequence[stats.Interval], colour: str, style: str, label: str) -> None:
    axis.errorbar(x, [v.estimate for v in values], yerr=_errors(values), fmt=style, color=colour, capsize=3, ms=5, label=label)


def _errors(values: Sequence[stats.Interval]) -> list[list[float]]:
    """Lengths of the bars below and above; rounding must not make one negative."""
    return [[max(0.0, v.estimate - v.low) for v in values], [max(0.0, v.high - v.estimate) for v in values]]


def sentence_section(run: Run, texts: dict[str, dict[str, Any]], config: DeALRecipeConfig) -> None:
    """The same on sentences of word pieces; the instruction and the search together."""
    rows = {name: t["rows"] for name, t in texts.items()}
    hits = {(name, way): np.array(row["hits"]) for name, ways in rows.items() for way, row in ways.items()}
    search = f"l={config.lookahead}"
    both, alone, told = (float(hits[key].mean()) for key in (("instructed", search), ("plain", search), ("instructed", "greedy")))
    run.section(
        "Word pieces, and an instruction that helps",
        f"A model of two layers has learnt to write sentences from word pieces, some of them after the instruction “{INSTRUCTION}”, which it "
        f"obeys loosely. The task: use the {config.concepts} words of the prompt. A word counts only when its last piece is there, so "
        "without a look-ahead nothing is gained by its first piece, and the search is nearly blind.\n\n"
        f"The instruction alone gets all words into {told:.0%} of the sentences, the search alone into {alone:.0%}, both "
        f"into {both:.0%}: the prompt moves the words into the candidates, the search picks them.",
    )  # fmt: skip
    run.figure(
        "sentences", _sentence_figure(hits, config),
        f"{config.sentences} prompts, one model, 95 % Wilson intervals. Dashed: the best of {config.samples} samples.",
    )  # fmt: skip
    run.table(
        "All given words used",
        [
            {
                "way": _named(way, config), **{f"{TEXTS[name]}, soft": f"{rows[name][way]['soft']:.3f}" for name in TEXTS},
                **{f"{TEXTS[name]}, hard": stats.wilson(int(hits[name, way].sum()), config.sentences) for name in TEXTS},
            }
            for way in rows["plain"]
        ],
        note="Soft: share of the words; hard: share of sentences with all of them, 95 % Wilson intervals over prompts.",
    )  # fmt: skip
    run.samples(
        [
            {
                "words": ", ".join(prompt_concepts(texts[name]["prompts"][i])), "prompt": TEXTS[name],
                "way": _named(way, config), "answer": rows[name][way]["texts"][i],
            }
            for i in range(2) for name in TEXTS for way in ("greedy", "re-rank", "l=0", search)
        ],
        title="Two prompts, eight answers each", show=16,
    )  # fmt: skip
    same = sum(t["same"] for t in texts.values())
    run.check("sentences: lam = 0 is greedy decoding, token for token", same == 2 * config.sentences, f"{same} of {2 * config.sentences} answers")
    for name, label in TEXTS.items():
        s, n, r = hits[name, search], hits[name, "l=0"], hits[name, "re-rank"]
        run.check(
            f"sentences, {label}: the same order, l = {config.lookahead} above l = 0 and above re-ranking",
            bool(s.mean() > n.mean() and s.mean() > r.mean()),
            f"{s.mean():.3f} against {n.mean():.3f} (McNemar p = {_mcnemar(s, n):.1e}) and {r.mean():.3f} (p = {_mcnemar(s, r):.1e})",
        )  # fmt: skip
    p = _mcnemar(hits["instructed", search], hits["plain", search])
    run.check(
        "instruction and search together find more than either alone", both > max(alone, told),
        f"{both:.3f} against {told:.3f} (instruction) and {alone:.3f} (search; McNemar p = {p:.1e})",
    )  # fmt: skip
    share = stats.wilson(int(hits["instructed", search].sum()), config.sentences)
    run.headline("all words used, instruction + search", share, f"instruction {told:.3f}, search {alone:.3f}")


def _sentence_figure(hits: dict[tuple[str, str], np.ndarray], config: DeALRecipeConfig) -> Any:
    figure, (axis, other) = _axes(9.4, 2)
    n = config.sentences
    for (name, label), colour in zip(TEXTS.items(), (GREY, GREEN), strict=True):
        points = [stats.wilson(int(hits[name, f"l={ahead}"].sum()), n) for ahead in config.sentence_lookaheads]
        _errorbar(axis, config.sentence_lookaheads, points, colour, "o-", f"search, {label}")
        axis.axhline(float(hits[name, "re-rank"].mean()), color=colour, ls="--", lw=1)
    axis.set(xlabel="look-ahead l, tokens", ylabel="sentences with all given words", ylim=(-0.03, 1.03))
    axis.set_xticks(config.sentence_lookaheads)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    ways = ["greedy", "re-rank", "l=0", f"l={config.lookahead}"]
    for shift, (name, label), colour in zip((-0.19, 0.19), TEXTS.items(), (GREY, GREEN), strict=True):
        found = [stats.wilson(int(hits[name, way].sum()), n) for way in ways]
        y = [f.estimate for f in found]
        other.bar(np.arange(len(ways)) + shift, y, 0.36, yerr=_errors(found), color=colour, alpha=0.75, capsize=3, label=label)
    other.set_xticks(range(len(ways)), ["greedy", f"best of {config.samples}", "l = 0", f"l = {config.lookahead}"])
    other.set(ylabel="sentences with all given words", ylim=(0, 1.03))
    other.legend(frameon=False, fontsize=8, loc="upper left")
    return figure


def weights_section(run: Run, sweep: list[dict[str, Any]], config: DeALRecipeConfig) -> None:
    """Coverage against brevity over their weights."""
    from scipy.stats import spearmanr

    weights = [s["weight"] for s in sweep]
    cover, brief = [stats.mean(s["coverage"]) for s in sweep], [stats.mean(s["brevity"]) for s in sweep]
    words = [stats.mean(s["words"]) for s in sweep]
    run.section(
        "Two objectives and their weights",
        f"Use all {config.concepts} words, and stay within {config.words}: both cannot be had, for the words between them take room. h = w × "
        f"coverage + (1 − w) × brevity, where brevity is minus the words too many over the limit, and λ = {config.shared_lam:g}, so that neither drowns the "
        "log-probability. Moving the weight moves the answers along the trade-off, at decoding time, with one model.",
    )  # fmt: skip
    figure, (left, right) = _axes(9.4, 2)
    _errorbar(left, weights, cover, BLUE, "o-", "coverage")
    _errorbar(left, weights, brief, ORANGE, "s-", f"brevity, limit {config.words} words")
    left.axhline(0, color="black", lw=0.6)
    left.set(xlabel="weight w of coverage (brevity has 1 − w)", ylabel="mean of the objective")
    left.legend(frameon=False, fontsize=8)
    right.plot([w.estimate for w in words], [c.estimate for c in cover], "-", color=GREY, lw=1)
    _errorbar(right, [w.estimate for w in words], cover, GREEN, "o", "")
    for w, x, y in zip(weights, words, cover, strict=True):
        if w in (0.0, 0.25, 0.5, 0.75, 1.0):
            right.annotate(f"w = {w:g}", (x.estimate, y.estimate), xytext=(5, -11), textcoords="offset points", fontsize=8)
    right.axvline(config.words, color=ORANGE, ls=":", lw=1)
    right.set(xlabel="words of the sentence (dotted: the limit)", ylabel="coverage of the given words")
    run.figure("weights", figure, f"{config.sentences} prompts with the instruction, l = {config.lookahead}; 95 % t intervals over prompts.")
    run.table(
        "The two objectives over their weights",
        [
            {"w": f"{s['weight']:g}", "coverage": c, "brevity": b, "words": n, "the first prompt's answer": s["text"].strip()}
            for s, c, b, n in zip(sweep, cover, brief, words, strict=True)
        ],
        note=f"w weighs coverage, 1 − w brevity. The first prompt gives: {', '.join(prompt_concepts(sweep[0]['prompt']))}.",
    )  # fmt: skip
    for name, values, sign in (("coverage", cover, 1), ("brevity", brief, -1)):
        means = [v.estimate for v in values]
        rho = float(spearmanr(weights, means).statistic) if len(set(means)) > 1 else 0.0
        run.check(
            f"{name} {'rises' if sign > 0 else 'falls'} with the weight of coverage: Spearman |rho| > .9", bool(sign * rho > 0.9),
            f"rho = {rho:+.3f} over {len(weights)} weights",
        )  # fmt: skip
        run.metric(f"spearman {name}", rho)
    at = f"at {words[-1].estimate:.1f} to {words[0].estimate:.1f} words"
    run.headline("coverage over the weights", f"{cover[-1].estimate:.2f} → {cover[0].estimate:.2f}", at)


def cost_section(run: Run, models: list[dict[str, Any]], texts: dict[str, dict[str, Any]], config: DeALRecipeConfig) -> None:
    """Tokens, reward calls and seconds of one prompt."""
    rows = texts["instructed"]["rows"]
    greedy = rows["greedy"]
    run.section(
        "What it costs",
        "Every candidate's look-ahead goes through the model, which is the price: about k l tokens for each token of the answer, "
        "though batched, so that time grows less. A text is judged once, however often it comes up. The paper reports 22 to 55 times the time of greedy decoding.",
    )  # fmt: skip
    run.table(
        "Cost of one prompt, sentences",
        [
            {
                "way": _named(way, config), "tokens": f"{cost['tokens']:.0f}", "reward calls": f"{cost['calls']:.0f}", "ms": f"{1e3 * cost['seconds']:.1f}",
                "tokens, over greedy": f"{cost['tokens'] / greedy['tokens']:.1f}", "time, over greedy": f"{cost['seconds'] / greedy['seconds']:.1f}",
            }
            for way, cost in rows.items()
        ],
        note=f"Tokens through the model, prompt included, with the instruction; wall clock of one batch of {config.sentences} prompts. Training took "
        f"{texts['plain']['training_seconds']:.0f} s (loss {texts['plain']['loss']:.2f} nats per token).",
    )  # fmt: skip
    run.table(
        "Cost of one prompt, bigram models",
        [
            {"way": _named(way, config), "tokens": _mean(models, way, "tokens"), "reward calls": _mean(models, way, "calls")}
            for way in models[0] if way != "same"
        ],
        note=f"Means over models of {config.prompts} prompts; a table is looked up faster than a clock tells.",
    )  # fmt: skip


def _mean(models: list[dict[str, Any]], way: str, name: str) -> str:
    return f"{np.mean([m[way][name] for m in models]):.0f}"
