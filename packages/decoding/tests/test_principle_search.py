"""Principle-guided search: the published arithmetic, the laws of a tree, and what a kill or a failure leaves behind."""

from __future__ import annotations

import collections
import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest
from scipy.stats import chisquare

from fairlead.errors import FairleadError, InputError
from fairlead_decoding.principle_search import (
    Node,
    Principle,
    PrincipleSearch,
    Tree,
    actions,
    best_node,
    best_path,
    best_worst_pairs,
    load_principles,
    load_trees,
    local_values,
    one_by_one,
    plant,
    positive_transitions,
    save_trees,
    select,
    ucb,
)

FIVE = [Principle(name, f"do {name}") for name in "abcde"]
SHARED = next((p / "shared/data/p-aligner" for p in Path(__file__).resolve().parents if (p / "shared/data/p-aligner").is_dir()), None)


def improver(texts: list[str], principles: list[Principle]) -> list[str | None]:
    return [f"{text} +{p.name}" for text, p in zip(texts, principles, strict=True)]


def responder(texts: list[str], n: int) -> list[list[str]]:
    return [[f"{text} #{k}" for k in range(n)] for text in texts]


@one_by_one
def noisy(raw: str, answer: str) -> float:
    """A number that depends on the answer alone, as a reward model's does."""
    return random.Random(f"{raw} {answer}").gauss(0, 1)


def grown(iterations: int, instructions: int = 1, principles: list[Principle] = FIVE, seed: int = 0, **settings: Any) -> list[Tree]:
    trees = plant([f"task {i}" for i in range(instructions)], principles, seed=seed)
    return PrincipleSearch(iterations=iterations, **settings)(trees, improver, responder, noisy)


def by_hand(values: list[float], parents: list[int], principles: list[Principle] = FIVE) -> Tree:
    """A tree with one answer of each value; parents count from the root, 0."""
    tree = plant(["raw"], principles)[0]
    for value, parent in zip(values, parents, strict=True):
        tree.attach(parent, tree.unused(parent)[0].name, f"n{len(tree.nodes)}", ["x"], [value])
    return tree


def test_the_upper_bounds_of_the_worked_example() -> None:
    tree = by_hand([0.6, 0.7, 0.9, 0.3, 0.5], [0, 0, 1, 1, 4])
    a, b = tree.nodes[1], tree.nodes[2]
    tree.root.visits += 1  # the example's parent was visited 6 times
    assert (a.visits, b.visits, tree.root.visits) == (4, 1, 6)
    assert tree.value(1) == pytest.approx(0.633333, abs=1e-6)
    assert tree.value(1, "flat") == pytest.approx(0.575)
    for w, of_a, of_b in ((0.1, 0.700262, 0.833857), (1.0, 1.302616, 2.038566)):
        assert ucb(tree.value(1), 4, 6, w) == pytest.approx(of_a, abs=1e-6)
        assert ucb(tree.value(2), 1, 6, w) == pytest.approx(of_b, abs=1e-6)


@pytest.mark.parametrize("iterations", [0, 1, 5, 17])
def test_a_tree_has_one_node_per_iteration_and_as_many_visits(iterations: int) -> None:
    (tree,) = grown(iterations)
    assert tree.state == "finished"
    assert len(tree.nodes) == iterations + 1
    assert tree.root.visits == iterations
    assert sum(tree.nodes[c].visits for c in tree.root.children) == iterations
    assert [n.index for n in tree.nodes] == list(range(iterations + 1))


def test_no_iterations_score_the_raw_instruction_and_give_no_pair() -> None:
    trees = grown(0)
    assert trees[0].root.local_mean is not None
    assert best_worst_pairs(trees) == []
    assert positive_transitions(trees) == []


def test_equal_seeds_give_equal_bytes_and_another_seed_other_trees() -> None:
    first, again, other = (grown(12, 3, seed=s) for s in (4, 4, 5))
    assert [t.to_json() for t in first] == [t.to_json() for t in again]
    assert [t.to_json() for t in first] != [t.to_json().replace('"seed": 5', '"seed": 4') for t in other]


