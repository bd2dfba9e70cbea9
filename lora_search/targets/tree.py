"""A model's module tree, as far as LoRA can adapt it, read off the model itself rather than off a table of names.

What a module is for follows from where it stands: below an attention block, below a feed-forward block, or elsewhere.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from lora_search.builtin import model_folder
from lora_search.errors import InputError

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

Kind = Literal["linear", "conv1d", "experts"]
Role = Literal["attention", "mlp", "other"]

_ATTENTION = re.compile(r"attn|attention", re.IGNORECASE)
_MLP = re.compile(r"^(mlp|ffn?|feed_?forward|block_sparse_moe|moe|experts?|shared_(mlp|experts?))", re.IGNORECASE)
_MLP_LEAVES = re.compile(r"^(fc_?\d|fc_in|fc_out|linear_fc\d|w[123])$")
"""Feed-forward projections that stand in the decoder layer itself, as OPT's fc1 and fc2."""
_ROUTER = re.compile(r"^(gate|router|shared_expert_gate|router_gate|gate_network)$")
"""A router picks experts; it is trained with the base, and adapting it changes which experts see a token."""


@dataclass(frozen=True)
class LinearModule:
    """A weight that LoRA can adapt: of a linear module, or of all experts of a layer in one parameter."""

    name: str
    """The module's full name; for experts, the parameter's."""
    in_features: int
    out_features: int
    kind: Kind
    role: Role
    experts: int = 1

    @property
    def suffix(self) -> str:
        return self.name.rsplit(".", 1)[-1]

    def lora_parameters(self, rank: int) -> int:
        """Numbers in an adapter of this rank: A is (rank, in), B is (out, rank), for each expert."""
        return self.experts * rank * (self.in_features + self.out_features)


@dataclass(frozen=True)
class ModuleTree:
    """What of a model can be adapted, what cannot, and how large the model is."""

    architecture: str
    modules: tuple[LinearModule, ...]
    """In the model's own order; no output head, embedding or router among them."""
    head: str | None
    """Name of the output head, which is never adapted."""
    routers: tuple[str, ...]
    total_parameters: int


def skeleton(model: str, *, trust_remote_code: bool = False, revision: str | None = None) -> PreTrainedModel:
    """The causal language model on the meta device: its modules and shapes, built from the config alone.

    Args:
        model: a hub id, a folder or a config.json, or builtin:NAME.

    Raises:
        InputError: there is no such model, or it is no causal language model.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    if model.startswith("builtin:"):
        try:
            source = str(model_folder(model.removeprefix("builtin:")))
        except KeyError as error:
            raise InputError(f"MODEL: found {model!r}; {error.args[0]}") from None
    else:
        source = model
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise InputError(f"MODEL: {model} is a folder without a config.json")
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=trust_remote_code, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise InputError(f"MODEL: cannot read a configuration from {model!r}: {_first_line(error)}") from error
    try:
        with torch.device("meta"):
            built: PreTrainedModel = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except (ValueError, ImportError) as error:
        kind = getattr(config, "model_type", type(config).__name__)
        raise InputError(f"MODEL: {model!r} ({kind}) is no causal language model: {_first_line(error)}") from error
    return built


def module_tree(model: PreTrainedModel) -> ModuleTree:
    """Read the tree off a model, on whatever device, quantised or not, before adapters are put on it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    head = model.get_output_embeddings()
    head_name: str | None = None
    modules: list[LinearModule] = []
    routers: list[str] = []
    for name, module in model.named_modules():
        leaf = name.rsplit(".", 1)[-1]
        if head is not None and module is head:
            head_name = name
        elif isinstance(module, nn.Linear | Conv1D):
            if _ROUTER.match(leaf):
                routers.append(name)
                continue
            if isinstance(module, Conv1D):
                in_features, out_features = int(module.nx), int(module.nf)
            else:
                in_features, out_features = module.in_features, module.out_features
            kind: Kind = "conv1d" if isinstance(module, Conv1D) else "linear"
            modules.append(LinearModule(name, in_features, out_features, kind, _role(name)))
        else:
            modules += _experts(name, module)
    total = sum(_numel(parameter) for parameter in model.parameters())
    return ModuleTree(type(model).__name__, tuple(modules), head_name, tuple(routers), total)


def _experts(name: str, module: nn.Module) -> list[LinearModule]:
    """The fused weights of a layer's experts: parameters of (experts, ., .), as transformers 5 keeps them."""
    if "expert" not in name.lower():
        return []
    fused = []
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim != 3 or "bias" in key:
            continue
        experts, first, second = parameter.shape
        # (experts, out, in), or (experts, in, out) where the module says that it is transposed; the count is the same
        out_features, in_features = (second, first) if getattr(module, "is_transposed", False) else (first, second)
        fused.append(LinearModule(f"{name}.{key}", in_features, out_features, "experts", "mlp", experts))
    return fused


def _role(name: str) -> Role:
    parents = name.split(".")[:-1]
    for part in reversed(parents):  # the nearest block decides
        if _MLP.match(part):
            return "mlp"
        if _ATTENTION.search(part):
            return "attention"
    return "mlp" if _MLP_LEAVES.match(name.rsplit(".", 1)[-1]) else "other"


def _numel(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, a 4-bit one counted unpacked."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel()
    count = 1
    for size in state.shape:
        count *= int(size)
    return count


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
