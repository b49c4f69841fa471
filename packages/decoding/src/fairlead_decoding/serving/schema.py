"""What is asked and answered: OpenAI's names and shapes, with `top_k` and `min_p` added and what is not served refused.

Unknown fields, strings for numbers and values out of range are faults that name the field. Fields of OpenAI's that are not
served are known here with the one value that asks for nothing, so that a client which sends defaults is answered.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

NOT_SERVED = "not served: only the value that asks for nothing is accepted"
_WHOLE = BeforeValidator(lambda value: int(value) if isinstance(value, float) and value.is_integer() else value)
"""5.0 is an integer to JSON."""
Count = Annotated[int, Field(ge=1), _WHOLE]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), _WHOLE]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1), _WHOLE]
# One fault of a list is enough: a list of a hundred thousand bad items must not become as many errors.
Text = Annotated[str, Field(min_length=1)]
Texts = Annotated[list[Text], Field(min_length=1, fail_fast=True)]
Ids = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]
IdLists = Annotated[list[Ids], Field(min_length=1, fail_fast=True)]
StopText = Annotated[str, Field(min_length=1, max_length=256)]
_FORMS = {
    "prompt": "a string, a list of strings, a list of token ids or a list of such lists, none of them empty",
    "stop": "a string, or up to 4 strings, of 1 to 256 characters each",
    "content": "a string, or a list of {\"type\": \"text\", \"text\": ...} parts",
}


class Strict(BaseModel):
    """No unknown fields, no conversions."""

    model_config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False)

    @model_validator(mode="before")
    @classmethod
    def _few(cls, value: Any) -> Any:
        if isinstance(value, dict) and len(value) > 64:
            raise ValueError("more than 64 fields in one object")
        return value


class StreamOptions(Strict):
    """How a stream ends."""

    include_usage: bool = Field(False, description="a last chunk with the number of tokens")


class Asked(Strict):
    """What both kinds of completion share."""

    model: str = Field(max_length=512, description="the name under which the model is served, see /v1/models")
    max_tokens: Count | None = Field(None, description="tokens of an answer at most")
    temperature: float | None = Field(None, ge=0, le=2, description="0 takes the likeliest token; default 1")
    top_p: float | None = Field(None, gt=0, le=1)
    top_k: Count | None = Field(None, description="an extension: sample among the k likeliest tokens")
    min_p: float | None = Field(None, ge=0, le=1, description="an extension: leave out tokens below this share of the likeliest")
    n: Count | None = Field(None, description="answers to each prompt; default 1")
    seed: Seed | None = Field(None, description="the same seed gives the same answer")
    stop: StopText | Annotated[list[StopText], Field(max_length=4, fail_fast=True)] | None = Field(None, description="text before which the answer ends")
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(None, max_length=512, description="taken and not looked at")
    presence_penalty: float | None = Field(None, ge=0, le=0, description=NOT_SERVED)
    frequency_penalty: float | None = Field(None, ge=0, le=0, description=NOT_SERVED)
    logit_bias: dict[str, Any] | None = Field(None, max_length=0, description=NOT_SERVED)

    @property
    def stops(self) -> Sequence[str]:
        return [self.stop] if isinstance(self.stop, str) else self.stop or []


class CompletionRequest(Asked):
    """Body of /v1/completions."""

    prompt: Text | Texts | Ids | IdLists
    logprobs: None = Field(None, description=NOT_SERVED)
    echo: Literal[False] | None = Field(None, description=NOT_SERVED)
    best_of: Literal[1] | None = Field(None, description=NOT_SERVED)
    suffix: None = Field(None, description=NOT_SERVED)


class TextPart(Strict):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(Strict):
    """One turn of a chat."""

    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[TextPart], Field(min_length=1, fail_fast=True)]

    @property
    def plain(self) -> dict[str, str]:
        """As chat templates take it."""
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": content}


class TextFormat(Strict):
    """The one response format that is served."""

    type: Literal["text"]


class ChatRequest(Asked):
    """Body of /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1, max_length=4096, fail_fast=True)]
    max_completion_tokens: Count | None = Field(None, description="tokens of an answer at most; the newer name of max_tokens")
    logprobs: Literal[False] | None = Field(None, description=NOT_SERVED)
    top_logprobs: None = Field(None, description=NOT_SERVED)
    response_format: TextFormat | None = Field(None, description=NOT_SERVED)
    tools: Annotated[list[Any], Field(max_length=0)] | None = Field(None, description=NOT_SERVED)
    tool_choice: Literal["none", "auto"] | None = Field(None, description=NOT_SERVED)


class Usage(BaseModel):
    """Tokens read and written."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int


FinishReason = Literal["stop", "length"]


class CompletionChoice(BaseModel):
    """One answer: `reward` is there where the decoder chose by one."""

    index: int
    text: str
    finish_reason: FinishReason
    logprobs: None = None
    reward: float | None = None


class Completion(BaseModel):
    """Answer of /v1/completions."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage


class ChatMessage(BaseModel):
    """What the assistant said."""

    role: Literal["assistant"] = "assistant"
    content: str


class ChatChoice(BaseModel):
    """One answer: `reward` is there where the decoder chose by one."""

    index: int
    message: ChatMessage
    finish_reason: FinishReason
    logprobs: None = None
    reward: float | None = None


class ChatCompletion(BaseModel):
    """Answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ModelCard(BaseModel):
    """One served model."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "fairlead"


class ModelList(BaseModel):
    """Answer of /v1/models."""

    object: Literal["list"] = "list"
    data: list[ModelCard]


class Health(BaseModel):
    """Answer of /health."""

    status: Literal["ok", "stopping", "failed"]
    model: str
    waiting: int = Field(description="requests in the queue")
    running: int = Field(description="requests that the model works on")


class Fault(BaseModel):
    """What was wrong; `param` is the field at fault."""

    message: str
    type: str
    param: str | None = None
    code: str | None = None


class ErrorBody(BaseModel):
    """Every answer that is an error."""

    error: Fault


def describe(faults: Sequence[Any]) -> tuple[str, str | None]:
    """(one line, the field) of a body's first fault, as pydantic tells it; what was sent is not repeated."""
    fault = faults[0]
    where = [str(part) for part in fault["loc"] if part != "body"]
    if fault["type"] == "json_invalid" or (not where and fault["type"] != "value_error"):
        return "the body must be a JSON object", None
    if not where:
        return fault["msg"].removeprefix("Value error, "), None
    field = _shown(where[0])
    if fault["type"] == "extra_forbidden":
        path = ".".join(_shown(part) for part in where)
        return f"unknown field {path}; what is served is in /openapi.json", path
    if fault["type"] == "missing":
        path = ".".join(_shown(part) for part in where)
        return f"{path}: is required", path
    for model in (CompletionRequest, ChatRequest):
        info = model.model_fields.get(field)
        if info is not None and info.description == NOT_SERVED:
            return f"{field}: is not served here; leave it out", field
    if field == "messages" and "content" in where:
        path = ".".join(where[: where.index("content") + 1])
        return f"{path}: must be {_FORMS['content']}", path
    if field in _FORMS:
        return f"{field}: must be {_FORMS[field]}", field
    path = ".".join(_shown(part) for part in where)
    words = re.sub(r"^(Value error, |\w+ (?=should))", "", fault["msg"])
    return f"{path}: {' '.join(words.split())}", path


def _shown(name: str) -> str:
    """A field's name, which may be any text or none, on a short line."""
    name = name if len(name) <= 60 else name[:57] + "..."
    return name if name.isprintable() and name else ascii(name)
