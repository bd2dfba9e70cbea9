"""Merge an adapter into a published configuration with random weights, and verify it as `lora-search merge` does.

    python analysis/benchmarks/merge_verified.py CONFIG [--layers N] [--quantization nf4]

CONFIG is a folder with a config.json. Weights are random, in float32, on the CPU; the adapter of rank 16 on all linear
modules has a random B as well (standard deviation 0.01). Tokenizer and rows are the demo's, eight of them to validate.
Prints one line: losses, the largest difference of a logit after the merge has been loaded by a fresh process, the
logits' standard deviation, seconds, and the peak of this process's resident size.
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

from lora_search.builtin import model_folder
from lora_search.data import tokenize_data
from lora_search.engine.metrics import peak_memory_bytes
from lora_search.merge import Options, merge_adapter
from lora_search.model import load_tokenizer
from lora_search.spec import Base
from lora_search.spec.schema import Data
from lora_search.targets import module_tree, resolve

CPU = torch.device("cpu")


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("config", type=Path)
    arguments.add_argument("--layers", type=int, help="the first so many alone")
    arguments.add_argument("--quantization", choices=["none", "nf4"], default="none")
    given = arguments.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        measure(given.config, given.layers, given.quantization, Path(temporary))


def measure(config: Path, layers: int | None, quantization: str, folder: Path) -> None:
    parameters = write(config, layers, folder / "base", folder / "adapter")
    base = Base.model_validate(
        {"model": str(folder / "base"), "quantization": quantization, "compute_dtype": "float32"}
    )
    data = tokenize_data(
        Data(path="builtin:demo", limit=40, validation=0.2, test=0.1, max_length=256), load_tokenizer(base)
    )
    begun = time.monotonic()
    merged = merge_adapter(base, folder / "adapter", data, None, folder / "merged", CPU, Options())
    seconds = time.monotonic() - begun
    if merged.check is None:
        raise SystemExit("the merge was not verified")
    found = merged.check.same_weights
    peak = peak_memory_bytes([CPU])
    losses = ", ".join(f"{name} {loss:.5f}" for name, loss in merged.losses.items())
    way = "shard by shard" if merged.in_memory is None else "in memory"
    print(
        f"{config.name}, {parameters / 1e6:,.0f} M parameters, {quantization}, {way}: loss {losses} "
        f"(adapter {merged.adapter_loss:.5f}); largest difference of a logit {found.largest:.1e}, standard deviation "
        f"{found.spread:.2f}, same next token {found.same_choice:.1%}; {seconds:.0f} s, peak {peak / 1e6:,.0f} MB"
    )


def write(published: Path, layers: int | None, base: Path, adapter: Path) -> int:
    """A random base with its adapter; the base's number of parameters."""
    config = AutoConfig.from_pretrained(published)
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    model.save_pretrained(str(base))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(model_folder("demo") / name, base / name)
    targets = resolve(module_tree(model), "all-linear")
    is_conv1d = config.model_type == "gpt2"
    lora = LoraConfig(r=16, lora_alpha=32, target_modules=list(targets.modules), fan_in_fan_out=is_conv1d)
    adapted = get_peft_model(model, lora)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    adapted.save_pretrained(str(adapter))
    return parameters


if __name__ == "__main__":
    main()
