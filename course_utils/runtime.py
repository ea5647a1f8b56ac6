"""The machine and the profile: device, dtype, seed, folders, versions, memory.

A profile says where this runs: ``smoke`` executes every line in seconds, ``cpu`` makes
each lesson's point on a laptop, ``t4`` is Colab's free card. Its dtype is decided here.
"""

from __future__ import annotations

import ctypes
import functools
import gc
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
    dtype: torch.dtype  # to compute in; beside float16, parameters train in float32
    seed: int = DEFAULT_SEED  # every lesson starts from it

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        return f"profile {self.name} · device {self.device} · {dtype}"


def get_profile(name: str | None = None) -> Profile:
    """Choose the profile of this run, with the dtype this hardware computes well in.

    ``None`` reads the environment variable ``COURSE_PROFILE``, and without it looks
    at the hardware. Raises ValueError: the name is no profile's, or ``COURSE_DEVICE``
    is no device; RuntimeError: ``t4`` needs a CUDA card and there is none.
    """
    chosen = name or os.environ.get("COURSE_PROFILE")
    if chosen and chosen not in PROFILES:
        source, known = "get_profile" if name else "COURSE_PROFILE", ", ".join(PROFILES)
        raise ValueError(f"{source}: there is no profile {chosen!r}; choose {known}.")
    device = _choose_device()
    if chosen == "t4" and device != "cuda":
        raise RuntimeError(
            "profile 't4' needs a CUDA card: use profile 'cpu', or on Colab choose "
            "Runtime > Change runtime type > T4 GPU."
        )
    if chosen == "cpu" and not os.environ.get("COURSE_DEVICE"):
        device = "cpu"  # beside a card too
    chosen = chosen or ("t4" if device == "cuda" else "cpu")
    return Profile(chosen, device, _choose_dtype(device))


def _choose_device() -> str:
    """Return ``COURSE_DEVICE``, else ``"cuda"`` where there is a card, else ``"cpu"``.

    Apple's GPU, ``"mps"``, is used only where asked for: PyTorch 2.13 has no
    ``torch.linalg.svdvals`` for it, and before macOS 15 what TRL's loss writes into a
    part of a tensor can be lost (https://github.com/pytorch/pytorch/issues/104832).
    """
    import torch

    available = ["cpu"]
    available += ["cuda"] if torch.cuda.is_available() else []
    available += ["mps"] if torch.backends.mps.is_available() else []
    chosen = os.environ.get("COURSE_DEVICE")
    if chosen and chosen not in available:
        known = ", ".join(available)
        raise ValueError(f"COURSE_DEVICE: no device {chosen!r} here; there is {known}.")
    return chosen or ("cuda" if "cuda" in available else "cpu")


def _choose_dtype(device: str) -> torch.dtype:
    """Decide the dtype to compute in: bfloat16 where the hardware multiplies it.

    CUDA cards older than compute capability 8.0 get float16; the rest gets float32.
    ``torch.cuda.is_bf16_supported()`` is not asked, since it says yes on a T4 (7.5),
    which only emulates bfloat16.
    """
    import torch

    if device == "cuda":
        capable = torch.cuda.get_device_capability() >= (8, 0)
        return torch.bfloat16 if capable else torch.float16
    return torch.bfloat16 if device == "cpu" and cpu_has_bf16() else torch.float32


def cpu_has_bf16() -> bool:
    """Say whether this processor multiplies bfloat16 in hardware (AVX512-BF16, AMX)."""
    import torch

    if platform.machine().lower() not in ("x86_64", "amd64"):
        return False
    probes = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, probe, lambda: False)() for probe in probes)


def set_seed(seed: int = DEFAULT_SEED) -> None:
    """Seed Python's, NumPy's and PyTorch's generators (CUDA's too)."""
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

    The environment variable ``COURSE_BUILD`` names it (on Colab a folder on Drive, so
    that work outlives the session); else it is ``build/`` of the checkout, or here.
    """
    default = (_checkout_folder() or Path.cwd()) / "build"
    folder = Path(os.environ.get("COURSE_BUILD") or default).expanduser().absolute()
    folder.mkdir(parents=True, exist_ok=True)
    return folder


PATIENCE_S = 10.0  # a virus scanner or an indexer lets go of a new file within that


def replace_file(source: str | Path, target: str | Path) -> None:
    """Let a file or folder take the other's place at once (`os.replace`).

    Windows refuses while any process has one of the two open: there it is tried for
    `PATIENCE_S`, and then the `PermissionError` is raised.
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

    Otherwise each block of 32 MiB or more comes from the system, page by page and
    filled with zeros, and goes back when freed: 36 s instead of 30 s of processor time
    for lesson 2's half by hand. A long training's process grows by what is kept;
    `training_callbacks.BoundedMemory` gives back what is too much, and each call here
    what is free. Returns False where there is no glibc (macOS, Windows, Alpine).
    """
    gc.collect()  # a trainer refers to itself, and keeps its model until then
    give_back_memory()
    if not (libc := _glibc()):
        return False
    taken = any(libc.mallopt(M_MMAP_THRESHOLD, n) for n in (LARGEST, OLD_LARGEST))
    return bool(taken and libc.mallopt(M_TRIM_THRESHOLD, KEPT))


def give_back_memory() -> None:
    """Return freed memory to the system: only then is it seen to be free."""
    if libc := _glibc():
        libc.malloc_trim(0)


def resident_bytes() -> int:
    """Return how much memory this process holds."""
    import psutil

    return psutil.Process().memory_info().rss


def _glibc() -> ctypes.CDLL | None:
    if sys.platform != "linux":
        return None
    libc = ctypes.CDLL(None)
    needed = ("gnu_get_libc_version", "mallopt", "malloc_trim")
    return libc if all(hasattr(libc, name) for name in needed) else None


@functools.cache
def _version_floors() -> dict[str, str]:
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
    installed = {"python": platform.python_version()}
    for package in _version_floors():
        try:
            installed[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            installed[package] = "absent"
    return installed


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

    The findings, to print one a line: Python, each library, memory, disk, device.
    """
    from packaging.version import Version

    profile = profile or get_profile()
    installed = versions()
    findings = [Finding(True, f"Python {platform.python_version()}")]
    for package, floor in _version_floors().items():
        version = installed[package]
        new = version != "absent" and Version(version) >= Version(floor)
        cure = f'Run `pip install "{package}>={floor}"` and restart the kernel.'
        findings.append(Finding(new, f"{package} {version}", cure))
    memory = memory_gib()
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
    return [*findings, Finding(True, str(profile))]


def memory_gib() -> float:
    """Return this machine's memory."""
    import psutil

    return round(psutil.virtual_memory().total / 2**30, 1)