def test_principles_are_drawn_uniformly_and_independently() -> None:
    trees = grown(3, 1200, principles=FIVE[:3], n=1)
    orders = collections.Counter("".join(str(n.action) for n in t.nodes[1:]) for t in trees)
    assert len(orders) == 6
    assert chisquare(list(orders.values())).pvalue > 1e-3
    assert {t.draws for t in trees} == {3}


def test_a_tree_does_not_depend_on_the_trees_beside_it() -> None:
    together = grown(12, 3)
    alone = plant(["task 2"], FIVE, first_index=2)
    PrincipleSearch(iterations=12)(alone, improver, responder, noisy)
    assert alone[0].to_json() == together[2].to_json()


@pytest.mark.parametrize("options", [{}, {"standardise": True}, {"mean": "flat"}])
def test_a_search_saved_at_iteration_7_and_taken_up_again_equals_one_in_a_go(tmp_path: Path, options: dict[str, Any]) -> None:
    class KilledError(Exception):
        pass

    def kill(made: int) -> None:
        if trees[0].iterations == 7:
            save_trees(tmp_path / "trees.jsonl", trees)
            raise KilledError

    trees = plant(["task 0", "task 1"], FIVE)
    with pytest.raises(KilledError):
        PrincipleSearch(iterations=20, **options)(trees, improver, responder, noisy, after=kill)
    resumed = load_trees(tmp_path / "trees.jsonl")
    assert [t.iterations for t in resumed] == [7, 7]
    PrincipleSearch(iterations=20, **options)(resumed, improver, responder, noisy)
    assert [t.to_json() for t in resumed] == [t.to_json() for t in grown(20, 2, **options)]


def test_a_finished_search_can_be_made_longer() -> None:
    trees = grown(7)
    PrincipleSearch(iterations=20)(trees, improver, responder, noisy)
    assert trees[0].to_json() == grown(20)[0].to_json()


def test_text_that_is_no_saved_tree_is_refused() -> None:
    whole = json.loads(grown(2)[0].to_json())
    for bad in ("", "[]", "{}", json.dumps({**whole, "format": 9}), json.dumps({**whole, "nodes": [{}]}), json.dumps({**whole, "x": 1})):
        with pytest.raises(InputError, match="no saved tree"):
            Tree.from_json(bad)


@pytest.mark.parametrize("seed", range(4))
def test_the_backed_up_reward_is_the_largest_value_of_the_subtree(seed: int) -> None:
    (tree,) = grown(23, seed=seed)

    def values(index: int) -> list[float]:
        node = tree.nodes[index]
        assert node.local_mean is not None
        return [node.local_mean] + [v for c in node.children for v in values(c)]

    for node in tree.nodes:
        assert node.reward == max(values(node.index))


@pytest.mark.parametrize("seed", range(4))
def test_cached_values_equal_the_recursion(seed: int) -> None:
    (tree,) = grown(23, seed=seed)

    def nested(index: int) -> float:
        node = tree.nodes[index]
        assert node.local_mean is not None
        return sum([node.local_mean, *(nested(c) for c in node.children)]) / (1 + len(node.children))

    def below(index: int) -> list[float]:
        node = tree.nodes[index]
        assert node.local_mean is not None
        return [node.local_mean] + [v for c in node.children for v in below(c)]

    for index in range(1, len(tree.nodes)):
        assert tree.value(index) == pytest.approx(nested(index))
        assert tree.value(index, "flat") == pytest.approx(sum(below(index)) / len(below(index)))


def test_every_principle_is_tried_at_the_root_before_anything_deeper() -> None:
    (tree,) = grown(5)
    assert sorted(str(n.action) for n in tree.nodes[1:]) == list("abcde")
    assert {n.parent for n in tree.nodes[1:]} == {0}
    assert select(tree, 0.1) == max(tree.root.children, key=tree.value)  # one visit each: the bonus is equal
    (longer,) = grown(6)
    assert longer.nodes[6].parent == max(range(1, 6), key=lambda i: (longer.nodes[i].local_mean, -i))


