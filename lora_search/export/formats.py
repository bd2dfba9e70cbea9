"""The forms that a trial is exported in. Imports nothing heavy: the command line lists them."""

from __future__ import annotations

FORMATS = {
    "yaml": "a sweep file of this one configuration, for `lora-search run`",
    "peft": "the adapter in PEFT's format: adapter_config.json and weights",
    "trl": "a script with TRL's SFTConfig and PEFT's LoraConfig",
    "transformers": "a script with transformers' TrainingArguments and PEFT's LoraConfig",
    "axolotl": "an Axolotl configuration",
    "llamafactory": "a LLaMA-Factory configuration",
    "torchtune": "a torchtune configuration",
    "unsloth": "a script with Unsloth's FastLanguageModel",
    "optuna": "the whole study as one SQLite file, which Optuna opens",
    "wandb": "a W&B sweep, narrowed around the best trials, with its program",
}
"""Name and meaning of each."""

LAYOUTS = {
    "vllm": "several adapters, and the command by which vLLM serves them on one base",
    "peft-multi": "several adapters, and a script by which PEFT switches them on one base",
}
"""Of those that hold several trials."""

SHOWN_TRIALS = 3
"""The best so many go into a layout where none are named."""
