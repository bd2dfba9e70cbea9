"""Put a plan together: the base, the corners of the space, what fits where, and the sweep."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from typing import TYPE_CHECKING

from lora_search.errors import InputError
from lora_search.memory import BaseMemory, Corner, Setup, corners
from lora_search.memory.corners import Crowd, largest, smallest, values
from lora_search.memory.familiar import Familiar, familiar_figures
from lora_search.memory.refuse import refuse_what_never_fits
from lora_search.placement import HostPlace, Node, most_trials, place_hosts
from lora_search.plan.devices import (
    GPUS,
    LAYER_KERNELS,
    PASS_SECONDS,
    SITE_KERNELS,
    UTILISATION,
    Device,
    gpu_count,
    this_machine,
)
from lora_search.plan.rows import RowFacts, row_facts
from lora_search.plan.schedule import Schedule, schedule
from lora_search.plan.values import BasePlan, CornerPlan, DevicePlan, Plan, SweepPlan
from lora_search.plan.work import BaseWork, base_work
from lora_search.positions import refuse_long_rows
from lora_search.spec import SweepSpec
from lora_search.targets import skeleton

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class _Memories:
    """Predictions for one sweep's base, made as they are asked for."""

    def __init__(self, spec: SweepSpec, rows: RowFacts, gpus: int) -> None:
        """
        Args:
            gpus: of a host, where devices are GPUs.
        """
        self._spec, self._rows, self._gpus = spec, rows, gpus
        self._made: dict[Setup, BaseMemory] = {}

    def trials_of_host(self, kept: int, recomputed: int) -> int:
        """Trials that a host elsewhere holds.

        Args:
            kept: of the largest, those that fit.
            recomputed: the same with gradient checkpointing.
        """
        hosts, fit = self._spec.hosts, recomputed if self._spec.base.gradient_checkpointing else kept
        most = most_trials(HostPlace("host", "elsewhere", 1, self._gpus), hosts)
        return max(1, min(most, fit)) if hosts.trials_per_host == "auto" else most

    def of(self, device: Device, *, checkpointing: bool) -> BaseMemory:
        tokens = self._rows.validation_tokens if self._rows.measured else None
        setup = Setup.of(
            self._spec.base,
            device.kind,
            device.compute,
            lanes=device.lanes,
            validation_tokens=tokens,
            checkpointing=checkpointing,
            gpus=self._gpus if device.kind == "cuda" else 1,
            gpu_bytes=device.usable,
        )
        if setup not in self._made:
            alone = replace(setup, gpus=1, gpu_bytes=0)
            if alone not in self._made:
                self._made[alone] = BaseMemory(_skeleton(self._spec), alone)
            self._made[setup] = self._made[alone].over(setup.gpus, setup.gpu_bytes)
        return self._made[setup]


def plan_sweep(spec: SweepSpec, gpus: int | None = None) -> Plan:
    """Plan a sweep, on this machine and on well-known GPUs; nothing is trained.

    Args:
        gpus: of a host elsewhere; None as the sweep file says.

    Raises:
        InputError: the base, the data or a target set cannot be used.
    """
    model = _skeleton(spec)
    rows = row_facts(spec)
    advice = refuse_long_rows(model, rows.longest_tested) if rows.measured else None
    places = place_hosts([Node("here", os.cpu_count() or 1, gpu_count())], spec.hosts)
    hosts = len(places)
    per_host = most_trials(places[0], spec.hosts)
    here = this_machine(spec.base.compute_dtype, places[0], per_host)
    here = replace(here, lanes=min(here.lanes, per_host))
    gpus = max(1, spec.hosts.gpus_per_host if gpus is None else gpus)
    memories = _Memories(spec, rows, gpus)
    memory = memories.of(here, checkpointing=spec.base.gradient_checkpointing)
    found = corners(spec, memory.tree, rows.longest)
    shown = here if here.kind == "cuda" or _fits(memories, here, found) else GPUS[-1]
    if spec.hosts.trials_per_host == "auto":
        per_host = max(1, min(per_host, memory.together(Crowd.of(found, memory), here.usable)))
    work = base_work(model.config, memory.tree, memory.weights.vocabulary)

    @cache
    def sweep_over(seats: int) -> SweepPlan:
        return _sweep(spec, rows, work, memory, found, schedule(spec, seats))

    plain = memories.of(shown, checkpointing=spec.base.gradient_checkpointing)
    return Plan(
        name=spec.name,
        model=spec.base.model,
        architecture=memory.tree.architecture,
        parameters=memory.tree.total_parameters,
        checkpointing=spec.base.gradient_checkpointing,
        quantization=spec.base.quantization,
        rows=rows,
        bases=tuple(_base(memories, device) for device in (here, *([GPUS[-1]] if here.kind == "cpu" else []))),
        by_rule=memory.by_rule,
        corner_device=shown.name if shown.here else "a GPU in bfloat16",
        corners=tuple(_corner(memories, shown, corner) for corner in found),
        host=plain.host([largest(found, plain).shape]),
        devices=(
            _device(memories, here, found, sweep_over, hosts, per_host),
            *(_device(memories, device, found, sweep_over, 1, None) for device in GPUS),
        ),
        hosts=hosts,
        gpus_per_host=gpus,
        trials_per_host=per_host,
        sweep=sweep_over(hosts * per_host),
        refused=_refused(spec, memories, found, here),
        advice=advice,
    )


