"""Which parameters the outcome hung on, by PED-ANOVA (Watanabe et al., arXiv:2304.10255), and how sure that is.

Optuna's fANOVA needs scikit-learn and values that can be compared; PED-ANOVA needs neither: it asks how the best trials
are spread over a parameter's values, against all trials, and so only needs to know which trials are the best. That is
known of stopped trials too (`standing`).
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any

from lora_search.report.parameters import Parameter
from lora_search.report.values import listed, number, percent, text
from lora_search.results import Row

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

FEWEST = 10
"""Trials below which nothing is said."""

TOP, TOP_SHARE = 20, 0.1
"""How many trials count as the best: a third, no more than 20, or a tenth where that is more. PED-ANOVA's tenth of two
dozen trials would be two, by which nothing can be told."""

DRAWS, TRIALS_DRAWN = 40, 10_000
"""Bootstrap samples, and as many shuffles; fewer where the trials drawn would be more than these."""

NEVER = datetime(2000, 1, 1)
"""When trials were, which here says nothing."""

CHANCE = 0.05
"""A parameter stands out where so few of the shuffles give it as much."""


def importance(standing: Sequence[Row], parameters: Sequence[Parameter], seed: int = 0) -> list[dict[str, Any]]:
    """The share of each searched parameter in the importance, the largest first; none with fewer than FEWEST trials.

    Args:
        standing: trials that have ended, best first.

    Returns:
        name, label, share (they sum to 1), low and high (5 % and 95 % of shares over bootstrap samples of the trials),
        chance (the part of shuffled standings in which the parameter's divergence is at least as large).
    """
    import numpy as np

    searched = [parameter for parameter in parameters if parameter.searched]
    rows = [row for row in standing if all(row.get(parameter.name) is not None for parameter in searched)]
    if len(rows) < FEWEST or not searched:
        return []
    scales = {parameter.name: _distribution(parameter, rows) for parameter in searched}
    encoded = [{parameter.name: _encoded(parameter, row) for parameter in searched} for row in rows]
    random = np.random.default_rng(seed)
    size = len(rows)
    draws = max(20, min(DRAWS, TRIALS_DRAWN // size))
    found = _divergences(encoded, range(size), scales)
    total = sum(found.values())
    if total <= 0:
        return []
    samples = [_divergences(encoded, sorted(map(int, random.integers(size, size=size))), scales) for _ in range(draws)]
    shares = [_shares(sample) for sample in samples]
    shuffled = [_divergences(encoded, [int(i) for i in random.permutation(size)], scales) for _ in range(draws)]
    entries = [
        {
            "name": parameter.name,
            "label": parameter.label,
            "share": found[parameter.name] / total,
            "low": float(np.quantile([share[parameter.name] for share in shares], 0.05)),
            "high": float(np.quantile([share[parameter.name] for share in shares], 0.95)),
            "chance": (1 + sum(other[parameter.name] >= found[parameter.name] for other in shuffled)) / (1 + draws),
        }
        for parameter in searched
    ]
    return sorted(entries, key=lambda entry: -entry["share"])


def importance_finding(found: Sequence[Mapping[str, Any]], trials: int) -> str:
    """The caption."""
    if not found:
        return f"Too few trials have ended to tell ({trials}; {FEWEST} are needed)."
    clear = [str(entry["label"]) for entry in found if entry["chance"] <= CHANCE]
    first = found[0]
    line = (
        f"{str(first['label']).capitalize()} comes first with {percent(first['share'])} of the importance "
        f"(90 % interval {percent(first['low'])} to {percent(first['high'])}). "
    )
    if clear:
        return line + f"What stands out from chance: {listed(clear)}."
    return line + f"With {trials} trials, no parameter stands out from chance."


def _divergences(
    encoded: Sequence[Mapping[str, Any]], order: Sequence[int], scales: Mapping[str, BaseDistribution]
) -> dict[str, float]:
    """Of each parameter, between the best trials and all.

    Args:
        order: indices of trials, best first.
    """
    import optuna
    from optuna.importance import PedAnovaImportanceEvaluator, get_param_importances
    from optuna.trial import FrozenTrial, TrialState

    class Given(optuna.Study):
        """A study of trials that stand nowhere: storing them would copy each many times over."""

        def get_trials(self, *args: Any, **kwargs: Any) -> list[FrozenTrial]:
            return trials

    trials = [
        FrozenTrial(
            number=place,
            trial_id=place,
            state=TrialState.COMPLETE,
            value=float(place),
            params=dict(encoded[index]),
            distributions=dict(scales),
            datetime_start=NEVER,
            datetime_complete=NEVER,
            user_attrs={},
            system_attrs={},
            intermediate_values={},
        )
        for place, index in enumerate(order)
    ]
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of parameters whose trials are few: that is what the interval tells
            storage = optuna.storages.InMemoryStorage()
            optuna.create_study(storage=storage, study_name="standing")
            best = PedAnovaImportanceEvaluator(target_quantile=max(TOP_SHARE, min(1 / 3, TOP / len(order))))
            return get_param_importances(
                Given("standing", storage), evaluator=best, params=list(scales), normalize=False
            )
    finally:
        optuna.logging.set_verbosity(verbosity)


def _shares(divergences: Mapping[str, float]) -> dict[str, float]:
    total = sum(divergences.values())
    return {name: value / total if total > 0 else 1 / len(divergences) for name, value in divergences.items()}


def _distribution(parameter: Parameter, rows: Sequence[Row]) -> BaseDistribution:
    from optuna.distributions import CategoricalDistribution, FloatDistribution

    if parameter.scale == "category":
        return CategoricalDistribution(parameter.categories)
    values = [value for row in rows if (value := number(row[parameter.name])) is not None]
    return FloatDistribution(min(values), max(values), log=parameter.scale == "log")


def _encoded(parameter: Parameter, row: Row) -> Any:
    value = row[parameter.name]
    return text(value) if parameter.scale == "category" else float(value)
