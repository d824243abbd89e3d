"""The C library's heap: it keeps what is freed, so that steps find their memory again, and gives it back when what comes next is of another
kind. glibc only; elsewhere nothing happens."""

from __future__ import annotations

import ctypes
import gc
import os
from contextlib import suppress
from pathlib import Path

_MMAP_MAX, _TRIM_THRESHOLD, _TOP_PAD, _ARENA_MAX = -4, -1, -2, -8  # of mallopt, malloc.h


def keep_heap() -> None:
    """Tell glibc not to hand freed memory back: every step frees and allocates the same activations, and faulting the pages in again
    took up to half of a training step on virtual machines (docs/performance.md)."""
    with suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((_MMAP_MAX, 0), (_TRIM_THRESHOLD, 2**31 - 1), (_TOP_PAD, 64 << 20), (_ARENA_MAX, 1)):
            mallopt(option, value)


def give_memory_back() -> None:
    """Between models, and between a stage's training and its measuring: what is freed and was garbage goes back to the system."""
    gc.collect()  # modules with forwards of their own are cycles: the last model's weights would wait for the collector's turn
    trim_heap()


def trim_heap() -> None:
    """Give free pages back."""
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)


class Growth:
    """Within a long training: tensors of ever other sizes leave gaps, and the heap grows by what lies in them. Giving them back costs the
    faults of a whole step, so it is done when they have become `room` bytes."""

    def __init__(self, room: int) -> None:
        self._room = room
        self._before: int | None = None  # resident bytes after the first step, or the first one since pages were given back

    def step(self) -> None:
        """Call it after each step."""
        now = resident()
        if self._before is None or now < self._before:
            self._before = now
        elif now - self._before > self._room:
            trim_heap()
            self._before = None


def resident() -> int:
    """Bytes of this process in memory; 0 where the system does not tell."""
    with suppress(OSError, ValueError, IndexError):
        return int(Path("/proc/self/statm").read_text("ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
    return 0