def usual_ways(spec: SweepSpec) -> tuple[Familiar, ...]:
    """What training the sweep's base takes in the ways in which it is usually compared."""
    return familiar_figures(partial(_skeleton, spec))


def _skeleton(spec: SweepSpec) -> PreTrainedModel:
    return skeleton(spec.base.model, trust_remote_code=spec.base.trust_remote_code, revision=spec.base.revision)


def _refused(spec: SweepSpec, memories: _Memories, found: Sequence[Corner], device: Device) -> str | None:
    memory = memories.of(replace(device, lanes=1), checkpointing=spec.base.gradient_checkpointing)
    try:
        gpus = memory.setup.gpus
        name = device.name if gpus == 1 else f"each of {gpus} {device.name}"
        refuse_what_never_fits(spec, memory, found, device.usable, name)
    except InputError as error:
        return str(error)
    return None


def _fits(memories: _Memories, device: Device, found: Sequence[Corner]) -> bool:
    memory = memories.of(device, checkpointing=False)
    return memory.host([largest(found, memory).shape]).total <= device.usable


def _base(memories: _Memories, device: Device) -> BasePlan:
    memory = memories.of(device, checkpointing=False)
    return BasePlan(device.name if device.here else "a GPU", memory.setup.compute, memory.weights)


def _corner(memories: _Memories, device: Device, corner: Corner) -> CornerPlan:
    kept = memories.of(device, checkpointing=False).trial(corner.shape)
    recomputed = memories.of(device, checkpointing=True).trial(corner.shape)
    return CornerPlan(
        target_modules=corner.target,
        size=corner.size,
        rank=corner.shape.rank,
        batch_size=corner.shape.batch_size,
        dropout=corner.shape.dropout,
        bytes=kept,
        recomputed=recomputed.activations + recomputed.passing,
    )


def _device(
    memories: _Memories,
    device: Device,
    found: Sequence[Corner],
    sweep_over: Callable[[int], SweepPlan],
    hosts: int,
    per_host: int | None,
) -> DevicePlan:
    """
    Args:
        sweep_over: the sweep's work, over so many seats.
        per_host: trials; None for as many as such a host holds.
    """
    plain, recomputing = (memories.of(device, checkpointing=on) for on in (False, True))
    counts: list[int] = []
    for memory in (plain, recomputing):
        trials = smallest(found, memory).shape, Crowd.of(found, memory)
        counts += [memory.together(trial, device.usable) for trial in trials]
    if per_host is None:
        per_host = memories.trials_of_host(counts[1], counts[3])
    sweep = sweep_over(hosts * per_host)
    side_by_side = hosts if device.here else 1
    rate = device.flops * UTILISATION[device.kind] * side_by_side
    kernels = LAYER_KERNELS * sweep.layers + SITE_KERNELS * len(largest(found, plain).shape.targets.modules)
    launching = sweep.passes / (per_host * side_by_side) * kernels * PASS_SECONDS[device.kind]
    return DevicePlan(
        name=device.name,
        here=device.here,
        memory=device.memory,
        usable=device.usable,
        compute=plain.setup.compute,
        smallest=counts[0],
        largest=counts[1],
        smallest_recomputed=counts[2],
        largest_recomputed=counts[3],
        needs_checkpointing=counts[1] == 0 and counts[3] > 0,
        never=counts[1] == counts[3] == 0,
        seconds=max(sweep.flops / rate, launching) / (sweep.schedule.efficiency if device.here else 1.0),
    )


def _sweep(
    spec: SweepSpec,
    rows: RowFacts,
    work: BaseWork,
    memory: BaseMemory,
    found: Sequence[Corner],
    steps: Schedule,
) -> SweepPlan:
    per_step = _rows_per_step(spec) * rows.mean
    trainable = sum(memory.trial(corner.shape).trainable for corner in found) / len(found)
    training = work.training(
        rows.attended, rows.targets, int(trainable), checkpointing=spec.base.gradient_checkpointing
    )
    forward = work.forward(rows.attended, rows.targets) + 2 * trainable
    evaluation = steps.reports * rows.validation_tokens
    most_reports = steps.reports / steps.expected * steps.most
    longest = per_step * spec.max_steps / rows.mean
    return SweepPlan(
        schedule=steps,
        train_tokens=int(steps.expected * per_step),
        train_tokens_most=int(steps.most * per_step),
        evaluation_tokens=int(evaluation),
        passes=int(steps.expected * _mean(spec, "gradient_accumulation_steps")),
        layers=work.layers,
        flops=steps.expected * per_step * training + evaluation * forward,
        flops_most=steps.most * per_step * training + most_reports * rows.validation_tokens * forward,
        epochs=longest / rows.train_rows if rows.train_rows else None,
    )


def _rows_per_step(spec: SweepSpec) -> float:
    return _mean(spec, "batch_size") * _mean(spec, "gradient_accumulation_steps")


def _mean(spec: SweepSpec, name: str) -> float:
    found = values(spec, name)
    return float(sum(found) / len(found))
