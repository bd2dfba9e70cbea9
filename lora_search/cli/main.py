"""The command line: arguments, and errors into exit statuses."""

from __future__ import annotations

import argparse
import atexit
import logging
import os
import sys
import warnings
from collections.abc import Sequence
from typing import NoReturn

import lora_search
from lora_search.cli.merge import add_arguments as add_merge_arguments
from lora_search.errors import InputError, Interrupted, SweepError, harmless
from lora_search.export.formats import FORMATS, LAYOUTS

DONE, FAILED, WRONG_INPUT, INTERRUPTED = 0, 1, 2, 130


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the process's exit status."""
    arguments = _parser().parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # tells of kernels for inference, which nothing here uses
    logging.getLogger("huggingface_hub.utils._http").addFilter(_Once())  # says of each of ten tries that it failed
    warnings.simplefilter("ignore", FutureWarning)  # what libraries tell each other
    try:
        return _dispatch(arguments)
    except InputError as error:
        print(f"lora-search: {harmless(str(error))}", file=sys.stderr)
        return WRONG_INPUT
    except (KeyboardInterrupt, Interrupted) as error:
        print(f"lora-search: {str(error) or 'interrupted'}", file=sys.stderr)
        return INTERRUPTED
    except SweepError as error:
        print(f"lora-search: {harmless(str(error))}", file=sys.stderr)
        return FAILED
    except BrokenPipeError:  # the reader of our output has gone, as `head` does
        sys.stderr.close()
        return DONE


def command() -> NoReturn:
    """`lora-search`, as a process.

    One that was interrupted leaves the destructors of Ray's C++ out: where that was as Ray started, its threads may be
    at work still, and the status would be SIGSEGV's (Ray 2.60).
    """
    status = main()
    if status == INTERRUPTED:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    sys.exit(status)


class _Once(logging.Filter):
    """Lets the first message through, as ours: that the model hub does not answer, and is asked again for a while."""

    said = False

    def filter(self, record: logging.LogRecord) -> bool:
        if not self.said:
            print(f"lora-search: {harmless(record.getMessage())}; asking again", file=sys.stderr)
        self.said = True
        return False


def _dispatch(arguments: argparse.Namespace) -> int:
    match arguments.command:
        case "run":
            from lora_search.cli import run

            run.run(
                arguments.sweep,
                arguments.set,
                name=arguments.name,
                address=arguments.address,
                resume=arguments.resume,
            )
        case "plan":
            from lora_search.cli import plan

            plan.plan(arguments.sweep, arguments.set, as_json=arguments.json)
        case "launch":
            from lora_search.cli import launch

            launch.launch(
                arguments.on,
                arguments.sweep,
                arguments.set,
                nodes=arguments.nodes,
                gpus_per_node=arguments.gpus_per_node,
                gpu=arguments.gpu,
                time_limit=arguments.time_limit,
                template=arguments.template,
                image=arguments.image,
                out=arguments.out,
                resumes=arguments.resume,
                submits=arguments.submit,
            )
        case "status":
            from lora_search.cli import results

            results.status(arguments.run, as_json=arguments.json)
        case "results":
            from lora_search.cli import results

            results.results(arguments.run, arguments.format, arguments.out)
        case "report":
            from lora_search.cli import report

            report.report(arguments.run, arguments.out)
        case "dashboard":
            from lora_search.cli import dashboard

            dashboard.dashboard(arguments.run, arguments.port)
        case "merge":
            from lora_search.cli import merge

            merge.merge(arguments)
        case "export":
            from lora_search.cli import export

            export.export(
                arguments.run,
                arguments.trial,
                arguments.trials,
                arguments.to,
                arguments.out,
                trusts_code=arguments.trust_remote_code,
            )
        case "serve":
            from lora_search.cli import serve

            serve.serve(
                arguments.run,
                trials=arguments.trials,
                top=arguments.top,
                host=arguments.host,
                port=arguments.port,
                trusts_code=arguments.trust_remote_code,
            )
        case "doctor":
            from lora_search.cli import doctor

            doctor.doctor(arguments.address, arguments.output, as_json=arguments.json)
        case "targets":
            from lora_search.cli import targets

            targets.targets(arguments.model, as_json=arguments.json)
    return DONE


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="lora-search", description="Search LoRA and QLoRA hyperparameters over a cluster of GPUs."
    )
    parser.add_argument("--version", action="version", version=f"lora-search {lora_search.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run a sweep to the end: search, test, merge")
    _add_sweep(run)
    run.add_argument("--name", help="name of the run directory; default: the sweep's, numbered where it is taken")
    run.add_argument("--address", help="of a Ray cluster; default: RAY_ADDRESS, else one is started on this machine")
    run.add_argument("--resume", action="store_true", help="go on with the newest run of that name, if there is one")

    plan = commands.add_parser("plan", help="what a sweep will cost: memory, trials per GPU, steps, time; no training")
    _add_sweep(plan)
    plan.add_argument("--json", action="store_true", help="one JSON document")

    _add_launch(commands.add_parser("launch", help="write a sweep's launch file for a cluster, and the command for it"))

    status = commands.add_parser("status", help="where a running or finished sweep stands")
    _add_run(status)
    status.add_argument("--json", action="store_true", help="one JSON document")

    results = commands.add_parser("results", help="the trials as a table")
    _add_run(results)
    results.add_argument(
        "--format",
        choices=["table", "csv", "json", "parquet"],
        default="table",
        help="default: table; csv has a ' before text that a spreadsheet would run as a formula",
    )
    results.add_argument("--out", metavar="FILE", help="write there instead of to standard output")

    report = commands.add_parser("report", help="one self-contained page of charts and tables")
    _add_run(report)
    report.add_argument("--out", metavar="FILE.html", help="default: report.html in the run directory")

    dashboard = commands.add_parser("dashboard", help="open optuna-dashboard on a run's study, on this machine alone")
    _add_run(dashboard)
    dashboard.add_argument("--port", type=int, default=8080, help="default: 8080; 0 takes a free one")

    merge_command = commands.add_parser("merge", help="merge a trial's adapter into a standard model")
    _add_run(merge_command)
    add_merge_arguments(merge_command)

    _add_export(commands)

    serve = commands.add_parser("serve", help="answer OpenAI-compatible requests from the base and a run's adapters")
    _add_run(serve)
    which = serve.add_mutually_exclusive_group()
    which.add_argument("--top", type=int, default=3, metavar="K", help="serve the K best trials; default: 3")
    which.add_argument("--trials", metavar="A,B", help="serve these trials instead")
    serve.add_argument("--port", type=int, default=8000, help="default: 8000; 0: any that is free")
    serve.add_argument("--host", default="127.0.0.1", help="default: 127.0.0.1, which this machine alone reaches")
    serve.add_argument("--trust-remote-code", action="store_true", help="run code of the base's, if the run did")

    doctor = commands.add_parser("doctor", help="what this machine and a cluster can do, and what is missing")
    doctor.add_argument("--address", help="of a Ray cluster to look at too; default: RAY_ADDRESS")
    doctor.add_argument(
        "--output", default="runs", metavar="FOLDER", help="where runs are to be written; default: runs"
    )
    doctor.add_argument("--json", action="store_true", help="one JSON document")

    targets = commands.add_parser("targets", help="a model's linear modules and the target sets they make")
    targets.add_argument("model", metavar="MODEL", help="a hub id, a local folder, or builtin:NAME")
    targets.add_argument("--json", action="store_true", help="one JSON document")
    return parser


