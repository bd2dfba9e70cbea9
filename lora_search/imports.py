"""Importing what takes seconds (torch, transformers, PEFT, bitsandbytes; Ray Tune and Optuna) in fewer of them."""

from __future__ import annotations

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def import_libraries() -> None:
    """Import all that training needs; called by whoever is about to need them.

    bitsandbytes gives to `torch.compile` what it falls back to where it lacks a kernel
    (bitsandbytes/backends/default/ops.py), for which torch imports its compiler: 540 modules, 41 MB. Nothing here is
    compiled, unless the environment says TORCHDYNAMO_DISABLE=0.
    """
    if all(name in sys.modules for name in LIBRARIES):
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    with uncollected():
        for name in LIBRARIES:
            import_module(name)


@contextmanager
def uncollected() -> Iterator[None]:
    """Have the garbage collector pass over what is imported meanwhile, now and later.

    A fifth of the time would be the collector's, which finds nothing, again and again.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
