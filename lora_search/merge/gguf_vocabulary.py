"""A tokenizer as GGUF holds it, taken from what it does and from its own description.

llama.cpp has two tokenizers that matter here. `gpt2` is byte-level BPE; how text is split before merging is known to it
by a name, which is found from the tokenizer's own description, or the tokenizer is refused. `llama` is SentencePiece's:
of all neighbours that make a token, those that make the one of the highest score are merged first.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from lora_search.errors import InputError

if TYPE_CHECKING:
    from gguf import GGUFWriter
    from transformers import PreTrainedTokenizerBase

SPACE = "\N{LOWER ONE EIGHTH BLOCK}"
"""How SentencePiece writes a space."""

BYTE = re.compile(r"<0x[0-9A-F]{2}>")

LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

TEKKEN = (
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
    r"|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

SPLITS: Mapping[tuple[object, ...], tuple[str, bool]] = {
    ("byte level, GPT-2's words",): ("gpt-2", False),
    ("each digit", "byte level, GPT-2's words"): ("smollm", False),
    (LLAMA3, "byte level"): ("llama-bpe", True),
    (LLAMA3.replace("{1,3}", ""), "byte level"): ("qwen2", False),
    (TEKKEN, "byte level"): ("tekken", True),
}
"""llama.cpp's name of a way to split text, and whether it looks a whole word up before it merges, by the steps."""

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE_TOKEN = 1, 2, 3, 4, 5, 6
"""GGUF's kinds of tokens."""


@dataclass(frozen=True)
class Vocabulary:
    """What GGUF says of a tokenizer."""

    model: Literal["gpt2", "llama"]
    split: str
    """How text is split before it is merged, by llama.cpp's name."""
    tokens: Sequence[str]
    kinds: Sequence[int]
    merges: Sequence[str]
    """Of `gpt2`."""
    scores: Sequence[float]
    """Of `llama`."""
    special: Mapping[str, int]
    """Ids by what they are for: bos, eos, unk, pad."""
    adds: Mapping[str, bool]
    """Whether bos and eos are put around a text, and, of `llama`, a space before it."""
    chat_template: str | None
    notes: Sequence[str]
    """Where llama.cpp gives other tokens than the model's own tokenizer."""

    @property
    def name(self) -> str:
        return self.split if self.model == "gpt2" else "SentencePiece"

    def add_to(self, writer: GGUFWriter) -> None:
        """Write it, by GGUF's keys."""
        writer.add_tokenizer_model(self.model)
        writer.add_tokenizer_pre(self.split)
        writer.add_token_list(self.tokens)
        writer.add_token_types(self.kinds)
        writer.add_token_scores(self.scores)  # nothing is written of what is empty
        writer.add_token_merges(self.merges)
        for role, token in self.special.items():
            getattr(writer, f"add_{role}_token_id")(token)
        writer.add_add_bos_token(self.adds["bos"])
        writer.add_add_eos_token(self.adds["eos"])
        if "space" in self.adds:
            writer.add_add_space_prefix(self.adds["space"])
        if self.chat_template is not None:
            writer.add_chat_template(self.chat_template)


