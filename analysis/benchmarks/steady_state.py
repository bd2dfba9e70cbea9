"""Tokens a second once training runs: a pack against PEFT one trial at a time, and against the base alone.

    python analysis/benchmarks/steady_state.py [--base builtin:demo] [--device cpu] [--json FILE]

Ways, alternating in one run, each in a process of its own that is set up once:
    pack N         N trials in the engine, one forward and one backward pass
    apart N        on a GPU: the same with a product for each trial's adapters, where one for all is to be had
    PEFT 1x2       the plain loop a user would write: one process, all threads, padded batches, one trial after another
    PEFT 2x1       the same in one process a core, side by side
    floor          the frozen base alone with dense weights, forward and backward to its input, no adapters, on the
                   flat tokens that the largest pack has
Tokens are real ones; padding is computed by whoever pads, and not counted. Imports neither Ray, Optuna nor W&B.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SEQUENCE = 512


@dataclass(frozen=True)
class Setting:
    """What is measured."""

    base: str
    data: str
    device: str
    dtype: str
    rank: int
    dropout: float
    batch_size: int
    seconds: float
    """Each way runs this long in each round, at least one step."""


@dataclass(frozen=True)
class Round:
    """One way's turn."""

    way: str
    tokens_per_second: float
    bytes: int
    """GPU: most allocated since the way was set up. CPU: proportional set size of its processes."""


def pack_step(setting: Setting, trials: int) -> Callable[[], int]:
    """A step of a pack; tokens trained on."""
    import torch
    from bases import make_base, make_data, trial

    from lora_search.engine import Engine, StepMetrics

    base = make_base(setting.base, setting.device, setting.dtype)
    lanes = min(torch.get_num_threads(), trials)  # as a host has them
    engine = Engine(base, make_data(setting.data, setting.base, SEQUENCE), lanes)
    names = [str(index) for index in range(trials)]
    for index, name in enumerate(names):
        engine.admit(name, trial(index, setting.rank, setting.dropout, setting.batch_size))

    def step() -> int:
        outcomes = engine.step(names)
        if any(not isinstance(outcome, StepMetrics) for outcome in outcomes.values()):
            raise RuntimeError(str(outcomes))
        return sum(outcome.tokens for outcome in outcomes.values() if isinstance(outcome, StepMetrics))

    return step


def apart_step(setting: Setting, trials: int) -> Callable[[], int]:
    """A step of a pack without grouped products."""
    from lora_search.engine import lora

    lora.multiplies_groups = lambda device, dtype: False
    return pack_step(setting, trials)


def peft_step(setting: Setting) -> Callable[[], int]:
    """A step of one PEFT trial in the plain loop."""
    import torch
    from bases import make_base, make_data, trial
    from peft import get_peft_model

    from lora_search.data import collate, training_rows
    from lora_search.engine.trial import lora_config
    from lora_search.targets import module_tree, resolve

    base = make_base(setting.base, setting.device, setting.dtype)
    data = make_data(setting.data, setting.base, SEQUENCE)
    config = trial(0, setting.rank, setting.dropout, setting.batch_size)
    model = get_peft_model(base.model, lora_config(config, resolve(module_tree(base.model), "all-linear")))
    model.train()
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=1e-3, fused=True)
    done = 0

    def step() -> int:
        nonlocal done
        rows = training_rows(len(data.train), 0, done * setting.batch_size, setting.batch_size)
        batch = collate(data.train, rows, data.pad_token_id).to(base.device)
        labels = batch.input_ids_BT.masked_fill(~batch.trained_BT, -100)
        with base.autocast:
            loss = model(input_ids=batch.input_ids_BT, attention_mask=batch.attention_mask_BT, labels=labels).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        done += 1
        loss.item()
        return batch.tokens

    return step


def floor_step(setting: Setting, trials: int) -> Callable[[], int]:
    """The dense frozen base over a pack's tokens, forward and backward to the embeddings."""
    import torch
    from bases import make_base, make_data
    from bitsandbytes.nn import Linear4bit
    from torch import nn

    from lora_search.data import flatten, training_rows
    from lora_search.engine.forward import PackedBase
    from lora_search.engine.layers import LinearSite
    from lora_search.engine.pack import Share

    base = make_base(setting.base, setting.device, setting.dtype)
    data = make_data(setting.data, setting.base, SEQUENCE)
    for path, module in list(base.model.named_modules()):
        if isinstance(module, Linear4bit):
            dense = nn.Linear(module.in_features, module.out_features, bias=False, device="meta")
            weight = LinearSite(0, module, base).weight_OI()
            dense.weight = nn.Parameter(weight, requires_grad=False)
            parent, _, last = path.rpartition(".")
            setattr(base.model.get_submodule(parent), last, dense)
    base.model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_())
    with base.autocast:
        packed = PackedBase(base, data.pad_token_id)
    base.model.train()
    done = 0

    def step() -> int:
        nonlocal done
        rows = [
            flatten(data.train, training_rows(len(data.train), seed, done, setting.batch_size))
            for seed in range(trials)
        ]
        done += setting.batch_size
        with base.autocast:
            packed.train(packed.pack([Share(row, None, None, 1 / len(row.targets_M)) for row in rows]))
        if setting.device == "cuda":
            torch.cuda.synchronize()
        return sum(len(row.tokens_N) for row in rows)

    return step


