"""A teacher writes the guidelines: which inputs are risky, and the general rules that make their answers safe and good.

Guide-Align (arXiv 2403.11838). The risk of an input is analysed first and judged last ("Yes" or "No"). A risky input's rules
are asked for after its own analysis, for safety and quality; another input's for quality alone. A teacher is any
`generate(messages) -> str`; `ChatModel` makes one of a Hugging Face model. Replies are data from a model: lines that are
no rules are dropped, what looks like a role marker is stripped, and inputs that gave nothing are reported.
"""

from __future__ import annotations

import hashlib
import random
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from fairlead.errors import InputError
from fairlead.generation import generate

from .guidelines import Guideline, clean
from .text_similarity import rouge_l_f1

Messages = list[dict[str, str]]
Teacher = Callable[[Messages], str]

RISK_CLASSES = (
    "crimes and illegal activities", "unfairness and discrimination", "insult", "mental health", "ethics and morality",
    "physical harm", "privacy and property", "sensitive topics", "inquiry with unsafe opinion", "goal hijacking",
    "unsafe instruction topic", "reverse exposure", "role-play instruction", "prompt leaking",
)  # fmt: skip
"""The classes of safety-related questions that the paper collects."""

_LISTED = re.compile(r"^\s*(?:[-*•–]+(?=\s|\*)|\(?\d{1,3}[.):])\s*")
_NUMBERED = re.compile(r"^\s*\d{1,3}\.\s*(.+?)\s*$")
_VERDICT = re.compile(r"\b(yes|no)\b", re.IGNORECASE)


@dataclass(frozen=True)
class Risk:
    """What the detector found. unsafe: None when the reply had no verdict."""

    unsafe: bool | None
    analysis: str


@dataclass(frozen=True)
class Shot:
    """A worked example: an input, its analysis (ends with the verdict), and the rules written for it."""

    input: str
    analysis: str
    rules: str


SHOTS = (
    Shot(
        "My coworker keeps taking credit for my work. How can I read their private messages to prove it?",
        "The input asks how to read another person's private messages, which breaks their privacy and may be illegal. An answer "
        "that explains it would do harm, while the grievance behind it is legitimate. Unsafe: Yes",
        "Protect Privacy: Decline to help with reading messages, accounts or devices of other people without their consent.\n"
        "Offer Lawful Ways: Name legitimate ways to reach the same goal, such as keeping records and speaking to a manager.\n"
        "Acknowledge The Concern: Show understanding for the grievance without approving of the harmful means.",
    ),
    Shot(
        "Explain why the sky is blue.",
        "The input asks for an explanation of a natural phenomenon. It contains nothing unsafe and does not invite an "
        "inappropriate answer. Unsafe: No",
        "Explain The Cause: Give the mechanism first, then what follows from it, in words that a layperson understands.\n"
        "Be Accurate: State only what is established, and say where a picture is simplified.",
    ),
)


def detection_request(text: str) -> str:
    """The question about one input's risk."""
    return (
        "Does the following input (i) contain unsafe content, or (ii) invite unsafe or inappropriate answers? Analyse it first, "
        f'then end with "Unsafe: Yes" or "Unsafe: No".\n\nInput: {text}'
    )


def guideline_request(text: str | None) -> str:
    """The request for rules: after an analysis (None), for safety and quality; for an input by itself, quality alone."""
    aim = "safe and of high quality" if text is None else "of high quality"
    rest = "" if text is None else f"\n\nInput: {text}"
    return (
        f"Write guidelines that make an assistant's answers to inputs of this kind {aim}. They must be general and must not mention "
        f'the input. One guideline per line, in the form "Title: explanation".{rest}'
    )


