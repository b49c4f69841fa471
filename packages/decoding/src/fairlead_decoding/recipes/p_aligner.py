"""`fairlead run p-aligner`: does the search find better instructions, and does a small rewriter learn what it finds?

Paper: "P-Aligner: Enabling Pre-Alignment of Language Models via Principled Instruction Synthesis" (arXiv 2508.04626).
In a world of instructions whose true values are known (`prompt_world`), tree search is held against random paths and
single steps of the same budget; then a two-layer model is trained on the best rewrites and must recover the search's
gain in one greedy pass, on instructions it has not seen, with nothing left for a second pass to gain.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from pydantic import Field

from fairlead import stats
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe
from fairlead.runs import Run

from ..p_aligner import PAligner, RewriteTemplate, train_rewriter, with_finished
from ..principle_search import PrincipleSearch, Tree, best_node, best_worst_pairs, local_values, plant
from .prompt_world import FLAGS, PRINCIPLES, PromptWorld

WEIGHTS = (0.1, 1.0, 5.0)
SEARCH = "tree search, w = 0.1"
RANDOM, DISTINCT, STEP = "random paths", "random paths, no repeats", "single steps"
CLASSES, INTENTS, FILLERS, FLAGS_BEFORE = 8, 40, 20, 2
TEMPLATE = {
    "request": "{raw}", "step_request": "{raw}", "raw_start": "<raw>", "raw_end": "</raw>", "lead_in": "", "start": "<best>",
    "end": "</best>",
}  # fmt: skip
GREEN, GREY, ORANGE = "#1b7f4d", "#5b6470", "#c2571a"


class PAlignerRecipeConfig(MethodConfig):
    """Sizes of the two parts; the defaults take about a minute on one core."""

    environments: int = Field(300, ge=20, description="hidden laws on which the searches are compared")
    iterations: int = Field(20, ge=5, description="new nodes per tree, and texts per baseline")
    trees: int = Field(1200, ge=100, description="searched instructions that the rewriter learns from")
    steps: int = Field(500, ge=10, description="training steps of the rewriter")
    batch_size: int = Field(64, ge=1, description="rewrites per training step")
    learning_rate: float = Field(3e-3, gt=0, description="peak learning rate of the rewriter")
    tests: int = Field(200, ge=20, description="unseen instructions that the rewriter is tested on")


class PAlignerRecipe(Recipe):
    """Tree search against its controls, then a trained rewriter against the search."""

    Config = PAlignerRecipeConfig
    config: PAlignerRecipeConfig

    def __call__(self, run: Run) -> None:
        run.describe("P-Aligner", "Does a search over principles find better instructions, and does a small rewriter learn it?", "2508.04626")
        self._search(run)
        self._rewriter(run)

    def _search(self, run: Run) -> None:
        c = self.config
        found = run.stage("search", lambda: compare_searches(c.environments, c.iterations, run))
        values = {name: np.asarray(v) for name, v in found["values"].items()}
        best = values[SEARCH]
        rows = []
        for name, v in values.items():
            gap = stats.paired_difference(best, v)
            rows.append(
                {
                    "method": name, "true value of its choice": f"{stats.mean(v).estimate:.3f} ± {1.96 * stats.standard_error(v):.3f}",
                    "search ahead by, paired": "" if name == SEARCH else f"{gap.estimate:.3f} [{gap.low:.3f}, {gap.high:.3f}]",
                    "t": "" if name == SEARCH else f"{_t(best - v):.1f}",
                }
            )  # fmt: skip
            run.metric(f"true value, {name}", float(v.mean()))
        run.section(
            "What the search finds",
            f"Each of {c.environments} instructions has a hidden law: five principles with gains of their own, interactions that depend "
            "on their order, a price for repeating one and for going beyond three. A method may evaluate "
            f"{c.iterations + 1} texts three times each, with noise, and must name the best; what it named is judged by its true value.\n\n"
            "Single steps miss the interactions. Random paths find some of them; the tree spends its budget where it pays. A large "
            "weight of exploration turns the tree into breadth-first search and loses the advantage.",
        )
        run.table(
            "Search against its controls", rows,
            note=f"95 % intervals over {c.environments} instructions; the same instructions for every method. The tree's own estimate of its "
            f"choice is {found['claimed']:.3f}, three fresh evaluations say {found['fresh']:.3f}: the best of many noisy means is "
            "too good, so figures need fresh answers.",
        )  # fmt: skip
        run.figure("search", _search_figure(values), "Mean true value of the chosen text, 95 % intervals; the raw instruction is worth 0.")
        for name in (RANDOM, STEP):
            t = _t(best - values[name])
            run.check(f"search beats {name}, paired t > 5", t > 5, f"{(best - values[name]).mean():+.3f}, t = {t:.1f}")
        t = _t(best - values[DISTINCT])
        run.check("search beats random paths that never repeat a principle, paired t > 3", t > 3, f"{(best - values[DISTINCT]).mean():+.3f}, t = {t:.1f}")
        wide = values[_weight(5.0)]
        run.check("w = 0.1 beats w = 5", best.mean() > wide.mean(), f"{best.mean():.3f} against {wide.mean():.3f}")
        run.headline("search ahead of random paths", f"{(best - values[RANDOM]).mean():+.3f}", f"t = {_t(best - values[RANDOM]):.1f}, same budget")

    def _rewriter(self, run: Run) -> None:
        c = self.config
        found = {
            name: run.stage(f"rewriter-{name}", partial(learn_and_test, c, run, finished))
            for name, finished in (("with finished texts", True), ("without", False))
        }
        main = found["with finished texts"]
        shares = {name: _shares(f) for name, f in found.items()}
        rows = []
        for name, f in found.items():
            s = shares[name]
            rows.append(
                {
                    "training inputs": "raw and finished texts" if name.startswith("with ") else "raw texts only",
                    "gain recovered in one pass": f"{s['one']:.1%} ± {1.96 * s['one_se']:.1%}",
                    "second pass adds": f"{s['two']:+.1%} ± {1.96 * s['two_se']:.1%}", "left as it was": f"{f['unchanged']:.1%}",
                    "second pass changes": f"{f['changed_twice']:.1%}", "fallbacks": f["fallbacks"], "last loss": f"{f['losses'][-1]:.3f}",
                }
            )  # fmt: skip
            run.metric(f"gain recovered, {name}", s["one"])
            run.metric(f"second pass, {name}", s["two"])
        run.section(
            "What the rewriter learns",
            f"{c.trees} instructions of {CLASSES} classes are searched; a two-layer model of width 64 learns the best text of each tree. It "
            f"is tested on {c.tests} new instructions. One greedy pass costs one short generation; the search that it replaces costs "
            f"{c.iterations} improver calls, {3 * (c.iterations + 1)} answers and as many rewards per instruction. The two come out level: a search is "
            "fooled by noise on its own instruction, the rewriter has averaged over many.\n\n"
            "A rewriter that saw only raw texts keeps adding to a text that is finished, so a second pass costs something. Giving it each "
            "chosen text once more as its own best rewrite teaches it to stop.",
        )
        run.table("One pass, and a second", rows, note="Shares of the search's mean gain in true value over the raw instruction, with 95 % intervals.")
        run.figure("rewriter", _rewriter_figure(found), "Mean true value on unseen instructions, 95 % intervals; dashed: the search itself.")
        run.samples(main["samples"], title="Rewrites of unseen instructions")
        s = shares["with finished texts"]
        run.check("one pass recovers at least .8 of the search's gain", s["one"] >= 0.8, f"{s['one']:.3f} ± {1.96 * s['one_se']:.3f}")
        run.check("a second pass gains less than .05 of it", s["two"] < 0.05, f"{s['two']:+.3f} ± {1.96 * s['two_se']:.3f}")
        plain = shares["without"]
        run.check("trained on raw texts only: one pass recovers at least .8", plain["one"] >= 0.8, f"{plain['one']:.3f} ± {1.96 * plain['one_se']:.3f}")
        run.check("trained on raw texts only: a second pass gains less than .05", plain["two"] < 0.05, f"{plain['two']:+.3f} ± {1.96 * plain['two_se']:.3f}")
        run.headline("gain recovered in one pass", f"{s['one']:.0%}", f"of the search's, on {c.tests} unseen instructions")
        run.headline("second pass", f"{s['two']:+.1%}", f"{plain['two']:+.1%} without finished texts in training")


def _weight(w: float) -> str:
    return f"tree search, w = {w:g}"


def _t(differences: np.ndarray) -> float:
    return float(differences.mean() / stats.standard_error(differences))


def compare_searches(environments: int, iterations: int, run: Run) -> dict[str, Any]:
    """True values of what each method chooses, per environment: plain JSON."""
    world = PromptWorld(environments, run.seed)
    raws = [f"intent{i}" for i in range(environments)]
    values: dict[str, list[float]] = {}
    claimed = fresh = 0.0
    for w in WEIGHTS:
        trees = _search(world, raws, iterations, w, run.seed)
        chosen = [best_node(tree) for tree in trees]
        values[_weight(w)] = [world.value(raw, node.instruction) for raw, node in zip(raws, chosen, strict=True)]
        if w == WEIGHTS[0]:
            claimed = float(np.mean([node.local_mean for node in chosen]))
            _, again = local_values(world.responder, world.reward, [n.instruction for n in chosen], raws, 3)
            fresh = float(np.mean([np.mean(v) for v in again if v is not None]))
        run.progress("search", WEIGHTS.index(w) + 1, len(WEIGHTS) + 2)
    rng = np.random.default_rng([run.seed, 3])
    for name, repeats in ((RANDOM, True), (DISTINCT, False)):
        values[name] = [_random_paths(world, raw, iterations, rng, repeats) for raw in raws]
    values[STEP] = [_single_steps(world, raw, iterations) for raw in raws]
    run.progress("search", len(WEIGHTS) + 2, len(WEIGHTS) + 2)
    return {"values": values, "claimed": claimed, "fresh": fresh}


def _search(world: PromptWorld, raws: list[str], iterations: int, w: float, seed: int, first_index: int = 0) -> list[Tree]:
    trees = plant(raws, PRINCIPLES, seed=seed, first_index=first_index)
    return PrincipleSearch(iterations=iterations, w=w)(trees, world.improver, world.responder, world.reward)


def _random_paths(world: PromptWorld, raw: str, count: int, rng: np.random.Generator, repeats: bool) -> float:
    """`count` paths of uniform length 1 to 3, one V_local each; the true value of the best (the raw text included)."""
    texts = [raw]
    for _ in range(count):
        flags = rng.choice(list(FLAGS), int(rng.integers(1, 4)), replace=repeats)
        texts.append(raw + "".join(f" +{flag}" for flag in flags))
    return world.value(raw, texts[int(np.argmax(_means(world, raw, texts)))])


def _single_steps(world: PromptWorld, raw: str, count: int) -> float:
    """Every principle once, the whole budget spent on evaluating these."""
    texts = [raw] + [f"{raw} +{flag}" for flag in FLAGS]
    each = count // len(FLAGS)
    means = _means(world, raw, [raw] + [text for text in texts[1:] for _ in range(each)])
    averaged = [means[0], *np.reshape(means[1:], (len(FLAGS), each)).mean(1)]
    return world.value(raw, texts[int(np.argmax(averaged))])


def _means(world: PromptWorld, raw: str, texts: list[str]) -> np.ndarray:
    _, values = local_values(world.responder, world.reward, texts, [raw] * len(texts), 3)
    return np.asarray([v for v in values if v is not None]).mean(1)


def instructions(count: int, rng: np.random.Generator) -> list[str]:
    """Raw instructions: an intent, three filler words, and none to two flags that stand there already."""
    made = []
    for _ in range(count):
        fillers = rng.choice(FILLERS, 3, replace=False)
        flags = rng.choice(list(FLAGS), int(rng.integers(0, FLAGS_BEFORE + 1)), replace=False)
        made.append(" ".join([f"intent{rng.integers(INTENTS)}", *(f"filler{i}" for i in fillers), *(f"+{f}" for f in flags)]))
    return made


def tiny_rewriter(seed: int) -> tuple[Any, Any]:
    """An untrained two-layer Llama of width 64 and a tokenizer that knows the world's words."""
    import torch
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(TEMPLATE[m] for m in ("raw_start", "raw_end", "start", "end"))]
    words += [f"intent{i}" for i in range(INTENTS)] + [f"filler{i}" for i in range(FILLERS)] + [f"+{flag}" for flag in FLAGS]
    inner = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    inner.pre_tokenizer = WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>", padding_side="left"
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(words), hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, max_position_embeddings=128, bos_token_id=None, eos_token_id=1, pad_token_id=0,
            initializer_range=0.06,
        )
    )  # fmt: skip
    return model, tokenizer


