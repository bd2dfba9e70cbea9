"""What is wrong with a request, in the shape in which OpenAI's clients expect it."""

from __future__ import annotations

from typing import Any


class RequestFault(Exception):
    """A request that is answered with an error; the server goes on."""

    def __init__(self, status: int, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.param = param
        self.code = code

    def body(self) -> dict[str, Any]:
        """The answer: OpenAI's error object."""
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}
