"""Batches, disconnects and overload; one audit line per request, written before the answer leaves."""

from __future__ import annotations

import hashlib
import json
import socket
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import httpx
import openai
import pytest
from serving_house import METRICS_KEY, House, echo, running

from posttrain.data.records import Message
from posttrain.errors import DataError, PosttrainError, StorageError
from posttrain.files.hashing import sha256_of
from posttrain.serving import Completion, CompletionRequest, Finish, InvalidAnswer, Limits
from posttrain.serving.app import serve


def wait_for(what: object, seconds: float = 5.0) -> None:
    """Wait until a callable is true."""
    end = time.monotonic() + seconds
    while not what():  # type: ignore[operator]
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.005)


def waiting(house: House) -> int:
    return int(httpx.get(f"{house.url}/healthz").json()["waiting"])


def raw_request(house: House, **fields: object) -> socket.socket:
    """Send a chat request on a bare socket, so that the test decides when to hang up."""
    body = json.dumps({"model": "bank_A", "messages": [{"role": "user", "content": "Hi"}], **fields}).encode()
    lines = (
        "POST /v1/chat/completions HTTP/1.1",
        "host: x",
        f"authorization: Bearer {house.keys['bank_A']}",
        f"content-length: {len(body)}",
    )
    head = "\r\n".join(lines) + "\r\n\r\n"
    connection = socket.create_connection(("127.0.0.1", int(house.url.rpartition(":")[2])))
    connection.sendall(head.encode() + body)
    return connection


# -- batching ------------------------------------------------------------------------------------------------------------


def test_requests_enter_the_running_batch_and_each_keeps_its_adapter(house: House) -> None:
    house.engine.gate.clear()
    tenants = ["bank_A", "retail_B"] * 4
    with ThreadPoolExecutor(9) as pool:
        first = pool.submit(house.say, "first")
        wait_for(lambda: house.engine.batches)
        rest = [pool.submit(house.say, f"question {n}", tenant) for n, tenant in enumerate(tenants)]
        wait_for(lambda: house.engine.most == 9)
        assert waiting(house) == 0
        house.engine.gate.set()
        assert first.result().choices[0].message.content is not None
        for n, (tenant, future) in enumerate(zip(tenants, rest, strict=True)):
            assert future.result().choices[0].message.content == f"adapter-{house.releases[tenant]} heard: question {n}"


def test_an_answer_leaves_as_soon_as_it_is_done(house: House) -> None:
    house.engine.gate.clear()
    house.engine.hurry = lambda request: request.messages[-1].content == "quick"
    with ThreadPoolExecutor(1) as pool:
        slow = pool.submit(house.say, "slow")
        wait_for(lambda: house.engine.batches)
        assert "quick" in str(house.say("quick").choices[0].message.content)
        assert not slow.done()
        house.engine.gate.set()
        slow.result()


def test_a_long_text_is_prepared_beside_the_running_batch(house: House) -> None:
    told = threading.Event()
    house.engine.preparing = lambda request: request.messages[-1].content == "long" and told.wait(10)
    with ThreadPoolExecutor(1) as pool:
        long = pool.submit(house.say, "long")
        assert "short" in str(house.say("short").choices[0].message.content)
        assert not long.done()
        told.set()
        assert "long" in str(long.result().choices[0].message.content)


def test_the_audit_line_of_a_wrong_answer_quotes_nothing_of_it(house: House) -> None:
    errors = [
        InvalidAnswer("the model's answer breaks its schema at properties/due", where="answer", value="Jane Roe"),
        RuntimeError("Jane Roe"),
    ]
    for error in errors:
        house.engine.answer = lambda _request, error=error: error
        with pytest.raises(openai.InternalServerError):
            house.say("When is she due?")
    details = [line["detail"] for line in house.lines(2)]
    assert details == ["the model's answer breaks its schema at properties/due", "RuntimeError"]


def test_a_batch_is_no_larger_than_its_limit(still: House) -> None:
    still.limits = Limits(batch=3)
    still.engine.gate.clear()
    with running(still), ThreadPoolExecutor(8) as pool:
        futures = [pool.submit(still.say, str(n)) for n in range(8)]
        wait_for(lambda: waiting(still) == 5)
        still.engine.gate.set()
        for future in futures:
            future.result()
    assert still.engine.most == 3


def test_what_loads_adapters_waits_for_a_gap_and_what_comes_meanwhile_waits_for_it(house: House) -> None:
    house.engine.gate.clear()
    loaded = len(house.model.loaded)
    release = house.add(9.0, "bank_A")
    with ThreadPoolExecutor(3) as pool:
        before = pool.submit(house.say, "before")
        wait_for(lambda: house.engine.batches)
        house.channels.promote("live/bank_A", release, "ann", "better")
        after = pool.submit(house.say, "after", "bank_A")
        time.sleep(0.1)
        assert len(house.engine.batches) == 1 and len(house.model.loaded) == loaded and house.engine.opened == 1
        house.engine.gate.set()
        assert release not in str(before.result().choices[0].message.content)
        assert release in str(after.result().choices[0].message.content)
    assert house.engine.opened == 2


