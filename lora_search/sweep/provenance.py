"""provenance.json: what made the results of a run directory."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import lora_search
from lora_search.spec import SweepSpec

PACKAGES = (
    "ray",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "optuna",
    "datasets",
    "wandb",
    "pandas",
    "numpy",
)


def provenance(spec: SweepSpec) -> dict[str, Any]:
    """Versions, commit, seeds and machine, as known when a sweep starts; nothing of the user's environment."""
    return {
        "started": datetime.now(UTC).isoformat(timespec="seconds"),
        "lora_search": lora_search.__version__,
        "git_commit": _git_commit(),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "packages": {name: _version(name) for name in PACKAGES},
        "seeds": {"sampler": spec.search.sampler.seed, "training": spec.training.seed},
    }


def write_provenance(file: Path, facts: Mapping[str, Any]) -> None:
    file.write_text(json.dumps(facts, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _git_commit() -> str | None:
    """The commit of the working directory's repository: the sweep file's, as a rule."""
    try:
        answer = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=40", "--exclude=*"],
            capture_output=True,
            text=True,
            timeout=10,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return answer.stdout.strip() or None if answer.returncode == 0 else None
