"""The search: an Optuna study in the run directory, and the searcher through which Ray Tune asks it."""

from lora_search.search.searcher import StudySearcher
from lora_search.search.study import create_study

__all__ = ["StudySearcher", "create_study"]
