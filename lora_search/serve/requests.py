"""Requests of the completion and chat endpoints, checked: what OpenAI's API names, as much of it as is served."""

from __future__ import annotations

import json
from typing import Annotated, Any, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from lora_search.serve.fault import RequestFault
from lora_search.spec.schema import plain_reason

PROMPTS = 16
"""Prompts that one request may bring."""

NEUTRAL: dict[str, tuple[Any, ...]] = {
    "n": (1,),
    "best_of": (1,),
    "echo": (False,),
    "suffix": ("",),
    "logprobs": (False, 0),
    "top_logprobs": (0,),
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "logit_bias": ({},),
    "response_format": ({"type": "text"},),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "modalities": (["text"],),
    "audio": (),
}
"""Keys that would change an answer and are not served, with the values that ask for nothing; null is one for all."""

Text = Annotated[str, Field(min_length=1, max_length=1000)]


class _StreamOptions(BaseModel):
    include_usage: bool = False


class _Request(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True, allow_inf_nan=False)

    model: str
    max_tokens: int | None = Field(None, ge=1)
    temperature: float | None = Field(None, ge=0, le=2)
    top_p: float | None = Field(None, gt=0, le=1)
    stop: Text | Annotated[list[Text], Field(max_length=4)] | None = None
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stream: bool | None = False
    stream_options: _StreamOptions | None = None

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def counts_in_stream(self) -> bool:
        """Whether a stream ends with the usage."""
        return self.stream_options is not None and self.stream_options.include_usage


TokenIds = Annotated[list[Annotated[int, Field(ge=0)]], Field(min_length=1)]


class CompletionRequest(_Request):
    """POST /v1/completions."""

    prompt: str | TokenIds | Annotated[list[str], Field(min_length=1, max_length=PROMPTS)]

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each a text, or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        texts: list[str | list[int]] = [part for part in self.prompt if isinstance(part, str)]
        return texts or [[part for part in self.prompt if isinstance(part, int)]]


class _TextPart(BaseModel):
    type: Literal["text"]
    text: str


class Message(BaseModel):
    """One turn of a chat."""

    model_config = ConfigDict(extra="ignore", strict=True)

    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_TextPart] | None = None

    @property
    def text(self) -> str:
        if isinstance(self.content, list):
            return "".join(part.text for part in self.content)
        return self.content or ""


class ChatRequest(_Request):
    """POST /v1/chat/completions."""

    messages: Annotated[list[Message], Field(min_length=1)]
    max_completion_tokens: int | None = Field(None, ge=1)


Checked = TypeVar("Checked", bound=_Request)


def parse_request(kind: type[Checked], body: bytes) -> Checked:
    """A checked request.

    Raises:
        RequestFault: it is no JSON, lacks a key, has a wrong value, or asks for what is not served.
    """
    try:
        raw = json.loads(body)
        json.dumps(raw, ensure_ascii=False).encode()  # half a surrogate pair is no text that a tokenizer takes
    except (ValueError, RecursionError) as error:
        raise RequestFault(400, f"the body is not JSON: {error}") from None
    if not isinstance(raw, dict):
        raise RequestFault(400, f"the body must be a JSON object; found {type(raw).__name__}")
    for name, neutral in NEUTRAL.items():
        if raw.get(name) is not None and raw[name] not in neutral:
            allowed = f"; allowed: {', '.join(json.dumps(value) for value in neutral)}" if neutral else ""
            raise RequestFault(
                400, f"{name}: found {json.dumps(raw[name])[:80]}, which is not served{allowed}", param=name
            )
    try:
        return kind.model_validate(raw)
    except ValidationError as error:
        first = error.errors()[0]
        key = str(first["loc"][0])
        found = "nothing" if first["type"] == "missing" else json.dumps(raw.get(key))[:80]
        raise RequestFault(400, f"{key}: found {found}; {plain_reason(first['msg'])}", param=key) from None
