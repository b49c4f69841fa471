"""A bounded load on a server, every answer accounted for: whole, streamed, cancelled in the middle, malformed.

    python soak.py --minutes 30 --rate 3            starts `fairlead serve` with a tiny model, and stops it
    python soak.py --url http://127.0.0.1:8000 --requests 200 --rate 0   against a server that runs

Talks to this machine alone and ends by itself; exit code 1 where an answer is not what it should be. The same seed asks the same.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx

KEY = "soak-key-of-no-worth"
WORDS = [f"w{i}" for i in range(60)]
SPECIAL = ["<pad>", "<eos>", "<unk>"]
TEMPLATE = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
LARGE = 1 << 20


def save_tiny(folder: Path, eos: int | None = None) -> Path:
    """A random Llama of 63 words whose logits are 64 wide, with its tokenizer and a chat template."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        initializer_range=0.2, pad_token_id=0, eos_token_id=eos, bos_token_id=None, max_position_embeddings=512,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    words = Tokenizer(models.WordLevel({w: i for i, w in enumerate(SPECIAL + WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", unk_token="<unk>", **({} if eos is None else {"eos_token": SPECIAL[eos]}))
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    return folder


class Load:
    """Sends requests of mixed kinds and says what became of each."""

    def __init__(self, url: str, model: str, key: str, seed: int, cancelled: float = 0.2, malformed: float = 0.15) -> None:
        self.model, self.random = model, random.Random(seed)
        self.shares = {"cancelled": cancelled, "malformed": malformed}
        self.client = httpx.AsyncClient(base_url=url, headers={"authorization": f"Bearer {key}"}, timeout=60)
        self.outcomes: Counter[str] = Counter()
        self.wrong: list[str] = []
        self.known: dict[str, str] = {}

    def asked(self) -> dict[str, Any]:
        """A well-formed request."""
        draw = self.random
        body: dict[str, Any] = {"model": self.model, "max_tokens": draw.randint(1, 24), "n": draw.choice([1, 1, 2])}
        body["temperature"] = draw.choice([0, 0.7, 1.0])
        text = " ".join(draw.choices(WORDS, k=draw.randint(1, 20)))
        if draw.random() < 0.5:
            body["messages"] = [{"role": "user", "content": text}]
        else:
            body["prompt"] = text
        if draw.random() < 0.3:
            body["stop"] = draw.choice(WORDS)
        return body

    async def one(self) -> None:
        """One request, of a kind drawn by share."""
        chance, body = self.random.random(), self.asked()
        if chance < self.shares["cancelled"]:
            after = self.random.randint(0, 3)
            kind, going = "cancelled" if after else "left early", self.cancel(body, after)
        elif chance < sum(self.shares.values()):
            kind, going = "malformed", self.misshape(body, self.random.randrange(8))
        elif chance < sum(self.shares.values()) + 0.2:
            kind, going = "streamed", self.stream(body)
        elif chance < sum(self.shares.values()) + 0.3:
            kind, going = "repeated", self.repeat(body)
        else:
            kind, going = "answered", self.answer(body)
        try:
            refused = await going
            self.outcomes[f"{kind}, refused" if refused else kind] += 1
        except Exception as error:
            self.outcomes["wrong"] += 1
            if len(self.wrong) < 20:
                self.wrong.append(f"{kind}: {type(error).__name__}: {error}")

    async def answer(self, body: dict[str, Any]) -> bool:
        response = await self.client.post(_path(body), json=body)
        if _refused(response):
            return True
        _check(response.status_code == 200, f"status {response.status_code}: {response.text[:200]}")
        _check_answer(body, response.json())
        return False

    async def repeat(self, body: dict[str, Any]) -> bool:
        """Seeded requests are answered alike whenever they come."""
        body = {"model": self.model, "prompt": "w1 w2 w3", "max_tokens": 12, "seed": body["max_tokens"] % 4, "n": 2}
        response = await self.client.post("/v1/completions", json=body)
        if _refused(response):
            return True
        said = json.dumps([c["text"] for c in response.json()["choices"]])
        _check(self.known.setdefault(str(body["seed"]), said) == said, f"seed {body['seed']} said {said}")
        return False

    async def stream(self, body: dict[str, Any]) -> bool:
        async with self.client.stream("POST", _path(body), json={**body, "stream": True, "stream_options": {"include_usage": True}}) as response:
            if _refused(response):
                return True
            _check(response.status_code == 200, f"status {response.status_code}")
            lines = [line.removeprefix("data: ") async for line in response.aiter_lines() if line]
        _check(lines[-1] == "[DONE]", f"ends with {lines[-1]}")
        chunks = [json.loads(line) for line in lines[:-1]]
        ends = [choice["finish_reason"] for chunk in chunks for choice in chunk["choices"] if choice["finish_reason"]]
        _check(len(ends) == body["n"], f"ends {ends}")
        _check(1 <= chunks[-1]["usage"]["completion_tokens"] <= body["n"] * body["max_tokens"], f"usage {chunks[-1]['usage']}")
        return False

    async def cancel(self, body: dict[str, Any], after: int) -> bool:
        """Leave a stream after a few lines, or a plain request before its answer."""
        body = {**body, "max_tokens": 300, "stop": None}
        if after == 0:
            with contextlib.suppress(httpx.ReadTimeout):
                response = await self.client.post(_path(body), json=body, timeout=httpx.Timeout(60, read=0.05))
                return _refused(response)
            return False
        async with self.client.stream("POST", _path(body), json={**body, "stream": True}) as response:
            if _refused(response):
                return True
            _check(response.status_code == 200, f"status {response.status_code}")
            async for line in response.aiter_lines():
                after -= bool(line)
                if after == 0:
                    break
        return False

    async def misshape(self, body: dict[str, Any], way: int) -> bool:
        """A request that must be refused with a clear status, in OpenAI's shape."""
        path, options, status = _path(body), {"json": body}, 400
        if way == 0:
            options = {"content": json.dumps(body)[:-3], "headers": {"content-type": "application/json"}}
        elif way == 1:
            body["colour"] = "red"
        elif way == 2:
            body["user"] = "x" * LARGE
            status = 413
        elif way == 3:
            body["model"], status = "another", 404
        elif way == 4:
            options["headers"], status = {"authorization": "Bearer not-the-key-at-all"}, 401
        elif way == 5:
            body["temperature"] = "hot"
        elif way == 6:
            options, status = {"content": b"\xff\xfe" * 50}, 415
        else:
            body["max_tokens"] = 100_000
        response = await self.client.post(path, **options)
        if _refused(response):
            return True
        _check(response.status_code == status, f"way {way}: status {response.status_code}, not {status}: {response.text[:200]}")
        error = response.json()["error"]
        _check(bool(error["message"]) and "Traceback" not in response.text and KEY not in response.text, response.text[:200])
        return False

    async def metrics(self) -> dict[str, float]:
        """The server's own account."""
        text = (await self.client.get("/metrics")).text
        return {name: float(value) for name, value in re.findall(r"^([a-z_]+(?:\{[^}]*\})?) (\S+)$", text, re.M)}


