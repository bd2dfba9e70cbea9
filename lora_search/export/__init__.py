"""A trial as other tools read it: configurations, scripts, the adapter, the study. Never imports Ray."""

from lora_search.export.formats import FORMATS, LAYOUTS, SHOWN_TRIALS
from lora_search.export.page import shown_size
from lora_search.export.trained import Trained, describe
from lora_search.export.write import export_trial

__all__ = ["FORMATS", "LAYOUTS", "SHOWN_TRIALS", "Trained", "describe", "export_trial", "shown_size"]