def gguf_vocabulary(tokenizer: PreTrainedTokenizerBase, size: int) -> Vocabulary:
    """What GGUF says of a tokenizer.

    Args:
        size: rows of the model's embedding; those without a token are named as unused.

    Raises:
        InputError: llama.cpp would tokenise otherwise.
    """
    described = _described(tokenizer)
    tokens, kinds = _tokens(described, size)
    special = {
        role: found
        for role in ("bos", "eos", "unk", "pad")
        if (found := getattr(tokenizer, f"{role}_token_id")) is not None
    }
    if special.get("pad") == special.get("eos"):
        special.pop("pad", None)  # it stands in where there is none
    adds = _around(tokenizer)
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    model, notes = described["model"], _notes(described)
    if not model.get("byte_fallback"):
        split = _split(described)
        merges = [" ".join(_pair(merge)) for merge in model["merges"]]
        return Vocabulary("gpt2", split, tokens, kinds, merges, (), special, adds, template, notes)
    adds = adds | {"space": _prefixes_space(described)}
    scores = _scores(model, tokens, kinds)
    for token, kind in enumerate(kinds):
        if kind == NORMAL and BYTE.fullmatch(tokens[token]):
            kinds[token] = BYTE_TOKEN
        elif kind == USER_DEFINED:
            tokens[token] = tokens[token].replace(SPACE, " ")  # looked for in the text as it is
    if (unknown := special.get("unk")) is not None:
        kinds[unknown] = UNKNOWN
    if kinds.count(BYTE_TOKEN) != 256:
        raise _refused(f"found tokens for {kinds.count(BYTE_TOKEN)} bytes; llama.cpp needs one for each of the 256")
    return Vocabulary("llama", "default", tokens, kinds, (), scores, special, adds, template, notes)


def _notes(described: Mapping[str, Any]) -> Sequence[str]:
    notes = []
    if described["normalizer"] == {"type": "NFC"}:
        notes.append(
            "the tokenizer composes accents first (NFC) and llama.cpp does not: a letter and an accent written as two "
            "characters give other tokens there"
        )
    splits = _parts(described["pre_tokenizer"], "pretokenizers")
    if any(step["type"] == "Metaspace" and step["prepend_scheme"] != "never" for step in splits):
        notes.append(
            "llama.cpp puts a space before a text that begins with one, and after every special token, where the "
            "tokenizer does not"
        )
    return notes


def _refused(why: str) -> InputError:
    return InputError(f"--gguf: the tokenizer cannot be expressed: {why}")


