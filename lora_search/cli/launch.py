"""`lora-search launch`."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import redirect_stdout
from pathlib import Path
from typing import TYPE_CHECKING

from lora_search.cli.out import local_path
from lora_search.cli.plan import duration
from lora_search.spec import load_spec

if TYPE_CHECKING:
    from lora_search.launch import Launch


def launch(
    where: str,
    sweep: str,
    overrides: Sequence[str],
    *,
    nodes: int | None,
    gpus_per_node: int | None,
    gpu: str | None,
    time_limit: str | None,
    template: str | None,
    image: str | None,
    out: str | None,
    resumes: bool,
    submits: bool,
) -> None:
    """Write a sweep's launch file; what was assumed goes to standard error, the command to standard output."""
    spec = load_spec(sweep, overrides)
    from lora_search.launch import Wishes, compose, submit, write  # only now: a wrong sweep file has been told of

    with redirect_stdout(sys.stderr):  # standard output is ours; libraries may print
        found = compose(
            where,
            spec,
            Path(sweep),
            overrides,
            Wishes(nodes, gpus_per_node, gpu, time_limit),
            template=template,
            image=image,
            out=local_path(out) if out else None,
            resumes=resumes,
        )
    write(found)
    for line in _told(found):
        print(line, file=sys.stderr)
    print(found.command, flush=True)
    if submits:
        submit(found)


def _told(launch: Launch) -> Iterator[str]:
    size = launch.size
    many = f"{size.nodes} node{'s' * (size.nodes > 1)}"
    gpus = f"{size.gpus_per_node} x {size.gpu}" if size.gpu else "no GPU, taken to be as fast as this machine"
    yield f"{launch.out}: {many}, each with {gpus}"
    limit = duration(size.limit)
    if size.seconds is None:
        yield f"- Nothing was planned, as --nodes and --time-limit say all. Ended after {limit}."
        hours = f"{size.limit / 3600:.3g} h at most"
    else:
        yield f"- Expected: {duration(size.seconds)}, by `lora-search plan`. Ended after {limit}."
        hours = f"{size.seconds / 3600:.2g} h expected, {size.limit / 3600:.3g} h at most"
    if size.gpu:
        yield "- Assumed where you did not say: --gpu, --gpus-per-node, --nodes and --time-limit change it."
    yield f"- Cost: {size.nodes} x the hourly price of a {launch.machine} x {hours}; a head apart is paid besides."
    yield from (f"- {note}" for note in launch.notes)
    yield from (f"Edit {launch.out}:{number}: {line}" for number, line in launch.edits)
