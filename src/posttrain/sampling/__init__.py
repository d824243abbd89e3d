"""Sampling: the protocol and the in-process engine."""

from posttrain.sampling.local import LocalSampler
from posttrain.sampling.protocol import Sample, SampleOptions, Sampler, SampleRequest, Stream, StreamSampler
from posttrain.sampling.run import EngineOptions
from posttrain.sampling.server import ServerOptions, ServerSampler

__all__ = [
    "EngineOptions",
    "LocalSampler",
    "Sample",
    "SampleOptions",
    "SampleRequest",
    "Sampler",
    "ServerOptions",
    "ServerSampler",
    "Stream",
    "StreamSampler",
]
