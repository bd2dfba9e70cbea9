"""Adapters of several trials as a folder that a real server takes: vLLM, or PEFT itself."""

from __future__ import annotations

import json
import re
import shlex
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lora_search.builtin import model_folder
from lora_search.checkpoint import ADAPTER_CONFIG
from lora_search.errors import InputError, harmless
from lora_search.export.fill import fill
from lora_search.export.page import code, code_cell
from lora_search.export.write import PAGE, complete_or_absent
from lora_search.results import Row, best_row, run_rows
from lora_search.rundir import RunDirectory
from lora_search.serve.adapters import BEST, ServedAdapter, collect_adapters
from lora_search.spec import SweepSpec

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)
"""What vLLM's --max-lora-rank takes (vllm/config/lora.py, MaxLoRARanks; older versions lack some)."""

VLLM_NF4 = "pip install vllm-bnb-plugin: from 0.27.2 on, vLLM has bitsandbytes in a plugin alone"
"""See vllm-project/vllm#43529. Without it `vllm serve` ends with `Unknown quantization method: bitsandbytes`."""


def write_layout(run: RunDirectory, spec: SweepSpec, trials: Sequence[Row], form: str, out: Path) -> list[str]:
    """Write `adapters/NAME/` for each trial, and README.md with how they are served, at `out`.

    The best of the run is called `best`, the others `trial-N`. A built-in base is copied beside them.

    Args:
        trials: their rows.
        form: one of LAYOUTS.

    Returns:
        Why trials that were asked for are left out: they have no checkpoint, or a damaged one.

    Raises:
        InputError: `out` is taken, or the engine can take none of the adapters.
        SweepError: `out` cannot be written.
    """
    best = best_row(run_rows(run), spec.search.metric, spec.search.mode)
    with complete_or_absent(out) as part:
        adapters, left_out = collect_adapters(run, trials, part / "adapters")
        names = {BEST if best and adapter.trial == best["trial"] else adapter.name: adapter for adapter in adapters}
        for name, adapter in names.items():
            if name != adapter.name:
                adapter.folder.rename(adapter.folder.with_name(name))
        base = _copy_base(spec, part)
        text = _vllm(spec, names, part, base) if form == "vllm" else _peft(spec, names, part, base)
        (part / PAGE).write_text(text, encoding="utf-8")
    return left_out


def vllm_rank(ranks: Sequence[int]) -> int:
    """The smallest --max-lora-rank that holds all adapters.

    Raises:
        InputError: an adapter is larger than any.
    """
    fitting = [allowed for allowed in VLLM_RANKS if allowed >= max(ranks)]
    if not fitting:
        raise InputError(f"--to vllm: found rank {max(ranks)}; vLLM serves up to {VLLM_RANKS[-1]}")
    return fitting[0]


def vllm_limits(config: Mapping[str, Any]) -> list[str]:
    """What vLLM cannot serve of an adapter, by its adapter_config.json; empty where nothing is known against it."""
    found = []
    targets = config.get("target_modules") or []
    names = [targets] if isinstance(targets, str) else list(targets)
    last = {str(name).rpartition(".")[2] for name in names}
    if config.get("target_parameters"):
        found.append("adapts fused weights of experts (`target_parameters`), which vLLM reads for few models")
    if last & {"lm_head", "embed_tokens", "wte", "embed_out"}:
        found.append("adapts the embedding or the output head, which current versions of vLLM refuse for most models")
    if last & {"c_attn", "c_proj", "c_fc"}:
        found.append("adapts GPT-2's modules; vLLM's GPT-2 takes no LoRA")
    if config.get("modules_to_save"):
        found.append("carries whole modules (`modules_to_save`), which vLLM refuses")
    if config.get("bias", "none") != "none":
        found.append("trains biases, which vLLM refuses")
    if config.get("use_dora"):
        found.append("is DoRA, which vLLM refuses")
    return found


