"""The web application, which consists of OpenAI's endpoints for a model and a page to try the model in a browser.

    GET  /                          the page
    GET  /health                    200 once the model is loaded
    GET  /v1/models                 the model's name
    POST /v1/audio/transcriptions   a file → its transcript
    POST /v1/chat/completions       messages with text and audio → an answer

Responses have OpenAI's fields, and the additional field `earshot` with the routing of each clip and the compute time.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import json
import threading
import time
import uuid
from collections.abc import AsyncIterator, Awaitable, Callable
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import anyio
from fastapi import FastAPI, Request
from starlette.datastructures import UploadFile
from starlette.exceptions import HTTPException
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.responses import HTMLResponse, JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from model.json_text import parse_json
from trainer.data.errors import SampleError
from trainer.page.render import render
from trainer.serving.requests import RequestError, decoded, read_messages
from trainer.serving.service import TRANSCRIBE, Reply, Service, Stopped

_PAGE = Path(__file__).with_name("page.html")
MAX_WAITING = 16
"""The largest number of requests that are being read, are waiting or are being answered. More requests are refused with
status 503."""
MAX_UPLOAD_SEC = 60.0
"""The default time in seconds within which a request must arrive. A slower one is refused with status 408, because it
would hold a place in the queue."""
_POLL_SEC = 0.2
"""The time in seconds between two checks of whether a client has closed its connection."""
T = TypeVar("T")


def make_app(
    service: Service,
    hosts: tuple[str, ...],
    key: str | None,
    max_request_bytes: int,
    max_upload_sec: float = MAX_UPLOAD_SEC,
) -> FastAPI:
    """Return the web application.

    Args:
        service: The model.
        hosts: The names by which clients may address the server. Other names are refused, so that a web page cannot
            reach a server on this machine through a host name that the page's owner controls (DNS rebinding).
        key: The key that clients must send as `Authorization: Bearer KEY`; None for no key.
        max_request_bytes: The largest size of a request's body.
        max_upload_sec: The maximum time that a request's body may take to arrive, in seconds.
    """
    app = FastAPI(title="earshot", docs_url=None, redoc_url=None, openapi_url=None)
    queue = _Queue(max_upload_sec)
    app.add_middleware(_Limit, max_request_bytes=max_request_bytes)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=list(hosts))
    app.add_exception_handler(RequestError, _as_response)
    app.add_exception_handler(HTTPException, _as_response)

    @app.get("/")
    def page() -> HTMLResponse:
        text = render(_PAGE, service.name, {"prompt": TRANSCRIBE})
        policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; "
        return HTMLResponse(text, headers={"Content-Security-Policy": policy + "media-src blob:; img-src data:"})

    @app.get("/health")
    def health() -> dict[str, str]:
        return {"status": "ok"}

    @app.get("/v1/models")
    def models(request: Request) -> dict[str, Any]:
        _check(request, key)
        entry = {"id": service.name, "object": "model", "created": service.created_sec, "owned_by": "earshot"}
        return {"object": "list", "data": [entry]}

    @app.post("/v1/audio/transcriptions")
    async def transcriptions(request: Request) -> Response:
        _check(request, key)
        return await _transcribe(service, queue, request)

    @app.post("/v1/chat/completions")
    async def completions(request: Request) -> Response:
        _check(request, key)
        return await _chat(service, queue, request)

    return app


def _check(request: Request, key: str | None) -> None:
    """Check the origin and the key of a request.

    Raises:
        RequestError: If a page of another site sends the request, or if its key is not `key`.
    """
    origin = request.headers.get("origin")
    if origin is not None and urlsplit(origin).netloc != request.headers.get("host"):
        raise RequestError("pages of other sites may not use this server", status=403)
    sent = request.headers.get("authorization", "")
    if key is not None and not hmac.compare_digest(sent.encode(), f"Bearer {key}".encode()):
        raise RequestError("the key is missing or wrong", status=401, code="invalid_api_key")


async def _transcribe(service: Service, queue: _Queue, request: Request) -> Response:
    """Return the transcript of the file that a request contains."""
    async with queue.place():
        form = await queue.receive(request.form())
        upload, style, language = form.get("file"), form.get("response_format") or "json", form.get("language")
        if not isinstance(upload, UploadFile):
            raise RequestError("send the audio as a file in multipart/form-data", "file")
        if style not in ("json", "text", "verbose_json"):
            raise RequestError("must be one of json, text, verbose_json", "response_format")
        audio = await upload.read()
        asked = {"instruction": TRANSCRIBE}
        reply = await queue.run(
            request, lambda gone: service.answer([decoded(audio, "file")], asked, unwanted=gone.is_set)
        )
    if style == "text":
        return PlainTextResponse(reply.text + "\n")
    found: dict[str, Any] = {"text": reply.text, "earshot": reply.details}
    if style == "verbose_json":
        spoken = language if isinstance(language, str) else None
        found = {"task": "transcribe", "language": spoken, "duration": reply.audio_sec, **found}
    return JSONResponse(found)


async def _chat(service: Service, queue: _Queue, request: Request) -> Response:
    """Return the answer to the messages that a request contains, as one JSON object or as a stream of events."""
    parts: asyncio.Queue[str | None] = asyncio.Queue()
    loop = asyncio.get_running_loop()

    def send(part: str | None) -> None:
        loop.call_soon_threadsafe(parts.put_nowait, part)

    async def answer() -> tuple[Reply, bool]:
        async with queue.place():
            content = await queue.receive(request.body())

            def compute(gone: threading.Event) -> tuple[Reply, bool]:
                body = _read_body(content)
                clips, fields = read_messages(body.get("messages"), service.max_chars)
                streams = bool(body.get("stream"))
                emit = send if streams else None
                return service.answer(clips, fields, _max_tokens(body), emit, gone.is_set), streams

            return await queue.run(request, compute)

    def end(task: asyncio.Task[Any]) -> None:
        if not task.cancelled():
            task.exception()  # asyncio logs exceptions that nobody retrieves, for example if the client is gone.
        send(None)

    task = asyncio.create_task(answer())
    task.add_done_callback(end)
    # An error before the first part of the text can still be reported by the status of the response.
    part = await parts.get()
    if part is None:
        reply, streams = await task
        if not streams:
            return _completion(service, reply)
        send(None)
    return StreamingResponse(_events(service, part or "", parts, task), media_type="text/event-stream")


class _Queue:
    """A queue in which requests wait for the model. The audio of a request is decoded when it is the request's turn.

    Args:
        max_upload_sec: The maximum time that a request's body may take to arrive, in seconds.
    """

    def __init__(self, max_upload_sec: float = MAX_UPLOAD_SEC) -> None:
        self._max_upload_sec = max_upload_sec
        self._places, self._turn, self._thread = 0, anyio.Lock(), anyio.CapacityLimiter(1)

    @contextlib.asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Return a context manager that holds a place in the queue."""
        if self._places >= MAX_WAITING:
            raise RequestError(f"{MAX_WAITING} requests are waiting; try again later", status=503, code="overloaded")
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    async def receive(self, body: Awaitable[T]) -> T:
        """Return the body of a request.

        Raises:
            RequestError: If it does not arrive in time.
        """
        try:
            with anyio.fail_after(self._max_upload_sec):
                return await body
        except TimeoutError:
            raise RequestError(f"the request took more than {self._max_upload_sec:g} s to arrive", status=408) from None

    async def run(self, request: Request, work: Callable[[threading.Event], T]) -> T:
        """Run `work` in a thread when it is the request's turn, and return its result.

        Args:
            request: The request, whose body has been read.
            work: A function whose argument is an event that is set when its result is no longer wanted.
        """
        gone = threading.Event()
        with anyio.CancelScope() as waiting:  # Cancelling the scope does not end a thread, but setting `gone` does.
            watch = asyncio.create_task(_watch(request, gone, waiting))
            try:
                async with self._turn:
                    if gone.is_set() or await request.is_disconnected():
                        raise Stopped
                    return await anyio.to_thread.run_sync(work, gone, limiter=self._thread)
            except Stopped:
                pass
            except SampleError as error:
                raise RequestError(str(error), "messages") from None
            finally:
                gone.set()  # If the server ends, this task is cancelled, but its thread is not.
                watch.cancel()
        raise RequestError("the client has closed the connection", status=499)


