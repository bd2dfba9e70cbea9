"""Merge an adapter into a standard model, measure what the merge costs, and keep the better of the two ways.

PEFT's `merge_and_unload` on a 4-bit model leaves it 4-bit, and re-quantising loses accuracy. So the adapter is merged
into full-precision weights: the original ones, or those that NF4 made of them, which the adapter was trained on. The
two differ in loss, and which is better is measured (huggingface/transformers#31293, huggingface/peft#2321).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch

from lora_search.checkpoint import require_lora
from lora_search.errors import InputError, SweepError
from lora_search.merge.card import merged_card
from lora_search.merge.gguf import GgufForm, gguf_form, write_gguf
from lora_search.merge.memory import holds_two
from lora_search.merge.published import Published, published_weights
from lora_search.merge.shards import ShardMerge
from lora_search.merge.staging import publish, staging
from lora_search.merge.surroundings import base_folder, read_config, write_config, write_surroundings
from lora_search.merge.values import GGUF_ROUNDING, ROUNDING, Check, Gguf, Merged, NotByShards, Onto, Options
from lora_search.merge.verify import Answers, FreshProcess, Probe, ask_adapted, compare, make_probe, side_by_side
from lora_search.merge.whole import merge_whole, quantised_modules
from lora_search.model import load_tokenizer
from lora_search.model.precision import DTYPES
from lora_search.spec import Base
from lora_search.targets.skeleton import skeleton

if TYPE_CHECKING:
    from lora_search.data import TokenizedData

DEFAULTS = Options()


def merge_adapter(
    base: Base,
    adapter: Path,
    data: TokenizedData | None,
    adapter_loss: float | None,
    out: Path,
    device: torch.device,
    options: Options = DEFAULTS,
    say: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Merge an adapter into its base and save it at `out`, a folder that transformers alone loads.

    Shard by shard where the architecture and the adapter allow it, in memory elsewhere. What is written is loaded again
    as anybody would, measured on the validation split, and compared with the base and its adapter.

    Args:
        base: as in the sweep file.
        adapter: a folder in PEFT's format.
        data: needed to verify.
        adapter_loss: nats a token of the adapter on its own base, over the validation split; None if it is to be
            measured.
        out: must not exist; appears only when the merge is complete, and so does the GGUF file beside it.
        say: is told how far it is.

    Raises:
        InputError: the adapter cannot be merged into this base, with the reason; or the options contradict each other.
        SweepError: `out` exists, or the merged model is not what base and adapter are.
    """
    require_lora(adapter)
    if options.verify and data is None:
        raise ValueError("to verify a merge needs data")
    ways = _ways(base, options)
    folder = base_folder(base)
    config = read_config(folder)
    published = published_weights(folder)
    tokenizer = load_tokenizer(base)
    form = gguf_form(base, tokenizer) if options.gguf else None
    beside = gguf_path(out)
    if form is not None and beside.exists():
        raise SweepError(f"{beside} exists already")
    with ExitStack() as stack:
        parts = stack.enter_context(staging(out))
        fresh = stack.enter_context(FreshProcess(base, device)) if options.verify else None
        dtype = None if options.dtype == "auto" else options.dtype
        writer = _Writer(base, adapter, published, device, dtype, say)
        for way in ways:
            part = parts / way
            part.mkdir()
            writer.write(way, part)
            if writer.in_memory is None:
                write_config(config, part, dtype=dtype, untied=bool(writer.untied))
            write_surroundings(base, tokenizer, part)
        verified = None
        if fresh is None or data is None:
            merged = Merged(ways[0], {}, None, None, options.tolerance, writer.in_memory, writer.notes)
        else:
            say("verifying: the model is loaded whole, as transformers does it")
            probe = make_probe(data, tokenizer, writer.vocabulary)
            asker = partial(ask_adapted, adapter=adapter, probe=probe, tokenizer=tokenizer, device=device)
            folders = {way: parts / way for way in ways}
            onto, losses, loss, check, answers = _measure(base, asker, folders, probe, fresh, adapter_loss)
            verified = _Verified(fresh, probe, answers)
            _require_equal(check, base, writer.dtype_name(config), device)
            merged = Merged(onto, losses, loss, check, options.tolerance, writer.in_memory, writer.notes)
        kept = parts / merged.onto
        if form is not None:
            say(f"writing {beside.name}")
            file = parts / "gguf" / beside.name
            file.parent.mkdir()
            merged = replace(merged, gguf=_to_gguf(form, kept, file, verified))
            publish(file, beside)
        try:
            (kept / "README.md").write_text(merged_card(base, adapter, merged), encoding="utf-8")
            publish(kept, out)
        except BaseException:
            if form is not None:
                beside.unlink(missing_ok=True)
            raise
    return merged


