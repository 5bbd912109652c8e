"""What every request passes before a route sees it: who may call, from where, how much, and how many at once."""

import asyncio
import base64
import binascii
import hashlib
import hmac
import json
import logging
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass, field
from typing import Any

from qvl.serve.errors import Refusal, busy, draining
from qvl.serve.limits import Limits
from qvl.serve.metrics import Metrics

log = logging.getLogger("qvl.serve")

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

OPEN = {"/health"}
"""The only route without a key."""
QUIET = {"/health", "/readyz", "/metrics"}
"""Routes that machines ask every few seconds; the log leaves them out."""
HEADERS = {
    "x-content-type-options": "nosniff",
    "x-frame-options": "DENY",
    "referrer-policy": "no-referrer",
    "cross-origin-resource-policy": "same-origin",
    "cache-control": "no-store",
    "content-security-policy": "default-src 'none'; frame-ancestors 'none'",
}


@dataclass(frozen=True, kw_only=True)
class Door:
    """Who may come in."""

    keys: tuple[str, ...] = field(default=(), repr=False)
    hosts: tuple[str, ...] = ("localhost", "127.0.0.1", "[::1]")
    """Names this server answers to while it has no key: a page elsewhere could otherwise point its own name here (DNS rebinding)."""
    max_in_flight: int = 64
    """Requests that are worked on or wait; one more is told to come again."""
    limits: Limits = field(default_factory=Limits)