def test_a_fault_of_the_engine_fails_what_runs_and_the_server_goes_on(house: House) -> None:
    def fail(_request: CompletionRequest) -> Completion:
        raise RuntimeError("out of memory")

    house.engine.answer = fail
    house.engine.gate.clear()
    with ThreadPoolExecutor(2) as pool:
        futures = [pool.submit(house.say, str(n)) for n in range(2)]
        wait_for(lambda: house.engine.most == 2)
        house.engine.gate.set()
        for future in futures:
            with pytest.raises(openai.InternalServerError):
                future.result()
    house.engine.answer = echo
    assert house.say("again").choices[0].finish_reason == "stop"


def test_one_bad_request_does_not_fail_its_neighbours(house: House) -> None:
    def answer(request: CompletionRequest) -> Completion | PosttrainError:
        if request.messages[-1].content == "bad":
            return DataError("the prompt is too long", where="messages")
        return Completion(Message("assistant", "fine"), Finish.STOP, 1, 1)

    house.engine.answer = answer
    house.engine.gate.clear()
    with ThreadPoolExecutor(3) as pool:
        good, bad, also = pool.submit(house.say, "good"), pool.submit(house.say, "bad"), pool.submit(house.say, "good")
        wait_for(lambda: house.engine.batches)
        house.engine.gate.set()
        assert good.result().choices[0].message.content == also.result().choices[0].message.content == "fine"
        with pytest.raises(openai.BadRequestError, match="too long"):
            bad.result()


def test_a_full_queue_says_try_again(still: House) -> None:
    still.limits = Limits(waiting=1, batch=1)
    still.engine.gate.clear()
    with running(still), ThreadPoolExecutor(2) as pool:
        running_one = pool.submit(still.say)
        wait_for(lambda: still.engine.batches)
        queued = pool.submit(still.say)
        wait_for(lambda: waiting(still) == 1)
        with pytest.raises(openai.InternalServerError) as caught:
            still.say()
        assert (caught.value.status_code, caught.value.code) == (503, "overloaded")
        assert caught.value.response.headers["retry-after"] == "1"
        still.engine.gate.set()
        running_one.result()
        queued.result()
    assert sorted(str(line["decision"]) for line in still.lines()) == ["failed", "served", "served"]


# -- clients that go away ------------------------------------------------------------------------------------------------


def test_a_client_that_hangs_up_leaves_the_running_batch(house: House) -> None:
    house.engine.gate.clear()
    with ThreadPoolExecutor(1) as pool:
        stays = pool.submit(house.say, "stays")
        wait_for(lambda: house.engine.batches)
        connection = raw_request(house, stream=True)
        wait_for(lambda: house.engine.most == 2)
        connection.close()
        wait_for(lambda: house.engine.cancelled)
        assert [request.messages[-1].content for request in house.engine.cancelled] == ["Hi"]
        line = house.lines(1)[0]
        assert (line["decision"], line["status"], line["tenant"], line["release"]) == (
            "cancelled",
            499,
            "bank_A",
            house.releases["bank_A"],
        )
        assert line["response"] is None
        house.engine.gate.set()
        assert "stays" in str(stays.result().choices[0].message.content)


def test_a_client_that_hangs_up_while_it_waits_is_never_run(still: House) -> None:
    still.limits = Limits(batch=1)
    still.engine.gate.clear()
    with running(still), ThreadPoolExecutor(1) as pool:
        first = pool.submit(still.say)
        wait_for(lambda: still.engine.batches)
        connection = raw_request(still)
        wait_for(lambda: waiting(still) == 1)
        connection.close()
        assert still.lines(1)[0]["decision"] == "cancelled"
        still.engine.gate.set()
        first.result()
        assert still.say().choices[0].finish_reason == "stop"
    assert [len(batch) for batch in still.engine.batches] == [1, 1]
    assert not still.engine.cancelled


def test_stopping_the_server_answers_what_was_running(still: House) -> None:
    with ThreadPoolExecutor(1) as pool:
        with running(still):
            still.engine.gate.clear()
            future = pool.submit(still.say)
            wait_for(lambda: still.engine.batches)
        assert future.result().choices[0].finish_reason == "stop"
    assert len(still.lines()) == 1


# -- the audit log -------------------------------------------------------------------------------------------------------


