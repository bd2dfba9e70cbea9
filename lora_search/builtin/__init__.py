"""What the package ships: a small pretrained base and a small instruction data set, under `builtin:NAME`."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).parent
_NAMES = ("demo",)


def model_folder(name: str) -> Path:
    """The folder of a built-in base, in Hugging Face format.

    Raises:
        KeyError: there is none of that name; the message names those there are.
    """
    return _known(name) / "model"


def data_file(name: str) -> Path:
    """The JSONL file of a built-in data set.

    Raises:
        KeyError: there is none of that name; the message names those there are.
    """
    return _known(name) / "data.jsonl"


def _known(name: str) -> Path:
    if name not in _NAMES:
        raise KeyError(f"allowed: {', '.join('builtin:' + known for known in _NAMES)}")
    return _HERE / name
