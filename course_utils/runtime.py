"""The machine and the profile: device, dtype, seed, folders, versions, memory.

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

PROFILES = ("smoke", "cpu", "t4")
DEFAULT_SEED = 0


@dataclass(frozen=True)
class Profile:
    """Where a lesson runs, and how."""

    name: str  # "smoke", "cpu" or "t4": the size of the run
    device: str  # "cpu", "cuda" or "mps"
    # To compute in. Trainable parameters stay in float32 wherever this is float16 (a
    # gradient scaler needs it).
    dtype: torch.dtype
    seed: int = DEFAULT_SEED  # every lesson starts from it

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"profile {self.name} · device {self.device} · {dtype}"


def get_profile(name: str | None = None) -> Profile:
    """Choose the profile of this run, with the dtype this hardware computes well in.

    ``None`` reads the environment variable ``COURSE_PROFILE``, and without it looks
    at the hardware.

    Raises:
        ValueError: the name is no profile's, or ``COURSE_DEVICE`` is no device.
        RuntimeError: ``t4`` was asked for and there is no CUDA card.
    """
    chosen = name or os.environ.get("COURSE_PROFILE") or None
    if chosen is not None and chosen not in PROFILES:
        source = "get_profile" if name else "COURSE_PROFILE"
        raise ValueError(
            f"{source}: there is no profile {chosen!r}; choose {', '.join(PROFILES)}."
        )
    device = _choose_device()
    if chosen == "t4" and device != "cuda":
        raise RuntimeError(
            "profile 't4' needs a CUDA card and none was found. Use profile 'cpu', or "
            "on Colab choose Runtime > Change runtime type > T4 GPU."
        )
    if chosen == "cpu" and not os.environ.get("COURSE_DEVICE"):
        device = "cpu"  # beside a card too
    if chosen is None:
        chosen = "t4" if device == "cuda" else "cpu"
    return Profile(chosen, device, _choose_dtype(device))


def _choose_device() -> str:
    """Return ``"cuda"`` where PyTorch finds a card, else ``"cpu"``.

    The environment variable ``COURSE_DEVICE`` has its way. Apple's GPU, ``"mps"``, is
    used on its word only: PyTorch 2.13 has no ``torch.linalg.svdvals`` for it, and
    before macOS 15 what is written into a part of a tensor there can be lost
    (https://github.com/pytorch/pytorch/issues/104832), as TRL's loss would write it.
    """
    import torch

    available = ["cpu"]
    available += ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    chosen = os.environ.get("COURSE_DEVICE")
    if chosen and chosen not in available:
        devices = ", ".join(available)
        raise ValueError(
            f"COURSE_DEVICE: no device {chosen!r} here; there is {devices}."
        )
    return chosen or ("cuda" if "cuda" in available else "cpu")


def _choose_dtype(device: str) -> torch.dtype:
    """Decide the dtype to compute in on a device.

    A CUDA card of compute capability 8.0 or more gets bfloat16; an older one, such
    as the T4 (7.5), gets float16: ``torch.cuda.is_bf16_supported()`` is not asked,
    since it says yes on a T4, which only emulates bfloat16. A CPU gets bfloat16
    where the processor multiplies it in hardware, otherwise float32. Apple's MPS
    gets float32.
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

    Raises:
        ValueError: the seed is not an integer from 0 to 2**32 - 1.
    """
    import numpy
    import torch

    if not isinstance(seed, int) or not 0 <= seed < 2**32:
        raise ValueError(f"seed must be an integer from 0 to 2**32 - 1, not {seed!r}.")
    random.seed(seed)
    numpy.random.seed(seed)
    torch.manual_seed(seed)


def _checkout_folder() -> Path | None:
    """Return the root of the checkout this package runs from, or None in a wheel."""
    root = Path(__file__).resolve().parents[1]
    return root if (root / "pyproject.toml").is_file() else None


def data_folder() -> Path:
    """Return the folder with the course's data sets and recorded runs."""
    root = _checkout_folder()
    return root / "data" if root else Path(__file__).resolve().parent / "_data"


def build_folder() -> Path:
    """Return the folder that lessons write into, created if need be.

    It is the folder that the environment variable ``COURSE_BUILD`` names (on Colab one
    on Drive, so that work outlives the session), otherwise ``build/`` of the checkout,
    otherwise ``build/`` of the current folder.
    """
    folder = (_checkout_folder() or Path.cwd()) / "build"
    if chosen := os.environ.get("COURSE_BUILD"):
        folder = Path(chosen).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


PATIENCE_S = 10.0  # a virus scanner or an indexer lets go of a new file within that


def replace_file(source: str | Path, target: str | Path) -> None:
    """Let a file or folder take the other's place at once (`os.replace`).

    Windows refuses as long as any process has one of the two open, so there it is
    tried again for a while; at last, its `OSError` is raised.
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


# The two numbers of man 3 mallopt that keep_freed_memory sets (malloc.h), and values.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD = -1, -3
LARGEST = 2**30  # bytes: a larger block still comes from the system, and goes back
OLD_LARGEST = 2**25  # all that glibc before 2.35 accepts
KEPT = 2**31 - 1  # bytes: more than this, free at the heap's end, goes back


def keep_freed_memory() -> bool:
    """Let glibc keep freed blocks of up to 1 GiB, from now until the process ends.

    By itself it takes a block of 32 MiB or more from the system, which hands out each
    page anew, filled with zeros, and gives it back as soon as it is free; a training
    step takes and frees the same blocks each time. Lesson 2's half by hand took 36 s
    of processor time before and 30 s after; LoRA's steps hardly gained. Batches of
    other lengths need blocks of other sizes, so a long training's process grows by
    what is kept; `training_callbacks.BoundedMemory` gives back what is too much.

    Returns:
        Whether it does; False where there is no glibc (macOS, Windows, Alpine).
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
    """Return how much memory this process holds; None where Linux does not say."""
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
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return libc if all(hasattr(libc, name) for name in needed) else None


@functools.cache
def version_floors() -> dict[str, str]:
    """Return the least version of each library, as this checkout or package asks."""
    from packaging.requirements import Requirement

    if root := _checkout_folder():
        text = (root / "pyproject.toml").read_text(encoding="utf-8")
        lines = tomllib.loads(text)["project"]["dependencies"]
    else:
        lines = importlib.metadata.requires("course-utils") or []
    wanted = [r for r in map(Requirement, lines) if r.marker is None]  # of no extra
    return {r.name: next(iter(r.specifier)).version for r in wanted}


def versions() -> dict[str, str]:
    """Return the installed version of each library the course stands on."""
    found = {"python": platform.python_version()}
    for package in version_floors():
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            found[package] = "absent"
    return found


@dataclass(frozen=True)
class Finding:
    """One line of the readiness report: is it well, what was seen, what to do."""

    ok: bool
    what: str
    cure: str = ""

    def __str__(self) -> str:
        return f"✓ {self.what}" if self.ok else f"✗ {self.what}\n    {self.cure}"


def readiness(profile: Profile | None = None) -> list[Finding]:
    """Examine this machine for a profile (`None`: `get_profile()`), and name cures.

    Returns:
        Findings to print one a line: Python, each library, memory, disk, device.
    """
    from packaging.version import Version

    profile = profile or get_profile()
    cure = "The course needs Python 3.11 or newer: install one and run `make course`."
    python = f"Python {platform.python_version()}"
    findings = [Finding(sys.version_info >= (3, 11), python, cure)]
    installed = versions()
    for package, floor in version_floors().items():
        version = installed[package]
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
        compiles = header.is_file() and any(map(shutil.which, ("cc", "gcc", "clang")))
        cure = "TRL's loss is compiled: `apt install build-essential python3-dev`."
        findings.append(Finding(compiles, "a C compiler and Python.h", cure))
    findings.append(Finding(True, str(profile)))
    return findings


def memory_gib() -> float | None:
    """Return this machine's memory; None where psutil is not installed."""
    try:
        import psutil
    except ImportError:
        return None
    return round(psutil.virtual_memory().total / 2**30, 1)
