"""`fairlead serve` as its clients see it: through a real uvicorn on a loopback port, most of it with OpenAI's own client."""

# ruff: noqa: E402 - what may be missing is asked for first
from __future__ import annotations

import contextlib
import importlib.util
import json
import logging
import os
import queue
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

EXTRA = 'pip install "fairlead-decoding[serve]" openai'
pytest.importorskip("fastapi", reason=f"fastapi is not installed: {EXTRA}")
pytest.importorskip("uvicorn", reason=f"uvicorn is not installed: {EXTRA}")
pytest.importorskip("prometheus_client", reason=f"prometheus-client is not installed: {EXTRA}")
httpx = pytest.importorskip("httpx", reason=f"httpx is not installed: {EXTRA}")
openai = pytest.importorskip("openai", reason=f"openai is not installed: {EXTRA}")

from fairlead import cli, registry
from fairlead.decoding import Answer
from fairlead.errors import InputError
from fairlead.generation import PlainSampler, generate
from fairlead.kinds import Decoder
from fairlead.models import load
from fairlead_decoding import ARGS, BestOfN
from fairlead_decoding.serving import ApiKeys, GracefulServer, Limits, Service, build_app, configure
from fairlead_decoding.serving.jobs import Failed, Finished
from fairlead_decoding.serving.schema import CompletionRequest

SOAK = Path(__file__).with_name("soak.py")
KEY = "a-key-for-the-tests-only"
EOS = 1


def _soak() -> Any:
    spec = importlib.util.spec_from_file_location("fairlead_soak", SOAK)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = _soak().save_tiny(tmp_path_factory.mktemp("tiny"), eos=EOS)
    return path


@pytest.fixture(scope="module")
def parts(folder: Path) -> tuple[Any, Any]:
    return load(folder)


