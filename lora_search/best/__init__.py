"""The best trial: its adapter exported, tested, merged and described. Never imports Ray."""

from lora_search.best.card import interval, merge_line, merged_loss, signed, write_card
from lora_search.best.conclude import (
    Conclusion,
    export_adapter,
    merge_ahead,
    merge_best,
    merge_trial,
    merge_trials,
    test_adapter,
    train_again,
    write_config,
)

__all__ = [
    "Conclusion",
    "export_adapter",
    "interval",
    "merge_ahead",
    "merge_best",
    "merge_line",
    "merge_trial",
    "merge_trials",
    "merged_loss",
    "signed",
    "test_adapter",
    "train_again",
    "write_card",
    "write_config",
]
