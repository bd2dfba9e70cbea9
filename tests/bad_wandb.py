"""A W&B that misbehaves, on this machine."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("refuses", "answers 500", "hangs")

KEY = "0123abcd" * 5
"""What it is shown."""


@contextmanager
def bad_wandb(fault: str) -> Iterator[dict[str, str]]:
    """The environment of a process that records online there."""
    over = threading.Event()

    class Faulty(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            if fault == "hangs":
                over.wait()
            self.send_response(500)
            self.end_headers()

        do_GET = do_POST

        def log_message(self, format: str, *values: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Faulty)
    server.daemon_threads = True
    if fault == "refuses":
        server.server_close()
    else:
        threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield {"WANDB_BASE_URL": f"http://127.0.0.1:{server.server_port}", "WANDB_API_KEY": KEY}
    finally:
        over.set()
        if fault != "refuses":
            server.shutdown()
            server.server_close()