class Running:
    """A server on a free port of this machine, in a thread."""

    def __init__(self, service: Service, keys: ApiKeys | None, small_buffers: bool) -> None:
        self.service = service
        listener = socket.create_server(("127.0.0.1", 0))
        if small_buffers:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
        self.port = listener.getsockname()[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self.server = GracefulServer(configure(build_app(service, keys), service), service, grace=20)
        self.thread = threading.Thread(target=lambda: self.server.run(sockets=[listener]))
        self.thread.start()
        until(lambda: self.server.started)
        self.http = httpx.Client(base_url=self.url, timeout=30, headers={"authorization": f"Bearer {KEY}"})
        self.openai = openai.OpenAI(base_url=f"{self.url}/v1", api_key=KEY, max_retries=0, timeout=30)

    def ask(self, **body: Any) -> httpx.Response:
        return self.http.post("/v1/completions", json={"model": "tiny", "prompt": "w1 w2", **body})

    def counted(self, name: str) -> float:
        text = self.http.get("/metrics").text
        found = re.search(rf"^{re.escape(name)} (\S+)$", text, re.M)
        return 0.0 if found is None else float(found[1])

    def outcome(self, name: str) -> float:
        return self.counted(f'fairlead_outcomes_total{{outcome="{name}"}}')


def until(holds: Any, seconds: float = 20.0) -> None:
    end = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


@contextlib.contextmanager
def running(parts: tuple[Any, Any], keys: ApiKeys | None = None, small_buffers: bool = False, **options: Any) -> Iterator[Running]:
    with Service(*parts, name="tiny", **options) as service:
        server = Running(service, keys, small_buffers)
        try:
            yield server
        finally:
            server.server.handle_exit(signal.SIGTERM, None)
            server.server.grace = 0.0
            server.server._leaves_at = 0.0
            server.thread.join(20)
            server.http.close()
            server.openai.close()
            assert not server.thread.is_alive()


@pytest.fixture(scope="module")
def plain(parts: tuple[Any, Any]) -> Iterator[Running]:
    with running(parts) as server:
        yield server


class Waiting(Decoder):
    """Answers when it is let go, or when nobody waits any more; "w9" in a prompt makes it fail."""

    def setup(self) -> None:
        self.go, self.begun = threading.Event(), threading.Event()

    def decode(self, request: Any) -> list[Answer]:
        if any(10 + 2 in ids.tolist() for ids in request.encoded):
            raise RuntimeError("a detail that is nobody's business")
        self.begun.set()
        while not self.go.wait(0.005) and not request.meter.late:
            pass
        return [Answer([request.generation(place, torch.tensor([5, 6]), finished=True)]) for place in range(len(request.encoded))]


class Slow:
    """A mark that takes its time at each token."""

    name = "slow"

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def sampler(self, **options: Any) -> Any:
        if options["temperature"] == 0:
            raise InputError("temperature: this mark needs one above 0, got 0")
        draw = PlainSampler(**options)

        def sample(*args: Any, **more: Any) -> torch.Tensor:
            time.sleep(self.seconds)
            return draw(*args, **more)

        return sample


# What is answered


def test_an_answer_is_generates_with_the_same_seed(plain: Running, parts: tuple[Any, Any]) -> None:
    prompts = ["w1 w2 w3", "w9", "w4 w5"]
    said = plain.openai.completions.create(model="tiny", prompt=prompts, n=2, max_tokens=30, seed=5, temperature=0.8, top_p=0.9)
    made = [g for group in generate(*parts, prompts, n=2, max_new_tokens=30, seed=5, temperature=0.8, top_p=0.9) for g in group]
    assert [c.text for c in said.choices] == [g.text for g in made]
    assert [c.index for c in said.choices] == list(range(6))
    assert [c.finish_reason for c in said.choices] == ["stop" if g.finished else "length" for g in made]
    assert {c.finish_reason for c in said.choices} == {"stop", "length"}, "the example shows both"
    assert said.usage is not None
    assert said.usage.prompt_tokens == 6
    assert said.usage.completion_tokens == sum(len(g.ids) for g in made) == said.usage.total_tokens - 6


def test_without_a_seed_every_answer_is_new(plain: Running) -> None:
    assert len({plain.ask(max_tokens=12).json()["choices"][0]["text"] for _ in range(4)}) > 1


def test_token_ids_are_prompts_too(plain: Running) -> None:
    by_text = plain.ask(prompt="w1 w2", seed=3, max_tokens=9).json()["choices"]
    assert plain.ask(prompt=[4, 5], seed=3, max_tokens=9).json()["choices"] == by_text
    assert plain.ask(prompt=[[4, 5]], seed=3, max_tokens=9).json()["choices"] == by_text


def test_five_point_zero_is_five(plain: Running) -> None:
    said = plain.ask(max_tokens=5.0, seed=3.0, n=1.0).json()
    assert said["choices"] == plain.ask(max_tokens=5, seed=3).json()["choices"]


def test_a_chat_is_answered_by_its_template(plain: Running, parts: tuple[Any, Any]) -> None:
    messages = [{"role": "system", "content": "w1"}, {"role": "user", "content": [{"type": "text", "text": "w2 "}, {"type": "text", "text": "w3"}]}]
    said = plain.openai.chat.completions.create(model="tiny", messages=messages, max_completion_tokens=8, seed=1)  # type: ignore[arg-type]
    (made,) = generate(*parts, [[{"role": "system", "content": "w1"}, {"role": "user", "content": "w2 w3"}]], max_new_tokens=8, seed=1)[0]
    assert said.choices[0].message.content == made.text
    assert said.choices[0].message.role == "assistant"
    assert said.object == "chat.completion"


@pytest.mark.parametrize("chat", [False, True])
@pytest.mark.parametrize("stop", [None, "w3", ["7 w", "w54"]])
def test_a_streams_pieces_join_to_the_whole_answer(plain: Running, chat: bool, stop: Any) -> None:
    settings: dict[str, Any] = {"model": "tiny", "n": 3, "max_tokens": 40, "seed": 11, "stop": stop}
    texts, ends, usage, first = ["", "", ""], {}, None, True
    if chat:
        settings["messages"] = [{"role": "user", "content": "w1 w2"}]
        whole = [c.message.content for c in plain.openai.chat.completions.create(**settings).choices]
        stream = plain.openai.chat.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    else:
        settings["prompt"] = "w1 w2"
        whole = [c.text for c in plain.openai.completions.create(**settings).choices]
        stream = plain.openai.completions.create(**settings, stream=True, stream_options={"include_usage": True})
    chunks = list(stream)
    for chunk in chunks:
        usage = chunk.usage or usage
        for choice in chunk.choices:
            new = (choice.delta.content or "") if chat else choice.text
            if chat and first:
                assert choice.delta.role == "assistant"
                first = False
            texts[choice.index] += new
            if choice.finish_reason:
                ends[choice.index] = choice.finish_reason
    assert texts == whole
    assert set(ends) == {0, 1, 2}
    assert usage is not None
    assert usage.completion_tokens > 0
    assert len(chunks) > 15, "text comes as it is written"
    assert stop is None or not any(s in text for text in texts for s in ([stop] if isinstance(stop, str) else stop))


def test_a_stop_string_across_tokens_ends_the_answer_before_it(plain: Running) -> None:
    whole = plain.ask(temperature=0, max_tokens=12).json()["choices"][0]["text"]
    words = whole.split()
    stop = f"{words[4][-1]} {words[5][:2]}"
    said = plain.ask(temperature=0, max_tokens=12, stop=stop).json()
    assert said["choices"][0]["text"] == whole[: whole.index(stop)]
    assert said["choices"][0]["finish_reason"] == "stop"
    assert said["usage"]["completion_tokens"] < 12


def test_requests_that_share_a_batch_are_answered_as_if_alone(parts: tuple[Any, Any]) -> None:
    asked = [{"prompt": " ".join(f"w{j}" for j in range(i % 5 + 1)), "max_tokens": 3 + 5 * (i % 4), "seed": i, "n": 1 + i % 2} for i in range(12)]
    with running(parts, limits=Limits(gather=0.05)) as server:
        alone = [server.ask(**body).json()["choices"] for body in asked]
        before = server.counted("fairlead_batch_answers_count")
        together: list[Any] = [None] * len(asked)

        def ask(i: int) -> None:
            together[i] = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", **asked[i]}, timeout=30).json()["choices"]

        threads = [threading.Thread(target=ask, args=(i,)) for i in range(len(asked))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == alone
        assert server.counted("fairlead_batch_answers_count") - before < len(asked) / 2, "they did share batches"


def words_reward(prompts: Any, responses: Any) -> list[float]:
    return [float(len(set(r.split()))) for r in responses]


def test_a_decoder_answers_as_its_generate_does_and_tells_the_reward(parts: tuple[Any, Any]) -> None:
    decoder = BestOfN(n=4)
    made = decoder.generate(*parts, ["w1 w2", "w1 w2", "w3", "w3"], reward=words_reward, seed=9, max_new_tokens=10).generations
    with running(parts, decoder=decoder, reward=words_reward) as server:
        said = server.openai.completions.create(model="tiny", prompt=["w1 w2", "w3"], n=2, max_tokens=10, seed=9)
        assert [c.text for c in said.choices] == [g.text for g in made]
        assert [c.model_extra["reward"] for c in said.choices if c.model_extra] == [g.reward for g in made]
        chunks = list(server.openai.completions.create(model="tiny", prompt="w1 w2", max_tokens=10, seed=9, stream=True))
        assert [c.choices[0].text for c in chunks] == [made[0].text, ""], "a decoder that does not stream answers in one piece"
        stop = made[0].text.split()[3]
        cut = server.ask(prompt="w1 w2", seed=9, max_tokens=10, stop=stop).json()["choices"][0]
        assert (cut["text"], cut["finish_reason"]) == (made[0].text[: made[0].text.index(stop)], "stop")


def test_token_search_streams_what_it_chooses(parts: tuple[Any, Any]) -> None:
    decoder = ARGS(top_k=4)
    (made,) = decoder.generate(*parts, ["w1 w2"], reward=words_reward, seed=2, max_new_tokens=10).generations
    with running(parts, decoder=decoder, reward=words_reward) as server:
        assert server.ask(seed=2, max_tokens=10).json()["choices"][0]["text"] == made.text
        chunks = list(server.openai.completions.create(model="tiny", prompt="w1 w2", max_tokens=10, seed=2, stream=True))
        assert "".join(c.choices[0].text for c in chunks) == made.text
        assert len(chunks) == len(made.ids) + 1
        assert (chunks[-1].choices[0].model_extra or {})["reward"] == made.reward
        first, second = made.text.split()[:2]
        cut = server.ask(seed=2, max_tokens=10, stop=second).json()
        assert cut["choices"][0]["text"] == f"{first} "
        assert cut["usage"]["completion_tokens"] == 2
        assert not hasattr(decoder, "__dict__") or "_step" not in vars(decoder), "the decoder is left as it was"


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("name", ["soft-best-of-n", "rejection", "blockwise", "args", "controlled-decoding", "transfer-q-star", "deal", "beams", "speculative"])
def test_every_decoder_is_served_as_it_is_and_can_be_left(parts: tuple[Any, Any], name: str, stream: bool) -> None:
    settings: dict[str, Any] = {"args": {"top_k": 4, "mode": "sample"}, "controlled-decoding": {"top_k": 4}, "transfer-q-star": {"top_k": 4}}
    settings |= {"deal": {"top_k": 4}, "beams": {"top_k": 4, "beam": 2}, "speculative": {"draft": parts[0]}, "rejection": {"threshold": 5.0, "n": 8}}
    decoder = registry.create("decoder", "deal" if name == "beams" else name, **settings.get(name, {}))
    reward = None if name == "speculative" else words_reward
    made = decoder.generate(*parts, ["w1 w2", "w1 w2", "w5", "w5"], reward=reward, seed=3, max_new_tokens=9).generations
    with Service(*parts, name="tiny", decoder=decoder, reward=reward) as service:
        told: queue.Queue[Any] = queue.Queue()
        asked = CompletionRequest(model="tiny", prompt=["w1 w2", "w5"], n=2, seed=3, max_tokens=9, stream=stream)
        job = service.job(asked, told.put)
        service.submit(job)
        events = [told.get(timeout=30)]
        while not isinstance(events[-1], (Finished, Failed)):
            events.append(told.get(timeout=30))
        assert isinstance(events[-1], Finished), events[-1]
        assert [line.text for line in job.lines] == [g.text for g in made]
        assert [line.reward for line in job.lines] == [g.reward for g in made]
        assert [line.reason for line in job.lines] == ["stop" if g.finished else "length" for g in made]
        assert (len(events) > 2) == (stream and service.answerer.streams)
        left = service.job(asked.model_copy(update={"max_tokens": 400}), told.put)
        service.submit(left)
        until(lambda: service.worker.running == 1 or left.settled)
        service.cancel(left)
        until(lambda: service.worker.idle, 5.0)


def test_marked_answers_are_those_of_generate_with_the_mark(parts: tuple[Any, Any]) -> None:
    if ("watermark", "kgw") not in {(m.kind, m.name) for m in registry.methods("watermark")}:
        pytest.skip("fairlead-watermark is not installed")
    mark = registry.create("watermark", "kgw", vocab_size=64, key=123456789, delta=6.0)
    with running(parts, watermark=mark) as server:
        said = server.ask(max_tokens=30, seed=4).json()["choices"][0]["text"]
        assert said == generate(*parts, ["w1 w2"], max_new_tokens=30, seed=4, watermark=mark)[0][0].text
        assert said != generate(*parts, ["w1 w2"], max_new_tokens=30, seed=4)[0][0].text


def test_models_health_and_metrics_tell_what_is_there(plain: Running) -> None:
    assert [m.id for m in plain.openai.models.list()] == ["tiny"]
    assert plain.openai.models.retrieve("tiny").owned_by == "fairlead"
    with pytest.raises(openai.NotFoundError, match="no such model"):
        plain.openai.models.retrieve("another")
    assert plain.http.get("/health").json() == {"status": "ok", "model": "tiny", "waiting": 0, "running": 0}
    before = plain.counted("fairlead_completion_tokens_total")
    plain.ask(max_tokens=5, temperature=0)
    assert plain.counted("fairlead_completion_tokens_total") == before + 5
    assert plain.counted("fairlead_accepted_total") == plain.outcome("done")
    assert plain.counted("fairlead_waiting") == plain.counted("fairlead_running") == 0


# What is refused

BAD = [
    ({"prompt": None}, 400, "prompt", "must be a string"),
    ({"prompt": ""}, 400, "prompt", "none of them empty"),
    ({"prompt": []}, 400, "prompt", "none of them empty"),
    ({"prompt": "   "}, 400, "prompt", "empty"),
    ({"prompt": [99]}, 400, "prompt", "below 64"),
    ({"prompt": ["w1", 3]}, 400, "prompt", "must be a string"),
    ({"prompt": "w1 " * 600}, 400, "prompt", "512 positions"),
    ({"prompt": "w1\ud800"}, 400, "prompt", "must be a string"),
    ({"model": "another"}, 404, "model", "no such model"),
    ({"max_tokens": 0}, 400, "max_tokens", "greater than or equal to 1"),
    ({"max_tokens": 5000}, 400, "max_tokens", "1024"),
    ({"max_tokens": 4.5}, 400, "max_tokens", "integer"),
    ({"user": "u" * 600}, 400, "user", "user: should have at most 512"),
    ({"": 1}, 400, "''", "unknown field ''"),
    ({"max_tokens": "9"}, 400, "max_tokens", "integer"),
    ({"temperature": 3}, 400, "temperature", "less than or equal to 2"),
    ({"temperature": 2e-236}, 400, "temperature", "at least 1e-30"),
    ({"top_p": 0}, 400, "top_p", "greater than 0"),
    ({"min_p": -1}, 400, "min_p", "greater than or equal to 0"),
    ({"n": 1000}, 400, "n", "1000 answers are asked for, a request may have 32"),
    ({"stop": ["a"] * 5}, 400, "stop", "up to 4"),
    ({"stop": ""}, 400, "stop", "1 to 256"),
    ({"logprobs": 3}, 400, "logprobs", "not served"),
    ({"echo": True}, 400, "echo", "not served"),
    ({"best_of": 4}, 400, "best_of", "not served"),
    ({"presence_penalty": 0.5}, 400, "presence_penalty", "not served"),
    ({"logit_bias": {"5": 1}}, 400, "logit_bias", "not served"),
    ({"stream_options": {"include_usage": True}}, 400, "stream_options", "stream=true"),
    ({"colour": "red"}, 400, "colour", "unknown field"),
    ({"seed": 2**70}, 400, "seed", "less than or equal"),
]


@pytest.mark.parametrize(("body", "status", "param", "words"), BAD, ids=[f"{p}-{i}" for i, (_, _, p, _) in enumerate(BAD)])
def test_a_bad_field_is_named_in_openais_shape(plain: Running, body: dict[str, Any], status: int, param: str, words: str) -> None:
    response = plain.http.post(
        "/v1/completions", content=json.dumps({"model": "tiny", "prompt": "w1", **body}), headers={"content-type": "application/json"}
    )
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["param"] == param
    assert words in error["message"]
    assert "\n" not in error["message"]


@pytest.mark.parametrize(
    ("body", "param", "words"),
    [
        ({"messages": []}, "messages", "at least 1"),
        ({"messages": [{"role": "tool", "content": "w1"}]}, "messages.0.role", "'system'"),
        ({"messages": [{"role": "user"}]}, "messages.0.content", "required"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "x"}]}]}, "messages.0.content", "parts"),
        ({"messages": [{"role": "user", "content": ""}]}, "messages", "empty"),
        ({"tools": [{"type": "function"}]}, "tools", "not served"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not served"),
        ({"max_tokens": 3, "max_completion_tokens": 4}, "max_tokens", "differs"),
    ],
)
def test_a_bad_chat_is_named_too(plain: Running, body: dict[str, Any], param: str, words: str) -> None:
    response = plain.http.post("/v1/chat/completions", json={"model": "tiny", "messages": [{"role": "user", "content": "w1"}], **body})
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert (error["param"], words in error["message"]) == (param, True), error


