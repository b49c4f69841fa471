"""Tokenised rows and a model -> SequenceStats, the only thing an objective sees, with the gradient in `logp`.

All completions of all rows go through the model in one call: on one packed row, each prompt once for its completions,
where the model can work on packed rows, in one padded batch otherwise. The head is applied to the positions that predict
a completion token and to no other, in tiles (`linear_logprob`). Packed rows hold each sequence to its own segment; plain
position ids with a cache would let it see its neighbours.

Shape suffixes: S sequences, N scored tokens, T the longest completion.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch

from fairlead.errors import InputError
from fairlead.kinds import SequenceStats
from fairlead.logprobs import Head, at_head, head_logprobs, linear_head, position_logits, unwrapped
from fairlead.packed import Segment, packed_attention, why_not_packable

Row = Mapping[str, Any]
COLUMNS = ("role", "rank", "reward", "weight", "ref_logp")
_KNOWN = {*COLUMNS, "prompt_ids", "completion_ids", "token_weights", "prompt_position_ids", "completion_position", "mismatched_ids", "mismatched_ref_logp"}


@dataclass
class Layout:
    """One forward pass: inputs of the model, and for each scored token where it is predicted, its id, its sequence and
    its place among the completion's tokens (int64 [N] each). groups: row of each sequence, int64 [S]."""

    inputs: dict[str, Any]
    places_N: torch.Tensor
    targets_N: torch.Tensor
    owner_N: torch.Tensor
    rank_N: torch.Tensor
    groups: torch.Tensor
    packed: bool


@dataclass(frozen=True)
class TokenStats:
    """Log-probabilities of the completions' tokens, float32 [N], with the layout they came from; wpo_N is log sum_v p_v^2."""

    logp_N: torch.Tensor
    layout: Layout
    log_sum_p2_N: torch.Tensor | None = None

    @property
    def count(self) -> int:
        """Number of sequences."""
        return len(self.layout.groups)

    def length_S(self) -> torch.Tensor:
        """Scored tokens of each sequence, int64 [S]."""
        return torch.bincount(self.layout.owner_N, minlength=self.count)

    def sum_S(self, weight_ST: torch.Tensor | None = None) -> torch.Tensor:
        """Log-probability of each sequence, [S]; the tokens weighted where weights [S, T] are given."""
        value_N = self.logp_N if weight_ST is None else self.logp_N * weight_ST[self.layout.owner_N, self.layout.rank_N]
        return torch.zeros(self.count, dtype=value_N.dtype, device=value_N.device).index_add(0, self.layout.owner_N, value_N)

    def table_ST(self, value_N: torch.Tensor | None = None) -> torch.Tensor:
        """Values of the tokens, by default their log-probabilities, as [S, T], 0 beyond a sequence's end."""
        value_N = self.logp_N if value_N is None else value_N
        width = int(self.layout.rank_N.max()) + 1 if len(value_N) else 0
        table = torch.zeros(self.count, width, dtype=value_N.dtype, device=value_N.device)
        return table.index_put((self.layout.owner_N, self.layout.rank_N), value_N)


def packs(model: Any) -> bool:
    """Whether rows of several sequences can be run through the model, at full speed and without a leak."""
    return not why_not_packable(model)


@contextmanager
def attention_of(model: Any, packed: bool) -> Iterator[None]:
    """The attention that packed rows need, for forward and backward: checkpointed layers run again in the backward pass."""
    with packed_attention(model) if packed else nullcontext():
        yield


@contextmanager
def evaluated(model: Any) -> Iterator[None]:
    """The model in eval mode, afterwards in the mode it had."""
    training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(training)