def _add_sweep(command: argparse.ArgumentParser) -> None:
    command.add_argument("sweep", metavar="SWEEP.yaml")
    command.add_argument(
        "--set", action="append", default=[], metavar="key.path=value", help="lay a value over the sweep file's"
    )


def _add_export(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    export = commands.add_parser(
        "export",
        help="write a trial, or several, for another tool",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="formats:\n" + "\n".join(f"  {name:13} {meaning}" for name, meaning in (FORMATS | LAYOUTS).items()),
    )
    _add_run(export)
    export.add_argument("--trial", metavar="ID|best", help="default: best")
    export.add_argument("--trials", metavar="A,B|topK", help=f"of {' and '.join(LAYOUTS)}; default: the best three")
    export.add_argument("--to", required=True, metavar="FORMAT", choices=FORMATS | LAYOUTS, help="one of those below")
    export.add_argument("--out", required=True, metavar="DIR", help="must not be there, or be empty")
    export.add_argument("--trust-remote-code", action="store_true", help="run code of the base's, if the run did")


def _add_launch(command: argparse.ArgumentParser) -> None:
    command.add_argument("--on", required=True, choices=["slurm", "kuberay", "ray", "skypilot"])
    _add_sweep(command)
    command.add_argument("--out", metavar="FILE", help="the launch file; default: NAME.PLATFORM in this folder")
    command.add_argument("--nodes", type=int, metavar="N", help="default: enough for a working day, by the plan")
    command.add_argument("--gpus-per-node", type=int, metavar="N", help="default: hosts.gpus_per_host")
    command.add_argument("--gpu", metavar="NAME", help="such as L4 or H100; default: the smallest that fits")
    command.add_argument("--time-limit", metavar="TIME", help="such as 90m, 8h or 2d; default: twice the plan's")
    command.add_argument("--template", metavar="FILE", help="an edited copy of a file of cluster/, or its name there")
    command.add_argument("--image", metavar="REF", help="container image with lora-search; default: the template's")
    command.add_argument("--resume", action="store_true", help="go on with the newest run of that name")
    command.add_argument("--submit", action="store_true", help="run the command too")


def _add_run(command: argparse.ArgumentParser) -> None:
    command.add_argument("run", metavar="RUN", help="a run directory or its URI, or its name under runs/")