def bodies() -> dict[str, tuple[dict[str, Any], int]]:
    as_json = {"content-type": "application/json"}

    def chunks() -> Iterator[bytes]:
        for _ in range(40):
            yield b" " * 100_000

    return {
        "no JSON": ({"content": b"{", "headers": as_json}, 400),
        "a list": ({"content": b"[]", "headers": as_json}, 400),
        "nothing": ({"content": b"", "headers": as_json}, 400),
        "deep": ({"content": b"[" * 200_000, "headers": as_json}, 400),
        "NaN": ({"content": b'{"model": "tiny", "prompt": "w1", "temperature": NaN}', "headers": as_json}, 400),
        "not UTF-8": ({"content": b'{"model": "\xff"}', "headers": as_json}, 400),
        "a huge integer": ({"content": b'{"model": "tiny", "prompt": "w1", "n": 1' + b"0" * 6000 + b"}", "headers": as_json}, 400),
        "many bad items": ({"content": b'{"model": "tiny", "prompt": [' + b"1.5," * 200_000 + b"1.5]}", "headers": as_json}, 400),
        "many prompts": ({"content": b'{"model": "tiny", "prompt": [' + b'"w1",' * 100_000 + b'"w1"]}', "headers": as_json}, 400),
        "many fields": ({"content": json.dumps({f"field{i}": i for i in range(20_000)}).encode(), "headers": as_json}, 400),
        "no content type": ({"content": b"{}"}, 415),
        "another content type": ({"content": b"{}", "headers": {"content-type": "text/plain"}}, 415),
        "large, announced": ({"content": b" " * 3_000_000, "headers": as_json}, 413),
        "large, in chunks": ({"content": chunks(), "headers": as_json}, 413),
    }


