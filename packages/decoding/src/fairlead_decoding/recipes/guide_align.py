"""`fairlead run guide-align`: does a small retriever learn which rules an input needs, and do they reach the prompt?

Paper: "Ensuring Safe and High-Quality Outputs: A Guideline Library Approach for Language Models" (arXiv 2403.11838). The
whole way in small: a scripted teacher names risks and writes rules, the library keeps each once, two embedding bags learn
question -> rule over disjoint vocabularies, the retrieved rules go before the question, and a scripted model answers
safely iff one of them fits. Near-copies then show what the library's deduplication and the diversity filter are for.
"""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import stats
from fairlead.config import MethodConfig
from fairlead.errors import DataUnavailableError, MissingDependencyError
from fairlead.kinds import Recipe
from fairlead.runs import Run

from ..dual_encoder import DualEncoder, EmbeddingBagEncoder, HFEncoder, Index, train, words
from ..guide_align import GuideAlign
from ..guideline_writing import GuidelineWriter, RiskDetector
from ..guidelines import Guideline, GuidelineLibrary, training_rows
from .english_rules import QUESTIONS, RULES
from .guideline_world import TOPICS, GuidelineWorld, near_copy

K, N_DOCS = 6, 20
TRAINED, UNMASKED, ALL, UNTRAINED, TFIDF = "trained", "trained, no mask", "trained, all rules of the topic", "untrained", "TF-IDF"
OFF = 2.0
"""A similarity threshold that nothing reaches."""
GREEN, PALE, GREY = "#1b7f4d", "#8fc3a6", "#5b6470"
COLOURS = {TRAINED: GREEN, UNMASKED: PALE, ALL: PALE, UNTRAINED: GREY, TFIDF: GREY}


class GuideAlignRecipeConfig(MethodConfig):
    """Sizes; the defaults take a few seconds on one core."""

    train_per_topic: int = Field(40, ge=4, description="questions per topic that the teacher writes rules for")
    test_per_topic: int = Field(10, ge=1, description="unseen questions per topic")
    width: int = Field(32, ge=1, description="width of the embeddings")
    epochs: int = Field(8, ge=1, description="training epochs of the retriever")
    batch_size: int = Field(32, ge=2, description="questions per training step")
    learning_rate: float = Field(2e-2, gt=0, description="learning rate of Adam")
    english: str = Field("zoo:minilm-l6-v2", description="sentence encoder of the English part; empty skips it")


class GuideAlignRecipe(Recipe):
    """Library, retriever and guided prompts end to end, on rules that no lexical search can find."""

    Config = GuideAlignRecipeConfig
    config: GuideAlignRecipeConfig

    def __call__(self, run: Run) -> None:
        run.describe("Guide-Align", "Does a small retriever learn which rules an input needs, and do they reach the prompt?", "2403.11838")
        world = GuidelineWorld(run.seed)
        questions = world.questions(self.config.train_per_topic, "train")
        library, notes = build_library(world, questions)
        result = run.stage("retrieval", lambda: compare_retrievers(self.config, world, library, questions, run))
        copies = run.stage("copies", lambda: coverage_with_copies(self.config, world, library, questions, run.seed))
        _retrieval_section(run, result, notes)
        _copies_section(run, copies)
        self._english(run)

    def _english(self, run: Run) -> None:
        if not self.config.english:
            return
        try:
            result = run.stage("english", lambda: english(self.config.english))
        except (MissingDependencyError, DataUnavailableError) as error:
            run.section("English, without training", f"Left out: {error}")
            return
        _english_section(run, result)


def build_library(world: GuidelineWorld, questions: list[str]) -> tuple[GuidelineLibrary, dict[str, int]]:
    """The library that the scripted teacher's replies give, and how much came in."""
    risks = RiskDetector(world.teacher)(questions)
    written = GuidelineWriter(world.teacher)(questions, risks)
    library = GuidelineLibrary(rule for rules in written.guidelines for rule in rules)
    notes = {
        "questions": len(questions), "risky": sum(r.unsafe is True for r in risks), "unparsed": len(written.unparsed),
        "written": sum(map(len, written.guidelines)), "kept": len(library),
    }  # fmt: skip
    return library, notes


