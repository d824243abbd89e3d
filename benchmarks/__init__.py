"""Speed and memory, ours beside a peer's, in turns within one call. `python -m benchmarks --help`."""
