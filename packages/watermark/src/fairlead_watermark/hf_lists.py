"""The green lists of transformers' WatermarkLogitsProcessor, bit for bit.

A list is the first int(V gamma) entries of torch.randperm(V) from a generator seeded with
  hf-lefthash  key * last token, whatever the context width
  hf-selfhash  min over the window (candidate included) of key * a * b with int64 wrap-around,
               a = table[w mod 1000003] + 1, b = table[candidate mod 1000003] + 1, table = randperm(1000003) seeded with key
modulo 2^64 - 1 with Python's sign rule. At generation self-hash tries the 40 best tokens only. torch's generators differ
between device classes, so text marked on a GPU is checked with list_device="cuda" on a machine that has one.
Deviation: fewer than 40 tokens, or no green one among them, leave the logits alone, where transformers raises IndexError.

Shape suffixes: B rows, T tokens, V vocabulary, W tokens of a window (candidate last), N windows.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from typing import TYPE_CHECKING

import numpy as np
import torch

from fairlead.errors import ConfigError

from .contexts import MISSING, Texts
from .mark import Dedup, Score

if TYPE_CHECKING:
    from .kgw import KGWConfig

TABLE_SIZE = 1_000_003
CANDIDATES = 40
CACHE_BYTES = 1 << 28


class PermutationLists:
    """Lists by seed, kept as bit masks and shared by all rows, generation and detection."""

    def __init__(self, config: KGWConfig) -> None:
        assert config.context_width is not None
        if config.list_device == "cuda" and not torch.cuda.is_available():
            raise ConfigError("KGW: list_device 'cuda' needs a GPU here: its generator draws other lists than the CPU's")
        self._config = config
        self._selfhash = config.scheme == "hf-selfhash"
        self.width = config.context_width - self._selfhash
        self._size = int(config.vocab_size * config.gamma)
        self._generator = torch.Generator(device=config.list_device)
        self._lists: OrderedDict[int, np.ndarray] = OrderedDict()
        self._most = max(64, 8 * CACHE_BYTES // config.vocab_size)
        self._table: torch.Tensor | None = None

    def bias(self, ids_BT: torch.Tensor, logits_BV: torch.Tensor, delta: float) -> torch.Tensor:
        width = self._config.context_width
        assert width is not None
        if ids_BT.shape[1] < width:
            return logits_BV
        context_BW = ids_BT[:, ids_BT.shape[1] - width :].cpu()
        out_BV = logits_BV.clone()
        for row, context_W in enumerate(context_BW):
            if int(context_W.min()) < 0:  # padding: the row alone would be too short
                continue
            green_N = self._candidates(context_W, logits_BV[row]) if self._selfhash else self._after(int(context_W[-1]))
            green_N = green_N.to(logits_BV.device)
            if math.isfinite(delta):
                out_BV[row, green_N] = out_BV[row, green_N] + delta
            elif len(green_N):
                out_BV[row] = torch.full_like(out_BV[row], -math.inf).index_copy(0, green_N, logits_BV[row, green_N])
        return out_BV

    def count(self, texts: Texts, context_BH: torch.Tensor | None, dedup: Dedup) -> Score:
        ids_BT, width = texts.ids_BT.cpu(), self.width
        before_BH = ids_BT.new_full((len(ids_BT), width), MISSING)
        if context_BH is not None and width:
            known_BH = context_BH.cpu()[:, -width:]
            before_BH[:, width - known_BH.shape[1] :] = known_BH
        if ids_BT.shape[1] == 0:
            nothing_B = torch.zeros_like(texts.lengths_B)
            return nothing_B, nothing_B, texts.ids_BT.to(torch.int8)
        windows_BTW = torch.cat([before_BH, ids_BT], 1).unfold(1, width + 1, 1)
        valid_BT = (windows_BTW >= 0).all(2)
        windows_NW = windows_BTW[valid_BT]
        seeds_N = self._self_seeds(windows_NW) if self._selfhash else windows_NW[:, -2]
        seeds_S, draws_N = seeds_N.unique(return_inverse=True)
        tokens_N = windows_NW[:, -1]
        if dedup != "none":
            if dedup == "pair":
                fingerprint_N = draws_N * self._config.vocab_size + tokens_N
            elif self._selfhash:
                contexts_NW = torch.nn.functional.pad(windows_NW[:, :-1], (1, 0))  # never of width 0
                fingerprint_N = contexts_NW.unique(dim=0, return_inverse=True)[1]
            else:
                fingerprint_N = draws_N
            first_BT = _first(fingerprint_N, valid_BT)
            draws_N, tokens_N = draws_N[first_BT[valid_BT]], tokens_N[first_BT[valid_BT]]
            valid_BT = first_BT
        marks_BT = torch.full(ids_BT.shape, -1, dtype=torch.int8)
        marks_BT[valid_BT] = self._colours(seeds_S, draws_N, tokens_N)
        marks_BT = marks_BT.to(texts.ids_BT.device)
        return (marks_BT == 1).sum(1), (marks_BT >= 0).sum(1), marks_BT

    def _colours(self, seeds_S: torch.Tensor, draws_N: torch.Tensor, tokens_N: torch.Tensor) -> torch.Tensor:
        """1 where a token is on its list, else 0: int8 [N]. One permutation per distinct seed."""
        order = draws_N.argsort(stable=True)
        tokens, edges = tokens_N[order].numpy(), np.cumsum(draws_N.bincount(minlength=len(seeds_S)).numpy())
        sorted_N = np.empty(len(tokens), dtype=np.int8)
        start = 0
        for seed, stop in zip(seeds_S.tolist(), edges.tolist(), strict=True):
            if stop > start:
                here = tokens[start:stop]
                bits = self._list(seed if self._selfhash else self._config.key.reveal() * seed)
                sorted_N[start:stop] = bits[here >> 3] >> (here & 7).astype(np.uint8) & 1
            start = stop
        return torch.empty(len(tokens), dtype=torch.int8).index_copy(0, order, torch.from_numpy(sorted_N))

    def _after(self, token: int) -> torch.Tensor:
        """Green tokens after a token, int64 [N]."""
        bits = self._list(self._config.key.reveal() * token)
        flags = np.unpackbits(bits, count=self._config.vocab_size, bitorder="little")
        return torch.from_numpy(np.flatnonzero(flags))

    def _candidates(self, context_W: torch.Tensor, logits_V: torch.Tensor) -> torch.Tensor:
        """Green tokens among the 40 best, int64 [N]. A full sort, because its order of ties is transformers' order."""
        if len(logits_V) < CANDIDATES:
            return context_W[:0]
        best = logits_V.sort(dim=-1, descending=True).indices[:CANDIDATES].cpu()
        before_NW = context_W[len(context_W) - self.width :].expand(CANDIDATES, -1)
        seeds_S, draws_N = self._self_seeds(torch.cat([before_NW, best[:, None]], 1)).unique(return_inverse=True)
        return best[self._colours(seeds_S, draws_N, best) == 1]

    def _self_seeds(self, windows_NW: torch.Tensor) -> torch.Tensor:
        """Signed minimum over the window of key * a * b, int64 arithmetic that wraps, [N]."""
        if self._table is None:
            self._generator.manual_seed(self._config.key.reveal())
            self._table = torch.randperm(TABLE_SIZE, generator=self._generator, device=self._generator.device).cpu()
        hashed_NW = self._table[windows_NW % TABLE_SIZE] + 1
        return (self._config.key.reveal() * hashed_NW * hashed_NW[:, -1:]).amin(1)

    def _list(self, seed: int) -> np.ndarray:
        """The list of a seed as bits, token v at bit v & 7 of byte v >> 3; the least recently used go at 256 MiB."""
        bits = self._lists.get(seed)
        if bits is not None:
            self._lists.move_to_end(seed)
            return bits
        self._generator.manual_seed(seed % (2**64 - 1))
        size, device = self._config.vocab_size, self._generator.device
        chosen = torch.randperm(size, generator=self._generator, device=device)[: self._size]
        flags = torch.zeros(size, dtype=torch.bool)
        flags[chosen.cpu()] = True
        bits = self._lists[seed] = np.packbits(flags.numpy(), bitorder="little")
        if len(self._lists) > self._most:
            self._lists.popitem(last=False)
        return bits


def _first(fingerprint_N: torch.Tensor, valid_BT: torch.Tensor) -> torch.Tensor:
    """The valid tokens whose fingerprint no earlier token of the row has, bool [B, T]."""
    keys_BT = torch.full(valid_BT.shape, -1, dtype=torch.int64)
    keys_BT[valid_BT] = fingerprint_N
    sorted_BT, order_BT = keys_BT.sort(dim=1, stable=True)
    new_BT = torch.ones_like(valid_BT)
    new_BT[:, 1:] = sorted_BT[:, 1:] != sorted_BT[:, :-1]
    return valid_BT & torch.zeros_like(valid_BT).scatter_(1, order_BT, new_BT)
