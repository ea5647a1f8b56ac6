"""Measure the peak memory of a piece of code: on a GPU, or in torch's CPU allocator.

`memory.measure_memory` is the public name.
"""

from __future__ import annotations

import contextlib
import gc
import os
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from course_utils.heap import give_back
from course_utils.memory_request import GIB
from course_utils.runtime import get_profile

KINDS = ("auto", "cuda", "mps", "allocator", "resident")


@dataclass
class Measurement:
    """Bytes at the start and at the peak; filled in when the `with` block ends.

    Attributes:
        kind: ``"cuda"``, ``"mps"``, ``"allocator"`` or ``"resident"``.
        start_bytes: in use when the block began.
        peak_bytes: the most in use at any moment of the block, start included.
        reserved_bytes: the most that torch had reserved on the card (CUDA only).
    """

    kind: str
    start_bytes: int = 0
    peak_bytes: int = 0
    reserved_bytes: int = 0

    @property
    def added_bytes(self) -> int:
        """Peak above the start."""
        return self.peak_bytes - self.start_bytes

    @property
    def peak_gib(self) -> float:
        """Peak in GiB (2**30 bytes)."""
        return self.peak_bytes / GIB


@contextlib.contextmanager
def measure_memory(kind: str = "auto") -> Iterator[Measurement]:
    """Measure the peak memory of the `with` block.

    Args:
        kind: ``"cuda"``: the allocator's own peak, free of cost. ``"mps"``: what torch
            has allocated on Apple's GPU, which keeps no peak: read every 5 ms, so that
            a shorter one may be missed. ``"allocator"``: on a
            CPU, every allocation that torch makes, recorded by its profiler and added
            up; exact to the byte and comparable with `estimate_memory(...).total`, but
            for a few steps only: the records of one step of a 30-layer model take
            about 80 MB and half a second.
            ``"resident"``: the largest resident size of the process, as Linux keeps it
            (elsewhere read every 5 ms); for runs of any length, but it includes
            Python, the libraries and what the allocator keeps for later.
            ``"auto"``: the first, second or third, whichever fits the device on which
            this run's profile computes.

    Yields:
        A `Measurement`, complete when the block has ended.

    Raises:
        ValueError: for an unknown kind, or that of a GPU which is not there.

    >>> import torch
    >>> with measure_memory("allocator") as used:
    ...     x = torch.ones(1_000_000)
    >>> used.added_bytes // 1000
    4000
    """
    import torch

    if kind not in KINDS:
        raise ValueError(f"kind {kind!r} is none of {', '.join(KINDS)}")
    if kind == "auto":
        device = get_profile().device  # the CPU, if so asked, beside a card too
        kind = device if device in KINDS else "allocator"
    if kind == "cuda" and not torch.cuda.is_available():
        raise ValueError("kind 'cuda' needs a CUDA card; on a CPU use 'allocator'")
    if kind == "mps" and not torch.backends.mps.is_available():
        raise ValueError("kind 'mps' needs Apple's GPU; on a CPU use 'allocator'")
    meters = {"cuda": _cuda, "mps": _mps, "allocator": _allocator}
    result = Measurement(kind)
    with meters.get(kind, _resident)(result):
        yield result


@contextlib.contextmanager
def _cuda(result: Measurement) -> Iterator[None]:
    import torch

    gc.collect()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    result.start_bytes = torch.cuda.memory_allocated()
    try:
        yield
    finally:
        torch.cuda.synchronize()
        result.peak_bytes = torch.cuda.max_memory_allocated()
        result.reserved_bytes = torch.cuda.max_memory_reserved()


def live_tensor_bytes() -> int:
    """Bytes of all CPU tensors that Python can reach, each storage once."""
    import torch

    gc.collect()
    storages = {}
    for thing in gc.get_objects():
        if issubclass(type(thing), torch.Tensor):
            for tensor in (thing, thing.grad if thing.is_leaf else None):
                if tensor is not None and tensor.device.type == "cpu":
                    with contextlib.suppress(NotImplementedError, RuntimeError):
                        storage = tensor.untyped_storage()
                        storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


@contextlib.contextmanager
def _allocator(result: Measurement) -> Iterator[None]:
    os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # no lines about its own start
    from torch.profiler import ProfilerActivity, profile

    result.start_bytes = live_tensor_bytes()
    recorder = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
    recorder.start()
    try:
        yield
    finally:
        recorder.stop()
        events = recorder.profiler.kineto_results.events()
        changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
        now = peak = 0
        for _, size in sorted(changes, key=lambda change: change[0]):
            now += size
            peak = max(peak, now)
        result.peak_bytes = result.start_bytes + peak


@contextlib.contextmanager
def _mps(result: Measurement) -> Iterator[None]:
    import torch

    gc.collect()
    torch.mps.synchronize()
    with _watched(result, torch.mps.current_allocated_memory):
        yield


@contextlib.contextmanager
def _resident(result: Measurement) -> Iterator[None]:
    import psutil

    process = psutil.Process()
    gc.collect()
    give_back()  # blocks kept from before would hide that they are taken again
    exact = _restart_high_water()
    try:
        with _watched(result, lambda: process.memory_info().rss):
            yield
    finally:
        if exact:
            result.peak_bytes = max(result.peak_bytes, _high_water())


@contextlib.contextmanager
def _watched(result: Measurement, in_use: Callable[[], int]) -> Iterator[None]:
    """Let a thread read `in_use` every 5 ms, and keep the most."""
    done = threading.Event()
    result.start_bytes = result.peak_bytes = in_use()

    def look() -> None:
        result.peak_bytes = max(result.peak_bytes, in_use())

    def watch() -> None:
        while not done.wait(0.005):
            look()

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        look()


def _restart_high_water() -> bool:
    """Let Linux keep the greatest resident size anew (man 5 proc, `clear_refs`).

    Between two looks a thread can miss what a long call takes and frees.

    Returns:
        Whether it does; other systems, and some containers, do not.
    """
    try:
        Path("/proc/self/clear_refs").write_text("5")
        return _high_water() > 0
    except OSError:
        return False


def _high_water() -> int:
    """The greatest resident size since it was last restarted, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    found = [line.split()[1] for line in lines if line.startswith("VmHWM:")]
    return 1024 * int(found[0]) if found else 0
