"""Versions of what decides a result, here or on a node."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version

PACKAGES = (
    "lora-search",
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

ON_EVERY_NODE = ("python", "lora-search", "ray", "torch", "transformers", "peft", "bitsandbytes", "datasets", "numpy")
"""Where these differ between nodes, so may a trial's result, by which node it happened to run on."""


def versions() -> dict[str, str | None]:
    """Of Python and the packages, by name; None where one is not installed. Imports none of them."""
    return {"python": platform.python_version(), **{name: _version(name) for name in PACKAGES}}


def differences(here: Mapping[str, str | None], there: Mapping[str, str | None]) -> list[str]:
    """What is another version there, of what must be the same on every node."""
    return [
        f"{name} {there.get(name) or 'missing'} (here {here.get(name) or 'missing'})"
        for name in ON_EVERY_NODE
        if without_build(here.get(name)) != without_build(there.get(name))
    ]


def without_build(found: str | None) -> str | None:
    """A version without its build: torch 2.13.0+cu130 on the GPU nodes and 2.13.0+cpu on the head are one version."""
    return None if found is None else found.partition("+")[0]


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
