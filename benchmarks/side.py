"""One side of a duel: a process that does one step whenever it is told to, and says what the step cost.

Lines on standard input: `go` asks for a step, `end` for the peak of the process's memory. Answers are JSON lines on the standard
output the process was started with; whatever libraries print goes to standard error.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

Step = dict[str, float]  # what a step reports: tokens, and for training the loss


def finish_device() -> None:
    """Wait for what was started on a GPU: its work is not done when the call returns."""
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def peak_mib() -> float:
    """Peak memory of this process, MiB: on the GPU where there is one, else resident (Linux: VmHWM)."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) / 1024
    raise OSError("the kernel does not tell the peak of a process's memory")


class Turns:
    """The process's end of the conversation."""

    def __init__(self) -> None:
        self._answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def wait(self) -> None:
        """Return when it is this side's turn; the process ends here when there are no more turns."""
        line = sys.stdin.readline().strip()
        if line != "go":
            self.say(peak_mib=peak_mib())
            os._exit(0)  # libraries' exit handlers have nothing left to do

    def say(self, **figures: float) -> None:
        self._answers.write(json.dumps(figures) + "\n")
        self._answers.flush()

    def serve(self, steps: Iterator[Step]) -> None:
        """Do one of `steps` each turn."""
        self.say(ready=1)
        while True:
            self.wait()
            start = time.perf_counter()
            done = next(steps)
            finish_device()
            self.say(seconds=time.perf_counter() - start, **done)


def main() -> None:
    """`python -m benchmarks.side MODULE FUNCTION MATERIAL OPTIONS`: the function gets the material, the turns and the options."""
    module, function, material, options = sys.argv[1:]
    turns = Turns()
    found: Any = getattr(importlib.import_module(f"benchmarks.{module}"), function)
    found(json.loads(Path(material).read_text("utf-8")), turns, json.loads(options))


if __name__ == "__main__":
    main()