def test_without_exploration_the_best_mean_is_taken() -> None:
    tree = by_hand([0.1, 0.9, 0.2, 0.3, 0.0], [0] * 5)
    tree.attach(2, "a", "n6", ["x"], [0.5])
    assert tree.value(2) == pytest.approx(0.7)
    assert select(tree, 0.0) == 2
    tree.attach(2, "b", "n7", ["x"], [-3.0])
    assert tree.value(2) == pytest.approx((0.9 + 0.5 - 3.0) / 3)
    assert select(tree, 0.0) == 4


def test_with_much_exploration_siblings_are_visited_evenly() -> None:
    (tree,) = grown(60, w=1e6, principles=FIVE[:3])
    for node in tree.nodes:
        if len(node.children) == 3:
            visits = [tree.nodes[c].visits for c in node.children]
            assert max(visits) - min(visits) <= 1
    assert sum(len(n.children) == 3 for n in tree.nodes) > 5


def test_standardised_selection_does_not_depend_on_the_unit_of_the_reward() -> None:
    def shape(factor: float, offset: float, standardise: bool) -> list[Any]:
        def reward(raws: list[str], answers: list[str]) -> list[float]:
            return [offset + factor * r for r in noisy(raws, answers)]

        trees = plant([f"task {i}" for i in range(6)], FIVE)
        PrincipleSearch(iterations=20, w=0.5, standardise=standardise)(trees, improver, responder, reward)
        return [[(n.parent, n.action) for n in t.nodes] for t in trees]

    assert shape(1, 0, True) == shape(1 / 128, 3, True)
    assert shape(1, 0, False) != shape(1 / 128, 3, False)


def test_standardising_values_without_spread_leaves_the_oldest_child() -> None:
    tree = by_hand([0.5] * 5, [0] * 5)
    assert select(tree, 0.0, standardise=True) == 1


def test_ties_go_to_the_oldest_child() -> None:
    assert select(by_hand([0.2, 0.7, 0.7, 0.1, 0.7], [0] * 5), 0.1) == 2


@pytest.mark.parametrize("seed", range(3))
def test_exports_equal_brute_force(seed: int) -> None:
    trees = grown(20, 8, seed=seed)
    edges = [
        (t.nodes[n.parent].instruction, n.instruction) for t in trees for n in t.nodes
        if n.parent is not None and n.local_mean > t.nodes[n.parent].local_mean
    ]  # fmt: skip
    rows = positive_transitions(trees)
    assert [(r["instruction"], r["improved"]) for r in rows] == edges
    assert all(r["gain"] > 0 and r["improved"].endswith(f"+{r['principle']}") and r["content"] == f"do {r['principle']}" for r in rows)
    for tree, pair in zip(trees, best_worst_pairs(trees), strict=True):
        values = [n.local_mean for n in tree.nodes]
        assert (pair["chosen_value"], pair["rejected_value"]) == (max(values), min(values))
        assert pair["chosen"] == tree.nodes[values.index(max(values))].instruction
        assert pair["rejected"] == tree.nodes[values.index(min(values))].instruction
        path = best_path(tree)
        assert path[0] is tree.root
        assert path[-1] is best_node(tree)
        assert all(b.parent == a.index for a, b in itertools.pairwise(path))


def test_a_raw_instruction_that_is_best_is_its_own_chosen_text() -> None:
    trees = plant(["leave me"], FIVE)
    PrincipleSearch(iterations=6)(trees, improver, responder, one_by_one(lambda raw, answer: -len(answer)))
    (pair,) = best_worst_pairs(trees)
    assert pair["chosen"] == pair["raw"] == "leave me"
    assert [n.index for n in best_path(trees[0])] == [0]


def test_a_tree_of_equal_values_gives_no_pair() -> None:
    trees = plant(["x"], FIVE)
    PrincipleSearch(iterations=6)(trees, improver, responder, one_by_one(lambda raw, answer: 0.5))
    assert best_worst_pairs(trees) == []
    assert positive_transitions(trees) == []
    assert best_node(trees[0]) is trees[0].root


