"""The server: OpenAI's paths and the comparison page over HTTP, from the standard library alone."""

from __future__ import annotations

import json
import logging
import select
import socket
from collections.abc import Callable
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import TYPE_CHECKING, Any

import lora_search
from lora_search.errors import InputError
from lora_search.serve.fault import RequestFault
from lora_search.serve.guard import require_own_site
from lora_search.serve.requests import ChatRequest, CompletionRequest, parse_request

if TYPE_CHECKING:  # imports torch, and an address that cannot be listened on is told of before
    from lora_search.serve.answers import Endpoints

MOST_BYTES = 1 << 20
"""Of a request's body."""

SILENCE_S = 60
"""How long a connection may stand still."""

PAGE = Path(__file__).parent / "page"

FILES = {
    "/": ("index.html", "text/html; charset=utf-8"),
    "/page.css": ("page.css", "text/css; charset=utf-8"),
    "/page.js": ("page.js", "text/javascript; charset=utf-8"),
}

GET, POST = "GET", "POST"
METHODS = dict.fromkeys((*FILES, "/v1/models", "/healthz"), GET) | {
    "/v1/completions": POST,
    "/v1/chat/completions": POST,
}

SAFE = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; "
    "img-src data:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
}
"""Headers of every answer: the page loads nothing from elsewhere, and stands in no other site's frame."""

log = logging.getLogger(__name__)


class Server(ThreadingHTTPServer):
    """A thread a connection; the model answers one request at a time."""

    daemon_threads = True
    request_queue_size = 128

    endpoints: Endpoints
    """To be set before `serve_forever`: the address is taken first, since a base may take minutes to load."""

    def __init__(self, host: str, port: int) -> None:
        """
        Raises:
            InputError: the address cannot be listened on.
        """
        self.host = host
        self.address_family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            super().__init__((host, port), _Handler)
        except (OSError, OverflowError) as error:
            raise InputError(f"--host {host} --port {port}: cannot listen there: {error}") from None

    @property
    def url(self) -> str:
        name = f"[{self.host}]" if ":" in self.host else self.host
        return f"http://{name}:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that broke ends, and nothing else."""
        log.debug("connection from %s broke", client_address, exc_info=True)


