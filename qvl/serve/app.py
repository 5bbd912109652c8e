"""The routes: chat completions, models, tokenize, health, metrics, and the chat page."""

import asyncio
import base64
import hashlib
import json
import logging
import re
import threading
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from importlib import resources
from typing import Any, TypeVar

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from fastapi.routing import APIRoute
from pydantic_core import from_json

import qvl
from qvl.serve.chat import Cook
from qvl.serve.engine_thread import EngineThread, Ticket
from qvl.serve.errors import Refusal, busy, error_body, gone
from qvl.serve.gate import Door, Gate
from qvl.serve.metrics import CONTENT_TYPE, Metrics, Watch
from qvl.serve.protocol import ChatRequest, TokenizeRequest
from qvl.serve.reply import Reply
from qvl.serve.schema import COMPLETION, EVENT, MODEL, MODELS, REFUSALS, TOKENS, replies
from qvl.serve.validation import read_validation

log = logging.getLogger("qvl.serve")

T = TypeVar("T")
App = FastAPI


@dataclass(kw_only=True)
class Service:
    """All that the routes share."""

    cook: Cook
    thread: EngineThread
    metrics: Metrics
    started: int
    media: ThreadPoolExecutor
    light: ThreadPoolExecutor
    """For requests without media, so that they never wait behind a film."""
    held_bytes: int = 0
    """Patches of requests between their preparation and their end."""

    async def off_loop(self, messages: list[dict[str, Any]] | None, work: Callable[[Callable[[], bool]], T]) -> T:
        """The work, in a thread. It is given what tells whether anybody still waits for it."""
        gone = threading.Event()
        pool = self.media if has_media(messages or []) else self.light
        try:
            return await asyncio.get_running_loop().run_in_executor(pool, work, gone.is_set)
        except asyncio.CancelledError:
            gone.set()
            raise


class JsonRequest(Request):
    """Reads its body with pydantic's parser: five times as fast as Python's, bounded in depth, and without half surrogate pairs."""

    async def json(self) -> Any:
        return from_json(await self.body())


class JsonRoute(APIRoute):
    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def read(request: Request) -> Response:
            return await handle(JsonRequest(request.scope, request.receive))

        return read


def make_app(cook: Cook, thread: EngineThread, metrics: Metrics, *, door: Door, media_workers: int = 1) -> FastAPI:
    service = Service(
        cook=cook,
        thread=thread,
        metrics=metrics,
        started=int(time.time()),
        media=ThreadPoolExecutor(media_workers, thread_name_prefix="media"),
        light=ThreadPoolExecutor(2, thread_name_prefix="prepare"),
    )

    @asynccontextmanager
    async def life(_: FastAPI) -> AsyncIterator[None]:
        thread.start()
        try:
            await asyncio.get_running_loop().run_in_executor(service.light, cook.grammars.build)
            yield
        finally:
            await asyncio.get_running_loop().run_in_executor(None, thread.stop)
            for pool in (service.media, service.light):
                pool.shutdown(wait=False, cancel_futures=True)
            cook.kitchen.close()

    app = FastAPI(
        title="qvl",
        version=qvl.__version__,
        lifespan=life,
        docs_url=None,
        redoc_url=None,
        responses=REFUSALS,
        redirect_slashes=False,
    )
    app.state.service = service
    app.router.route_class = JsonRoute
    _handle_errors(app)
    _routes(app, service)
    # FastAPI's own 422 is never given: a wrong field is a 400 here, as OpenAI's clients expect.
    for route in app.openapi()["paths"].values():
        for operation in route.values():
            operation["responses"].pop("422", None)
    app.add_middleware(Gate, door=door, metrics=metrics, is_draining=lambda: thread.is_draining)  # type: ignore[arg-type]
    return app


def _routes(app: FastAPI, service: Service) -> None:
    served = service.cook.served
    page, policy = read_page()

    @app.get("/", response_class=HTMLResponse, include_in_schema=False)
    async def chat_page() -> Response:
        return HTMLResponse(page, headers={"content-security-policy": policy})

    @app.get("/health", response_class=PlainTextResponse)
    async def health() -> Response:
        """Whether the process lives."""
        return PlainTextResponse("ok")

    @app.get("/readyz", response_class=PlainTextResponse)
    async def ready() -> Response:
        """Whether it takes requests."""
        if service.thread.is_draining:
            return JSONResponse(error_body(503, "The server is shutting down.", code="draining"), 503)
        if not service.thread.is_alive:
            return JSONResponse(error_body(503, "The engine has stopped.", code="engine"), 503)
        return PlainTextResponse("ready")

    @app.get("/metrics", response_class=PlainTextResponse)
    async def metrics() -> Response:
        return Response(service.metrics.page(), media_type=CONTENT_TYPE)

    @app.get("/v1/models", responses=replies(MODELS))
    async def models() -> Response:
        return JSONResponse({"object": "list", "data": [_model(service, name) for name in served.names]})

    @app.get("/v1/models/{name:path}", responses=replies(MODEL))
    async def model(name: str) -> Response:
        return JSONResponse(_model(service, served.name(name)))

    @app.post("/tokenize", responses=replies(TOKENS))
    async def tokenize(asked: TokenizeRequest, request: Request) -> Response:
        """Counts and ids of a conversation, its media included."""
        work = service.off_loop(asked.messages, lambda is_gone: service.cook.tokenize(asked, is_cancelled=is_gone))
        return _json(await until_gone(request, work))

    @app.post("/v1/chat/completions", responses=replies(COMPLETION, **{"text/event-stream": {"schema": EVENT}}))
    async def chat(asked: ChatRequest, request: Request) -> Response:
        """OpenAI's chat completions, with pictures, videos and documents among the parts of a message."""
        watch = Watch(service.metrics, request.scope["state"]["start"])
        request.scope["state"]["watch"] = watch
        work = service.off_loop(asked.messages, lambda is_gone: service.cook.prepare(asked, is_cancelled=is_gone))
        prepared = await until_gone(request, work)
        patches = prepared.request.sample.patch_PX
        size = 0 if patches is None else patches.nbytes
        if service.held_bytes and service.held_bytes + size > service.cook.kitchen.limits.max_patch_bytes:
            raise busy("The media of waiting requests fill the memory set aside for them; try again later.", 5)
        watch.queued(prepared.media_seconds, prepared.request.sample.num_tokens, bool(prepared.media))
        service.held_bytes += size  # before anything is waited for: others look at it meanwhile
        try:
            ticket = await service.thread.submit(prepared.model, prepared.request)
        except BaseException:
            service.held_bytes -= size
            raise
        reply = Reply(prepared, served, watch)

        def done() -> None:
            service.thread.cancel(ticket)
            service.held_bytes -= size
            watch.end()

        if asked.stream:
            return _Stream(_lines(reply, service.thread, ticket), done)
        try:
            return _json(await until_gone(request, reply.whole(service.thread.events(ticket))))
        finally:
            done()


