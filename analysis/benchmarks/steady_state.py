"""Tokens a second once training runs: a pack against PEFT one trial at a time, and against the base alone.

    python analysis/benchmarks/steady_state.py [--base builtin:demo] [--device cpu] [--json FILE]

Ways, alternating in one run, each in a process of its own that is set up once (on a GPU, all packs in one):
    pack N         N trials in the engine, one forward and one backward pass
    hosts N        on a CPU: N trials over a process a core, as a sweep has them where there is no GPU
    apart N        on a GPU: the same with products for each trial's adapters, and not kernels for all
    PEFT 1x2       the plain loop a user would write: one process, all threads, padded batches, one trial after another
    PEFT 2x1       the same in one process a core, side by side
    floor N        the frozen base alone with dense weights, forward and backward to its input, no adapters, on the
                   flat tokens that the largest pack, of N, has; products and all else in the engine's dtypes
    floor N 2x1    on a CPU: the same over a process a core, as hosts are
Tokens are real ones; padding is computed by whoever pads, and not counted. Imports neither Ray, Optuna nor W&B.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from functools import partial
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
    checkpointing: bool
    """Gradient checkpointing, in the packs and in PEFT."""
    seconds: float
    """Each way runs this long in each round, at least one step."""


@dataclass(frozen=True)
class Round:
    """One way's turn."""

    way: str
    tokens_per_second: float
    bytes: int
    """GPU: most allocated in this turn. CPU: proportional set size of its processes."""


class Packs:
    """An engine, with as many resident trials as a way has."""

    def __init__(self, setting: Setting, trials: int) -> None:
        """
        Args:
            trials: of the largest pack.
        """
        import torch
        from bases import make_base, make_data

        from lora_search.engine import Engine, lora

        self._setting = setting
        lanes = min(torch.get_num_threads(), trials)  # as a host has them
        base = make_base(setting.base, setting.device, setting.dtype, setting.checkpointing)
        self._engine = Engine(base, make_data(setting.data, setting.base, SEQUENCE), lanes)
        self._fuses = lora.fuses

    def step(self, way: str, trials: int) -> Callable[[], int]:
        """A step of a pack; tokens trained on."""
        import torch
        from bases import trial

        from lora_search.engine import StepMetrics, lora

        setting, engine = self._setting, self._engine
        lora.fuses = self._fuses if way == "pack" else lambda device, dtype: False
        for name in engine.residents[trials:]:
            engine.release(name)
        for index in range(len(engine.residents), trials):
            engine.admit(str(index), trial(index, setting.rank, setting.dropout, setting.batch_size))

        def step() -> int:
            outcomes = engine.step(engine.residents)
            if engine.pack_limit is not None:
                engine.pack_limit = None
                raise torch.OutOfMemoryError("the pack does not fit at once")
            if any(not isinstance(outcome, StepMetrics) for outcome in outcomes.values()):
                raise RuntimeError(str(outcomes))
            return sum(outcome.tokens for outcome in outcomes.values() if isinstance(outcome, StepMetrics))

        return step


def peft_step(setting: Setting) -> Callable[[], int]:
    """A step of one PEFT trial in the plain loop."""
    import torch
    from bases import make_base, make_data, trial
    from peft import get_peft_model

    from lora_search.data import collate, training_rows
    from lora_search.engine.trial import lora_config
    from lora_search.targets import module_tree, resolve

    base = make_base(setting.base, setting.device, setting.dtype, setting.checkpointing)
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
            if setting.device == "cpu":  # where autocast would do more than products in bfloat16, and slowly
                dense.forward = partial(_product, weight_OI=weight)
            parent, _, last = path.rpartition(".")
            setattr(base.model.get_submodule(parent), last, dense)
    base.model.get_input_embeddings().register_forward_hook(lambda module, given, out: out.requires_grad_())
    autocast = base.autocast if setting.device == "cuda" else nullcontext()
    with autocast:
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
        with autocast:
            packed.train(packed.pack([Share(row, None, None, 1 / len(row.targets_M)) for row in rows]))
        if setting.device == "cuda":
            torch.cuda.synchronize()
        return sum(len(row.tokens_N) for row in rows)

    return step


def _product(x: Any, weight_OI: Any) -> Any:
    """x W^T in the weight's dtype, in that of x."""
    from torch.nn import functional

    return functional.linear(x.to(weight_OI.dtype), weight_OI).to(x.dtype)