class Gate:
    def __init__(self, app: App, *, door: Door, metrics: Metrics, is_draining: Callable[[], bool]) -> None:
        self.app, self.door, self.metrics, self.is_draining = app, door, metrics, is_draining
        self.in_flight = 0
        self.held_bytes = 0
        self._digests = [hashlib.sha256(key.encode()).digest() for key in door.keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        scope.setdefault("state", {})["start"] = time.monotonic()
        status = 500
        begun = False

        async def guarded(message: Message) -> None:
            nonlocal status, begun
            if message["type"] == "http.response.start":
                status, begun = message["status"], True
                given = {name.lower() for name, _ in message.get("headers", ())}
                extra = [(n.encode(), v.encode()) for n, v in HEADERS.items() if n.encode() not in given]
                message = {**message, "headers": [*message.get("headers", ()), *extra]}
            await send(message)

        try:
            await self._checked(scope, receive, guarded)
        except Refusal as refusal:
            assert not begun, "a refusal came after the reply had begun"
            await refuse(refusal, guarded)
        except Exception:
            if begun:
                raise
            # Told here: further out the connection would be closed under a client that may use it again.
            log.exception("a request failed")
            await refuse(Refusal(500, "The server failed on this request; its log says why."), guarded)
        finally:
            # Unknown paths share one label: a client must not be able to make labels.
            route = getattr(scope.get("route"), "path", "other")
            self.metrics.requests.labels(route, str(status)).inc()
            if route not in QUIET:
                _note(scope, route, status)

    async def _checked(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = {name.decode("latin-1"): value.decode("latin-1") for name, value in scope["headers"]}
        path = scope["path"]
        if self.door.keys:
            if path not in OPEN and not self._knows(headers.get("authorization", "")):
                # A browser asks a person for the key only where the page itself is opened.
                scheme = 'Basic realm="qvl", charset="UTF-8"' if path == "/" else "Bearer"
                raise Refusal(
                    401,
                    "The key is missing or wrong; send it as Authorization: Bearer KEY.",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": scheme},
                )
        elif _name_of(headers.get("host", "")) not in self.door.hosts:
            raise Refusal(421, "This server does not answer to that name; call it by the address it is bound to.")
        if scope["method"] not in ("POST", "PUT", "PATCH"):
            await self.app(scope, receive, send)
            return
        if self.is_draining():
            raise draining()
        if self.in_flight >= self.door.max_in_flight:
            raise busy(f"{self.in_flight} requests are being worked on; try again later.")
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise Refusal(415, "Send the request as application/json.")
        self.in_flight += 1
        try:
            body = await self._body(headers, receive)
            try:
                await self.app(scope, _replay(body, receive), send)
            finally:
                self.held_bytes -= len(body)
        finally:
            self.in_flight -= 1

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body, which may neither be too large, nor hold too many values, nor take too long. It counts as held."""
        limits, values = self.door.limits, ValueCount()
        most = limits.max_body_bytes
        # Of a body that does not say its length there is no knowing how much would still come.
        parting = {} if "content-length" in headers else {"Connection": "close"}
        too_large = Refusal(
            413, f"The request has more than the {most:,} bytes allowed; send smaller media.", headers=parting
        )
        promised = headers.get("content-length", "0")
        if promised.isdigit() and int(promised) > most:
            raise too_large
        chunks, size = [], 0
        try:
            async with asyncio.timeout(limits.body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise Refusal(408, "The request broke off.")
                    chunk = message.get("body", b"")
                    if self.held_bytes + len(chunk) > limits.max_held_bytes:
                        raise busy("The requests being worked on fill the memory set aside for them; try again later.")
                    chunks.append(chunk)
                    size += len(chunk)
                    self.held_bytes += len(chunk)
                    if size > most:
                        raise too_large
                    if values.push(chunk) > limits.max_values:
                        words = f"The request has more than the {limits.max_values:,} values allowed."
                        raise Refusal(413, words, headers=parting)
                    if not message.get("more_body", False):
                        return b"".join(chunks)
        except TimeoutError as error:
            self.held_bytes -= size
            raise Refusal(408, "The request took too long to arrive.") from error
        except BaseException:
            self.held_bytes -= size
            raise

    def _knows(self, authorization: str) -> bool:
        """Bearer for clients; Basic, with the key as password, for a person at the page."""
        scheme, _, value = authorization.partition(" ")
        key = value.strip()
        if scheme.lower() == "basic":
            try:
                key = base64.b64decode(key, validate=True).decode("utf-8").partition(":")[2]
            except (binascii.Error, ValueError):
                return False
        elif scheme.lower() != "bearer":
            return False
        digest = hashlib.sha256(key.encode("utf-8", errors="surrogateescape")).digest()
        # All are compared, each in constant time: neither the place of a key nor its first letters can be timed.
        return any([hmac.compare_digest(digest, known) for known in self._digests])


class ValueCount:
    """How many values a JSON text holds, told while it comes: the commas outside its strings. A parser holds up every other request while
    it reads, a tenth of a second for 64 MB of one picture and several for as many bytes of small numbers."""

    def __init__(self) -> None:
        self.count = 0
        self._in_string = self._is_escaped = False

    def push(self, chunk: bytes) -> int:
        """The count so far."""
        if not chunk:
            return self.count
        if self._is_escaped:
            chunk = chunk[1:]
        text = chunk.replace(b"\\\\", b"").replace(b'\\"', b"")
        self._is_escaped = text.endswith(b"\\")
        pieces = text.split(b'"')
        self.count += sum(piece.count(b",") for piece in pieces[self._in_string :: 2])
        self._in_string ^= len(pieces) % 2 == 0
        return self.count


def _note(scope: Scope, route: str, status: int) -> None:
    """One line for each request, of the server's own words: a path or a header could write lines of its own."""
    watch = scope["state"].get("watch")
    seconds = time.monotonic() - scope["state"]["start"]
    log.info("%s %s %d in %.2f s%s", scope["method"], route, status, seconds, f": {watch}" if watch else "")


def _name_of(host: str) -> str:
    """A Host header without its port."""
    name = host.strip().lower()
    if name.startswith("["):
        return name.partition("]")[0] + "]"
    return name.partition(":")[0]


def _replay(body: bytes, receive: Receive) -> Receive:
    """The body once, then whatever comes (a disconnect)."""
    is_given = False

    async def next_message() -> Message:
        nonlocal is_given
        if not is_given:
            is_given = True
            return {"type": "http.request", "body": body, "more_body": False}
        return await receive()

    return next_message


async def refuse(refusal: Refusal, send: Send) -> None:
    body = json.dumps(refusal.body, ensure_ascii=False).encode()
    headers = {"content-type": "application/json", "content-length": str(len(body)), **refusal.headers}
    raw = [(name.lower().encode(), value.encode("latin-1")) for name, value in headers.items()]
    await send({"type": "http.response.start", "status": refusal.status, "headers": raw})
    await send({"type": "http.response.body", "body": body})
