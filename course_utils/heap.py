"""Keep freed memory in the process, so that the next training step has it at once.

glibc takes a block of 32 MiB or more from the system, whatever was freed before, and
gives it back as soon as it is free. A training step takes and frees the same blocks
each time (gradients, logits, what an optimiser computes on the way), and the system
must hand out each page anew, filled with zeros. On the machine where this was tried,
lesson 2's half by hand took 36 s of processor time before and 30 s after; LoRA's steps
with a trainer hardly gained.

What is kept does not always fit what is asked for next: batches of other lengths need
blocks of other sizes. A long training's process grows by it, with glibc's own settings
too; `course_utils.training_callbacks.BoundedMemory` gives back what is too much.

The two numbers are set inside the process (man 3 mallopt), so no environment variable
is needed. Systems without glibc (macOS, Windows, Alpine) are left as they are.
"""

from __future__ import annotations

import ctypes
import os
import sys

M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3  # malloc.h
LARGEST = 2**30  # bytes: a larger block still comes from the system, and goes back
OLD_LARGEST = 2**25  # all that glibc before 2.35 accepts
KEPT = 2**31 - 1  # bytes: more than this, free at the heap's end, goes back


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 1 GiB, from now until the process ends.

    Returns:
        Whether it does; False, without a word, where there is no glibc.
    """
    libc = _glibc()
    if libc is None:
        return False
    taken = any(libc.mallopt(M_MMAP_THRESHOLD, n) for n in (LARGEST, OLD_LARGEST))
    return bool(taken and libc.mallopt(M_TRIM_THRESHOLD, KEPT))


def give_back() -> None:
    """Return to the system what the process has freed and kept (man 3 malloc_trim).

    Needed before asking how much memory is left, or how much a process holds.
    """
    libc = _glibc()
    if libc is not None:
        libc.malloc_trim(0)


def resident_bytes() -> int | None:
    """How much memory this process holds, in bytes; None where Linux does not say."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[1])
    except OSError:
        return None
    return pages * os.sysconf("SC_PAGE_SIZE")


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    wanted = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return libc if all(hasattr(libc, name) for name in wanted) else None
