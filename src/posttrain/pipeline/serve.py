"""`posttrain serve`: load what the channels point at, issue keys on the first start, and answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from posttrain.pipeline.registry import open_registry
from posttrain.pipeline.runtime import prepare_process


def serve_channels(runs: Path, base: str, host: str, port: int, say: Callable[[str], None]) -> None:
    """Blocks until interrupted."""
    from posttrain.pipeline.served import application, ensure_keys
    from posttrain.serving.app import serve

    prepare_process(None)
    registry, channels = open_registry(runs)
    keys = runs / "keys.json"
    issued = ensure_keys(keys, channels)
    app = application(registry, channels, base, runs / "weights", keys, runs / "audit.jsonl")
    for tenant, key in issued.items():
        say(f"key of {tenant} (shown once): {key}")
    say(f"serving {', '.join(f'{name} -> {release}' for name, release in channels.pointers().items())}")
    say(f"http://{host}:{port}/v1")
    serve(app, host, port)
