"""Compare a saved model, loaded in a fresh process by transformers alone, with the base and its adapter."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt
import torch

from lora_search.errors import SweepError
from lora_search.merge import reloaded
from lora_search.merge.reloaded import Row
from lora_search.merge.values import LogitsDifference, Text
from lora_search.model import load_base
from lora_search.spec import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from lora_search.data import TokenizedData, TokenSplit

PROMPTS, NEW_TOKENS = 3, 40
COMPARED_ROWS, LOGITS_BYTES = 16, 64 << 20
"""Rows whose logits are compared, as many as fit into these bytes, at least one."""

SHOWN_PROMPT = 160
"""Characters of a prompt that are shown: its end."""


@dataclass(frozen=True)
class Probe:
    """What both models are asked: held-out rows, all from the validation split."""

    validation: Sequence[Row]
    compared: Sequence[Row]
    prompts: Sequence[Sequence[int]]
    shown: Sequence[str]
    """The prompts, as they are read."""
    pad: int


@dataclass(frozen=True)
class Answers:
    """What a model answered."""

    loss: float | None
    """Validation loss; None where it was not asked for."""
    logits_MV: npt.NDArray[np.float32]
    texts: Sequence[str]


@dataclass(frozen=True)
class GgufAnswers:
    """What a GGUF file answered."""

    logits_MV: npt.NDArray[np.float32]
    rows: int
    """Validation rows that were tokenised."""
    same: int
    """Those that gave the same tokens as the folder's tokenizer."""
    different: Mapping[str, Any] | None
    """The first that did not: text, tokens found and expected."""


def make_probe(data: TokenizedData, tokenizer: PreTrainedTokenizerBase, vocabulary: int) -> Probe:
    """Choose the rows that are compared, and the prompts that are continued."""
    rows = _rows(data.validation)
    compared: list[Row] = []
    room = LOGITS_BYTES // (4 * vocabulary)
    for tokens, marks in _spread(rows, COMPARED_ROWS):
        room -= sum(marks)
        if compared and room < 0:
            break
        compared.append((tokens, marks))
    prompts = [tokens[: _prompt_length(marks)] for tokens, marks in _spread(rows, PROMPTS)]
    shown = [str(tokenizer.decode(prompt, skip_special_tokens=True))[-SHOWN_PROMPT:] for prompt in prompts]
    return Probe(rows, compared, prompts, shown, data.pad_token_id)


def _rows(split: TokenSplit) -> list[Row]:
    spans = zip(split.offsets[:-1], split.offsets[1:], strict=True)
    return [(split.tokens_S[a:b].tolist(), split.trained_S[a:b].tolist()) for a, b in spans]


