"""`lora-search merge`."""

from __future__ import annotations

import argparse
import json
import math
import sys
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lora_search.cli.out import local_path
from lora_search.cli.trials import chosen_trial, chosen_trials, require_trust
from lora_search.errors import InputError, SweepError, harmless
from lora_search.imports import import_libraries
from lora_search.results import run_rows
from lora_search.rundir import find_run
from lora_search.spec import load_spec

if TYPE_CHECKING:
    from lora_search.merge import Merged
    from lora_search.merge.together import Together

EXPLAINED = """\
The merged model is written shard by shard, so that a model larger than memory merges, and appears at DIR when it is
complete. Then it is loaded in a fresh process with transformers alone: its validation loss, its logits on held-out rows
and its greedy text are compared with those of the base with its adapter. Where the logits differ by more than rounding
explains, nothing is kept. Where the loss differs by more than --tolerance, DIR is kept, a warning printed, and the exit
status is 1. With --gguf the same model is written as DIR.gguf too, read back by transformers in that process, and its
logits and tokens compared with those of DIR.
"""


def add_arguments(command: argparse.ArgumentParser) -> None:
    """The options of `lora-search merge`, after RUN."""
    command.description = EXPLAINED
    which = command.add_mutually_exclusive_group()
    which.add_argument("--trial", default="best", metavar="ID|best")
    which.add_argument(
        "--trials",
        metavar="A,B|topK",
        help="combine several trials' adapters; kept where the validation loss improves on each, else the best is "
        "merged alone",
    )
    command.add_argument("--out", required=True, metavar="DIR", help="must not exist")
    command.add_argument(
        "--onto",
        choices=["auto", "original", "dequantized"],
        default="auto",
        help="the base's original weights, or what NF4 made of them, on which the adapter was trained; auto (default) "
        "measures both and keeps the better",
    )
    command.add_argument(
        "--dtype",
        choices=["auto", "float32", "float16", "bfloat16"],
        default="auto",
        help="of the weights on disk; default: as the base is published. Sums are made in float32",
    )
    command.add_argument(
        "--gguf",
        action="store_true",
        help="also write DIR.gguf, for llama.cpp, Ollama and LM Studio, in the same --dtype: of "
        "llama, mistral, qwen2, qwen3, gemma2 and gpt2 models; needs pip install 'lora-search[gguf]'",
    )
    command.add_argument(
        "--no-verify",
        action="store_true",
        help="neither load nor measure what was written: for a model larger than memory; needs --onto",
    )
    command.add_argument(
        "--tolerance", type=float, metavar="SHARE", help="relative difference in loss that is no warning; default: 0.01"
    )
    command.add_argument("--weights", metavar="X,Y", help="of --trials; default: equal, 1 together")
    command.add_argument(
        "--combine",
        metavar="METHOD,...",
        help="PEFT's methods to try with --trials: linear, ties, dare_linear, dare_ties, magnitude_prune (one rank), "
        "cat, svd, ties_svd, dare_linear_svd, dare_ties_svd, magnitude_prune_svd (any ranks); default: one of each "
        "kind",
    )
    command.add_argument("--density", type=float, metavar="SHARE", help="that ties and dare keep; default: 0.5")
    command.add_argument("--json", action="store_true", help="one JSON document")
    command.add_argument("--trust-remote-code", action="store_true", help="run code of the base's, if the run did")


def merge(arguments: argparse.Namespace) -> None:
    """Merge one trial's adapter, or several together, and say what it came to.

    Raises:
        SweepError: also where the merged model's loss is beyond the tolerance.
    """
    folder = local_path(arguments.out)
    directory = find_run(arguments.run)
    spec = load_spec(directory.spec)
    require_trust(directory, spec, trusts_code=arguments.trust_remote_code)
    _require_free(folder)
    if arguments.gguf and (beside := folder.with_name(f"{folder.name}.gguf")).exists():
        raise InputError(f"--gguf: {beside} exists already; name another --out")
    rows = run_rows(directory)
    if arguments.trials is None:
        chosen = [chosen_trial(directory, spec, rows, arguments.trial)]
    else:
        chosen = chosen_trials(directory, spec, rows, arguments.trials)
        if len(chosen) < 2:
            raise InputError(f"--trials {arguments.trials}: must name at least two trials, each once")
    numbers = [int(row["trial"]) for row in chosen]
    weights, methods, density = _recipe(arguments)
    tolerance = _share("--tolerance", arguments.tolerance, 0.01, math.inf)
    import_libraries()
    from lora_search.best import merge_trial, merge_trials
    from lora_search.merge import Options
    from lora_search.merge.together import Recipe

    options = Options(arguments.onto, arguments.dtype, not arguments.no_verify, tolerance, arguments.gguf)
    named = f"trial{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers))}"
    _say(f"merging {named} of {directory.place}")
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made: {error.strerror or error}") from None
    if arguments.no_verify:
        _say("WARNING: --no-verify: the merged model is NOT loaded, measured or compared")
    together: Together | None = None
    with redirect_stdout(sys.stderr):  # standard output is ours; libraries may print
        if arguments.trials is None:
            merged = merge_trial(spec, directory, numbers[0], folder, options, _say)
        else:
            recipe = Recipe(weights, methods, density)
            together, merged = merge_trials(spec, directory, numbers, recipe, folder, options, _say)
    if together is not None and not together.combined:
        named = together.name
    if arguments.json:
        print(json.dumps(_document(folder, numbers, merged, together), indent=2, ensure_ascii=sys.stdout.isatty()))
    else:
        print(harmless("\n".join(_lines(folder, named, merged, together))))
    if not merged.within_tolerance:
        raise SweepError(
            f"WARNING: the merged model's validation loss differs from the adapter's by {merged.drift:+.2%}, more than "
            f"--tolerance {tolerance:g}; it is at {folder}"
        )