async def _watch(request: Request, gone: threading.Event, waiting: anyio.CancelScope) -> None:
    """Set `gone` and cancel `waiting` once the client has closed the connection."""
    while not await request.is_disconnected():
        await asyncio.sleep(_POLL_SEC)
    gone.set()
    waiting.cancel()


class _Limit:
    """A middleware that refuses requests with a body that is too large, even if they do not declare its size."""

    def __init__(self, app: ASGIApp, max_request_bytes: int) -> None:
        self._app, self._limit = app, max_request_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        received = 0

        async def counted() -> Message:
            nonlocal received
            message = await receive()
            received += len(message.get("body", b""))
            if received > self._limit:
                raise RequestError(f"the request is larger than {self._limit} bytes", status=413)
            return message

        await self._app(scope, counted, send)


def _read_body(content: bytes) -> dict[str, Any]:
    try:
        body = parse_json(content)
    except ValueError as error:
        raise RequestError(f"the body is not JSON: {error}") from None
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    return body


def _max_tokens(body: dict[str, Any]) -> int | None:
    """Return the largest number of tokens that a request asks for, after checking the settings of decoding."""
    longest: int | None = body.get("max_completion_tokens", body.get("max_tokens"))
    if longest is not None and (isinstance(longest, bool) or not isinstance(longest, int) or longest < 1):
        raise RequestError("must be a whole number, at least 1", "max_tokens")
    for name, only in (("n", 1), ("temperature", 0)):
        if body.get(name) not in (None, only):
            raise RequestError(f"only {only} is possible: answers are decoded greedily", name)
    return longest


