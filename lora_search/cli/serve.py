"""`lora-search serve`."""

from __future__ import annotations

import signal
import sys
import tempfile
from pathlib import Path
from types import FrameType

from lora_search.cli.trials import chosen_trials, require_trust
from lora_search.errors import InputError, harmless
from lora_search.imports import import_libraries
from lora_search.results import best_row, ranked_rows, run_rows
from lora_search.rundir import find_run
from lora_search.spec import recorded_spec


def serve(run: str, *, trials: str | None, top: int, host: str, port: int, trusts_code: bool) -> None:
    """Answer requests until SIGINT or SIGTERM.

    Args:
        trusts_code: let the base run code of its own, if the run directory, which may be somebody else's, says so.
    """
    directory = find_run(run)
    spec = recorded_spec(directory.spec, needs_base=True)
    require_trust(directory, spec, trusts_code=trusts_code)
    rows = run_rows(directory)
    if trials is not None:
        chosen = chosen_trials(directory, spec, rows, trials)
    elif top < 1:
        raise InputError(f"--top {top}: must be at least 1")
    else:
        chosen = ranked_rows(rows, spec.search.metric, spec.search.mode)[:top]
        if not chosen:
            raise InputError(f"--top {top}: no trial of {directory.place} has come to a result")
    from lora_search.serve import collect_adapters
    from lora_search.serve.guard import is_loopback
    from lora_search.serve.http import Server

    signal.signal(signal.SIGTERM, _interrupt)
    with tempfile.TemporaryDirectory(prefix="lora-search-serve-") as folder:
        adapters, left_out = collect_adapters(directory, chosen, Path(folder))
        for reason in left_out:
            _say(f"left out: {reason}")
        with Server(host, port) as server:
            import_libraries()  # only now: that nothing can be served there, or nothing is there, has been told
            from lora_search.serve.answers import Endpoints
            from lora_search.serve.model import ServedModel, best_device

            device = best_device()
            _say(f"loading {spec.base.model} with {len(adapters)} adapters on {device}")
            best = best_row(rows, spec.search.metric, spec.search.mode)
            model = ServedModel(spec.base, adapters, None if best is None else int(best["trial"]), device)
            server.endpoints = Endpoints(spec, model)
            _say(f"models: {', '.join(model.adapters)}")
            _say(f"a chat is written by {server.endpoints.prompts.chat_format}")
            if not is_loopback(host):
                _say(
                    f"WARNING: {host} is no loopback address: whoever reaches this machine may ask, without a password"
                )
            _say(f"serving {directory.place} at {server.url}/v1; compare answers at {server.url}/ (Ctrl-C ends it)")
            try:
                server.serve_forever(poll_interval=0.2)
            except KeyboardInterrupt:
                _say("stopping")
            finally:
                model.close()


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _say(text: str) -> None:
    print(f"lora-search: {harmless(text)}", file=sys.stderr, flush=True)