def train_encoder(
    config: GuideAlignRecipeConfig, library: GuidelineLibrary, questions: list[str], seed: int, mask: bool = True,
    positives: dict[str, list[str]] | None = None,
) -> tuple[EmbeddingBagEncoder, list[float]]:  # fmt: skip
    """A retriever trained on the rules written for each question (or on `positives`), and its losses per epoch."""
    encoder = EmbeddingBagEncoder.for_texts(questions + library.lines, config.width, seed)
    rows = training_rows(library, {str(i): text for i, text in enumerate(questions)}, positives, seed=seed)
    losses = train(
        encoder, rows, {g.id: g.line for g in library}, epochs=config.epochs, batch_size=config.batch_size,
        learning_rate=config.learning_rate, mask=mask, seed=seed,
    )  # fmt: skip
    return encoder, losses


class _TfIdf(DualEncoder):
    """Unit vectors of word counts times log inverse document frequency: the lexical control."""

    name = "tf-idf"

    def __init__(self, documents: list[str]) -> None:
        super().__init__()
        appears = Counter(word for text in documents for word in set(words(text)))
        self._idf = {word: math.log((1 + len(documents)) / (1 + n)) + 1 for word, n in sorted(appears.items())}
        self._column = {word: i for i, word in enumerate(self._idf)}

    def questions(self, texts: Any) -> torch.Tensor:
        return self.guidelines(texts)

    def guidelines(self, texts: Any) -> torch.Tensor:
        table = torch.zeros(len(texts), len(self._column))
        for row, text in enumerate(texts):
            for word in words(text):
                if word in self._column:
                    table[row, self._column[word]] += self._idf[word]
        return torch.nn.functional.normalize(table, dim=-1)


def compare_retrievers(
    config: GuideAlignRecipeConfig, world: GuidelineWorld, library: GuidelineLibrary, questions: list[str], run: Run
) -> dict[str, Any]:
    """Precision at 6, safe answers and losses of every retriever, per test question where it applies: plain JSON."""
    tests = world.questions(config.test_per_topic, "test")
    by_topic: dict[int, list[str]] = {}
    for g in library:
        by_topic.setdefault(world.topic_of_rule(g.line), []).append(g.id)
    everything = {str(i): by_topic[world.topic_of_question(text)] for i, text in enumerate(questions)}
    encoders: dict[str, tuple[DualEncoder, list[float]]] = {
        TRAINED: train_encoder(config, library, questions, run.seed),
        UNMASKED: train_encoder(config, library, questions, run.seed, mask=False),
        ALL: train_encoder(config, library, questions, run.seed, positives=everything),
        f"{ALL}, no mask": train_encoder(config, library, questions, run.seed, mask=False, positives=everything),
        UNTRAINED: (EmbeddingBagEncoder.for_texts(questions + library.lines, config.width, run.seed), []),
        TFIDF: (_TfIdf(library.lines), []),
    }
    found: dict[str, Any] = {"unguided": [world.answers_safely(text) for text in tests], "retrievers": {}, "examples": []}
    for name, (encoder, losses) in encoders.items():
        ids_BK, _ = Index(encoder.encode_guidelines(library.lines)).search(encoder.encode_questions(tests), K)
        hits = [
            float(np.mean([world.topic_of_rule(library[i].line) == world.topic_of_question(text) for i in ids]))
            for text, ids in zip(tests, ids_BK.tolist(), strict=True)
        ]
        library.forget()
        rewriter = GuideAlign(library=library, encoder=encoder, k=K, n_docs=N_DOCS)
        rewrites = rewriter(tests)
        found["retrievers"][name] = {
            "precision": hits, "safe": [world.answers_safely(r.prompt) for r in rewrites], "losses": losses,
            "shown": float(np.mean([len(r.provenance["guidelines"]) for r in rewrites])),
        }  # fmt: skip
        if name == TRAINED:
            found["examples"] = [
                {"topic": world.topic_of_question(r.original), "prompt with its guidelines": r.prompt} for r in rewrites[:: config.test_per_topic][:4]
            ]
        run.progress("retrievers", len(found["retrievers"]), len(encoders))
    library.forget()
    return found