def _vllm(spec: SweepSpec, names: Mapping[str, ServedAdapter], out: Path, base: str | None) -> str:
    configs = {name: _config(out, name) for name in names}
    limits = {name: vllm_limits(config) for name, config in configs.items()}
    able = [name for name in names if not limits[name]]
    if not able:
        reasons = "; ".join(f"{name} {reason}" for name, found in limits.items() for reason in found)
        raise InputError(f"--to vllm: vLLM can serve none of the adapters: {reasons}")
    command = [
        *("vllm", "serve", base or spec.base.model),
        *(["--revision", spec.base.revision] if spec.base.revision and base is None else []),
        *(["--trust-remote-code"] if spec.base.trust_remote_code else []),
        *(["--quantization", "bitsandbytes"] if spec.base.quantization == "nf4" else []),
        *("--enable-lora", "--max-lora-rank", str(vllm_rank([int(configs[name]["r"]) for name in able]))),
        *("--max-loras", str(len(able))),
        *("--lora-modules", *(f"{name}=adapters/{name}" for name in able)),
    ]
    hint = f"# {VLLM_NF4}\n" if spec.base.quantization == "nf4" else ""
    (out / "serve.sh").write_text(f"#!/bin/sh\n{hint}exec {shlex.join(command)}\n", encoding="utf-8")
    (out / "serve.sh").chmod(0o755)
    notes = [
        "Requests choose by `model`: the base's own name, or " + ", ".join(f"`{name}`" for name in able) + ".",
        _prompt_note(spec, "`/v1/chat/completions` writes"),
    ]
    if spec.base.quantization == "nf4":
        notes.append(
            "The adapters were trained on the base in 4-bit NF4; `--quantization bitsandbytes` gives vLLM a 4-bit base "
            f"too ({VLLM_NF4}). Without that option vLLM serves the original weights, on which an adapter's loss is "
            "another one: `lora-search merge` measures both."
        )
    notes += [f"`{name}` is not in the command: it {reason}." for name, found in limits.items() for reason in found]
    notes.append("Whether vLLM takes LoRA for this architecture at all is in its list of supported models.")
    return _page("Adapters for vLLM", spec, names, shlex.join(command), notes)


def _peft(spec: SweepSpec, names: Mapping[str, ServedAdapter], out: Path, base: str | None) -> str:
    values = {
        "base": base or spec.base.model,
        "revision": None if base else spec.base.revision,
        "trust_remote_code": spec.base.trust_remote_code,
        "nf4": spec.base.quantization == "nf4",
        "chat": spec.data.format == "chat",
        "names": list(names),
    }
    (out / "load_adapters.py").write_text(fill("load_adapters.py.txt", values), encoding="utf-8")
    first = next(iter(names))
    notes = [
        "The script loads the base once and all adapters beside it, and switches with `set_adapter(NAME)`; "
        "`disable_adapter()` is the base. PEFT's `adapter_names=[...]` in `generate` answers a batch of rows with an "
        "adapter each.",
        _prompt_note(spec, "the script writes"),
    ]
    return _page("Adapters for PEFT", spec, names, f'python load_adapters.py --model {first} "the prompt"', notes)


def _prompt_note(spec: SweepSpec, writer: str) -> str:
    """How a prompt has to be given to stand as in training."""
    match spec.data.format:
        case "chat":
            return f"The adapters were trained on chats: {writer} a user's message by the tokenizer's chat template."
        case "text":
            return "The adapters were trained on texts as they are: a prompt is the beginning of one."
        case _:
            return f"Give prompts as they stood in training: {_code(json.dumps(spec.data.template))}"


def _page(title: str, spec: SweepSpec, names: Mapping[str, ServedAdapter], command: str, notes: Sequence[str]) -> str:
    metric = spec.search.metric
    lines = [f"# {title}", "", f"From the sweep {_code(spec.name)} of the base {_code(spec.base.model)}.", ""]
    lines += [f"| adapter | trial | step | {metric} | rank | alpha | target modules |", "| --- " * 7 + "|"]
    for name, adapter in names.items():
        row = adapter.row
        shown = [
            adapter.trial,
            adapter.step,
            row.get(metric),
            row.get("rank"),
            row.get("alpha"),
            row.get("target_modules"),
        ]
        lines.append(f"| {name} | " + " | ".join(_code_cell(value) for value in shown) + " |")
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", command)), default=0))  # the base's name may be anybody's
    lines += ["", "Run in this folder:", "", f"{fence}sh", harmless(command), fence, ""]
    for note in notes:
        lines += [note, ""]
    return "\n".join(lines)


def _code(value: Any) -> str:
    return code(f"{value:.6g}" if isinstance(value, float) else value)


def _code_cell(value: Any) -> str:
    return code_cell(f"{value:.6g}" if isinstance(value, float) else value)


def _config(out: Path, name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((out / "adapters" / name / ADAPTER_CONFIG).read_bytes())
    return found


def _copy_base(spec: SweepSpec, out: Path) -> str | None:
    """Copy a built-in base beside the adapters; its name there, None where the base is not a built-in one."""
    if not spec.base.model.startswith("builtin:"):
        return None
    shutil.copytree(model_folder(spec.base.model.removeprefix("builtin:")), out / "base")
    return "base"
