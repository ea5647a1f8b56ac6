"""Colab: what its set-up cell moves, what it leaves alone, and how work is kept.

Colab's packages of 2026-08-19 stand in tests/data. `pip_plan` follows pip's rule: what
is installed and good enough stays; anything else becomes the newest release that every
requirement allows.
"""

import importlib.metadata
import json
import os
import re
import runpy
import shutil
import sys
import tomllib
import types
import zipfile
from pathlib import Path

import pytest
from colab_simulation import simulate
from notebook_rules import Lesson
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version
from test_setup_cell import run_setup

from course_utils import lessons, runtime
from course_utils.runtime import Profile
from course_utils.training import LossHistory, find_checkpoint

ROOT = Path(__file__).resolve().parents[2]
DATA = ROOT / "tests" / "data"
FAKE = ROOT / "tests" / "platforms" / "fake_colab"
FROZEN = DATA / "colab_packages_2026-08-19.txt"
# Colab's Python; markers of requirements are read for it.
COLAB = {"python_version": "3.13", "sys_platform": "linux", "extra": ""}
# What tests and the simulation need beside Colab's packages, at versions of its own.
TEST_TOOLS = {"setuptools"}
MOVED = {
    "bitsandbytes": (None, "0.50.2"),
    "datasets": ("4.0.0", "5.2.0"),
    "gguf": (None, "0.19.0"),
    "huggingface-hub": ("1.27.0", "1.33.0"),
    "pyarrow": ("18.1.0", "26.0.1"),
    "trl": (None, "1.16.0"),
}


def pins(path):
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = [line.split("==") for line in lines if line and line[0] != "#"]
    return {canonicalize_name(name): version for name, version in pairs}


def releases():
    """{name: {version: its requirements}} of what the set-up cell may install."""
    text = (DATA / "colab_requirements.json").read_text(encoding="utf-8")
    packages = json.loads(text)["packages"]
    return {canonicalize_name(name): known for name, known in packages.items()}


def pip_plan(wanted, installed, known):
    """Return {name: (before, after)} of what `pip install wanted` would move.

    Raises:
        LookupError: a package would move about whose releases nothing is known, or no
            known release fits.
    """
    rules = {}
    waiting = [Requirement(word) for word in wanted]
    state, moved = dict(installed), {}
    while waiting:
        rule = waiting.pop(0)
        if rule.marker and not rule.marker.evaluate(COLAB):
            continue
        name = canonicalize_name(rule.name)
        rules.setdefault(name, []).append(rule.specifier)
        fits = all(
            specifier.contains(state.get(name, "0")) for specifier in rules[name]
        )
        if name in state and fits:
            continue
        good = [
            version
            for version in known.get(name, {})
            if all(specifier.contains(version) for specifier in rules[name])
        ]
        if not good:
            asked = ", ".join(map(str, rules[name]))
            raise LookupError(f"{name} {asked} would move {state.get(name)}: to what?")
        newest = max(good, key=Version)
        moved[name] = (installed.get(name), newest)
        state[name] = newest
        waiting += map(Requirement, known[name][newest])
    return moved


def commands_on_colab(monkeypatch, tmp_path):
    packages = pins(FROZEN)
    return run_setup(monkeypatch, tmp_path, packages)


def install_words(commands):
    (install,) = [c for c in commands if " install " in c and "uninstall" not in c]
    return install.split(" -q ")[1].split()


# --- what moves -------------------------------------------------------------------


def test_on_colab_exactly_these_packages_move(monkeypatch, tmp_path):
    words = install_words(commands_on_colab(monkeypatch, tmp_path))
    assert pip_plan(words, pins(FROZEN), releases()) == MOVED