@pytest.mark.parametrize("name", list(bodies()))
def test_a_bad_body_is_one_clear_error(plain: Running, name: str) -> None:
    options, status = bodies()[name]
    response = plain.http.post("/v1/completions", **options)
    assert response.status_code == status, response.text
    assert response.json()["error"]["message"]
    assert "Traceback" not in response.text
    assert plain.http.get("/health").status_code == 200


@pytest.mark.parametrize(("method", "path", "status"), [("GET", "/nothing", 404), ("GET", "/v1/completions", 405), ("DELETE", "/v1/models", 405), ("POST", "/v1/nothing", 404)])
def test_other_addresses_and_methods_have_the_shape_too(plain: Running, method: str, path: str, status: int) -> None:
    response = plain.http.request(method, path)
    assert response.status_code == status
    assert response.json()["error"]["message"]


def test_what_is_no_http_gets_an_error_and_the_connection_is_closed(plain: Running) -> None:
    with socket.create_connection(("127.0.0.1", plain.port)) as line:
        line.settimeout(10)
        line.sendall(b"\x16\x03\x01 hello\r\n\r\n")
        answer = b"".join(iter(lambda: line.recv(4096), b""))
    assert answer.startswith(b"HTTP/1.1 400")
    assert b"no valid HTTP" in answer


