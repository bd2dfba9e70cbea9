"""Importing torch, transformers, PEFT and bitsandbytes, which takes seconds, in two thirds of them."""

from __future__ import annotations

import gc
import os
import sys
from importlib import import_module

LIBRARIES = ("torch", "transformers", "peft", "bitsandbytes")


def import_libraries() -> None:
    """Import all of them; called by whoever is about to need them.

    A fifth of the time would be the garbage collector's, which finds nothing, again and again; it need never look at
    those modules later either. And bitsandbytes gives to `torch.compile` what it falls back to where it lacks a kernel
    (bitsandbytes/backends/default/ops.py), for which torch imports its compiler: 540 modules, 41 MB. Nothing here is
    compiled, unless the environment says TORCHDYNAMO_DISABLE=0.
    """
    if all(name in sys.modules for name in LIBRARIES):
        return
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")
    gc.disable()
    try:
        for name in LIBRARIES:
            import_module(name)
    finally:
        gc.freeze()
        gc.enable()
