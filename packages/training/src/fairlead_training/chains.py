"""Chains of thought for AFT (arXiv 2309.02144): sample, label by the final answer, fold repeats; and measure the assessment.

The score of a chain is its mean token log-probability s. The assessment accuracy of a question is the share of its pairs
of a right chain p and a wrong chain n with s_p > s_n; that of a data set is the mean over questions with both kinds. The
loss is the objective `aft`'s; chains are sampled once, before training, and kept: sampling at every step is another method.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import Any

import torch

from fairlead.errors import InputError
from fairlead.generation import generate
from fairlead.records import Row

from .objectives.common import grouped
from .references import by_tokens
from .statistics import sequence_stats
from .tokens import Overlong, Report, tokenize

Sample = Callable[[Sequence[Any], int], Sequence[Sequence[str]]]
NUMBER = re.compile(r"(?:(?<![\w)])-)?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?")  # a minus after a term is a subtraction


@dataclass
class Counts:
    """What became of the questions and their chains.

    questions: asked. right, wrong: chains kept. unanswered: those of the wrong in which no answer was found. missing: chains the sampler
    did not give (it was cut off). empty, repeated: chains left out. usable: questions with both kinds. dropped: questions that give
    no row, for they have no reference chain and not both kinds, or nothing beside the reference.
    """

    questions: int = 0
    right: int = 0
    wrong: int = 0
    unanswered: int = 0
    missing: int = 0
    empty: int = 0
    repeated: int = 0
    usable: int = 0
    dropped: int = 0

    def line(self) -> str:
        """One line for a log."""
        return (
            f"{self.questions} questions, {self.usable} with right and wrong chains, {self.dropped} dropped; {self.right} right, {self.wrong} wrong "
            f"({self.unanswered} without an answer); left out: {self.missing} missing, {self.empty} empty, {self.repeated} repeated"
        )


def sampler(model: Any, tokenizer: Any, **settings: Any) -> Sample:
    """A sampler that draws from a Hugging Face causal LM; settings: those of `fairlead.generation.generate` except n.

    Chains that reach max_new_tokens are not given: with an end put to them they would be texts the model never wrote.
    """

    def sample(prompts: Sequence[Any], k: int) -> list[list[str]]:
        made = generate(model, tokenizer, prompts, n=k, **settings)
        return [[_continuation(tokenizer, p, g) for g in found if g.finished] for p, found in zip(prompts, made, strict=True)]

    return sample


def _continuation(tokenizer: Any, prompt: Any, generation: Any) -> str:
    """The text that follows a prompt with the space between them, which decoding the answer alone may lose."""
    if isinstance(prompt, str):
        ids = list(tokenizer(prompt)["input_ids"])
        before, whole = (tokenizer.decode(x, skip_special_tokens=True) for x in (ids, ids + generation.ids.tolist()))
        if whole.startswith(before):
            return str(whole[len(before) :])
    return str(generation.text)


def final_number(text: str) -> str | None:
    """The last number of a text, or of what follows its last "####" (GSM8K); None where there is none."""
    found = NUMBER.findall(text.rpartition("####")[2])
    return found[-1].replace(",", "") if found else None


def same_answer(found: str, gold: Any) -> bool:
    """Whether two answers are equal as numbers or, after whitespace folding, as texts."""
    a, b = (" ".join(str(x).split()) for x in (found, gold))
    try:
        return a == b or Decimal(a.replace(",", "")) == Decimal(b.replace(",", ""))
    except InvalidOperation:
        return False


def collect(
    questions: Iterable[Mapping[str, Any]], sample: Sample, extract_answer: Callable[[str], str | None] = final_number, *, k: int = 3,
    is_correct: Callable[[str, Any], bool] = same_answer,
) -> tuple[list[Row], Counts]:  # fmt: skip
    """Rows of labelled chains, one per question, and what was left out.

    questions: dicts with prompt (text or chat messages), answer (the gold one) and, where there is one, completion, the reference chain.
    sample(prompts, k): at most k texts for each prompt. A chain without an answer is wrong; chains equal after whitespace folding count
    once. A row has prompt, completions, ranks (0 right, 1 wrong) and reference, which marks the reference chain among the completions: it
    is no candidate, though a sampled chain that equals it is one. InputError for k < 1, missing columns, a sampler that gives another
    number of lists or more than k texts.
    """
    asked = [dict(q) for q in questions]
    if k < 1:
        raise InputError(f"k: at least one chain for each question is needed, got {k}")
    for i, question in enumerate(asked):
        for column in ("prompt", "answer"):
            if question.get(column) is None:
                raise InputError(f"question {i}: column {column} is missing; needed are prompt and answer, and completion for the reference chain")
    given = sample([q["prompt"] for q in asked], k) if asked else []
    if len(given) != len(asked):
        raise InputError(f"sample: gave chains for {len(given)} prompts, asked for {len(asked)}")
    counts, rows = Counts(questions=len(asked)), []
    for i, (question, texts) in enumerate(zip(asked, given, strict=True)):
        if len(texts) > k:
            raise InputError(f"sample: gave {len(texts)} chains for prompt {i}, asked for {k}")
        counts.missing += k - len(texts)
        chains, ranks = _labelled(texts, question["answer"], extract_answer, is_correct, counts)
        usable, reference = len(set(ranks)) == 2, question.get("completion")
        counts.usable += usable
        if not chains or (reference is None and not usable):
            counts.dropped += 1
            continue
        marks = [False] * len(chains)
        if reference is not None:
            chains, ranks, marks = [reference, *chains], [0, *ranks], [True, *marks]
        row = Row(prompt=question["prompt"], completions=chains, ranks=ranks, reference=marks)
        row.where = f"question {i}"
        rows.append(row)
    return rows, counts


def _labelled(
    texts: Sequence[str], gold: Any, extract_answer: Callable[[str], str | None], is_correct: Callable[[str, Any], bool], counts: Counts
) -> tuple[list[str], list[int]]:
    """The chains that are left of one question, and their ranks."""
    chains: dict[str, str] = {}
    for text in texts:
        folded = " ".join(text.split())
        counts.empty += not folded
        counts.repeated += folded in chains
        if folded:
            chains.setdefault(folded, text)
    ranks = []
    for text in chains.values():
        answer = extract_answer(text)
        right = answer is not None and bool(is_correct(answer, gold))
        counts.unanswered += answer is None
        counts.right += right
        counts.wrong += not right
        ranks.append(0 if right else 1)
    return list(chains.values()), ranks


def tokenize_chains(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, *, max_length: int | None = 1024, overlong: Overlong = "drop"
) -> tuple[list[dict[str, Any]], Report]:
    """Rows of `collect` as PreferenceTrainer takes them, with the column `reference`, and what became of the others."""
    made: list[dict[str, Any]] = []
    whole = Report()
    for index, row in enumerate(rows):
        placed = Row(row)
        placed.where = getattr(row, "where", "") or f"row {index}"
        marks = row.get("reference")
        if marks is None or len(marks) != len(row.get("completions", ())):
            raise InputError(f"{placed.where}: reference: one mark for each completion is needed")
        found, report = tokenize([placed], tokenizer, max_length=max_length, overlong=overlong)
        made += [{**one, "reference": list(marks)} for one in found]
        whole.truncated += report.truncated
        whole.merged += report.merged
        whole.dropped = dict(Counter(whole.dropped) + Counter(report.dropped))
    whole.rows = len(made)
    return made, whole


@torch.no_grad()
def chain_scores(model: Any, rows: Sequence[Mapping[str, Any]]) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Scores (float), labels (minus the rank) and groups (the row) of the candidates of tokenised rows, all [S]."""
    if not rows:
        raise InputError("rows: there is none to score")
    parts, first, training = [], 0, model.training
    model.eval()
    try:
        for part in by_tokens(rows):
            stats = sequence_stats(model, part)
            if stats.rank is None or stats.group is None:
                raise InputError("rows: the column rank is missing; tokenize_chains makes it")
            marks = stats.extra.get("reference")
            chain = torch.ones_like(stats.rank, dtype=torch.bool) if marks is None else ~marks.bool()
            parts.append(((stats.logp / stats.length)[chain], -stats.rank[chain], stats.group[chain] + first))
            first += len(part)
    finally:
        model.train(training)
    scores, labels, group = (torch.cat(column) for column in zip(*parts, strict=True))
    return scores, labels, group


