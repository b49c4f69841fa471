"""`fairlead run logo`: LOGO's loss, position synthesis and data builder (arXiv 2410.18533) on toys that have a right answer.

A tiny Llama reads filler with one of 16 needles and must name it after a query. (a) an unfinished model is trained with one or
two wrong needles as rejected answers; (b) models trained on 32 tokens, with identity or grid ids, are read at up to 500;
(c) a stub that answers from the first sentence about the asked person makes preference rows.
"""

from __future__ import annotations

import copy
from functools import partial
from typing import Any

import numpy as np
import torch
from pydantic import Field

from fairlead import registry
from fairlead.config import MethodConfig
from fairlead.kinds import Recipe, SequenceStats
from fairlead.runs import Run

from ..long_context import preference_rows
from ..positions import prompt_positions

FILLER, NEEDLES, CONTEXT, CHUNK = 40, 16, 32, 8
QUERY = FILLER + NEEDLES
# Objective of part (a), its settings, and the rejected answers it sees.
ARMS: dict[str, tuple[str, dict[str, Any], int]] = {
    "M = 2": ("logo", {"lam": 0.1}, 2), "M = 1": ("logo", {"lam": 0.1}, 1), "M = 2, lam 0": ("logo", {"lam": 0.0}, 2), "sft": ("sft", {}, 2),
}  # fmt: skip
PEOPLE = [f"{first} {last}" for first in ("Marta", "Jonas", "Irena", "Pavel", "Lidia", "Tomas") for last in ("Velden", "Brandt", "Kosar", "Ulrich")]
THINGS = ("amber lantern", "silver compass", "copper kettle", "marble chessboard", "velvet curtain", "wooden flute")
TOWNS = ("Corvale", "Tolmin", "Pelham", "Arden", "Brisk", "Helmsby", "Norwick", "Oswin")
WEATHER = ("Rain fell upon every roof during that night.", "Nobody crossed the square before the bell rang.", "Smoke from the mill drifted over the river.")


class LogoConfig(MethodConfig):
    """Sizes; the defaults finish in about three minutes on one core."""

    loss_seeds: int = Field(5, ge=1, description="models of part (a), seeded 5 seed, 5 seed + 1, ... by default")
    start_accuracy: float = Field(0.5, ge=0, le=1, description="running accuracy at which part (a)'s model is stopped")
    start_most: int = Field(300, ge=1, description="most steps until then")
    loss_steps: int = Field(100, ge=1, description="steps of preference training, part (a)")
    loss_lr: float = Field(1e-3, gt=0, description="learning rate of preference training")
    beta: float = Field(2.5, gt=0, description="beta of the loss")
    gamma: float = Field(0.25, ge=0, description="gamma of the loss")
    window: int = Field(500, ge=40, description="ids of part (b)'s window; the query has the last")
    grid_share: float = Field(0.7, ge=0, le=1, description="part of the rows whose ids are spread, the others have the identity")
    position_steps: int = Field(300, ge=1, description="training steps of part (b)")
    lr: float = Field(3e-3, gt=0, description="learning rate of the needle model")
    batch: int = Field(64, ge=1, description="rows of a step")
    test: int = Field(256, ge=1, description="held-out rows of a measurement")
    documents: int = Field(200, ge=1, description="documents of part (c)")


class Logo(Recipe):
    """M = 2 against M = 1, grid against identity ids, and the answers of a data builder whose truth is known."""

    Config = LogoConfig
    config: LogoConfig

    def __call__(self, run: Run) -> None:
        run.describe("LOGO", "One chosen over several rejected answers, short prompts spread over a long window, and data from the model itself.", "2410.18533")
        losses = []
        for index in range(self.config.loss_seeds):
            run.progress("losses", index, self.config.loss_seeds)
            losses += run.stage(f"losses-{index}", partial(train_losses, self.config, run.seed * self.config.loss_seeds + index))
        read = []
        for index, ids in enumerate(("identity", "grid")):
            run.progress("positions", index, 2)
            read += run.stage(f"positions-{ids}", partial(train_positions, self.config, run.seed, ids))
        report_losses(run, losses)
        report_positions(run, read)
        report_documents(run, run.stage("documents", partial(build_documents, self.config, run.seed)))