def test_torchao_is_removed_and_torch_and_numpy_are_not_touched(monkeypatch, tmp_path):
    packages, commands = pins(FROZEN), commands_on_colab(monkeypatch, tmp_path)
    assert packages["torchao"] == "0.10.0" and packages["torch"].startswith("2.11.0")
    assert [c for c in commands if "uninstall" in c][0].endswith("-q -y torchao")
    named = {re.split("[<>=]", word)[0] for word in install_words(commands)}
    assert not named & {"torch", "numpy", "torchao", "torchvision"}
    assert not set(MOVED) & {"torch", "numpy", "transformers", "peft", "accelerate"}


def test_a_higher_floor_or_a_missing_limit_would_be_noticed(monkeypatch, tmp_path):
    words = install_words(commands_on_colab(monkeypatch, tmp_path))
    higher = [w.replace("transformers>=5.15", "transformers>=5.20") for w in words]
    with pytest.raises(LookupError, match="transformers >=5.20 would move 5.15.0"):
        pip_plan(higher, pins(FROZEN), releases())
    free = [w for w in words if not w.startswith("huggingface_hub")]
    moved = pip_plan(free, pins(FROZEN), releases())
    assert moved["huggingface-hub"] == ("1.27.0", "2.4.0"), "so the limit is needed"


def test_a_second_run_moves_nothing(monkeypatch, tmp_path):
    words = install_words(commands_on_colab(monkeypatch, tmp_path))
    after = pins(FROZEN) | {name: new for name, (_, new) in MOVED.items()}
    assert pip_plan(words, after, releases()) == {}


def test_the_requirements_on_file_are_those_of_the_installed_packages():
    compared = 0
    for name, known in releases().items():
        installed = importlib.metadata.version(name)
        if installed not in known:
            continue
        real = importlib.metadata.requires(name) or []
        plain = {Requirement(r) for r in real if "extra ==" not in r}
        assert plain == set(map(Requirement, known[installed])), name
        compared += 1
    assert compared >= 4, "constraints.txt has moved on: renew the file"


def test_what_colab_brings_is_new_enough_for_the_rest():
    with open(ROOT / "pyproject.toml", "rb") as file:
        wanted = tomllib.load(file)["project"]["dependencies"]
    after = pins(FROZEN) | {name: new for name, (_, new) in MOVED.items()}
    for rule in map(Requirement, wanted):
        assert rule.specifier.contains(after[canonicalize_name(rule.name)]), rule


# --- the second pin file ------------------------------------------------------------


def test_constraints_colab_is_colab_after_set_up():
    """Where both name a package, they agree; torch is the one of constraints.txt."""
    ours, after = pins(ROOT / "constraints-colab.txt"), pins(FROZEN)
    after |= {name: new for name, (_, new) in MOVED.items()}
    assert ours["torch"] == pins(ROOT / "constraints.txt")["torch"]
    assert "torchao" not in ours
    for name in ("transformers", "peft", "accelerate", "numpy", "ipywidgets"):
        assert ours[name] == after[name], name
    differ = {n for n in ours if n in after and ours[n] != after[n]}
    assert differ == {"torch"} | TEST_TOOLS
    assert not set(MOVED) - set(ours)


# --- keeping work -------------------------------------------------------------------


def shown_code(cell):
    """The fenced blocks of a cell of lesson 00."""
    lesson = Lesson.read(ROOT / "notebooks" / "00_start_here.ipynb", ())
    return re.findall(r"```python\n(.*?)```", lesson.text(cell), re.DOTALL)


