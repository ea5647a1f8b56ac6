"""Execute one notebook in a kernel of this same Python: for `make course` and tests."""

from __future__ import annotations

import contextlib
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CELL_TIMEOUT_S = 1800
LOOK_EVERY_S = 0.05
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")


@dataclass(frozen=True)
class Run:
    """A notebook as far as it was executed, in seconds that include the kernel's start.

    `failure` says in one line which cell failed and why, `details` with its traceback.
    `peak_bytes` is the most that the kernel was seen to hold (resident memory, looked
    at every `LOOK_EVERY_S`); None on Windows, which may move it out meanwhile.
    """

    notebook: Any
    seconds: float
    failure: str | None = None
    details: str = ""
    peak_bytes: int | None = None


def execute(
    notebook: Any, folder: Path, environment: Mapping[str, str] | None = None
) -> Run:
    """Execute an nbformat notebook in place, and say how it went whatever it does.

    Its metadata may hold `execution.timeout`, seconds for one cell. The kernel stands
    in `folder`.
    """
    import psutil
    from nbclient import NotebookClient

    execution = notebook.metadata.get("execution", {})
    client = NotebookClient(
        notebook,
        km=_kernel_manager(),
        timeout=execution.get("timeout", CELL_TIMEOUT_S),
        shutdown_kernel="immediate",
        resources={"metadata": {"path": str(folder)}},
    )
    held: list[int] = []
    ended = threading.Event()

    def watch(pid: int) -> None:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            while not held or not ended.wait(LOOK_EVERY_S):
                held.append(process.memory_info().rss)

    def start(**_: Any) -> None:
        pid = [client.km.provisioner.pid]
        threading.Thread(target=watch, args=pid, daemon=True).start()

    client.on_notebook_start = start if os.name != "nt" else None
    started, failure, details = time.perf_counter(), None, ""
    try:  # a kernel that is left keeps GBs: cleanup_kc
        client.execute(env=dict(environment or kernel_environment()), cleanup_kc=True)
    except Exception as error:  # whatever a lesson does, the next ones still run
        failure = describe_failure(notebook, error)
        details = f"{failure}\n{_COLOUR.sub('', str(error))}"
    finally:
        ended.set()
    seconds = time.perf_counter() - started
    return Run(notebook, seconds, failure, details, max(held, default=None))


def _kernel_manager() -> Any:
    """A kernel manager whose kernels are this Python, whatever is installed."""
    from jupyter_client import AsyncKernelManager
    from jupyter_client.kernelspec import KernelSpec, KernelSpecManager

    command = [sys.executable, "-m", "ipykernel_launcher", "--log-level=ERROR"]
    command += ["-f", "{connection_file}"]

    class ThisPython(KernelSpecManager):
        def get_kernel_spec(self, kernel_name: str) -> KernelSpec:
            return KernelSpec(argv=command, display_name="this", language="python")

    return AsyncKernelManager(kernel_spec_manager=ThisPython())


def kernel_environment() -> dict[str, str]:
    """Return this process's environment, with this same course_utils on the path."""
    path = filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(path)}
    for name in ("COURSE_BUILD", "COURSE_CACHE", "COURSE_MODEL"):
        place = environment.get(name)
        if place and (name != "COURSE_MODEL" or Path(place).is_dir()):
            environment[name] = os.path.abspath(place)  # kernels stand elsewhere
    return environment


def describe_failure(notebook: Any, error: Exception) -> str:
    """Say which cell failed (its id and first line) and why, in one line."""
    where = "before the first cell"
    for cell in notebook.cells:
        if cell.cell_type != "code" or not cell.source.strip():
            continue
        where = f"cell {cell.id} ({cell.source.strip().splitlines()[0]})"
        for output in cell.outputs:
            if output.output_type == "error":
                return f"{where}: {output.ename}: {_one_line(output.evalue)}"
        if cell.execution_count is None:
            break
    why = f"{type(error).__name__}: {_one_line(str(error))}"
    if frames := traceback.extract_tb(error.__traceback__):  # not the lesson's fault
        last = frames[-1]
        why += f" ({Path(last.filename).name}, line {last.lineno}, {last.name})"
    return f"{where}: {why}"


def _one_line(text: str, width: int = 200) -> str:
    return " ".join(_COLOUR.sub("", text).split())[:width]
