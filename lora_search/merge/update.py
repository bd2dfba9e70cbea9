"""What an adapter does to each parameter of its base, by PEFT's own resolution and PEFT's own merge, weight by weight.

PEFT puts the adapter onto a model that has the base's modules and shapes, but none of its numbers: each parameter is
one zero, seen at every place. Only what the adapter brings is really there.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from lora_search.errors import InputError, SweepError
from lora_search.merge.values import NotByShards

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHANGES_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga", "eva", "mica")
"""Initialisations for which PEFT changes the base, or may, when the adapter is loaded."""

ADAPTER = "default"
"""PEFT's name for the adapter that a model is loaded with."""


class Update:
    """An adapter, ready to be added to its base one parameter at a time."""

    def __init__(self, skeleton: PreTrainedModel, adapter: Path) -> None:
        """
        Args:
            skeleton: the base without its weights; is changed.
            adapter: a folder in PEFT's format.

        Raises:
            NotByShards: the adapter does what only a whole model shows.
            InputError: it cannot be merged at all, or does not fit the base.
        """
        from peft import PeftModel
        from peft.tuners.lora import LoraLayer
        from peft.tuners.lora.layer import Embedding, Linear, ParamWrapper
        from peft.tuners.tuners_utils import BaseTunerLayer

        config = adapter_config(adapter)
        _refuse(config, adapter)
        self.shapes = {name: tuple(p.shape) for name, p in skeleton.named_parameters(remove_duplicate=False)}
        zeros = _hollow(skeleton)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                model = PeftModel.from_pretrained(skeleton, str(adapter), low_cpu_mem_usage=True)
            except (ValueError, RuntimeError, KeyError) as error:
                raise InputError(f"{adapter}: the adapter does not fit its base: {_first_line(error)}") from None
        self._layers: dict[str, Any] = {}
        for name, module in model.base_model.model.named_modules():
            if not isinstance(module, BaseTunerLayer) or ADAPTER not in getattr(module, "scaling", {ADAPTER: 1}):
                continue
            if isinstance(module, ParamWrapper):
                parameter = f"{_plain(name)}.{module.parameter_name}"
            elif isinstance(module, Linear | Embedding):
                parameter = f"{_plain(name)}.weight"
            else:
                raise NotByShards(f"{name} is adapted as a {type(module).__name__}")
            if isinstance(module, LoraLayer) and any(getattr(module, "lora_bias", {}).values()):
                raise NotByShards("the adapter trains biases of its own (lora_bias)")
            self._layers[parameter] = module
        self.replaced: Mapping[str, torch.Tensor] = {
            _plain(name): parameter.detach()
            for name, parameter in model.base_model.model.named_parameters()
            if _is_there(parameter, zeros) and "lora_" not in name and _plain(name) in self.shapes
        }
        """Parameters that the adapter trained whole: biases, and modules_to_save."""

    @property
    def touched(self) -> frozenset[str]:
        """The names of all parameters that the adapter changes."""
        return frozenset(self._layers) | frozenset(self.replaced)

    @torch.no_grad()
    def apply(self, parameter: str, weight: torch.Tensor) -> torch.Tensor:
        """A parameter with the adapter in it, in float32.

        Args:
            weight: the parameter as it is in the base, in float32; may be changed.

        Raises:
            SweepError: the sum is not finite.
        """
        if parameter in self.replaced:  # as well as adapted, maybe: PEFT saves an adapted embedding's base with it
            weight = self.replaced[parameter].to(torch.float32, copy=True)
        layer = self._layers.get(parameter)
        if layer is None:
            return weight
        base = layer.get_base_layer()
        name = parameter.rpartition(".")[2]
        hollow = base._parameters[name]
        base._parameters[name] = nn.Parameter(weight, requires_grad=False)
        try:
            layer.merge(safe_merge=True, adapter_names=[ADAPTER])
            merged: torch.Tensor = base._parameters[name].data
        except ValueError as error:
            raise SweepError(f"{parameter}: {error}") from None
        finally:
            layer.merged_adapters.clear()
            base._parameters[name] = hollow
        return merged

    def experts(self, parameter: str) -> int | None:
        """How many matrices the parameter is made of; None where it is one matrix, or is replaced."""
        layer = self._layers.get(parameter)
        return len(layer.get_param()) if layer is not None and len(self.shapes[parameter]) == 3 else None

    @torch.no_grad()
    def of_expert(self, parameter: str, expert: int) -> torch.Tensor:
        """What is to be added to one matrix of a fused parameter, in float32, in its own orientation."""
        layer = self._layers[parameter]
        experts: int = layer.num_experts
        a_ERI = layer.lora_A[ADAPTER].weight.float()
        a_RI = a_ERI.reshape(experts, -1, a_ERI.shape[-1])[expert]
        b_ORE = layer.lora_B[ADAPTER].weight.float()
        b_OR = b_ORE.reshape(b_ORE.shape[0], -1, experts)[:, :, expert]
        update: torch.Tensor = (b_OR @ a_RI) * layer.scaling[ADAPTER]
        # (experts, in, out) where the module says so, else taken for (experts, out, in), as PEFT does
        return update.T if getattr(layer.get_base_layer(), "is_transposed", False) else update


def adapter_config(adapter: Path) -> dict[str, Any]:
    """An adapter's own configuration."""
    import json

    config: dict[str, Any] = json.loads((adapter / "adapter_config.json").read_text(encoding="utf-8"))
    return config


def _refuse(config: Mapping[str, Any], adapter: Path) -> None:
    if config.get("alora_invocation_tokens"):
        raise InputError(
            f"{adapter}: alora_invocation_tokens: the adapter acts from certain tokens on, which merged weights cannot"
        )
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(CHANGES_BASE):
        raise NotByShards(f"the adapter's initialisation ({start}) may change the base")
    for key in ("layer_replication", "trainable_token_indices", "megatron_config", "kasa_config", "velora_config"):
        if config.get(key):
            raise NotByShards(f"the adapter has {key}")


def _hollow(model: nn.Module) -> Mapping[int, torch.Tensor]:
    """Make every parameter one zero, seen at all places: its shape, on the CPU, in no memory. The zeros, by address."""
    made: dict[int, nn.Parameter] = {}
    zeros: dict[int, torch.Tensor] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                zero = torch.zeros(())
                zeros[zero.data_ptr()] = zero
                hollow = nn.Parameter(zero.expand(parameter.shape), requires_grad=False)
                module._parameters[name] = made.setdefault(id(parameter), hollow)
    return zeros


def _is_there(parameter: torch.Tensor, zeros: Mapping[int, torch.Tensor]) -> bool:
    """Whether a parameter has its numbers; one of a single number would have them, were it none of the zeros."""
    whole = parameter.untyped_storage().nbytes() >= parameter.numel() * parameter.element_size()
    return whole and parameter.data_ptr() not in zeros


def _plain(name: str) -> str:
    """The base's own name for what PEFT has wrapped."""
    parts = [part for part in name.split(".") if part not in ("base_layer", "original_module")]
    if "modules_to_save" in parts:
        start = parts.index("modules_to_save")
        del parts[start : start + 2]
    return ".".join(parts)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
