"""The end of a sweep: its best trial's adapter exported, tested and merged, on hosts."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from lora_search.best import Conclusion, export_adapter, merge_best, test_adapter, train_again, write_config
from lora_search.checkpoint import Saved, Shelf, step_of
from lora_search.errors import SweepError, TrialFailed
from lora_search.results import PLANNED, Row, sampled
from lora_search.rundir import RunDirectory
from lora_search.space import TrialConfig, trial_config
from lora_search.spec import SweepSpec
from lora_search.sweep.answers import HostLost
from lora_search.sweep.cluster import Say
from lora_search.sweep.hosts import Hosts


def conclude(spec: SweepSpec, run: RunDirectory, best: Row, hosts: Hosts, say: Say) -> Conclusion:
    """Export, test and merge the best trial's adapter, on hosts: their processes have all they need.

    Where its last checkpoint is damaged, the trial is trained again from the one before.

    Raises:
        SweepError: a host was lost meanwhile, and again in each of `hosts.max_retries` attempts more; or the trial does
            not come to its end again.
    """
    retries = 0
    while True:
        try:
            return _conclude(spec, run, best, hosts, say)
        except HostLost as lost:
            if retries == spec.hosts.max_retries:
                raise SweepError(f"a host was lost: {lost}; mend it, then --resume") from lost
            retries += 1
            hosts.renew()


def _conclude(spec: SweepSpec, run: RunDirectory, best: Row, hosts: Hosts, say: Say) -> Conclusion:
    run.folder.remove(run.best.name)  # of when the sweep had fewer trials, or of a merge that was interrupted
    run.best.mkdir(exist_ok=True)
    write_config(spec, best, run.best / "config.yaml")
    planned = {"steps": best[PLANNED]} if best.get(PLANNED) else {}  # the sweep file may ask for more by now
    config = trial_config(spec, planned | sampled(best, spec.search.space))
    _mend_checkpoint(run, best, config, hosts, say)
    checkpoint = export_adapter(run, best["trial"], run.best / "adapter")
    seen_by_all = replace(run, path=run.path.resolve())  # a host may have another working directory
    tested, merged = hosts.finish(
        partial(test_adapter, config, checkpoint),
        partial(merge_best, spec, seen_by_all, checkpoint, best["eval_loss"]),
    )
    return Conclusion(trial=best["trial"], **tested, **merged)


def _mend_checkpoint(run: RunDirectory, best: Row, config: TrialConfig, hosts: Hosts, say: Say) -> None:
    """Have the trial's last checkpoint whole again, if it is damaged."""
    shelf = Shelf(run.folder, best["trial"])
    saved = shelf.newest() or Saved(None, None, (), ())
    step = 0 if saved.checkpoint is None else step_of(saved.checkpoint)
    if step >= best["steps"]:
        return
    damage = saved.damaged[0] if saved.damaged else "its last checkpoint is gone"
    say(f"WARNING: trial {best['trial']}: {damage}; it is trained again from step {step}")
    try:
        shelf.put_unreported(hosts.ask_one(partial(train_again, config, saved.checkpoint, best["steps"])), None)
    except TrialFailed as failure:
        raise SweepError(f"trial {best['trial']}: {damage}, and it does not come so far again: {failure}") from None