def coverage_with_copies(
    config: GuideAlignRecipeConfig, world: GuidelineWorld, library: GuidelineLibrary, questions: list[str], seed: int
) -> dict[str, list[float]]:
    """Distinct rules among those shown, per question, when each question's best rule has near-copies in the library."""
    encoder, _ = train_encoder(config, library, questions, seed)
    tests = world.questions(1, "copies")
    ids_BK, _ = Index(encoder.encode_guidelines(library.lines)).search(encoder.encode_questions(tests), 1)
    best = [library[i] for i in dict.fromkeys(ids_BK[:, 0].tolist())]
    found = {}
    for copies in (0, 6, 16):
        rules = [*library, *(near_copy(rule, j) for rule in best for j in range(copies))]
        for dedup in (False, True):
            own = GuidelineLibrary((Guideline(g.id, g.title, g.text) for g in rules), threshold=0.9 if dedup else OFF)
            for filtered in (False, True):
                rewriter = GuideAlign(library=own, encoder=encoder, k=K, n_docs=N_DOCS, threshold=0.5 if filtered else OFF)
                shown = rewriter.retrieve(tests)
                key = f"{copies} {'dedup' if dedup else '-'} {'filter' if filtered else '-'}"
                found[key] = [float(len({g.id.partition(" copy ")[0] for g, _ in row})) for row in shown]
    return found


def english_library() -> GuidelineLibrary:
    """The rules in English; an id is its topic and a number."""
    library = GuidelineLibrary()
    for topic, lines in RULES.items():
        for i, line in enumerate(lines, 1):
            title, _, text = line.partition(": ")
            library.add(Guideline(f"{topic} {i}", title, text))
    return library


def english(name: str) -> dict[str, Any]:
    """What a sentence encoder and TF-IDF find for questions in English: plain JSON."""
    library = english_library()
    pairs = [(topic, question) for topic, questions in QUESTIONS.items() for question in questions]
    encoders: dict[str, DualEncoder] = {"sentence encoder": HFEncoder(name, normalise=True), TFIDF: _TfIdf(library.lines)}
    found: dict[str, Any] = {"encoder": name, "first": {}, "among": {}, "examples": []}
    for label, encoder in encoders.items():
        library.forget()
        shown = GuideAlign(library=library, encoder=encoder, k=4, n_docs=N_DOCS).retrieve([q for _, q in pairs])
        topics = [[g.id.partition(" ")[0] for g, _ in rules] for rules in shown]
        found["first"][label] = [row[0] == topic for row, (topic, _) in zip(topics, pairs, strict=True)]
        found["among"][label] = [row.count(topic) / len(row) for row, (topic, _) in zip(topics, pairs, strict=True)]
        if not found["examples"]:
            found["examples"] = [
                {"question": q, "first": rules[0][0].line, "second": rules[1][0].line} for (_, q), rules in zip(pairs, shown, strict=True)
            ][::2]
    return found


def _english_section(run: Run, result: dict[str, Any]) -> None:
    run.section(
        "English, without training",
        f"A sentence encoder ({result['encoder']}) connects what people ask with rules in English before it has seen a single pair: "
        f"{len(result['first'][TFIDF])} questions, {sum(map(len, RULES.values()))} rules of {len(RULES)} topics. What it misses are "
        "questions that do not name their risk; connecting these is what training on pairs, as above, is for.",
    )
    rows = []
    for label, hits in result["first"].items():
        interval = stats.wilson(sum(hits), len(hits))
        rows.append(
            {
                "retriever": label, "first rule is of the topic": f"{interval.estimate:.0%} [{interval.low:.0%}, {interval.high:.0%}]",
                "of the 4 shown": f"{np.mean(result['among'][label]):.0%}",
            }
        )  # fmt: skip
        run.metric(f"English, first rule right, {label}", interval.estimate)
    run.table("Retrieval in English", rows, note="95 % intervals (Wilson). 4 rules per topic; by chance 12 % would fit. Rules and questions were "
        "written for this recipe; it is an illustration, not a benchmark.")
    run.samples(result["examples"], title="Questions and the two rules found first")
    p = stats.mcnemar(result["first"]["sentence encoder"], result["first"][TFIDF])
    better = sum(result["first"]["sentence encoder"]) > sum(result["first"][TFIDF])
    run.check("English: the sentence encoder's first rule fits more often than TF-IDF's (McNemar p < .05)", better and p < 0.05, f"p = {p:.3f}")


