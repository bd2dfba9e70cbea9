"""A W&B that misbehaves, on this machine."""

from __future__ import annotations

import itertools
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

FAULTS = ("refuses", "answers 500", "hangs", "hangs after a while")

SLOW = "is well, and slow"

WELL = 40
"""Requests that one answers that hangs after a while: those of a few trials."""

SLOW_S = 1.0
"""For each answer of a slow one."""

RUN = {"id": "1", "name": "run", "displayName": "run", "config": "{}", "historyLineCount": 0}

ANSWERS = {
    "Viewer": {"viewer": {"id": "1", "entity": "us", "username": "us", "email": "", "flags": "{}"}},
    "UpsertBucket": {
        "upsertBucket": {
            "bucket": RUN | {"project": {"id": "1", "name": "test", "entity": {"id": "1", "name": "us"}}},
            "inserted": True,
        }
    },
    "CreateRunFiles": {"createRunFiles": {"runID": "run", "uploadHeaders": [], "files": []}},
    "ArtifactType": {"project": None},
    "CreateArtifact": {
        "createArtifact": {
            "artifact": {"id": "1", "state": "COMMITTED", "artifactSequence": {"latestArtifact": None}},
        }
    },
}
"""By operation, all that W&B's client needs to record a sweep; to others an empty answer is enough (wandb 0.31)."""

OPERATION = re.compile(rb"(?:query|mutation) (\w+)")

KEY = "0123abcd" * 5
"""What it is shown."""


@contextmanager
def bad_wandb(fault: str, asked: Counter[str] | None = None) -> Iterator[dict[str, str]]:
    """The environment of a process that records online there.

    Args:
        fault: one of FAULTS, or SLOW.
        asked: counts the operations that it was asked for.
    """
    over = threading.Event()
    number = itertools.count()

    class Faulty(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            found = OPERATION.search(content)
            operation = found[1].decode() if found else ""
            if asked is not None:
                asked[operation] += 1
            if fault == SLOW or (fault == "hangs after a while" and next(number) < WELL):
                over.wait(SLOW_S if fault == SLOW else 0)
                self.answer(200, json.dumps({"data": ANSWERS.get(operation, {})}).encode())
                return
            if fault.startswith("hangs"):
                over.wait()
            self.answer(500, b"")

        do_GET = do_POST

        def answer(self, status: int, content: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, format: str, *values: object) -> None:
            pass

    class Server(ThreadingHTTPServer):
        def handle_error(self, request: object, client_address: object) -> None:
            """Whoever waited for an answer has given up."""

    server = Server(("127.0.0.1", 0), Faulty)
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
