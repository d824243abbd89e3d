"""A whole server on a loopback port: real registry, router, audit log and uvicorn; the model alone is a fake."""

from __future__ import annotations

import itertools
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import openai

sys.path.insert(0, str(Path(__file__).parents[1] / "releases"))  # the release builder is shared with the tests of that room

from release_making import BASE, add_release, contract_lock

from posttrain.contract import ContractLock
from posttrain.data.records import Message
from posttrain.errors import PosttrainError, StorageError
from posttrain.releases import Channels, Parent, Registry
from posttrain.sampling.protocol import SampleRequest
from posttrain.serving import (
    AccessFile,
    Audit,
    Completion,
    CompletionRequest,
    Finish,
    Limits,
    Prepared,
    Router,
    build_app,
    issue_key,
    server,
)

Answer = Callable[[CompletionRequest], Completion | PosttrainError]


def echo(request: CompletionRequest) -> Completion:
    """Says which adapter heard what."""
    text = f"{request.adapter} heard: {request.messages[-1].content}"
    return Completion(Message("assistant", text), Finish.STOP, len(request.messages), len(text))


@dataclass
class FakeEngine:
    """Answers by a function that a test may swap; remembers what entered together, how many ran together and what was cancelled; while
    `gate` is unset only requests that `hurry` picks are answered."""

    answer: Answer = echo
    batches: list[list[CompletionRequest]] = field(default_factory=list)
    most: int = 0
    opened: int = 0
    gate: threading.Event = field(default_factory=threading.Event)
    preparing: Callable[[CompletionRequest], object] = lambda _request: None
    hurry: Callable[[CompletionRequest], bool] = lambda _request: False
    cancelled: list[CompletionRequest] = field(default_factory=list)

    def prepare(self, request: CompletionRequest) -> Prepared:
        self.preparing(request)
        return Prepared(request, SampleRequest((), request.seed))

    def open(self, rows: int) -> FakeStream:
        self.opened += 1
        return FakeStream(self)

    @property
    def last(self) -> CompletionRequest:
        return self.batches[-1][-1]


@dataclass
class FakeStream:
    engine: FakeEngine
    inside: dict[int, CompletionRequest] = field(default_factory=dict)
    tickets: Iterator[int] = field(default_factory=itertools.count)

    def admit(self, asked: Sequence[Prepared]) -> list[int]:
        requests = [one.request for one in asked]
        self.engine.batches.append(requests)
        tickets = [next(self.tickets) for _ in requests]
        self.inside.update(zip(tickets, requests, strict=True))
        self.engine.most = max(self.engine.most, len(self.inside))
        return tickets

    def step(self) -> dict[int, Completion | PosttrainError]:
        opened = self.engine.gate.wait(0.01)
        done = {t: self.engine.answer(r) for t, r in self.inside.items() if opened or self.engine.hurry(r)}
        self.inside = {t: r for t, r in self.inside.items() if t not in done}
        return done

    def cancel(self, ticket: int) -> None:
        self.engine.cancelled.append(self.inside.pop(ticket))


@dataclass
class FakeModel:
    """Knows adapters by release id, as a real one must; `dense` are releases of the resident weights; `broken` cannot be loaded."""

    weights: str = BASE
    contract: str = contract_lock().fingerprint
    dense: set[str] = field(default_factory=set)
    broken: set[str] = field(default_factory=set)
    loaded: list[str] = field(default_factory=list)
    threads: set[str] = field(default_factory=set)
    name: Callable[[str], str] = "adapter-{}".format

    def adapter_for(self, release_id: str) -> str | None:
        self.threads.add(threading.current_thread().name)
        if release_id in self.broken:
            raise StorageError("the adapter could not be loaded", where=release_id)
        self.loaded.append(release_id)
        return None if release_id in self.dense else self.name(release_id)


METRICS_KEY = "metrics-key"


@dataclass
class House:
    """Everything a test may reach: two served tenants with one release and one key each."""

    root: Path
    limits: Limits = field(default_factory=Limits)
    base: str = BASE
    lock: ContractLock = field(default_factory=contract_lock)
    engine: FakeEngine = field(default_factory=FakeEngine)
    model: FakeModel = field(default_factory=FakeModel)
    url: str = ""

    def __post_init__(self) -> None:
        self.registry = Registry(self.root / "registry")
        self.channels = Channels(self.registry)
        self.access = self.root / "access.json"
        self.keys = {tenant: issue_key(self.access, tenant, f"live/{tenant}") for tenant in ("bank_A", "retail_B")}
        self.releases = {tenant: self.add(float(n), tenant) for n, tenant in enumerate(self.keys, start=1)}
        for tenant, release in self.releases.items():
            self.channels.promote(f"live/{tenant}", release, "ann", "first")
        self.audit = Audit(self.root / "audit.jsonl")
        self.router = Router(self.channels, AccessFile(self.access), self.model)
        self.engine.gate.set()

    def add(self, fill: float, tenant: str, **how: object) -> str:
        bound = {"parent": Parent(self.base), "lock": self.lock}
        return add_release(self.registry, self.root / "weights", fill=fill, tenant=tenant, **{**bound, **how})

    def client(self, tenant: str = "bank_A", key: str | None = None) -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key or self.keys[tenant], max_retries=0, timeout=20)

    def say(self, text: str = "Hi", tenant: str = "bank_A", **more: object) -> openai.types.chat.ChatCompletion:
        with self.client(tenant) as client:
            messages = [{"role": "user", "content": text}]
            return client.chat.completions.create(**{"model": f"live/{tenant}", "messages": messages, **more})  # type: ignore[no-any-return, call-overload]

    def lines(self, count: int | None = None) -> list[dict[str, object]]:
        """The audit log's lines; with `count`, waits until there are that many."""
        for _ in range(200):
            lines = self.audit.log.read()
            if count is None or len(lines) >= count:
                break
            time.sleep(0.02)
        self.audit.log.verify()
        return lines


@contextmanager
def running(house: House) -> Iterator[House]:
    web = server(build_app(house.engine, house.router, house.audit, house.limits, METRICS_KEY), port=0)
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    house.url = f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    try:
        yield house
    finally:
        if isinstance(house.engine, FakeEngine):
            house.engine.gate.set()
        web.should_exit = True
        thread.join(20)
        assert not thread.is_alive(), "the server did not stop"
