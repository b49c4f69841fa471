"""Many sequences on one row of a transformer, none seeing another: no padding, each prompt run once for its group.

An attention function that loops scaled-dot-product attention over the segments, and a mask function that returns None,
are registered with transformers and switched on for the length of one call. Whether a model obeys them is found out by
trying it: a model that gives other results on a packed row is served by padded batches instead.

Shape suffixes: N tokens on the row, H heads, D width.
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

import torch
from torch.nn.functional import scaled_dot_product_attention

from .logprobs import backbone, hidden_states, linear_head, unwrapped

log = logging.getLogger("fairlead")
NAME = "fairlead_packed"
_packable: weakref.WeakKeyDictionary[Any, str] = weakref.WeakKeyDictionary()


@dataclass(frozen=True)
class Segment:
    """Tokens [start, end) of the row attend to themselves, causally, and to all of [prefix_start, prefix_end)."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0

    @property
    def prefix(self) -> int:
        return self.prefix_end - self.prefix_start


def packed_hidden(model: Any, ids_N: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Hidden states [N, D] of one packed row; positions restart with each segment and go on after a shared prefix."""
    positions_N = torch.cat([torch.arange(s.prefix, s.prefix + s.end - s.start) for s in segments]).to(ids_N.device)
    inputs = {"input_ids": ids_N[None], "position_ids": positions_N[None]}
    with packed_attention(model):
        return hidden_states(model, inputs, fairlead_segments=list(segments))[0]


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """The model with per-segment attention; its own is put back afterwards."""
    _register()
    linear_head(model)  # tried with the model's own attention
    inner = backbone(model)
    before = inner.config._attn_implementation
    inner.set_attn_implementation(NAME)
    try:
        yield
    finally:
        inner.set_attn_implementation(before)


@cache
def _register() -> None:
    from transformers.masking_utils import AttentionMaskInterface
    from transformers.modeling_utils import AttentionInterface

    AttentionInterface.register(NAME, segment_attention)
    AttentionMaskInterface.register(NAME, lambda *args, **kwargs: None)


def segment_attention(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: torch.Tensor | None,
    dropout: float = 0.0, scaling: float | None = None, is_causal: bool | None = None,
    sliding_window: int | None = None, fairlead_segments: Sequence[Segment] | None = None, **options: Any,
) -> tuple[torch.Tensor, None]:  # fmt: skip
    """Attention of one packed row, [1, H, N, D] each: segment by segment, runs of equal lengths together."""
    unknown = [name for name in ("softcap", "s_aux", "position_bias") if options.get(name) is not None]
    if unknown or fairlead_segments is None or not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise ValueError(f"per-segment attention knows causal layers without {', '.join(unknown) or 'further terms'} only")
    shared: dict[str, Any] = {"dropout_p": dropout, "scale": scaling, "enable_gqa": query.shape[1] != key.shape[1]}
    pieces = []
    for run in _runs(fairlead_segments):
        start, end, count = run[0].start, run[-1].end, len(run)
        q, k, v = (_split(x, start, end, count) for x in (query, key, value))
        length, prefix = run[0].end - start, run[0].prefix
        if prefix:
            places = slice(run[0].prefix_start, run[0].prefix_end)
            k, v = (torch.cat([x[:, :, places].expand(count, -1, -1, -1), y], 2) for x, y in ((key, k), (value, v)))
        windowed = sliding_window is not None and length + prefix > sliding_window
        if prefix or windowed:
            mask = _band(length, prefix, sliding_window if windowed else None, query.device, query.dtype)
            out = scaled_dot_product_attention(q, k, v, attn_mask=mask, **shared)
        else:
            out = scaled_dot_product_attention(q, k, v, is_causal=length > 1, **shared)
        pieces.append(out.transpose(1, 2).reshape(count * length, query.shape[1], -1))
    return torch.cat(pieces)[None], None


def _runs(segments: Sequence[Segment]) -> Iterator[list[Segment]]:
    """Neighbours of one length and one prefix, to be attended as one batch."""
    run: list[Segment] = []
    for segment in segments:
        same = run and segment.end - segment.start == run[0].end - run[0].start
        if same and (segment.prefix_start, segment.prefix_end) == (run[0].prefix_start, run[0].prefix_end):
            run.append(segment)
            continue
        if run:
            yield run
        run = [segment]
    if run:
        yield run


def _split(x: torch.Tensor, start: int, end: int, count: int) -> torch.Tensor:
    piece = x[:, :, start:end]
    return piece if count == 1 else piece[0].unflatten(1, (count, -1)).transpose(0, 1)


@lru_cache(maxsize=512)
def _band(length: int, prefix: int, window: int | None, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """What each token of a continuation may see, [length, prefix + length]: 0, and -inf elsewhere. Kept, for every layer
    and many segments ask for the same; made outside inference mode, so that training may meet it too."""
    with torch.inference_mode(False):
        row = torch.arange(prefix, prefix + length, device=device)[:, None]
        column = torch.arange(prefix + length, device=device)[None]
        seen = column <= row if window is None else (column <= row) & (column > row - window)
        return torch.zeros(seen.shape, dtype=dtype, device=device).masked_fill_(~seen, -torch.inf)


def why_not_packable(model: Any) -> str:
    """Why the model cannot work on packed rows; empty when it can. Tried once per model."""
    inner = unwrapped(model)
    if inner not in _packable:
        _packable[inner] = _try(model)
        if _packable[inner]:
            log.info("%s: scored in padded batches (%s)", type(inner).__name__, _packable[inner])
    return _packable[inner]


@torch.no_grad()
def _try(model: Any) -> str:
    inner = backbone(model)
    if not hasattr(inner, "set_attn_implementation") or not getattr(inner, "_can_set_attn_implementation", bool)():
        return "its attention cannot be exchanged"
    vocabulary = inner.get_input_embeddings().weight.shape[0]
    device = inner.get_input_embeddings().weight.device
    ids = (torch.arange(11, device=device) * 7 + 1) % vocabulary
    # Two sequences of their own, then a prompt of three tokens with two continuations.
    segments = [Segment(0, 3), Segment(3, 5), Segment(5, 8), Segment(8, 10, 5, 8), Segment(10, 11, 5, 8)]
    alone = [ids[0:3], ids[3:5], ids[5:10], torch.cat([ids[5:8], ids[10:11]])]
    training = model.training
    model.eval()
    try:
        packed = packed_hidden(model, ids, segments).float()
        single = [hidden_states(model, {"input_ids": x[None]})[0].float() for x in alone]
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}".splitlines()[0]
    finally:
        model.train(training)
    expected = torch.cat([single[0], single[1], single[2], single[3][-1:]])
    tolerance = 1e-4 if inner.dtype in (torch.float32, torch.float64) else 4e-2
    if expected.shape != packed.shape or float((packed - expected).abs().max()) > tolerance * float(expected.abs().max() + 1):
        return "packed rows give it other results"
    return ""
