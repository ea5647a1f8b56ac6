"""No network, time limits, skips with a reason, the seconds of each lesson at the end.

Before the first test the models that tests need are fetched; from then on this process
and those it starts can connect to nothing outside, and an attempt fails the session.
With `-n 2` all this holds for each worker; what they tell is gathered by the first
process, which runs no test.
"""

import gc
import os
import runpy
import signal
import tempfile
from pathlib import Path

import pytest
from hypothesis import HealthCheck
from hypothesis import settings as hypothesis_settings

# Put on the path of child processes; two of them bear the same name on purpose.
collect_ignore = ["platforms/fake_colab", "platforms/network_guard"]

GUARD = Path(__file__).parent / "platforms" / "network_guard"
LOG = pytest.StashKey[Path]()
# A test beyond its limit hangs: one that shares its cores takes several times as long.
# Without this signal, on Windows, it ends the whole session.
TEST_LIMIT_S = 900 if hasattr(signal, "SIGALRM") else 1800
MODEL_LIMIT_S = 1800  # where the built-in model is loaded
BUDGET_S = {"00": 60, "01": 60}  # the smoke profile on two cores; other lessons: 85


# No verdict on time, which a busy machine gives; the same examples in each run, so that
# what fails can be seen again. Slow tests draw new examples each time.
hypothesis_settings.register_profile(
    "course",
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow],
)
hypothesis_settings.load_profile("course")


def is_worker(config):
    return hasattr(config, "workerinput")


def pytest_configure(config):
    """One log of blocked connections for this session and its workers."""
    if not is_worker(config):
        log = Path(tempfile.mkdtemp(prefix="blocked-")) / "log"
        os.environ["COURSE_BLOCKED_LOG"] = str(log)
    config.stash[LOG] = Path(os.environ["COURSE_BLOCKED_LOG"])


def pytest_collection_modifyitems(config, items):
    if is_worker(config):  # the longest first, so that no worker ends long after others
        items.sort(key=lambda item: "lesson_seconds" not in item.fixturenames)
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA card here"))
    for item in items:
        if not item.get_closest_marker("timeout"):
            model = item.get_closest_marker("model")
            limit = MODEL_LIMIT_S if model else TEST_LIMIT_S
            item.add_marker(pytest.mark.timeout(limit))


def pytest_runtest_setup(item):
    """What is not marked `gpu` computes on the CPU, beside a card too."""
    if item.get_closest_marker("gpu"):
        os.environ.pop("COURSE_DEVICE", None)
    else:
        os.environ["COURSE_DEVICE"] = "cpu"


def pytest_collection_finish(session):
    """Fetch models, then refuse outward connections."""
    if session.config.option.collectonly:
        return
    gc.freeze()  # trainers collect often: what is imported stays, and is not looked at
    if any(item.get_closest_marker("model") for item in session.items):
        from course_utils import models

        for bundle in (models.SMOLLM2, models.MINILM):
            try:
                models.prepare(bundle)
            except models.ModelUnavailable as error:
                print(f"{bundle.name}: {error}")  # the tests that need it will fail
    paths = [str(GUARD), str(GUARD.parents[1]), os.environ.get("PYTHONPATH", "")]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    runpy.run_path(str(GUARD / "sitecustomize.py"))


def pytest_sessionfinish(session):
    """Fail where anything tried to connect outward, a caught error too."""
    if session.config.stash[LOG].exists() and not is_worker(session.config):
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


@pytest.fixture
def lesson_seconds(record_property):
    """Note a lesson's seconds by the clock and of processors, printed at the end."""
    return lambda *noted: record_property("lesson_seconds", noted)


def pytest_terminal_summary(terminalreporter, config):
    log = config.stash[LOG]
    if log.exists():
        terminalreporter.section("tried to connect outward: this session fails")
        terminalreporter.write(log.read_text(encoding="utf-8"))
    seconds = {
        noted[0]: noted[1:]
        for reports in terminalreporter.stats.values()
        for report in reports
        if getattr(report, "when", None) == "call"
        for name, noted in report.user_properties
        if name == "lesson_seconds"
    }
    if not seconds:
        return
    title = "seconds of each lesson by the clock, of processors (with exercises)"
    terminalreporter.section(title)
    for lesson, (value, computed) in seconds.items():
        budget = BUDGET_S.get(lesson[:2], 85)
        note = f"  over its budget of {budget} s" if value > budget else ""
        terminalreporter.write_line(f"{lesson:<24} {value:6.1f} {computed:6.1f}{note}")
    total, computed = map(sum, zip(*seconds.values(), strict=True))
    terminalreporter.write_line(f"{'total':<24} {total:6.1f} {computed:6.1f}")