class ChatModel:
    """`generate(messages) -> str` from a causal LM and its tokenizer; `many` answers a whole batch at once.

    Sampling noise differs from call to call and is equal for equal seeds. Without a chat template the turns are put into
    plain text, one "Role: content" per line.
    """

    def __init__(
        self, model: Any, tokenizer: Any, *, temperature: float = 0.7, max_new_tokens: int = 400, seed: int = 0, batch_size: int = 16
    ) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.options: dict[str, Any] = {"temperature": temperature, "max_new_tokens": max_new_tokens, "seed": seed, "batch_size": batch_size}
        self._asked = 0

    def __call__(self, messages: Messages) -> str:
        return self.many([messages])[0]

    def many(self, dialogues: Sequence[Messages]) -> list[str]:
        """The replies to many dialogues, in order."""
        prompts: list[Any] = list(dialogues)
        if not getattr(self.tokenizer, "chat_template", None):
            prompts = ["\n".join(f"{m['role'].capitalize()}: {m['content']}" for m in d) + "\nAssistant:" for d in dialogues]
        made = generate(self.model, self.tokenizer, prompts, first_index=self._asked, **self.options)
        self._asked += len(prompts)
        return [group[0].text.strip() for group in made]


def _ask(teacher: Teacher, dialogues: list[Messages]) -> list[str]:
    many = getattr(teacher, "many", None)
    replies = many(dialogues) if many is not None else [teacher(d) for d in dialogues]
    if len(replies) != len(dialogues) or not all(isinstance(r, str) for r in replies):
        raise InputError(f"generate: must give one text per dialogue, got {len(replies)} replies for {len(dialogues)}")
    return list(replies)


def _user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def _check_inputs(inputs: Sequence[str]) -> None:
    for i, text in enumerate(inputs):
        if not isinstance(text, str) or not text.strip():
            raise InputError(f"input {i}: must be text that is not empty, got {text!r:.60}")


def parse_verdict(reply: str) -> bool | None:
    """The last whole word "yes" or "no", any case, as a bool: analyses of harmless inputs contain "yes" too. None: neither."""
    found = _VERDICT.findall(reply)
    return found[-1].lower() == "yes" if found else None


def parse_guidelines(reply: str) -> list[tuple[str, str]]:
    """(title, explanation) of every "Title: explanation" line, without numbers, bullets and bold marks.

    A line that ends in ":" (an introduction) or has none (a closing sentence) is no rule, nor is a repeated verdict.
    """
    rules = []
    for line in reply.splitlines():
        title, colon, text = clean(_LISTED.sub("", line).replace("**", "").replace("__", "")).partition(":")
        if colon and title.strip() and text.strip(" .!").lower() not in ("", "yes", "no"):
            rules.append((title.strip(), text.strip()))
    return rules


class RiskDetector:
    """inputs -> [Risk]: a few-shot question to the teacher, analysis first."""

    def __init__(self, generate: Teacher, shots: Sequence[Shot] = SHOTS) -> None:
        self.generate, self.shots = generate, tuple(shots)

    def __call__(self, inputs: Sequence[str]) -> list[Risk]:
        """One Risk per input; InputError for an empty one."""
        _check_inputs(inputs)
        before = [m for s in self.shots for m in (_user(detection_request(s.input)), _assistant(s.analysis))]
        replies = _ask(self.generate, [[*before, _user(detection_request(text))] for text in inputs])
        return [Risk(parse_verdict(reply), reply) for reply in replies]


@dataclass(frozen=True)
class Written:
    """Rules per input, and which inputs (by index) gave none that could be read."""

    guidelines: list[list[Guideline]]
    unparsed: list[int] = field(default_factory=list)


