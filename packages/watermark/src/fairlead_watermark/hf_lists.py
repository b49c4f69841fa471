"""The green lists of transformers' WatermarkLogitsProcessor, bit for bit.

A list is the first int(V gamma) entries of torch.randperm(V) from a generator seeded with
  hf-lefthash  key * last token, whatever the context width
  hf-selfhash  min over the window (candidate included) of key * a * b with int64 wrap-around,
               a = table[w mod 1000003] + 1, b = table[candidate mod 1000003] + 1, table = randperm(1000003) seeded with key
modulo 2^64 - 1 with Python's sign rule. At generation self-hash tries the 40 best tokens only. torch's generators differ
between device classes, so text marked on a GPU is checked with list_device="cuda" on a machine that has one.
Deviation: fewer than 40 tokens, or no green one among them, leave the logits alone, where transformers raises IndexError.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

import torch

from .contexts import Texts
from .mark import Dedup, Score

if TYPE_CHECKING:
    from .kgw import KGWConfig

TABLE_SIZE = 1_000_003
CANDIDATES = 40
CACHE_BYTES = 1 << 28


class PermutationLists:
    """Lists by seed, kept as bit masks and shared by generation and detection."""

    def __init__(self, config: KGWConfig) -> None:
        assert config.context_width is not None
        self._config = config
        self._selfhash = config.scheme == "hf-selfhash"
        self._context = config.context_width
        self.width = config.context_width - self._selfhash
        self._size = int(config.vocab_size * config.gamma)
        self._generator = torch.Generator(device=config.list_device)
        self._masks: OrderedDict[int, torch.Tensor] = OrderedDict()
        self._most = max(64, CACHE_BYTES // config.vocab_size)
        self._table: torch.Tensor | None = None

    def bias(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, delta: float) -> torch.Tensor:
        if ids_BT.shape[1] < self._context or bool((ids_BT[:, -1] < 0).any()):
            return logits_BV
        out_BV = logits_BV.clone()
        for row in range(len(ids_BT)):
            green_V = self._candidates(ids_BT[row], logits_BV[row]) if self._selfhash else self._after(int(ids_BT[row, -1]))
            green_V = green_V.to(logits_BV.device)
            if math.isinf(delta):
                out_BV[row].masked_fill_(~green_V, -math.inf)
            else:
                out_BV[row, green_V] = out_BV[row, green_V] + delta
        return out_BV

    def count(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        ids_BT, lengths = texts.ids_BT, texts.lengths_B.tolist()
        marks_BT = torch.full(ids_BT.shape, -1, dtype=torch.int8)
        for row, length in enumerate(lengths):
            before = [] if context_BH is None else [int(t) for t in context_BH[row] if t >= 0][-self.width :]
            tokens = before + ids_BT[row, :length].tolist()
            seen: set[tuple[int, ...]] = set()
            for place in range(max(self.width, len(before)), len(tokens)):
                window = tokens[place - self.width : place + 1]
                draw = self._draw(window)
                key = tuple(window[:-1]) if dedup == "context" else draw
                if dedup != "none" and key in seen:
                    continue
                seen.add(key)
                marks_BT[row, place - len(before)] = int(self._mask(draw[0])[window[-1]])
        marks_BT = marks_BT.to(ids_BT.device)
        return (marks_BT == 1).sum(1), (marks_BT >= 0).sum(1), marks_BT

    def _draw(self, window: list[int]) -> tuple[int, int]:
        """(seed, token) of the last token of a window: what decides its colour."""
        if self._selfhash:
            return int(self._self_seeds(torch.tensor(window[:-1]), torch.tensor(window[-1:]))[0]), window[-1]
        return self._config.key.reveal() * window[-2], window[-1]

    def _after(self, token: int) -> torch.Tensor:
        return self._mask(self._config.key.reveal() * token)

    def _candidates(self, ids_T: torch.Tensor, logits_V: torch.Tensor) -> torch.Tensor:
        """Greens among the 40 best tokens, bool [V]."""
        green_V = torch.zeros(len(logits_V), dtype=torch.bool)
        if len(logits_V) < CANDIDATES:
            return green_V
        best = logits_V.sort(dim=-1, descending=True).indices[:CANDIDATES].cpu()
        before = ids_T[len(ids_T) - self.width :].cpu() if self.width else ids_T[:0].cpu()
        for token, seed in zip(best.tolist(), self._self_seeds(before, best).tolist(), strict=True):
            green_V[token] = self._mask(seed)[token]
        return green_V

    def _self_seeds(self, before_H: torch.Tensor, candidates_N: torch.Tensor) -> torch.Tensor:
        """Signed minimum over the window of key * a * b, int64 arithmetic that wraps, [N]."""
        if self._table is None:
            self._generator.manual_seed(self._config.key.reveal())
            self._table = torch.randperm(TABLE_SIZE, generator=self._generator, device=self._generator.device).cpu()
        windows_NW = torch.cat([before_H.expand(len(candidates_N), -1), candidates_N[:, None]], 1)
        a_NW = self._table[windows_NW % TABLE_SIZE] + 1
        b_N1 = self._table[candidates_N % TABLE_SIZE][:, None] + 1
        return (self._config.key.reveal() * a_NW * b_N1).amin(1)

    def _mask(self, seed: int) -> torch.Tensor:
        """The list of a seed as bool [V]; the least recently used lists are dropped at 256 MiB."""
        mask = self._masks.get(seed)
        if mask is not None:
            self._masks.move_to_end(seed)
            return mask
        self._generator.manual_seed(seed % (2**64 - 1))
        vocab_size, device = self._config.vocab_size, self._generator.device
        chosen = torch.randperm(vocab_size, generator=self._generator, device=device)[: self._size]
        mask = torch.zeros(vocab_size, dtype=torch.bool)
        mask[chosen.cpu()] = True
        self._masks[seed] = mask
        if len(self._masks) > self._most:
            self._masks.popitem(last=False)
        return mask
