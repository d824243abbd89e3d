"""Sampling: the protocol and the in-process engine."""

from posttrain.sampling.local import EngineOptions, LocalSampler
from posttrain.sampling.protocol import Sample, SampleOptions, Sampler, SampleRequest

__all__ = ["EngineOptions", "LocalSampler", "Sample", "SampleOptions", "SampleRequest", "Sampler"]
