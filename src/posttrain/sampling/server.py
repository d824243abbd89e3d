"""Sampling on a server: vLLM, or `posttrain serve-engine`, behind the same protocol as the in-process engine.

The server is asked in tokens, never in text, so nothing is tokenised again. An adapter is loaded under a name that ends in the hash
of its files: old and new weights of one adapter cannot be confused, and no cache of the old ones can be reused for the new (vLLM
issues 42125, 47724). Every call has a time limit; a server that does not answer is an error that says so, never a silent wait.
"""

from __future__ import annotations

import json
import math
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from posttrain.data.records import StopReason
from posttrain.errors import BindingError, SamplerError
from posttrain.files.hashing import hash_file
from posttrain.grammar.matcher import Grammar, GrammarEngine, Matcher
from posttrain.sampling.protocol import Sample, SampleRequest, Then
from posttrain.sampling.run import check_prompt


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """url: the server's root, `http://host:port`; model: the name it serves the base under; timeout: seconds for one answer, weights
    included; parallel: requests in flight; api_key: sent as a bearer token."""

    url: str
    model: str
    timeout: float = 300.0
    parallel: int = 64
    api_key: str | None = None


class ServerSampler:
    """Implements `Sampler` over HTTP (`/v1/completions`, `/v1/load_lora_adapter`, `/v1/unload_lora_adapter`).

    Servers report log-probabilities under the untempered distribution; those under the distribution drawn from are nan where the
    two differ (a temperature other than 1, truncation, a grammar), as nobody tells them. With a grammar the answer is replayed
    against it here: a server that ignored it is found out, and forced tokens are marked as in the in-process engine.
    """

    def __init__(self, options: ServerOptions, end_of_turn: int, grammar: GrammarEngine | None = None) -> None:
        self.options, self.end_of_turn, self.grammar = options, end_of_turn, grammar
        self._served: dict[str, str] = {}

    # -- adapters ------------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: Path) -> str:
        """Make the adapter in `folder` (one that the server can read) answer under `name`; returns the name it is served under.
        What `name` stood for before is unloaded afterwards."""
        served = f"{name}-{_content(folder)[:16]}"
        before = self._served.get(name)
        if served == before:
            return served
        self._post("/v1/load_lora_adapter", {"lora_name": served, "lora_path": str(folder.resolve())})
        self._served[name] = served
        if before is not None:
            self._post("/v1/unload_lora_adapter", {"lora_name": before})
        return served

    # -- the protocol --------------------------------------------------------------------------------------------------

    def sample(self, requests: Sequence[SampleRequest], progress: Callable[[int], None] | None = None) -> list[Sample]:
        """See `Sampler.sample`. Raises SamplerError when the server fails, is late, or answers what was not asked."""
        samples: dict[int, Sample] = {}

        def keep(index: int, sample: Sample) -> None:
            samples[index] = sample
            if progress is not None:
                progress(len(sample.ids))

        self.converse(requests, keep)
        return [samples[index] for index in range(len(requests))]

    def converse(self, requests: Sequence[SampleRequest], then: Then) -> None:
        """See `Sampler.converse`: a server keeps its own prefix cache, by name, and a name here never changes its weights. Raises
        SamplerError as `sample` does; requests that nobody has begun to answer by then are not sent."""
        for index, request in enumerate(requests):
            check_prompt(request, f"requests[{index}]")
        pool = ThreadPoolExecutor(max(1, min(self.options.parallel, len(requests))))
        try:
            asked = {pool.submit(self._one, request): index for index, request in enumerate(requests)}
            while asked:
                for answered in wait(asked, return_when=FIRST_COMPLETED).done:
                    index = asked.pop(answered)
                    following = then(index, answered.result())
                    if following is not None:
                        asked[pool.submit(self._one, following)] = index
        finally:
            pool.shutdown(cancel_futures=True)

    def _one(self, request: SampleRequest) -> Sample:
        how = request.options
        body: dict[str, Any] = {
            "model": self._model(request.adapter),
            "prompt": list(request.prompt),
            "max_tokens": how.max_tokens,
            "temperature": how.temperature,
            "top_p": how.top_p,
            "top_k": how.top_k,
            "min_p": how.min_p,
            "repetition_penalty": how.repetition_penalty,
            "seed": request.seed % 2**31,
            "stop_token_ids": [self.end_of_turn],
            "ignore_eos": True,  # the contract's end of turn ends a turn, nothing else does
            "logprobs": 1,
            "return_token_ids": True,
            "add_special_tokens": False,
            "skip_special_tokens": False,
        }
        if request.grammar is not None:
            body["structured_outputs"] = {"grammar": request.grammar.source}
        answer = self._post("/v1/completions", body)
        try:
            choice = answer["choices"][0]
            ids = [int(token) for token in choice["token_ids"]]
            logprobs = [float(value) for value in choice["logprobs"]["token_logprobs"]]
            ended = choice["finish_reason"] == "stop"
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise SamplerError(
                f"the answer lacks what a sample needs ({type(error).__name__}: {error})",
                where=self.options.url,
                remedy="the server must return token ids and log-probabilities (vLLM 0.10.2 or newer does)",
            ) from error
        if ended and (not ids or ids[-1] != self.end_of_turn):
            raise SamplerError(
                "the answer ended without the end-of-turn token",
                where=self.options.url,
                value=ids[-1:],
                remedy="the server's log-probabilities would not match its tokens: use a version that returns the stop token",
            )
        if len(ids) != len(logprobs):
            raise SamplerError(
                "as many log-probabilities as tokens were expected", where=self.options.url, value=(len(ids), len(logprobs))
            )
        plain = how.temperature == 1 and how.top_p == 1 and not how.top_k and not how.min_p and how.repetition_penalty == 1
        forced = self._replay(ids, request.grammar)
        if how.greedy:
            drawn = [0.0] * len(ids)
        else:
            drawn = logprobs if plain and request.grammar is None else [math.nan] * len(ids)
        closed = request.grammar is not None and not ended and ids[-1:] == [self.end_of_turn]
        if closed:  # what a grammar closed with came without a choice
            chosen = max((place for place, logprob in enumerate(logprobs) if logprob != 0), default=-1)
            forced = (*forced[: chosen + 1], *(True,) * (len(ids) - chosen - 1))
        cut = StopReason.CLOSED if closed else StopReason.LENGTH
        return Sample(tuple(ids), tuple(logprobs), tuple(drawn), forced, StopReason.END_OF_TURN if ended else cut)

    def _model(self, adapter: str | None) -> str:
        if adapter is None:
            return self.options.model
        if adapter not in self._served:
            raise BindingError(
                "the server was given no such adapter",
                where=self.options.url,
                value=adapter,
                remedy=f"load it with load_adapter; loaded: {', '.join(self._served) or 'none'}",
            )
        return self._served[adapter]

    def _replay(self, ids: Sequence[int], grammar: Grammar | None) -> tuple[bool, ...]:
        """Which tokens the grammar left no choice about. Raises SamplerError at a token that it does not allow."""
        if grammar is None:
            return (False,) * len(ids)
        if self.grammar is None:
            raise SamplerError(
                "a request names a grammar but the sampler has no grammar engine", where="sampler", remedy="pass a GrammarEngine"
            )
        matcher, forced = self.grammar.matcher(grammar), []
        for place, token in enumerate(ids):
            forced.append(self._only(matcher, token, place))
            if token != self.end_of_turn:
                matcher.consume(token)
        return tuple(forced)

    def _only(self, matcher: Matcher, token: int, place: int) -> bool:
        assert self.grammar is not None
        bits = self.grammar.fill([matcher])[0].view("uint32")
        if not bits[token // 32] >> (token % 32) & 1:
            raise SamplerError(
                "the server drew a token that the grammar does not allow",
                where=f"{self.options.url}, token {place}",
                value=token,
                remedy="start vLLM with --structured-outputs-config.backend guidance",
            )
        return int(sum(int(word).bit_count() for word in bits)) == 1

    # -- HTTP ----------------------------------------------------------------------------------------------------------

    def _post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        where = self.options.url.rstrip("/") + path
        headers = {"content-type": "application/json"}
        if self.options.api_key:
            headers["authorization"] = f"Bearer {self.options.api_key}"
        request = urllib.request.Request(where, json.dumps(body).encode(), headers)
        try:
            with urllib.request.urlopen(request, timeout=self.options.timeout) as response:
                text = response.read().decode("utf-8", "replace")
        except urllib.error.HTTPError as error:
            said = error.read(2000).decode("utf-8", "replace")
            raise SamplerError(f"the server refused ({error.code})", where=where, value=said, remedy=_REFUSED) from error
        except TimeoutError as error:
            raise self._late(where) from error
        except (urllib.error.URLError, OSError) as error:
            if isinstance(getattr(error, "reason", None), TimeoutError):
                raise self._late(where) from error
            raise SamplerError(
                f"the server cannot be reached ({getattr(error, 'reason', error)})",
                where=where,
                remedy="is it running, at that address?",
            ) from error
        try:
            answer: dict[str, Any] = json.loads(text) if text.lstrip().startswith("{") else {"text": text}
        except ValueError as error:
            raise SamplerError("the server's answer is not JSON", where=where, value=text[:200]) from error
        return answer

    def _late(self, where: str) -> SamplerError:
        return SamplerError(
            "the server did not answer in time",
            where=where,
            value=f"{self.options.timeout:g} s",
            remedy="look at its log; raise timeout if it is only slow",
        )


_REFUSED = "adapters need a server started with --enable-lora and VLLM_ALLOW_RUNTIME_LORA_UPDATING=1"


def _content(folder: Path) -> str:
    """Hash of an adapter's weights and configuration."""
    import hashlib

    digest = hashlib.sha256()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        digest.update(hash_file(folder / name).encode())
    return digest.hexdigest()
