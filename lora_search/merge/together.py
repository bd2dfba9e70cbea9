"""Several adapters combined into one, by PEFT's own methods, and kept only where that is better than each alone."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from lora_search.checkpoint import require_lora
from lora_search.data import TokenizedData
from lora_search.engine import evaluate
from lora_search.errors import InputError
from lora_search.merge.update import adapter_config
from lora_search.model import load_base
from lora_search.spec import Base

if TYPE_CHECKING:
    from peft import PeftModel

EQUAL_RANKS = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
"""Methods that work on A and B of each adapter, one by one: all must be of one rank."""

ANY_RANKS = ("cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd")
"""`cat` is the weighted sum itself, in the sum of the ranks; the others bring a sum back to the largest rank."""

METHODS = (*EQUAL_RANKS, *ANY_RANKS)

SEED = 0
"""DARE drops at random."""


@dataclass(frozen=True)
class Recipe:
    """How adapters are combined."""

    weights: Sequence[float] | None = None
    """One for each adapter; None for equal ones that sum to 1."""
    methods: Sequence[str] | None = None
    """Each is tried; None for `cat` and one of each kind that the ranks allow."""
    density: float = 0.5
    """Share of the numbers that TIES, DARE and pruning keep."""


@dataclass(frozen=True)
class Together:
    """What came of it."""

    folder: Path
    """The adapter to merge: the combination, or where none was better, the best of the adapters."""
    name: str
    """The method, or `trial N`."""
    loss: float
    """Of that adapter, nats a token on the validation split."""
    losses: Mapping[str, float]
    """Of all that was measured, by method and by `trial N`."""
    combined: bool


def combine(
    base: Base,
    adapters: Mapping[int, Path],
    recipe: Recipe,
    data: TokenizedData,
    out: Path,
    device: torch.device,
) -> Together:
    """Measure each adapter and each combination on the base they were trained on; the best, in PEFT's format.

    Args:
        adapters: folders in PEFT's format, by trial; at least two.
        out: a folder for a combination's adapter.

    Raises:
        InputError: PEFT cannot combine these adapters in this way.
    """
    from peft import PeftModel

    for folder in adapters.values():
        require_lora(folder)
    weights = _weights(recipe, len(adapters))
    methods = _methods(recipe, adapters)
    loaded = load_base(base, device)
    names = {trial: f"trial_{trial}" for trial in adapters}
    first, *others = adapters
    model = PeftModel.from_pretrained(loaded.model, str(adapters[first]), adapter_name=names[first])
    losses: dict[str, float] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for trial in others:
            model.load_adapter(str(adapters[trial]), adapter_name=names[trial])
        for trial in adapters:
            model.set_adapter(names[trial])
            losses[f"trial {trial}"] = evaluate(loaded, data.validation, data.pad_token_id).loss
        for method in methods:
            _add(model, list(names.values()), weights, method, recipe.density)
            losses[method] = evaluate(loaded, data.validation, data.pad_token_id).loss
    alone = min(adapters, key=lambda trial: losses[f"trial {trial}"])
    method = min(methods, key=lambda method: losses[method])
    combined = losses[method] < losses[f"trial {alone}"]
    if combined:
        model.save_pretrained(str(out), selected_adapters=[method])
    del model, loaded
    gc.collect()
    if combined:
        return Together(out / method, method, losses[method], losses, True)
    return Together(adapters[alone], f"trial {alone}", losses[f"trial {alone}"], losses, False)


def _weights(recipe: Recipe, count: int) -> list[float]:
    if recipe.weights is None:
        return [1 / count] * count
    if len(recipe.weights) != count:
        raise InputError(f"--weights: found {len(recipe.weights)}, for {count} trials; give one for each")
    return list(recipe.weights)


def _methods(recipe: Recipe, adapters: Mapping[int, Path]) -> list[str]:
    ranks = {trial: _rank(adapter_config(folder)) for trial, folder in adapters.items()}
    equal = len(set(ranks.values())) == 1
    if recipe.methods is None:
        return ["cat", "linear", "ties", "dare_linear"] if equal else ["cat", "svd", "ties_svd", "dare_linear_svd"]
    for method in recipe.methods:
        if method not in METHODS:
            raise InputError(f"--combine: found {method!r}; allowed: {', '.join(METHODS)}")
        if method in EQUAL_RANKS and not equal:
            found = ", ".join(f"{rank} of trial {trial}" for trial, rank in ranks.items())
            raise InputError(
                f"--combine {method}: needs adapters of one rank; found {found}; of any ranks: {', '.join(ANY_RANKS)}"
            )
    return list(recipe.methods)


def _rank(config: Mapping[str, Any]) -> int:
    """The largest that occurs."""
    return max(int(config["r"]), *map(int, (config.get("rank_pattern") or {}).values()), 0)


def _add(model: PeftModel, adapters: list[str], weights: list[float], method: str, density: float) -> None:
    """Put a combination into the model under its method's name, and make it the active adapter."""
    from peft.tuners.lora import LoraLayer

    torch.manual_seed(SEED)
    options: dict[str, Any] = {} if method in ("linear", "cat", "svd") else {"density": density}
    if method.endswith("svd"):
        options["svd_full_matrices"] = False
    try:
        model.add_weighted_adapter(adapters, weights, method, combination_type=method, **options)
    except (ValueError, TypeError) as error:
        raise InputError(f"--combine {method}: PEFT cannot combine these adapters: {error}") from None
    # The weights hold the adapters' own scaling. PEFT takes the first one's use_rslora over, which would scale again.
    model.peft_config[method].use_rslora = False
    for module in model.modules():
        if isinstance(module, LoraLayer) and method in module.scaling:
            module.scaling[method] = 1.0
    model.set_adapter(method)
