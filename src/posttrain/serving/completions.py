"""An engine for training's samples: vLLM's calls for tokens in and tokens out, answered by the in-process sampler.

For a sampler on another machine, or to try the protocol without vLLM. It knows no tenants and no channels: it belongs behind the
training job's own network, never before users (`serving.app` is what users reach).
"""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path as Folder
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route as Path

from posttrain.data.records import StopReason
from posttrain.errors import DataError, PosttrainError
from posttrain.grammar.matcher import Grammar
from posttrain.policy.policy import Policy
from posttrain.sampling.protocol import Sample, SampleOptions, SampleRequest, Stream, StreamSampler
from posttrain.serving.batcher import Batcher
from posttrain.serving.replies import Failure
from posttrain.serving.requests import BadRequest, Limits

_Token = Annotated[int, Field(ge=0)]


class _Structured(BaseModel):
    model_config = ConfigDict(extra="forbid")
    grammar: str


class _Completion(BaseModel):
    """The part of vLLM's body that is answered; anything else is refused, not ignored."""

    model_config = ConfigDict(extra="forbid")
    model: str
    prompt: Annotated[list[_Token], Field(min_length=1)]
    max_tokens: Annotated[int, Field(ge=1)] = 16
    temperature: Annotated[float, Field(ge=0, le=2, allow_inf_nan=False)] = 1.0
    top_p: Annotated[float, Field(gt=0, le=1)] = 1.0
    top_k: Annotated[int, Field(ge=-1)] = 0
    min_p: Annotated[float, Field(ge=0, le=1)] = 0.0
    repetition_penalty: Annotated[float, Field(gt=0)] = 1.0
    seed: int = 0
    stop_token_ids: list[int] = []
    structured_outputs: _Structured | None = None
    logprobs: Literal[1] = 1
    ignore_eos: Literal[True] = True
    return_token_ids: Literal[True] = True
    add_special_tokens: Literal[False] = False
    skip_special_tokens: Literal[False] = False


class _Load(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lora_name: str
    lora_path: Folder


class _Unload(BaseModel):
    model_config = ConfigDict(extra="forbid")
    lora_name: str


class SamplerEngine:
    """A sampler and its policy as a batcher's engine. Touched by one thread only."""

    def __init__(self, policy: Policy, sampler: StreamSampler, end_of_turn: int, context: int) -> None:
        """`context` is the number of tokens the model can hold, prompt and answer together."""
        self.policy, self.sampler, self.end_of_turn, self.context = policy, sampler, end_of_turn, context

    def open(self, rows: int) -> Stream[SampleRequest, Sample]:
        """See `StreamSampler.open`."""
        return self.sampler.open(rows)

    def load(self, name: str, folder: Folder) -> None:
        if name in self.policy.adapters:
            raise BadRequest("an adapter of that name is loaded", param="lora_name", value=name, remedy="unload it first")
        if not (folder / "adapter_config.json").exists():
            raise BadRequest("no adapter lies there", param="lora_path", value=str(folder), remedy="name a PEFT folder")
        self.policy.load_adapter(name, folder)

    def unload(self, name: str) -> None:
        if name not in self.policy.adapters:
            raise BadRequest("no adapter of that name is loaded", param="lora_name", value=name, status=404)
        self.policy.drop_adapter(name)


def build_engine_app(engine: SamplerEngine, model: str, limits: Limits | None = None) -> Starlette:
    """The application; `model` is the name the base answers to."""
    service = _Service(engine, model, limits or Limits(waiting=4096, batch=256))

    @asynccontextmanager
    async def lifespan(_app: Starlette) -> AsyncIterator[None]:
        service.batcher.start()
        yield
        await service.batcher.stop()

    routes = [
        Path("/v1/completions", service.completions, methods=["POST"]),
        Path("/v1/load_lora_adapter", service.load, methods=["POST"]),
        Path("/v1/unload_lora_adapter", service.unload, methods=["POST"]),
        Path("/v1/models", service.models, methods=["GET"]),
        Path("/health", service.health, methods=["GET"]),
    ]
    return Starlette(routes=routes, lifespan=lifespan, exception_handlers={PosttrainError: _failed})


class _Service:
    def __init__(self, engine: SamplerEngine, model: str, limits: Limits) -> None:
        self.engine, self.model = engine, model
        self.batcher: Batcher[SampleRequest, Sample] = Batcher(engine, limits)

    async def completions(self, request: Request) -> Response:
        body = _validated(_Completion, await request.body())
        if body.stop_token_ids != [self.engine.end_of_turn]:
            raise BadRequest(
                "this engine ends a turn at the contract's token only",
                param="stop_token_ids",
                value=body.stop_token_ids,
                remedy=f"send [{self.engine.end_of_turn}]",
            )
        if len(body.prompt) + body.max_tokens > self.engine.context:
            raise BadRequest(
                "prompt and answer do not fit", param="max_tokens", value=len(body.prompt) + body.max_tokens,
                remedy=f"together at most {self.engine.context}",
            )  # fmt: skip
        if max(body.prompt) >= self.engine.policy.head.vocabulary:
            raise BadRequest("a token the model does not have", param="prompt", value=max(body.prompt))
        sample = await self.batcher.complete(
            SampleRequest(
                tuple(body.prompt),
                body.seed,
                SampleOptions(
                    body.max_tokens, body.temperature, body.top_p, max(0, body.top_k), body.min_p, body.repetition_penalty
                ),
                None if body.structured_outputs is None else Grammar(body.structured_outputs.grammar),
                self._adapter(body.model),
            )
        )
        return JSONResponse(_answer(body, sample))

    def _adapter(self, name: str) -> str | None:
        if name == self.model:
            return None
        if name not in self.engine.policy.adapters:
            raise BadRequest(
                "no such model", param="model", value=name, remedy="load the adapter with /v1/load_lora_adapter", status=404
            )
        return name

    async def load(self, request: Request) -> Response:
        wanted = _validated(_Load, await request.body())
        await self.batcher.call(lambda: self.engine.load(wanted.lora_name, wanted.lora_path))
        return PlainTextResponse(f"adapter {wanted.lora_name} loaded")

    async def unload(self, request: Request) -> Response:
        wanted = _validated(_Unload, await request.body())
        await self.batcher.call(lambda: self.engine.unload(wanted.lora_name))
        return PlainTextResponse(f"adapter {wanted.lora_name} unloaded")

    async def models(self, _request: Request) -> Response:
        names = [self.model, *self.engine.policy.adapters]
        return JSONResponse({"object": "list", "data": [{"id": name, "object": "model"} for name in names]})

    async def health(self, _request: Request) -> Response:
        return Response(status_code=200 if self.batcher.alive else 503)


def _answer(body: _Completion, sample: Sample) -> dict[str, Any]:
    ended = sample.stop is StopReason.END_OF_TURN
    return {
        "object": "text_completion",
        "created": int(time.time()),
        "model": body.model,
        "choices": [
            {
                "index": 0,
                "finish_reason": "stop" if ended else "length",
                "token_ids": list(sample.ids),
                "logprobs": {"token_logprobs": list(sample.logprobs)},
            }
        ],
        "usage": {"prompt_tokens": len(body.prompt), "completion_tokens": len(sample.ids)},
    }


def _validated(kind: Any, data: bytes) -> Any:
    try:
        return kind.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "body"
        raise BadRequest(first["msg"], param=where, value=first.get("input")) from error


async def _failed(_request: Request, error: Exception) -> Response:
    failure = Failure.of(error) if isinstance(error, PosttrainError) else Failure.of(DataError(str(error)))
    return JSONResponse(failure.body(), failure.status, failure.headers())
