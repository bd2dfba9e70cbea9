"""The base with its adapters, and one answer at a time from any of them."""

from __future__ import annotations

import secrets
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.generation.streamers import BaseStreamer

from lora_search.errors import SweepError
from lora_search.model import FrozenBase, load_base, load_tokenizer
from lora_search.serve.adapters import BASE, BEST, ServedAdapter
from lora_search.serve.fault import RequestFault
from lora_search.serve.text import TextSoFar
from lora_search.spec import Base

WAITING = 64
"""Requests that may wait for the model; more are told to come back."""

LOOK_S = 0.5
"""How often one that waits looks whether whoever asked is still there."""

GREEDY = 1e-6
"""A temperature below it takes the most likely token: scores divided by it leave float32."""

LAST_ANSWER_S = 20.0
"""How long `close` waits for the answer that is being made."""


@dataclass(frozen=True)
class Sampling:
    """How tokens are chosen; temperature 0 takes the most likely one. Nothing of the base's own settings is added."""

    max_tokens: int
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stops: Sequence[str] = ()


@dataclass(frozen=True)
class Answer:
    """What came of a prompt."""

    text: str
    prompt_tokens: int
    completion_tokens: int
    finish_reason: str
    """`stop`: the end token or a stop string; `length`: max_tokens."""


class ServedModel:
    """One base, loaded once as it was trained on, and adapters that are switched from one answer to the next."""

    def __init__(self, base: Base, adapters: Sequence[ServedAdapter], best: int | None, device: torch.device) -> None:
        """
        Args:
            best: the trial that is also called `best`; None for none.

        Raises:
            SweepError: an adapter does not fit the base.
        """
        self.tokenizer = load_tokenizer(base)
        self.base: FrozenBase = load_base(base.model_copy(update={"gradient_checkpointing": False}), device)
        named = [(BEST, adapter) for adapter in adapters if adapter.trial == best]
        named += [(adapter.name, adapter) for adapter in adapters]
        self.adapters: Mapping[str, ServedAdapter | None] = {BASE: None, **dict(named)}
        """By the names that requests may use."""
        self._turn = threading.Lock()
        self._counting = threading.Lock()
        self._waiting = 0
        self._closing = threading.Event()
        ends = self.base.model.generation_config.eos_token_id
        # What the base's own configuration says of penalties and the like would change answers behind Sampling's back.
        self.base.model.generation_config = GenerationConfig(eos_token_id=ends)
        self._ends = {self.tokenizer.eos_token_id, *(ends if isinstance(ends, list) else [ends])} - {None}
        self._model = _with_adapters(self.base, adapters)

    @property
    def context_length(self) -> int | None:
        """Tokens of prompt and answer together; None where the base's configuration names none."""
        config = self.base.model.config
        found = next((getattr(config, name, None) for name in ("max_position_embeddings", "n_positions")), None)
        return found if isinstance(found, int) and found > 0 else None

    def answer(
        self,
        name: str,
        prompt: Sequence[int],
        sampling: Sampling,
        tell: Callable[[str], None] | None = None,
        has_gone: Callable[[], bool] = lambda: False,
    ) -> Answer:
        """Answer a prompt of token ids with the model of that name; waits for its turn.

        Args:
            tell: is told each further piece of the text; what it raises ends the answer.
            has_gone: whether nobody waits for the answer any more; asked while it waits, and at each token.

        Raises:
            ConnectionError: nobody waits for the answer any more.
            RequestFault: there is no such model, the prompt is empty or too long, or too many are waiting.
        """
        self._check(name, prompt, sampling)
        turn, draws = self._in_turn(has_gone), _drawn(sampling.seed)
        with turn, self._switched(name), self.base.autocast, torch.inference_mode(), draws:
            return self._generate(prompt, sampling, tell, has_gone)

    def close(self) -> None:
        """End the answer that is being made at its next token, and wait for that."""
        self._closing.set()
        if self._turn.acquire(timeout=LAST_ANSWER_S):
            self._turn.release()

    def _check(self, name: str, prompt: Sequence[int], sampling: Sampling) -> None:
        if name not in self.adapters:
            known = ", ".join(self.adapters)
            raise RequestFault(
                404, f"model: found {name[:80]!r}; served are {known}", param="model", code="model_not_found"
            )
        if not prompt:
            raise RequestFault(400, "the prompt has no tokens", param="prompt")
        vocabulary = self.base.model.get_input_embeddings().num_embeddings
        if max(prompt) >= vocabulary:
            raise RequestFault(
                400, f"prompt: found token {max(prompt)}; the vocabulary has {vocabulary}", param="prompt"
            )
        limit = self.context_length
        if limit is not None and len(prompt) + sampling.max_tokens > limit:
            raise RequestFault(
                400,
                f"the base reads at most {limit} tokens; found {len(prompt)} of the prompt and "
                f"{sampling.max_tokens} asked for (max_tokens)",
                param="max_tokens",
                code="context_length_exceeded",
            )

    @contextmanager
    def _in_turn(self, has_gone: Callable[[], bool]) -> Iterator[None]:
        with self._counting:
            if self._waiting >= WAITING:
                raise RequestFault(429, f"{self._waiting} requests are waiting; try again", code="rate_limit_exceeded")
            self._waiting += 1
        try:
            while not self._turn.acquire(timeout=LOOK_S):
                _require_asker(has_gone)
            try:
                _require_asker(has_gone)
                if self._closing.is_set():
                    raise RequestFault(503, "the server is stopping")
                yield
            finally:
                self._turn.release()
        finally:
            with self._counting:
                self._waiting -= 1

    @contextmanager
    def _switched(self, name: str) -> Iterator[None]:
        adapter = self.adapters[name]
        if adapter is not None:
            self._model.set_adapter(adapter.name)
        with self._model.disable_adapter() if adapter is None else nullcontext():
            yield

    def _generate(
        self,
        prompt: Sequence[int],
        sampling: Sampling,
        tell: Callable[[str], None] | None,
        has_gone: Callable[[], bool],
    ) -> Answer:
        def must_end() -> bool:
            return self._closing.is_set() or has_gone()

        watch = _Watch(TextSoFar(self._decode, sampling.stops), self._ends, must_end, tell)
        choice: dict[str, Any] = {"do_sample": False}
        if sampling.temperature >= GREEDY:
            choice = {"do_sample": True, "temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": 0}
        ids = torch.tensor([list(prompt)], device=self.base.device)
        self._model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=sampling.max_tokens,
            use_cache=True,
            pad_token_id=self.tokenizer.pad_token_id,
            eos_token_id=sorted(self._ends),
            stopping_criteria=StoppingCriteriaList([watch.criterion]),
            streamer=watch,
            **choice,
        )
        is_done = watch.has_ended or watch.text.is_stopped or watch.text.token_count >= sampling.max_tokens
        if self._closing.is_set() and not is_done:
            raise RequestFault(503, "the server is stopping")
        if not is_done:
            _require_asker(has_gone)
        if tell is not None and (rest := watch.text.rest()):
            tell(rest)
        reason = "stop" if watch.has_ended or watch.text.is_stopped else "length"
        return Answer(watch.text.text, len(prompt), watch.text.token_count + watch.has_ended, reason)

    def _decode(self, tokens: list[int]) -> str:
        return str(self.tokenizer.decode(tokens, skip_special_tokens=True))