def gguf_path(out: Path) -> Path:
    """The GGUF file beside a merged model."""
    return out.with_name(f"{out.name}.gguf")


def _ways(base: Base, options: Options) -> Sequence[Onto]:
    """The weights to merge onto."""
    if options.onto == "dequantized" and base.quantization != "nf4":
        raise InputError(
            f"--onto dequantized: the adapter was trained on unquantised weights (base.quantization: "
            f"{base.quantization}); allowed: original, auto"
        )
    if base.quantization != "nf4":
        return ("original",)
    if options.onto != "auto":
        return (options.onto,)
    if not options.verify:
        raise InputError(
            "--onto auto measures both ways, and --no-verify measures nothing; say original or dequantized"
        )
    return ("original", "dequantized")


class _Writer:
    """Writes a merged model's weights, shard by shard if that can be done."""

    def __init__(
        self,
        base: Base,
        adapter: Path,
        published: Published,
        device: torch.device,
        dtype: str | None,
        say: Callable[[str], None],
    ) -> None:
        self._base, self._adapter, self._device, self._say = base, adapter, device, say
        self._dtype = dtype
        self.in_memory: str | None = None
        """Why the model is merged in memory; None while it is merged by shards."""
        self._shards: ShardMerge | None = None
        self._quantised: Sequence[str] | None = None
        self._model = skeleton(base.model, trust_remote_code=base.trust_remote_code, revision=base.revision)
        self.vocabulary = int(self._model.get_output_embeddings().weight.shape[0])
        self._published_dtype = getattr(self._model.config, "dtype", None) or torch.float32
        try:
            if base.trust_remote_code and getattr(self._model.config, "auto_map", None):
                raise NotByShards("the base runs code of its own")
            self._shards = ShardMerge(published, self._model, adapter, device)
        except NotByShards as reason:
            self._in_memory(reason)

    @property
    def untied(self) -> Sequence[str]:
        return () if self._shards is None else tuple(self._shards.untied)

    @property
    def notes(self) -> Sequence[str]:
        if not self.untied:
            return ()
        return (
            f"the adapter changes one of two parameters that are one in the base; {', '.join(self.untied)} has numbers "
            "of its own now (tie_word_embeddings: false)",
        )

    def dtype_name(self, config: dict[str, object]) -> str:
        """Of the weights on disk; of those that are not all alike, the narrower."""
        if self._dtype is not None:
            return self._dtype
        return str(config.get("dtype") or config.get("torch_dtype") or "float32").removeprefix("torch.")

    def write(self, way: Onto, part: Path) -> None:
        dequantized = way == "dequantized"
        if self._shards is not None:
            try:
                dtype = None if self._dtype is None else DTYPES[self._dtype]
                self._shards.write(part, dequantized=dequantized, dtype=dtype, say=self._say)
                return
            except NotByShards as reason:
                self._in_memory(reason)
        if dequantized and self._quantised is None:
            self._quantised = quantised_modules(self._base, self._device)
        quantised = self._quantised or [] if dequantized else []
        whole = DTYPES[self._dtype] if self._dtype is not None else self._published_dtype
        merge_whole(self._base, self._adapter, quantised, part, whole, self._device)

    def _in_memory(self, reason: NotByShards) -> None:
        self._shards = None
        self.in_memory = str(reason)
        self._say(f"merging in memory, not shard by shard: {reason}")