def learn_and_test(config: PAlignerRecipeConfig, run: Run, finished: bool) -> dict[str, Any]:
    """Search, train and test one rewriter: true values per test instruction, as plain JSON."""
    world = PromptWorld(CLASSES, run.seed)
    rng = np.random.default_rng([run.seed, 5])
    template = RewriteTemplate(**TEMPLATE)
    pairs = best_worst_pairs(_search(world, instructions(config.trees, rng), config.iterations, WEIGHTS[0], run.seed))
    model, tokenizer = tiny_rewriter(run.seed)
    losses = train_rewriter(
        model, tokenizer, with_finished(pairs) if finished else pairs, template=template, steps=config.steps,
        batch_size=config.batch_size, learning_rate=config.learning_rate, seed=run.seed,
        progress=partial(run.progress, "rewriter" if finished else "rewriter, raw texts only"),
    )  # fmt: skip
    rewriter = PAligner(model=model, tokenizer=tokenizer, template=template, max_new_tokens=24, batch_size=200)
    raws = instructions(config.tests, rng)
    once = rewriter(raws)
    twice = rewriter([r.prompt for r in once])
    searched = [best_node(t).instruction for t in _search(world, raws, config.iterations, WEIGHTS[0], run.seed, config.trees)]
    texts = {"raw": raws, "one": [r.prompt for r in once], "two": [r.prompt for r in twice], "search": searched}
    values = {name: [world.value(raw, t) for raw, t in zip(raws, found, strict=True)] for name, found in texts.items()}
    samples = [
        {
            "raw": raws[i], "value": round(values["raw"][i], 2), "rewritten": texts["one"][i], "its value": round(values["one"][i], 2),
            "search's choice": searched[i], "value of that": round(values["search"][i], 2),
        }
        for i in range(min(12, len(raws)))
    ]  # fmt: skip
    return {
        "values": values, "losses": losses, "fallbacks": sum(r.provenance["fallback"] for r in once), "samples": samples,
        "unchanged": float(np.mean([not r.changed for r in once])), "changed_twice": float(np.mean([r.changed for r in twice])),
    }  # fmt: skip