def _retrieval_section(run: Run, result: dict[str, Any], notes: dict[str, int]) -> None:
    unguided = np.asarray(result["unguided"], dtype=float)
    rows = []
    for name, r in result["retrievers"].items():
        precision, safe = np.asarray(r["precision"]), np.asarray(r["safe"])
        interval = stats.wilson(int(safe.sum()), len(safe))
        rows.append(
            {
                "retriever": name, "precision at 6": f"{precision.mean():.3f} ± {1.96 * stats.standard_error(precision):.3f}",
                "safe answers": f"{safe.mean():.1%} [{interval.low:.1%}, {interval.high:.1%}]", "rules shown": f"{r['shown']:.1f}",
                "loss, last epoch": f"{r['losses'][-1]:.3f}" if r["losses"] else "",
            }
        )  # fmt: skip
        run.metric(f"precision at 6, {name}", float(precision.mean()))
        run.metric(f"safe rate, {name}", float(safe.mean()))
    run.section(
        "The library and its retriever",
        f"A scripted teacher judged {notes['questions']} questions ({notes['risky']} risky) and wrote {notes['written']} rules; the library keeps "
        f"{notes['kept']} of them, each once, with the questions it was written for. Questions and rules share no topical word, so "
        "what connects them has to be learnt from the pairs.\n\n"
        "Two embedding bags learn it within seconds; lexical search finds what chance finds. The scripted model answers safely iff a "
        f"rule of the right topic stands before the question: never unguided ({unguided.mean():.0%}), and as often as the retriever is right "
        "when guided. This is a test of the wiring: every correct trainer passes it.\n\n"
        "One rule serves many questions, so most in-batch negatives of the same topic are wrong. Masking the other positives of a question "
        "takes that error out of the loss; where every rule of the topic counts as positive the floor falls to nearly zero. "
        "The ranking does not suffer either way.",
    )
    run.table("Retrievers", rows, note=f"{len(unguided)} unseen questions, {TOPICS} topics; 95 % intervals. Trained: on the three rules written for each question.")
    run.figure("precision", _precision_figure(result), "Share of rules of the right topic among the first 6, and what the trained retrievers' loss did.")
    run.samples(result["examples"], title="Questions with their guidelines")
    trained, lexical = (float(np.mean(result["retrievers"][n]["precision"])) for n in (TRAINED, TFIDF))
    run.check("precision at 6 of the trained retriever above .95", trained > 0.95, f"{trained:.3f}")
    run.check("precision at 6 of TF-IDF below .15", lexical < 0.15, f"{lexical:.3f}")
    gain = float(np.mean(result["retrievers"][TRAINED]["safe"]) - unguided.mean())
    run.check("safe rate, guided minus unguided, above .9", gain > 0.9, f"{gain:+.3f}")
    with_mask, without = (result["retrievers"][n]["losses"][-1] for n in (ALL, f"{ALL}, no mask"))
    run.check(
        "the mask takes false negatives out of the loss: floor below .1, above 1 without it", with_mask < 0.1 and without > 1,
        f"{with_mask:.3f} against {without:.3f}",
    )  # fmt: skip
    run.headline("precision at 6", f"{trained:.3f}", f"TF-IDF {lexical:.3f}")
    run.headline("safe answers gained", f"{gain:+.1%}", "guided minus unguided")


