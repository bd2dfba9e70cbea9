"""A trial's adapter copied out of its checkpoint, tested, and merged."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import yaml

from lora_search.checkpoint import ADAPTER_CONFIG, ADAPTER_WEIGHTS, Checkpoint, Shelf, verify
from lora_search.errors import HostFailed, InputError, SweepError, TrialFailed
from lora_search.machine import free_memory_bytes
from lora_search.results import PLANNED, sampled
from lora_search.rundir import RunDirectory
from lora_search.space import TrialConfig
from lora_search.spec import SweepSpec

if TYPE_CHECKING:
    import torch

    from lora_search.data import TokenizedData
    from lora_search.engine import Engine, Evaluation
    from lora_search.merge import Merged, Options
    from lora_search.merge.together import Recipe, Together


SPLITS = ("validation", "test")

TESTED = "best"
"""Name of the best trial while it is resident once more, to be tested."""


@dataclass(frozen=True)
class Conclusion:
    """What came of the best trial."""

    trial: int
    validation_loss: float
    """Nats a token of the saved adapter on the base it was trained on."""
    untrained_validation_loss: float
    test_loss: float
    untrained_test_loss: float
    test_loss_interval: tuple[float, float] | None = field(default=None, kw_only=True)
    """95 % confidence interval of `test_loss` over other rows like these; None in older runs."""
    merged_onto: str
    merged_loss: float | None
    """Validation loss of the merged model, loaded from disk; None where it was not verified."""
    merge_losses: Mapping[str, float]
    merge_drift: float | None
    merge_within_tolerance: bool
    merge_unverified: str | None = None
    """Why the merged model was not verified; None where it was."""

    def to_dict(self) -> dict[str, Any]:
        return asdict(self)


def export_adapter(run: RunDirectory, trial: int, out: Path) -> Checkpoint:
    """Copy a trial's adapter, in PEFT's format, out of its last checkpoint; that checkpoint.

    Raises:
        InputError: the trial has no checkpoint.
        SweepError: its last checkpoint is damaged.
    """
    saved = Shelf(run.folder, trial).newest()
    if saved is None:
        raise InputError(f"--trial {trial}: {run.place} has no checkpoint of such a trial")
    if saved.checkpoint is None or saved.damaged:
        raise SweepError(saved.damaged[0])
    verify(saved.checkpoint, f"{run.place}: trial {trial}", needed=(ADAPTER_CONFIG, ADAPTER_WEIGHTS))
    shutil.rmtree(out, ignore_errors=True)
    _write_adapter(saved.checkpoint, out)
    return saved.checkpoint


def train_again(config: TrialConfig, checkpoint: Checkpoint | None, until: int, engine: Engine) -> Checkpoint:
    """The checkpoint that a trial had at a step, from an earlier one or none; on a host's engine.

    Raises:
        HostFailed: the device computes no longer.
        TrialFailed: the trial does not come so far any more.
    """
    from lora_search.engine.trouble import device_fails_host

    with device_fails_host():
        engine.admit(TESTED, config, checkpoint)
        try:
            while engine.position(TESTED) < until:
                outcome = engine.step([TESTED])[TESTED]
                if isinstance(outcome, TrialFailed | HostFailed):
                    raise outcome
            return engine.snapshot(TESTED)
        finally:
            engine.release(TESTED)


def _write_adapter(checkpoint: Checkpoint, out: Path) -> None:
    out.mkdir(parents=True)
    for name in (ADAPTER_CONFIG, ADAPTER_WEIGHTS):
        (out / name).write_bytes(checkpoint[name])


def write_config(spec: SweepSpec, parameters: Mapping[str, Any], file: Path) -> None:
    """A configuration as a sweep file of its own: a sweep of one trial, which runs again.

    Args:
        parameters: the trial's row of results.
    """
    alone = spec.model_dump(mode="json")
    fixed = sampled(parameters, spec.search.space)
    alone["training"]["steps"] = parameters.get(PLANNED) or spec.training.steps
    alone["name"] = f"{spec.name}-best"
    alone["hosts"]["wait_s"] = 0  # of the cluster that this sweep ran on
    alone["search"] |= {"space": fixed, "enqueue": [], "trials": 1}
    alone["search"]["scheduler"] |= {"name": "none"}
    alone["search"]["sampler"] |= {"name": "random"}
    file.write_text(yaml.safe_dump(alone, sort_keys=False, allow_unicode=True), encoding="utf-8")


def test_adapter(config: TrialConfig, checkpoint: Checkpoint, engine: Engine) -> dict[str, Any]:
    """What a Conclusion says of a trial and of the untrained base, by its fields' names; on a host's engine.

    Raises:
        HostFailed: the device computes no longer.
    """
    from lora_search.engine.trouble import device_fails_host

    with device_fails_host():
        untrained = {f"untrained_{name}_loss": engine.untrained(name).loss for name in SPLITS}
        engine.admit(TESTED, config, checkpoint)
        try:
            tested = {name: engine.evaluate([TESTED], name, by_row=name == "test")[TESTED] for name in SPLITS}
        finally:
            engine.release(TESTED)
    losses = {f"{name}_loss": evaluation.loss for name, evaluation in tested.items()}
    return untrained | losses | {"test_loss_interval": loss_interval(tested["test"])}


def loss_interval(evaluation: Evaluation, draws: int = 2000) -> tuple[float, float]:
    """The 95 % confidence interval of a loss a token, by the percentile bootstrap over the split's rows.

    Rows are drawn whole: a row's tokens stand or fall together (Efron and Tibshirani, 1993, chapter 13).
    """
    import numpy as np

    losses_N, targets_N = evaluation.losses_N, evaluation.targets_N
    if losses_N is None or targets_N is None:
        raise ValueError("the evaluation kept no losses by row")
    generator = np.random.default_rng(0)
    found = np.empty(draws)
    for draw in range(draws):
        picked = generator.integers(len(losses_N), size=len(losses_N))
        found[draw] = losses_N[picked].sum() / max(1, targets_N[picked].sum())
    low, high = np.quantile(found, (0.025, 0.975))
    return float(low), float(high)


def merge_ahead() -> None:
    """Have the process that verifies a merge import its libraries, before `merge_best` in this same process.

    Not where it would take memory that trials may need yet.
    """
    from lora_search.merge import BESIDE, begin_ahead

    free = free_memory_bytes()
    if free is None or free >= BESIDE:
        begin_ahead()


def merge_best(
    spec: SweepSpec, run: RunDirectory, checkpoint: Checkpoint, adapter_loss: float, gpu: bool, data: TokenizedData
) -> dict[str, Any]:
    """Merge a checkpoint's adapter into `best/merged`, on this process's device.

    Where the model does not fit into memory whole, it is merged shard by shard onto the weights it was trained on, and
    not verified. For an object store it is made in this machine's folder for temporary files, and uploaded.

    Plain values, as the driver gets them: what is of `merge` or of the engine would make it import torch.

    Returns:
        What a Conclusion says of the merge, by its fields' names.

    Raises:
        HostFailed: the device computes no longer.
    """
    import torch

    from lora_search.engine.trouble import device_fails_host
    from lora_search.merge import Options, end_ahead, lack_of_memory, merge_adapter

    with device_fails_host(), tempfile.TemporaryDirectory() as folder:
        device = _merging_device(spec) if gpu else torch.device("cpu")
        if (lack := lack_of_memory(spec.base, device)) is not None:
            end_ahead()  # it may be what is lacking
            lack = lack_of_memory(spec.base, device)
        trained_on: Literal["dequantized", "original"] = (
            "dequantized" if spec.base.quantization == "nf4" else "original"
        )
        options = Options() if lack is None else Options(onto=trained_on, verify=False)
        adapter = Path(folder) / "adapter"
        _write_adapter(checkpoint, adapter)
        out = (run.best if run.uri is None else Path(folder)) / "merged"
        merged = merge_adapter(spec.base, adapter, data, adapter_loss, out, device, options)
        if run.uri is not None:
            run.folder.below("best/merged").upload(out)
    return {
        "merged_onto": merged.onto,
        "merged_loss": merged.loss,
        "merge_losses": dict(merged.losses),
        "merge_drift": merged.drift,
        "merge_within_tolerance": merged.within_tolerance,
        "merge_unverified": lack,
    }


def merge_trial(
    spec: SweepSpec,
    run: RunDirectory,
    trial: int,
    out: Path,
    options: Options | None = None,
    say: Callable[[str], None] = lambda line: None,
) -> Merged:
    """Merge any trial's adapter into a standard model at `out`, on this machine.

    Raises:
        InputError: the trial has no checkpoint, its adapter cannot be merged, or there is no memory to verify it.
        SweepError: `out` exists, or the checkpoint is damaged.
    """
    from lora_search.merge import Options, merge_adapter

    options = options or Options()
    device = _device(spec, options)
    with tempfile.TemporaryDirectory() as folder:
        adapter = Path(folder) / "adapter"
        export_adapter(run, trial, adapter)
        return merge_adapter(spec.base, adapter, _data(spec, options), None, out, device, options, say)


def merge_trials(
    spec: SweepSpec,
    run: RunDirectory,
    trials: Sequence[int],
    recipe: Recipe,
    out: Path,
    options: Options,
    say: Callable[[str], None] = lambda line: None,
) -> tuple[Together, Merged]:
    """Combine several trials' adapters, and merge the combination, or the best of them where that is better alone.

    Raises:
        InputError: as `merge_trial`, or PEFT cannot combine these adapters.
        SweepError: as `merge_trial`.
    """
    from lora_search.merge import gguf_form, merge_adapter
    from lora_search.merge.together import combine

    if options.gguf:
        gguf_form(spec.base)  # refuses what cannot be written, before anything is measured
    device = _device(spec, options)
    data = _data(spec, options)
    assert data is not None  # noqa: S101 - a combination is always measured
    with tempfile.TemporaryDirectory() as folder:
        adapters = {trial: Path(folder) / f"trial-{trial}" for trial in trials}
        for trial, adapter in adapters.items():
            export_adapter(run, trial, adapter)
        together = combine(spec.base, adapters, recipe, data, Path(folder) / "together", device)
        say(f"{together.name} has the lowest validation loss, {together.loss:.4f}")
        merged = merge_adapter(spec.base, together.folder, data, together.loss, out, device, options, say)
    return together, merged


def _device(spec: SweepSpec, options: Options) -> torch.device:
    """Where to merge.

    Raises:
        InputError: it has no memory to verify there.
    """
    from lora_search.merge import lack_of_memory

    device = _merging_device(spec)
    if options.verify and (lack := lack_of_memory(spec.base, device)) is not None:
        raise InputError(
            f"{lack}; --no-verify with --onto original or dequantized merges shard by shard, and measures nothing"
        )
    return device


def _data(spec: SweepSpec, options: Options) -> TokenizedData | None:
    """What a merge is measured on; nothing is read where nothing is measured."""
    from lora_search.data import tokenize_data
    from lora_search.model import load_tokenizer

    return tokenize_data(spec.data, load_tokenizer(spec.base)) if options.verify else None


def _merging_device(spec: SweepSpec) -> torch.device:
    """Where a base is merged, in float32: on the CPU where its host needed several GPUs for it."""
    import torch

    return torch.device("cuda" if spec.hosts.gpus_per_host <= 1 and torch.cuda.is_available() else "cpu")