def test_a_mark_that_refuses_a_setting_is_a_bad_request(parts: tuple[Any, Any]) -> None:
    with running(parts, watermark=Slow(0.0)) as server:
        response = server.ask(temperature=0)
        assert response.status_code == 400
        assert response.json()["error"]["param"] == "temperature"
        assert server.ask().status_code == 200


def test_only_a_key_opens_the_server_and_it_is_told_to_nobody(parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture, tmp_path: Path) -> None:
    path = tmp_path / "keys"
    path.write_text(f"another-key-entirely\n{KEY}\n")
    path.chmod(0o600)
    keys = ApiKeys.find(path)
    assert keys is not None
    caplog.set_level(logging.DEBUG)
    with running(parts, keys) as server:
        assert server.ask().status_code == 200
        said = [repr(keys)]
        for header in ("", "Bearer", f"Basic {KEY}", "Bearer " + KEY[:-1], f"Bearer {KEY}x", "Bearer \xff\xfe"):
            for method, path_ in (("POST", "/v1/completions"), ("GET", "/v1/models"), ("GET", "/metrics"), ("GET", "/openapi.json")):
                response = httpx.request(method, server.url + path_, headers={"authorization": header.encode("latin1")}, content=b"{}")
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                said.append(response.text)
        assert httpx.get(server.url + "/health").status_code == 200
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="a-wrong-key", max_retries=0).models.list()
    assert KEY not in "".join(said) + caplog.text.replace(f"Bearer {KEY}", "")