def test_the_rewritten_text_is_answered_and_the_raw_one_is_judged() -> None:
    asked: list[str] = []
    judged: list[tuple[str, str]] = []

    def spy_responder(texts: list[str], n: int) -> list[list[str]]:
        asked.extend(texts)
        return responder(texts, n)

    def spy_reward(raws: list[str], answers: list[str]) -> list[float]:
        judged.extend(zip(raws, answers, strict=True))
        return noisy(raws, answers)

    trees = plant(["raw one"], FIVE)
    PrincipleSearch(iterations=9)(trees, improver, spy_responder, spy_reward)
    assert {raw for raw, _ in judged} == {"raw one"}
    assert sorted(asked) == sorted(n.instruction for n in trees[0].nodes)
    assert len(judged) == 3 * 10


def test_all_trees_share_one_batch_per_iteration() -> None:
    sizes: dict[str, list[int]] = {"improver": [], "responder": [], "reward": []}

    def counted(name: str, function: Any) -> Any:
        def call(first: list[str], second: Any) -> Any:
            sizes[name].append(len(first))
            return function(first, second)

        return call

    trees = plant([f"t{i}" for i in range(7)], FIVE)
    PrincipleSearch(iterations=4)(
        trees, counted("improver", improver), counted("responder", responder), counted("reward", noisy)
    )
    assert sizes == {"improver": [7] * 4, "responder": [7] * 5, "reward": [21] * 5}


def test_an_improver_that_gives_up_leaves_a_tree_that_can_go_on() -> None:
    calls = 0

    def failing(texts: list[str], principles: list[Principle]) -> list[str | None]:
        nonlocal calls
        calls += 1
        return [None] if calls == 3 else improver(texts, principles)

    trees = plant(["task 0"], FIVE)
    search = PrincipleSearch(iterations=8, retries=1)
    (tree,) = search(trees, failing, responder, noisy)
    assert tree.state == "failed"
    assert "improver" in tree.failure
    assert len(tree.nodes) == 3
    assert tree.root.visits == 2
    with pytest.raises(InputError, match="search it again"):
        best_worst_pairs([tree])
    reloaded = Tree.from_json(tree.to_json())
    (done,) = search([reloaded], failing, responder, noisy)
    assert (done.state, done.failure, len(done.nodes)) == ("finished", "", 9)
    assert sorted(str(done.nodes[c].action) for c in done.root.children) == list("abcde")


def test_one_failing_tree_does_not_hold_up_the_others() -> None:
    def failing(texts: list[str], principles: list[Principle]) -> list[str | None]:
        return [None if t.startswith("bad") else m for t, m in zip(texts, improver(texts, principles), strict=True)]

    trees = PrincipleSearch(iterations=3)(plant(["bad", "good"], FIVE), failing, responder, noisy)
    assert [(t.state, t.iterations) for t in trees] == [("failed", 0), ("finished", 3)]


def test_an_improver_is_asked_again_before_its_tree_fails() -> None:
    asked: list[str] = []

    def late(texts: list[str], principles: list[Principle]) -> list[str | None]:
        asked.extend(texts)
        return [None, " "][: len(texts)] if len(asked) < 4 else improver(texts, principles)

    (tree,) = PrincipleSearch(iterations=1, retries=4)(plant(["x"], FIVE), late, responder, noisy)
    assert (tree.state, len(asked)) == ("finished", 4)
    asked.clear()
    (tree,) = PrincipleSearch(iterations=1, retries=3)(plant(["x"], FIVE), late, responder, noisy)
    assert (tree.state, len(asked)) == ("failed", 3)


def test_a_failed_responder_leaves_no_child_and_no_visit() -> None:
    def silent(texts: list[str], n: int) -> list[Any]:
        return [None if "+" in t else a for t, a in zip(texts, responder(texts, n), strict=True)]

    (tree,) = PrincipleSearch(iterations=2)(plant(["x"], FIVE), improver, silent, noisy)
    assert (tree.state, len(tree.nodes), tree.root.visits, tree.root.children) == ("failed", 1, 0, [])


