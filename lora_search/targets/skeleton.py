"""A model without its weights: its modules and their shapes."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.builtin import model_folder
from lora_search.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def skeleton(model: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedModel:
    """The causal language model on the meta device, built from its configuration alone.

    Args:
        model: a hub id, a folder or a config.json, or builtin:NAME.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    return _build(model, _configuration(model, trust_remote_code, revision), trust_remote_code, revision)


def _configuration(model: str, trust_remote_code: bool, revision: str | None) -> PreTrainedConfig:
    from transformers import AutoConfig

    source = _source(model)
    try:
        return AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except Exception as error:  # besides its own, whatever an architecture's code raises for values it cannot take
        if not trust_remote_code and "custom code" in str(error):
            raise InputError(
                f"model: {model!r} runs code of its own, which base.trust_remote_code: true in a sweep file allows"
            ) from error
        raise InputError(f"model: cannot read a configuration from {model!r}: {_first_line(error)}") from error


def _source(model: str) -> str:
    """Where transformers reads the configuration; a path that is not there is said here, for it would ask the hub."""
    if model.startswith("builtin:"):
        try:
            return str(model_folder(model.removeprefix("builtin:")))
        except KeyError as error:
            raise InputError(f"model: found {model!r}; {error.args[0]}") from None
    path = Path(model)
    if path.is_dir() and not (path / "config.json").is_file():
        raise InputError(f"model: {model} is a folder without a config.json")
    if not path.exists() and (model.startswith(("/", ".", "~")) or len(path.parts) > 2):  # a hub id is owner/name
        raise InputError(f"model: there is no {model}")
    return model


def _build(model: str, config: PreTrainedConfig, trust_remote_code: bool, revision: str | None) -> PreTrainedModel:
    import torch
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoModelForCausalLM

    own_code = trust_remote_code and type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING
    options: dict[str, Any] = {"code_revision": revision} if own_code and revision else {}
    try:
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(
                config, trust_remote_code=trust_remote_code, **options
            )
    except Exception as error:  # as above, for dimensions that do not fit together
        kind = getattr(config, "model_type", "") or type(config).__name__
        if "Unrecognized configuration class" in str(error):
            raise InputError(f"model: {model!r} ({kind}) is no causal language model") from error
        raise InputError(f"model: cannot build {model!r} ({kind}): {_first_line(error)}") from error
    return built


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
