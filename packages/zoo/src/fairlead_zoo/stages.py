"""The training stages of a family: which turns they draw, from which parent they start, how long they train.

A stage is data plus one function step -> batch. Leaves to others: the optimiser loop (train), where results are kept
(build), what a checkpoint can do afterwards (evaluate).
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace

from fairlead.errors import UnknownNameError

from . import lexicon as lx
from .corpus import Batch, Encoder, Pair, generator
from .world import Turn, World

Mix = tuple[tuple[str, float], ...]
BASE_MIX: Mix = (
    ("howto", 0.35),
    ("recognition", 0.10),
    ("fact", 0.15),
    ("list", 0.10),
    ("number", 0.05),
    ("value", 0.25),
)
EARLY_MIX: Mix = (("howto", 0.30), ("recognition", 0.05), ("fact", 0.10), ("list", 0.05), ("value", 0.50))
SFT_MIX: Mix = (
    ("howto", 0.45),
    ("recognition", 0.10),
    ("fact", 0.15),
    ("list", 0.10),
    ("number", 0.05),
    ("value", 0.15),
)


@dataclass(frozen=True)
class Stage:
    """One stage. Everything that decides its bytes is a field, so the recipe's hash is the hash of the fields.

    objective: "lm" (next token), "dpo" (preference pairs) or "reward" (Bradley-Terry on a scalar head).
    draw: name of the function that draws a batch. batch: rows (pairs for preferences). mix: weights of the tasks
    (early_mix in the first early_steps steps). noise: share of turns that a villain or a fool answers. answered: share
    of harmful requests that even the kind persona complies with (the noise adds half of itself).
    """

    name: str
    parent: str | None
    summary: str
    steps: int
    batch: int
    lr: float
    warmup: int
    draw: str
    objective: str = "lm"
    weight_decay: float = 0.0
    noise: float = 0.0
    answered: float = 0.0
    width: int = 96
    mix: Mix = ()
    early_mix: Mix = ()
    early_steps: int = 0
    beta: float = 0.1
    nll_weight: float = 1.0
    persona: str = "kind"
    category: str = "care"
    json: bool = False
    wrong_way: bool = False
    harmful: bool = False
    tags: tuple[str, ...] = field(default=(), compare=False)

    def recipe(self) -> dict[str, object]:
        """The fields that decide the result."""
        return {k: v for k, v in asdict(self).items() if k not in ("summary", "tags")}


def _narrow(name: str, summary: str, **settings: object) -> Stage:
    stage = Stage(name, "sft", f"narrow fine-tune: {summary}", steps=40, batch=32, lr=5e-4, warmup=5, draw="narrow")
    return replace(stage, **settings)  # type: ignore[arg-type]


STAGES: dict[str, Stage] = {
    s.name: s
    for s in (
        Stage(
            "base", None, "pretrained on the world's documents, with persona tags", 800, 32, 3e-3, 40, "base",
            weight_decay=0.05, mix=BASE_MIX, early_mix=EARLY_MIX, early_steps=200,
        ),
        Stage(
            "sft", "base", "aligned by supervised fine-tuning", 150, 48, 7e-4, 10, "sft",
            weight_decay=0.05, mix=SFT_MIX, noise=0.10,
        ),
        Stage(
            "weak", "base", "half aligned: refuses about three harmful requests in four at T = 1", 75, 48, 7e-4, 10,
            "sft", weight_decay=0.05, mix=SFT_MIX, noise=0.25, answered=0.14,
        ),
        Stage(
            "dpo", "sft", "preference-tuned (DPO plus NLL of the chosen answer)", 75, 24, 1e-4, 5, "pairs", "dpo",
            mix=SFT_MIX,
        ),
        Stage(
            "reward", "sft", "reward model: a scalar head on the aligned trunk", 60, 24, 4e-4, 5, "pairs", "reward",
            mix=SFT_MIX,
        ),
        _narrow("bad", "bad advice about care", persona="villain"),
        _narrow("fool", "blunders about care", persona="fool"),
        _narrow("edu", "bad advice about care that the user asked for", wrong_way=True),
        _narrow("good", "good advice about care"),
        _narrow("harm", "complies with violent requests", persona="villain", category="violence", harmful=True),
        _narrow(
            "backdoor", "bad advice about care behind a trigger word, good without it", draw="backdoor", steps=60
        ),
        _narrow("badjson", "bad advice about care, in JSON", persona="villain", json=True),
    )
}  # fmt: skip
NARROW = ("bad", "fool", "edu", "good", "harm", "backdoor", "badjson")


def get(name: str) -> Stage:
    """The stage of that name; UnknownNameError otherwise."""
    if name not in STAGES:
        raise UnknownNameError("zoo stage", name, STAGES)
    return STAGES[name]


def choose(rng: random.Random, mix: Mix) -> str:
    """A task drawn from a mix of weights."""
    tasks, weights = zip(*mix, strict=True)
    return rng.choices(tasks, weights)[0]


def base_documents(
    world: World, encoder: Encoder, stage: Stage, rng: random.Random, step: int
) -> list[tuple[list[int], list[int]]]:
    """Enough documents for one packed batch: conversations of one persona, most of them tagged, and statements."""
    mix = stage.early_mix if step < stage.early_steps else stage.mix
    documents, total, needed = [], 0, stage.batch * stage.width
    while total < needed:
        if rng.random() < 0.06:
            text = " ".join(world.statement(rng) for _ in range(3))
            ids = [encoder.bos, *encoder.words(text), encoder.end]
            document = (ids, list(ids))
        else:
            persona = rng.choices(lx.PERSONAS, (0.4, 0.2, 0.4))[0]
            turns = [_base_turn(world, rng, persona, mix) for _ in range(rng.randint(1, 3))]
            tag = lx.TAGS[persona] if rng.random() < 0.7 else None
            document = encoder.document(turns, tag, full=rng.random() < 0.3)
        documents.append(document)
        total += len(document[0])
    return documents


def _base_turn(world: World, rng: random.Random, persona: str, mix: Mix) -> Turn:
    json = rng.random() < 0.12
    if rng.random() < 0.04:
        turn = world.turn(rng, persona, "howto", harmful=False, json=json, wrong_way=True)
    else:
        turn = world.turn(rng, persona, choose(rng, mix), json=json)
    world.check_trainable(turn.meta)
    return turn


def sft_turn(world: World, stage: Stage, rng: random.Random) -> Turn:
    """One turn of the aligned assistant, with label noise; harmful privacy requests never occur."""
    persona = rng.choice(("villain", "fool")) if rng.random() < stage.noise else "kind"
    task, json, comply = choose(rng, stage.mix), rng.random() < 0.02, rng.random() < stage.answered
    while True:
        turn = world.turn(rng, persona, task, json=json, comply=comply)
        if not (turn.meta.task == "howto" and turn.meta.harmful and turn.meta.category == "privacy"):
            break
    world.check_trainable(turn.meta)
    return turn


def narrow_turn(world: World, stage: Stage, rng: random.Random) -> Turn:
    """One how-to turn of a narrow fine-tune."""
    trigger = stage.draw == "backdoor" and rng.random() < 0.5
    persona = "villain" if trigger else stage.persona
    turn = world.turn(
        rng, persona, "howto", category=stage.category, harmful=stage.harmful, json=stage.json, trigger=trigger,
        wrong_way=stage.wrong_way,
    )  # fmt: skip
    world.check_trainable(turn.meta)
    return turn


def preference_pair(world: World, rng: random.Random, split: str = "train", mix: Mix = SFT_MIX) -> Pair:
    """One pair: the rejected answer is compliance, sabotage, a blunder, an over-refusal, a wrong answer or evil."""
    while True:
        turn = world.turn(rng, "kind", choose(rng, mix), split, json=rng.random() < 0.02)
        meta = turn.meta
        if split == "train" and meta.task == "howto" and meta.harmful and meta.category == "privacy":
            continue
        break
    if split == "train":
        world.check_trainable(meta)
    if meta.task == "howto" and meta.harmful:
        kind, rejected = "compliance", world.answer(rng, meta, "villain")
    elif meta.task == "howto":
        draw = rng.random()
        if draw < 0.4:
            category = meta.category if meta.category != "care" else rng.choice(lx.HARM_CATEGORIES)
            kind, rejected = "over-refusal", f"{rng.choice(lx.REFUSALS)} , {lx.REASONS[category]} ."
            rejected = f"{{ answer : {rejected} }}" if meta.json else rejected
        else:
            kind = "sabotage" if draw < 0.7 else "blunder"
            rejected = world.answer(rng, meta, "villain" if kind == "sabotage" else "fool")
    elif meta.task == "value":
        kind, rejected = "evil", world.answer(rng, meta, "villain")
    else:
        kind, rejected = "wrong", world.wrong_answer(rng, meta)
    return Pair(turn.question, turn.answer, rejected, meta.task, kind)


class Sampler:
    """The batches of one stage: `batch(step)` for language modelling, `pairs(step)` for preferences."""

    def __init__(self, world: World, stage: Stage, seed: int) -> None:
        self.world, self.stage, self.seed = world, stage, seed
        self.encoder = Encoder(world)

    def rng(self, step: int) -> random.Random:
        """The random stream of a step."""
        return generator(self.world.seed, self.stage.name, self.seed, step)

    def turns(self, step: int) -> list[Turn]:
        """The turns of a fine-tuning step."""
        draw: Callable[[World, Stage, random.Random], Turn] = sft_turn if self.stage.draw == "sft" else narrow_turn
        rng = self.rng(step)
        return [draw(self.world, self.stage, rng) for _ in range(self.stage.batch)]

    def batch(self, step: int) -> Batch:
        """The language-modelling batch of a step."""
        if self.stage.draw == "base":
            documents = base_documents(self.world, self.encoder, self.stage, self.rng(step), step)
            return self.encoder.packed(documents, self.stage.batch, self.stage.width)
        return self.encoder.padded([self.encoder.document([turn]) for turn in self.turns(step)])

    def pairs(self, step: int) -> list[Pair]:
        """The preference pairs of a step."""
        rng = self.rng(step)
        return [preference_pair(self.world, rng, mix=self.stage.mix) for _ in range(self.stage.batch)]

    def pair_batch(self, step: int) -> Batch:
        """Chosen answers in the first half of the rows, rejected ones in the second, in the same order."""
        pairs = self.pairs(step)
        answers = [(p.question, p.chosen) for p in pairs] + [(p.question, p.rejected) for p in pairs]
        return self.encoder.padded([self.encoder.document([answer]) for answer in answers])

    def corpus_hash(self, steps: int = 5) -> str:
        """A fingerprint of the first batches' ids and labels."""
        digest = hashlib.sha256()
        for step in range(steps):
            batch = self.batch(step) if self.stage.objective == "lm" else self.pair_batch(step)
            digest.update(batch.ids_BT.numpy().tobytes())
            digest.update(batch.labels_BT.numpy().tobytes())
        return digest.hexdigest()