def _path(body: dict[str, Any]) -> str:
    return "/v1/chat/completions" if "messages" in body else "/v1/completions"


def _refused(response: httpx.Response) -> bool:
    """Sent away because there is too much to do."""
    if response.status_code != 429:
        return False
    _check(int(response.headers["retry-after"]) >= 1, "429 without Retry-After")
    return True


def _check(holds: bool, otherwise: str) -> None:
    if not holds:
        raise ValueError(otherwise)


def _check_answer(body: dict[str, Any], answer: dict[str, Any]) -> None:
    _check(len(answer["choices"]) == body["n"], f"{len(answer['choices'])} choices")
    _check(answer["usage"]["completion_tokens"] <= body["n"] * body["max_tokens"], f"usage {answer['usage']}")
    for choice in answer["choices"]:
        text = choice["message"]["content"] if "messages" in body else choice["text"]
        _check(choice["finish_reason"] in ("stop", "length"), f"finish reason {choice['finish_reason']}")
        _check(not body.get("stop") or body["stop"] not in text, "text with its stop string")


async def drive(load: Load, *, requests: int | None, minutes: float | None, rate: float, at_a_time: int, tell: Any) -> dict[str, Any]:
    """Send until there were enough, at most `at_a_time` open; the summary."""
    began, sent, marks = time.monotonic(), 0, []
    gate = asyncio.Semaphore(at_a_time)
    open_requests: set[asyncio.Task[None]] = set()
    memory = [(await load.metrics()).get("process_resident_memory_bytes", 0.0)]

    async def one() -> None:
        try:
            await load.one()
        finally:
            gate.release()

    while (requests is None or sent < requests) and (minutes is None or time.monotonic() - began < 60 * minutes):
        await gate.acquire()
        task = asyncio.create_task(one())
        open_requests.add(task)
        task.add_done_callback(open_requests.discard)
        sent += 1
        if rate:
            await asyncio.sleep(max(0.0, began + sent / rate - time.monotonic()))
        if time.monotonic() - began >= 60 * (len(marks) + 1):
            memory.append((await load.metrics()).get("process_resident_memory_bytes", 0.0))
            marks.append({"minute": len(marks) + 1, "sent": sent, "rss_mib": round(memory[-1] / 2**20, 1), "outcomes": dict(load.outcomes)})
            tell(json.dumps(marks[-1]))
    while open_requests:
        await asyncio.wait(set(open_requests))
    await _settle(load)
    account = await load.metrics()
    memory.append(account.get("process_resident_memory_bytes", 0.0))
    ended = {k: int(account[f'fairlead_outcomes_total{{outcome="{k}"}}']) for k in ("done", "cancelled", "timeout", "failed")}
    health = (await load.client.get("/health")).json()
    return {
        "seconds": round(time.monotonic() - began, 1), "sent": sent, "outcomes": dict(load.outcomes), "wrong": load.wrong,
        "unaccounted": sent - sum(load.outcomes.values()), "server_accepted": int(account["fairlead_accepted_total"]),
        "server_outcomes": ended, "health": health, "rss_mib": [round(m / 2**20, 1) for m in memory], "open_files": account.get("process_open_fds"),
    }  # fmt: skip


