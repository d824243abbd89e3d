"""A stage in a process of its own: what it leaves behind in memory goes with it.

Training and measuring leave a C heap of small pieces between free ones, which every later allocation searches: on a road in one process
the same training step took half as long again after five stages as in the first (docs/performance.md). A forked child costs nothing to
start, as everything is imported; it works, writes what it found to the run folder, and ends.

A process may be forked only as long as it has computed in one thread: OpenMP's threads do not exist in a child that believes in them.
Whoever forks therefore keeps itself to one thread, and the child takes its own number.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable
from contextlib import suppress

import torch

from posttrain import errors
from posttrain.errors import PosttrainError, TrainingError
from posttrain.training import team

_INTERRUPTED = 130  # exit status, as shells have it
_PARENT_DEATH = 1  # of prctl, sys/prctl.h


def can_be_apart(device: torch.device) -> bool:
    """Whether this system lets a stage run in a child: Linux, one process, a CPU (a GPU's context does not survive a fork)."""
    return sys.platform == "linux" and team().size == 1 and device.type == "cpu"


def apart(work: Callable[[], None], name: str) -> None:
    """Do `work` in a child and wait for it. What the child raises for its user is raised here; another error has shown its traceback
    there and ends this process, too. An interrupt reaches both: the child keeps its last step, then this process is interrupted. A
    killed parent takes the child with it."""
    reading, writing = os.pipe()
    sys.stdout.flush()
    sys.stderr.flush()
    parent, child = os.getpid(), os.fork()
    if child == 0:
        os.close(reading)
        os._exit(_in_child(work, writing, parent))
    os.close(writing)
    said, interrupted = _all_of(reading)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if interrupted or status == _INTERRUPTED:
        raise KeyboardInterrupt
    if said:
        raise _error(json.loads(said))
    if status < 0:
        raise TrainingError(
            f"the stage's process was ended by {signal.Signals(-status).name}",
            where=name,
            remedy="run the same command again, it goes on; where memory ran out, lower pack_tokens or the stage's batch",
        )
    if status:
        raise SystemExit(status)


def _all_of(reading: int) -> tuple[bytes, bool]:
    """What the child says until it ends, and whether this process was interrupted meanwhile. A second interrupt is not waited out."""
    said, interrupted = b"", False
    with os.fdopen(reading, "rb", buffering=0) as pipe:
        while True:
            try:
                part = pipe.read(65536)
            except KeyboardInterrupt:
                if interrupted:
                    raise
                interrupted = True
                continue
            if not part:
                return said, interrupted
            said += part


def _in_child(work: Callable[[], None], writing: int, parent: int) -> int:
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(_PARENT_DEATH, signal.SIGKILL)
    try:
        if os.getppid() != parent:  # it died before the line above
            return 1
        work()
        return 0
    except PosttrainError as error:
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(json.dumps(_parts(error)).encode())
        return 1
    except KeyboardInterrupt:
        return _INTERRUPTED
    except BaseException:
        traceback.print_exc()
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


def _parts(error: PosttrainError) -> dict[str, str | None]:
    shown = None if error.value is None else repr(error.value)
    return {"type": type(error).__name__, "what": error.what, "where": error.where, "value": shown, "remedy": error.remedy}


class _Shown:
    """A value of the child, as it was shown there."""

    def __init__(self, text: str) -> None:
        self._text = text

    def __repr__(self) -> str:
        return self._text


def _error(parts: dict[str, str | None]) -> PosttrainError:
    kind = getattr(errors, str(parts["type"]), PosttrainError)
    value = None if parts["value"] is None else _Shown(parts["value"])
    made: PosttrainError = kind(str(parts["what"]), where=parts["where"], value=value, remedy=parts["remedy"])
    return made