def _shares(found: dict[str, Any]) -> dict[str, float]:
    """Parts of the search's mean gain, with delta-method standard errors of these ratios."""
    v = {name: np.asarray(values) for name, values in found["values"].items()}
    gain = v["search"] - v["raw"]
    out = {}
    for name, part in (("one", v["one"] - v["raw"]), ("two", v["two"] - v["one"])):
        out[name] = float(part.mean() / gain.mean())
        out[f"{name}_se"] = stats.standard_error(part - out[name] * gain) / abs(float(gain.mean()))
    return out


def _search_figure(values: dict[str, np.ndarray]) -> Any:
    figure, axis = _new_figure(7.2, 3.2)
    names = list(values)[::-1]
    means = [values[n].mean() for n in names]
    errors = [1.96 * stats.standard_error(values[n]) for n in names]
    colours = [GREEN if n == SEARCH else "#8fc3a6" if n.startswith("tree") else GREY for n in names]
    axis.barh(names, means, xerr=errors, color=colours, height=0.62, error_kw={"capsize": 3, "lw": 1})
    axis.set_xlabel("true value of the chosen text (reward units)")
    axis.grid(axis="x", alpha=0.25)
    from matplotlib.patches import Patch

    handles = [Patch(color=GREEN, label="search, default w"), Patch(color="#8fc3a6", label="search, larger w"), Patch(color=GREY, label="controls")]
    axis.legend(handles=handles, frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    return figure


def _rewriter_figure(found: dict[str, dict[str, Any]]) -> Any:
    figure, axis = _new_figure(6.4, 3.6)
    stages = {"raw": "raw", "one": "one pass", "two": "two passes"}
    for (name, f), colour, offset in zip(found.items(), (GREEN, ORANGE), (-0.06, 0.06), strict=True):
        v = {k: np.asarray(x) for k, x in f["values"].items()}
        errors = [1.96 * stats.standard_error(v[k]) for k in stages]
        label = "trained on raw and finished texts" if name.startswith("with ") else "trained on raw texts only"
        axis.errorbar(np.arange(3) + offset, [v[k].mean() for k in stages], yerr=errors, marker="o", capsize=3, color=colour, label=label)
    search = np.mean(next(iter(found.values()))["values"]["search"])
    axis.axhline(search, color="black", ls="--", lw=1, label="the search itself")
    axis.set_xticks(range(3), list(stages.values()))
    axis.set_ylabel("true value (reward units)")
    axis.grid(axis="y", alpha=0.25)
    axis.legend(frameon=False, fontsize=8, loc="lower right")
    return figure


def _new_figure(width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    return figure, axis
