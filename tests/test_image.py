"""The image is built from its Dockerfile, and runs a sweep as the user that it names.

Needs root and buildah (Debian's package of that name), and python:3.11-slim-bookworm from a registry or at hand.
"""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator

import pytest
from conftest import ROOT

BASE = "docker.io/library/python:3.11-slim-bookworm"

SWEEP = """
name: image
search: {trials: 2, scheduler: {name: none}}
training: {steps: 4, eval_every: 2, batch_size: 2}
data: {limit: 60}
"""


def buildah(*arguments: str, given: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"BUILDAH_ISOLATION": "chroot"}  # no namespaces, of which not every machine has all
    return subprocess.run(["buildah", *arguments], input=given, capture_output=True, text=True, env=environment)


@pytest.fixture(scope="module")
def container() -> Iterator[str]:
    """Of the image as cluster/Dockerfile makes it."""
    if os.geteuid() != 0 or shutil.which("buildah") is None:
        pytest.skip("needs root and buildah (Debian's package of that name)")
    if (found := buildah("pull", "--policy", "missing", BASE)).returncode != 0:
        pytest.skip(f"needs {BASE}: {found.stderr.strip().splitlines()[-1]}")
    tag = "localhost/lora-search:tested"
    built = buildah("bud", "--file", "cluster/Dockerfile", "--tag", tag, str(ROOT))
    assert built.returncode == 0, built.stdout[-2000:] + built.stderr[-2000:]
    container = buildah("from", tag).stdout.strip()
    yield container
    buildah("rm", container)
    buildah("rmi", tag)


@pytest.mark.slow
def test_image_runs_a_sweep_without_rights_of_root(container: str) -> None:
    config = buildah("inspect", "--format", "{{.OCIv1.Config.User}} {{.OCIv1.Config.WorkingDir}}", container)
    assert config.stdout.split() == ["ray", "/home/ray"]
    tools = "ray lora-search gcc rsync ssh tmux wget"  # of Triton; of ray up; of KubeRay
    found = buildah(
        "run", container, "--", "bash", "-c", f"id -u; echo $RAY_AUTH_MODE $HOME; command -v {tools} | wc -l"
    )
    assert found.stdout.split() == ["1000", "token", "/home/ray", str(len(tools.split()))], found.stderr
    owners = buildah("run", container, "--", "stat", "--format", "%U", ".ray", ".cache/huggingface", ".cache")
    assert owners.stdout.split() == ["ray"] * 3, owners.stderr
    script = "cat > sweep.yaml; lora-search run sweep.yaml && lora-search results image --format csv"
    ran = buildah("run", container, "--", "bash", "-c", script, given=SWEEP)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    assert "is the best of 2" in ran.stdout
    assert ran.stdout.count(",completed,") == 2, ran.stdout
