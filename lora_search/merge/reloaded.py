"""A saved model as anybody loads it: runs as a script of its own, with torch and transformers, and nothing of ours.

What it measures is measured on the base with its adapter by the same functions. They know arrays and models alone.

Legend: B rows, T positions, M target tokens, V vocabulary.
"""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch.nn import functional as F

Row = tuple[list[int], list[bool]]
"""Tokens, and which of them are targets."""

MAX_TOKENS = 8192
LOGITS_BYTES = 1 << 30
"""A batch has no more tokens, and no more bytes of float32 logits."""


@torch.no_grad()
def loss_of(model: Any, rows: Sequence[Row], pad: int) -> float:
    """Nats a target token over all rows."""
    model.eval()
    vocabulary = model.get_output_embeddings().weight.shape[0]
    loss, targets = 0.0, 0
    for some in _batches(rows, min(MAX_TOKENS, max(1, LOGITS_BYTES // (4 * vocabulary)))):
        longest = max(len(tokens) for tokens, _ in some)
        ids_BT = torch.tensor([tokens + [pad] * (longest - len(tokens)) for tokens, _ in some], device=model.device)
        trained_BT = torch.tensor([marks + [False] * (longest - len(marks)) for _, marks in some], device=model.device)
        lengths = torch.tensor([len(tokens) for tokens, _ in some], device=model.device)
        attention_BT = (torch.arange(longest, device=model.device) < lengths[:, None]).long()
        logits_BTV = model(input_ids=ids_BT, attention_mask=attention_BT, use_cache=False).logits
        counted_BT = trained_BT[:, 1:]
        logits_MV = logits_BTV[:, :-1][counted_BT].float()
        loss += float(F.cross_entropy(logits_MV, ids_BT[:, 1:][counted_BT], reduction="sum"))
        targets += len(logits_MV)
    return loss / targets


@torch.no_grad()
def logits_of(model: Any, rows: Sequence[Row]) -> np.ndarray[Any, np.dtype[np.float32]]:
    """Float32 logits for the rows' target tokens, row by row without padding: shape (M, V)."""
    model.eval()
    found = [] if rows else [torch.zeros(0, 1)]
    for tokens, marks in rows:
        logits_TV = model(input_ids=torch.tensor([tokens], device=model.device), use_cache=False).logits[0, :-1]
        found.append(logits_TV[torch.tensor(marks[1:], device=model.device)].float().cpu())
    return torch.cat(found).numpy()


@torch.no_grad()
def greedy(model: Any, prompts: Sequence[Sequence[int]], new: int, pad: int) -> list[list[int]]:
    """The most probable tokens after each prompt, one by one."""
    model.eval()
    answers = []
    for prompt in prompts:
        ids = torch.tensor([list(prompt)], device=model.device)
        made = model.generate(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new,
            do_sample=False,
            num_beams=1,
            use_cache=True,
            pad_token_id=pad,
        )
        answers.append(made[0, len(prompt) :].tolist())
    return answers


def _batches(rows: Sequence[Row], max_tokens: int) -> Iterator[list[Row]]:
    """Rows of like length together."""
    batch: list[Row] = []
    for row in sorted(rows, key=lambda row: len(row[0]), reverse=True):
        if batch and len(batch[0][0]) * (len(batch) + 1) > max_tokens:
            yield batch
            batch = []
        batch.append(row)
    if batch:
        yield batch


def main() -> None:
    """Answer requests, a line of JSON each, until there are no more; what libraries print goes to standard error."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for absent in ("peft", "bitsandbytes", "lora_search"):
        sys.modules[absent] = None  # type: ignore[assignment]
    _import_while_others_work()
    for line in sys.stdin:
        asked = json.loads(line)
        torch.set_num_threads(asked["threads"])
        with open(asked["rows"], encoding="utf-8") as file:  # noqa: PTH123 - nothing else is imported for it
            given = json.load(file)
        answer = _of_folder(asked, given) if asked["gguf"] is None else _of_gguf(asked, given)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if asked["device"] != "cpu":
            torch.cuda.empty_cache()


def _import_while_others_work() -> None:
    gc.disable()  # it would find nothing, again and again
    from transformers import AutoModelForCausalLM, AutoTokenizer, modeling_utils  # noqa: F401

    gc.freeze()
    gc.enable()


def _of_folder(asked: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    options = {"trust_remote_code": asked["trust_remote_code"]}
    model = AutoModelForCausalLM.from_pretrained(asked["folder"], dtype=_dtype(asked), **options).to(asked["device"])
    tokenizer = AutoTokenizer.from_pretrained(asked["folder"], **options)
    np.save(asked["logits"], logits_of(model, given["compared"]))
    made = greedy(model, given["prompts"], given["new_tokens"], given["pad"])
    loss = loss_of(model, given["validation"], given["pad"])
    return {"loss": loss, "texts": [tokenizer.decode(tokens, skip_special_tokens=True) for tokens in made]}


def _of_gguf(asked: dict[str, Any], given: dict[str, Any]) -> dict[str, Any]:
    """A GGUF file as transformers reads it; what it does not read of such a file is taken from the model's folder."""
    from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedConfig

    folder, file = os.path.split(asked["gguf"])
    read, _ = PreTrainedConfig.get_config_dict(folder, gguf_file=file)
    known = AutoConfig.from_pretrained(asked["folder"])
    values = {key: value for key, value in known.to_dict().items() if key not in ("model_type", "architectures")}
    if "rope_theta" in read:
        values["rope_parameters"] = values["rope_parameters"] | {"rope_theta": read.pop("rope_theta")}
    config = CONFIG_MAPPING[read.pop("model_type")](**(values | read))
    dtype = _dtype(asked) if asked["device"] == "cpu" else known.dtype
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, config=config, dtype=dtype)
    np.save(asked["logits"], logits_of(model.to(asked["device"]), given["compared"]))
    return _tokenizers(asked["folder"], folder, file, [tokens for tokens, _ in given["validation"]])


def _tokenizers(model: str, folder: str, file: str, rows: Sequence[list[int]]) -> dict[str, Any]:
    """On how many rows a GGUF file's tokenizer agrees with the model's folder, and the first on which it does not.

    A GGUF file names the way in which text is split, and transformers does not know all names: that step is taken from
    the folder.
    """
    from tokenizers import Tokenizer
    from transformers import AutoTokenizer

    kept = AutoTokenizer.from_pretrained(model)
    here = json.loads(kept.backend_tokenizer.to_str())
    there = json.loads(AutoTokenizer.from_pretrained(folder, gguf_file=file).backend_tokenizer.to_str())
    there |= {part: here[part] for part in ("normalizer", "pre_tokenizer")}
    there["model"]["ignore_merges"] = here["model"]["ignore_merges"]
    read = Tokenizer.from_str(json.dumps(there))
    different = None
    same = 0
    for row in rows:
        text = kept.decode(row)
        found, expected = read.encode(text).ids, kept.backend_tokenizer.encode(text).ids
        same += found == expected
        if found != expected and different is None:
            different = {"text": text, "found": found, "expected": expected}
    return {"rows": len(rows), "same": same, "different": different}


def _dtype(asked: dict[str, Any]) -> Any:
    """Of the model as it runs: few CPUs multiply anything but float32 well."""
    return torch.float32 if asked["device"] == "cpu" else "auto"


if __name__ == "__main__":
    main()
