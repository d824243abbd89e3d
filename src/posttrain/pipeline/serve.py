"""`posttrain serve`: load what the channels point at, issue keys on the first start, and answer."""

from __future__ import annotations

import socket
from collections.abc import Callable
from pathlib import Path

from posttrain.errors import RecipeError
from posttrain.pipeline.registry import KEYS, open_registry
from posttrain.pipeline.runtime import prepare_process


def serve_channels(runs: Path, base: str, host: str, port: int, say: Callable[[str], None], device: str = "auto") -> None:
    """Blocks until interrupted. RecipeError for a device that is not there, before a key is issued or anything is loaded."""
    from posttrain.pipeline.served import application, ensure_keys, left_out
    from posttrain.policy.device import find_device
    from posttrain.serving.app import serve

    prepare_process(None)
    place = find_device(device)
    check_address(host, port)
    registry, channels = open_registry(runs)
    keys = runs / KEYS
    issued = ensure_keys(keys, channels)
    for tenant, key in issued.items():  # before anything can fail: nobody can show them again
        say(f"key of {tenant} (shown once): {key}")
    app = application(registry, channels, base, runs / "weights", keys, runs / "audit.jsonl", place)
    others = left_out(channels)
    served = {name: release for name, release in channels.pointers().items() if name not in others}
    say(f"serving {', '.join(f'{name} -> {release}' for name, release in served.items())}")
    if others:
        say(
            f"refusing {', '.join(others)}: their releases run on other weights; a process with a registry of their own can serve them"
        )
    say(f"http://{host}:{port}/v1")
    serve(app, host, port)


def check_address(host: str, port: int) -> None:
    """RecipeError for an address that nobody can listen on, before keys are issued or weights are read."""
    where = f"{host}:{port}"
    if not 0 < port < 65536:
        raise RecipeError("a port lies between 1 and 65535", where=where, remedy="name another with --port")
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind, protocol) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(address)
    except OSError as error:
        raise RecipeError(
            f"cannot listen there ({error.strerror or error})", where=where, remedy="name another address with --host and --port"
        ) from error


def serve_engine(base: str, host: str, port: int, say: Callable[[str], None], device: str = "auto") -> None:
    """An engine for training's samples over one base (see `serving.completions`). Blocks until interrupted."""
    from posttrain.pipeline.runtime import Runtime
    from posttrain.policy import resolve_base
    from posttrain.policy.device import find_device
    from posttrain.serving.app import serve
    from posttrain.serving.completions import SamplerEngine, build_engine_app

    prepare_process(None)
    place = find_device(device)
    check_address(host, port)
    runtime = Runtime.load(resolve_base(base), device=place)
    engine = SamplerEngine(runtime.policy, runtime.sampler, runtime.contract.end_of_turn, runtime.policy.context)
    say(f"{base} answers /v1/completions on http://{host}:{port}; keep it inside the training job's network")
    serve(build_engine_app(engine, base), host, port)
