"""The endpoints: checked requests in, OpenAI's objects out, whole or piece by piece. Knows nothing of HTTP."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from lora_search.serve.model import Answer, Sampling, ServedModel
from lora_search.serve.prompts import Prompts
from lora_search.serve.requests import ChatRequest, CompletionRequest
from lora_search.spec import SweepSpec

COMPLETION_TOKENS = 16
"""Tokens of a completion that names no max_tokens; OpenAI's own default."""

CHAT_TOKENS = 512
"""Tokens of a chat's answer that names none, where the context has room for so many."""

Send = Callable[[dict[str, Any]], None]

Gone = Callable[[], bool]
"""Whether nobody waits for the answer any more."""


@dataclass(frozen=True)
class _Shape:
    """How the objects of one endpoint are built."""

    prefix: str
    whole: str
    piece: str


COMPLETION = _Shape("cmpl-", "text_completion", "text_completion")
CHAT = _Shape("chatcmpl-", "chat.completion", "chat.completion.chunk")


class Endpoints:
    """What the server answers."""

    def __init__(self, spec: SweepSpec, model: ServedModel) -> None:
        self._model = model
        self._spec = spec
        self._since = int(time.time())
        self.prompts = Prompts(spec.data, model.tokenizer)

    def models(self) -> dict[str, Any]:
        """GET /v1/models: each name, with what stands behind it under `lora_search`."""
        metric = self._spec.search.metric
        listed = []
        for name, adapter in self._model.adapters.items():
            told: dict[str, Any] = {"base": self._spec.base.model}
            if adapter is not None:
                told |= {"trial": adapter.trial, "step": adapter.step, metric: adapter.row.get(metric)}
                told |= {key: adapter.row.get(key) for key in ("rank", "alpha", "target_modules", "learning_rate")}
            listed.append(
                {"id": name, "object": "model", "created": self._since, "owned_by": "lora-search", "lora_search": told}
            )
        data = self._spec.data
        about = {"run": self._spec.name, "metric": metric, "chat": self.prompts.chat_format, "format": data.format}
        return {"object": "list", "data": listed, "lora_search": about | {"template": data.template}}

    def complete(self, request: CompletionRequest, send: Send | None, has_gone: Gone) -> dict[str, Any] | None:
        """POST /v1/completions: one choice a prompt; piece by piece to `send` where there is one."""
        prompts = [self.prompts.text_ids(p) if isinstance(p, str) else p for p in request.prompts]
        return self._answer(COMPLETION, request, prompts, request.max_tokens or COMPLETION_TOKENS, send, has_gone)

    def chat(self, request: ChatRequest, send: Send | None, has_gone: Gone) -> dict[str, Any] | None:
        """POST /v1/chat/completions: the assistant's next turn."""
        prompt = self.prompts.chat_ids(request.messages)
        asked = request.max_completion_tokens or request.max_tokens
        limit = self._model.context_length
        room = CHAT_TOKENS if limit is None else min(CHAT_TOKENS, max(limit - len(prompt), 1))
        return self._answer(CHAT, request, [prompt], asked or room, send, has_gone)

    def _answer(
        self,
        shape: _Shape,
        request: CompletionRequest | ChatRequest,
        prompts: Sequence[Sequence[int]],
        max_tokens: int,
        send: Send | None,
        has_gone: Gone,
    ) -> dict[str, Any] | None:
        sampling = Sampling(
            max_tokens,
            1.0 if request.temperature is None else request.temperature,
            1.0 if request.top_p is None else request.top_p,
            request.seed,
            request.stops,
        )
        head = {"id": shape.prefix + uuid.uuid4().hex, "created": int(time.time()), "model": request.model}
        answers = []
        for index, prompt in enumerate(prompts):
            tell = None if send is None else _teller(shape, head, index, send)
            answer = self._model.answer(request.model, prompt, sampling, tell, has_gone)
            answers.append(answer)
            if send is not None:
                send(_piece(shape, head, index, "", answer.finish_reason))
        usage = _usage(answers)
        if send is None:
            choices = [_choice(shape, index, answer) for index, answer in enumerate(answers)]
            whole = head | {"object": shape.whole, "choices": choices, "usage": usage}
            return whole | ({"lora_search": {"chat": self.prompts.chat_format}} if shape is CHAT else {})
        if request.counts_in_stream:
            send(head | {"object": shape.piece, "choices": [], "usage": usage})
        return None


def _teller(shape: _Shape, head: dict[str, Any], index: int, send: Send) -> Callable[[str], None]:
    begun = False

    def tell(text: str) -> None:
        nonlocal begun
        piece = _piece(shape, head, index, text, None)
        if shape is CHAT and not begun:
            piece["choices"][0]["delta"] = {"role": "assistant", "content": text}
        begun = True
        send(piece)

    return tell


def _piece(shape: _Shape, head: dict[str, Any], index: int, text: str, reason: str | None) -> dict[str, Any]:
    said: dict[str, Any] = {"delta": {"content": text} if text else {}} if shape is CHAT else {"text": text}
    choice = {"index": index, **said, "logprobs": None, "finish_reason": reason}
    return head | {"object": shape.piece, "choices": [choice]}


def _choice(shape: _Shape, index: int, answer: Answer) -> dict[str, Any]:
    said: dict[str, Any] = {"text": answer.text}
    if shape is CHAT:
        said = {"message": {"role": "assistant", "content": answer.text, "refusal": None}}
    return {"index": index, **said, "logprobs": None, "finish_reason": answer.finish_reason}


def _usage(answers: Sequence[Answer]) -> dict[str, int]:
    read, written = sum(a.prompt_tokens for a in answers), sum(a.completion_tokens for a in answers)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}
