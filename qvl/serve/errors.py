"""A refusal: its status, and a sentence in OpenAI's error shape that tells nothing about the machine."""

import re
from typing import Any

TYPES = {
    401: "authentication_error",
    403: "permission_error",
    404: "not_found_error",
    408: "timeout_error",
    429: "rate_limit_error",
}
"""Of statuses that have one of their own."""


class Refusal(Exception):
    """Ends a request with a status and one sentence."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        headers: dict[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers = headers or {}

    @property
    def body(self) -> dict[str, Any]:
        return error_body(self.status, self.message, param=self.param, code=self.code)


def error_body(status: int, message: str, *, param: str | None = None, code: str | None = None) -> dict[str, Any]:
    kind = TYPES.get(status, "server_error" if status >= 500 else "invalid_request_error")
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def busy(message: str, seconds: int = 1) -> Refusal:
    """Come again later."""
    return Refusal(429, message, code="overloaded", headers={"Retry-After": str(seconds)})


def gone() -> Refusal:
    """Ends the work for a client that nobody can tell any more."""
    return Refusal(408, "The client went away.")


def draining() -> Refusal:
    return Refusal(503, "The server is shutting down.", code="draining", headers={"Retry-After": "5"})


# A path of two names or more, an address in memory, a place in a traceback.
_TELLTALE = re.compile(r"(?<![\w:/])/[\w.\-]+/[\w.\-]+|\b0x[0-9a-fA-F]{6,}|Traceback|File \"|site-packages")


def safe_sentence(error: BaseException, otherwise: str = "The request cannot be read.") -> str:
    """The sentence of one of our own ValueErrors; another one where it names a place on this machine.

    A decoder that quoted an address in memory was one half of a remote execution (CVE-2026-22778).
    """
    text = " ".join(str(error).split())
    if not text or len(text) > 1000 or _TELLTALE.search(text):
        return otherwise
    return text
