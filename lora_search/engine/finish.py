"""What ends a step once all gradients are there: checks, clipping, the optimisers, each trial's books."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from lora_search.engine.adamw import clip_together, norms_together, step_together
from lora_search.engine.metrics import StepMetrics
from lora_search.engine.pack import Share
from lora_search.engine.trial import ResidentTrial
from lora_search.engine.trouble import Failure, Trouble, free_memory, is_out_of_memory, require_finite
from lora_search.errors import TrialFailed

Limit = Callable[[int, int], None]
"""Is told that memory ran out for so many trials together, and how many are tried from now on."""

Judge = Callable[[str, Trouble, int], Mapping[str, Failure]]
"""What becomes of a trial that had trouble by itself, in a step."""


def finish(
    group: Mapping[str, ResidentTrial],
    shares: Mapping[str, Sequence[Share]],
    losses: Mapping[str, float],
    seconds: float,
    limit: Limit,
    judge: Judge,
) -> dict[str, StepMetrics | Failure]:
    """Check each trial's loss and gradient, and step its optimiser.

    Args:
        seconds: that the passes took, which the trials share by their tokens, and what this takes.
    """
    start = time.perf_counter()
    norms = dict(zip(group, norms_together([trial.adapter.gradients for trial in group.values()]), strict=True))
    tokens = {name: sum(len(share.rows.tokens_N) for share in of_trial) for name, of_trial in shares.items()}
    outcomes: dict[str, StepMetrics | Failure] = {}
    for name, trial in group.items():
        try:
            require_finite("loss", losses[name], trial.step + 1)
            require_finite("gradient norm", norms[name], trial.step + 1)
        except TrialFailed as failure:
            outcomes[name] = failure
    sound = {name: trial for name, trial in group.items() if name not in outcomes}
    clip_together(
        [trial.adapter.gradients for trial in sound.values()],
        [norms[name] for name in sound],
        [trial.config.training.max_grad_norm for trial in sound.values()],
    )
    for name in _step_optimizers(sound, list(sound), limit):
        outcomes |= judge(name, Trouble("in its optimiser", memory=True), sound.pop(name).step + 1)
    for name, trial in sound.items():
        outcomes[name] = trial.stepped(losses[name], norms[name], tokens[name])
    seconds += time.perf_counter() - start
    for name, trial in group.items():
        trial.window_seconds += seconds * tokens[name] / sum(tokens.values())
    return outcomes


def _step_optimizers(trials: Mapping[str, ResidentTrial], names: list[str], limit: Limit) -> list[str]:
    """Step the trials' optimisers, together where memory allows it; those for which it never does."""
    try:
        step_together([trials[name].optimizer for name in names])
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    else:
        return []
    free_memory(trials[names[0]].adapter.vectors[0].device)
    if len(names) == 1:
        return names
    half = (len(names) + 1) // 2
    limit(len(names), half)
    return _step_optimizers(trials, names[:half], limit) + _step_optimizers(trials, names[half:], limit)
