"""How a sweep's own costs grow with its trials: orchestration, the searcher, the driver's memory, resuming.

    python analysis/benchmarks/scale.py [--trials 125 250 500 1000] [--gpus 16] [--rounds 1] [--json FILE]

Each size is a sweep of its own over so many logical GPUs, a host a GPU with an engine that does nothing, one trial a
host; a trial has three reports and three checkpoints of 16 KiB. The searcher is also timed by itself, for every
sampler, with nothing of Ray around it. Then the finished sweep is opened again, as --resume does. Time counts from the
first trial's end on: what the seats take to start is told apart. The exponent is that of the total over the number of
trials, fitted on logarithms: 1 is linear. With several rounds all sizes are measured in turn, medians are shown, and of
the exponents also the least and the greatest of a round.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import optuna
from orchestration import IdleEngine
from rich.console import Console
from rich.table import Table

from lora_search.placement import HostPlace
from lora_search.rundir import RunDirectory, create_run
from lora_search.search import StudySearcher, create_study
from lora_search.search.asha import StepAsha
from lora_search.spec import SweepSpec, parse_spec
from lora_search.sweep.hosts import Hosts
from lora_search.sweep.resume import reconcile
from lora_search.sweep.trials import search
from lora_search.tracking import Observer, RunRecord

CHECKPOINT_BYTES = 16 << 10

SWEEP = """
name: scale-TRIALS
search: {trials: TRIALS, sampler: {name: SAMPLER}, scheduler: {name: NAME}SPACE}
training: {steps: 90, eval_every: 30}
hosts: {gpus_per_host: 1, cpus_per_host: auto, trials_per_host: 1}
"""

SAMPLERS = ("random", "tpe", "grid")

GRID = ", space: {rank: {int_uniform: [1, 100]}, batch_size: {int_uniform: [1, 100]}}"


@dataclass(frozen=True)
class Size:
    """What a sweep of so many trials cost."""

    trials: int
    start_seconds: float
    """Until the first trial had ended; not in the next."""
    seconds: float
    driver_cpu_seconds: float
    """Of the driver's own process, all of its threads: what stays on one machine, wherever the hosts are."""
    driver_mib: int
    """Resident, most so far."""
    run_mib: float
    resume_seconds: float
    searcher_seconds: dict[str, float]
    """Of the queue, all its proposals and what is told of them, by sampler."""
    asha_seconds: float
    """Of ASHA's decisions, two reports a trial."""


class FirstEnd(Observer):
    """When the first trial had ended, by the clock and by the process's own time."""

    def __init__(self) -> None:
        self.at: tuple[float, float] | None = None

    def trial_ended(self, trial: int, state: str, reason: str | None) -> None:
        self.at = self.at or (time.perf_counter(), time.process_time())


def build(spec: SweepSpec, place: HostPlace, capacity: int, data: Any) -> IdleEngine:
    return IdleEngine(CHECKPOINT_BYTES)


def sweep_of(trials: int, sampler: str, scheduler: str) -> SweepSpec:
    text = SWEEP.replace("TRIALS", str(trials)).replace("SAMPLER", sampler).replace("NAME", scheduler)
    text = text.replace("SPACE", GRID if sampler == "grid" else "")
    return parse_spec(text, source="scale", folder=Path.cwd())


def measure(trials: int, folder: Path) -> Size:
    spec = sweep_of(trials, "random", "none")  # what the samplers cost is told apart
    run = create_run(folder, spec.name, exact=True)
    hosts = Hosts(spec, build)
    try:
        hosts.load()
        start, first = time.perf_counter(), FirstEnd()
        search(spec, run, hosts, [first])
        end, computed = time.perf_counter(), time.process_time()
    finally:
        hosts.end()
    assert first.at is not None  # noqa: S101 - all have ended
    return Size(
        trials=trials,
        start_seconds=first.at[0] - start,
        seconds=end - first.at[0],
        driver_cpu_seconds=computed - first.at[1],
        driver_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10,
        run_mib=sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file()) / 2**20,
        resume_seconds=resume(spec, run),
        searcher_seconds={name: searcher_alone(trials, name) for name in SAMPLERS},
        asha_seconds=asha_alone(trials),
    )


def resume(spec: SweepSpec, run: RunDirectory) -> float:
    """Seconds until the study, the record and the scheduler of a sweep are as they were."""
    start = time.perf_counter()
    study = create_study(spec, run.path)
    record = RunRecord(run.trials)
    past = reconcile(spec, run, study, record)
    record.close()
    StepAsha(sweep_of(spec.search.trials, "random", "asha")).replay(past.events)
    StudySearcher(spec, study, lambda: 1)
    seconds = time.perf_counter() - start
    if past.ended != spec.search.trials:
        raise RuntimeError(f"{past.ended} of {spec.search.trials} trials have ended")
    return seconds


def searcher_alone(trials: int, sampler: str) -> float:
    """Seconds that a searcher takes to propose so many trials, two in three of them stopped early, 16 at a time."""
    spec = sweep_of(trials, sampler, "asha")
    with tempfile.TemporaryDirectory() as folder:
        start = time.perf_counter()
        searcher = StudySearcher(spec, create_study(spec, Path(folder)), lambda: 16)
        running: list[tuple[str, Any]] = []
        for number in range(trials + 16):
            if number < trials:
                running.append((str(number), searcher.suggest(str(number))))
            if number >= 15 and running:
                name, proposed = running.pop(0)
                values = {"learning_rate": 1.0e-3, "dropout": 0.0} | proposed["params"]  # a grid has others
                loss = abs(math.log10(values["learning_rate"]) + 3) + values["dropout"]
                searcher.on_trial_result(name, {"step": 30, "steps_total": 90, "eval_loss": loss + 1})
                end = 90 if int(name) % 3 == 0 else 60
                searcher.on_trial_complete(name, {"step": end, "steps_total": 90, "eval_loss": loss})
        return time.perf_counter() - start


