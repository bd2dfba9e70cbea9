"""Peak memory of a merge as the model grows: shard by shard, and in memory as PEFT does it.

    python analysis/benchmarks/merge.py [--json FILE] [--layers 2,20,80]

Random Llamas of one width and growing depth, in bfloat16 and shards of at most 64 MiB, with a random adapter of rank 8
on all linear modules. Each merge runs in a process of its own; its peak is the kernel's (VmHWM in /proc/self/status),
with Python, torch, transformers, PEFT and bitsandbytes in it, and the pages of mapped files.
    imports                 the process before it merges: what does not grow
    shards, original        onto the original weights
    shards, dequantized     onto what NF4 makes of them
    in memory               PEFT's merge_and_unload in float32, saved by transformers
Nothing is verified, which would load the model whole.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

WAYS = ("shards, original", "shards, dequantized", "in memory")
SHARD_BYTES = 64 << 20
RANK = 8
SIZES = {"hidden_size": 1024, "intermediate_size": 2816, "num_attention_heads": 16, "num_key_value_heads": 16}


@dataclass(frozen=True)
class Figure:
    """One merge."""

    layers: int
    model_bytes: int
    largest_shard_bytes: int
    adapter_bytes: int
    way: str
    imports_bytes: int
    peak_bytes: int
    seconds: float


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    arguments.add_argument("--json", metavar="FILE")
    arguments.add_argument("--layers", default="2,20,80")
    arguments.add_argument("--one", nargs=2, metavar=("FOLDER", "WAY"), help=argparse.SUPPRESS)
    given = arguments.parse_args()
    if given.one:
        one(Path(given.one[0]), given.one[1])
        return
    figures: list[Figure] = []
    for layers in map(int, given.layers.split(",")):
        for figure in measure(layers):
            figures.append(figure)
            if given.json:
                Path(given.json).write_text(json.dumps([asdict(figure) for figure in figures], indent=1) + "\n")
    show(figures)


def measure(layers: int) -> Iterator[Figure]:
    """All ways of one depth."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        write_model(folder / "base", layers)
        write_adapter(folder / "base", folder / "adapter")
        shards = [file.stat().st_size for file in (folder / "base").glob("*.safetensors")]
        adapter = (folder / "adapter" / "adapter_model.safetensors").stat().st_size
        for way in WAYS:
            command = [sys.executable, __file__, "--one", str(folder), way]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            found = json.loads(said.splitlines()[-1])
            yield Figure(layers, sum(shards), max(shards), adapter, way, **found)


def one(folder: Path, way: str) -> None:
    """Merge once, and print what it took."""
    import bitsandbytes  # noqa: F401 - part of what does not grow
    import peft  # noqa: F401
    import torch

    from lora_search.merge import Options, merge_adapter
    from lora_search.merge.whole import merge_whole
    from lora_search.spec import Base

    base = Base(model=str(folder / "base"), quantization="nf4")
    imports, start = peak_bytes(), time.perf_counter()
    if way == "in memory":
        merge_whole(base, folder / "adapter", [], folder / "merged", torch.bfloat16, torch.device("cpu"))
    else:
        options = Options(onto="original" if way.endswith("original") else "dequantized", verify=False)
        out = folder / way.replace(", ", "-")
        merged = merge_adapter(base, folder / "adapter", None, None, out, torch.device("cpu"), options)
        if merged.in_memory is not None:
            sys.exit(f"was merged in memory: {merged.in_memory}")
    seconds = time.perf_counter() - start
    print(json.dumps({"imports_bytes": imports, "peak_bytes": peak_bytes(), "seconds": round(seconds, 2)}))


def peak_bytes() -> int:
    """The most memory that this process has had at once."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise OSError("the kernel tells no VmHWM")


def write_model(folder: Path, layers: int) -> None:
    """A random Llama, written shard by shard, with the demo's tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig

    from lora_search.builtin import model_folder
    from lora_search.merge.published import Stored, in_order, write_index, write_shard
    from lora_search.targets.skeleton import skeleton

    tokenizer = AutoTokenizer.from_pretrained(str(model_folder("demo")))
    config = LlamaConfig(vocab_size=len(tokenizer), num_hidden_layers=layers, **SIZES)
    config.architectures, config.dtype = ["LlamaForCausalLM"], torch.bfloat16
    folder.mkdir()
    config.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    groups: list[dict[str, tuple[int, ...]]] = [{}]
    left = SHARD_BYTES
    for name, tensor in skeleton(str(folder)).state_dict().items():
        if left < 2 * tensor.numel() and groups[-1]:
            groups.append({})
            left = SHARD_BYTES
        groups[-1][name] = tuple(tensor.shape)
        left -= 2 * tensor.numel()
    draw = torch.Generator().manual_seed(0)
    shards: dict[str, Mapping[str, Stored]] = {}
    for number, group in enumerate(groups, 1):
        file = f"model-{number:05d}-of-{len(groups):05d}.safetensors"
        shards[file] = in_order({name: Stored(file, shape, "BF16") for name, shape in group.items()})
        contents = (torch.randn(s.shape, generator=draw).mul_(0.02).bfloat16() for s in shards[file].values())
        write_shard(folder / file, shards[file], contents)
    write_index(folder, shards)


def write_adapter(base: Path, folder: Path) -> None:
    """A random adapter in PEFT's format."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from lora_search.targets import module_tree
    from lora_search.targets.skeleton import skeleton

    tree = module_tree(skeleton(str(base)))
    names = sorted({module.last for module in tree.modules})
    LoraConfig(r=RANK, lora_alpha=16, target_modules=names, task_type="CAUSAL_LM").save_pretrained(str(folder))
    draw = torch.Generator().manual_seed(1)
    tensors = {}
    for module in tree.modules:
        for which, shape in (("A", (RANK, module.in_features)), ("B", (module.out_features, RANK))):
            tensors[f"base_model.model.{module.name}.lora_{which}.weight"] = torch.randn(shape, generator=draw) * 0.02
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})


def show(figures: list[Figure]) -> None:
    table = Table(title="Peak memory of one merge, MB", title_justify="left")
    for name in ("weights", "largest shard", "adapter", *WAYS, "of which imports"):
        table.add_column(name, justify="right")
    for layers in dict.fromkeys(figure.layers for figure in figures):
        row = {figure.way: figure for figure in figures if figure.layers == layers}
        first = next(iter(row.values()))
        sizes = (first.model_bytes, first.largest_shard_bytes, first.adapter_bytes)
        peaks = [f"{row[way].peak_bytes / 1e6:,.0f} ({row[way].seconds:.1f} s)" for way in WAYS]
        table.add_row(*(f"{size / 1e6:,.0f}" for size in sizes), *peaks, f"{first.imports_bytes / 1e6:,.0f}")
    Console(width=140).print(table)


if __name__ == "__main__":
    main()