def _measure(
    base: Base,
    ask_adapted: Callable[..., Answers],
    folders: Mapping[Onto, Path],
    probe: Probe,
    fresh: FreshProcess,
    adapter_loss: float | None,
) -> tuple[Onto, Mapping[str, float], float | None, Check, Answers]:
    """The better way, each way's loss, the adapter's, how the better compares with base and adapter, its answers."""
    *others, likely = folders  # those that it was trained on

    def of_folders() -> tuple[Answers, dict[str, float]]:
        answers = fresh.ask(folders[likely], probe)
        losses: dict[str, float] = {way: fresh.loss(folders[way], probe) for way in others}
        return answers, losses | {likely: cast("float", answers.loss)}

    with ThreadPoolExecutor(1) as thread:
        asked = thread.submit(of_folders) if holds_two(base, fresh.device) else None
        trained = ask_adapted(base, wants_loss=adapter_loss is None)
        answers, losses = of_folders() if asked is None else asked.result()
    onto = min(folders, key=lambda way: losses[way])
    if onto != likely:
        answers = fresh.ask(folders[onto], probe)
    same = trained
    if base.quantization == "nf4" and onto == "original":
        same = ask_adapted(base.model_copy(update={"quantization": "none"}), wants_loss=False)
    texts = side_by_side(probe, trained, answers)
    check = Check(compare(answers, same), compare(answers, trained), texts)
    return onto, losses, trained.loss if adapter_loss is None else adapter_loss, check, answers


def _require_equal(check: Check, base: Base, dtype: str, device: torch.device) -> None:
    """Raise SweepError where base and adapter are further from the merged model than rounding explains."""
    from lora_search.model.precision import compute_dtype

    computed = str(compute_dtype(base.compute_dtype, device)).removeprefix("torch.")
    allowed = max(ROUNDING.get(name, ROUNDING["bfloat16"]) for name in (dtype, computed))
    if not check.same_weights.relative <= allowed:
        raise SweepError(
            "the merged model is not what base and adapter are together: over held-out rows its logits differ by "
            f"{check.same_weights.relative:.2%} of their standard deviation on average, where rounding explains "
            f"{allowed:.1%}; nothing was kept"
        )


@dataclass(frozen=True)
class _Verified:
    """A merged model that was loaded and asked, and whom to ask more."""

    fresh: FreshProcess
    probe: Probe
    answers: Answers


def _to_gguf(form: GgufForm, folder: Path, file: Path, verified: _Verified | None) -> Gguf:
    """Write a merged model as a GGUF file; where the model was verified, have that read by transformers, and compare.

    Raises:
        SweepError: the file is not what the folder is.
    """
    try:
        architecture = write_gguf(folder, form, file)
    except OSError as error:
        raise SweepError(f"{file.name} cannot be written: {error.strerror or error}; nothing was kept") from error
    if verified is None:
        return Gguf(file.name, architecture, form.vocabulary.name, None, 0, form.notes)
    read = verified.fresh.ask_gguf(file, folder, verified.probe)
    apart = compare(read, verified.answers)
    if not apart.relative <= GGUF_ROUNDING:
        raise SweepError(
            "the GGUF file is not the merged model: as transformers reads it, its logits differ by "
            f"{apart.relative:.2%} of their standard deviation on average, where rounding explains "
            f"{GGUF_ROUNDING:.2%}; nothing was kept"
        )
    if read.different is not None:
        raise SweepError(
            f"the GGUF file's tokenizer is not the model's: {read.rows - read.same} of {read.rows} validation rows "
            f"differ as transformers reads it, the first is {read.different['text']!r}: found "
            f"{read.different['found']}, and {read.different['expected']} from the folder; nothing was kept"
        )
    return Gguf(file.name, architecture, form.vocabulary.name, apart, read.rows, form.notes)
