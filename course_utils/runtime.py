"""The machine and the profile: device, dtype, seed, folders, versions.

A profile is the answer to "where does this run?". ``smoke`` executes every line
in seconds, ``cpu`` makes each lesson's point on a laptop, ``t4`` is Colab's free
card. The dtype is decided here, once, and nowhere else in the course.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.metadata
import os
import platform
import random
import shutil
import sys
import sysconfig
import time
import tomllib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

# --- files ---
# Put a finished file or folder into its place, on Windows too.

PATIENCE_S = 10.0  # a virus scanner or an indexer lets go of a new file within that


def replace_file(source: str | Path, target: str | Path) -> None:
    """`os.replace`, which takes the other's place at once, tried again while refused.

    Windows refuses as long as any process has one of the two open; elsewhere the first
    attempt settles it.

    Args:
        source: a file or folder.
        target: where it goes, on the same disk.

    Raises:
        OSError: what `os.replace` raised, at last.
    """
    limit, pause = time.monotonic() + PATIENCE_S, 0.01
    while True:
        try:
            return os.replace(source, target)
        except PermissionError:
            if os.name != "nt" or time.monotonic() > limit:
                raise
        time.sleep(pause)
        pause = min(2 * pause, 0.2)


# --- heap ---
# Keep freed memory in the process, so that the next training step has it at once.
#
# glibc takes a block of 32 MiB or more from the system, whatever was freed before, and
# gives it back as soon as it is free. A training step takes and frees the same blocks
# each time (gradients, logits, what an optimiser computes on the way), and the system
# must hand out each page anew, filled with zeros. On the machine where this was tried,
# lesson 2's half by hand took 36 s of processor time before and 30 s after; LoRA's
# steps
# with a trainer hardly gained.
#
# What is kept does not always fit what is asked for next: batches of other lengths need
# blocks of other sizes. A long training's process grows by it, with glibc's own
# settings
# too; `course_utils.training_callbacks.BoundedMemory` gives back what is too much.
#
# The two numbers are set inside the process (man 3 mallopt), so no environment variable
# is needed. Systems without glibc (macOS, Windows, Alpine) are left as they are.

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


def give_back_memory() -> None:
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


PROFILES = ("smoke", "cpu", "t4")
DEFAULT_SEED = 0


@dataclass(frozen=True)
class Profile:
    """Where a lesson runs.

    Attributes:
        name: ``"smoke"``, ``"cpu"`` or ``"t4"``: the size of the run.
        device: ``"cpu"``, ``"cuda"`` or ``"mps"``.
        dtype: the dtype to compute in. Trainable parameters stay in float32
            wherever this is float16 (a gradient scaler needs it).
        seed: the seed every lesson starts from.
    """

    name: str
    device: str
    dtype: torch.dtype
    seed: int = DEFAULT_SEED

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"profile {self.name} · device {self.device} · {dtype}"


@dataclass(frozen=True)
class Finding:
    """One line of the readiness report: is it well, what was seen, what to do."""

    ok: bool
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"✓ {self.what}" if self.ok else f"✗ {self.what}\n    {self.cure}"


def get_profile(name: str | None = None) -> Profile:
    """Choose the profile of this run.

    Args:
        name: ``"smoke"``, ``"cpu"`` or ``"t4"``; ``None`` reads the environment
            variable ``COURSE_PROFILE``, and without it looks at the hardware.

    Returns:
        The profile, with the dtype that this hardware computes well in.

    Raises:
        ValueError: the name is none of the three, or ``COURSE_DEVICE`` no device.
        RuntimeError: ``t4`` was asked for and there is no CUDA card.
    """
    asked = name or os.environ.get("COURSE_PROFILE") or None
    if asked is not None and asked not in PROFILES:
        source = "get_profile" if name else "COURSE_PROFILE"
        raise ValueError(
            f"{source}: there is no profile {asked!r}; choose {', '.join(PROFILES)}."
        )
    device = find_device()
    if asked == "t4" and device != "cuda":
        raise RuntimeError(
            "profile 't4' needs a CUDA card and none was found. Use profile 'cpu', or "
            "on Colab choose Runtime > Change runtime type > T4 GPU."
        )
    if asked == "cpu" and not os.environ.get("COURSE_DEVICE"):
        device = "cpu"  # beside a card too
    if asked is None:
        asked = "t4" if device == "cuda" else "cpu"
    return Profile(asked, device, choose_dtype(device))


def find_device() -> str:
    """Return ``"cuda"`` where PyTorch finds a card, else ``"cpu"``.

    The environment variable ``COURSE_DEVICE`` has its way. Apple's GPU, ``"mps"``, is
    used on its word only: PyTorch 2.13 has no ``torch.linalg.svdvals`` for it, and
    before macOS 15 what is written into a part of a tensor there can be lost
    (https://github.com/pytorch/pytorch/issues/104832), as TRL's loss would write it.

    Raises:
        ValueError: ``COURSE_DEVICE`` is no device, or one that is not here.
    """
    import torch

    found = {
        "cpu": True,
        "cuda": torch.cuda.is_available(),
        "mps": torch.backends.mps.is_available(),
    }
    asked = os.environ.get("COURSE_DEVICE")
    if not asked:
        return "cuda" if found["cuda"] else "cpu"
    if not found.get(asked):
        here = ", ".join(device for device, there in found.items() if there)
        raise ValueError(f"COURSE_DEVICE: no device {asked!r} here; there is {here}.")
    return asked


def choose_dtype(device: str) -> torch.dtype:
    """Decide the dtype to compute in on a device.

    A CUDA card of compute capability 8.0 or more gets bfloat16; an older one, such
    as the T4 (7.5), gets float16: ``torch.cuda.is_bf16_supported()`` is not asked,
    since it says yes on a T4, which only emulates bfloat16. A CPU gets bfloat16
    where the processor multiplies it in hardware, otherwise float32. Apple's MPS
    gets float32.

    Args:
        device: ``"cuda"``, ``"mps"`` or ``"cpu"``.
    """
    import torch

    if device == "cuda":
        capable = torch.cuda.get_device_capability() >= (8, 0)
        return torch.bfloat16 if capable else torch.float16
    if device == "cpu" and cpu_has_bf16():
        return torch.bfloat16
    return torch.float32


def cpu_has_bf16() -> bool:
    """Say whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX)."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def set_seed(seed: int = DEFAULT_SEED) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CUDA's too).

    Args:
        seed: a non-negative integer below 2**32.

    Raises:
        ValueError: the seed is not such an integer.
    """
    import numpy
    import torch

    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {seed!r}.")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def checkout_folder() -> Path | None:
    """Return the root of the checkout this package runs from, or None in a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def data_folder() -> Path:
    """Return the folder with the course's data sets and recorded runs."""
    root = checkout_folder()
    return root / "data" if root else Path(__file__).resolve().parent / "_data"


