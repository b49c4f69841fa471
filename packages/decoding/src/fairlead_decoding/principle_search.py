"""Principle-guided tree search for better instructions: the data behind P-Aligner (arXiv 2508.04626).

A node is an instruction, an edge one principle applied to it by an improver. V_local(node) is the mean reward of n answers
to the NODE's text, judged against the RAW instruction: that is what keeps the intent. Selection takes
argmax_c Q(c) + w sqrt(ln visits(node) / visits(c)) (Q: principle_tree); the backed-up maximum never selects. Many trees grow
in lockstep: one batch of improver, responder and reward calls per iteration over all of them. The rewriter that learns from
the trees is p_aligner's.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from pydantic import Field

from fairlead.config import Configurable, MethodConfig
from fairlead.errors import InputError

from .principle_tree import (
    Mean,
    Node,
    Principle,
    Tree,
    actions,
    best_node,
    best_path,
    best_worst_pairs,
    load_principles,
    load_trees,
    plant,
    positive_transitions,
    save_trees,
)

__all__ = [
    "Node", "Principle", "PrincipleSearch", "PrincipleSearchConfig", "Tree", "actions", "best_node", "best_path",
    "best_worst_pairs", "load_principles", "load_trees", "local_values", "one_by_one", "plant", "positive_transitions",
    "save_trees", "select", "ucb",
]  # fmt: skip

Improver = Callable[[list[str], list[Principle]], Sequence["str | None"]]
"""(instructions, principles) -> the improved instructions; None where it failed."""
Responder = Callable[[list[str], int], Sequence["Sequence[str] | None"]]
"""(instructions, n) -> n answers to each; None where it failed."""
Reward = Callable[[list[str], list[str]], Any]
"""(raw instructions, answers) -> one number per pair; a `fairlead.kinds.Reward` is one."""


def one_by_one(function: Callable[[str, Any], Any]) -> Callable[[list[str], list[Any]], list[Any]]:
    """A batched improver or reward from one that takes a single pair: (instruction, principle) or (raw, answer)."""
    return lambda firsts, seconds: [function(a, b) for a, b in zip(firsts, seconds, strict=True)]


def ucb(q: float, visits: int, parent_visits: int, w: float) -> float:
    """Q + w sqrt(ln parent_visits / visits)."""
    return q + w * math.sqrt(math.log(parent_visits) / visits)


def select(tree: Tree, w: float, *, standardise: bool = False, mean: Mean = "nested") -> int:
    """Index of the node to expand: down from the root while every principle is used, to the child with the largest
    upper bound (ties: the oldest). standardise: Q as z-score over the V_local known below the root; no spread gives 0."""
    scale = 1.0
    if standardise:
        known = [n.local_mean for n in tree.nodes[1:] if n.local_mean is not None]
        centre = sum(known) / max(1, len(known))
        spread = math.sqrt(sum((v - centre) ** 2 for v in known) / max(1, len(known)))
        scale = 1 / spread if spread > 0 else 0.0
    node = tree.root
    while len(node.children) == len(tree.actions):
        # Q is affine in V_local, so the z-score of Q is Q of the z-scores; their common centre moves all siblings alike.
        bounds = [ucb(tree.value(c, mean) * scale, tree.nodes[c].visits, node.visits, w) for c in node.children]
        node = tree.nodes[node.children[bounds.index(max(bounds))]]
    return node.index


class PrincipleSearchConfig(MethodConfig):
    """Settings of the search; the paper's launch script has w = 0.1 with rewards of about 0.1 to 0.2."""

    iterations: int = Field(20, ge=0, description="new nodes per tree; 0 scores the raw instruction alone")
    n: int = Field(3, ge=1, description="answers per node")
    w: float = Field(0.1, ge=0, allow_inf_nan=False, description="weight of exploration, in units of the reward (of its sd when standardised)")
    standardise: bool = Field(False, description="z-score the values known in a tree before selecting")
    mean: Mean = Field("nested", description="Q as mean of means (the paper's) or as flat mean over the subtree")
    retries: int = Field(4, ge=1, description="improver calls per node before its tree counts as failed")