def test_every_request_leaves_one_line_that_ties_question_answer_and_release(house: House) -> None:
    body = json.dumps({"model": "bank_A", "messages": [{"role": "user", "content": "Pay 12 to ACME"}]}).encode()
    reply = httpx.post(
        f"{house.url}/v1/chat/completions", content=body, headers={"authorization": f"Bearer {house.keys['bank_A']}"}
    )
    [line] = house.lines(1)
    choice = reply.json()["choices"][0]
    release = house.registry.get(house.releases["bank_A"])
    assert line["request"] == hashlib.sha256(body).hexdigest()
    assert line["response"] == sha256_of([choice["message"], choice["finish_reason"]])
    assert (line["tenant"], line["release"], line["adapter"]) == ("bank_A", release.id, release.weights_sha256)
    assert line["contract"] == release.contract.fingerprint
    assert line["key"] == hashlib.sha256(house.keys["bank_A"].encode()).hexdigest()[:12]
    assert (line["decision"], line["reason"], line["status"], line["finish"]) == ("served", "routed", 200, "stop")
    assert line["completion_tokens"] == reply.json()["usage"]["completion_tokens"]
    assert float(str(line["latency_ms"])) > 0


def test_the_log_holds_no_content_and_no_key(house: House) -> None:
    house.say("the secret is 4711")
    with pytest.raises(openai.BadRequestError):
        house.say("the secret is 4711", stop="")
    text = house.audit.log.path.read_text()
    assert len(house.lines()) == 2
    assert "4711" not in text
    assert "heard" not in text
    assert house.keys["bank_A"] not in text


def test_streamed_and_whole_answers_are_audited_alike(house: House) -> None:
    with house.client() as client:
        list(client.chat.completions.create(model="bank_A", messages=[{"role": "user", "content": "Hi"}], stream=True))
    house.say()
    streamed, whole = house.lines(2)
    assert (streamed["stream"], whole["stream"]) == (True, False)
    assert streamed["response"] == whole["response"]


def test_an_answer_that_cannot_be_audited_is_not_sent(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(_record: object) -> None:
        raise StorageError("disk full")

    monkeypatch.setattr(house.audit, "write", full)
    for stream in (False, True):
        with pytest.raises(openai.InternalServerError) as caught:
            house.say(stream=stream)
        assert caught.value.code == "audit_unavailable"
        assert "heard" not in caught.value.response.text


def test_an_altered_audit_log_stops_answers(house: House) -> None:
    house.say()
    path = house.audit.log.path
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(openai.InternalServerError) as caught:
        house.say()
    assert caught.value.code == "audit_unavailable"


# -- operations ----------------------------------------------------------------------------------------------------------


def test_metrics_count_requests_tokens_and_time(house: House) -> None:
    house.say("Hi")
    with pytest.raises(openai.NotFoundError):
        house.say(model="nothing")
    page = httpx.get(f"{house.url}/metrics", headers={"authorization": f"Bearer {METRICS_KEY}"})
    assert page.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = dict(line.rsplit(" ", 1) for line in page.text.splitlines() if not line.startswith("#"))
    assert lines['posttrain_requests_total{tenant="bank_A",decision="served"}'] == "1"
    assert lines['posttrain_requests_total{tenant="bank_A",decision="refused"}'] == "1"
    assert lines['posttrain_tokens_total{tenant="bank_A",kind="prompt"}'] == "1"
    assert lines['posttrain_request_seconds_bucket{le="+Inf"}'] == lines["posttrain_request_seconds_count"] == "2"
    assert lines["posttrain_waiting_requests"] == "0"


def test_who_is_served_and_how_much_is_shown_to_the_metrics_key_alone(house: House) -> None:
    house.say("Hi")
    house.say("Hi", "retail_B")
    page = httpx.get(f"{house.url}/metrics").text
    assert "bank_A" not in page and "retail_B" not in page
    assert 'posttrain_requests_total{decision="served"} 2' in page.splitlines()
    for key in (house.keys["bank_A"], "wrong"):
        refused = httpx.get(f"{house.url}/metrics", headers={"authorization": f"Bearer {key}"})
        assert refused.status_code == 401 and "bank_A" not in refused.text


def test_health_answers_without_a_key(house: House) -> None:
    reply = httpx.get(f"{house.url}/healthz")
    assert (reply.status_code, reply.json()) == (200, {"status": "ok", "waiting": 0})


def test_serve_runs_the_server(still: House, monkeypatch: pytest.MonkeyPatch) -> None:
    import uvicorn

    ran = []
    monkeypatch.setattr(uvicorn.Server, "run", lambda self: ran.append((self.config.host, self.config.port)))
    serve(object(), port=1234)  # type: ignore[arg-type]
    assert ran == [("127.0.0.1", 1234)]
