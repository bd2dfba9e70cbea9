"""`lora-search dashboard`: optuna-dashboard on a copy of a run's study."""

from __future__ import annotations

import shutil
import tempfile
import threading
from pathlib import Path
from wsgiref.simple_server import WSGIRequestHandler, make_server

from lora_search.errors import InputError
from lora_search.journal import JOURNAL, journal_storage, open_study
from lora_search.rundir import find_run

LOOPBACK = "127.0.0.1"


class _Quiet(WSGIRequestHandler):
    """Says nothing of each request."""

    def log_message(self, format: str, *args: object) -> None:
        return


def dashboard(run: str, port: int) -> None:
    """Serve the dashboard until Ctrl-C, to this machine alone.

    It may write notes into the study, so that it gets a copy: a run directory may be somebody else's.

    Raises:
        InputError: optuna-dashboard is not installed, or the port cannot be had.
        SweepError: there is no study, or the file is none.
    """
    directory = find_run(run)
    try:
        from optuna_dashboard import wsgi
    except ImportError:
        raise InputError("dashboard: needs optuna-dashboard: pip install 'lora-search[dashboard]'") from None
    open_study(directory.path)
    with tempfile.TemporaryDirectory(prefix="lora-search-") as folder:
        shutil.copyfile(directory.path / JOURNAL, Path(folder) / JOURNAL)
        try:
            server = make_server(LOOPBACK, port, wsgi(journal_storage(Path(folder))), handler_class=_Quiet)
        except (OSError, OverflowError) as error:
            raise InputError(f"--port {port}: cannot be listened on: {error}") from None
        with server:
            print(f"http://{LOOPBACK}:{server.server_port}/  the study as it is now; Ctrl-C ends", flush=True)
            # On a thread of its own: wsgiref takes an interruption in the middle of a request for a fault of the page.
            serving = threading.Thread(target=server.serve_forever, daemon=True)
            serving.start()
            try:
                serving.join()
            finally:
                server.shutdown()
