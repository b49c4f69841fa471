"""The keyed counter-based functions under every watermark: (key, context, token) -> 32 random bits.

philox ("philox4x32-10-v1"): Philox-4x32-10 of the token block under a context state that has absorbed the context in
blocks of four; a word per token. Schemes that select tokens use it. mix32 ("fairlead-mix32-v1"): two rounds of a 32-bit
mixer keyed by the first two words of the context state. Green lists use it. Neither is a cryptographic PRF: whoever
needs one registers it with `register_prf`. Philox: Salmon et al., SC 2011.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from ... import checks, library
from .keys import signed_key
from .spec import SPECS

library.define(SPECS)
_prf = torch.ops.fairlead.prf.default
PRF = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
_registered: dict[str, PRF] = {}
BUILT_IN = ("mix32", "philox")

__all__ = ["prf", "prf_functions", "register_prf"]


def prf(context_BH: torch.Tensor, tokens_BN: torch.Tensor, *, key: int, function: str = "mix32") -> torch.Tensor:
    """Random words of tokens after their contexts, the same integers on every device and in every backend.

    context_BH: integer ids before the token, oldest first, -1 = missing; H may be 0. tokens_BN: integer ids in
    [0, 2^32). key: in [0, 2^64). function: "mix32", "philox" or a registered name.
    Returns int64 [B, N] with values in [0, 2^32). ValueError / TypeError on anything else.
    """
    context_BH = checks.ids(context_BH, "context_BH", "batch, context")
    tokens_BN = checks.ids(tokens_BN, "tokens_BN", "batch, tokens")
    checks.beside(context_BH, "context_BH", tokens_BN, "tokens_BN")
    signed = signed_key(key)
    checks.one_of(function, "function", prf_functions())
    if function in BUILT_IN:
        words: torch.Tensor = _prf(context_BH, tokens_BN, signed, function)
        return words
    words = _registered[function](context_BH, tokens_BN, key)
    if words.dtype != torch.int64 or words.shape != tokens_BN.shape:
        raise TypeError(
            f"PRF {function!r} gave {words.dtype} {tuple(words.shape)}, int64 {tuple(tokens_BN.shape)} is due"
        )
    return words


def register_prf(name: str, function: PRF) -> None:
    """Add a keyed function: (context_BH, tokens_BN, key) -> int64 words_BN in [0, 2^32). ValueError: name taken."""
    if name in BUILT_IN or name in _registered:
        raise ValueError(f"there is already a PRF {name!r}")
    if not callable(function):
        raise TypeError(f"PRF {name!r}: a function (context_BH, tokens_BN, key) -> words_BN is needed")
    _registered[name] = function


def prf_functions() -> tuple[str, ...]:
    """The names that `prf` knows."""
    return (*BUILT_IN, *_registered)
