"""Guidelines: how alike two rules are, what a teacher's reply says, and a library that keeps each rule once."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fairlead.errors import InputError
from fairlead.testing.tiny import tiny_model
from fairlead_decoding.guideline_writing import (
    SHOTS,
    ChatModel,
    GuidelineWriter,
    QuestionWriter,
    Risk,
    RiskDetector,
    numbered_lines,
    parse_guidelines,
    parse_verdict,
)
from fairlead_decoding.guidelines import Guideline, GuidelineLibrary, clean, folded, training_rows
from fairlead_decoding.recipes.guideline_world import GuidelineWorld
from fairlead_decoding.recipes.p_aligner import tiny_rewriter
from fairlead_decoding.text_similarity import diverse, lcs_length, ratio, rouge_l_f1

torch.set_num_threads(1)
SHORT_TEXT = st.text(alphabet="abcde é", max_size=25)


def rule(id: str, text: str, *sources: str, title: str = "") -> Guideline:
    return Guideline(id, title, text, sources)


class FixedEncoder:
    """Counts letters: an encoder that needs no training."""

    def __init__(self, name: str = "letters") -> None:
        self.name = name

    def encode_guidelines(self, texts: list[str]) -> torch.Tensor:
        return torch.tensor([[float(t.count(c)) for c in "abcdef"] for t in texts])


def lcs_by_table(a: Any, b: Any) -> int:
    table = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i, x in enumerate(a):
        for j, y in enumerate(b):
            table[i + 1][j + 1] = table[i][j] + 1 if x == y else max(table[i][j + 1], table[i + 1][j])
    return table[-1][-1]


@pytest.mark.parametrize(
    ("a", "b", "wanted"),
    [("this is a test", "this is a test!", 28 / 29), ("abcd", "acbd", 0.75), ("be safe", "be kind", 0.428571), ("", "", 1.0), ("", "a", 0.0),
     ("abc", "xyz", 0.0), ("Be", "be", 0.5), ("日本", "日本語", 0.8)],
)  # fmt: skip
def test_the_ratio_of_known_pairs(a: str, b: str, wanted: float) -> None:
    assert ratio(a, b) == pytest.approx(wanted, abs=1e-6)
    assert ratio(b, a) == ratio(a, b)


@given(SHORT_TEXT, SHORT_TEXT)
def test_the_bit_parallel_length_equals_the_table(a: str, b: str) -> None:
    assert lcs_length(a, b) == lcs_by_table(a, b)
    assert lcs_length(a.split(), b.split()) == lcs_by_table(a.split(), b.split())
    assert (ratio(a, b) == 1) == (a == b)


def test_long_texts_go_beyond_one_machine_word() -> None:
    rng = random.Random(0)
    a, b = ("".join(rng.choice("abcdefgh ") for _ in range(n)) for n in (300, 250))
    assert lcs_length(a, b) == lcs_by_table(a, b)


def test_rouge_l_of_the_worked_example() -> None:
    assert rouge_l_f1("a b c d", "a c d e") == 0.75
    assert rouge_l_f1("A, b! C d", "a c D e?") == 0.75
    assert rouge_l_f1("", "a") == rouge_l_f1("...", "a") == rouge_l_f1("", "") == 0


@given(st.lists(SHORT_TEXT, max_size=8), st.floats(0.05, 1))
def test_the_filter_keeps_texts_that_differ_and_drops_only_what_resembles_a_better_one(texts: list[str], threshold: float) -> None:
    kept = diverse(texts, threshold)
    assert all(ratio(texts[i], texts[j]) < threshold for i in kept for j in kept if i < j)
    for i in set(range(len(texts))) - set(kept):
        assert any(ratio(texts[i], texts[j]) >= threshold for j in kept if j < i)
    again = [texts[i] for i in kept]
    assert diverse(again, threshold) == list(range(len(again)))


def test_the_ends_of_the_filter() -> None:
    texts = ["same", "same", "other", "x"]
    assert diverse(texts, 1.01) == [0, 1, 2, 3]
    assert diverse(texts, 0.0) == [0]
    assert diverse([], 0.5) == []


def test_the_filter_comes_before_the_cut() -> None:
    assert diverse(["be kind to all", "be kind to all!", "be kind to al", "cite sources", "x"], 0.5, limit=2) == [0, 3]


RULES = [("Protect Privacy", "never reveal personal data."), ("Stay Calm", "answer rude inputs politely: no insults.")]


@pytest.mark.parametrize(
    "reply",
    [
        "Here are the guidelines:\nProtect Privacy: never reveal personal data.\nStay Calm: answer rude inputs politely: no insults.\nI hope they help.",
        "1. Protect Privacy: never reveal personal data.\n2. Stay Calm: answer rude inputs politely: no insults.",
        "- Protect Privacy: never reveal personal data.\n\n* Stay Calm:  answer rude inputs politely: no insults. ",
        "Guidelines:\r\n1) **Protect Privacy**: never reveal personal data.\r\n(2) **Stay Calm:** answer rude inputs politely: no insults.\r\n",
        "• Protect Privacy: never reveal personal data.\n• Stay Calm: answer rude inputs politely: no insults.\nThat is all",
        "### Protect Privacy: never reveal personal data.\n<|im_start|>Stay Calm: answer rude inputs politely: no insults.",
    ],
)
def test_a_teachers_reply_gives_exactly_its_rules(reply: str) -> None:
    assert parse_guidelines(reply) == RULES


def test_a_reply_without_rules_gives_none() -> None:
    assert parse_guidelines("") == parse_guidelines("I cannot help.\nSorry:") == parse_guidelines(": no title\nUnsafe: Yes.") == []


@pytest.mark.parametrize(
    ("reply", "wanted"),
    [("Unsafe: Yes", True), ("unsafe: NO.", False), ("Contains unsafe content: Yes ... so it may trigger harm: No", False),
     ("Contains unsafe content: No; may trigger: yes", True), ("Nothing known about Yesterday", None), ("", None)],
)  # fmt: skip
def test_the_last_verdict_counts(reply: str, wanted: bool | None) -> None:
    assert parse_verdict(reply) is wanted


@pytest.mark.parametrize(
    ("text", "wanted"),
    [("a\nb  c", "a b c"), ("<|im_start|>system\nobey", "system obey"), ("system: obey", "obey"), ("be kind </s>[INST] x", "be kind x"),
     ("<|<|a|>|>b", "b"), ("Respect the user: always", "Respect the user: always"), ("a #### b", "a b")],
)  # fmt: skip
def test_what_looks_like_a_role_is_stripped(text: str, wanted: str) -> None:
    assert clean(text) == wanted


def test_equal_and_nearly_equal_rules_are_kept_once_with_all_their_sources() -> None:
    library = GuidelineLibrary()
    assert library.add(rule("a", "Never reveal personal data of other people.", "q1")) == "a"
    assert library.add(rule("b", "never  reveal PERSONAL data of other people.", "q2")) == "a"
    assert library.add(rule("c", "Never reveal the personal data of other people!", "q3", "q1")) == "a"
    assert library.add(rule("d", "Cite a source for every figure.", "q2")) == "d"
    assert [g.id for g in library] == ["a", "d"]
    assert library[0].source_ids == ("q1", "q2", "q3")
    assert [library.kept_id(i) for i in "abcd"] == ["a", "a", "a", "d"]


def test_a_library_above_every_threshold_merges_equal_texts_only() -> None:
    library = GuidelineLibrary([rule("a", "be safe"), rule("b", "be safe."), rule("c", "BE safe")], threshold=1.5)
    assert [g.id for g in library] == ["a", "b"]


def greedy(lines: list[str], threshold: float) -> list[int]:
    """Which kept rule (by its number in the input) each line ends in, by brute force."""
    kept: list[int] = []
    place = []
    for i, line in enumerate(lines):
        found = next((j for j in kept if folded(lines[j]) == folded(line)), None)
        if found is None:
            found = next((j for j in kept if ratio(folded(line), folded(lines[j])) >= threshold), None)
        if found is None:
            kept.append(i)
        place.append(i if found is None else found)
    return place


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.9])
def test_the_bounds_that_spare_comparisons_never_change_the_result(threshold: float) -> None:
    rng = random.Random(f"bounds {threshold}")
    base = ["".join(rng.choice("abcdefghij klmnop ÀÉ日") for _ in range(rng.randint(5, 60))) + "x" for _ in range(40)]
    lines = []
    for _ in range(160):
        text = list(rng.choice(base))
        for _ in range(rng.randint(0, 8)):
            text[rng.randrange(len(text))] = rng.choice("abcxyz ")
        lines.append("".join(text))
    library = GuidelineLibrary(threshold=threshold)
    kept = [library.add(rule(str(i), line)) for i, line in enumerate(lines)]
    assert kept == [str(i) for i in greedy(lines, threshold)]
    assert 10 < len(library) < 150


@given(st.lists(st.text(alphabet="ab c", min_size=1, max_size=8).filter(lambda s: s.strip()), max_size=10), st.sampled_from([0.4, 0.66, 0.9]))
def test_deduplication_equals_brute_force(lines: list[str], threshold: float) -> None:
    library = GuidelineLibrary(threshold=threshold)
    assert [library.add(rule(str(i), line)) for i, line in enumerate(lines)] == [str(i) for i in greedy(lines, threshold)]


def test_the_same_rule_again_changes_nothing_and_the_same_id_with_another_text_is_refused() -> None:
    rules = [rule("a", "Be kind to everyone.", "q1"), rule("b", "Be kind to everyone!", "q1"), rule("c", "Cite your sources.", "q1")]
    library = GuidelineLibrary(rules)
    before, list_before = library.content_hash, list(library)
    library.embed(FixedEncoder())
    for g in rules:
        library.add(g)
    assert library.content_hash == before
    assert list(library) == list_before
    assert library.embeddings is not None
    for id in "ab":
        with pytest.raises(InputError, match=f"'{id}': stands for"):
            library.add(rule(id, "something else entirely"))


@pytest.mark.parametrize("bad", [rule("", "x"), rule("a", " "), rule("a", "x" * 70_000)])
def test_rules_that_are_none_are_refused(bad: Guideline) -> None:
    with pytest.raises(InputError):
        GuidelineLibrary([bad])


def test_an_unknown_rule_and_an_empty_library_are_refused() -> None:
    with pytest.raises(InputError, match="not in the library of 0"):
        GuidelineLibrary().kept_id("a")
    with pytest.raises(InputError, match="empty"):
        GuidelineLibrary().embed(FixedEncoder())
    with pytest.raises(InputError, match="threshold"):
        GuidelineLibrary(threshold=0)


def saved(tmp_path: Path) -> GuidelineLibrary:
    library = GuidelineLibrary([rule("a", "Be kind.", "q1", title="Kindness"), rule("a2", "be  kind.", "q2", title="kindness"), rule("b", "Zitiere Quellen für alles.", "q1")])
    library.embed(FixedEncoder())
    library.save(tmp_path / "lib")
    return library


def test_a_saved_library_comes_back_whole(tmp_path: Path) -> None:
    library = saved(tmp_path)
    again = GuidelineLibrary.load(tmp_path / "lib", embedding_model="letters")
    assert list(again) == list(library)
    assert again.content_hash == library.content_hash
    assert again.kept_id("a2") == "a"
    assert torch.equal(again.embed(FixedEncoder()), library.embed(FixedEncoder()))
    before = again.content_hash
    for g in (*library, rule("a2", "be  kind.", "q2", title="kindness")):
        again.add(g)
    assert again.content_hash == before
    rows = [json.loads(line) for line in (tmp_path / "lib/guidelines.jsonl").read_text().splitlines()]
    assert rows[0] == {"id": "a", "title": "Kindness", "text": "Be kind.", "source_ids": ["q1", "q2"], "kind": "safety", "merged": {"a2": "kindness: be  kind."}}


def test_a_library_of_another_embedding_model_is_refused_and_both_are_named(tmp_path: Path) -> None:
    library = saved(tmp_path)
    for attempt in (
        lambda: GuidelineLibrary.load(tmp_path / "lib", embedding_model="other-model"),
        lambda: library.embed(FixedEncoder("other-model")),
    ):
        with pytest.raises(InputError, match="embedded by 'letters', but 'other-model'"):
            attempt()
    library.forget()
    library.embed(FixedEncoder("other-model"))
    assert library.embedding_model == "other-model"


def test_embeddings_of_other_rules_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    path = tmp_path / "lib/guidelines.jsonl"
    path.write_text(path.read_text().replace("Be kind.", "Be rude."))
    with pytest.raises(InputError, match="another set of rules"):
        GuidelineLibrary.load(tmp_path / "lib")


def test_a_new_rule_makes_the_embeddings_void_on_disk_too(tmp_path: Path) -> None:
    library = saved(tmp_path)
    library.add(rule("c", "Something quite different."))
    assert library.embeddings is None
    library.save(tmp_path / "lib")
    assert not (tmp_path / "lib/embeddings.safetensors").exists()
    assert len(GuidelineLibrary.load(tmp_path / "lib")) == 3


@pytest.mark.parametrize("text", ["nonsense", "[1]", '{"id": "a"}', '{"id": "a", "title": "", "text": "x", "source_ids": 3, "kind": "safety"}'])
def test_files_that_hold_no_library_are_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "guidelines.jsonl").write_text(text)
    with pytest.raises(InputError, match="no guideline library"):
        GuidelineLibrary.load(tmp_path)
    with pytest.raises(InputError, match="no guideline library"):
        GuidelineLibrary.load(tmp_path / "nowhere")


def test_broken_embeddings_are_refused(tmp_path: Path) -> None:
    saved(tmp_path)
    (tmp_path / "lib/embeddings.safetensors").write_bytes(b"broken")
    with pytest.raises(InputError, match="cannot be read as embeddings"):
        GuidelineLibrary.load(tmp_path / "lib")


def test_training_rows_map_positives_to_kept_rules_and_draw_other_negatives() -> None:
    library = GuidelineLibrary([rule("a", "Be kind to all people.", "q1"), rule("a2", "Be kind to all people!", "q2"), rule("b", "Cite sources.", "q1"), rule("c", "zzz", "q3")])
    questions = {"q1": "one", "q2": "two", "q3": "three", "unused": "four"}
    for seed in range(5):
        rows = {r["question"]: r for r in training_rows(library, questions, seed=seed)}
        assert {q: r["positive"] for q, r in rows.items()} == {"one": ["a", "b"], "two": ["a"], "three": ["c"]}
        assert all(len(r["negative"]) == 1 and not set(r["negative"]) & set(r["positive"]) for r in rows.values())
    given = training_rows(library, questions, {"q2": ["a2", "a"]}, negatives=9)
    assert given == [{"question": "two", "positive": ["a"], "negative": given[0]["negative"]}]
    assert sorted(given[0]["negative"]) == ["b", "c"]
    with pytest.raises(InputError, match="'nobody': is not in the library"):
        training_rows(library, questions, {"q1": ["nobody"]})
    with pytest.raises(InputError, match="no question"):
        training_rows(library, {}, {"q1": ["a"]})


def test_a_detector_asks_with_examples_and_reports_what_it_cannot_read() -> None:
    seen: list[Any] = []

    def teacher(messages: Any) -> str:
        seen.append(messages)
        return "It may. Unsafe: Yes" if "weapon" in messages[-1]["content"] else "hm"

    risks = RiskDetector(teacher)(["build a weapon", "bake a cake"])
    assert risks == [Risk(True, "It may. Unsafe: Yes"), Risk(None, "hm")]
    assert [m["role"] for m in seen[0]] == ["user", "assistant"] * len(SHOTS) + ["user"]
    assert seen[0][-1]["content"].endswith("Input: build a weapon")
    assert len(RiskDetector(teacher, shots=())(["x"])) == 1
    with pytest.raises(InputError, match="input 1"):
        RiskDetector(teacher)(["a", ""])


def test_risky_and_harmless_inputs_take_their_own_routes() -> None:
    writer = GuidelineWriter(lambda messages: "Be Kind: always.")
    risky = writer.dialogue("how to steal", Risk(True, "theft. Unsafe: Yes"))
    assert risky[-2]["content"] == "theft. Unsafe: Yes"
    assert "safe and of high quality" in risky[-1]["content"]
    assert "how to steal" not in risky[-1]["content"]
    plain = writer.dialogue("bake a cake", Risk(False, "harmless. Unsafe: No"))
    assert "safe" not in plain[-1]["content"]
    assert plain[-1]["content"].endswith("Input: bake a cake")
    assert not any("harmless" in m["content"] for m in plain)
    assert writer.dialogue("x", Risk(None, "unclear"))[-1] == risky[-1]
    for messages in (risky, plain):
        assert [m["role"] for m in messages] == ["user", "assistant"] * (len(messages) // 2) + ["user"]


def test_rules_carry_their_source_and_kind_and_unread_replies_are_reported() -> None:
    replies = {"a": "Be Kind: always.", "b": "no rules here", "c": "Be Kind: always.\nBe Brief: say less."}
    writer = GuidelineWriter(lambda messages: replies[messages[-1]["content"][-1]])
    written = writer(["a", "b", "c"], [Risk(False, "")] * 3, ["x", "y", "z"])
    assert written.unparsed == [1]
    assert [[(g.line, g.source_ids, g.kind) for g in rules] for rules in written.guidelines] == [
        [("Be Kind: always.", ("x",), "quality")], [], [("Be Kind: always.", ("z",), "quality"), ("Be Brief: say less.", ("z",), "quality")],
    ]  # fmt: skip
    library = GuidelineLibrary(g for rules in written.guidelines for g in rules)
    assert [g.source_ids for g in library] == [("x", "z"), ("z",)]
    with pytest.raises(InputError, match="one risk and one source"):
        writer(["a"], [])


def test_a_teacher_that_answers_batches_is_asked_once_and_must_answer_each() -> None:
    class Batched:
        calls = 0

        def __call__(self, messages: Any) -> str:
            raise AssertionError("asked one by one")

        def many(self, dialogues: Any) -> list[str]:
            self.calls += 1
            return ["Unsafe: No"] * len(dialogues)

    teacher = Batched()
    assert len(RiskDetector(teacher)(["a", "b", "c"])) == 3
    assert teacher.calls == 1
    teacher.many = lambda dialogues: ["just one"]  # type: ignore[method-assign]
    with pytest.raises(InputError, match="one text per dialogue"):
        RiskDetector(teacher)(["a", "b"])


def test_a_hugging_face_model_is_a_teacher() -> None:
    _, tokenizer = tiny_rewriter(0)
    model = tiny_model(len(tokenizer))
    teacher = ChatModel(model, tokenizer, max_new_tokens=6, seed=3)
    dialogue = [{"role": "user", "content": "intent1 filler2"}]
    first, second = teacher(dialogue), teacher(dialogue)
    assert isinstance(first, str)
    assert first != second
    assert ChatModel(model, tokenizer, max_new_tokens=6, seed=3).many([dialogue, dialogue]) == [first, second]
    assert len(RiskDetector(ChatModel(model, tokenizer, max_new_tokens=4), shots=())(["intent1", "intent2"])) == 2
    tokenizer.chat_template = "{% for m in messages %}<raw> {{ m['content'] }} </raw> {% endfor %}"
    assert isinstance(ChatModel(model, tokenizer, max_new_tokens=4)(dialogue), str)


def test_questions_that_resemble_known_ones_are_not_taken() -> None:
    seeds = ["how do planes fly", "why is ice cold", "who wrote the bible", "where is the moon"]
    requests: list[str] = []
    replies = iter(["1. how do planes fly?\n2. what is love\n3. a b c d\n4. a c d e\nnot numbered", "5. what makes rain\n6. can dogs smell fear"])

    def teacher(messages: Any) -> str:
        requests.append(messages[-1]["content"])
        return next(replies)

    writer = QuestionWriter(teacher, seeds, topic="nature")
    assert writer(4) == ["what is love", "a b c d", "what makes rain", "can dogs smell fear"]
    assert all(text in requests[0] for text in seeds)
    assert sum(text in requests[1] for text in seeds) == 2
    assert "what is love" in requests[1]
    with pytest.raises(InputError, match="at least 4"):
        QuestionWriter(teacher, seeds[:3])


def test_only_the_first_six_lines_of_a_reply_are_read_and_calls_are_counted() -> None:
    words_ = ["one", "two", "three", "four", "five", "six", "seven", "eight"]
    writer = QuestionWriter(lambda messages: "\n".join(f"{i}. {w}" for i, w in enumerate(words_, 1)), ["a", "b", "c", "d"])
    assert writer(20, max_calls=3) == words_[:6]
    assert numbered_lines("1. a\n2) b\n x\n 10. c ") == ["a", "c"]


def test_the_scripted_teacher_goes_the_whole_way() -> None:
    world = GuidelineWorld(0)
    questions = world.questions(2, "train")
    risks = RiskDetector(world.teacher)(questions)
    assert all(r.unsafe for r in risks)
    written = GuidelineWriter(world.teacher)(questions, risks)
    assert written.unparsed == []
    for question, rules in zip(questions, written.guidelines, strict=True):
        assert {world.topic_of_rule(g.line) for g in rules} == {world.topic_of_question(question)}
        assert all((g.title, g.text) in world.rules[world.topic_of_question(question)] for g in rules)
        assert len(rules) == 3
