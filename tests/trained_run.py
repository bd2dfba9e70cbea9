"""A run directory of trained trials: engine, record and checkpoints are real; only Ray and Optuna are left out."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from lora_search.checkpoint import Shelf
from lora_search.data import tokenize_data
from lora_search.engine import Engine
from lora_search.model import load_base, load_tokenizer
from lora_search.rundir import RunDirectory, create_run
from lora_search.space import trial_config
from lora_search.spec import SweepSpec, dump_spec
from lora_search.tracking import RunRecord

Asked = Mapping[str, Any]
"""What was sampled for a trial."""

DEMO_DATA = {"path": "builtin:demo", "limit": 200, "max_length": 256, "template": "{prompt}\n"}
"""Some rows of the demo's, for a spec of `make_spec` on its model."""


def train_run(
    spec: SweepSpec, folder: Path, trials: Sequence[tuple[Asked, int]], every: int, *, seconds: float | None = None
) -> RunDirectory:
    """Train trials together, in a run directory below a folder.

    Args:
        trials: what was sampled, and the steps after which the trial ends, completed or stopped.
        every: steps between reports.
        seconds: what the record's clock says; None: the time.
    """
    run = create_run(folder, spec.name, exact=True)
    run.spec.write_text(dump_spec(spec))
    data = tokenize_data(spec.data, load_tokenizer(spec.base))
    run.provenance.write_text(json.dumps({"id": spec.name, "data": {"fingerprint": data.fingerprint}}))
    engine = Engine(load_base(spec.base, torch.device("cpu")), data)
    record = RunRecord(run.trials) if seconds is None else RunRecord(run.trials, clock=lambda: seconds)
    for number, (sampled, _) in enumerate(trials):
        config = trial_config(spec, sampled)
        record.trial_started(number, config.parameters() | sampled)
        engine.admit(str(number), config)
    for step in range(1, max(steps for _, steps in trials) + 1):
        engine.step(engine.residents)
        if step % every:
            continue
        for name, report in engine.report(engine.residents).items():
            number = int(name)
            record.trial_reported(number, {**report.to_dict(), "host": "host-0"})
            Shelf(run.folder, number).put_unreported(engine.snapshot(name), None)
            if step == trials[number][1]:
                record.trial_ended(number, "completed" if step == report.steps_total else "stopped", None)
                engine.release(name)
    record.close()
    return run