class _Watch(BaseStreamer):  # type: ignore[misc]
    """Hears each token as it is made, in the thread that makes them, and says when it is enough."""

    def __init__(
        self, text: TextSoFar, ends: set[int], must_end: Callable[[], bool], tell: Callable[[str], None] | None
    ) -> None:
        self.text = text
        self.has_ended = False
        """Whether the end token has come."""
        self._ends = ends
        self._must_end = must_end
        self._tell = tell
        self._prompt_came = False

    def put(self, value: torch.Tensor) -> None:
        if not self._prompt_came:
            self._prompt_came = True
            return
        for token in value.flatten().tolist():
            if token in self._ends:
                self.has_ended = True
            elif piece := self.text.add(token):
                self._say(piece)

    def end(self) -> None:
        """Nothing is left to do: `_generate` asks for the rest."""

    @property
    def criterion(self) -> StoppingCriteria:
        watch = self

        class Enough(StoppingCriteria):  # type: ignore[misc]
            def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.Tensor:
                # Asked before the streamer hears of the newest token: what is made after a stop string is left out.
                enough = watch.text.is_stopped or watch._must_end()
                return torch.full((input_ids.shape[0],), enough, device=input_ids.device, dtype=torch.bool)

        return Enough()

    def _say(self, piece: str) -> None:
        if self._tell is not None:
            self._tell(piece)


def _require_asker(has_gone: Callable[[], bool]) -> None:
    if has_gone():
        raise ConnectionError("nobody waits for the answer any more")


def best_device() -> torch.device:
    """The first GPU, or the CPU where there is none."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _with_adapters(base: FrozenBase, adapters: Sequence[ServedAdapter]) -> Any:
    """The base with every adapter beside it, in evaluation mode."""
    from peft import PeftModel

    model: Any = None
    for adapter in adapters:
        try:
            if model is None:
                model = PeftModel.from_pretrained(base.model, str(adapter.folder), adapter_name=adapter.name)
            else:
                model.load_adapter(str(adapter.folder), adapter_name=adapter.name)
        except (ValueError, RuntimeError, KeyError, TypeError, OSError) as error:
            raise SweepError(f"{adapter.name}: the adapter does not fit the base: {error}") from error
    model.eval()
    return model


@contextmanager
def _drawn(seed: int | None) -> Iterator[None]:
    """Random draws from a seed, the process's own generator left as it was."""
    with torch.random.fork_rng(devices=range(torch.cuda.device_count())):
        torch.manual_seed(secrets.randbits(63) if seed is None else seed % 2**63)
        yield