@pytest.mark.parametrize("text", ["", "short", "with a space", "snow☃man-is-long"])
def test_a_useless_key_is_an_error_that_does_not_show_it(text: str) -> None:
    with pytest.raises(InputError, match="at least 8 printable") as caught:
        ApiKeys([text])
    assert not text or text not in str(caught.value)


# Too much, too slow, gone


def test_a_full_queue_sends_away_with_a_time_to_come_again(parts: tuple[Any, Any]) -> None:
    decoder = Waiting()
    with running(parts, decoder=decoder, limits=Limits(queue=2, rows=1)) as server:
        asked = [threading.Thread(target=server.ask, kwargs={"seed": i}) for i in range(3)]
        asked[0].start()
        decoder.begun.wait(10)
        for thread in asked[1:]:
            thread.start()
        until(lambda: server.service.worker.waiting == 2)
        response = server.ask()
        assert response.status_code == 429
        assert 1 <= int(response.headers["retry-after"]) <= 60
        assert response.json()["error"]["code"] == "queue_full"
        with pytest.raises(openai.RateLimitError, match="wait already"):
            server.openai.completions.create(model="tiny", prompt="w1")
        decoder.go.set()
        for thread in asked:
            thread.join()
        assert server.outcome("done") == server.counted("fairlead_accepted_total") == 3


def test_more_requests_at_a_time_than_allowed_are_sent_away(parts: tuple[Any, Any]) -> None:
    decoder = Waiting()
    with running(parts, decoder=decoder, limits=Limits(requests=2, rows=1)) as server:
        asked = [threading.Thread(target=server.ask) for _ in range(2)]
        for thread in asked:
            thread.start()
        until(lambda: server.service.open == 2)
        assert server.ask().status_code == 429
        decoder.go.set()
        for thread in asked:
            thread.join()
        assert server.ask().status_code == 200


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_the_model_and_the_queue(parts: tuple[Any, Any], stream: bool) -> None:
    decoder = Waiting()
    with running(parts, decoder=decoder, limits=Limits(rows=1)) as server:
        for _ in range(2):  # one at the model, one in the queue
            with contextlib.suppress(httpx.ReadTimeout):
                server.http.post("/v1/completions", json={"model": "tiny", "prompt": "w1", "stream": stream}, timeout=httpx.Timeout(10, read=0.2))
        until(lambda: server.outcome("cancelled") == 2)
        until(lambda: server.service.worker.idle)
        decoder.go.set()
        assert server.ask().status_code == 200
        assert server.counted('fairlead_requests_total{route="/v1/completions",status="499"}') == 2


def test_a_stream_that_is_left_ends_at_the_next_token(parts: tuple[Any, Any]) -> None:
    with running(parts, watermark=Slow(0.01)) as server:
        with server.openai.completions.create(model="tiny", prompt="w1", max_tokens=400, n=4, stream=True) as stream:
            next(iter(stream))
        until(lambda: server.outcome("cancelled") == 1)
        until(lambda: server.service.worker.idle, 2.0)
        assert 4 <= server.counted("fairlead_completion_tokens_total") < 1000


def test_an_answer_that_takes_too_long_is_a_504_or_an_error_in_the_stream(parts: tuple[Any, Any]) -> None:
    with running(parts, watermark=Slow(0.02), limits=Limits(timeout=0.6)) as server:
        response = server.ask(max_tokens=400, n=8)
        assert response.status_code == 504
        assert "within 0.6 s" in response.json()["error"]["message"]
        stream = server.openai.completions.create(model="tiny", prompt="w1", max_tokens=400, n=8, stream=True)
        with pytest.raises(openai.APIError, match=r"within 0\.6 s"):
            list(stream)
        assert server.outcome("timeout") == 2
        until(lambda: server.service.worker.idle)


