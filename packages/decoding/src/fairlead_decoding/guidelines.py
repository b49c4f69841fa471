"""A library of guidelines: rules that a teacher wrote for many inputs, each kept once (Guide-Align, arXiv 2403.11838).

A rule is kept iff its ratio 2 LCS / (|a| + |b|) to every kept rule is below a threshold, on case-folded text with its title;
what it duplicates takes over its sources. Two exact bounds (lengths, common character counts) spare nearly all comparisons
and never change the result. Kept on disk as JSON lines with the embeddings beside them in safetensors, which name the
embedding model that made them. Who writes rules is guideline_writing's, who finds them dual_encoder's.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from fairlead.errors import InputError
from fairlead.files import atomic_write

from .text_similarity import lcs_length

RULES, EMBEDDINGS = "guidelines.jsonl", "embeddings.safetensors"
LONGEST = 65_535
_BUCKETS = 32  # tells a to z and the space apart; what else falls together only loosens the bound
_ROLE_MARKS = re.compile(
    r"<\|[^<>|]*\|>|</?s>|\[/?INST\]|<</?SYS>>|<(?:start|end)_of_turn>|#{3,}"
    r"|^\s*(?:system|user|assistant|human|ai)\s*:(?=\s|$)",
    re.IGNORECASE | re.MULTILINE,
)


@dataclass(frozen=True)
class Guideline:
    """One general rule. source_ids: the inputs that it was written for. kind: about safety or about quality alone."""

    id: str
    title: str
    text: str
    source_ids: tuple[str, ...] = ()
    kind: Literal["safety", "quality"] = "safety"

    @property
    def line(self) -> str:
        """Title and text, as they are compared, embedded and shown."""
        return f"{self.title}: {self.text}" if self.title else self.text


def clean(text: str) -> str:
    """A rule on one line, without what chat templates and prompts could read as structure: rules are untrusted text."""
    while (found := _ROLE_MARKS.sub(" ", text)) != text:
        text = found
    return " ".join(text.split())


def folded(line: str) -> str:
    """The text that rules are compared by: case-folded, single spaces."""
    return " ".join(line.casefold().split())


class GuidelineLibrary:
    """Distinct guidelines in the order in which they came.

    threshold: a rule at least this alike to a kept one is merged into it; above 1 only equal texts are merged.
    embeddings: float32 [N, D] or None, made by `embedding_model`; a new rule makes them void.
    """

    def __init__(self, guidelines: Iterable[Guideline] = (), *, threshold: float = 0.9) -> None:
        if not threshold > 0:
            raise InputError(f"threshold: must be above 0, got {threshold}")
        self.threshold = threshold
        self.embeddings: torch.Tensor | None = None
        self.embedding_model = ""
        self._kept: list[Guideline] = []
        self._place: dict[str, int] = {}  # id, of kept and merged rules alike -> place of the kept one
        self._lines: dict[str, str] = {}
        self._exact: dict[str, int] = {}
        self._blocks = _Blocks()
        for guideline in guidelines:
            self.add(guideline)

    def __len__(self) -> int:
        return len(self._kept)

    def __iter__(self) -> Iterator[Guideline]:
        return iter(self._kept)

    def __getitem__(self, index: int) -> Guideline:
        return self._kept[index]

    @property
    def lines(self) -> list[str]:
        """Every rule as text, in order."""
        return [g.line for g in self._kept]

    @property
    def content_hash(self) -> str:
        """SHA-256 of the rules in order (id, title, text, kind); sources do not enter."""
        rows = [[g.id, g.title, g.text, g.kind] for g in self._kept]
        return hashlib.sha256(json.dumps(rows, ensure_ascii=False).encode()).hexdigest()

    def kept_id(self, id: str) -> str:
        """The id of the kept rule that a rule was merged into (its own when it was kept); InputError when unknown."""
        if id not in self._place:
            raise InputError(f"guideline {id!r}: is not in the library of {len(self)} rules")
        return self._kept[self._place[id]].id

    def add(self, guideline: Guideline) -> str:
        """Add a rule, or merge its sources into the first kept one that it duplicates; returns the kept rule's id.

        A rule that is there already changes nothing. InputError for an empty or endless text, and for an id that stands
        for another text.
        """
        line = folded(guideline.line)
        if not guideline.id or not guideline.text.strip():
            raise InputError(f"guideline {guideline.id!r}: needs an id and a text")
        if len(line) > LONGEST:
            raise InputError(f"guideline {guideline.id!r}: has {len(line)} characters; at most {LONGEST} are allowed")
        known = self._lines.get(guideline.id)
        if known is not None and known != guideline.line:
            raise InputError(f"guideline {guideline.id!r}: stands for {known!r:.60} already, got {guideline.line!r:.60}")
        place = self._place.get(guideline.id, self._exact.get(line))
        if place is None:
            place = self._blocks.first_alike(line, self.threshold)
        if place is None:
            self._keep(guideline, line)
            return guideline.id
        kept = self._kept[place]
        merged = tuple(dict.fromkeys((*kept.source_ids, *guideline.source_ids)))
        self._kept[place] = replace(kept, source_ids=merged)
        self._remember(guideline.id, guideline.line, place)
        return kept.id

    def _keep(self, guideline: Guideline, line: str) -> None:
        place = len(self._kept)
        self._kept.append(guideline)
        self._exact[line] = place
        self._blocks.append(line)
        self._remember(guideline.id, guideline.line, place)
        self.embeddings, self.embedding_model = None, ""

    def _remember(self, id: str, line: str, place: int) -> None:
        self._place[id], self._lines[id] = place, line

    def embed(self, encoder: Any) -> torch.Tensor:
        """Embeddings float32 [N, D] of every rule under an encoder (`dual_encoder`), computed once and kept.

        InputError for an empty library, and for one that another embedding model has embedded.
        """
        if not self._kept:
            raise InputError("library: is empty; add guidelines first")
        if self.embeddings is None:
            self.embeddings, self.embedding_model = encoder.encode_guidelines(self.lines), encoder.name
        self.check_model(encoder.name)
        return self.embeddings

    def check_model(self, embedding_model: str) -> None:
        """InputError when the embeddings were made by another model."""
        if self.embeddings is not None and self.embedding_model != embedding_model:
            raise InputError(
                f"library: was embedded by {self.embedding_model!r}, but {embedding_model!r} is to search it; "
                "use that model, or forget() the embeddings and embed again"
            )

    def forget(self) -> None:
        """Drop the embeddings."""
        self.embeddings, self.embedding_model = None, ""

    def save(self, folder: str | os.PathLike[str]) -> None:
        """Write guidelines.jsonl and, when embedded, embeddings.safetensors; each is whole or not there."""
        from safetensors.torch import save

        path = Path(folder)
        merged: dict[str, dict[str, str]] = {}
        for id, place in self._place.items():
            kept = self._kept[place]
            if id != kept.id:
                merged.setdefault(kept.id, {})[id] = self._lines[id]
        with atomic_write(path / RULES) as stream:
            for g in self._kept:
                stream.write(json.dumps({**asdict(g), "merged": merged.get(g.id, {})}, ensure_ascii=False) + "\n")
        if self.embeddings is None:
            (path / EMBEDDINGS).unlink(missing_ok=True)
            return
        notes = {"embedding_model": self.embedding_model, "content_hash": self.content_hash}
        with atomic_write(path / EMBEDDINGS, "wb") as stream:
            stream.write(save({"embeddings": self.embeddings.contiguous()}, metadata=notes))

    @classmethod
    def load(cls, folder: str | os.PathLike[str], *, embedding_model: str | None = None, threshold: float = 0.9) -> GuidelineLibrary:
        """The library that `save` wrote. InputError when it is none, when its embeddings are of other rules, or of another
        model than `embedding_model` (both are named)."""
        path = Path(folder)
        library = cls(threshold=threshold)
        try:
            lines = (path / RULES).read_text(encoding="utf-8").split("\n")
            for row in (json.loads(line) for line in lines if line.strip()):
                merged = row.pop("merged", {})
                guideline = Guideline(**{**row, "source_ids": tuple(row["source_ids"])})
                if guideline.id in library._place:
                    raise ValueError(f"id {guideline.id!r} stands there twice")
                library._keep(guideline, folded(guideline.line))
                for id, line in merged.items():
                    library._remember(id, line, len(library) - 1)
        except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
            raise InputError(f"{path}: holds no guideline library ({type(error).__name__}: {error})") from None
        if (path / EMBEDDINGS).exists():
            library._read_embeddings(path / EMBEDDINGS)
            if embedding_model is not None:
                library.check_model(embedding_model)
        return library

    def _read_embeddings(self, path: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as stored:
                notes, embeddings = stored.metadata() or {}, stored.get_tensor("embeddings")
        except (OSError, SafetensorError) as error:
            raise InputError(f"{path}: cannot be read as embeddings ({error})") from None
        if notes.get("content_hash") != self.content_hash or len(embeddings) != len(self):
            raise InputError(f"{path}: belongs to another set of rules than {RULES} beside it; delete it and embed again")
        self.embeddings, self.embedding_model = embeddings, notes.get("embedding_model", "")


class _Blocks:
    """Kept texts with what bounds their similarity from above: ratio <= 2 min(|a|, |b|) / (|a| + |b|), and
    ratio <= 2 sum_c min(count_a(c), count_b(c)) / (|a| + |b|); counting buckets of characters keeps that a bound."""

    def __init__(self) -> None:
        self._texts: list[str] = []
        self._lengths = np.zeros(64, dtype=np.int64)
        self._counts = np.zeros((64, _BUCKETS), dtype=np.uint16)

    def append(self, text: str) -> None:
        place = len(self._texts)
        if place == len(self._lengths):
            self._lengths = np.concatenate([self._lengths, np.zeros_like(self._lengths)])
            self._counts = np.concatenate([self._counts, np.zeros_like(self._counts)])
        self._texts.append(text)
        self._lengths[place], self._counts[place] = len(text), _character_counts(text)

    def first_alike(self, text: str, threshold: float) -> int | None:
        """Place of the first kept text whose ratio to `text` reaches the threshold."""
        count = len(self._texts)
        totals = self._lengths[:count] + len(text)
        near = np.flatnonzero(2 * np.minimum(self._lengths[:count], len(text)) >= threshold * totals - 1e-9)
        if len(near):
            common = np.minimum(self._counts[near], _character_counts(text)).sum(1, dtype=np.uint32)
            near = near[2 * common >= threshold * totals[near] - 1e-9]
        for place in near.tolist():
            if 2 * lcs_length(text, self._texts[place]) / totals[place] >= threshold:
                return int(place)
        return None


def _character_counts(text: str) -> np.ndarray:
    codes = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    return np.bincount(codes % _BUCKETS, minlength=_BUCKETS).astype(np.uint16)


def training_rows(
    library: GuidelineLibrary, questions: Mapping[str, str], positives: Mapping[str, Sequence[str]] | None = None, *,
    negatives: int = 1, seed: int = 0,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows {question, positive: [ids], negative: [ids]} for `dual_encoder.train`, one per question that has a positive.

    questions: source id -> text. positives: source id -> guideline ids; by default the rules written for it (merged ones
    are mapped to what was kept). negatives: random rules that are not among its positives. InputError for a positive
    that is not in the library, or a source without text.
    """
    if positives is None:
        found: dict[str, list[str]] = {}
        for g in library:
            for source in g.source_ids:
                found.setdefault(source, []).append(g.id)
        positives = {source: ids for source, ids in found.items() if source in questions}
    everything = [g.id for g in library]
    rng = random.Random(seed)
    rows = []
    for source, ids in positives.items():
        if source not in questions:
            raise InputError(f"source {source!r}: has positives but no question")
        own = list(dict.fromkeys(library.kept_id(id) for id in ids))
        if not own:
            continue
        others = len(everything) - len(own)
        chosen: list[str] = []
        while len(chosen) < min(negatives, others):
            id = rng.choice(everything)
            if id not in own and id not in chosen:
                chosen.append(id)
        rows.append({"question": questions[source], "positive": own, "negative": chosen})
    return rows