def asha_alone(trials: int) -> float:
    """Seconds that ASHA takes to decide on two reports of every trial, none of which it has stopped before."""
    scheduler = StepAsha(sweep_of(trials, "random", "asha"))
    loss = {"steps_total": 90, "eval_loss": 0.0}
    events: list[dict[str, Any]] = []
    for number in range(trials):
        events.append({"event": "start", "trial": number})
        better = loss | {"eval_loss": 1 / (1 + number)}  # than all before, so that nothing ends early
        events += [{"event": "report", "trial": number, "step": step} | better for step in (30, 60)]
        events.append({"event": "end", "trial": number})
    start = time.perf_counter()
    scheduler.replay(events)
    return time.perf_counter() - start


def median(rounds: Sequence[Size]) -> Size:
    """Of one size; memory is that of the first round, since it is the most so far."""
    found = {
        field.name: statistics.median(getattr(size, field.name) for size in rounds)
        for field in fields(Size)
        if field.name not in ("trials", "driver_mib", "searcher_seconds")
    }
    alone = {name: statistics.median(size.searcher_seconds[name] for size in rounds) for name in SAMPLERS}
    return Size(trials=rounds[0].trials, driver_mib=rounds[0].driver_mib, searcher_seconds=alone, **found)


def exponents(sizes: Sequence[Size]) -> dict[str, float]:
    """By what it is of."""
    counts = [size.trials for size in sizes]
    return {
        "orchestration with random": exponent(counts, [size.seconds for size in sizes]),
        "random alone": exponent(counts, [size.searcher_seconds["random"] for size in sizes]),
        "TPE alone": exponent(counts, [size.searcher_seconds["tpe"] for size in sizes]),
        "grid alone": exponent(counts, [size.searcher_seconds["grid"] for size in sizes]),
        "ASHA alone": exponent(counts, [size.asha_seconds for size in sizes]),
        "orchestration with TPE": exponent(
            counts, [s.seconds + s.searcher_seconds["tpe"] - s.searcher_seconds["random"] for s in sizes]
        ),
        "resume": exponent(counts, [size.resume_seconds for size in sizes]),
        "driver's CPU": exponent(counts, [size.driver_cpu_seconds for size in sizes]),
        "driver's memory": exponent(counts, [size.driver_mib for size in sizes]),
        "driver's memory beyond the first size's": exponent(
            [size.trials - sizes[0].trials for size in sizes[1:]],
            [max(1, size.driver_mib - sizes[0].driver_mib) for size in sizes[1:]],
        ),
        "run directory": exponent(counts, [size.run_mib for size in sizes]),
    }


def exponent(sizes: Sequence[int], totals: Sequence[float]) -> float:
    if len(sizes) < 2:
        return math.nan
    return statistics.linear_regression([math.log(n) for n in sizes], [math.log(t) for t in totals]).slope


def main() -> None:
    """Measure all sizes and print them, with the exponents."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, nargs="+", default=[125, 250, 500, 1000])
    parser.add_argument("--gpus", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    os.environ["WANDB_MODE"] = "disabled"
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    import ray

    ray.init(
        address="local",
        num_cpus=arguments.gpus,
        num_gpus=arguments.gpus,
        include_dashboard=False,
        log_to_driver=False,
    )
    with tempfile.TemporaryDirectory() as folder:
        rounds = [
            [measure(trials, Path(folder) / str(number)) for trials in arguments.trials]
            for number in range(arguments.rounds)
        ]
    sizes = [median(of_size) for of_size in zip(*rounds, strict=True)]
    ray.shutdown()
    table = Table(title=f"{arguments.gpus} logical GPUs, {os.cpu_count()} cores", title_justify="left")
    columns = (
        "trials",
        "start s",
        "ms a trial",
        "CPU ms",
        "of it random",
        "TPE",
        "grid",
        "ASHA",
        "driver MiB",
        "run MiB",
        "resume s",
    )
    for name in columns:
        table.add_column(name, justify="right")
    for size in sizes:
        alone = {name: 1000 * seconds / size.trials for name, seconds in size.searcher_seconds.items()}
        table.add_row(
            f"{size.trials:,}",
            f"{size.start_seconds:.1f}",
            f"{1000 * size.seconds / size.trials:.0f}",
            f"{1000 * size.driver_cpu_seconds / size.trials:.0f}",
            f"{alone['random']:.1f}",
            f"{alone['tpe']:.1f}",
            f"{alone['grid']:.1f}",
            f"{1000 * size.asha_seconds / size.trials:.1f}",
            f"{size.driver_mib:,}",
            f"{size.run_mib:.1f}",
            f"{size.resume_seconds:.2f}",
        )
    fitted = exponents(sizes)
    of_rounds = [exponents(of_round) for of_round in rounds]
    Console().print(table)
    for name, found in fitted.items():
        low, high = (of([of_round[name] for of_round in of_rounds]) for of in (min, max))
        print(f"exponent, {name}: {found:.2f}" + (f" ({low:.2f} to {high:.2f})" if len(rounds) > 1 else ""))
    if arguments.json:
        report = {"gpus": arguments.gpus, "sizes": [asdict(size) for size in sizes], "exponents": fitted}
        report |= {"rounds": [[asdict(size) for size in of_round] for of_round in rounds]}
        arguments.json.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