def assess(model: Any, rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Assessment accuracy of a model on tokenised rows (NaN where no question is usable), and the share of usable questions."""
    scores, labels, group = chain_scores(model, rows)
    right, pairs = _pairs(scores, labels, group)
    return {"assessment_accuracy": float((right / pairs)[pairs > 0].mean()), "usable": int((pairs > 0).sum()) / len(rows)}


def assessment_accuracy(scores: Any, labels: Any, group: Any) -> float:
    """Mean over questions of the share of their pairs in which the better chain has the strictly higher score.

    scores: numbers [S]. labels: [S], true for right chains, or any numbers of which the higher is better. group: whole numbers [S], the
    question of each chain, in any order. NaN where no question has chains of two kinds. InputError for no chain, NaN scores, other lengths.
    """
    right, pairs = _pairs(*_columns(scores, labels, group))
    return float((right / pairs)[pairs > 0].mean())


def boundary_beta(scores: Any, labels: Any, group: Any, below: float = 0.1) -> float:
    """A `boundary_beta` for the objective aft: so large that a share `below` of wrong chains lie under the boundary, or 0.

    The quantile over wrong chains n of min_p s_p - s_n. Arguments: see `assessment_accuracy`, labels of two kinds. InputError where no
    question has both kinds.
    """
    a_GN, better_GNN = _tables(*_columns(scores, labels, group))
    gaps = (a_GN[:, :, None].masked_fill(~better_GNN, math.inf).min(1).values - a_GN)[better_GNN.any(1)]
    if not len(gaps):
        raise InputError("labels: no question has both a right and a wrong chain")
    return max(0.0, float(gaps.quantile(1 - below)))


def _columns(scores: Any, labels: Any, group: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The three columns as tensors, checked."""
    s, label, g = torch.as_tensor(scores, dtype=torch.float64), torch.as_tensor(labels), torch.as_tensor(group)
    if s.ndim != 1 or not len(s) or s.shape != label.shape or s.shape != g.shape:
        raise InputError(f"scores, labels, group: one number per chain is needed, got shapes {list(s.shape)}, {list(label.shape)}, {list(g.shape)}")
    if bool(s.isnan().any()):
        raise InputError(f"scores: chain {int(s.isnan().nonzero()[0])} is NaN")
    if g.dtype.is_floating_point:
        raise InputError(f"group: must be whole numbers, got {g.dtype}")
    return s, label.to(torch.float64), g


def _tables(scores: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Scores [G, N], and [G, N, N]: whether chain i of a question is better than its chain j."""
    index, taken = grouped(group)
    a_GN, l_GN = scores[index], labels[index]
    return a_GN, (l_GN[:, :, None] > l_GN[:, None, :]) & taken[:, :, None] & taken[:, None, :]


def _pairs(scores: torch.Tensor, labels: torch.Tensor, group: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pairs in the right order and all pairs of each question, [G]."""
    a_GN, better_GNN = _tables(scores, labels, group)
    return ((a_GN[:, :, None] > a_GN[:, None, :]) & better_GNN).sum((1, 2)), better_GNN.sum((1, 2))
