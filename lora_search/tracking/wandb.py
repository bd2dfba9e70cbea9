"""Weights & Biases: one run a trial and a summary run, all from one thread of this process.

A run costs about 10 ms and no process of its own (`reinit="create_new"`), where Ray's WandbLoggerCallback starts an
actor a trial. Events wait in a queue, so that a slow W&B never slows training, and a failing one costs one warning.
"""

from __future__ import annotations

import logging
import netrc
import os
import queue
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlparse

from lora_search.rundir import run_identity
from lora_search.spec import Wandb
from lora_search.tracking.events import Observer, State

if TYPE_CHECKING:
    import wandb

Mode = Literal["online", "offline", "disabled"]

CLOSE_TIMEOUT_S = 60.0

ANSWER_S = 30
"""A W&B that takes longer to open a run, or to take the last of it, is left out."""

STEP_METRICS = {"loss": "train/loss", "grad_norm": "train/grad_norm", "lr": "train/lr"}
REPORT_METRICS = {
    "eval_loss": "eval/loss",
    "perplexity": "eval/perplexity",
    "token_accuracy": "eval/token_accuracy",
    "train_loss": "train/mean_loss",
    "tokens": "tokens",
    "tokens_per_second": "tokens_per_second",
    "seconds": "seconds",
    "peak_memory_bytes": "peak_memory_bytes",
}