@pytest.fixture
def colab(monkeypatch, tmp_path):
    """`google.colab` in this process; downloads go to a folder of the test."""
    for name in ("google", "google.colab", "google.colab.drive", "google.colab.files"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    monkeypatch.setattr(sys.modules["google"], "__path__", [], raising=False)
    (tmp_path / "downloads").mkdir()
    monkeypatch.setenv("FAKE_COLAB_DOWNLOADS", str(tmp_path / "downloads"))
    monkeypatch.setenv("COURSE_BUILD", "")
    runpy.run_path(str(FAKE / "sitecustomize.py"))
    return tmp_path


def session(folder, disk, stop_at=None):
    """What a reader does in one session: mount, build a trainer, train, download.

    The code is that of lesson 00; Drive's folder and the size of the run are the
    test's. `stop_at` loses the connection in the middle of that step.
    """
    import torch
    from peft import LoraConfig
    from small_models import byte_tokenizer, random_llama
    from training_child import records
    from transformers import TrainerCallback
    from trl import SFTTrainer

    class Disconnect(TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, **kwargs):
            if state.global_step + 1 == stop_at:
                raise ConnectionError("the runtime has disconnected")

    mount, train, download = shown_code("colab")
    assert "/content/drive" in mount and "save_steps=50" in train
    mount = mount.replace("/content/drive", (folder / "drive").as_posix())
    build, _, go = train.partition("trainer = ...")
    names = {"profile": Profile("cpu", "cpu", torch.float32, 0), "runtime": runtime}
    exec(mount, names)
    exec(build.replace("save_steps=50", "save_steps=2, max_steps=6"), names)
    names["trainer"] = SFTTrainer(
        model=random_llama(initializer_range=0.05),
        args=names["args"],
        train_dataset=records(),
        processing_class=byte_tokenizer(),
        peft_config=LoraConfig(
            r=2, target_modules="all-linear", init_lora_weights=True
        ),
    )
    names["trainer"].add_callback(Disconnect())
    os.chdir(disk)
    exec(go.partition("\n")[2], names)
    exec(download, names)
    return LossHistory.from_trainer(names["trainer"]).loss


def test_work_on_drive_outlives_a_disconnect(colab, monkeypatch):
    for name in ("disk1", "disk2", "disk3", "other"):
        (colab / name).mkdir()
    monkeypatch.chdir(colab / "disk1")
    unbroken = session(colab / "other", colab / "disk3")
    with pytest.raises(ConnectionError):
        session(colab, colab / "disk1", stop_at=5)
    kept = colab / "drive" / "MyDrive" / "fine-tuning-course"
    assert Path(find_checkpoint(kept / "mine")).name == "checkpoint-4"
    monkeypatch.chdir(colab)  # Windows keeps the folder that one stands in
    shutil.rmtree(colab / "disk1")  # Colab's disk is gone, Drive is not
    resumed = session(colab, colab / "disk2")
    assert resumed == pytest.approx(unbroken, abs=1e-6)
    (archive,) = (colab / "downloads").iterdir()
    names = zipfile.ZipFile(archive).namelist()
    assert {"adapter_model.safetensors", "adapter_config.json"} <= set(names)


def test_results_go_to_drive_too(colab):
    exec(
        shown_code("colab")[0].replace("/content/drive", (colab / "drive").as_posix()),
        {},
    )
    lessons.save_result("99", "kept")
    kept = colab / "drive" / "MyDrive" / "fine-tuning-course" / "results" / "99.json"
    assert "kept" in kept.read_text(encoding="utf-8")


# --- a pretended Colab, in full ----------------------------------------------------


@pytest.mark.slow
@pytest.mark.model
@pytest.mark.timeout(3600)
def test_lesson_00_begins_on_a_pretended_colab(tmp_path, monkeypatch):
    found = importlib.metadata.version
    if Version(found("huggingface_hub")) >= Version("2"):
        pytest.skip("needs the packages of constraints-colab.txt: make test-colab")
    for name in ("JUPYTER_PATH", "PYTHONPATH", "COURSE_PROFILE"):
        monkeypatch.setenv(name, os.environ.get(name, ""))
    result = simulate(sys.executable, tmp_path)
    outputs = result["outputs"]
    assert "Paris" in outputs["stream"] and outputs["load"] == "134515008"
    assert "✗" not in outputs["readiness"]
    versions, package, build = outputs["where"].splitlines()
    assert versions == f"{found('ipython')} {found('ipywidgets')}"
    clone = tmp_path / "content" / "fine-tuning-in-the-open"
    assert Path(package).is_relative_to(clone) and Path(build) == clone / "build"
    assert result["moved"] == {}, "the environment is Colab's after set-up"
