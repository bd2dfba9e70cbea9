"""How long a row may be, as a base has a table of positions or computes them; and whether rows decide of each other."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

from lora_search.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TABLE = re.compile(r"wpe|pos")
"""What architectures call their table of positions: wpe, embed_positions, position_embeddings, positions_embed."""

MARGIN = 8
"""Rows that a table may have beyond the positions its config states, as OPT's first two."""


def refuse_long_rows(model: PreTrainedModel, longest: int) -> str | None:
    """Hold the longest row, in tokens, against the base's positions.

    Args:
        model: with or without weights.

    Returns:
        advice, where the base computes positions (rotary, ALiBi) but was made for shorter rows.

    Raises:
        InputError: the base looks positions up in a table that ends before the row does.
    """
    last = table_length(model)
    if last is not None and longest > last:
        raise InputError(
            f"data.max_length: the longest row has {longest} tokens; allowed: at most {last}, for this base's table of "
            f"positions has no more. data.max_length: {last} cuts longer rows"
        )
    stated = _stated(model)
    if last is None and stated is not None and longest > stated:
        return (
            f"the longest row has {longest} tokens, and this base was made for {stated} (max_position_embeddings): "
            "what it makes of the rest is its guess; data.max_length cuts rows"
        )
    return None


def longest_decides(model: PreTrainedModel, longest: int) -> bool:
    """Whether the rows of a pass decide of each other what is made of them, so that trials cannot share it.

    So LongRoPE and dynamic NTK have it where a row is longer than the base was first trained for: the longest decides
    how all positions are turned (`dynamic_rope_update` in transformers' modeling_rope_utils.py). Llama 4 tempers its
    attention by a token's place in the pass, and DeepSeek V3.2 and its like look at `index_topk` tokens of it.

    Args:
        model: with or without weights.
        longest: tokens of the longest row.
    """
    text = model.config.get_text_config()
    most = getattr(text, "index_topk", None)
    if getattr(text, "attn_temperature_tuning", False) or (isinstance(most, int) and longest > most):
        return True
    found = getattr(text, "rope_parameters", None) or {}
    kinds = [of_layers for of_layers in found.values() if isinstance(of_layers, dict)] or [found]
    for rope in kinds:
        first = rope.get("original_max_position_embeddings") or _stated(model)
        if rope.get("rope_type") in ("longrope", "dynamic") and first is not None and longest > first:
            return True
    return False


def keeps_state(model: PreTrainedModel) -> bool:
    """Whether layers hand a state on from one token to the next, and so from one flat sequence to another.

    Mamba's and their like, gated delta rules and short convolutions all begin with a product over neighbouring tokens.
    DeepSeek V4's attention has one key for some neighbours together.
    """
    from torch import nn

    compressed = getattr(model.config.get_text_config(), "compress_rates", None)
    return bool(compressed) or any(isinstance(module, nn.Conv1d) for module in model.modules())


def table_length(model: PreTrainedModel) -> int | None:
    """Positions in the model's table, learned or laid out beforehand; None where positions are computed as needed."""
    from torch import nn

    stated = _stated(model)
    if stated is None:
        return None
    for name, module in model.named_modules():
        named = TABLE.search(name.rpartition(".")[2])
        if isinstance(module, nn.Embedding) and named and stated <= module.num_embeddings <= stated + MARGIN:
            before = module.padding_idx + 1 if module.padding_idx is not None else int(getattr(module, "offset", 0))
            return module.num_embeddings - before
    for name, buffer in model.named_buffers():  # GPT-J's and CodeGen's sines
        if TABLE.search(name.rpartition(".")[2]) and buffer.dim() == 2 and buffer.shape[0] == stated:
            return stated
    return None


def _stated(model: PreTrainedModel) -> int | None:
    """What the config says; a base of text and pictures says it of its text."""
    found = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return found if isinstance(found, int) and found > 0 else None