def test_a_body_that_dawdles_is_a_408_and_a_head_that_dawdles_is_cut_off(parts: tuple[Any, Any]) -> None:
    with running(parts, limits=Limits(body_seconds=0.3, header_seconds=0.3)) as server:
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.settimeout(10)
            line.sendall(b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: 50\r\n\r\n{")
            answer = b"".join(iter(lambda: line.recv(4096), b""))
        assert answer.startswith(b"HTTP/1.1 408")
        assert b"did not arrive within 0.3 s" in answer
        for head in (b"", b"GET /health HTTP/1.1\r\nhost:"):
            with socket.create_connection(("127.0.0.1", server.port)) as line:
                line.settimeout(10)
                line.sendall(head)
                with contextlib.suppress(ConnectionResetError):
                    assert line.recv(4096) == b""
        with socket.create_connection(("127.0.0.1", server.port)) as line:
            line.settimeout(10)
            for _ in range(2):  # a connection that is kept waits for longer than that between two requests
                line.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
                answer = b""
                while not answer.endswith(b"}"):
                    answer += line.recv(4096)
                assert answer.startswith(b"HTTP/1.1 200")
                time.sleep(0.5)
        assert server.ask().status_code == 200


def test_a_client_that_does_not_read_is_cut_off(parts: tuple[Any, Any]) -> None:
    with running(parts, small_buffers=True, watermark=Slow(0.01), limits=replace(Limits(), write_seconds=0.3)) as server:
        body = json.dumps({"model": "tiny", "prompt": "w1", "max_tokens": 500, "n": 16, "stream": True, "stop": "never"}).encode()
        with socket.socket() as line:
            line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
            line.connect(("127.0.0.1", server.port))
            head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            line.sendall(head.encode() + body)
            until(lambda: server.counted("fairlead_accepted_total") == 1)
            until(lambda: server.outcome("cancelled") == 1)
            until(lambda: server.service.open == 0)
        assert server.ask().status_code == 200


def test_a_decoder_that_fails_costs_only_its_own_request(parts: tuple[Any, Any], caplog: pytest.LogCaptureFixture) -> None:
    decoder = Waiting()
    decoder.go.set()
    with running(parts, decoder=decoder, limits=Limits(gather=0.3)) as server:
        found: dict[str, httpx.Response] = {}

        def ask(prompt: str) -> None:
            found[prompt] = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": prompt, "seed": 1}, timeout=30)

        threads = [threading.Thread(target=ask, args=(prompt,)) for prompt in ("w1", "w9", "w2")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert [found[p].status_code for p in ("w1", "w9", "w2")] == [200, 500, 200]
        assert "nobody's business" not in found["w9"].text
        assert "log says why" in found["w9"].json()["error"]["message"]
        assert "nobody's business" in caplog.text
        assert server.ask().status_code == 200


def test_told_to_stop_it_finishes_what_runs_and_refuses_what_is_new(parts: tuple[Any, Any]) -> None:
    decoder = Waiting()
    with running(parts, decoder=decoder) as server:
        found: list[httpx.Response] = []
        thread = threading.Thread(target=lambda: found.append(server.ask()))
        thread.start()
        decoder.begun.wait(10)
        server.server.handle_exit(signal.SIGTERM, None)
        response = httpx.post(f"{server.url}/v1/completions", json={"model": "tiny", "prompt": "w1"})
        assert response.status_code == 503
        assert "stopping" in response.json()["error"]["message"]
        health = httpx.get(f"{server.url}/health")
        assert (health.status_code, health.json()["status"]) == (503, "stopping")
        decoder.go.set()
        thread.join(20)
        server.thread.join(20)
        assert found[0].status_code == 200
        assert not server.thread.is_alive()
        with pytest.raises(httpx.ConnectError):
            httpx.get(f"{server.url}/health")


def test_a_server_that_is_told_twice_leaves_at_once(parts: tuple[Any, Any]) -> None:
    with running(parts, decoder=Waiting()) as server:
        found: list[Any] = []

        def ask() -> None:
            with contextlib.suppress(httpx.HTTPError):
                found.append(server.ask().status_code)

        thread = threading.Thread(target=ask)
        thread.start()
        until(lambda: server.service.worker.running == 1)
        server.server.handle_exit(signal.SIGTERM, None)
        server.server.handle_exit(signal.SIGTERM, None)
        server.thread.join(20)
        assert not server.thread.is_alive()
        thread.join(20)


# The whole of it


def test_every_answer_under_load_from_another_process_is_accounted_for(folder: Path) -> None:
    parts = load(folder)
    with running(parts, ApiKeys([KEY]), limits=Limits(queue=6)) as server:
        command = [sys.executable, str(SOAK), "--url", server.url, "--key", KEY, "--requests", "200", "--rate", "0", "--at-a-time", "8", "--seed", "7"]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert ended.returncode == 0, ended.stdout + ended.stderr
        summary = json.loads(ended.stdout)
        assert summary["sent"] == 200
        assert summary["wrong"] == []
        kinds: Counter[str] = Counter()
        for kind, count in summary["outcomes"].items():
            kinds[kind.removesuffix(", refused")] += count
        assert 30 <= kinds["cancelled"] + kinds["left early"] <= 50
        assert kinds["malformed"] >= 20
        assert summary["outcomes"]["answered"] + summary["outcomes"]["streamed"] >= 30
        assert summary["server_outcomes"]["failed"] == 0
        assert summary["rss_mib"][-1] - summary["rss_mib"][0] < 100
        assert server.http.get("/health").json() == {"status": "ok", "model": "tiny", "waiting": 0, "running": 0}
        assert server.ask().status_code == 200


def test_the_server_keeps_to_its_own_openapi(parts: tuple[Any, Any]) -> None:
    schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: pip install schemathesis")
    from hypothesis import HealthCheck, Phase, given, settings
    from schemathesis import checks

    with Service(*parts, name="tiny", limits=Limits(tokens=8, gather=0.0)) as service:
        schema = schemathesis.openapi.from_asgi("/openapi.json", build_app(service))
        names = ["not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance"]
        seen: dict[str, set[int]] = {}

        def explore(operation: Any, mode: Any) -> None:
            well_formed = mode == schemathesis.GenerationMode.POSITIVE
            chosen = checks.CHECKS.get_by_names(names if well_formed else [*names, "negative_data_rejection"])

            @given(case=operation.as_strategy(generation_mode=mode))
            @settings(max_examples=12, deadline=None, derandomize=True, phases=[Phase.generate], suppress_health_check=list(HealthCheck), database=None)
            def holds(case: Any) -> None:
                if well_formed and isinstance(case.body, dict):
                    case.body["model"] = "tiny"
                response = case.call_and_validate(checks=chosen)
                seen.setdefault(operation.label, set()).add(response.status_code)

            holds()

        for result in schema.get_all_operations():
            operation = result.ok()
            for mode in schemathesis.GenerationMode if operation.method == "post" else [schemathesis.GenerationMode.POSITIVE]:
                explore(operation, mode)
        assert {200, 400} <= seen["POST /v1/completions"]
        assert {200, 400} <= seen["POST /v1/chat/completions"]
        assert seen["GET /v1/models"] == seen["GET /health"] == seen["GET /metrics"] == {200}


def test_the_command_serves_prints_its_address_and_leaves_cleanly(folder: Path, tmp_path: Path) -> None:
    environment = {**os.environ, "FAIRLEAD_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fairlead", "serve", "--model", str(folder), "--name", "tiny", "--port", "0", "--decoder", "best-of-n",
               "--decoder-set", "n=2", "--reward", "length"]  # fmt: skip
    errors = tmp_path / "errors"
    with errors.open("w") as stream:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=stream, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.fullmatch(r"tiny at (http://127\.0\.0\.1:\d+/v1)\n", line)
        assert found is not None, line + errors.read_text()
        client = openai.OpenAI(base_url=found[1], api_key=KEY, max_retries=0)
        said = client.chat.completions.create(model="tiny", messages=[{"role": "user", "content": "w1 w2"}], max_tokens=5)
        assert said.choices[0].message.content
        assert "reward" in (said.choices[0].model_extra or {})
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
    assert "Traceback" not in errors.read_text()
    assert KEY not in errors.read_text()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--host", "0.0.0.0"], "give a key"),
        (["--decoder", "best-of-n"], "needs a reward"),
        (["--reward", "length"], "name one with --decoder"),
        (["--decoder-set", "n=3"], "belongs to a method"),
        (["--decoder", "best-of-m"], "did you mean"),
        (["--queue", "0"], "above 0"),
        (["--port", "99999"], "cannot be listened at"),
        (["--api-key-file", "no-such-file"], "cannot be read"),
    ],
)
def test_a_mistake_at_the_start_is_one_line(
    folder: Path, arguments: list[str], words: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("FAIRLEAD_API_KEY", raising=False)
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--model", str(folder), "--port", "0", *arguments])
    assert end.value.code == 2
    err = capsys.readouterr().err
    assert words in err
    assert "Traceback" not in err


def test_without_the_extra_the_command_says_what_to_install(
    folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in sys.modules if name.startswith("fairlead_decoding.serving.") and not name.endswith(".command")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "fastapi", None)
    with pytest.raises(SystemExit) as end:
        cli.main(["serve", "--model", str(folder)])
    assert end.value.code == 2
    assert 'pip install "fairlead-decoding[serve]"' in capsys.readouterr().err