def lay_out(rows: Sequence[Row], packed: bool, device: Any = None, completions: str = "completion_ids") -> Layout:
    """Where each sequence of the rows lies in one forward pass, and what of it is scored.

    rows: tokenised rows. completions: the column of the completions. An empty prompt leaves a completion's first token
    without a predictor: it is not scored. InputError for a completion without a token that can be scored.
    """
    build = _pack if packed else _pad
    ids, positions, inputs, pieces = build(rows, completions)
    places: list[int] = []
    targets: list[int] = []
    owner: list[int] = []
    rank: list[int] = []
    for sequence, (before, own) in enumerate(pieces):
        predictors = ([before] if before is not None else []) + own[:-1]
        scored = own if before is not None else own[1:]
        if not scored:
            raise InputError(f"sequence {sequence}: its completion has no token that can be scored")
        places += predictors
        targets += scored
        owner += [sequence] * len(scored)
        rank += range(len(scored))
    flat = torch.tensor(ids, dtype=torch.int64).reshape(-1)
    inputs |= {"input_ids": torch.tensor(ids, dtype=torch.int64), "position_ids": torch.tensor(positions, dtype=torch.int64)}
    groups = torch.tensor([i for i, row in enumerate(rows) for _ in row[completions]], dtype=torch.int64)
    place_N, target_N, owner_N, rank_N = (torch.tensor(x, dtype=torch.int64).to(device) for x in (places, targets, owner, rank))
    moved = {k: v.to(device) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    return Layout(moved, place_N, flat.to(device)[target_N], owner_N, rank_N, groups.to(device), packed)


_Pieces = list[tuple["int | None", list[int]]]


def _pack(rows: Sequence[Row], completions: str) -> tuple[list[list[int]], list[list[int]], dict[str, Any], _Pieces]:
    """All sequences on one row; the prompt of a group stands once. pieces: (place of the prompt's last token, own places)."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    pieces: _Pieces = []
    for row in rows:
        prompt, answers = row["prompt_ids"], row[completions]
        start, first = len(ids), _first_position(row)
        if len(answers) == 1 or not prompt:
            for answer in answers:
                begin = len(ids)
                ids += [*prompt, *answer]
                positions += [*_prompt_positions(row), *range(first, first + len(answer))]
                segments.append(Segment(begin, len(ids)))
                own = list(range(begin + len(prompt), len(ids)))
                pieces.append((begin + len(prompt) - 1 if prompt else None, own))
            continue
        ids += prompt
        positions += _prompt_positions(row)
        segments.append(Segment(start, len(ids)))
        end = len(ids)
        for answer in answers:
            begin = len(ids)
            ids += answer
            positions += range(first, first + len(answer))
            segments.append(Segment(begin, len(ids), start, end))
            pieces.append((end - 1, list(range(begin, len(ids)))))
    return [ids], [positions], {"fairlead_segments": segments}, pieces


def _pad(rows: Sequence[Row], completions: str) -> tuple[list[list[int]], list[list[int]], dict[str, Any], _Pieces]:
    """A sequence per row, padded on the right, with a mask: without one, gaps in the positions would be read as packing."""
    whole = [([*row["prompt_ids"], *answer], row, answer) for row in rows for answer in row[completions]]
    width = max((len(ids) for ids, _, _ in whole), default=0)
    ids, positions, mask, pieces = [], [], [], []
    for place, (sequence, row, answer) in enumerate(whole):
        empty, prompt, first = width - len(sequence), len(row["prompt_ids"]), _first_position(row)
        ids.append(sequence + [0] * empty)
        positions.append([*_prompt_positions(row), *range(first, first + len(answer)), *([0] * empty)])
        mask.append([1] * len(sequence) + [0] * empty)
        start = place * width + prompt
        pieces.append((start - 1 if prompt else None, list(range(start, start + len(answer)))))
    return ids, positions, {"attention_mask": torch.tensor(mask, dtype=torch.int64)}, pieces


def _prompt_positions(row: Row) -> Sequence[int]:
    given = row.get("prompt_position_ids")
    return range(len(row["prompt_ids"])) if given is None else given


def _first_position(row: Row) -> int:
    given = row.get("completion_position")
    return len(row["prompt_ids"]) if given is None else int(given)


def token_stats(model: Any, layout: Layout, temperature: float = 1.0, squares: bool = False) -> TokenStats:
    """Log-probabilities of the scored tokens of one forward pass, with gradient where it is on.

    squares: also log sum_v p_v^2 of each position (without gradient), for WPO. Call it within `attention_of`.
    """
    places_N, targets_N = layout.places_N, layout.targets_N
    if linear_head(model) is None:
        logits_NV = position_logits(model, layout.inputs, places_N)
        from fairlead_kernels import selective_logprob

        logp_N = selective_logprob(logits_NV, targets_N, temperature=temperature)
        halved = selective_logprob(logits_NV.detach(), targets_N, temperature=temperature / 2) if squares else None
        return _with_squares(_precise(logp_N), halved, layout)

    def scored(hidden_BTD: torch.Tensor, head: Head) -> torch.Tensor:
        hidden_ND = hidden_BTD.flatten(0, 1)[places_N]
        logp_N = head_logprobs(head, hidden_ND, targets_N, temperature)
        if not squares:
            return torch.stack([logp_N])  # no view: FSDP hangs its hooks on what the head returns
        with torch.no_grad():
            sharper_N = head_logprobs(head, hidden_ND, targets_N, temperature / 2)
        return torch.stack([logp_N, sharper_N])

    found = at_head(model, layout.inputs, scored)
    return _with_squares(_precise(found[0]), found[1].detach() if squares else None, layout)


def _precise(logp_N: torch.Tensor) -> torch.Tensor:
    return logp_N if logp_N.dtype in (torch.float32, torch.float64) else logp_N.float()


def _with_squares(logp_N: torch.Tensor, halved_N: torch.Tensor | None, layout: Layout) -> TokenStats:
    """log sum p^2 = lse(2z) - 2 lse(z): the log-probabilities at temperature 1 and 1/2 hold both."""
    squared = None if halved_N is None else 2 * logp_N.detach() - halved_N
    return TokenStats(logp_N, layout, squared)


def sequence_stats(
    model: Any, rows: Sequence[Row], objective: Any = None, *, packed: bool | None = None, temperature: float = 1.0, tokens: bool = False,
    columns: Mapping[str, torch.Tensor] | None = None,
) -> SequenceStats:  # fmt: skip
    """What an objective may know of the completions of tokenised rows, in their order.

    model: a causal LM, wrapped or not; gradients follow torch's mode. rows: see `fairlead_training.tokens`; further columns of numbers
    per completion become `extra`, and `token_weights`, a list per completion, weight the tokens of the sums. objective: one that weights tokens (ld-dpo) or needs WPO's weights gets them. packed: default where
    the model can. tokens: also `token_logp` and `token_mask` [S, T]. columns: computed elsewhere, "ref_logp" or names of `extra`.
    InputError for completions without a token.
    """
    packed = packs(model) if packed is None else packed
    layout = lay_out(rows, packed, unwrapped(model).device)
    with attention_of(model, packed):
        found = token_stats(model, layout, temperature, squares="wpo_weight" in getattr(objective, "needs", ()))
    return assemble(found, rows, objective, tokens=tokens, columns=columns)


def assemble(
    found: TokenStats, rows: Sequence[Row], objective: Any = None, *, tokens: bool = False, columns: Mapping[str, torch.Tensor] | None = None
) -> SequenceStats:
    """SequenceStats of token log-probabilities and the columns of the rows; see `sequence_stats`."""
    length_S, device = found.length_S(), found.logp_N.device
    given = {name: _column(rows, name, found.count, device) for name in _names(rows)} | dict(columns or {})
    extra = {name: value for name, value in given.items() if name not in COLUMNS}
    weight_ST = token_weights(found, rows, objective)
    if weight_ST is not None and hasattr(objective, "token_weights"):
        extra["weighted_length"] = weight_ST.sum(1)
    if found.log_sum_p2_N is not None:
        from .objectives.pairwise import wpo_weight

        mask_ST = found.table_ST(torch.ones_like(found.logp_N)).bool()
        extra["wpo_weight"] = wpo_weight(found.table_ST().detach(), found.table_ST(found.log_sum_p2_N), mask_ST)
    if tokens:
        extra["token_logp"] = found.table_ST()
        extra["token_mask"] = found.table_ST(torch.ones_like(found.logp_N)).bool()
    known: dict[str, Any] = {name: given[name] for name in COLUMNS if name in given}
    return SequenceStats(logp=found.sum_S(weight_ST), length=length_S, group=found.layout.groups, extra=extra, **known)


def token_weights(found: TokenStats, rows: Sequence[Row], objective: Any = None, completions: str = "completion_ids") -> torch.Tensor | None:
    """What each token counts in its sequence's sum, [S, T]: the objective's weights times those of the rows' column
    `token_weights`; None where there are neither. InputError for a row whose weights do not fit its completions."""
    length_S = found.length_S()
    weight_ST = objective.token_weights(length_S, found.layout.groups) if hasattr(objective, "token_weights") else None
    if completions != "completion_ids" or not any(row.get("token_weights") is not None for row in rows):
        return weight_ST
    given = [w for row in rows for w in (row.get("token_weights") or [[1.0] * len(ids) for ids in row[completions]])]
    wrong = next((s for s, (w, n) in enumerate(zip(given, length_S.tolist(), strict=False)) if len(w) < n), None)
    if wrong is not None or len(given) != found.count:
        raise InputError("token_weights: every completion needs one weight for each of its tokens")
    # An empty prompt leaves the first token unscored: the weights of the others are the last ones.
    kept = [torch.tensor(w[len(w) - n :]) for w, n in zip(given, length_S.tolist(), strict=True)]
    own_ST = torch.nn.utils.rnn.pad_sequence(kept, batch_first=True).to(found.logp_N)
    return own_ST if weight_ST is None else own_ST * weight_ST


def _names(rows: Sequence[Row]) -> list[str]:
    names = dict.fromkeys(name for row in rows for name, value in row.items() if value is not None)
    return [name for name in names if name in COLUMNS or (name not in _KNOWN and _is_numbers(rows[0].get(name)))]


def _is_numbers(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(x, (int, float)) for x in value)


def _column(rows: Sequence[Row], name: str, count: int, device: Any) -> torch.Tensor:
    values = [x for row in rows for x in (row.get(name) or [])]
    if len(values) != count:
        raise InputError(f"{name}: {len(values)} values for {count} completions; every row needs one for each of its completions")
    kind = torch.int64 if name in ("role", "rank") else torch.float32
    return torch.tensor(values, dtype=kind, device=device)