def _spread(rows: Sequence[Row], count: int) -> Sequence[Row]:
    """Some of the rows, from all over them: neighbours may be much alike."""
    return rows[:: max(1, len(rows) // count)][:count]


def _prompt_length(marks: Sequence[bool]) -> int:
    """Tokens before the first that is trained; of a row that is trained whole, a third."""
    before = marks.index(True) if True in marks else len(marks)
    return before if before > 1 else max(1, len(marks) // 3)


def ask_adapted(
    base: Base,
    adapter: Path,
    probe: Probe,
    tokenizer: PreTrainedTokenizerBase,
    device: torch.device,
    *,
    wants_loss: bool,
) -> Answers:
    """The base with its adapter, in this process."""
    from peft import PeftModel

    loaded = load_base(base, device)
    PeftModel.from_pretrained(loaded.model, str(adapter))  # puts the adapter into the model
    with loaded.autocast:
        loss = reloaded.loss_of(loaded.model, probe.validation, probe.pad) if wants_loss else None
        logits = reloaded.logits_of(loaded.model, probe.compared)
        made = reloaded.greedy(loaded.model, probe.prompts, NEW_TOKENS, probe.pad)
    del loaded
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return Answers(loss, logits, [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in made])


@dataclass(frozen=True)
class _Begun:
    """A process that imports what loads a model, and then waits to be asked; it ends with this one."""

    process: subprocess.Popen[str]
    log: IO[str]

    @classmethod
    def now(cls) -> _Begun:
        log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - it is the process's for as long as that lives
        process = subprocess.Popen(
            [sys.executable, "-P", reloaded.__file__],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": str(torch.get_num_threads()), "TRANSFORMERS_VERBOSITY": "error"},
        )
        return cls(process, log)

    def end(self) -> None:
        self.process.kill()
        self.process.communicate()
        self.log.close()


_ahead: list[_Begun] = []
"""One at most. What a host does at one time can leave it nowhere else for what it does later."""


def begin_ahead() -> None:
    """Begin what the next FreshProcess of this process is, which imports while other work is done."""
    if not _ahead:
        _ahead.append(_Begun.now())


def end_ahead() -> None:
    """End what was begun ahead: nobody will ask it."""
    while _ahead:
        _ahead.pop().end()


class FreshProcess:
    """A process that loads saved models with transformers alone; it starts at once, and imports while others work."""

    def __init__(self, base: Base, device: torch.device) -> None:
        self._base = base
        self.device = device
        if _ahead and _ahead[0].process.poll() is not None:
            end_ahead()
        self._begun = _ahead.pop() if _ahead else _Begun.now()
        self._process = self._begun.process
        self._folder = tempfile.TemporaryDirectory(prefix="lora-search-verify-")
        self._threads = torch.get_num_threads()

    def __enter__(self) -> FreshProcess:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._begun.end()
        self._folder.cleanup()

    def ask(self, model: Path, probe: Probe) -> Answers:
        """What the model in a folder answers.

        Raises:
            SweepError: it cannot be loaded or run; the message is the process's own.
        """
        answer, logits = self._ask(model, None, probe)
        return Answers(answer["loss"], logits, answer["texts"])

    def loss(self, model: Path, probe: Probe) -> float:
        """Validation loss of the model in a folder, and nothing else of it: generating takes longest.

        Raises:
            SweepError: as `ask`.
        """
        answer, _ = self._ask(model, None, replace(probe, compared=(), prompts=()))
        return float(answer["loss"])

    def ask_gguf(self, file: Path, model: Path, probe: Probe) -> GgufAnswers:
        """What a GGUF file answers, and whether it tokenises as the folder does that it was made of.

        Raises:
            SweepError: as `ask`.
        """
        answer, logits = self._ask(model, file, probe)
        return GgufAnswers(logits, answer["rows"], answer["same"], answer["different"])

    def _ask(self, model: Path, gguf: Path | None, probe: Probe) -> tuple[dict[str, Any], npt.NDArray[np.float32]]:
        """The answer, and the logits beside it."""
        folder = Path(self._folder.name)
        rows, logits = folder / "rows.json", folder / "logits.npy"
        given = {
            "validation": probe.validation,
            "compared": probe.compared,
            "prompts": probe.prompts,
            "new_tokens": NEW_TOKENS,
            "pad": probe.pad,
        }
        rows.write_text(json.dumps(given), encoding="utf-8")
        asked = {
            "folder": str(model.resolve()),
            "gguf": None if gguf is None else str(gguf.resolve()),
            "rows": str(rows),
            "logits": str(logits),
            "device": str(self.device),
            "threads": self._threads,
            "trust_remote_code": self._base.trust_remote_code,
        }
        return self._exchange(asked), np.load(logits)

    def _exchange(self, asked: dict[str, Any]) -> dict[str, Any]:
        assert self._process.stdin is not None  # noqa: S101 - both are pipes
        assert self._process.stdout is not None  # noqa: S101
        try:
            self._process.stdin.write(json.dumps(asked) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended, and left its reason in the log
        line = self._process.stdout.readline()
        if not line:
            status = self._process.wait()
            self._begun.log.seek(0)
            last = (self._begun.log.read().strip().splitlines() or ["no message"])[-1]
            raise SweepError(f"the merged model cannot be verified: its process ended with status {status}: {last}")
        answer: dict[str, Any] = json.loads(line)
        return answer


def compare(merged: Answers | GgufAnswers, adapted: Answers) -> LogitsDifference:
    """How far two models' logits are apart."""
    apart_MV = np.abs(merged.logits_MV - adapted.logits_MV)
    same_M = merged.logits_MV.argmax(-1) == adapted.logits_MV.argmax(-1)
    return LogitsDifference(
        targets=len(same_M),
        largest=float(apart_MV.max()),
        mean=float(apart_MV.mean()),
        spread=float(adapted.logits_MV.std()),
        same_choice=float(same_M.mean()),
    )


def side_by_side(probe: Probe, adapted: Answers, merged: Answers) -> list[Text]:
    """Each prompt with both continuations."""
    return [Text(*three) for three in zip(probe.shown, adapted.texts, merged.texts, strict=True)]
