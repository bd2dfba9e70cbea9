"""How long a run's frames take to load, as its reports grow; beside it the same lines by `json.loads` alone.

python analysis/benchmarks/read_results.py [--reports 100000] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

from lora_search import open_run

REPEATS = 3
REPORTS_A_TRIAL = 10
STEPS_A_REPORT = 10


def write_run(folder: Path, reports: int) -> None:
    """A run directory as a sweep leaves it, with the steps between reports in each report's line."""
    folder.mkdir()
    (folder / "sweep.yaml").write_text("name: read\n", encoding="utf-8")
    with (folder / "trials.jsonl").open("w", encoding="utf-8") as lines:
        for trial in range(reports // REPORTS_A_TRIAL):
            parameters = {
                "rank": 16,
                "alpha": 32.0,
                "dropout": 0.05,
                "target_modules": "attention",
                "learning_rate": 1e-3,
            }
            write(lines, "start", trial, parameters=parameters)
            for step in range(10, 10 * REPORTS_A_TRIAL + 1, 10):
                loss = 5.625265842013889 / (1 + trial % 7 + step)
                entry = {"loss": loss, "grad_norm": 2.1104214191436768, "lr": 0.00014149786665521691, "tokens": 338}
                report = {
                    "step": step, "steps_total": 100, "eval_loss": loss, "perplexity": 277.34600494420556,
                    "token_accuracy": 0.10202020202020202, "train_loss": loss, "grad_norm": 2.432890248298645,
                    "lr": 0.0007036305479157784, "tokens": 342 * step, "tokens_per_second": 4059.4601125766835,
                    "seconds": 1.4551866798964896, "peak_memory_bytes": 725975040, "trainable_parameters": 40960,
                    "host": "host-0", "history": [{"step": step - 9 + i} | entry for i in range(STEPS_A_REPORT)],
                }  # fmt: skip
                write(lines, "report", trial, **report)
                write(lines, "checkpoint", trial, step=step, path=f"tune/trial-{trial:04}/checkpoint_{step:06}")
            write(lines, "end", trial, state="completed", reason=None)


def write(lines: object, event: str, trial: int, **fields: object) -> None:
    print(json.dumps({"event": event, "trial": trial, "time": 1795534418.973} | fields), file=lines)  # type: ignore


def seconds_of_frames(folder: Path, reports: int) -> float:
    start = time.perf_counter()
    run = open_run(folder)
    read = len(run.trials), len(run.reports)
    seconds = time.perf_counter() - start
    if read != (reports // REPORTS_A_TRIAL, reports):
        raise SystemExit(f"read {read} trials and reports of {reports}")
    return seconds


def seconds_of_json(folder: Path) -> float:
    start = time.perf_counter()
    with (folder / "trials.jsonl").open(encoding="utf-8") as lines:
        _ = [json.loads(line) for line in lines]
    return time.perf_counter() - start


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--reports", type=int, nargs="+", default=[1_000, 10_000, 100_000])
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as temporary:
        for reports in arguments.reports:
            folder = Path(temporary) / str(reports)
            write_run(folder, reports)
            ours, plain = [], []
            for _ in range(REPEATS):
                ours.append(seconds_of_frames(folder, reports))
                plain.append(seconds_of_json(folder))
            megabytes = (folder / "trials.jsonl").stat().st_size / 1e6
            row = {
                "reports": reports,
                "megabytes": round(megabytes, 1),
                "frames_s": round(statistics.median(ours), 3),
                "json_loads_s": round(statistics.median(plain), 3),
            }
            rows.append(row)
            print(" ".join(f"{key} {value:,}" for key, value in row.items()))
    if arguments.json:
        document = {"python": platform.python_version(), "repeats": REPEATS, "rows": rows}
        arguments.json.write_text(json.dumps(document, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