def needle_rows(rows: int, length: int, g: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids [B, length + 1] with one needle at a random place and the query last; the needles, [B]."""
    ids = torch.randint(0, FILLER, (rows, length + 1), generator=g)
    needle = torch.randint(FILLER, QUERY, (rows,), generator=g)
    ids[torch.arange(rows), torch.randint(0, length, (rows,), generator=g)] = needle
    ids[:, -1] = QUERY
    return ids, needle


def answer_logp(model: Any, ids_BT: torch.Tensor, positions_BT: torch.Tensor | None = None) -> torch.Tensor:
    """Log-probabilities of the token after the query, [B, V]; the mask is explicit, ids with gaps would be read as packed rows."""
    mask = torch.ones_like(ids_BT)
    logits = model(input_ids=ids_BT, position_ids=positions_BT, attention_mask=mask, use_cache=False, logits_to_keep=1).logits
    found: torch.Tensor = logits[:, -1].log_softmax(-1)
    return found


def needle_model(seed: int) -> Any:
    """An untrained Llama of two layers, width 48, for `needle_rows`."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    sizes = {"hidden_size": 48, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4}
    return LlamaForCausalLM(LlamaConfig(vocab_size=QUERY + 1, **sizes, max_position_embeddings=1024, bos_token_id=None, eos_token_id=None, pad_token_id=0))


def needle_step(model: Any, optimizer: torch.optim.Optimizer, batch: int, g: torch.Generator, positions_BT: torch.Tensor | None = None) -> float:
    """One step of cross-entropy at the query; the accuracy before it."""
    ids, needle = needle_rows(batch, CONTEXT, g)
    logp = answer_logp(model, ids, positions_BT)
    optimizer.zero_grad()
    torch.nn.functional.nll_loss(logp, needle).backward()
    optimizer.step()
    return float((logp.argmax(-1) == needle).float().mean())


def train_losses(config: LogoConfig, seed: int) -> list[dict[str, Any]]:
    """Part (a): one unfinished model, trained on by each arm with the same rows; held-out margin, likelihood and accuracy."""
    g = torch.Generator().manual_seed(seed)
    start = needle_model(seed)
    optimizer, accuracy, steps = torch.optim.AdamW(start.parameters(), lr=config.lr), 0.0, 0
    while accuracy <= config.start_accuracy and steps < config.start_most:
        accuracy, steps = 0.7 * accuracy + 0.3 * needle_step(start, optimizer, config.batch, g), steps + 1
    rows = [{"seed": seed, "arm": "start", "steps": steps, **measure(start, config.test, seed)}]
    for arm, (objective, settings, rejected) in ARMS.items():
        model, rng = copy.deepcopy(start), torch.Generator().manual_seed(seed + 1)
        own = {"beta": config.beta, "gamma": config.gamma, **settings} if objective == "logo" else settings
        loss, optimizer = registry.create("objective", objective, **own), torch.optim.AdamW(model.parameters(), lr=config.loss_lr)
        for _ in range(config.loss_steps):
            logp_BM = answers(model, config.batch, rng)[:, : 1 + rejected]
            group = torch.arange(config.batch).repeat_interleave(1 + rejected)
            role = torch.tensor([1] + [-1] * rejected).repeat(config.batch)
            optimizer.zero_grad()
            loss(SequenceStats(logp_BM.flatten(), torch.ones_like(group), group=group, role=role)).loss.backward()
            optimizer.step()
        rows.append({"seed": seed, "arm": arm, "steps": config.loss_steps, **measure(model, config.test, seed)})
    return rows


def answers(model: Any, rows: int, g: torch.Generator) -> torch.Tensor:
    """Log-probabilities of the needle and of two other ones, [B, 3]; an answer is one token, so one pass holds all of a row."""
    ids, needle = needle_rows(rows, CONTEXT, g)
    shift = torch.stack([torch.randperm(NEEDLES - 1, generator=g)[:2] + 1 for _ in range(rows)])
    wrong = FILLER + (needle[:, None] - FILLER + shift) % NEEDLES
    return answer_logp(model, ids).gather(1, torch.cat([needle[:, None], wrong], 1))


@torch.no_grad()
def measure(model: Any, rows: int, seed: int) -> dict[str, float]:
    """Held-out margin a_w - mean a_l over two wrong needles, -a_w, and accuracy."""
    g = torch.Generator().manual_seed(seed + 1_000_000)
    logp_BM = answers(model, rows, g)
    margin = logp_BM[:, 0] - logp_BM[:, 1:].mean(1)
    return {"margin": float(margin.mean()), "nll": float(-logp_BM[:, 0].mean()), "accuracy": accuracy_at(model, CONTEXT, rows, g)}


@torch.no_grad()
def accuracy_at(model: Any, length: int, rows: int, g: torch.Generator) -> float:
    """Share of held-out rows of `length` tokens, at identity ids, whose needle is the model's first choice."""
    right = 0
    for begin in range(0, rows, 64):
        ids, needle = needle_rows(min(64, rows - begin), length, g)
        right += int((answer_logp(model, ids).argmax(-1) == needle).sum())
    return right / rows


def train_positions(config: LogoConfig, seed: int, ids: str) -> list[dict[str, Any]]:
    """Part (b): a model trained with identity or grid ids, and its accuracy at each length."""
    g, rng = torch.Generator().manual_seed(seed), torch.Generator().manual_seed(seed + 1)
    model = needle_model(seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=config.lr)
    for _ in range(config.position_steps):
        positions = None if ids == "identity" else torch.stack([row_positions(config, rng) for _ in range(config.batch)])
        needle_step(model, optimizer, config.batch, g, positions)
    unseen = torch.Generator().manual_seed(seed + 1_000_000)
    lengths = [length for length in (CONTEXT, 128, 256) if length < config.window - 1] + [config.window - 1]
    return [{"ids": ids, "tokens": length, "accuracy": accuracy_at(model, length, config.test, unseen)} for length in lengths]


def row_positions(config: LogoConfig, rng: torch.Generator) -> torch.Tensor:
    """Grid ids with the query on the window's last, or the identity; the answer is never read, so it takes no id."""
    if float(torch.rand((), generator=rng)) >= config.grid_share:
        return torch.arange(CONTEXT + 1)
    return prompt_positions([CHUNK] * (CONTEXT // CHUNK), target_len=config.window, question_len=1, generator=rng)


def build_documents(config: LogoConfig, seed: int) -> dict[str, Any]:
    """Part (c): shares of right answers by kind of context, before and after the rows whose answers agree are dropped."""
    g = torch.Generator().manual_seed(seed)
    samples = [document(g) for _ in range(config.documents)]
    given: list[str] = []

    def generate(prompt: str) -> str:
        given.append(stub(prompt))
        return given[-1]

    rows, report = preference_rows(samples, generate, generator=g, chunk_size=24, n_chunks=4, delta=1)
    right = np.array([[a == s["town"] for a in given[3 * i : 3 * i + 3]] for i, s in enumerate(samples)])
    shares = dict(zip(("relevant", "irrelevant", "mixed"), right.mean(0).tolist(), strict=True))
    return {**shares, "rows": len(rows), "dropped": sum(report.dropped.values()), "filled": sum(sum(row["filled"]) for row in rows)}


def document(g: torch.Generator) -> dict[str, str]:
    """Twelve chunks of 24 words, a statement and two fillers each: the fact, three of other people with that thing, eight others."""

    def pick(options: Any) -> Any:
        return options[int(torch.randint(len(options), (), generator=g))]

    order = torch.randperm(len(PEOPLE), generator=g).tolist()
    thing = pick(THINGS)
    towns = [pick(TOWNS) for _ in range(12)]
    said = [f"{PEOPLE[order[i]]} keeps the {thing if i < 4 else pick([t for t in THINGS if t != thing])} in {town}." for i, town in enumerate(towns)]
    place = torch.randperm(12, generator=g).tolist()
    text = " ".join(f"{pick(WEATHER)} {said[i]} {pick(WEATHER)}" for i in place)
    return {"question": f"Where does {PEOPLE[order[0]]} keep the {thing}?", "context": text, "town": towns[0]}


def stub(prompt: str) -> str:
    """A reader that answers from the first sentence about the asked person, and knows nothing where there is none."""
    context, _, question = prompt.rpartition("Question: Where does ")
    person = " ".join(question.split()[:2])
    return next((s.split()[-1] for s in context.replace("\n", " ").split(".") if s.strip().startswith(person)), "unknown")


def report_losses(run: Run, rows: list[dict[str, Any]]) -> None:
    """Part (a): table and thresholds."""

    def column(arm: str, name: str) -> np.ndarray:
        return np.array([r[name] for r in rows if r["arm"] == arm])

    for r in rows:
        run.metric("margin", r["margin"], **{k: v for k, v in r.items() if k != "margin"})
    run.section("Several rejected answers", "Same start, same rows, one or two wrong needles. Plain cross-entropy (sft) has the largest margin: over 16 needles it is the better loss.")
    run.table(
        "After preference training", [{"arm": arm, **{n: spread(column(arm, n)) for n in ("margin", "nll", "accuracy")}} for arm in ("start", *ARMS)],
        note="Mean, least to largest over models.",
    )
    gap = column("M = 2", "margin") - column("M = 1", "margin")
    run.check("margin of M = 2 above M = 1 for every model", bool((gap > 0).all()), f"smallest gap {gap.min():.3f}")
    ratio = column("M = 2", "nll") / column("M = 2, lam 0", "nll")
    run.check("NLL at lam 0.1 at most half of that at lam 0 for every model", bool((ratio <= 0.5).all()), f"largest ratio {ratio.max():.3f}")
    run.headline("margin, M = 2 over M = 1", f"{gap.mean():+.2f}", f"{gap.min():+.2f} to {gap.max():+.2f}")


def report_positions(run: Run, rows: list[dict[str, Any]]) -> None:
    """Part (b): table and thresholds."""
    found = {(r["ids"], r["tokens"]): r["accuracy"] for r in rows}
    lengths = sorted({r["tokens"] for r in rows})
    run.section("Positions", "Both models saw 32 tokens a row; one with ids spread over the window. Accuracy at identity ids, by true length.")
    run.table("Accuracy", [{"ids": ids, **{f"{n} tokens": f"{found[ids, n]:.3f}" for n in lengths}} for ids in ("identity", "grid")])
    gap = found["grid", lengths[-1]] - found["identity", lengths[-1]]
    run.check(f"grid at least .2 above identity at {lengths[-1]} tokens", gap >= 0.2, f"{gap:+.3f}")
    run.check("grid at least .98 at 32 tokens", found["grid", CONTEXT] >= 0.98, f"{found['grid', CONTEXT]:.3f}")
    run.headline(f"accuracy at {lengths[-1]} tokens, grid over identity", f"{gap:+.2f}", f"grid {found['grid', lengths[-1]]:.2f}")


def report_documents(run: Run, found: dict[str, Any]) -> None:
    """Part (c): table and thresholds."""
    run.section("Data from the reader itself", f"{found['rows']} rows; {found['dropped']} dropped, where the mixed context held the evidence and both answers agree.")
    run.table("Right answers by kind of context", [{kind: f"{found[kind]:.3f}" for kind in ("relevant", "irrelevant", "mixed")}])
    run.check("preferred answers are all right", found["relevant"] == 1.0, f"{found['relevant']:.3f}")
    run.check("answers from irrelevant chunks are all wrong", found["irrelevant"] == 0.0, f"{found['irrelevant']:.3f}")
    run.check("answers from mixed chunks lie in between", 0 < found["mixed"] < 1, f"{found['mixed']:.3f}")


def spread(values: np.ndarray) -> str:
    """Mean (least to largest)."""
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"
