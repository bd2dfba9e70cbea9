"""A model hub on this machine: folders served as repositories, over as much of the Hugging Face hub's API as loading
takes (https://huggingface.co/docs/hub/api). It keeps count of who was sent which file."""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40

REPOSITORY = r"/api/(models|datasets)/([^/]+/[^/]+)"
FILE = re.compile(r"/(?:datasets/)?([^/]+/[^/]+)/resolve/[^/]+/(.+)")


class Answer(BaseHTTPRequestHandler):
    """One request. Every repository is a folder below `root`, OWNER/NAME, whatever its kind and revision."""

    protocol_version = "HTTP/1.1"
    root: Path
    sent: Path
    """A line is added for every file that was sent: to which address, repository, file."""

    def log_message(self, *said: Any) -> None:
        pass

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        asked = self.rfile.read(int(self.headers.get("Content-Length", 0))).decode()
        found = re.fullmatch(REPOSITORY + r"/paths-info/[^/]+", self._path)
        if found is None:
            return self._send(404, b"{}")
        wanted = json.loads(asked)["paths"] if asked.startswith("{") else parse_qs(asked)["paths"]
        self._send_json([entry for entry in self._files(found[2]) if entry["path"] in wanted])

    @property
    def _path(self) -> str:
        return unquote(urlsplit(self.path).path)

    def _answer(self) -> None:
        if found := FILE.fullmatch(self._path):
            return self._file(*found.groups())
        if found := re.fullmatch(REPOSITORY + r"/tree/[^/]+(?:/.*)?", self._path):
            return self._send_json(self._files(found[2]))
        found = re.fullmatch(REPOSITORY + r"(?:/revision/[^/]+)?", self._path)
        if found is None or not (self.root / found[2]).is_dir():
            return self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"})
        siblings = [{"rfilename": entry["path"]} for entry in self._files(found[2])]
        self._send_json({"_id": COMMIT, "id": found[2], "sha": COMMIT, "siblings": siblings, "tags": []})

    def _files(self, repository: str) -> list[dict[str, Any]]:
        folder = self.root / repository
        files = [file for file in sorted(folder.rglob("*")) if file.is_file()]
        return [
            {
                "type": "file",
                "path": file.relative_to(folder).as_posix(),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes()).hexdigest(),
            }
            for file in files
        ]

    def _file(self, repository: str, name: str) -> None:
        file = self.root / repository / name
        if not file.is_file():
            return self._send(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT})
        content = file.read_bytes()
        if self.command == "GET":
            with self.sent.open("a", encoding="utf-8") as lines:
                lines.write(f"{self.client_address[0]} {repository} {name}\n")
        self._send(200, content, {"X-Repo-Commit": COMMIT, "ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    def _send_json(self, content: Any) -> None:
        self._send(200, json.dumps(content).encode(), {"Content-Type": "application/json"})

    def _send(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("port", type=int)
    parser.add_argument("root", type=Path)
    parser.add_argument("sent", type=Path)
    arguments = parser.parse_args()
    Answer.root, Answer.sent = arguments.root, arguments.sent
    ThreadingHTTPServer((arguments.address, arguments.port), Answer).serve_forever()


if __name__ == "__main__":
    main()