def _head(service: Service) -> dict[str, Any]:
    return {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": service.name}


async def _events(
    service: Service, first: str, parts: asyncio.Queue[str | None], task: asyncio.Task[tuple[Reply, bool]]
) -> AsyncIterator[str]:
    """Yield an answer as server-sent events while it is generated.

    Args:
        service: The model.
        first: The first part of the text.
        parts: The other parts, followed by None.
        task: The task that computes the answer.
    """
    head = {**_head(service), "object": "chat.completion.chunk"}

    def event(delta: dict[str, str], reason: str | None = None, **more: Any) -> str:
        choice = {"index": 0, "delta": delta, "finish_reason": reason}
        return f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n"

    yield event({"role": "assistant", "content": first})
    while (part := await parts.get()) is not None:
        yield event({"content": part})
    reply, _ = await task
    yield event({}, _reason(reply), earshot=reply.details)
    yield "data: [DONE]\n\n"


def _reason(reply: Reply) -> str:
    return "stop" if reply.finished else "length"


def _completion(service: Service, reply: Reply) -> Response:
    message = {"role": "assistant", "content": reply.text}
    usage = {
        "prompt_tokens": reply.prompt_tokens,
        "completion_tokens": reply.answer_tokens,
        "total_tokens": reply.prompt_tokens + reply.answer_tokens,
    }
    choices = [{"index": 0, "message": message, "finish_reason": _reason(reply)}]
    return JSONResponse(
        {**_head(service), "object": "chat.completion", "choices": choices, "usage": usage, "earshot": reply.details}
    )


def _as_response(_request: Request, error: Exception) -> Response:
    """Return OpenAI's error object."""
    if isinstance(error, RequestError):
        status, message, param, code = error.status, error.message, error.param, error.code
    else:
        assert isinstance(error, HTTPException)
        status, message, param, code = error.status_code, str(error.detail), None, None
    kind = "server_error" if status >= 500 else "invalid_request_error"
    tree = {"error": {"message": message, "type": kind, "param": param, "code": code}}
    # After 408, the rest of the body is not read, so the connection cannot be used again.
    headers = {503: {"Retry-After": "5"}, 408: {"Connection": "close"}}
    return JSONResponse(tree, status_code=status, headers=headers.get(status))