def _described(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The tokenizer as the tokenizers library describes it, if it is BPE."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise _refused("it has no tokenizer.json")
    described: dict[str, Any] = json.loads(backend.to_str())
    model = described["model"]
    if model["type"] != "BPE":
        raise _refused(f"found a model of type {model['type']}; allowed: BPE")
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"):
        if model.get(key):
            raise _refused(f"found {key}: {model[key]!r}; llama.cpp has none")
    for added in described["added_tokens"]:
        for key in ("lstrip", "rstrip", "single_word"):
            if added[key]:
                raise _refused(f"the token {added['content']!r} says {key}, which llama.cpp has not")
    return described


def _tokens(described: Mapping[str, Any], size: int) -> tuple[list[str], list[int]]:
    """Each token and its kind, by id."""
    tokens = [f"[PAD{number}]" for number in range(size)]
    kinds = [UNUSED] * size
    known = [(token, text, NORMAL) for text, token in described["model"]["vocab"].items()]
    known += [
        (added["id"], added["content"], CONTROL if added["special"] else USER_DEFINED)
        for added in described["added_tokens"]
    ]
    for token, text, kind in known:
        if token >= size:
            raise _refused(f"found {text!r} with the id {token}; the model's embedding has {size} rows")
        tokens[token], kinds[token] = text, kind
    return tokens, kinds


def _around(tokenizer: PreTrainedTokenizerBase) -> dict[str, bool]:
    """Whether the tokenizer puts its bos and eos tokens around a text: seen from what it does."""
    bare = tokenizer("a", add_special_tokens=False)["input_ids"]
    whole = tokenizer("a")["input_ids"]
    for bos in (False, True):
        for eos in (False, True):
            if whole == [tokenizer.bos_token_id] * bos + bare + [tokenizer.eos_token_id] * eos:
                return {"bos": bos, "eos": eos}
    raise _refused(f"it puts around a text what is neither its bos nor its eos token: {whole} of {bare}")


def _pair(merge: str | Sequence[str]) -> tuple[str, str]:
    """A merge, which older files write as one string."""
    left, right = merge.split(" ") if isinstance(merge, str) else merge
    return left, right


def _split(described: Mapping[str, Any]) -> str:
    """llama.cpp's name of how text is split before it is merged."""
    normalizer = described["normalizer"]
    if normalizer is not None and normalizer["type"] != "NFC":  # which llama.cpp leaves to the user
        raise _refused(f"found the normalizer {normalizer['type']}; allowed: none, NFC")
    steps = tuple(map(_step, _parts(described["pre_tokenizer"], "pretokenizers")))
    looks_up = bool(described["model"].get("ignore_merges"))
    name, expected = SPLITS.get(steps, ("", looks_up))
    if not name or looks_up != expected:
        allowed = ", ".join(name for name, _ in SPLITS.values())
        shown = "; ".join(map(str, steps)) or "nothing"
        whole = " and whole words looked up first" if looks_up else ""
        raise _refused(f"text is split by {shown}{whole}; allowed are the ways of {allowed}")
    return name


def _parts(step: Mapping[str, Any] | None, key: str) -> list[Mapping[str, Any]]:
    """The steps of a sequence, or the one step that there is."""
    if step is None:
        return []
    return list(step[key]) if step["type"] == "Sequence" else [step]


def _step(step: Mapping[str, Any]) -> object:
    """What a step does, as SPLITS spells it; what it does not know is given as it is."""
    match step:
        case {"type": "ByteLevel", "add_prefix_space": False, "use_regex": bool(words)}:
            return "byte level, GPT-2's words" if words else "byte level"
        case {"type": "Digits", "individual_digits": True}:
            return "each digit"
        case {"type": "Split", "pattern": {"Regex": str(pattern)}, "behavior": "Isolated", "invert": False}:
            return pattern
    return json.dumps(dict(step), ensure_ascii=False)


def _prefixes_space(described: Mapping[str, Any]) -> bool:
    """Whether a space is put before a text, where spaces are written as SentencePiece does."""
    replaced = {"type": "Replace", "pattern": {"String": " "}, "content": SPACE}
    normalizers = _parts(described["normalizer"], "normalizers")
    splits = _parts(described["pre_tokenizer"], "pretokenizers")
    at_spaces = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
    if normalizers == [{"type": "Prepend", "prepend": SPACE}, replaced] and not splits:
        return True
    if normalizers == [replaced] and splits in ([], [at_spaces]):  # no space is left to split at
        return False
    match normalizers, splits:
        case [], [{"type": "Metaspace", "replacement": character, "prepend_scheme": scheme, "split": False}]:
            if character == SPACE and scheme in ("always", "first", "never"):
                return bool(scheme != "never")
    raise _refused("its normalizer and pre-tokenizer are not SentencePiece's")


def _scores(model: Mapping[str, Any], tokens: Sequence[str], kinds: Sequence[int]) -> list[float]:
    """A score for each token, by which SentencePiece's rule merges as this list of merges does.

    Raises:
        InputError: there are none: two neighbours that make a token are not among the merges, or a token's merges do
            not follow each other.
    """
    rank: dict[str, int] = {}
    last = ""
    pairs = [_pair(merge) for merge in model["merges"]]
    for number, (left, right) in enumerate(pairs):
        made = left + right
        if made in rank and made != last:
            raise _refused(f"its merges are not SentencePiece's: those to {made!r} do not follow each other")
        rank.setdefault(made, number)
        last = made
    merged = set(pairs)
    plain = {text for text, kind in zip(tokens, kinds, strict=True) if kind == NORMAL and not BYTE.fullmatch(text)}
    for text in plain:
        for middle in range(1, len(text)):
            pair = (text[:middle], text[middle:])
            if pair[0] in plain and pair[1] in plain and pair not in merged:
                raise _refused(f"its merges are not SentencePiece's: {pair[0]!r} and {pair[1]!r} are not merged")
    return [-float(rank.get(text, len(rank))) for text in tokens]