def worker(pipe: Connection, setting: Setting, ways: Sequence[str], threads: int) -> None:
    """A process that sets its ways up, then runs one of them for a while whenever it is told to."""
    import torch
    from processes import proportional_bytes

    torch.set_num_threads(threads)
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
    counts = [way.split()[1] for way in ways]
    most = max((int(count) for count in counts if count.isdigit()), default=1)
    on_gpu, cores = setting.device == "cuda", os.cpu_count() or 1
    make: dict[str, Callable[[], Callable[[str], Callable[[], int]]]] = {
        "pack": lambda: partial(_pack_step, Packs(setting, most)),
        "hosts": lambda: partial(_pack_step, Packs(setting, most)),
        "PEFT": lambda: _always(peft_step(setting)),
        "floor": lambda: _always(floor_step(setting, most // (cores if ways[0].endswith("2x1") else 1))),
    }
    choose = make[ways[0].partition(" ")[0]]()
    pipe.send("ready")
    while (way := pipe.recv()) != "end":
        try:
            step = choose(way)
            if on_gpu:
                torch.cuda.reset_peak_memory_stats()
            step()
            start, tokens = time.perf_counter(), 0
            while not tokens or time.perf_counter() - start < setting.seconds:
                tokens += step()
            seconds = time.perf_counter() - start
        except torch.OutOfMemoryError:
            pipe.send(None)
        else:
            pipe.send((tokens / seconds, torch.cuda.max_memory_allocated() if on_gpu else proportional_bytes()))
        if on_gpu:
            torch.cuda.empty_cache()  # for the next process


def _pack_step(packs: Packs, way: str) -> Callable[[], int]:
    kind, count = way.split()
    if kind == "hosts":
        return packs.step("pack", int(count) // (os.cpu_count() or 1))
    return packs.step(kind, int(count))


def _always(step: Callable[[], int]) -> Callable[[str], Callable[[], int]]:
    return lambda way: step


class Workers:
    """The processes of one way, or on a GPU the one process of several."""

    def __init__(self, setting: Setting, ways: Sequence[str], processes: int, threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        self.ways = ways
        self._pipes: list[Connection] = []
        for _ in range(processes):
            ours, theirs = context.Pipe()
            context.Process(target=worker, args=(theirs, setting, ways, threads), daemon=True).start()
            theirs.close()  # so that a worker that dies is noticed
            self._pipes.append(ours)

    def wait(self) -> None:
        """Until all are set up."""
        for pipe in self._pipes:
            pipe.recv()

    def turn(self, way: str) -> Round | None:
        """Run all processes side by side for a while; None where memory does not suffice."""
        for pipe in self._pipes:
            pipe.send(way)
        figures = [figure for pipe in self._pipes if (figure := pipe.recv()) is not None]
        if len(figures) < len(self._pipes):
            return None
        return Round(way, sum(speed for speed, _ in figures), sum(used for _, used in figures))

    def end(self) -> None:
        for pipe in self._pipes:
            pipe.send("end")


def measure(setting: Setting, packs: list[int], rounds: int) -> list[Round]:
    """All ways, alternating."""
    cores = os.cpu_count() or 1
    floor = f"floor {max(packs)}"
    if setting.device == "cpu":
        given = [(["PEFT 1x2"], 1, cores), (["PEFT 2x1"], cores, 1)]
        given += [([f"pack {n}"], 1, cores) for n in packs]
        given += [([f"hosts {n}"], cores, 1) for n in packs if n >= cores]
        given += [([floor], 1, cores), ([f"{floor} 2x1"], cores, 1)]
    else:
        apart = [f"apart {max(packs)}"]
        given = [(["PEFT 1x2"], 1, cores), ([*(f"pack {n}" for n in packs), *apart], 1, cores), ([floor], 1, cores)]
    standing = [Workers(setting, *one) for one in given]
    for workers in standing:
        workers.wait()
    turns: list[Round] = []
    without: set[str] = set()
    for _ in range(rounds):
        for workers in standing:
            for way in workers.ways:
                if way not in without and (turn := workers.turn(way)) is not None:
                    turns.append(turn)
                elif way not in without:
                    without.add(way)
                    print(f"{way}: out of memory")
    for workers in standing:
        workers.end()
    return turns


def show(setting: Setting, rounds: list[Round]) -> dict[str, Any]:
    """Print the medians, and return them."""
    names = list(dict.fromkeys(round_.way for round_ in rounds))
    speed = {n: statistics.median(r.tokens_per_second for r in rounds if r.way == n) for n in names}
    used = {n: max(r.bytes for r in rounds if r.way == n) for n in names}
    plain = max(speed[name] for name in names if name.startswith("PEFT"))
    floor = max((speed[name] for name in names if name.startswith("floor")), default=math.nan)
    title = (
        f"{setting.base}, batch {setting.batch_size}, rank {setting.rank}, dropout {setting.dropout}, {setting.dtype}"
        f"{', gradient checkpointing' if setting.checkpointing else ''}, {device_name(setting.device)}"
    )
    table = Table(title=title, title_justify="left")
    for column in ("way", "tokens/s", "against PEFT's best", "against the floor", "MiB"):
        table.add_column(column, justify="left" if column == "way" else "right")
    for name in names:
        ratios = (f"{speed[name] / plain:.2f}", f"{speed[name] / floor:.2f}")
        table.add_row(name, f"{speed[name]:,.0f}", *ratios, f"{used[name] >> 20:,}")
    Console(width=110).print(table)
    return {
        "setting": asdict(setting),
        "device": device_name(setting.device),
        "tokens_per_second": speed,
        "bytes": used,
        "rounds": [asdict(r) for r in rounds],
    }


def device_name(device: str) -> str:
    if device == "cpu":
        return device
    import torch

    return torch.cuda.get_device_name()


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
    parser.add_argument("--checkpointing", action="store_true", help="gradient checkpointing, in the packs and in PEFT")
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
