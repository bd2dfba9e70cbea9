"""provenance.json: what made the results of a run directory."""

from __future__ import annotations

import json
import platform
import subprocess
import uuid
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from lora_search.job import scheduled_job
from lora_search.rundir import write_whole
from lora_search.spec import SweepSpec
from lora_search.versions import versions

KINDS = {"id": str, "started": str, "resumed": list, "data": dict, "base": dict, "conclusion": dict}
"""What is read again when a sweep is resumed."""


def provenance(spec: SweepSpec, before: Mapping[str, Any], recorded: float = 0.0) -> dict[str, Any]:
    """Versions, commit, seeds and machine, as known when a sweep starts; of the environment, the scheduler's job alone.

    Args:
        before: what was written when the sweep was started, where it is resumed; kept are the sweep's id and the
            starts of all its processes.
        recorded: the last time in its record, in seconds since 1970; it is not resumed before that, whatever the clock
            of this machine says.
    """
    now = datetime.now(UTC)
    resumed = max(now, datetime.fromtimestamp(recorded, UTC)).isoformat()
    return {
        "id": before.get("id") or uuid.uuid4().hex[:12],
        "started": before.get("started", now.isoformat(timespec="seconds")),
        "resumed": [*before.get("resumed", ()), *([resumed] if before else [])],
        "job": scheduled_job(),
        "git_commit": _git_commit(),
        "platform": platform.platform(),
        "packages": versions(),
        "seeds": {"sampler": spec.search.sampler.seed, "training": spec.training.seed},
    }


def read_provenance(file: Path) -> dict[str, Any]:
    """What `write_provenance` wrote; nothing where it is not there, or damaged."""
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    facts = found if isinstance(found, dict) else {}
    return {key: value for key, value in facts.items() if isinstance(value, KINDS.get(key, object))}


def write_provenance(file: Path, facts: Mapping[str, Any]) -> None:
    write_whole(file, json.dumps(facts, indent=2, ensure_ascii=False) + "\n")


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