@pytest.mark.parametrize(
    ("reward", "message"),
    [
        (one_by_one(lambda raw, answer: float("nan")), "NaN for an answer to 'x'"),
        (lambda raws, answers: [0.0], "1 values for 3 answers"),
    ],
)
def test_bad_rewards_are_refused_and_leave_the_tree_as_it_was(reward: Any, message: str) -> None:
    trees = plant(["x"], FIVE)
    before = trees[0].to_json()
    with pytest.raises(InputError, match=message):
        PrincipleSearch(iterations=2)(trees, improver, responder, reward)
    assert trees[0].to_json() == before


def test_wrong_numbers_of_results_are_refused() -> None:
    with pytest.raises(InputError, match="improver: gave 2 texts for 1"):
        PrincipleSearch()(plant(["x"], FIVE), lambda texts, principles: ["a", "b"], responder, noisy)
    with pytest.raises(InputError, match="improver: must give text"):
        PrincipleSearch()(plant(["x"], FIVE), lambda texts, principles: [1], responder, noisy)  # type: ignore[list-item]
    with pytest.raises(InputError, match="3 answers to each"):
        local_values(lambda texts, n: [["a"]], noisy, ["x"], ["x"], 3)


@pytest.mark.parametrize("settings", [{"n": 0}, {"iterations": -1}, {"w": -0.1}, {"w": float("inf")}, {"retries": 0}, {"mean": "median"}])
def test_settings_out_of_range_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(FairleadError, match=next(iter(settings))):
        PrincipleSearch(**settings)


def test_empty_instructions_and_lists_that_do_not_match_are_refused() -> None:
    with pytest.raises(InputError, match="instruction 1"):
        plant(["a", " "], FIVE)
    with pytest.raises(InputError, match="one category per instruction"):
        plant(["a", "b"], FIVE, ["Math"])
    with pytest.raises(InputError, match="at least one principle"):
        Tree("0", None, [], [Node("0/0", 0, "a", "a")])


def test_a_category_without_principles_is_refused() -> None:
    with pytest.raises(InputError, match="known domains: Math"):
        actions([Principle("p", "c", "Math")], "Poetry")


def test_files_that_hold_no_principles_are_refused(tmp_path: Path) -> None:
    for text in ("", "[1]", '{"Math": [{"name": "a"}]}'):
        (tmp_path / "p.json").write_text(text)
        with pytest.raises(InputError, match="no file of principles"):
            load_principles(tmp_path / "p.json")
    (tmp_path / "p.json").write_text('{"Math": [{"name": "a", "content": "x"}], "Honesty": [{"name": "a", "content": "y"}]}')
    with pytest.raises(InputError, match="'a' stands there twice"):
        load_principles(tmp_path / "p.json")


@pytest.mark.skipif(SHARED is None, reason="shared/data/p-aligner is not in this checkout")
@pytest.mark.parametrize(
    ("category", "count"),
    [(None, 3), ("Helpfulness", 3), ("Poetry", 3), ("Honesty", 4), ("Harmlessness", 5), ("Math", 5), ("Coding & Debugging", 5)],
)
def test_the_published_principles_give_three_to_five_actions(category: str | None, count: int) -> None:
    assert SHARED is not None
    principles = load_principles(SHARED / "principles.json")
    assert len(principles) == 10
    found = actions(principles, category)
    assert len(found) == count
    assert {p.domain for p in found} <= {category, "Helpfulness"}


@pytest.mark.skipif(SHARED is None, reason="shared/data/p-aligner is not in this checkout")
def test_published_prompts_are_searched_by_their_category() -> None:
    assert SHARED is not None
    rows = [json.loads(line) for line in (SHARED / "bpo_test.json").read_text(encoding="utf-8").splitlines() if line.strip()]
    assert len(rows) == 200
    principles = load_principles(SHARED / "principles.json")
    trees = plant([r["context"][-1]["content"] for r in rows], principles, [r["category"] for r in rows])
    PrincipleSearch(iterations=6, n=1)(trees, improver, responder, noisy)
    assert all(t.state == "finished" and len(t.nodes) == 7 for t in trees)
    assert [Tree.from_json(t.to_json()).to_json() for t in trees] == [t.to_json() for t in trees]
