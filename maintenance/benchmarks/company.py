"""A training beside other work: its steps alone and beside a busy process, in turn.

OpenMP threads that wait spin on a core that the other process needs; GNU's library
lets them sleep after so many turns as GOMP_SPINCOUNT says when it is loaded.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from transformers import TrainerCallback

from maintenance.benchmarks import paths, training
from maintenance.benchmarks.turns import Task

ROOT = Path(__file__).resolve().parents[2]
# Turns; 300,000 is the library's own.
SPINS = {"spins as it comes": "300000", "soon sleeps": "1000"}
# Computes, and ends by itself if nobody is left to end it.
BUSY = [
    sys.executable,
    "-c",
    "import time\nend = time.time() + 120\nwhile time.time() < end: pass",
]


class InCompany(TrainerCallback):
    """Takes every second step of a training beside a process that only computes.

    Attributes:
        alone_s, beside_s: seconds of the steps; a step alone comes before its pair.
    """

    def __init__(self) -> None:
        self.alone_s, self.beside_s, self.other = [], [], None

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if state.global_step % 2:
            self.other = subprocess.Popen(BUSY)
        self.start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs) -> None:
        seconds = time.perf_counter() - self.start
        (self.beside_s if self.other else self.alone_s).append(seconds)
        self.leave()

    def leave(self) -> None:
        """End the other process, if there is one."""
        if self.other:
            self.other.kill()
            self.other.wait()
        self.other = None


def child(steps: int) -> None:
    """Train the course's LoRA path on one batch again and again; print a run's fields.

    Two warm-up steps, one of each kind, are left out.
    """
    company, steps = InCompany(), 2 * steps + 2
    try:
        with tempfile.TemporaryDirectory() as folder:
            data = (*training.same_records(steps), steps, folder)
            timing = paths.course("lora", *data, callbacks=[company])
    finally:
        company.leave()
    measured = {"alone_s": company.alone_s[1:], "beside_s": company.beside_s[1:]}
    run = {"seconds": sum(timing.seconds), "loss": timing.loss, "measured": measured}
    print(json.dumps(run))


def run_company(spins: str, steps: int) -> dict:
    """So many pairs of steps, in a process whose OpenMP threads so wait."""
    code = "import sys; from maintenance.benchmarks import company; "
    code += "company.child(int(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", code, str(steps)],
        env=os.environ | {"GOMP_SPINCOUNT": spins},
        cwd=ROOT,
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    return json.loads(done.stdout.splitlines()[-1])


def company_tasks(steps: int) -> list[Task]:
    """Both ways of waiting, side by side."""
    return [
        Task(
            "company",
            name,
            lambda _, s=spins: run_company(s, steps),
            {"method": "lora", "steps": steps, "spins": int(spins)},
        )
        for name, spins in SPINS.items()
    ]
