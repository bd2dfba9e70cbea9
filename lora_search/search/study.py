"""The Optuna study of a sweep: its storage, its sampler, its distributions, what it tries first."""

from __future__ import annotations

import itertools
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalChoiceType,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import TrialState

from lora_search.journal import JOURNAL, journal_storage
from lora_search.search.unseen import Unseen
from lora_search.search.window import Window
from lora_search.space import STARTUP_TRIALS, first_trials, grid_of, is_finite, planned_trials
from lora_search.spec import Choice, Domain, Fixed, IntUniform, LogUniform, Search, SweepSpec


def create_study(spec: SweepSpec, folder: Path) -> optuna.Study:
    """The study in the run directory, a new one where there is none, with the configurations to try first waiting."""
    storage = journal_storage(folder)
    named = [study.study_name for study in storage.get_all_studies()]  # a sweep that is resumed may have a new name
    study = optuna.create_study(
        storage=storage,
        study_name=named[0] if named else spec.name,
        direction="minimize" if spec.search.mode == "min" else "maximize",
        load_if_exists=True,
    )
    there = {
        frozenset(trial.system_attrs.get("fixed_params", trial.params).items())
        for trial in study.get_trials(deepcopy=False)
    }
    for configuration in _queue(spec):
        encoded = encode(spec.search.space, configuration)
        if (known := frozenset(encoded.items())) not in there:  # Optuna's own skip_if_exists looks at all, every time
            there.add(known)
            study.enqueue_trial(encoded)
    return study


def begun_trials(folder: Path) -> dict[int, bool]:
    """The numbers of all trials that the study in a run directory has proposed, and whether each has ended."""
    if not (folder / JOURNAL).exists():
        return {}
    storage = journal_storage(folder)
    trials = (t for study in storage.get_all_studies() for t in storage.get_all_trials(study._study_id, deepcopy=False))
    return {trial.number: trial.state.is_finished() for trial in trials if trial.state != TrialState.WAITING}


def _queue(spec: SweepSpec) -> list[dict[str, Any]]:
    """What is tried before the sampler's own, which may leave values open; of a grid, all of it."""
    first, space = first_trials(spec), spec.search.space
    if spec.search.sampler.name != "grid":
        return first
    ahead = [next(grid_of({**space, **{name: Fixed(value) for name, value in known.items()}})) for known in first]
    rest = (configuration for configuration in grid_of(space) if configuration not in ahead)
    return list(itertools.islice(itertools.chain(ahead, rest), planned_trials(spec)))


def sampler(search: Search, number: int) -> optuna.samplers.BaseSampler:
    """The sampler that the sweep file names, for one trial's proposal.

    TPE is multivariate, since rank, alpha and learning rate act together (Falkner et al., BOHB, 2018), and takes a
    running trial for a bad one (constant liar), so that trials started together differ. Its time for a proposal grows
    with the trials that it looks at, so it looks at the newest 400 and the best 100.

    Of a finite space nothing is proposed twice: a trial's result follows from its configuration.

    Args:
        number: of the trial. What is drawn for it follows from the seed, its number and what the study knows by then,
            not from what this process has drawn before.
    """
    seed = int(np.random.SeedSequence((search.sampler.seed, number)).generate_state(1)[0])
    if search.sampler.name == "tpe":
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            tpe = optuna.samplers.TPESampler(
                multivariate=True, constant_liar=True, n_startup_trials=STARTUP_TRIALS, seed=seed
            )
        drawn: optuna.samplers.BaseSampler = Window(tpe, distributions(search.space))
    else:
        drawn = optuna.samplers.RandomSampler(seed=seed)  # a grid stands in the queue and samples nothing
    if not is_finite(search.space):
        return drawn
    configurations = (encode(search.space, configuration) for configuration in grid_of(search.space))
    return Unseen(drawn, distributions(search.space), configurations, seed)


def distributions(space: Mapping[str, Domain]) -> dict[str, BaseDistribution]:
    """The searched part of a space in Optuna's terms; fixed values are not searched."""
    return {name: _distribution(domain) for name, domain in space.items() if not isinstance(domain, Fixed)}


def encode(space: Mapping[str, Domain], configuration: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration as Optuna stores it: lists of module names as JSON text, fixed values left out."""
    return {
        name: _encoded(value) if isinstance(space[name], Choice) else value
        for name, value in configuration.items()
        if not isinstance(space[name], Fixed)
    }


def decode(space: Mapping[str, Domain], stored: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration that Optuna's parameters stand for, fixed values included."""
    configuration: dict[str, Any] = {}
    for name, domain in space.items():
        if isinstance(domain, Fixed):
            configuration[name] = domain.value
        elif isinstance(domain, Choice):
            configuration[name] = next(value for value in domain.values if _encoded(value) == stored[name])
        else:
            configuration[name] = stored[name]
    return configuration


def _distribution(domain: Domain) -> BaseDistribution:
    match domain:
        case Choice(values):
            return CategoricalDistribution([_encoded(value) for value in values])
        case IntUniform(low, high):
            return IntDistribution(low, high)
        case _:
            low, high = domain.probes()
            return FloatDistribution(low, high, log=isinstance(domain, LogUniform))


def _encoded(value: Any) -> CategoricalChoiceType:
    return json.dumps(value) if isinstance(value, list) else value