class _Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    server_version = f"lora-search/{lora_search.__version__}"
    sys_version = ""
    timeout = SILENCE_S

    _streams = False
    """Whether a stream has begun, and its status been sent."""

    def do_GET(self) -> None:
        self._guarded(self._get)

    def do_POST(self) -> None:
        self._guarded(self._post)

    def do_HEAD(self) -> None:
        self._guarded(self._get)

    def do_OPTIONS(self) -> None:
        self._guarded(self._get)  # no preflight is ever granted: other sites' pages get 405

    def log_message(self, format: str, *args: Any) -> None:
        log.info("%s " + format, self.client_address[0], *args)

    def send_error(self, code: int, message: str | None = None, explain: str | None = None) -> None:
        """What the standard library finds wrong, in OpenAI's shape too."""
        self._fault(RequestFault(int(code), message or HTTPStatus(code).phrase))

    def _guarded(self, answer: Callable[[str], None]) -> None:
        try:
            require_own_site(self.headers.get("Host", ""), self.headers.get("Origin"), self.server.host)
            path = self.path.partition("?")[0]
            allowed = METHODS.get(path)
            if allowed is None:
                raise RequestFault(404, f"path: found {path[:80]!r}; served are {', '.join(METHODS)}")
            if allowed != (GET if self.command == "HEAD" else self.command):
                raise RequestFault(405, f"{path} takes {allowed}; found {self.command}")
            answer(path)
        except RequestFault as fault:
            self._fault(fault)
        except (ConnectionError, TimeoutError):  # whoever asked has gone
            self.close_connection = True
        except Exception as error:  # a fault in one request, whatever it is, must not end the server for others
            log.exception("a request failed")
            self._fault(RequestFault(500, f"the request failed: {type(error).__name__}: {str(error)[:300]}"))
        finally:
            self._streams = False  # the connection may be kept for another request

    def _has_gone(self) -> bool:
        """Whether the connection's other end is closed; does not wait, and takes nothing of what has come."""
        try:
            poll = select.poll()
            poll.register(self.connection, select.POLLIN)
            return bool(poll.poll(0)) and self.connection.recv(1, socket.MSG_PEEK) == b""
        except (OSError, ValueError):  # a closed socket has no number to register
            return True

    def _get(self, path: str) -> None:
        if path in FILES:
            name, kind = FILES[path]
            self._send(200, (PAGE / name).read_bytes(), kind)
        elif path == "/healthz":
            self._send_json(200, {"status": "ok"})
        else:
            self._send_json(200, self.server.endpoints.models())

    def _post(self, path: str) -> None:
        body = self._body()
        endpoints = self.server.endpoints
        if path == "/v1/completions":
            completion = parse_request(CompletionRequest, body)
            self._answer(bool(completion.stream), lambda send: endpoints.complete(completion, send, self._has_gone))
        else:
            chat = parse_request(ChatRequest, body)
            self._answer(bool(chat.stream), lambda send: endpoints.chat(chat, send, self._has_gone))

    def _answer(
        self, streams: bool, ask: Callable[[Callable[[dict[str, Any]], None] | None], dict[str, Any] | None]
    ) -> None:
        if not streams:
            self._send_json(200, ask(None) or {})
            return
        ask(self._send_event)
        self._event("[DONE]")
        self._chunk(b"")

    def _body(self) -> bytes:
        if self.headers.get_content_type() != "application/json":
            raise RequestFault(415, f"Content-Type: found {self.headers.get('Content-Type')!r}; send application/json")
        length = self.headers.get("Content-Length", "")
        if self.headers.get("Transfer-Encoding") is not None or not (length.isascii() and length.isdigit()):
            raise RequestFault(411, "Content-Length: must say how long the body is")
        if len(length) > 12 or int(length) > MOST_BYTES:
            raise RequestFault(413, f"the body has {length[:20]} bytes; at most {MOST_BYTES:,} are read")
        body = self.rfile.read(int(length))
        if len(body) < int(length):
            raise ConnectionError("the body was cut off")
        return body

    def _fault(self, fault: RequestFault) -> None:
        try:
            if self._streams:
                self._event(json.dumps(fault.body()))
                self._chunk(b"")
                self.close_connection = True
                return
            if self.command != GET or fault.status >= 500:
                self.close_connection = True  # a body that nobody has read may still be on its way
            self._send_json(fault.status, fault.body())
        except (ConnectionError, TimeoutError):
            self.close_connection = True

    def _send_json(self, status: int, body: dict[str, Any]) -> None:
        self._send(status, json.dumps(body).encode(), "application/json")

    def _send(self, status: int, body: bytes, kind: str) -> None:
        self._head(status, {"Content-Type": kind, "Content-Length": str(len(body))})
        if self.command != "HEAD":
            self.wfile.write(body)

    def _head(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in (SAFE | headers).items():
            self.send_header(name, value)
        if self.close_connection:
            self.send_header("Connection", "close")
        self.end_headers()

    def _send_event(self, piece: dict[str, Any]) -> None:
        self._event(json.dumps(piece))

    def _event(self, data: str) -> None:
        """A server-sent event; the first one begins the answer, so that what is wrong before has its own status."""
        if not self._streams:
            self._streams = True
            chunked = {} if self.request_version == "HTTP/1.0" else {"Transfer-Encoding": "chunked"}
            self.close_connection = self.close_connection or not chunked
            self._head(200, {"Content-Type": "text/event-stream; charset=utf-8", **chunked})
        self._chunk(f"data: {data}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        if self.request_version == "HTTP/1.0":
            self.wfile.write(data)
        else:
            self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()
