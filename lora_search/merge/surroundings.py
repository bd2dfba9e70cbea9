"""What stands beside the weights in a model folder: configuration, generation config, tokenizer and chat template."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.errors import InputError
from lora_search.model.load import model_path
from lora_search.spec import Base

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PATTERNS = ("*.json", "*.safetensors", "*.model", "*.jinja", "*.txt", "*.py")
"""Files of a hub's model that are looked at."""


def base_folder(base: Base) -> Path:
    """The folder of a base's files; of a hub's model, the one in the cache, where training has put it.

    Raises:
        InputError: there is none, and the hub has none.
    """
    source = model_path(base.model)
    if Path(source).is_dir():
        return Path(source)
    from huggingface_hub import snapshot_download

    try:
        return Path(snapshot_download(source, revision=base.revision, allow_patterns=list(PATTERNS)))
    except (OSError, ValueError) as error:
        raise InputError(f"base.model: cannot get the files of {base.model!r}: {error}") from None


def read_config(folder: Path) -> dict[str, Any]:
    """A model's config.json.

    Raises:
        InputError: it is none, or says that the weights are quantised as they are published.
    """
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        quantised = config.get("quantization_config")
    except (OSError, ValueError, AttributeError) as error:
        raise InputError(f"base.model: {folder / 'config.json'} cannot be read: {error}") from None
    if quantised:
        method = quantised.get("quant_method", "some way") if isinstance(quantised, dict) else "some way"
        raise InputError(
            f"base.model: {folder} is published quantised ({method}); merging needs the full-precision weights"
        )
    return config


def write_config(config: dict[str, Any], out: Path, *, dtype: str | None, untied: bool) -> None:
    """The base's configuration, as far as it holds for the merged model.

    Args:
        dtype: of the weights, where it is not the base's.
        untied: the output head has numbers of its own, which it had not in the base.
    """
    merged = config | {"use_cache": True}
    if dtype is not None:
        merged.pop("torch_dtype", None)  # what it was called before transformers 5
        merged["dtype"] = dtype
    if untied:
        merged["tie_word_embeddings"] = False
    (out / "config.json").write_text(json.dumps(merged, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def write_surroundings(base: Base, tokenizer: PreTrainedTokenizerBase, out: Path) -> None:
    """Generation config, tokenizer and chat template."""
    from transformers import AutoConfig, GenerationConfig

    source = model_path(base.model)
    try:
        generation = GenerationConfig.from_pretrained(source, revision=base.revision)
    except OSError:  # the base has none
        config = AutoConfig.from_pretrained(source, revision=base.revision, trust_remote_code=base.trust_remote_code)
        generation = GenerationConfig.from_model_config(config)
    generation.use_cache = True
    try:
        generation.save_pretrained(str(out))
    except ValueError:  # values that transformers loads, but does not save
        (out / "generation_config.json").write_text(generation.to_json_string(), encoding="utf-8")
    tokenizer.save_pretrained(str(out))
