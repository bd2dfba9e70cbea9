"""The searcher: one Optuna trial for each Tune trial, told the truth about how it ended."""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType, SimpleNamespace
from typing import Any

import numpy as np
import optuna
import pytest
from conftest import make_spec
from optuna.trial import TrialState
from ray.tune.schedulers import TrialScheduler

from lora_search.errors import OUT_OF_MEMORY
from lora_search.journal import open_study
from lora_search.rundir import RunDirectory, create_run
from lora_search.search import StudySearcher, create_study
from lora_search.search.asha import StepAsha
from lora_search.search.study import distributions, sampler
from lora_search.search.window import Window
from lora_search.space import planned_trials
from lora_search.spec import SweepSpec, parse_spec
from lora_search.sweep.resume import reconcile
from lora_search.tracking import RunRecord


def searcher(spec: SweepSpec, folder: Path, capacity: int = 100) -> StudySearcher:
    return StudySearcher(spec, create_study(spec, folder), lambda: capacity)


def result(step: int, loss: float, total: int = 8) -> dict[str, Any]:
    return {"step": step, "steps_total": total, "eval_loss": loss}


def failure(reason: str) -> dict[str, Any]:
    return {"step": 2, "failure": reason, "done": True}


def proposal(search: StudySearcher, name: str) -> dict[str, Any]:
    proposed = search.suggest(name)
    assert proposed is not None
    params: dict[str, Any] = proposed["params"]
    return params


