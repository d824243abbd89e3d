"""Sampling over HTTP gives what sampling in this process gives; what goes wrong on the way is said, not waited for."""

from __future__ import annotations

import json
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch

from posttrain.data.records import StopReason
from posttrain.errors import BindingError, SamplerError
from posttrain.grammar import json_grammar
from posttrain.grammar.matcher import GrammarEngine
from posttrain.policy import LoraOptions, Policy
from posttrain.sampling import LocalSampler, SampleOptions, SampleRequest
from posttrain.sampling.server import ServerOptions, ServerSampler
from posttrain.serving.app import server
from posttrain.serving.completions import SamplerEngine, build_engine_app
from tiny_models import tiny_model, train_tokenizer

TOKENIZER = train_tokenizer()
VOCABULARY = len(TOKENIZER)
END = TOKENIZER.convert_tokens_to_ids("<|im_end|>")
GRAMMAR = json_grammar({"type": "object", "properties": {"a": {"type": "integer"}}, "required": ["a"]})
PROMPTS = [(3, 4, 5, 6, 7 + n, 20 + n) for n in range(5)]


def policy() -> Policy:
    return Policy(tiny_model(vocabulary=VOCABULARY))


def engine() -> GrammarEngine:
    return GrammarEngine(TOKENIZER, VOCABULARY, END)


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    served = policy()
    app = build_engine_app(SamplerEngine(served, LocalSampler(served, END, engine()), END, context=128), "tiny")
    web = server(app, port=0)
    thread = threading.Thread(target=web.run, daemon=True)
    thread.start()
    while not web.started:
        assert thread.is_alive(), "the server did not start"
        time.sleep(0.005)
    yield f"http://127.0.0.1:{web.servers[0].sockets[0].getsockname()[1]}"
    web.should_exit = True
    thread.join(20)


def remote(url: str, **options: Any) -> ServerSampler:
    return ServerSampler(ServerOptions(url, "tiny", **options), END, engine())


def asked(**more: Any) -> list[SampleRequest]:
    how = [
        SampleOptions(9),
        SampleOptions(12, 1.0),
        SampleOptions(8, 0.7, top_k=9),
        SampleOptions(8, 1.0, repetition_penalty=1.4),
    ]
    return [SampleRequest(prompt, 50 + i, how[i % len(how)], **more) for i, prompt in enumerate(PROMPTS)]


def test_the_servers_samples_are_the_process_own(url: str) -> None:
    local = LocalSampler(policy(), END).sample(asked())
    told: list[int] = []
    for request, ours, theirs in zip(asked(), local, remote(url).sample(asked(), told.append), strict=True):
        assert (theirs.ids, theirs.stop, theirs.forced) == (ours.ids, ours.stop, ours.forced)
        assert theirs.logprobs == pytest.approx(ours.logprobs, abs=1e-4)
        how = request.options
        known = how.temperature == 0 or (how.temperature == 1 and how.repetition_penalty == 1)
        if known:
            assert theirs.sampled_logprobs == pytest.approx(ours.sampled_logprobs, abs=1e-4)
        else:
            assert all(math.isnan(value) for value in theirs.sampled_logprobs)
    assert sum(told) == sum(len(sample.ids) for sample in local)


def test_a_grammar_travels_with_the_request_and_forced_tokens_are_marked_as_here(url: str) -> None:
    local = LocalSampler(policy(), END, engine()).sample(asked(grammar=GRAMMAR))
    assert any(any(sample.forced) for sample in local)
    for ours, theirs in zip(local, remote(url).sample(asked(grammar=GRAMMAR)), strict=True):
        assert (theirs.ids, theirs.forced) == (ours.ids, ours.forced)


def adapter(folder: Path, seed: int) -> Path:
    trained = policy()
    trained.add_adapter("main", LoraOptions(rank=4), seed)
    torch.manual_seed(seed)
    for parameter in trained.adapter_parameters("main").values():
        parameter.data = torch.randn_like(parameter).to(torch.bfloat16).float() * 0.3
    trained.save_adapter("main", folder, "tiny")
    return folder


def alone(folder: Path) -> list[tuple[int, ...]]:
    trained = policy()
    trained.load_adapter("main", folder)
    return [sample.ids for sample in LocalSampler(trained, END).sample(asked(adapter="main"))]


