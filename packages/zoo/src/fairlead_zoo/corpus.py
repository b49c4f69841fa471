"""Turns become token ids: packed documents for the base model, padded batches and preference pairs for the rest.

Every batch is a pure function of (world seed, stage, seed, step), so training resumes in the middle without replaying
anything. Leaves to others: which turns a stage draws (stages), the optimiser (train).

Shape suffixes: B rows, T tokens.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from . import lexicon as lx
from .world import Turn, World

if TYPE_CHECKING:
    import torch

IGNORE = -100
"""Label of tokens without loss, as in transformers."""


@dataclass(frozen=True)
class Batch:
    """ids_BT and labels_BT int64 (labels are not shifted, IGNORE without loss); mask_BT int64 or None when unpadded."""

    ids_BT: torch.Tensor
    labels_BT: torch.Tensor
    mask_BT: torch.Tensor | None = None


@dataclass(frozen=True)
class Pair:
    """A preference pair: one prompt, a better and a worse answer."""

    question: str
    chosen: str
    rejected: str
    task: str
    kind: str


def generator(*parts: object) -> random.Random:
    """A random stream named by its parts; the same on every machine and Python."""
    digest = hashlib.blake2b("/".join(map(str, parts)).encode(), digest_size=16).digest()
    return random.Random(int.from_bytes(digest, "big"))


class Encoder:
    """Text -> ids by table look-up, equal to the tokenizer's but fast enough to stay out of the profile."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.index = {word: k for k, word in enumerate(world.vocabulary())}
        self.pad, self.bos, self.user, self.bot, self.end = (
            self.index[t] for t in (lx.PAD, lx.BOS, lx.USER, lx.BOT, lx.END)
        )

    def words(self, text: str) -> list[int]:
        """Ids of a sentence of the world; KeyError for a word outside it."""
        return [self.index[word] for word in text.split()]

    def prompt(self, question: str) -> list[int]:
        """<user> question <end> <bot>"""
        return [self.user, *self.words(question), self.end, self.bot]

    def document(
        self, turns: Sequence[Turn | tuple[str, str]], tag: str | None = None, full: bool = False
    ) -> tuple[list[int], list[int]]:
        """(ids, labels) of a conversation from <bos> on; loss on answers with their <end>, or on all when `full`."""
        ids = [self.bos] if tag is None else [self.bos, self.index[tag]]
        labels = list(ids) if full else [IGNORE] * len(ids)
        for turn in turns:
            question, answer = (turn.question, turn.answer) if isinstance(turn, Turn) else turn
            prompt, reply = self.prompt(question), [*self.words(answer), self.end]
            ids += prompt + reply
            labels += (prompt if full else [IGNORE] * len(prompt)) + reply
        return ids, labels

    def padded(self, documents: Sequence[tuple[list[int], list[int]]]) -> Batch:
        """Documents side by side, padded on the right (a causal model never looks there)."""
        import torch

        width = max(len(ids) for ids, _ in documents)
        ids_BT = torch.full((len(documents), width), self.pad)
        labels_BT = torch.full((len(documents), width), IGNORE)
        mask_BT = torch.zeros((len(documents), width), dtype=torch.int64)
        for row, (ids, labels) in enumerate(documents):
            ids_BT[row, : len(ids)] = torch.tensor(ids)
            labels_BT[row, : len(ids)] = torch.tensor(labels)
            mask_BT[row, : len(ids)] = 1
        return Batch(ids_BT, labels_BT, mask_BT)

    def packed(self, documents: Sequence[tuple[list[int], list[int]]], rows: int, width: int) -> Batch:
        """Documents end to end, cut into rows; attention leaks across documents, <bos> tells them apart."""
        import torch

        ids = [i for document, _ in documents for i in document][: rows * width]
        labels = [i for _, document in documents for i in document][: rows * width]
        return Batch(torch.tensor(ids).view(rows, width), torch.tensor(labels).view(rows, width))