def test_rung_records_that_are_told_again_decide_as_those_that_were_kept(tiny: Path) -> None:
    """Half of the trials before the process ends; the other half by a scheduler that has heard of them, and by none."""
    spec = make_spec(tiny, training={"steps": 16, "eval_every": 2})
    losses = np.random.default_rng(0).uniform(1.0, 3.0, size=(40, 9))
    events: list[dict[str, Any]] = []

    def decisions(scheduler: StepAsha, numbers: range) -> list[tuple[int, int]]:
        """By trial, the step at which it ends."""
        found = []
        for number in numbers:
            trial: Any = SimpleNamespace(config={"trial": number})
            scheduler.on_trial_add(None, trial)
            events.append({"event": "start", "trial": number})
            for step in range(2, 17, 2):
                report = {"step": step, "steps_total": 16, "eval_loss": float(losses[number, step // 2])}
                events.append({"event": "report", "trial": number, **report})
                if step == 16:
                    scheduler.on_trial_complete(None, trial, report)
                elif scheduler.on_trial_result(None, trial, report) != TrialScheduler.STOP:
                    continue
                break
            events.append({"event": "end", "trial": number})
            found.append((number, step))
        return found

    kept, again = StepAsha(spec), StepAsha(spec)
    decisions(kept, range(20))
    again.replay(events)
    expected = decisions(kept, range(20, 40))
    assert decisions(again, range(20, 40)) == expected
    assert decisions(StepAsha(spec), range(20, 40)) != expected
    assert {step for _, step in expected} > {16}


def test_stopped_trial_is_told_pruned(tiny_spec: SweepSpec, tmp_path: Path) -> None:
    search = searcher(tiny_spec, tmp_path)
    search.suggest("a")
    search.on_trial_result("a", result(2, 3.0))
    search.on_trial_complete("a", result(4, 2.5))  # the scheduler's decision comes with the last result
    (trial,) = open_study(tmp_path).trials
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {2: 3.0, 4: 2.5}


def test_report_that_a_trial_was_stopped_by_is_told_to_the_study_when_the_sweep_goes_on(
    tiny: Path, tmp_path: Path
) -> None:
    """A killed process had recorded it, and not told the study. TPE ranks a stopped trial by its last one."""
    spec = make_spec(tiny, name="stopped", output=str(tmp_path))
    run = create_run(tmp_path, spec.name, exact=True)
    study = create_study(spec, run.path)
    search = StudySearcher(spec, study, lambda: 1)
    proposal(search, "a")
    record = RunRecord(run.trials)
    record.trial_started(0, {})
    for step, loss in ((2, 2.5), (4, 2.25)):
        record.trial_reported(0, result(step, loss))
    search.on_trial_result("a", result(2, 2.5))
    again = create_study(spec, run.path)
    reconcile(spec, run, again, record)
    record.close()
    after = StudySearcher(spec, again, lambda: 1)
    proposal(after, "a")
    after.on_trial_complete("a", result(2, 2.5))  # what the seat tells first, once more; the scheduler stops it at once
    (trial,) = (trial for trial in open_study(run.path).trials if trial.number == 0)
    assert trial.state == TrialState.PRUNED
    assert trial.intermediate_values == {2: 2.5, 4: 2.25}


def left_behind(trials: int, folder: Path) -> tuple[SweepSpec, RunDirectory]:
    """What a killed process leaves: of four trials one ended, one by the study alone, one by the record, one runs."""
    spec = parse_spec(f"name: of-{trials}\nsearch: {{trials: {trials}}}", source="test", folder=folder)
    run = create_run(folder, spec.name, exact=True)
    study, record = create_study(spec, run.path), RunRecord(run.trials)
    study.sampler = optuna.samplers.RandomSampler(seed=0)
    for number in range(trials):
        trial = study.ask(distributions(spec.search.space))
        record.trial_started(number, trial.params)
        record.trial_reported(number, result(2, 2.0 + number))
        if number % 2 == 0:
            trial.report(2.0 + number, 2)
            study.tell(trial, state=TrialState.PRUNED)
        if number % 4 in (0, 1):
            record.trial_ended(number, "stopped", None)
    record.close()
    return spec, run


def calls_to_resume(trials: int, folder: Path) -> Counter[str]:
    """How often each function is called until a sweep is as it was."""
    spec, run = left_behind(trials, folder)
    calls: Counter[str] = Counter()

    def count(frame: FrameType, event: str, called: Any) -> None:
        if event in ("call", "c_call"):
            calls[frame.f_code.co_qualname if event == "call" else called.__qualname__] += 1

    before = sys.getprofile()
    sys.setprofile(count)
    try:
        study, record = create_study(spec, run.path), RunRecord(run.trials)
        past = reconcile(spec, run, study, record)
        StepAsha(spec).replay(past.events)
        StudySearcher(spec, study, lambda: 1)
    finally:
        sys.setprofile(before)
    record.close()
    assert (past.ended, len(past.rows)) == (trials * 3 // 4, trials)
    return calls


def test_four_times_the_trials_take_four_times_the_calls_to_resume(tmp_path: Path) -> None:
    """No trial is held against all others, and none has the study or the record read again for itself."""
    calls_to_resume(8, tmp_path)  # what is imported and compiled when it is first used
    few, many = calls_to_resume(40, tmp_path), calls_to_resume(160, tmp_path)
    assert few.total() < many.total() < 4.1 * few.total()
    for whole in (optuna.storages.JournalStorage.get_all_trials, Path.open):
        assert many[whole.__qualname__] == few[whole.__qualname__] > 0


def test_finished_trial_is_told_complete_with_its_last_value(tiny_spec: SweepSpec, tmp_path: Path) -> None:
    search = searcher(tiny_spec, tmp_path)
    search.suggest("a")
    search.on_trial_result("a", result(4, 2.0))
    search.on_trial_complete("a", result(8, 2.2))
    (trial,) = open_study(tmp_path).trials
    assert (trial.state, trial.value) == (TrialState.COMPLETE, 2.2)


def test_failed_trial_is_told_fail(tiny_spec: SweepSpec, tmp_path: Path) -> None:
    search = searcher(tiny_spec, tmp_path)
    search.suggest("a")
    search.on_trial_result("a", result(2, 3.0))
    search.on_trial_complete("a", failure("loss is nan at step 3"))
    assert open_study(tmp_path).trials[0].state == TrialState.FAIL


def test_trial_whose_machine_is_lost_is_proposed_again_but_not_for_ever(tiny: Path, tmp_path: Path) -> None:
    search = searcher(make_spec(tiny, hosts={"max_retries": 1}, search={"trials": 2}), tmp_path)
    first = search.suggest("a")
    search.on_trial_complete("a", error=True)
    assert search.retries(0)
    assert first is not None
    assert not first["again"]
    assert search.suggest("b") == first | {"attempt": 1, "again": True, "alone": True}  # its last try
    search.on_trial_result("b", result(2, 3.0))  # what has come further may be lost again
    search.on_trial_complete("b", error=True)
    assert search.suggest("c") == first | {"attempt": 2, "again": True, "alone": True}
    search.on_trial_complete("c", error=True)
    assert not search.retries(0)
    assert open_study(tmp_path).trials[0].state == TrialState.FAIL
    search.suggest("d")
    assert search.suggest("e") is None
    search.on_trial_complete("d", result(8, 1.0))
    assert search.suggest("e") == "FINISHED"


def test_trial_is_to_be_alone_on_its_last_try_and_not_before(tiny: Path, tmp_path: Path) -> None:
    search = searcher(make_spec(tiny, hosts={"max_retries": 3}, search={"trials": 1}), tmp_path)
    tries = []
    for number in range(4):
        tries.append(search.suggest(str(number)))
        search.on_trial_complete(str(number), error=True)
    assert [isinstance(proposal, dict) and proposal["alone"] for proposal in tries] == [False, False, False, True]
    assert open_study(tmp_path).trials[0].state == TrialState.FAIL


def test_trial_that_was_kept_as_its_machine_went_is_proposed_again(tiny: Path, tmp_path: Path) -> None:
    spec = make_spec(tiny, hosts={"max_retries": 0}, search={"trials": 1})
    kept = [True, True, False]
    search = StudySearcher(spec, create_study(spec, tmp_path), lambda: 1, lambda trial: kept.pop(0))
    for name in ("a", "b", "c"):
        assert search.suggest(name)
        search.on_trial_complete(name, error=True)
        assert search.retries(0) == (name != "c")


def test_trial_too_large_for_its_device_is_told_infeasible(tiny_spec: SweepSpec, tmp_path: Path) -> None:
    search = searcher(tiny_spec, tmp_path)
    search.suggest("a")
    search.on_trial_complete("a", failure(f"{OUT_OF_MEMORY} at step 1, with no other trial in the pass: ..."))
    (trial,) = open_study(tmp_path).trials
    assert trial.state == TrialState.PRUNED
    assert trial.constraints == {"memory": 1.0}


def test_sampler_learns_to_avoid_what_is_infeasible(tiny: Path, tmp_path: Path) -> None:
    """Ranks above 32 run out of memory; TPE must come to propose them seldom."""
    space = {"rank": {"int_uniform": [1, 64]}, "dropout": {"uniform": [0.0, 0.1]}, "target_modules": "all-linear"}
    search = searcher(make_spec(tiny, search={"space": space, "trials": 60}), tmp_path)
    ranks = []
    for number in range(60):
        rank = proposal(search, str(number))["rank"]
        ranks.append(rank)
        if rank > 32:
            search.on_trial_complete(str(number), failure(OUT_OF_MEMORY))
        else:
            search.on_trial_complete(str(number), result(8, 3.0 + abs(rank - 16) / 64))
    assert sum(rank > 32 for rank in ranks[30:]) <= 4  # by chance it would be 15


def test_no_more_trials_run_than_the_hosts_hold(tiny_spec: SweepSpec, tmp_path: Path) -> None:
    search = searcher(tiny_spec, tmp_path, capacity=2)
    assert [search.suggest(name) is None for name in "abc"] == [False, False, True]
    search.on_trial_complete("a", result(8, 1.0))
    assert search.suggest("c") is not None


def test_search_goes_on_as_if_it_had_not_been_interrupted(tiny: Path, tmp_path: Path) -> None:
    """A process ends while trial 12 runs: the next one proposes trial 12 again, and then what the first would have."""

    def loss(params: dict[str, Any]) -> float:
        return float(params["rank"] + params["dropout"])

    spec = make_spec(tiny, search={"trials": 18})
    proposals = []
    for name, end in (("undisturbed", 0), ("interrupted", 13)):
        (tmp_path / name).mkdir()
        search = searcher(spec, tmp_path / name)
        row = []
        for index in range(18):
            row.append(proposal(search, str(index)))
            search.on_trial_result(str(index), result(2, loss(row[-1])))
            if len(row) == end:
                search = searcher(spec, tmp_path / name)
                assert proposal(search, str(index)) == row[-1]
                search.on_trial_result(str(index), result(2, loss(row[-1])))  # what is told twice counts once
            search.on_trial_complete(str(index), result(8, loss(row[-1])))
        proposals.append(row)
    assert proposals[0] == proposals[1]
    assert [trial.number for trial in open_study(tmp_path / "interrupted").trials] == list(range(18))


def test_trial_that_ends_twice_is_told_once(tiny_spec: SweepSpec, tmp_path: Path) -> None:
    search = searcher(tiny_spec, tmp_path)
    search.suggest("a")
    search.on_trial_complete("a", result(8, 1.0))
    search.on_trial_complete("a", result(8, 2.0))
    assert [trial.state for trial in open_study(tmp_path).trials] == [TrialState.COMPLETE]


@pytest.mark.parametrize(("trials", "name"), [(1, "tpe"), (4, "random"), (5, "tpe"), (14, "tpe")])
def test_proposal_that_was_cut_off_is_finished_as_it_would_have_been(
    tiny: Path, tmp_path: Path, trials: int, name: str
) -> None:
    """The process is killed after every line of the journal that the last proposal writes."""
    enqueue = [{"rank": 4, "learning_rate": 1e-3}]  # its dropout is drawn
    spec = make_spec(tiny, search={"trials": 18, "sampler": {"name": name}, "enqueue": enqueue})
    (tmp_path / "whole").mkdir()
    search = searcher(spec, tmp_path / "whole")
    for index in range(trials - 1):
        params = proposal(search, str(index))
        search.on_trial_complete(str(index), result(8, params["rank"] + params["dropout"]))
    journal = tmp_path / "whole" / "study.journal"
    before = len(journal.read_bytes().splitlines())
    wanted = search.suggest("last")
    assert wanted is not None
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) >= before + 3
    for end in range(before + 1, len(lines) + 1):
        folder = tmp_path / str(end)
        folder.mkdir()
        (folder / "study.journal").write_bytes(b"".join(lines[:end]))
        assert searcher(spec, folder).suggest("again") == wanted | {"again": True}, end


def test_common_first_guess_comes_first(tmp_path: Path, tiny: Path) -> None:
    spec = make_spec(
        tiny,
        search={
            "space": {
                "rank": {"choice": [4, 16]},
                "alpha": {"uniform": [8, 64]},
                "dropout": {"uniform": [0, 0.1]},
                "target_modules": "all-linear",
            }
        },
    )
    params = proposal(searcher(spec, tmp_path), "a")
    assert params == {"rank": 16, "alpha": 32.0, "dropout": 0.05, "target_modules": "all-linear"}


def test_first_guess_keeps_to_the_space(tmp_path: Path, tiny: Path) -> None:
    spec = make_spec(tiny, search={"space": {"rank": {"choice": [2, 4]}, "dropout": {"uniform": [0.1, 0.2]}}})
    params = proposal(searcher(spec, tmp_path), "a")
    assert params["rank"] in (2, 4)
    assert 0.1 <= params["dropout"] <= 0.2


def test_enqueued_configurations_come_first_and_in_order(tmp_path: Path, tiny: Path) -> None:
    first = [{"rank": 8, "learning_rate": 2e-3}, {"rank": 2, "learning_rate": 5e-4}]
    spec = make_spec(tiny, search={"enqueue": first})
    search = searcher(spec, tmp_path)
    proposed = [proposal(search, name) for name in "ab"]
    assert [{key: p[key] for key in ("rank", "learning_rate")} for p in proposed] == first


def test_grid_is_every_combination_once(tmp_path: Path, tiny: Path) -> None:
    space = {
        "rank": {"choice": [2, 4]},
        "target_modules": {"choice": ["mlp", ["q_proj", "v_proj"]]},
        "batch_size": {"int_uniform": [1, 3]},
        "dropout": 0.0,
    }
    spec = make_spec(tiny, search={"space": space, "sampler": {"name": "grid"}, "trials": 100, "enqueue": []})
    assert planned_trials(spec) == 12
    search = searcher(spec, tmp_path)
    proposed = []
    assert len(create_study(spec, tmp_path).get_trials(deepcopy=False)) == 12  # as it is resumed
    for index in range(12):
        proposed.append(proposal(search, str(index)))
        search.on_trial_complete(str(index), result(8, 1.0))
    keys = {(p["rank"], str(p["target_modules"]), p["batch_size"]) for p in proposed}
    assert len(keys) == 12
    assert all(p["dropout"] == 0.0 for p in proposed)
    assert ["q_proj", "v_proj"] in [p["target_modules"] for p in proposed]
    assert all(trial.state.is_finished() for trial in open_study(tmp_path).trials)


def test_same_seed_proposes_the_same(tmp_path: Path, tiny: Path) -> None:
    spec = make_spec(tiny, search={"trials": 14})
    proposals = []
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        search = searcher(spec, tmp_path / name)
        row = []
        for index in range(14):  # past the random start, into TPE's model
            row.append(proposal(search, str(index)))
            search.on_trial_complete(str(index), result(8, row[-1]["rank"] + row[-1]["dropout"]))
        proposals.append(row)
    assert proposals[0] == proposals[1]


def test_tpe_finds_what_is_good(tmp_path: Path, tiny: Path) -> None:
    """Against random search with the same seed and budget, on a function whose best is known."""
    import math

    def best_of(name: str) -> float:
        folder = tmp_path / name
        folder.mkdir()
        spec = make_spec(tiny, search={"sampler": {"name": name}, "trials": 60})
        search = searcher(spec, folder)
        losses = []
        for index in range(60):
            params = proposal(search, str(index))
            losses.append(
                abs(math.log10(params["learning_rate"]) + 2.5) + 5 * params["dropout"] + 0.3 * (params["rank"] != 8)
            )
            search.on_trial_complete(str(index), result(8, losses[-1]))
        return sum(sorted(losses)[:10])

    assert best_of("tpe") < best_of("random")


def test_sampler_is_the_one_that_the_sweep_file_names(tmp_path: Path, tiny: Path) -> None:
    assert isinstance(sampler(make_spec(tiny).search, 0), Window)
    random = make_spec(tiny, search={"sampler": {"name": "random"}})
    assert isinstance(sampler(random.search, 0), optuna.samplers.RandomSampler)
    assert create_study(make_spec(tiny), tmp_path).direction == optuna.study.StudyDirection.MINIMIZE


@pytest.mark.parametrize("metric", ["token_accuracy"])
def test_accuracy_is_maximised(tmp_path: Path, tiny: Path, metric: str) -> None:
    study = create_study(make_spec(tiny, search={"metric": metric}), tmp_path)
    assert study.direction == optuna.study.StudyDirection.MAXIMIZE


def test_window_sees_the_newest_and_the_best_of_a_long_study() -> None:
    """TPE with a window proposes what TPE proposes from those trials alone."""
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    space = {"x": optuna.distributions.FloatDistribution(0.0, 1.0)}

    def tpe() -> optuna.samplers.TPESampler:
        return optuna.samplers.TPESampler(multivariate=True, seed=3)

    def trial(number: int) -> optuna.trial.FrozenTrial:
        x = (number * 0.37) % 1.0
        return optuna.trial.create_trial(params={"x": x}, distributions=space, value=abs(x - 0.6))

    failed = optuna.trial.create_trial(state=TrialState.FAIL)
    everything = [trial(number) for number in range(60)]
    best = sorted(everything[:-20], key=lambda found: found.value)[:5]
    kept = [found for found in everything if found in best or found in everything[-20:]]
    proposals = []
    for trials, chosen in ((everything, Window(tpe(), space, newest=20, best=5)), (kept, tpe()), (everything, tpe())):
        study = optuna.create_study(sampler=chosen)
        study.add_trials([*trials, *[failed] * 30])
        proposals.append(study.ask(space).params["x"])
    assert proposals[0] == proposals[1] != proposals[2]


@pytest.mark.parametrize("enqueue", [None, [{"rank": 32, "target_modules": "mlp"}, {"rank": 8}]])
def test_grid_has_every_combination_once_beside_first_trials_that_leave_values_open(
    tmp_path: Path, tiny: Path, enqueue: list[dict[str, Any]] | None
) -> None:
    space = {"rank": {"choice": [8, 16, 32]}, "alpha_ratio": {"choice": [1, 2]}}
    space |= {"target_modules": {"choice": ["mlp", "all-linear"]}}
    spec = make_spec(tiny, search={"space": space, "sampler": {"name": "grid"}, "trials": 100, "enqueue": enqueue})
    search = searcher(spec, tmp_path)
    proposed = [proposal(search, str(number)) for number in range(planned_trials(spec))]
    assert len({tuple(configuration.items()) for configuration in proposed}) == len(proposed) == 12
    for configuration, wanted in zip(proposed, enqueue or [{"rank": 16, "alpha_ratio": 2}], strict=False):
        assert wanted.items() <= configuration.items()


@pytest.mark.parametrize("name", ["tpe", "random"])
def test_finite_space_has_no_configuration_twice_and_ends_with_its_last(tmp_path: Path, tiny: Path, name: str) -> None:
    space = {"rank": {"choice": [2, 4, 8]}, "batch_size": {"int_uniform": [1, 4]}, "target_modules": "mlp"}
    spec = make_spec(tiny, search={"space": space, "trials": 100, "sampler": {"name": name}})
    assert planned_trials(spec) == 12
    seen = []
    for number in range(12):
        search = searcher(spec, tmp_path, capacity=12)  # as after an interruption, every time
        seen.append(tuple(proposal(search, str(number)).items()))
        search.on_trial_complete(str(number), result(8, 2.0 + dict(seen[-1])["rank"]))
    assert len(set(seen)) == 12
    assert searcher(spec, tmp_path).suggest("more") == "FINISHED"


def test_sweep_with_a_new_name_goes_on_with_its_study(tmp_path: Path, tiny: Path) -> None:
    search = searcher(make_spec(tiny), tmp_path)
    search.suggest("a")
    search.on_trial_complete("a", result(8, 2.0))
    renamed = create_study(make_spec(tiny, name="renamed"), tmp_path)
    assert [trial.state for trial in renamed.trials if trial.state != TrialState.WAITING] == [TrialState.COMPLETE]
    assert open_study(tmp_path).trials