def build_folder() -> Path:
    """Return the folder that lessons write into, created if need be.

    It is the folder that the environment variable ``COURSE_BUILD`` names (on Colab one
    on Drive, so that work outlives the session), otherwise ``build/`` of the checkout,
    otherwise ``build/`` of the current folder.
    """
    chosen = os.environ.get("COURSE_BUILD")
    folder = (checkout_folder() or Path.cwd()) / "build"
    if chosen:
        folder = Path(chosen).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


@functools.cache
def version_floors() -> dict[str, str]:
    """Return the least version of each library, as this checkout or package asks."""
    from packaging.requirements import Requirement

    if root := checkout_folder():
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
        lines = tomllib.loads(text)["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("course-utils") or []
    asked = [r for r in map(Requirement, lines) if r.marker is None]  # of no extra
    return {r.name: next(iter(r.specifier)).version for r in asked}


def versions() -> dict[str, str]:
    """Return the installed version of each library the course stands on."""
    found = {"python": platform.python_version()}
    for package in version_floors():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


def readiness(profile: Profile | None = None) -> list[Finding]:
    """Examine this machine and say what is ready and what to mend.

    Args:
        profile: the profile to be ready for; ``None`` takes ``get_profile()``.

    Returns:
        Findings to print one a line: Python, each library, memory, disk, device.
    """
    from packaging.version import Version

    profile = profile or get_profile()
    python = platform.python_version()
    findings = [
        Finding(
            sys.version_info >= (3, 11),
            f"Python {python}",
            "The course needs Python 3.11 or newer: install one and run `make course`.",
        )
    ]
    for package, version in versions().items():
        if package == "python":
            continue
        floor = version_floors()[package]
        new = version != "absent" and Version(version) >= Version(floor)
        cure = f'Run `pip install "{package}>={floor}"` and restart the kernel.'
        findings.append(Finding(new, f"{package} {version}", cure))
    memory = memory_gib()
    if memory is not None:
        cure = "Close other programs; lessons 02 and 08 peak near 4 GiB."
        findings.append(Finding(memory >= 6, f"memory {memory:.1f} GiB", cure))
    free_gb = shutil.disk_usage(Path.home()).free / 1e9
    cure = "Free some space: the built-in model and results take about 2 GB."
    findings.append(Finding(free_gb >= 3, f"disk {free_gb:.0f} GB free", cure))
    if profile.device == "cuda" and platform.system() == "Linux":
        header = Path(sysconfig.get_paths()["include"]) / "Python.h"
        there = header.is_file() and any(map(shutil.which, ("cc", "gcc", "clang")))
        cure = "TRL's loss is compiled: `apt install build-essential python3-dev`."
        findings.append(Finding(there, "a C compiler and Python.h", cure))
    findings.append(Finding(True, str(profile)))
    return findings


def memory_gib() -> float | None:
    """Memory of this machine in GiB; None where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return round(psutil.virtual_memory().total / 2**30, 1)