def test_new_weights_of_an_adapter_are_served_under_a_new_name_and_the_old_are_gone(url: str, tmp_path: Path) -> None:
    here = remote(url)
    old, new = adapter(tmp_path / "old", 1), adapter(tmp_path / "new", 2)
    first = here.load_adapter("main", old)
    assert [sample.ids for sample in here.sample(asked(adapter="main"))] == alone(old)
    assert here.load_adapter("main", old) == first  # nothing to do
    second = here.load_adapter("main", new)
    assert first != second
    assert [sample.ids for sample in here.sample(asked(adapter="main"))] == alone(new) != alone(old)
    with pytest.raises(SamplerError, match=r"404.*no adapter of that name"):
        here._post("/v1/unload_lora_adapter", {"lora_name": first})


def test_an_adapter_nobody_loaded_is_refused_before_anything_is_sent() -> None:
    with pytest.raises(BindingError, match="no such adapter"):
        remote("http://127.0.0.1:9").sample(asked(adapter="tenant"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": "other"}, "no such model"),
        ({"prompt": []}, "prompt"),
        ({"prompt": [10**6]}, "a token the model does not have"),
        ({"max_tokens": 200}, "do not fit"),
        ({"stop_token_ids": [1]}, "ends a turn at the contract"),
        ({"best_of": 3}, "best_of"),
        ({"structured_outputs": {"grammar": "start: ("}}, "400"),
    ],
)
def test_the_engine_refuses_what_it_would_not_do(url: str, change: dict[str, Any], message: str) -> None:
    body = {"model": "tiny", "prompt": [3, 4], "max_tokens": 4, "stop_token_ids": [END], **change}
    with pytest.raises(SamplerError, match=message):
        remote(url)._post("/v1/completions", body)


# -- servers that misbehave ------------------------------------------------------------------------------------------------


@contextmanager
def answering(answer: Callable[[], bytes]) -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["content-length"]))
            body = answer()
            self.send_response(200)
            self.send_header("content-length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *args: object) -> None: ...

    web = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    web.daemon_threads = True
    threading.Thread(target=web.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{web.server_address[1]}"
    finally:
        web.shutdown()
        web.server_close()


def choice(ids: list[int], reason: str = "length") -> bytes:
    logs = {"token_logprobs": [-1.0] * len(ids)}
    return json.dumps({"choices": [{"token_ids": ids, "logprobs": logs, "finish_reason": reason}]}).encode()


def test_a_server_that_does_not_answer_in_time_is_an_error_that_says_so() -> None:
    held = threading.Event()

    def late() -> bytes:
        held.wait(5)
        return choice([3])

    started = time.perf_counter()
    with answering(late) as url:
        with pytest.raises(SamplerError, match=r"did not answer in time.*0.2 s"):
            remote(url, timeout=0.2).sample([SampleRequest((3, 4), 0)])
        held.set()
    assert time.perf_counter() - started < 4


def test_a_server_that_is_not_there_is_an_error_that_says_so() -> None:
    with pytest.raises(SamplerError, match="cannot be reached"):
        remote("http://127.0.0.1:9").sample([SampleRequest((3, 4), 0)])


def test_what_ends_its_turn_at_the_limit_was_closed_by_its_grammar() -> None:
    said = [*TOKENIZER('{"a":1}')["input_ids"], END]
    for grammar, stop in ((GRAMMAR, StopReason.CLOSED), (None, StopReason.LENGTH)):
        with answering(lambda: choice(said)) as url:
            assert remote(url).sample([SampleRequest((3, 4), 0, grammar=grammar)])[0].stop is stop


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (b"<html>", "lacks what a sample needs"),
        (b"{broken", "not JSON"),
        (b'{"choices": []}', "lacks what a sample needs"),
        (choice([3, 4], "stop"), "without the end-of-turn token"),
    ],
)
def test_an_answer_that_is_no_sample_is_refused(answer: bytes, message: str) -> None:
    with answering(lambda: answer) as url, pytest.raises(SamplerError, match=message):
        remote(url).sample([SampleRequest((3, 4), 0)])


def test_a_server_that_ignores_the_grammar_is_found_out() -> None:
    free = TOKENIZER("What")["input_ids"]
    with answering(lambda: choice(free)) as url, pytest.raises(SamplerError, match="does not allow"):
        remote(url).sample([SampleRequest((3, 4), 0, grammar=GRAMMAR)])
