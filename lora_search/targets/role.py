"""What a module is for, read off its full name: where it stands, and what its projection is called.

No table of architectures: the names of blocks and projections have settled, and new architectures mostly keep to them.
"""

from __future__ import annotations

import re
from collections.abc import Set as AbstractSet
from typing import Literal

Role = Literal["attention", "mlp", "tower", "other"]
"""`tower` is what reads images or sound: text never passes through it, and gives it no gradient."""

_TOWER = re.compile(r"(^|_)(vision|visual|image|img|audio|speech|video|multi_?modal|mm)(_|$)", re.IGNORECASE)
_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"^(mlp|ffn?|feed_?forward|block_sparse_moe|moe|shared_(mlp|experts?))", re.IGNORECASE)

_ATTENTION_PROJECTIONS = frozenset({"q_proj", "k_proj", "v_proj"})
"""Together they are attention in a block of any name, as RecurrentGemma's temporal_block and Nemotron-H's mixer."""
_MLP_BLOCK = re.compile(r"^(experts?|intermediate|output)$")
"""Feed-forward where no attention is around it: BERT's `output` stands in both, and JetMoe's attention has experts."""
_MLP_PROJECTION = re.compile(
    r"^(fc_?\d|fc_in|fc_out|c_fc|linear_fc\d|w[123]|dense_h_to_4h|dense_4h_to_h|(gate|up|down|gate_up)_proj)$"
)
"""Feed-forward where they stand in the decoder layer itself, as OPT's fc1 and fc2."""

_QUERY_OR_VALUE = re.compile(r"^(w?(?=[kz]*[qv])[qkvz]+|query|queries|value|values)$")
_FUSED = frozenset({"c_attn", "in_proj", "w_pack", "att_proj"})
"""Query, key and value in one, under names that do not say so."""

_ROUTER = re.compile(r"^(router|router_gate|gate_network|shared_expert_gate|modality_router|indexer)$")


def role_of(name: str, siblings: AbstractSet[str]) -> Role:
    """What the weight of this full name is for; `siblings` are the last names in its block, its own among them."""
    *blocks, last = name.split(".")
    if any(map(_TOWER.search, (*blocks, last))):
        return "tower"
    for block in reversed(blocks):  # the nearest one decides
        if _MLP.match(block):
            return "mlp"
        if _ATTENTION.search(block):
            return "attention"
    if siblings >= _ATTENTION_PROJECTIONS:
        return "attention"
    return "mlp" if _MLP_PROJECTION.match(last) or any(map(_MLP_BLOCK.match, blocks)) else "other"


def is_query_or_value(name: str) -> bool:
    """Whether an attention projection gives queries or values, alone or fused with others.

    Where multi-head latent attention has two factors, the second does: of q_a_proj and q_b_proj, q_b_proj.
    """
    *blocks, last = name.lower().split(".")
    projection = blocks[-1] if last == "linear" and blocks else last
    words = projection.split("_")
    return projection in _FUSED or ("a" not in words and any(map(_QUERY_OR_VALUE.match, words)))


def is_router(name: str, siblings: AbstractSet[str]) -> bool:
    """Whether a module picks experts, or the tokens to attend to: adapting it changes which weights see a token."""
    last = name.rpartition(".")[2]
    return bool(_ROUTER.match(last)) or (last == "gate" and any("expert" in sibling for sibling in siblings))
