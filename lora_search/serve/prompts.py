"""How a chat becomes the text that the model reads."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from jinja2 import TemplateError

from lora_search.data.tokens import leading_tokens
from lora_search.serve.fault import RequestFault
from lora_search.serve.requests import Message
from lora_search.spec import Data

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Prompts:
    """Prompts as the sweep's trials were trained on them."""

    def __init__(self, data: Data, tokenizer: PreTrainedTokenizerBase) -> None:
        self._data = data
        self._tokenizer = tokenizer

    @property
    def chat_format(self) -> str:
        """How a chat is written, as the endpoints say it."""
        if self._tokenizer.chat_template:
            return "the tokenizer's chat template"
        if self._data.format == "prompt-completion":
            return "the sweep's data.template, filled with the last user message; this base has no chat template"
        return "the last user message as it stands; this base has no chat template"

    def text_ids(self, text: str) -> list[int]:
        """A text's tokens, with what the tokenizer puts before a text, as in training."""
        return leading_tokens(self._tokenizer) + self._ids(text)

    def chat_ids(self, messages: Sequence[Message]) -> list[int]:
        """A chat's tokens, up to where the assistant's next turn begins.

        Raises:
            RequestFault: the chat template refuses the chat, or there is no user message.
        """
        if not self._tokenizer.chat_template:
            return self.text_ids(self._last_user_message(messages))
        try:
            text = self._tokenizer.apply_chat_template(
                [{"role": message.role, "content": message.text} for message in messages],
                tokenize=False,
                add_generation_prompt=True,
            )
        except (TemplateError, ValueError, TypeError) as error:
            raise RequestFault(400, f"messages: the chat template refuses them: {error}", param="messages") from None
        return self._ids(str(text))  # the template writes its own first token

    def _last_user_message(self, messages: Sequence[Message]) -> str:
        said = [message.text for message in messages if message.role == "user"]
        if not said:
            raise RequestFault(400, "messages: there is no user message", param="messages")
        if self._data.format != "prompt-completion":
            return said[-1]
        return self._data.template.replace("{prompt}", said[-1])

    def _ids(self, text: str) -> list[int]:
        return list(self._tokenizer(text, add_special_tokens=False)["input_ids"])
