"""Export of the study as one portable file."""

from __future__ import annotations

import shutil
import tempfile
import warnings
from pathlib import Path

from lora_search.errors import SweepError
from lora_search.export.page import Page, installed
from lora_search.export.trained import Trained
from lora_search.journal import JOURNAL, open_study

FILE = "study.db"


def write(trained: Trained, out: Path) -> Page:
    """Copy the study out of the run's journal into a SQLite database.

    Raises:
        SweepError: the run has no study, or its journal is damaged.
    """
    import optuna

    journal = trained.run.path / JOURNAL
    if not journal.is_file():
        raise SweepError(f"{journal}: is not there; --to optuna needs it")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        shutil.copy(journal, folder)  # opened, Optuna puts a lock beside it: the run is only read
        try:
            study = open_study(Path(folder))
            optuna.copy_study(
                from_study_name=study.study_name,
                from_storage=study._storage,
                to_storage=f"sqlite:///{Path(folder) / FILE}",  # `out` may hold what means something in a URL
                to_study_name=trained.spec.name,  # the journal's own may be anybody's text
            )
            shutil.move(Path(folder) / FILE, out / FILE)
        except SweepError:
            raise
        except Exception as error:  # whatever Optuna makes of a journal that is not its own
            raise SweepError(f"{journal}: is no study: {type(error).__name__}: {error}") from error
        trials = len(study.get_trials(deepcopy=False))
    return Page(
        title=f"The study of {trials} trials",
        commands=[
            "python -c 'import optuna; "
            f'print(optuna.load_study(study_name="{trained.spec.name}", storage="sqlite:///{FILE}").best_trial)\'',
            f"optuna-dashboard sqlite:///{FILE}",
        ],
        files={FILE: "the study, in Optuna's SQLite format"},
        made_for=installed("optuna", "sqlalchemy"),
        limits=[
            "A trial that ASHA stopped is PRUNED, with the values of all its report steps; one that failed is FAIL.",
            "Optuna keeps a list of module names as JSON text; the numbers of trials are those of the run.",
            "The study holds the searched parameters alone; what the sweep file fixes is in `--to yaml`.",
        ],
    )