class PrincipleSearch(Configurable):
    """Grows trees in place. Resumable: trees saved after any iteration and searched again end as if never stopped."""

    Config = PrincipleSearchConfig
    config: PrincipleSearchConfig

    def __call__(
        self, trees: Sequence[Tree], improver: Improver, responder: Responder, reward: Reward, *,
        after: Callable[[int], None] | None = None,
    ) -> list[Tree]:  # fmt: skip
        """The trees, each "finished" or "failed" (searching again tries once more).

        after: called after each iteration with the number of nodes made in it; the place to save. InputError for a
        reward that is NaN or a callable that gives another number of results; the trees stay as they were before that
        iteration.
        """
        for tree in trees:
            if tree.state == "failed" or (tree.state == "finished" and tree.iterations < self.config.iterations):
                tree.state, tree.failure = "growing", ""
        while growing := [t for t in trees if t.state == "growing" and t.iterations < self.config.iterations]:
            made = self._iterate(growing, improver, responder, reward)
            if after is not None:
                after(made)
        self._finish([t for t in trees if t.state == "growing"], responder, reward)
        return list(trees)

    def _iterate(self, trees: list[Tree], improver: Improver, responder: Responder, reward: Reward) -> int:
        c = self.config
        parents = [select(t, c.w, standardise=c.standardise, mean=c.mean) for t in trees]
        chosen = [t.pick(t.unused(p)) for t, p in zip(trees, parents, strict=True)]
        before = [t.nodes[p].instruction for t, p in zip(trees, parents, strict=True)]
        texts = _improve(improver, before, chosen, c.retries)
        grown = [i for i, text in enumerate(texts) if text is not None]
        raws = [trees[i].root.instruction for i in grown]
        answers, values = local_values(responder, reward, [str(texts[i]) for i in grown], raws, c.n)
        for tree in trees:
            tree.draws += 1
        for i in set(range(len(trees))) - set(grown):
            _fail(trees[i], f"the improver gave nothing for {chosen[i].name!r} in {c.retries} calls")
        made = 0
        for i, said, scores in zip(grown, answers, values, strict=True):
            if said is None or scores is None:
                _fail(trees[i], f"the responder gave nothing for the text made with {chosen[i].name!r}")
                continue
            trees[i].attach(parents[i], chosen[i].name, str(texts[i]), said, scores)
            made += 1
        return made

    def _finish(self, trees: list[Tree], responder: Responder, reward: Reward) -> None:
        unscored = [t for t in trees if t.root.local_mean is None]
        raws = [t.root.instruction for t in unscored]
        answers, values = local_values(responder, reward, raws, raws, self.config.n)
        for tree, said, scores in zip(unscored, answers, values, strict=True):
            if said is None or scores is None:
                _fail(tree, "the responder gave nothing for the raw instruction")
            else:
                tree.score_root(said, scores)
        for tree in trees:
            if tree.state == "growing":
                tree.state = "finished"


def _fail(tree: Tree, why: str) -> None:
    tree.state, tree.failure = "failed", why


def _improve(improver: Improver, texts: list[str], principles: list[Principle], retries: int) -> list[str | None]:
    """The improver over a batch; what failed is asked again, `retries` times in all."""
    found: list[str | None] = [None] * len(texts)
    for _ in range(retries):
        open_ = [i for i, text in enumerate(found) if text is None]
        if not open_:
            break
        made = list(improver([texts[i] for i in open_], [principles[i] for i in open_]))
        if len(made) != len(open_):
            raise InputError(f"improver: gave {len(made)} texts for {len(open_)} instructions; one each (or None) is needed")
        for i, text in zip(open_, made, strict=True):
            if text is not None and not isinstance(text, str):
                raise InputError(f"improver: must give text or None, got a {type(text).__name__}")
            found[i] = text if text is not None and text.strip() else None
    return found


def local_values(
    responder: Responder, reward: Reward, texts: list[str], raws: list[str], n: int
) -> tuple[list[list[str] | None], list[list[float] | None]]:
    """n answers to each text and their rewards against the raw instructions: one responder and one reward call.

    None where the responder failed. Use it with fresh answers for figures: the best of many noisy means is too good.
    """
    if not texts:
        return [], []
    answers = [None if a is None else list(a) for a in responder(list(texts), n)]
    if len(answers) != len(texts) or any(a is not None and len(a) != n for a in answers):
        raise InputError(f"responder: must give {n} answers to each of {len(texts)} instructions, or None for one that failed")
    pairs = [(raw, answer) for raw, said in zip(raws, answers, strict=True) for answer in said or ()]
    scores = [float(r) for r in reward([p[0] for p in pairs], [p[1] for p in pairs])] if pairs else []
    if len(scores) != len(pairs):
        raise InputError(f"reward: gave {len(scores)} values for {len(pairs)} answers; one per answer is needed")
    bad = next((i for i, s in enumerate(scores) if math.isnan(s)), None)
    if bad is not None:
        raise InputError(f"reward: gave NaN for an answer to {pairs[bad][0]!r:.80}; a number is needed")
    rest = iter(scores)
    return answers, [None if said is None else [next(rest) for _ in said] for said in answers]