def worker(pipe: Connection, setting: Setting, way: str, threads: int) -> None:
    """A process that sets a way up, then runs it for a while whenever it is told to."""
    import torch
    from processes import proportional_bytes

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
    kind, _, count = way.partition(" ")
    make: dict[str, Callable[[], Callable[[], int]]] = {
        "pack": lambda: pack_step(setting, int(count)),
        "apart": lambda: apart_step(setting, int(count)),
        "PEFT": lambda: peft_step(setting),
        "floor": lambda: floor_step(setting, int(count)),
    }
    try:
        step = make[kind]()
        step()
    except torch.OutOfMemoryError:
        pipe.send("out of memory")
        return
    pipe.send("ready")
    while pipe.recv() == "go":
        start, tokens = time.perf_counter(), 0
        while not tokens or time.perf_counter() - start < setting.seconds:
            tokens += step()
        seconds = time.perf_counter() - start
        used = torch.cuda.max_memory_allocated() if setting.device == "cuda" else proportional_bytes()
        pipe.send((tokens / seconds, used))


class Way:
    """A way's processes."""

    def __init__(self, setting: Setting, name: str, processes: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self._pipes: list[Connection] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, setting, name, threads), daemon=True).start()
            theirs.close()  # so that a worker that dies is noticed
            self._pipes.append(ours)
        self.ready = all(pipe.recv() == "ready" for pipe in self._pipes)

    def turn(self) -> Round:
        """Run all processes side by side for a while."""
        for pipe in self._pipes:
            pipe.send("go")
        figures = [pipe.recv() for pipe in self._pipes]
        return Round(self.name, sum(speed for speed, _ in figures), sum(used for _, used in figures))

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send("end")


def measure(setting: Setting, packs: list[int], rounds: int) -> list[Round]:
    """All ways, alternating; on a GPU one is set up at a time, so that each has the device to itself."""
    cores = os.cpu_count() or 1
    ways = [("PEFT 1x2", 1, cores), *((f"pack {n}", 1, cores) for n in packs), (f"floor {max(packs)}", 1, cores)]
    if setting.device == "cpu":
        ways.insert(1, ("PEFT 2x1", cores, 1))
        standing = [Way(setting, *way) for way in ways]
        turns = [way.turn() for _ in range(rounds) for way in standing]
        for way in standing:
            way.end()
        return turns
    ways.insert(-1, (f"apart {max(packs)}", 1, cores))
    turns = []
    for given in ways:
        way = Way(setting, *given)
        if way.ready:
            turns += [way.turn() for _ in range(rounds)]
            way.end()
        else:
            print(f"{given[0]}: out of memory")
    return turns


def show(setting: Setting, rounds: list[Round]) -> dict[str, Any]:
    """Print the medians, and return them."""
    names = list(dict.fromkeys(round_.way for round_ in rounds))
    speed = {n: statistics.median(r.tokens_per_second for r in rounds if r.way == n) for n in names}
    used = {n: max(r.bytes for r in rounds if r.way == n) for n in names}
    plain = max(speed[name] for name in names if name.startswith("PEFT"))
    floor = next(speed[name] for name in names if name.startswith("floor"))
    title = (
        f"{setting.base}, batch {setting.batch_size}, rank {setting.rank}, dropout {setting.dropout}, {setting.dtype}"
    )
    table = Table(title=f"{title}, {setting.device}", title_justify="left")
    for column in ("way", "tokens/s", "against PEFT's best", "against the floor", "MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in names:
        ratios = (f"{speed[name] / plain:.2f}", f"{speed[name] / floor:.2f}")
        table.add_row(name, f"{speed[name]:,.0f}", *ratios, f"{used[name] >> 20:,}")
    Console(width=110).print(table)
    return {
        "setting": asdict(setting),
        "tokens_per_second": speed,
        "bytes": used,
        "rounds": [asdict(r) for r in rounds],
    }


def main() -> None:
    """Measure one setting."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="builtin:demo")
    parser.add_argument("--data", default="builtin:demo")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.05)
    parser.add_argument("--batch-size", type=int, default=4)
    parser.add_argument("--packs", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seconds", type=float, default=3.0)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    packs, rounds, file = given.pop("packs"), given.pop("rounds"), given.pop("json")
    setting = Setting(**given)
    found = show(setting, measure(setting, packs, rounds))
    if file:
        file.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
