"""The file of a run directory that holds its Optuna study."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.errors import SweepError

if TYPE_CHECKING:
    import optuna

JOURNAL = "study.journal"

JOURNAL_LOCK = f"{JOURNAL}.lock"
"""Optuna's, held while it writes a line."""


def open_study(folder: Path) -> optuna.Study:
    """The study of an existing run directory, to read.

    Raises:
        SweepError: there is none, or the file is no study.
    """
    import optuna

    file = folder / JOURNAL
    if not file.is_file():
        raise SweepError(f"{file}: there is no study")
    storage = journal_storage(folder)
    names = optuna.get_all_study_names(storage)
    if len(names) != 1:
        raise SweepError(f"{file}: has {len(names)} studies; should have one")
    return optuna.load_study(study_name=names[0], storage=storage)


def journal_storage(folder: Path) -> optuna.storages.JournalStorage:
    """Optuna's storage in a run directory; makes the file where there is none.

    Raises:
        SweepError: the file is no study.
    """
    import optuna
    from optuna.storages.journal import JournalFileBackend

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        try:
            return optuna.storages.JournalStorage(JournalFileBackend(str(folder / JOURNAL)))
        except OSError:
            raise
        except Exception as error:  # whatever Optuna makes of lines that are not its own
            raise SweepError(f"{folder / JOURNAL}: is no study: {type(error).__name__}: {error}") from error
