"""A model's module tree, as far as LoRA can adapt it, read off the model itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

from lora_search.targets.peft_limits import refused_names
from lora_search.targets.role import Role, is_router, role_of

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedConfig, PreTrainedModel

PICKED = ("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k", "moe_top_k")
"""What configurations call the number of experts that a token is sent to: Mixtral and most; JetMoe, Gemma 4, Hunyuan,
Ernie 4.5, DBRX."""

Kind = Literal["linear", "conv1d", "experts"]


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
    def last(self) -> str:
        return self.name.rpartition(".")[2]

    @property
    def suffix(self) -> str:
        """The end of the name that says what it is."""
        return ".".join(self.name.split(".")[-2:]) if self.last in ("weight", "linear") else self.last

    @property
    def shape(self) -> str:
        """Out x in, or experts x out x in."""
        return f"{self.experts}x" * (self.kind == "experts") + f"{self.out_features}x{self.in_features}"

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
    refused: tuple[LinearModule, ...]
    """Linear modules that PEFT does not adapt in this architecture, or that are linear in name alone."""
    total_parameters: int


def module_tree(model: PreTrainedModel) -> ModuleTree:
    """Read the tree off a model, on whatever device, quantised or not, before adapters are put on it."""
    children = _children(model)
    head = model.get_output_embeddings()
    head_name: str | None = None
    router: str | None = None
    routers: list[str] = []
    found: list[LinearModule] = []
    apart: list[LinearModule] = []
    for name, module in model.named_modules():
        siblings = children[name.rpartition(".")[0]]
        if head is not None and module is head:
            head_name = name
        elif router is not None and name.startswith(f"{router}."):
            continue
        elif is_router(name, siblings):
            router = name
            routers.append(name)
        else:
            (found if _multiplies(module) else apart).extend(_weights(name, module, siblings))
    refused = refused_names(model, {module.last for module in found if module.kind != "experts"})
    return ModuleTree(
        architecture=type(model).__name__,
        modules=tuple(module for module in found if module.kind == "experts" or module.last not in refused),
        head=head_name,
        routers=tuple(routers),
        refused=(*apart, *(module for module in found if module.kind != "experts" and module.last in refused)),
        total_parameters=sum(_numel(parameter) for parameter in model.parameters()),
    )


def experts_per_token(config: PreTrainedConfig) -> int:
    """How many of a layer's experts a token is sent to; 1 where there are none. Where layers differ, the most."""
    text = config.get_text_config()
    for holder in (text, getattr(text, "ffn_config", None)):
        for name in PICKED:
            found = getattr(holder, name, None)
            if found:
                return max(found) if isinstance(found, list | tuple) else int(found)
    return 1


def _children(model: nn.Module) -> Mapping[str, AbstractSet[str]]:
    """By the full name of each module, the last names of those directly in it."""
    children: defaultdict[str, set[str]] = defaultdict(set)
    for name, _ in model.named_modules():
        block, _, last = name.rpartition(".")
        children[block].add(last)
    return children


def _weights(name: str, module: nn.Module, siblings: AbstractSet[str]) -> list[LinearModule]:
    """What LoRA adapts in this module, not below it."""
    from torch import nn
    from transformers.pytorch_utils import Conv1D

    if isinstance(module, nn.Linear):
        return [LinearModule(name, module.in_features, module.out_features, "linear", role_of(name, siblings))]
    if isinstance(module, Conv1D):
        return [LinearModule(name, int(module.nx), int(module.nf), "conv1d", role_of(name, siblings))]
    return _experts(name, module)


def _multiplies(module: nn.Module) -> bool:
    """Whether a linear layer makes all its out-features of all it is given: not so DeepSeek V4's grouped ones."""
    from torch import nn

    weight = getattr(module, "weight", None)
    if type(module).forward is nn.Linear.forward or not isinstance(module, nn.Linear) or hasattr(weight, "quant_state"):
        return True
    try:
        made = module.forward(module.weight.new_zeros(1, 3, module.in_features))
    except (RuntimeError, ValueError, TypeError):
        return False
    return made.shape == (1, 3, module.out_features)


def _experts(name: str, module: nn.Module) -> list[LinearModule]:
    """The fused weights of a layer's experts: parameters of three dimensions, as transformers 5 keeps them."""
    if "expert" not in name.lower() and "expert" not in type(module).__name__.lower():
        return []
    fused = []
    for key, parameter in module.named_parameters(recurse=False):
        if parameter.ndim != 3 or "bias" in key:
            continue
        experts, first, second = parameter.shape
        # (experts, out, in), or (experts, in, out) where the module says so. Llama 4 has the latter and does not say
        # so: PEFT then takes one for the other, and so do we; the sum of the two is the same.
        out_features, in_features = (second, first) if getattr(module, "is_transposed", False) else (first, second)
        full = f"{name}.{key}"
        fused.append(LinearModule(full, in_features, out_features, "experts", role_of(full, frozenset()), experts))
    return fused


def _numel(parameter: nn.Parameter) -> int:
    """Numbers in a parameter, a 4-bit one counted unpacked."""
    state = getattr(parameter, "quant_state", None)
    if state is None:
        return parameter.numel()
    count = 1
    for size in state.shape:
        count *= int(size)
    return count
