"""One thread owns the model; an asynchronous queue in front of it lets requests into the running batch between steps."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Generic, Protocol, TypeVar

from posttrain.errors import PosttrainError
from posttrain.sampling.protocol import Stream
from posttrain.serving.requests import Limits

T = TypeVar("T")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class StreamEngine(Protocol[Asked, Answer]):  # type: ignore[misc]
    """What a batcher asks of a model (see `serving.engine.Engine`)."""

    def open(self, rows: int) -> Stream[Asked, Answer]: ...


class Overloaded(PosttrainError):
    """The queue is full, or the server is stopping."""


@dataclass(frozen=True, eq=False)
class _Job(Generic[Asked, Answer]):
    request: Asked
    answer: asyncio.Future[Answer]

    def settle(self, found: Answer | Exception) -> None:
        if self.answer.done():
            return
        if isinstance(found, Exception):
            self.answer.set_exception(found)
        else:
            self.answer.set_result(found)


class Batcher(Generic[Asked, Answer]):
    """Runs an engine for many clients. Start and stop it inside the running event loop.

    Between two steps of the model, waiting requests enter the batch while it has room, answers leave it, and requests that nobody waits
    for any more are taken out. A call waits until the batch has run empty, and nothing enters before it has run.
    """

    def __init__(self, engine: StreamEngine[Asked, Answer], limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._queue: asyncio.Queue[_Job[Asked, Answer]] = asyncio.Queue(limits.waiting)
        self._calls: list[_Job[Callable[[], Any], Any]] = []
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="posttrain-model")
        self._pump: asyncio.Task[None] | None = None
        self._stream: Stream[Asked, Answer] | None = None  # touched by the model's thread only, and between its turns
        self._entering: list[_Job[Asked, Answer]] = []
        self._running: dict[int, _Job[Asked, Answer]] = {}  # by the stream's ticket

    def start(self) -> None:
        self._pump = asyncio.create_task(self._run(), name="posttrain-batcher")

    async def stop(self) -> None:
        """Fail what runs and what waits, and end the thread."""
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
        jobs: list[_Job[Any, Any]] = [*self._entering, *self._running.values(), *self._calls]
        while not self._queue.empty():
            jobs.append(self._queue.get_nowait())
        for job in jobs:
            job.settle(_stopping())
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    @property
    def alive(self) -> bool:
        return self._pump is not None and not self._pump.done()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def complete(self, request: Asked) -> Answer:
        """The answer. Cancelling the caller takes the request out of the queue, or out of the batch.

        Raises Overloaded when the queue is full, and what the engine found wrong with the request.
        """
        job: _Job[Asked, Answer] = _Job(request, asyncio.get_running_loop().create_future())
        if not self.alive:
            raise _stopping()
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            raise Overloaded(
                "too many requests wait", where="server", value=self._limits.waiting, remedy="try again shortly"
            ) from error
        self._wake.set()
        return await job.answer

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the model's thread while nothing is being answered: loading an adapter must never meet a running batch. Requests
        that come meanwhile wait for it; what the engine remembered of earlier ones is forgotten."""
        if not self.alive:
            raise _stopping()
        job: _Job[Callable[[], T], T] = _Job(work, asyncio.get_running_loop().create_future())
        self._calls.append(job)
        self._wake.set()
        return await job.answer

    # -- the pump ------------------------------------------------------------------------------------------------------

    async def _run(self) -> None:
        while True:
            if not self._running:
                await self._something_to_do()
            if self._calls and not self._running:
                await self._serve_calls()
            else:
                await self._turn()

    async def _something_to_do(self) -> None:
        while self._queue.empty() and not self._calls:
            self._wake.clear()
            await self._wake.wait()
        if not self._calls:
            await asyncio.sleep(self._limits.window)  # requests sent together start together, and share their first pass

    async def _serve_calls(self) -> None:
        self._stream = None  # adapters may change: it would remember the old ones
        while self._calls:
            job = self._calls[0]  # stays in the list while it runs, so that `stop` finds it
            if not job.answer.done():
                try:
                    job.settle(await self._on_thread(job.request))
                except Exception as error:  # the caller's own; the server goes on
                    job.settle(error)
            self._calls.pop(0)

    async def _turn(self) -> None:
        """Let in what may enter, take out what nobody waits for, run one step, hand out what is finished."""
        self._entering = [] if self._calls else self._next_jobs()
        gone = [ticket for ticket, job in self._running.items() if job.answer.done()]
        try:
            tickets, done = await self._on_thread(lambda: self._step([job.request for job in self._entering], gone))
        except Exception as error:  # whatever the engine does, every client gets an answer and the server goes on
            self._stream, tickets, done = None, (), {}
            for job in (*self._entering, *self._running.values()):
                job.settle(error)
            self._running.clear()
        for ticket in gone:
            self._running.pop(ticket, None)
        self._running.update(zip(tickets, self._entering, strict=False))
        self._entering = []
        for ticket, found in done.items():
            if ticket in self._running:
                self._running.pop(ticket).settle(found)

    def _next_jobs(self) -> list[_Job[Asked, Answer]]:
        jobs: list[_Job[Asked, Answer]] = []
        while len(self._running) + len(jobs) < self._limits.batch and not self._queue.empty():
            job = self._queue.get_nowait()
            if not job.answer.done():
                jobs.append(job)
        return jobs

    def _step(self, requests: Sequence[Asked], gone: Sequence[int]) -> tuple[Sequence[int], Mapping[int, Answer | Exception]]:
        """On the model's thread."""
        if self._stream is None:
            self._stream = self._engine.open(self._limits.batch)
        for ticket in gone:
            self._stream.cancel(ticket)
        tickets = self._stream.admit(requests) if requests else []
        return tickets, self._stream.step()

    async def _on_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _stopping() -> Overloaded:
    return Overloaded("the server is stopping", where="server", remedy="send the request again later")