class _Stream(StreamingResponse):
    """Server-sent events. `done` is called however it ends, even where nobody ever read a line."""

    def __init__(self, lines: AsyncIterator[str], done: Callable[[], None]) -> None:
        super().__init__(lines, media_type="text/event-stream", headers={"x-accel-buffering": "no"})
        self.done = done

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.done()


async def _lines(reply: Reply, thread: EngineThread, ticket: Ticket) -> AsyncIterator[str]:
    async for chunk in reply.chunks(thread.events(ticket)):
        yield f"data: {_text(chunk)}\n\n"
    yield "data: [DONE]\n\n"


async def until_gone(request: Request, work: Awaitable[T]) -> T:
    """The work's result, or its end when the client goes away first."""
    task = asyncio.ensure_future(work)
    watcher = asyncio.ensure_future(_disconnect(request))
    try:
        await asyncio.wait({task, watcher}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise gone()
    finally:
        for other in (task, watcher):
            if not other.done():
                other.cancel()
                try:
                    await other
                except (asyncio.CancelledError, Refusal):
                    pass
                except Exception:
                    log.exception("a request nobody waits for failed")


async def _disconnect(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


def has_media(messages: list[dict[str, Any]]) -> bool:
    """Whether a message has parts other than words. Read before the messages are checked, so nothing is taken for granted."""
    contents = [message.get("content") for message in messages]
    return any(
        isinstance(part, dict) and part.get("type") != "text"
        for content in contents
        if isinstance(content, list)
        for part in content
    )


def _model(service: Service, name: str) -> dict[str, Any]:
    served = service.cook.served
    return {
        "id": name,
        "object": "model",
        "created": service.started,
        "owned_by": "qvl",
        "max_model_len": served.max_context,
        "thinking": served.is_thinking,
        "media": served.processor.image_budget is not None,
        "sampling": {
            "temperature": served.sampling.temperature,
            "top_p": served.sampling.top_p,
            "top_k": served.sampling.top_k,
            "presence_penalty": served.sampling.presence_penalty,
            "max_tokens": served.sampling.max_tokens,
        },
        **({} if name == served.names[0] else {"parent": served.names[0]}),
    }


def _text(data: Any) -> str:
    return json.dumps(data, ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def _json(data: Any) -> Response:
    return Response(_text(data), media_type="application/json")


# ---- errors -------------------------------------------------------------------------------------------------------


def _handle_errors(app: FastAPI) -> None:
    async def refused(_: Request, error: Exception) -> Response:
        assert isinstance(error, Refusal)
        return JSONResponse(error.body, error.status, headers=error.headers)

    async def invalid(request: Request, error: Exception) -> Response:
        assert isinstance(error, RequestValidationError)
        body = TokenizeRequest if request.url.path == "/tokenize" else ChatRequest
        message, param = read_validation(error.errors(), body.model_fields)
        return JSONResponse(error_body(400, message, param=param), 400)

    async def not_found(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(404, "There is no such route.", code="not_found"), 404)

    async def wrong_method(_: Request, error: Exception) -> Response:
        return JSONResponse(
            error_body(405, "This route does not take that method."), 405, getattr(error, "headers", None)
        )

    async def unreadable(_: Request, error: Exception) -> Response:
        return JSONResponse(error_body(400, "The request is no JSON that can be read."), 400)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(RequestValidationError, invalid)
    app.add_exception_handler(400, unreadable)
    app.add_exception_handler(404, not_found)
    app.add_exception_handler(405, wrong_method)


# ---- the page -----------------------------------------------------------------------------------------------------


def read_page() -> tuple[str, str]:
    """The page, and a policy that lets nothing run but its own script and style, by their digests."""
    text = (resources.files("qvl.serve") / "page.html").read_text(encoding="utf-8")
    scripts, styles = (
        " ".join(f"'sha256-{_digest(block)}'" for block in re.findall(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL))
        for tag in ("script", "style")
    )
    policy = (
        f"default-src 'none'; script-src {scripts}; style-src {styles}; img-src 'self' blob: data:; media-src blob:; "
        "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    )
    return text, policy


def _digest(text: str) -> str:
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
