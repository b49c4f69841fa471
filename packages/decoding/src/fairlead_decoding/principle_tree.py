"""Trees of rewrites as plain data: principles, nodes with their values, and the rows that a finished tree gives.

The values of principle-guided search (P-Aligner, arXiv 2508.04626): V_local of a node is the mean reward of its answers,
Q(c) = mean({V_local(c)} + {Q(child) of c}) a mean of means, reward the largest V_local of the subtree. Q is kept up to
date along the path to a new node. Growing trees is principle_search's.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from fairlead.errors import InputError
from fairlead.files import atomic_write

FALLBACK_DOMAIN = "Helpfulness"
FORMAT = 1
Mean = Literal["nested", "flat"]


@dataclass(frozen=True)
class Principle:
    """One way to improve an instruction: a name, what to do, and the domain that it is for."""

    name: str
    content: str
    domain: str = FALLBACK_DOMAIN


def load_principles(path: str | os.PathLike[str]) -> list[Principle]:
    """Principles of a JSON file {domain: [{"name", "content"}, ...]}; InputError for anything else or a name used twice."""
    try:
        table = json.loads(Path(path).read_text(encoding="utf-8"))
        found = [Principle(row["name"], row["content"], domain) for domain, rows in table.items() for row in rows]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{path}: is no file of principles, {{domain: [{{name, content}}]}} ({type(error).__name__}: {error})") from None
    names = [p.name for p in found]
    if len(set(names)) < len(names):
        raise InputError(f"{path}: the principle {next(n for n in names if names.count(n) > 1)!r} stands there twice")
    return found


def actions(principles: Sequence[Principle], category: str | None = None) -> list[Principle]:
    """Principles for an instruction: those of its category, then all for helpfulness (these alone for an unknown one).

    InputError when there is none.
    """
    own = [p for p in principles if p.domain == category and category != FALLBACK_DOMAIN]
    found = own + [p for p in principles if p.domain == FALLBACK_DOMAIN]
    if not found:
        known = ", ".join(dict.fromkeys(p.domain for p in principles)) or "none"
        raise InputError(f"category {category!r}: has no principles, and there are none for {FALLBACK_DOMAIN}; known domains: {known}")
    return found


@dataclass
class Node:
    """One instruction of a tree.

    visits: nodes of its subtree that were tried, itself included (the root: without itself). reward: largest V_local
    of its subtree. local_mean: V_local, None until scored (the root is scored last).
    """

    id: str
    index: int
    instruction: str
    raw_instruction: str
    action: str | None = None
    parent: int | None = None
    children: list[int] = field(default_factory=list)
    visits: int = 0
    reward: float | None = None
    local_responses: list[str] = field(default_factory=list)
    local_rewards: list[float] = field(default_factory=list)
    local_mean: float | None = None


@dataclass
class Tree:
    """A search over rewrites of one instruction, as plain data: `to_json`, `from_json` keep all of it.

    state: "growing", "failed" (an improver or responder gave up; searching again goes on) or "finished" (root scored).
    seed, draws: the random stream, whose k-th number is a function of (seed, id, k) alone.
    """

    id: str
    category: str | None
    actions: list[Principle]
    nodes: list[Node]
    seed: int = 0
    draws: int = 0
    state: str = "growing"
    failure: str = ""

    def __post_init__(self) -> None:
        if not self.actions:
            raise InputError(f"tree {self.id}: needs at least one principle")
        self._nested = [0.0] * len(self.nodes)
        self._sums = [0.0] * len(self.nodes)
        for index in reversed(range(1, len(self.nodes))):  # a child comes after its parent
            self._refresh(index)

    @property
    def root(self) -> Node:
        return self.nodes[0]

    @property
    def iterations(self) -> int:
        """Iterations done: nodes but the root."""
        return len(self.nodes) - 1

    def value(self, index: int, mean: Mean = "nested") -> float:
        """Q of a node below the root: the mean of means, or the flat mean over its subtree."""
        return self._nested[index] if mean == "nested" else self._sums[index] / self.nodes[index].visits

    def attach(self, parent: int, action: str, text: str, responses: Sequence[str], rewards: Sequence[float]) -> Node:
        """Add a scored child and carry it back to the root: visits + 1, reward = max."""
        index = len(self.nodes)
        child = Node(f"{self.id}/{index}", index, text, self.root.instruction, action, parent)
        self.nodes.append(child)
        self._nested.append(0.0)
        self._sums.append(0.0)
        self.nodes[parent].children.append(index)
        _score(child, responses, rewards)
        place: int | None = index
        while place is not None:
            node = self.nodes[place]
            node.visits += 1
            self._back_up(place)
            if place:
                self._refresh(place)
            place = node.parent
        return child

    def score_root(self, responses: Sequence[str], rewards: Sequence[float]) -> None:
        """Give the raw instruction its value; the search ends with it."""
        _score(self.root, responses, rewards)
        self._back_up(0)
        self.state, self.failure = "finished", ""

    def unused(self, index: int) -> list[Principle]:
        """Principles that no child of the node was made with."""
        taken = {self.nodes[c].action for c in self.nodes[index].children}
        return [p for p in self.actions if p.name not in taken]

    def pick(self, choices: Sequence[Principle]) -> Principle:
        """A uniform choice by the next number of the stream, which moves on only when `draws` is raised."""
        return random.Random(f"{self.seed} {self.id} {self.draws}").choice(choices)

    def to_json(self) -> str:
        """The whole tree on one line; equal trees give equal bytes."""
        return json.dumps({"format": FORMAT, **asdict(self)}, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str) -> Tree:
        """The tree behind `to_json`; InputError for other text."""
        try:
            row = json.loads(text)
            if row.pop("format") != FORMAT:
                raise ValueError(f"format must be {FORMAT}")
            row["actions"] = [Principle(**p) for p in row["actions"]]
            row["nodes"] = [Node(**n) for n in row["nodes"]]
            return cls(**row)
        except (ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
            raise InputError(f"tree: the text is no saved tree ({type(error).__name__}: {error})") from None

    def _back_up(self, index: int) -> None:
        node = self.nodes[index]
        below = [self.nodes[c].reward for c in node.children]
        node.reward = max(v for v in [node.local_mean, *below] if v is not None)

    def _refresh(self, index: int) -> None:
        node = self.nodes[index]
        own = node.local_mean
        assert own is not None  # nodes below the root are attached with their score
        self._nested[index] = (own + sum(self._nested[c] for c in node.children)) / (1 + len(node.children))
        self._sums[index] = own + sum(self._sums[c] for c in node.children)


def _score(node: Node, responses: Sequence[str], rewards: Sequence[float]) -> None:
    node.local_responses, node.local_rewards = list(responses), [float(r) for r in rewards]
    node.local_mean = sum(node.local_rewards) / len(node.local_rewards)


def plant(
    instructions: Sequence[str], principles: Sequence[Principle], categories: Sequence[str | None] | None = None, *,
    seed: int = 0, first_index: int = 0,
) -> list[Tree]:  # fmt: skip
    """One unsearched tree per instruction; its id is its index, counted from `first_index`."""
    kinds = [None] * len(instructions) if categories is None else list(categories)
    if len(kinds) != len(instructions):
        raise InputError(f"plant: needs one category per instruction, got {len(kinds)} for {len(instructions)}")
    trees = []
    for place, (text, category) in enumerate(zip(instructions, kinds, strict=True)):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"instruction {first_index + place}: must be text that is not empty, got {text!r}")
        name = str(first_index + place)
        trees.append(Tree(name, category, actions(principles, category), [Node(f"{name}/0", 0, text, text)], seed))
    return trees


def save_trees(path: str | os.PathLike[str], trees: Iterable[Tree]) -> None:
    """One tree per line, written beside the file and renamed."""
    with atomic_write(path) as stream:
        stream.writelines(tree.to_json() + "\n" for tree in trees)


def load_trees(path: str | os.PathLike[str]) -> list[Tree]:
    """Trees of a file that `save_trees` wrote."""
    try:
        lines = Path(path).read_text(encoding="utf-8").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: cannot be read ({error})") from None
    return [Tree.from_json(line) for line in lines if line]


def best_node(tree: Tree) -> Node:
    """The node with the highest V_local, root included; ties: the lowest index."""
    return max(_scored(tree), key=lambda node: (node.local_mean, -node.index))


def best_path(tree: Tree) -> list[Node]:
    """From the root to the node with the highest V_local."""
    node: Node = best_node(tree)
    path = [node]
    while node.parent is not None:
        node = tree.nodes[node.parent]
        path.append(node)
    return path[::-1]


def best_worst_pairs(trees: Iterable[Tree]) -> list[dict[str, Any]]:
    """One row {raw, chosen, rejected, chosen_value, rejected_value, category, tree} per tree: its texts of highest and
    lowest V_local, the raw one included (ties: the lowest index). A tree whose values are all equal gives no row."""
    rows = []
    for tree in trees:
        best, worst = best_node(tree), min(_scored(tree), key=lambda node: (node.local_mean, node.index))
        if best.local_mean == worst.local_mean:
            continue
        rows.append(
            {
                "raw": tree.root.instruction, "chosen": best.instruction, "rejected": worst.instruction,
                "chosen_value": best.local_mean, "rejected_value": worst.local_mean, "category": tree.category, "tree": tree.id,
            }
        )  # fmt: skip
    return rows


def positive_transitions(trees: Iterable[Tree]) -> list[dict[str, Any]]:
    """One row {instruction, principle, content, improved, gain, tree} per edge whose child has a higher V_local."""
    rows = []
    for tree in trees:
        content = {p.name: p.content for p in tree.actions}
        for child in _scored(tree):
            if child.parent is None or child.action is None:
                continue
            parent = tree.nodes[child.parent]
            gain = float(child.local_mean or 0.0) - float(parent.local_mean or 0.0)
            if gain > 0:
                rows.append(
                    {
                        "instruction": parent.instruction, "principle": child.action, "content": content[child.action],
                        "improved": child.instruction, "gain": gain, "tree": tree.id,
                    }
                )  # fmt: skip
    return rows


def _scored(tree: Tree) -> list[Node]:
    if tree.state != "finished":
        raise InputError(f"tree {tree.id}: is {tree.state}, not finished{f' ({tree.failure})' if tree.failure else ''}; search it again first")
    return tree.nodes