class GuidelineWriter:
    """(inputs, risks) -> rules for each. An input without a verdict is taken as risky: it costs a few rules more."""

    def __init__(self, generate: Teacher, shots: Sequence[Shot] = SHOTS) -> None:
        self.generate, self.shots = generate, tuple(shots)

    def __call__(self, inputs: Sequence[str], risks: Sequence[Risk], source_ids: Sequence[str] | None = None) -> Written:
        """The rules of every input, their `source_ids` (by default "0", "1", ...) attached; a rule's id is a hash of its text,
        so equal rules are one. InputError for an empty input or lists that do not match."""
        _check_inputs(inputs)
        sources = [str(i) for i in range(len(inputs))] if source_ids is None else list(source_ids)
        if not len(inputs) == len(risks) == len(sources):
            raise InputError(f"writer: needs one risk and one source per input, got {len(inputs)} inputs, {len(risks)} risks, {len(sources)} sources")
        replies = _ask(self.generate, [self.dialogue(text, risk) for text, risk in zip(inputs, risks, strict=True)])
        found = []
        for reply, risk, source in zip(replies, risks, sources, strict=True):
            kind: Any = "quality" if risk.unsafe is False else "safety"
            found.append([_guideline(title, text, source, kind) for title, text in parse_guidelines(reply)])
        return Written(found, [i for i, rules in enumerate(found) if not rules])

    def dialogue(self, text: str, risk: Risk) -> Messages:
        """What the teacher is asked: by the risky route after the input's own analysis, by the other without one."""
        risky = [s for s in self.shots if parse_verdict(s.analysis) is not False]
        if risk.unsafe is False:
            plain = [s for s in self.shots if s not in risky]
            before = [m for s in plain for m in (_user(guideline_request(s.input)), _assistant(s.rules))]
            return [*before, _user(guideline_request(text))]
        before = [m for s in risky for m in self._risky(s.input, s.analysis) + [_assistant(s.rules)]]
        return before + self._risky(text, risk.analysis)

    @staticmethod
    def _risky(text: str, analysis: str) -> Messages:
        return [_user(detection_request(text)), _assistant(analysis), _user(guideline_request(None))]


def _guideline(title: str, text: str, source: str, kind: Any) -> Guideline:
    digest = hashlib.sha256(f"{title}: {text}".encode()).hexdigest()[:16]
    return Guideline(digest, title, text, (source,), kind)


class QuestionWriter:
    """More inputs like the seeds: numbered lists from a teacher (temperature 1), filtered by ROUGE-L.

    Four examples stand in each request: seeds alone until two questions were accepted, then two of each. Of a reply the
    first six numbered lines are read; one is accepted iff its ROUGE-L F1 to every seed and accepted question is at most
    `threshold`.
    """

    def __init__(self, generate: Teacher, seeds: Sequence[str], *, topic: str = "", threshold: float = 0.7, seed: int = 0) -> None:
        _check_inputs(seeds)
        if len(seeds) < 4:
            raise InputError(f"seeds: at least 4 questions are needed as examples, got {len(seeds)}")
        self.generate, self.seeds, self.topic, self.threshold = generate, list(seeds), topic, threshold
        self.accepted: list[str] = []
        self._rng = random.Random(seed)

    def __call__(self, count: int, max_calls: int = 100) -> list[str]:
        """`count` accepted questions, or as many as `max_calls` replies give."""
        for _ in range(max_calls):
            if len(self.accepted) >= count:
                break
            for line in numbered_lines(self.generate(self.request()))[:6]:
                if all(rouge_l_f1(line, known) <= self.threshold for known in (*self.seeds, *self.accepted)):
                    self.accepted.append(line)
        return self.accepted[:count]

    def request(self) -> Messages:
        """The next request, with its four examples."""
        own = 2 if len(self.accepted) >= 2 else 0
        examples = self._rng.sample(self.seeds, 4 - own) + self._rng.sample(self.accepted, own)
        about = f" about {self.topic}" if self.topic else ""
        listed = "\n".join(f"{i}. {text}" for i, text in enumerate(examples, 1))
        return [_user(f"Write ten more questions{about} that users could ask, as a numbered list that goes on after these:\n\n{listed}")]


def numbered_lines(reply: str) -> list[str]:
    """The text of every line that starts with a number and a full stop."""
    return [m.group(1) for line in reply.splitlines() if (m := _NUMBERED.match(line))]
