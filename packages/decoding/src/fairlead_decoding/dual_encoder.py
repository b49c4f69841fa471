"""Two towers that find guidelines for an input: score(x, g) = E_q(x) . E_g(g), an inner product without normalisation.

Dense passage retrieval as Guide-Align uses it (arXiv 2403.11838): cross-entropy of each question's positive against the
other rules of its batch and a random negative. Deviation: the columns of a batch are its UNIQUE rules, and every other
positive of a question is masked, since one rule serves many inputs. `EmbeddingBagEncoder` is small enough to train in a
second on a CPU; `HFEncoder` adapts any Hugging Face encoder; `Index` searches exactly.

Shape suffixes: B questions, C columns (rules of a batch), N rules, D width, K results.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import nn

from fairlead import models
from fairlead.errors import InputError
from fairlead.files import atomic_write

_WORD = re.compile(r"\w+")
CHUNK = 65_536


class DualEncoder(nn.Module, ABC):
    """Questions and guidelines -> vectors of one space. `name` says which model made them; a library keeps it."""

    name: str = ""

    @abstractmethod
    def questions(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings float32 [B, D], differentiable."""

    @abstractmethod
    def guidelines(self, texts: Sequence[str]) -> torch.Tensor:
        """Embeddings float32 [C, D], differentiable."""

    def encode_questions(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Embeddings float32 [B, D] on the CPU, without gradients; InputError for no texts."""
        return self._encode(self.questions, texts, batch_size)

    def encode_guidelines(self, texts: Sequence[str], batch_size: int = 64) -> torch.Tensor:
        """Embeddings float32 [N, D] on the CPU, without gradients; InputError for no texts."""
        return self._encode(self.guidelines, texts, batch_size)

    @torch.no_grad()
    def _encode(self, tower: Callable[[Sequence[str]], torch.Tensor], texts: Sequence[str], batch_size: int) -> torch.Tensor:
        if not len(texts):
            raise InputError("encoder: got no texts")
        before = self.training
        self.eval()
        parts = [tower(texts[i : i + batch_size]).float().cpu() for i in range(0, len(texts), batch_size)]
        self.train(before)
        return torch.cat(parts)


def words(text: str) -> list[str]:
    """Lower-cased words; both towers and every use read texts so."""
    return _WORD.findall(text.lower())


class EmbeddingBagEncoder(DualEncoder):
    """The mean of word vectors, one table per tower; words outside the vocabulary are left out (all unknown: zeros)."""

    def __init__(self, vocabulary: Sequence[str], width: int = 64, seed: int = 0) -> None:
        super().__init__()
        if not vocabulary or width < 1:
            raise InputError(f"EmbeddingBagEncoder: needs a vocabulary and a width of at least 1, got {len(vocabulary)} words, width {width}")
        self.vocabulary = {word: i for i, word in enumerate(vocabulary)}
        noise = torch.Generator().manual_seed(seed)
        tables = [torch.randn(len(self.vocabulary), width, generator=noise) / width**0.5 for _ in range(2)]
        self.question_table, self.guideline_table = (nn.EmbeddingBag.from_pretrained(t, freeze=False, mode="mean") for t in tables)

    @classmethod
    def for_texts(cls, texts: Sequence[str], width: int = 64, seed: int = 0) -> EmbeddingBagEncoder:
        """An untrained encoder that knows every word of these texts."""
        return cls(sorted({word for text in texts for word in words(text)}), width, seed)

    @property
    def name(self) -> str:  # type: ignore[override]
        """The kind, the width and a hash of vocabulary and weights: another training is another model."""
        digest = hashlib.sha256(json.dumps(list(self.vocabulary)).encode())
        for table in (self.question_table, self.guideline_table):
            digest.update(table.weight.detach().cpu().float().numpy().tobytes())
        return f"embedding-bag-{self.question_table.embedding_dim}-{digest.hexdigest()[:12]}"

    def questions(self, texts: Sequence[str]) -> torch.Tensor:
        return self._mean(self.question_table, texts)

    def guidelines(self, texts: Sequence[str]) -> torch.Tensor:
        return self._mean(self.guideline_table, texts)

    def _mean(self, table: nn.EmbeddingBag, texts: Sequence[str]) -> torch.Tensor:
        ids = [[self.vocabulary[w] for w in words(text) if w in self.vocabulary] for text in texts]
        offsets = torch.tensor([0, *(len(row) for row in ids[:-1])]).cumsum(0)
        flat = torch.tensor([i for row in ids for i in row], dtype=torch.int64)
        device = table.weight.device
        return table(flat.to(device), offsets.to(device))

    def save(self, path: str | os.PathLike[str]) -> None:
        """Tables and vocabulary in one safetensors file."""
        from safetensors.torch import save

        tables = {"questions": self.question_table.weight.detach(), "guidelines": self.guideline_table.weight.detach()}
        with atomic_write(path, "wb") as stream:
            stream.write(save(tables, metadata={"vocabulary": json.dumps(list(self.vocabulary))}))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> EmbeddingBagEncoder:
        """The encoder that `save` wrote; InputError for another file."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), "pt") as stored:
                vocabulary = json.loads((stored.metadata() or {})["vocabulary"])
                tables = stored.get_tensor("questions"), stored.get_tensor("guidelines")
        except (OSError, SafetensorError, KeyError, ValueError) as error:
            raise InputError(f"{path}: is no saved EmbeddingBagEncoder ({type(error).__name__}: {error})") from None
        found = cls(vocabulary, tables[0].shape[1])
        for bag, table in zip((found.question_table, found.guideline_table), tables, strict=True):
            bag.weight.data.copy_(table)
        return found


class HFEncoder(DualEncoder):
    """A Hugging Face encoder as both towers, or one each.

    question_model: folder, hub id or zoo: name (`zoo:minilm-l6-v2`), or a model object (then with its tokenizer).
    guideline_model: the other tower; None shares the first. pooling: "mean" over real tokens (sentence transformers) or
    "cls" (dense passage retrieval). normalise: only for towers that were trained with unit vectors.
    """

    def __init__(
        self, question_model: Any, guideline_model: Any = None, tokenizer: Any = None, *, pooling: Literal["mean", "cls"] = "mean",
        normalise: bool = False, max_length: int = 512, name: str = "",
    ) -> None:  # fmt: skip
        super().__init__()
        if pooling not in ("mean", "cls"):
            raise InputError(f"pooling: must be 'mean' or 'cls', got {pooling!r}")
        if isinstance(question_model, nn.Module) and tokenizer is None:
            raise InputError("HFEncoder: tokenizer is required with a model that is given as an object")
        self.tokenizer = tokenizer or models.load_tokenizer(question_model)
        self.question_tower = _encoder(question_model)
        self.guideline_tower = self.question_tower if guideline_model is None else _encoder(guideline_model)
        self.pooling, self.normalise, self.max_length = pooling, normalise, max_length
        parts = [m if isinstance(m, str) else type(m).__name__ for m in (question_model, guideline_model) if m is not None]
        self.name = name or " + ".join([*(str(p) for p in parts), pooling] + ["normalised"] * normalise)
        self.eval()

    def questions(self, texts: Sequence[str]) -> torch.Tensor:
        return self._pooled(self.question_tower, texts)

    def guidelines(self, texts: Sequence[str]) -> torch.Tensor:
        return self._pooled(self.guideline_tower, texts)

    def _pooled(self, tower: Any, texts: Sequence[str]) -> torch.Tensor:
        inputs = self.tokenizer(
            list(texts), padding=True, padding_side="right", truncation=True, max_length=self.max_length, return_tensors="pt"
        ).to(next(tower.parameters()).device)
        hidden_BTD = tower(**inputs).last_hidden_state
        if self.pooling == "cls":
            pooled = hidden_BTD[:, 0]
        else:
            mask_BT1 = inputs["attention_mask"][..., None].to(hidden_BTD.dtype)
            pooled = (hidden_BTD * mask_BT1).sum(1) / mask_BT1.sum(1).clamp(min=1)
        return F.normalize(pooled, dim=-1) if self.normalise else pooled


def _encoder(model: Any) -> Any:
    """An encoder from its name, or the object itself."""
    if isinstance(model, nn.Module):
        return model
    from transformers import AutoModel
    from transformers.utils import logging

    from fairlead.errors import DataUnavailableError

    path = models.resolve(model)
    logging.disable_progress_bar()
    try:
        return AutoModel.from_pretrained(path, dtype=torch.float32)
    except (OSError, ValueError) as error:
        cause = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise DataUnavailableError(f"{model}: no encoder to be had: {cause}") from None


def masked_in_batch_loss(
    questions_BD: torch.Tensor, guidelines_CD: torch.Tensor, targets_B: torch.Tensor, masked_BC: torch.Tensor | None = None
) -> torch.Tensor:
    """Cross-entropy float [B] of each question's positive column among all columns that are not masked for it.

    targets_B: int64, column of the positive. masked_BC: bool, True for columns that are no negatives of the row (its
    other positives). The loss of a batch is the mean. InputError for a target that is masked.
    """
    scores_BC = questions_BD @ guidelines_CD.T
    if masked_BC is not None:
        if bool(masked_BC.gather(1, targets_B[:, None]).any()):
            raise InputError("masked_BC: hides the target of a row; only other positives may be masked")
        scores_BC = scores_BC.masked_fill(masked_BC, -torch.inf)
    return F.cross_entropy(scores_BC, targets_B, reduction="none")


def batch_columns(rows: Sequence[Mapping[str, Any]], drawn: Sequence[str], mask: bool = True) -> tuple[list[str], torch.Tensor, torch.Tensor | None]:
    """Columns of a batch: (ids of its unique rules, target column int64 [B], masked bool [B, C]).

    rows: {positive: [ids], negative: [ids]}; drawn: the positive drawn for each row. mask False is the plain loss of the
    original: a column per row and per negative, repeats included, nothing masked.
    """
    negatives = [id for row in rows for id in row["negative"]]
    if not mask:
        return [*drawn, *negatives], torch.arange(len(rows)), None
    ids = list(dict.fromkeys([*drawn, *negatives]))
    column = {id: c for c, id in enumerate(ids)}
    masked_BC = torch.zeros(len(rows), len(ids), dtype=torch.bool)
    for b, (row, own) in enumerate(zip(rows, drawn, strict=True)):
        for id in row["positive"]:
            if id != own and id in column:
                masked_BC[b, column[id]] = True
    return ids, torch.tensor([column[id] for id in drawn]), masked_BC


def train(
    encoder: DualEncoder, rows: Sequence[Mapping[str, Any]], texts: Mapping[str, str], *, epochs: int = 8, batch_size: int = 32,
    learning_rate: float = 1e-2, grad_norm: float = 2.0, mask: bool = True, seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
) -> list[float]:  # fmt: skip
    """Train in place with Adam; the mean loss of each epoch.

    rows: of `guidelines.training_rows`; a positive is drawn per row and epoch. texts: guideline id -> text. For a pretrained
    encoder take the published learning rate of 2e-5. InputError for rows that name a rule without text, and for none.
    """
    if not rows:
        raise InputError("train: got no rows")
    for row in rows:
        if not row["positive"]:
            raise InputError(f"row {row['question']!r:.60}: has no positive")
        for id in (*row["positive"], *row["negative"]):
            if id not in texts:
                raise InputError(f"row {row['question']!r:.60}: guideline {id!r} has no text")
    rng = random.Random(seed)
    optimizer = torch.optim.Adam(encoder.parameters(), lr=learning_rate, eps=1e-8)
    losses: list[float] = []
    encoder.train()
    for epoch in range(epochs):
        order = list(range(len(rows)))
        rng.shuffle(order)
        total = 0.0
        for start in range(0, len(order), batch_size):
            batch = [rows[i] for i in order[start : start + batch_size]]
            drawn = [rng.choice(row["positive"]) for row in batch]
            ids, targets_B, masked_BC = batch_columns(batch, drawn, mask)
            questions_BD = encoder.questions([row["question"] for row in batch])
            guidelines_CD = encoder.guidelines([texts[id] for id in ids])
            device = questions_BD.device
            loss_B = masked_in_batch_loss(
                questions_BD, guidelines_CD, targets_B.to(device), None if masked_BC is None else masked_BC.to(device)
            )
            optimizer.zero_grad(set_to_none=True)
            loss_B.mean().backward()
            nn.utils.clip_grad_norm_(encoder.parameters(), grad_norm)
            optimizer.step()
            total += float(loss_B.detach().sum())
        losses.append(total / len(rows))
        if progress is not None:
            progress(epoch + 1, epochs)
    encoder.eval()
    return losses


class Index:
    """Exact inner-product search over embeddings float32 [N, D], in chunks of N with a running best list."""

    def __init__(self, embeddings_ND: torch.Tensor, chunk: int = CHUNK) -> None:
        if embeddings_ND.ndim != 2 or not len(embeddings_ND) or chunk < 1:
            raise InputError(f"index: needs embeddings [N, D] with N of at least 1 and a chunk of at least 1, got {tuple(embeddings_ND.shape)}, {chunk}")
        self.embeddings_ND, self.chunk = embeddings_ND, chunk

    def search(self, questions_BD: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(ids int64 [B, K], scores float32 [B, K]) of the K = min(k, N) largest products, best first; ties: the lower id."""
        width = self.embeddings_ND.shape[1]
        if questions_BD.ndim != 2 or questions_BD.shape[1] != width or k < 1:
            raise InputError(f"search: needs questions [B, {width}] and k of at least 1, got {tuple(questions_BD.shape)}, k = {k}")
        best_BK = torch.empty(len(questions_BD), 0, dtype=torch.float32)
        ids_BK = torch.empty(len(questions_BD), 0, dtype=torch.int64)
        for start in range(0, len(self.embeddings_ND), self.chunk):
            scores_BC = (questions_BD @ self.embeddings_ND[start : start + self.chunk].T).float()
            columns_BC = torch.arange(start, start + scores_BC.shape[1]).expand(len(scores_BC), -1)
            best_BK, ids_BK = _best(torch.cat([best_BK, scores_BC], 1), torch.cat([ids_BK, columns_BC], 1), k)
        return ids_BK, best_BK


def _best(scores_BC: torch.Tensor, ids_BC: torch.Tensor, k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The k largest of each row, best first; of equal scores those that stand further left. Ids rise from left to right
    within equal scores, since earlier chunks come first."""
    size = min(k, scores_BC.shape[1])
    top_BK, places_BK = scores_BC.topk(size, dim=1)
    crowded = (scores_BC >= top_BK[:, -1:]).sum(1) > size  # topk may take any of equal scores: only a full sort is exact
    if bool(crowded.any()):
        places_BK[crowded] = scores_BC[crowded].sort(dim=1, descending=True, stable=True).indices[:, :size]
    places_BK = places_BK.sort(dim=1).values
    ranked = scores_BC.gather(1, places_BK).sort(dim=1, descending=True, stable=True)
    return ranked.values, ids_BC.gather(1, places_BK.gather(1, ranked.indices))