def _copies_section(run: Run, found: dict[str, list[float]]) -> None:
    means = {key: float(np.mean(values)) for key, values in found.items()}
    names = {"- -": "neither", "dedup -": "library dedup alone", "- filter": "diversity filter alone", "dedup filter": "both"}
    rows = [
        {"guard": label, **{f"{c} copies": f"{means[f'{c} {key}']:.2f}" for c in (0, 6, 16)}} for key, label in names.items()
    ]
    run.section(
        "What near-copies do",
        "Rules from a model come in many near-copies. With six of the best rule in the library and no guard, all six places go to one "
        "rule. Either guard repairs it: the library keeps a rule once, or the filter leaves out what resembles a better rule. "
        f"With 16 copies they fill most of the {N_DOCS} places that are retrieved, and the filter alone comes too late.",
    )
    run.table("Distinct rules among the 6 shown", rows, note=f"Mean over {len(next(iter(found.values())))} questions, one per topic.")
    figure, axis = _new_figures(1, 6.4, 3.2)
    for i, (key, label) in enumerate(names.items()):
        axis.plot([0, 1, 2], [means[f"{c} {key}"] for c in (0, 6, 16)], marker="os^D"[i], ls=("-", "--", ":", "-.")[i], color=(GREY, GREEN, "#c2571a", "#3b5bdb")[i], label=label)
    axis.set_xticks([0, 1, 2], ["0", "6", "16"])
    axis.set(xlabel="near-copies of the best rule", ylabel="distinct rules shown (of 6)", ylim=(0, 6.5))
    axis.legend(frameon=False, fontsize=8, loc="upper left", bbox_to_anchor=(1.0, 1.0))
    run.figure("copies", figure, "Distinct rules that reach the prompt, with and without the two guards.")
    run.check("6 copies, no guard: one distinct rule is shown", means["6 - -"] == 1, f"{means['6 - -']:.2f}, {means['0 - -']:.2f} without copies")
    run.check("6 copies, library dedup alone: 6 distinct rules", means["6 dedup -"] == 6, f"{means['6 dedup -']:.2f}")
    run.check("6 copies, diversity filter alone: 6 distinct rules", means["6 - filter"] == 6, f"{means['6 - filter']:.2f}")
    crowd = f"filter {means['16 - filter']:.2f}, dedup {means['16 dedup -']:.2f}"
    run.check("16 copies: the filter alone is not enough, dedup is", means["16 - filter"] < 6 == means["16 dedup -"], crowd)
    run.headline("distinct rules under 6 copies", f"{means['6 - -']:.0f} → {means['6 dedup filter']:.0f}", "without and with the guards")


def _precision_figure(result: dict[str, Any]) -> Any:
    figure, (left, right) = _new_figures(2, 9.6, 3.4)
    retrievers = result["retrievers"]
    names = [n for n in retrievers if n in COLOURS][::-1]
    values = [np.asarray(retrievers[n]["precision"]) for n in names]
    left.barh(
        names, [v.mean() for v in values], xerr=[1.96 * stats.standard_error(v) for v in values], height=0.6,
        color=[COLOURS[n] for n in names], error_kw={"capsize": 3, "lw": 1},
    )  # fmt: skip
    left.set(xlabel="precision at 6 (share)", xlim=(0, 1.05))
    styles = {TRAINED: "-", UNMASKED: "--", ALL: "-", f"{ALL}, no mask": "--"}
    for name, style in styles.items():
        losses = retrievers[name]["losses"]
        colour = "#3b5bdb" if name.startswith(ALL) else GREEN
        right.plot(range(1, len(losses) + 1), losses, ls=style, marker="o", ms=3, color=colour, label=name)
    right.set(xlabel="epoch", ylabel="loss (nats)", ylim=(0, None))
    right.legend(frameon=False, fontsize=8)
    return figure


def _new_figures(columns: int, width: float, height: float) -> tuple[Any, Any]:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots(1, columns)
    for axis in np.ravel(axes):
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(alpha=0.25)
    return figure, axes
