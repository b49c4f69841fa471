"""Reading and conversion of preference data, and what is said of wrong rows."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from fairlead.errors import DataUnavailableError, InputError
from fairlead.testing import save_tiny_model
from fairlead_training import tokenize
from fairlead_training.data import convert, read


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("model")
    save_tiny_model(folder)
    return AutoTokenizer.from_pretrained(folder)


def test_pairs_become_labels_and_labels_become_the_pairs_again() -> None:
    pairs = [{"prompt": "a", "chosen": "b", "rejected": "c", "id": 7}, {"prompt": "d", "chosen": "e", "rejected": "f", "id": 8}]
    labels, _ = convert(pairs, "unpaired")
    assert labels[:2] == [
        {"prompt": "a", "completion": "b", "label": True, "id": 7},
        {"prompt": "a", "completion": "c", "label": False, "id": 7},
    ]
    assert convert(labels, "pairs")[0] == pairs
    assert convert(pairs, "pairs")[0] == pairs


def test_labels_with_one_prompt_pair_every_wanted_with_every_unwanted_completion() -> None:
    rows = [{"prompt": p, "completion": c, "label": w} for p, c, w in [("a", "1", True), ("b", "2", True), ("a", "3", False), ("a", "4", True)]]
    made, report = convert(rows, "pairs")
    assert made == [{"prompt": "a", "chosen": "1", "rejected": "3"}, {"prompt": "a", "chosen": "4", "rejected": "3"}]
    assert report.rows == 2 and report.dropped == {"without a better and a worse completion": 1}
    ranked, _ = convert(rows, "ranked")
    assert ranked == [{"prompt": "a", "completions": ["1", "3", "4"], "ranks": [0, 1, 0]}]
    assert rows[0] == {"prompt": "a", "completion": "1", "label": True}


def test_a_ranked_list_gives_all_its_pairs_or_the_best_and_the_worst() -> None:
    row = {"prompt": "a", "completions": ["x", "y", "z"], "ranks": [1, 0, 1]}
    assert [(r["chosen"], r["rejected"]) for r in convert([row], "pairs")[0]] == [("y", "x"), ("y", "z")]
    scored = {"prompt": "a", "completions": ["x", "y", "z"], "rewards": [0.1, 0.9, 0.5]}
    assert [(r["chosen"], r["rejected"]) for r in convert([scored], "pairs")[0]] == [("y", "z"), ("y", "x"), ("z", "x")]
    assert convert([scored], "pairs", pairs="extremes")[0] == [{"prompt": "a", "chosen": "y", "rejected": "x"}]
    assert [r["label"] for r in convert([row], "unpaired")[0]] == [False, True, False]
    assert [r["label"] for r in convert([scored], "unpaired", threshold=0.5)[0]] == [False, True, True]
    assert convert([scored], "ranked")[0] == [scored]


def test_several_rejected_and_messages_are_converted() -> None:
    user, yes, no = {"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}, {"role": "assistant", "content": "n"}
    made, _ = convert([{"chosen": [user, yes], "rejected": [user, no]}], "unpaired")
    assert made[0] == {"prompt": [user], "completion": [yes], "label": True}
    made, _ = convert([{"prompt": "a", "chosen": "b", "rejected": ["c", "d"]}], "ranked")
    assert made == [{"prompt": "a", "completions": ["b", "c", "d"], "ranks": [0, 1, 1]}]


@pytest.mark.parametrize(
    ("rows", "shape", "message"),
    [
        ([{"prompt": "a", "completion": "b"}], "pairs", "row 0: is a demonstration"),
        ([{"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2]}], "unpaired", "threshold: labels from rewards need"),
        ([{"prompt": "a", "completions": ["b", "c"], "ranks": [0.5, 1]}], "pairs", "row 0: ranks: must be whole numbers from 0"),
    ],
)
def test_what_cannot_be_converted_is_said(rows: Any, shape: Any, message: str) -> None:
    with pytest.raises(InputError) as error:
        convert(rows, shape)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_files_and_rows_in_memory_are_read(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"prompt": "a", "completion": "b"}) + "\n")
    assert [dict(row) for row in read(path)] == read([{"prompt": "a", "completion": "b"}])
    with pytest.raises(InputError, match="the data set: holds no rows"):
        read([])
    with pytest.raises(DataUnavailableError, match="no/such: no data set to be had"):
        read("no/such")


def test_all_wrong_rows_are_counted_and_the_first_is_explained(tokenizer: Any) -> None:
    good = {"prompt": "w1", "chosen": " w2", "rejected": " w3"}
    rows = [good, {**good, "chosen": None}, good, {"prompt": "w1", "completion": " w2", "label": 3}, *[{"text": "a"}] * 6]
    with pytest.raises(InputError) as error:
        tokenize(rows, tokenizer)
    assert str(error.value) == "row 1: column chosen is missing; 7 more rows are wrong (row 3, row 4, row 5, row 6, row 7, ...)"


def test_a_conversation_is_the_prompt_of_its_last_answer(tokenizer: Any) -> None:
    tokenizer.chat_template = "{% for m in messages %}w{{ loop.index }} {{ m.content }} {% endfor %}{% if add_generation_prompt %}w9 {% endif %}"
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]
    messages = [{"role": role, "content": text} for role, text in turns]
    made, _ = tokenize([{"messages": messages}], tokenizer)
    split, _ = tokenize([{"prompt": messages[:-1], "completion": messages[-1:]}], tokenizer)
    assert made == split and made[0]["role"] == [1]
    with pytest.raises(InputError, match="messages: must be a conversation that ends with an answer"):
        tokenize([{"messages": messages[:-1]}], tokenizer)


def test_long_rows_lose_the_beginning_of_their_prompt_or_the_end_of_their_completions(tokenizer: Any) -> None:
    row = {"prompt": "w1 w2 w3 w4", "chosen": " w5 w6", "rejected": " w7"}
    whole = tokenize([row], tokenizer, max_length=None)[0][0]
    assert [len(whole["prompt_ids"]), *map(len, whole["completion_ids"])] == [4, 3, 2]
    cut, report = tokenize([row], tokenizer, max_length=5, overlong="truncate_prompt")
    assert cut[0] == {**whole, "prompt_ids": whole["prompt_ids"][-2:]} and report.truncated == 1
    cut, _ = tokenize([row], tokenizer, max_length=5, overlong="truncate")
    assert cut[0] == {**whole, "completion_ids": [a[:1] for a in whole["completion_ids"]]}
    again, _ = tokenize([whole], None, max_length=5, overlong="truncate")  # tokenised rows obey too
    assert again == cut
    scored = {"prompt": "w1 w2", "completion": " w5 w6", "ref_logp_mean": -1.0}
    with pytest.raises(InputError, match="ref_logp_mean is the score of the whole completion, which would be cut"):
        tokenize([scored], tokenizer, max_length=4, overlong="truncate")
    with pytest.raises(InputError, match="its completion alone leaves no room"):
        tokenize([row], tokenizer, max_length=3, overlong="truncate_prompt")


def test_settings_that_are_none_are_named_and_an_indent_makes_another_text(tokenizer: Any) -> None:
    row = {"prompt": "w1", "chosen": " w2\n  w3", "rejected": " w2\nw3"}
    assert len(tokenize([row], tokenizer)[0]) == 1
    with pytest.raises(InputError, match="overlong: must be one of drop, truncate, truncate_prompt, raise, got 'keep_start'"):
        tokenize([row], tokenizer, overlong="keep_start")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt_ids": [1], "completion_ids": []}, "completion_ids: must be lists of one id or more"),
        ({"prompt_ids": [1], "completion_ids": [[1], []]}, "completion_ids: must be lists of one id or more"),
        ({"completion_ids": [[1]]}, "column prompt_ids is missing"),
        ({"prompt_ids": [1], "completion_ids": [[1]], "role": [1, -1]}, "role: one value per completion is needed"),
    ],
)
def test_wrong_tokenised_rows_are_named(row: Any, message: str) -> None:
    with pytest.raises(InputError, match=f"row 0: {message}"):
        tokenize([row], None)


def test_an_empty_prompt_keeps_the_tokens_that_begin_every_text(tokenizer: Any) -> None:
    made, _ = tokenize([{"prompt": "", "completion": "w2 w3"}], tokenizer)
    assert made[0]["prompt_ids"] + made[0]["completion_ids"][0] == [*tokenizer("w2 w3")["input_ids"], tokenizer.eos_token_id]


@pytest.mark.real_models
def test_a_real_chat_template_gives_prompt_and_answer() -> None:
    from fairlead.models import load

    try:
        _, chat = load("zoo:smollm2-135m-instruct")
    except DataUnavailableError as error:
        if os.environ.get("FAIRLEAD_REQUIRE_REAL_MODELS") == "1":
            raise
        pytest.skip(str(error))
    asked = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 2?"}]
    yes, no = ({"role": "assistant", "content": text} for text in ("It is 4.", "It is 5, I believe."))
    pair = {"prompt": asked, "chosen": [yes], "rejected": [no]}
    (row,), report = tokenize([pair], chat)
    assert row["prompt_ids"] == chat(chat.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))["input_ids"]
    for answer, text in zip(row["completion_ids"], ("It is 4.", "It is 5, I believe."), strict=True):
        assert chat.decode(answer) == f"{text}<|im_end|>\n" and answer[-2] == chat.convert_tokens_to_ids("<|im_end|>")
    assert report.merged == 0
    assert tokenize([{"chosen": [*asked, yes], "rejected": [*asked, no]}], chat)[0] == [row]
    assert tokenize([{"messages": [*asked, yes]}], chat)[0][0]["completion_ids"] == row["completion_ids"][:1]
    plain, _ = tokenize([{"prompt": "Two and two", "completion": " is four."}], chat)
    assert chat.decode(plain[0]["prompt_ids"] + plain[0]["completion_ids"][0]) == f"Two and two is four.{chat.eos_token}"