async def _settle(load: Load) -> None:
    """Wait, not for long, until the server is done with requests whose client has left."""
    for _ in range(100):
        health = (await load.client.get("/health")).json()
        if not health["waiting"] and not health["running"]:
            return
        await asyncio.sleep(0.1)


def sound(summary: dict[str, Any]) -> bool:
    """Whether every answer was as it should be, and client and server tell the same. A client that leaves early may have
    left before its request was in the queue."""
    ended, outcomes = summary["server_outcomes"], summary["outcomes"]
    least = sum(outcomes.get(kind, 0) for kind in ("answered", "streamed", "repeated", "cancelled"))
    return (
        not summary["wrong"] and summary["unaccounted"] == 0 and ended["failed"] == ended["timeout"] == 0
        and summary["server_accepted"] == sum(ended.values()) and summary["health"]["status"] == "ok"
        and least <= summary["server_accepted"] <= least + outcomes.get("left early", 0)
        and ended["done"] >= least - outcomes.get("cancelled", 0)
    )  # fmt: skip


@contextlib.contextmanager
def served(folder: Path, arguments: list[str]) -> Iterator[str]:
    """A `fairlead serve` of its own; its address."""
    environment = {**os.environ, "FAIRLEAD_API_KEY": KEY, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "fairlead", "serve", "--model", str(folder), "--name", "tiny", "--port", "0", *arguments]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        found = re.search(r"http://\S+(?=/v1)", line)
        if found is None:
            raise SystemExit(f"the server did not start: {line!r}")
        yield found[0]
    finally:
        process.send_signal(signal.SIGTERM)
        print(f"server left with {process.wait(60)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--url", help="a running server; default: start one")
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--key", default=KEY)
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--requests", type=int)
    parser.add_argument("--rate", type=float, default=3.0, help="requests a second; 0: as fast as they are answered")
    parser.add_argument("--at-a-time", type=int, default=8)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--serve", default="", help="further options of fairlead serve, in one string")
    options = parser.parse_args()
    if options.minutes is None and options.requests is None:
        parser.error("give --minutes or --requests")
    if options.url is not None and not re.match(r"http://(127\.0\.0\.1|localhost|\[::1\])(:|/|$)", options.url):
        parser.error("only a server on this machine is put under load")

    async def run(url: str) -> dict[str, Any]:
        load = Load(url, options.model, options.key, options.seed)
        try:
            return await drive(
                load, requests=options.requests, minutes=options.minutes, rate=options.rate, at_a_time=options.at_a_time,
                tell=lambda line: print(line, file=sys.stderr, flush=True),
            )  # fmt: skip
        finally:
            await load.client.aclose()

    with contextlib.ExitStack() as stack:
        url = options.url
        if url is None:
            folder = save_tiny(Path(stack.enter_context(tempfile.TemporaryDirectory())))
            url = stack.enter_context(served(folder, options.serve.split()))
        summary = asyncio.run(run(url))
    print(json.dumps(summary, indent=1))
    return 0 if sound(summary) else 1


if __name__ == "__main__":
    sys.exit(main())