class WandbRuns(Observer):
    """Records every trial of a sweep as a W&B run, grouped by the sweep's name."""

    def __init__(
        self, config: Wandb, sweep: str, folder: Path, settings: Mapping[str, Any], say: Callable[[str], None]
    ) -> None:
        """
        Args:
            sweep: the runs' group, and the first part of their names.
            folder: the run directory; W&B's own files go into `wandb/` below it.
            settings: the resolved sweep file, for the summary run.
            say: prints one line to the user.
        """
        self._config = config
        self._sweep = sweep
        self._folder = folder
        self._settings = dict(settings)
        self._say = say
        self._mode = wandb_mode(config.mode)
        self._runs: dict[int, wandb.Run] = {}
        self._opened: set[int] = set()
        self._work: queue.Queue[Callable[[], None] | None] = queue.Queue()
        self._broken = False
        self._thread: threading.Thread | None = None
        if self._mode != "disabled":
            logging.getLogger("opentelemetry").setLevel(logging.CRITICAL)  # W&B's telemetry of itself, if it fails
            self._thread = threading.Thread(target=self._run, name="wandb", daemon=True)
            self._thread.start()

    def trial_started(self, trial: int, parameters: Mapping[str, Any]) -> None:
        config = {"trial": trial, **parameters}
        self._opened.add(trial)
        self._later(lambda: self._runs.update({trial: self._init("trial", str(trial), config)}))

    def trial_resumed(self, trial: int, parameters: Mapping[str, Any], step: int, damaged: Sequence[str]) -> None:
        """Open the trial's run again, where it is not open in this process."""
        if trial not in self._opened:
            self.trial_started(trial, parameters)

    def trial_reported(self, trial: int, report: Mapping[str, Any]) -> None:
        report = dict(report)
        self._later(lambda: self._log(self._runs[trial], report))

    def trial_ended(self, trial: int, state: State, reason: str | None) -> None:
        def finish() -> None:
            run = self._runs.pop(trial, None)  # None: it began in an earlier process, and was lost before it went on
            self._finish(run or self._init("trial", str(trial), {"trial": trial}), state, reason)

        self._later(finish)

    def concluded(self, rows: Sequence[Mapping[str, Any]], best: Mapping[str, Any], adapter: Path) -> None:
        """Add the summary run: the trials as a table, the best trial's figures, its adapter as an artifact."""
        self._later(lambda: self._summary([dict(row) for row in rows], best, adapter))

    def close(self) -> None:
        """Wait until W&B has everything, but not for ever, and say how to upload what is offline."""
        if self._thread is None:
            return
        thread, self._thread = self._thread, None
        self._work.put(None)
        thread.join(CLOSE_TIMEOUT_S)
        if thread.is_alive():
            self._warn(f"W&B is still busy after {CLOSE_TIMEOUT_S:.0f} s; what it has not taken is lost to it")
        elif self._mode == "offline" and not self._broken and any(self._folder.glob("wandb/offline-run-*")):
            self._say(f"W&B runs are offline; upload them with: wandb sync {self._folder}/wandb/offline-run-*")

    def _later(self, work: Callable[[], None]) -> None:
        if self._thread is not None and not self._broken:
            self._work.put(work)

    def _run(self) -> None:
        while (work := self._work.get()) is not None:
            if self._broken:
                continue
            try:
                work()
            except Exception as error:  # whatever W&B raises, the sweep goes on without it
                lines = str(error).strip().splitlines() or [""]
                self._warn(f"W&B failed and is left out from here on: {type(error).__name__}: {lines[0]}")

    def _warn(self, line: str) -> None:
        if not self._broken:
            self._broken = True
            self._say(line)

    def _init(self, kind: str, name: str, config: Mapping[str, Any]) -> wandb.Run:
        """A run. Its id follows from the run directory's, so that a resumed trial goes on in the run that it has."""
        import wandb

        wandb.setup(wandb.Settings(silent=True))  # a run's own settings come too late to keep its login silent
        identity = run_identity(self._folder)
        self._folder.joinpath("wandb").mkdir(exist_ok=True)
        run = wandb.init(
            entity=self._config.entity,
            project=self._config.project,
            group=self._sweep,
            job_type=kind,
            name=f"{self._sweep}-{name}",
            id=None if identity is None else f"{identity}-{name}",
            resume="allow" if identity is not None and self._mode == "online" else None,
            config=dict(config),
            mode="offline" if self._mode == "offline" else "online",
            dir=str(self._folder),
            reinit="create_new",
            settings=wandb.Settings(
                silent=True,
                console="off",
                disable_git=True,
                disable_code=True,
                x_disable_stats=True,
                x_disable_meta=True,
                x_save_requirements=False,
                init_timeout=ANSWER_S,
                finish_timeout=ANSWER_S,
                finish_timeout_raises=True,
            ),
        )
        run.define_metric("step")
        run.define_metric("*", step_metric="step")
        return run

    def _log(self, run: wandb.Run, report: Mapping[str, Any]) -> None:
        """The steps since the last report, then the report, each at its optimiser step."""
        for step in report["history"]:
            run.log({"step": step["step"]} | {name: step[key] for key, name in STEP_METRICS.items()})
        run.log({"step": report["step"]} | {name: report[key] for key, name in REPORT_METRICS.items()})

    def _finish(self, run: wandb.Run, state: State, reason: str | None) -> None:
        run.summary["state"] = state
        if reason is not None:
            run.summary["reason"] = reason
        run.finish(exit_code=1 if state == "failed" else 0)

    def _summary(self, rows: Sequence[dict[str, Any]], best: Mapping[str, Any], adapter: Path) -> None:
        import wandb

        run = self._init("summary", "summary", self._settings)
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = wandb.Table(columns=columns, data=[[_cell(row.get(column)) for column in columns] for row in rows])
        run.log({"trials": table})
        run.summary.update({f"best/{key}": _cell(value) for key, value in best.items() if value is not None})
        artifact = wandb.Artifact(f"{self._sweep}-best-adapter", type="model")
        for file in sorted(adapter.iterdir()):  # add_dir prints to the terminal
            artifact.add_file(str(file))
        run.log_artifact(artifact)
        run.finish(exit_code=0)


def wandb_mode(wanted: str) -> Mode:
    """The mode that a sweep runs in: the sweep file's; for `auto`, WANDB_MODE's, else online where there is a key."""
    if wanted == "auto":
        wanted = os.environ.get("WANDB_MODE", "").lower()
    match wanted:
        case "online" | "offline" | "disabled":
            return wanted
        case "dryrun":  # W&B's older word
            return "offline"
        case _:
            return "online" if _has_key() else "offline"


def _has_key() -> bool:
    """Whether W&B would find an API key without asking for one: in the environment, or where `wandb login` put it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(os.environ.get("WANDB_BASE_URL", "https://api.wandb.ai")).hostname or ""
    try:
        return netrc.netrc(os.environ.get("NETRC")).authenticators(host) is not None
    except (OSError, netrc.NetrcParseError):
        return False


def _cell(value: Any) -> Any:
    return ", ".join(value) if isinstance(value, list) else value
