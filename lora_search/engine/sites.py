"""Puts the engine's layers into a base, and tells them which of them read the same input."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from torch import nn

from lora_search.engine.adapter import Places
from lora_search.engine.gated import attach_gated
from lora_search.engine.layers import DropoutSite, LinearSite
from lora_search.engine.norms import NormSite
from lora_search.engine.rotary import attach_rotary, forget_longest
from lora_search.memory.values import KEPT_DENSE_BYTES
from lora_search.model import FrozenBase
from lora_search.targets import ModuleTree


def attach_sites(base: FrozenBase, tree: ModuleTree) -> dict[str, LinearSite]:
    """Have packs run through every linear layer of the base, and what else is ours; the linear layers by name."""
    sites: dict[str, LinearSite] = {}
    for place, module in enumerate(tree.modules):
        if module.kind != "experts":
            sites[module.name] = LinearSite(place, base.model.get_submodule(module.name), base)
            sites[module.name].attach()
    if base.device.type == "cpu" and sum(site.dense_bytes for site in sites.values()) <= KEPT_DENSE_BYTES:
        for site in sites.values():
            site.keeps_dense = site.dense_bytes > 0
    if base.device.type == "cpu":
        for module in filter(NormSite.is_for, base.model.modules()):
            NormSite(module).attach()
        attach_rotary(base.model)
        attach_gated(base.model, sites)
    forget_longest(base.model)
    dropouts = [module for module in base.model.modules() if isinstance(module, nn.Dropout) and module.p > 0]
    for index, dropout in enumerate(dropouts):
        DropoutSite(len(tree.modules) + index, dropout).attach()
    return sites


def introduce_siblings(sites: Collection[LinearSite], groups: Sequence[Places]) -> list[Places]:
    """Tell every linear layer which others read its input; all layers, in groups.

    Args:
        groups: those that have been seen to run, in that order.
    """
    by_place = {site.place: site for site in sites}
    for group in groups:
        for place in group:
            by_place[place].siblings = group
    unseen = by_place.keys() - {place for group in groups for place in group}
    return [*groups, *((place,) for place in sorted(unseen))]