def _require_free(folder: Path) -> None:
    """A folder is to be made.

    Raises:
        InputError: it is there, or cannot be.
    """
    try:
        is_taken = folder.exists()
    except OSError as error:
        raise InputError(f"--out {folder}: cannot be made: {error.strerror or error}") from None
    if is_taken:
        raise InputError(f"--out {folder}: exists already; name a folder that does not")


def _recipe(arguments: argparse.Namespace) -> tuple[list[float] | None, list[str] | None, float]:
    given = {name: getattr(arguments, name) for name in ("weights", "combine", "density")}
    if arguments.trials is None:
        for name, value in given.items():
            if value is not None:
                raise InputError(f"--{name}: is for several adapters; name them with --trials")
        return None, None, 0.5
    if arguments.no_verify:
        raise InputError("--trials: a combination is kept where it is better, and --no-verify measures nothing")
    try:
        weights = None if given["weights"] is None else [float(weight) for weight in given["weights"].split(",")]
    except ValueError:
        raise InputError(f"--weights {given['weights']}: must be numbers with commas between them") from None
    if weights is not None and not all(math.isfinite(weight) for weight in weights):
        raise InputError(f"--weights {given['weights']}: must be finite")
    methods = None if given["combine"] is None else given["combine"].split(",")
    return weights, methods, _share("--density", given["density"], 0.5, 1.0)


def _share(option: str, found: float | None, default: float, most: float) -> float:
    if found is None:
        return default
    if not 0 < found <= most or math.isinf(found):
        raise InputError(
            f"{option} {found:g}: must be above 0" + ("" if math.isinf(most) else f" and at most {most:g}")
        )
    return found


def _document(folder: Path, numbers: list[int], merged: Merged, together: Together | None) -> dict[str, Any]:
    combination = None
    if together is not None:
        combination = {"kept": together.name, "combined": together.combined, "losses": dict(together.losses)}
    return {"out": str(folder), "trials": numbers, "together": combination, **merged.to_dict()}


def _lines(folder: Path, named: str, merged: Merged, together: Together | None) -> list[str]:
    """What the user reads of a merge."""
    from lora_search.best import signed

    lines = []
    if together is not None:
        lines += [f"{name:<24} validation loss {loss:.4f}" for name, loss in together.losses.items()]
        better = "is better than each trial alone" if together.combined else "alone is better than every combination"
        lines.append(f"{together.name} {better}; it is merged")
    if merged.check is None or merged.adapter_loss is None or merged.loss is None or merged.drift is None:
        lines.append(f"{folder}: {named} merged onto the {merged.onto} weights; NOT verified, nothing was measured")
        return lines + _gguf_lines(folder, merged)
    ways = ", ".join(f"{way} {loss:.4f}" for way, loss in merged.losses.items())
    same, trained = merged.check.same_weights, merged.check.as_trained
    lines.append(
        f"{folder}: {named} merged onto the {merged.onto} weights; validation loss {merged.loss:.4f}, "
        f"{signed(merged.drift)} from the adapter's {merged.adapter_loss:.4f} (measured: {ways})"
    )
    lines.append(
        f"logits over {same.targets:,} held-out tokens: {same.mean:.1e} on average and {same.largest:.1e} at most from "
        f"the {merged.onto} weights with the adapter, {trained.mean:.1e} and {trained.largest:.1e} from the adapter as "
        f"trained; their standard deviation is {same.spread:.3g}; the same next token at {trained.same_choice:.1%}"
    )
    lines += [*_gguf_lines(folder, merged), *(f"note: {note}" for note in merged.notes)]
    for text in merged.check.texts:
        lines += ["", f"  prompt   {text.prompt!r}", f"  adapter  {text.adapter!r}", f"  merged   {text.merged!r}"]
    return lines


def _gguf_lines(folder: Path, merged: Merged) -> list[str]:
    """What the user reads of a GGUF file; nothing where there is none."""
    gguf = merged.gguf
    if gguf is None:
        return []
    line = f"{folder.with_name(gguf.file)}: architecture {gguf.architecture}, tokenizer {gguf.tokenizer}; "
    if gguf.logits is None:
        line += "NOT verified"
    else:
        line += (
            f"read back by transformers: logits {gguf.logits.mean:.1e} on average and {gguf.logits.largest:.1e} at "
            f"most from the folder's, the same tokens of all {gguf.rows:,} validation rows"
        )
    return [line, *(f"note: {note}" for note in gguf.notes)]


def _say(line: str) -> None:
    print(f"lora-search: {harmless(line)}", file=sys.stderr)
