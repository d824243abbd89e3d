"""One thread owns the model; an asynchronous queue in front of it puts waiting requests into batches."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Generic, Protocol, TypeVar

from posttrain.errors import PosttrainError
from posttrain.serving.requests import Limits

T = TypeVar("T")
Asked = TypeVar("Asked")
Answer = TypeVar("Answer")


class BatchEngine(Protocol[Asked, Answer]):  # type: ignore[misc]
    """What a batcher asks of a model: one answer or error per request, in order (see `serving.engine.Engine`)."""

    def complete(self, requests: Sequence[Asked], abandoned: Callable[[], bool]) -> Sequence[Answer | PosttrainError]: ...


class Overloaded(PosttrainError):
    """The queue is full, or the server is stopping."""


@dataclass(frozen=True, eq=False)
class _Job(Generic[Asked, Answer]):
    request: Asked
    answer: asyncio.Future[Answer]


class Batcher(Generic[Asked, Answer]):
    """Runs an engine for many clients. Start and stop it inside the running event loop."""

    def __init__(self, engine: BatchEngine[Asked, Answer], limits: Limits) -> None:
        self._engine, self._limits = engine, limits
        self._queue: asyncio.Queue[_Job[Asked, Answer]] = asyncio.Queue(limits.waiting)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="posttrain-model")
        self._pump: asyncio.Task[None] | None = None
        self._running: list[_Job[Asked, Answer]] = []

    def start(self) -> None:
        self._pump = asyncio.create_task(self._run(), name="posttrain-batcher")

    async def stop(self) -> None:
        """Fail what waits, let the engine notice that nobody does any more, and end the thread."""
        if self._pump is not None:
            self._pump.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._pump
        while not self._queue.empty():
            self._running.append(self._queue.get_nowait())
        for job in self._running:
            if not job.answer.done():
                job.answer.set_exception(
                    Overloaded("the server is stopping", where="server", remedy="send the request again later")
                )
        await asyncio.to_thread(self._thread.shutdown, wait=True, cancel_futures=True)

    @property
    def alive(self) -> bool:
        return self._pump is not None and not self._pump.done()

    @property
    def waiting(self) -> int:
        return self._queue.qsize()

    async def complete(self, request: Asked) -> Answer:
        """The answer. Cancelling the caller takes the request out of the queue, or abandons it when it is being drawn.

        Raises Overloaded when the queue is full, and what the engine raised.
        """
        job: _Job[Asked, Answer] = _Job(request, asyncio.get_running_loop().create_future())
        if not self.alive:
            raise Overloaded("the server is stopping", where="server", remedy="send the request again later")
        try:
            self._queue.put_nowait(job)
        except asyncio.QueueFull as error:
            raise Overloaded(
                "too many requests wait", where="server", value=self._limits.waiting, remedy="try again shortly"
            ) from error
        return await job.answer

    async def call(self, work: Callable[[], T]) -> T:
        """Run `work` on the model's thread, between batches: loading an adapter must never meet a running batch."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)

    async def _run(self) -> None:
        while True:
            self._running = [await self._queue.get()]
            await asyncio.sleep(self._limits.window)
            while len(self._running) < self._limits.batch and not self._queue.empty():
                self._running.append(self._queue.get_nowait())
            self._running = [job for job in self._running if not job.answer.done()]
            if self._running:
                await self._draw(self._running)

    async def _draw(self, jobs: list[_Job[Asked, Answer]]) -> None:
        def abandoned() -> bool:
            return all(job.answer.done() for job in jobs)

        answers: Sequence[Answer | Exception]
        try:
            answers = await self.call(lambda: self._engine.complete([job.request for job in jobs], abandoned))
            assert len(answers) == len(jobs), f"{len(answers)} answers to {len(jobs)} requests"
        except Exception as error:  # whatever the engine does, every client gets an answer and the queue goes on
            answers = [error] * len(jobs)
        for job, answer in zip(jobs, answers, strict=True):
            if job.answer.done():
                continue
            if isinstance(answer, Exception):
                job.answer.set_exception(answer)
            else:
                job.answer.set_result(answer)
