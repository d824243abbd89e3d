"""The HTTP edge: OpenAI's chat completions for many tenants, one model, one audit line per request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import logging
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, PlainTextResponse, Response, StreamingResponse
from starlette.routing import Route as Path

from posttrain.contract import MalformedCall
from posttrain.errors import DataError, GrammarError, PosttrainError
from posttrain.files.hashing import sha256_of
from posttrain.serving.audit import Audit, AuditRecord, Decision
from posttrain.serving.batcher import Batcher
from posttrain.serving.engine import Abandoned, Completion, Engine, InvalidAnswer, Prepared
from posttrain.serving.keys import Caller
from posttrain.serving.metrics import Metrics
from posttrain.serving.replies import Failure, Reply
from posttrain.serving.requests import BadRequest, ChatRequest, Limits, parse_chat
from posttrain.serving.router import Refused, Route, Router, RoutingReason

if TYPE_CHECKING:
    import uvicorn

_log = logging.getLogger(__name__)
_PREPARING = 4  # requests rendered at once, beside the model: a long text takes a second


def build_app(
    engine: Engine, router: Router, audit: Audit, limits: Limits | None = None, metrics_key: str | None = None
) -> Starlette:
    """The application. The engine's streams and the router's model are touched by one thread only, between start-up and shut-down.
    metrics_key: with it `/metrics` counts tenant by tenant, without it over all of them: who else is served is no tenant's business."""
    service = _Service(engine, router, audit, limits or Limits(), metrics_key)

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        service.batcher.start()
        await service.batcher.call(router.refresh)
        yield
        await service.batcher.stop()

    routes = [
        Path("/v1/chat/completions", service.chat, methods=["POST"]),
        Path("/v1/models", service.models, methods=["GET"]),
        Path("/healthz", service.health, methods=["GET"]),
        Path("/metrics", service.metrics_page, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={HTTPException: _http_error})


def server(app: Starlette, host: str = "127.0.0.1", port: int = 8000) -> uvicorn.Server:
    """A uvicorn server for the app, not yet running. Headers naming the software are left out."""
    import uvicorn

    config = uvicorn.Config(app, host=host, port=port, log_level="warning", server_header=False, timeout_graceful_shutdown=10)
    return uvicorn.Server(config)


def serve(app: Starlette, host: str = "127.0.0.1", port: int = 8000) -> None:
    """Serve until interrupted. For other machines put a proxy with TLS in front: keys travel in a header."""
    server(app, host, port).run()


class _Service:
    """What the routes share."""

    def __init__(self, engine: Engine, router: Router, audit: Audit, limits: Limits, metrics_key: str | None) -> None:
        self.engine, self.router, self.audit, self.limits, self.metrics_key = engine, router, audit, limits, metrics_key
        self.batcher: Batcher[Prepared, Completion] = Batcher(engine, limits)
        self.metrics = Metrics()
        self._preparing = asyncio.Semaphore(_PREPARING)

    # -- the routes ----------------------------------------------------------------------------------------------------

    async def chat(self, request: Request) -> Response:
        """One request, one audit line, then the answer: an answer that cannot be audited is not sent."""
        started, record = time.perf_counter(), AuditRecord()
        try:
            response = await self._answer(request, record)
        except asyncio.CancelledError:  # the server is stopping: there is no time left but for the line
            record.decision, record.reason = Decision.CANCELLED, "server_stopped"
            self.audit.write(record)
            raise
        except Exception as error:
            response = _failed(error, record)
        record.latency_ms = round((time.perf_counter() - started) * 1000, 3)
        self.metrics.count(record)
        try:
            await run_in_threadpool(self.audit.write, record)
        except PosttrainError as error:
            _log.error("the audit log cannot be written: %s", error)
            return _error(
                Failure(503, "server_error", "audit_unavailable", "the request could not be audited, so it is not answered")
            )
        return response

    async def models(self, request: Request) -> Response:
        """The names this key may use."""
        try:
            caller = self.router.authenticate(_bearer(request))
            await self._follow_channels(caller)
            names = self.router.models(caller)
        except PosttrainError as error:
            return _error(Failure.of(error))
        data = [{"id": name, "object": "model", "created": 0, "owned_by": caller.tenant} for name in dict.fromkeys(names)]
        return JSONResponse({"object": "list", "data": data})

    async def health(self, _request: Request) -> Response:
        """200 while requests are taken; 503 when the model's queue has stopped."""
        alive = self.batcher.alive
        return JSONResponse({"status": "ok" if alive else "stopped", "waiting": self.batcher.waiting}, 200 if alive else 503)

    async def metrics_page(self, request: Request) -> Response:
        """Counters, tenant by tenant for who holds the metrics key. 401 for any other key."""
        given = _bearer(request)
        if given is not None and not (self.metrics_key and hmac.compare_digest(given.encode(), self.metrics_key.encode())):
            return _error(Failure(401, "authentication_error", "invalid_api_key", "not the key of these metrics"))
        page = self.metrics.text(self.batcher.waiting, by_tenant=given is not None)
        return PlainTextResponse(page, media_type="text/plain; version=0.0.4")

    # -- one chat request ----------------------------------------------------------------------------------------------

    async def _answer(self, request: Request, record: AuditRecord) -> Response:
        caller = self.router.authenticate(_bearer(request))
        record.tenant, record.key = caller.tenant, caller.key_id
        body = await _read_body(request, self.limits.body)
        record.request = hashlib.sha256(body).hexdigest()
        chat = parse_chat(body, self.limits)
        record.stream = chat.stream
        await self._follow_channels(caller)
        route = self.router.route(caller, chat.model)
        record.release, record.adapter, record.contract = route.release, route.weights_sha256, route.contract
        wanted = chat.completion.on(route.adapter, route.tenant)
        async with self._preparing:
            prepared = await run_in_threadpool(self.engine.prepare, wanted)
        completion = await self._complete(request, prepared)
        return _reply(chat, route, completion, record)

    async def _follow_channels(self, caller: Caller) -> None:
        if self.router.moved(caller):
            await self.batcher.call(self.router.refresh)

    async def _complete(self, request: Request, wanted: Prepared) -> Completion:
        """The completion, unless the client goes away first: then the request leaves the queue, or its batch is abandoned."""
        job = asyncio.ensure_future(self.batcher.complete(wanted))
        gone = asyncio.ensure_future(_until_gone(request))
        try:
            await asyncio.wait({job, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not job.done():
                raise Abandoned("the client went away", where="request")
            return job.result()
        finally:
            job.cancel()
            gone.cancel()


def _reply(chat: ChatRequest, route: Route, completion: Completion, record: AuditRecord) -> Response:
    reply = Reply.of(completion, route.release)
    record.decision, record.reason, record.status = Decision.SERVED, RoutingReason.ROUTED.value, 200
    record.prompt_tokens, record.completion_tokens = completion.prompt_tokens, completion.completion_tokens
    record.finish, record.response = reply.finish, sha256_of([reply.message, reply.finish])
    if not chat.stream:
        return JSONResponse(reply.whole())
    return StreamingResponse(
        _chunks(reply.events(chat.include_usage)), media_type="text/event-stream", headers={"cache-control": "no-cache"}
    )


async def _chunks(events: Iterator[bytes]) -> AsyncIterator[bytes]:
    """Starlette would hand a plain iterator to a thread for every chunk; these are ready and need none."""
    for event in events:
        yield event


def _failed(error: Exception, record: AuditRecord) -> Response:
    """The error as the client sees it, and as the audit log keeps it."""
    if isinstance(error, ClientDisconnect):
        error = Abandoned("the client went away", where="request")
    if not isinstance(error, PosttrainError):
        _log.error("a request failed", exc_info=error)
    failure = Failure.of(error)
    record.status, record.reason = failure.status, failure.code
    record.decision = _decision(error)
    if isinstance(error, Refused):
        record.detail = error.detail or None
    elif record.decision is Decision.FAILED:
        record.detail = _without_content(error)
    return _error(failure)


def _without_content(error: Exception) -> str:
    """What the audit log may say of an error: a wrong answer's value is message content, and a fault's text may be."""
    if isinstance(error, MalformedCall | InvalidAnswer):
        return error.what
    return str(error) if isinstance(error, PosttrainError) else type(error).__name__


def _decision(error: Exception) -> Decision:
    match error:
        case Refused():
            return Decision.REFUSED
        case MalformedCall():
            return Decision.FAILED
        case BadRequest() | DataError() | GrammarError():
            return Decision.REJECTED
        case Abandoned():
            return Decision.CANCELLED
    return Decision.FAILED


def _error(failure: Failure) -> Response:
    return JSONResponse(failure.body(), failure.status, failure.headers())


async def _http_error(_request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    return _error(
        Failure(
            error.status_code, "invalid_request_error", "unknown_url", f"{error.detail}; see /v1/chat/completions and /v1/models"
        )
    )


def _bearer(request: Request) -> str | None:
    scheme, _, key = request.headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None


async def _read_body(request: Request, limit: int) -> bytes:
    """The body, read no further than `limit` bytes, whatever its header says."""
    too_large = BadRequest("the body is too large", param=None, value=f"more than {limit} bytes", remedy="send less", status=413)
    length = request.headers.get("content-length", "0")
    if length.isdigit() and int(length) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


async def _until_gone(request: Request) -> None:
    """Returns when the client has disconnected. The body must have been read before."""
    while (await request.receive())["type"] != "http.disconnect":
        pass
