"""Profile and dtype for each kind of machine, faked; files; memory that is kept."""

import gc
import importlib.metadata
import json
import mmap
import os
import random
import subprocess
import sys
import weakref
from types import SimpleNamespace

import numpy
import pytest
import torch

from course_utils import runtime

FP32 = torch.float32


@pytest.fixture
def machine(monkeypatch):
    """Fake a machine: a CUDA capability, MPS, a processor with bfloat16 or not."""
    for variable in ("COURSE_PROFILE", "COURSE_DEVICE"):
        monkeypatch.delenv(variable, raising=False)

    def fake(*, capability=None, mps=False, cpu_bf16=False):
        monkeypatch.setattr(torch.cuda, "is_available", lambda: capability is not None)
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda *_: capability)
        monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda *_: True)
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: mps)
        monkeypatch.setattr(runtime.platform, "machine", lambda: "x86_64")
        monkeypatch.setattr(
            torch.cpu, "_is_avx512_bf16_supported", lambda: cpu_bf16, raising=False
        )
        monkeypatch.setattr(
            torch.cpu, "_is_amx_tile_supported", lambda: False, raising=False
        )

    return fake


@pytest.mark.parametrize(
    ("hardware", "expected"),
    [
        ({"capability": (7, 5)}, ("t4", "cuda", torch.float16)),
        ({"capability": (8, 0)}, ("t4", "cuda", torch.bfloat16)),
        ({"capability": (8, 9)}, ("t4", "cuda", torch.bfloat16)),
        ({"mps": True}, ("cpu", "cpu", torch.float32)),
        ({"cpu_bf16": True}, ("cpu", "cpu", torch.bfloat16)),
        ({}, ("cpu", "cpu", torch.float32)),
    ],
    ids=["T4", "A100", "L4", "a Mac", "CPU with bf16", "CPU"],
)
def test_profile_follows_the_hardware(machine, hardware, expected):
    machine(**hardware)
    profile = runtime.get_profile()
    assert (profile.name, profile.device, profile.dtype) == expected


def test_the_device_can_be_asked_for(machine, monkeypatch):
    machine(mps=True)
    monkeypatch.setenv("COURSE_DEVICE", "mps")
    profile = runtime.get_profile()
    assert (profile.name, profile.device, profile.dtype) == ("cpu", "mps", FP32)
    assert runtime.get_profile("smoke").device == "mps"
    monkeypatch.setenv("COURSE_DEVICE", "cuda")
    with pytest.raises(ValueError, match="no device 'cuda' here; there is cpu, mps"):
        runtime.get_profile()
    machine(capability=(7, 5))
    assert runtime.get_profile().name == "t4"
    assert runtime.get_profile("cpu").device == "cuda"
    monkeypatch.setenv("COURSE_DEVICE", "cpu")
    assert (runtime.get_profile().name, runtime.get_profile().device) == ("cpu", "cpu")
    monkeypatch.setenv("COURSE_DEVICE", "gpu")
    with pytest.raises(ValueError, match="COURSE_DEVICE: no device 'gpu'"):
        runtime.get_profile()


def test_amx_alone_is_enough_for_bf16(machine, monkeypatch):
    machine()
    monkeypatch.setattr(
        torch.cpu, "_is_amx_tile_supported", lambda: True, raising=False
    )
    assert runtime._choose_dtype("cpu") == torch.bfloat16


def test_arm_processors_compute_in_float32(machine, monkeypatch):
    machine(cpu_bf16=True)
    monkeypatch.setattr(runtime.platform, "machine", lambda: "aarch64")
    assert runtime._choose_dtype("cpu") == torch.float32


def test_environment_chooses_and_argument_wins(machine, monkeypatch):
    machine()
    monkeypatch.setenv("COURSE_PROFILE", "smoke")
    assert runtime.get_profile().name == "smoke"
    assert runtime.get_profile("cpu").name == "cpu"


def test_cpu_profile_stays_on_the_cpu_beside_a_card(machine):
    machine(capability=(8, 0))
    assert runtime.get_profile("cpu").device == "cpu"
    assert runtime.get_profile("smoke").device == "cuda"


def test_unknown_profile_names_its_source(machine, monkeypatch):
    machine()
    monkeypatch.setenv("COURSE_PROFILE", "gpu")
    with pytest.raises(ValueError, match="COURSE_PROFILE.*'gpu'.*smoke, cpu, t4"):
        runtime.get_profile()
    with pytest.raises(ValueError, match="get_profile.*'laptop'"):
        runtime.get_profile("laptop")


def test_t4_without_a_card_says_what_to_do(machine):
    machine()
    with pytest.raises(RuntimeError, match="T4 GPU"):
        runtime.get_profile("t4")


def test_profile_prints_in_words(machine):
    machine()
    assert str(runtime.get_profile()) == "profile cpu · device cpu · float32"


def test_seed_repeats_all_three_generators():
    def draw():
        return random.random(), numpy.random.rand(), torch.rand(1).item()

    runtime.set_seed(7)
    first = draw()
    runtime.set_seed(7)
    assert draw() == first
    runtime.set_seed(8)
    assert draw() != first


@pytest.mark.parametrize("seed", [-1, 2**32, 1.5, "7"])
def test_bad_seed_is_refused(seed):
    with pytest.raises(ValueError, match="seed must be an integer"):
        runtime.set_seed(seed)


def test_folders_of_a_checkout(monkeypatch):
    monkeypatch.delenv("COURSE_BUILD", raising=False)
    root = runtime._checkout_folder()
    assert runtime.data_folder() == root / "data"
    assert runtime.build_folder() == root / "build"


def test_build_folder_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_BUILD", raising=False)
    monkeypatch.setattr(runtime, "_checkout_folder", lambda: None)
    monkeypatch.chdir(tmp_path)
    assert runtime.build_folder() == tmp_path / "build"
    assert runtime.data_folder().name == "_data"


def test_build_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.setenv("COURSE_BUILD", str(tmp_path / "drive" / "course"))
    assert runtime.build_folder() == tmp_path / "drive" / "course"
    assert runtime.build_folder().is_dir()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COURSE_BUILD", "mine")
    assert runtime.build_folder() == tmp_path / "mine"


def test_readiness_names_the_cure(machine, monkeypatch):
    machine()
    old = dict.fromkeys(runtime._version_floors(), "99.0") | {
        "trl": "0.9",
        "gguf": "absent",
    }
    monkeypatch.setattr(runtime, "versions", lambda: old)
    bad = [str(f) for f in runtime.readiness() if not f.ok]
    assert len(bad) == 2
    assert "trl 0.9" in bad[0] and 'pip install "trl>=' in bad[0]
    assert "gguf absent" in bad[1]


@pytest.fixture
def fresh_floors():
    runtime._version_floors.cache_clear()
    yield
    runtime._version_floors.cache_clear()


def test_floors_of_an_installed_package_are_those_of_its_metadata(
    monkeypatch, fresh_floors
):
    in_checkout = runtime._version_floors()
    assert in_checkout["torch"] == "2.6" and len(in_checkout) == 10
    runtime._version_floors.cache_clear()
    lines = [f"{name}>={floor}" for name, floor in in_checkout.items()]
    lines += ['ruff>=0.14; extra == "dev"']
    known = {"course-utils": lines}
    monkeypatch.setattr(importlib.metadata, "requires", known.__getitem__)
    monkeypatch.setattr(runtime, "_checkout_folder", lambda: None)
    assert runtime._version_floors() == in_checkout


def test_versions_are_those_installed():
    assert runtime.versions()["torch"] != "absent"


# --- putting a file into its place, where another process has it open ---


@pytest.fixture
def pair(tmp_path):
    source, target = tmp_path / "new", tmp_path / "old"
    source.write_text("new")
    target.write_text("old")
    return source, target


def refuse(monkeypatch, times, system):
    """`os.replace` is refused so many times, on such a system."""
    calls, real = [], os.replace

    def replace(source, target):
        calls.append(source)
        if len(calls) <= times:
            raise PermissionError(13, "Access is denied")
        real(source, target)

    monkeypatch.setattr(runtime.os, "replace", replace)
    monkeypatch.setattr(runtime.os, "name", system)
    monkeypatch.setattr(runtime.time, "sleep", lambda seconds: None)
    return calls


def test_a_file_takes_the_place_of_another(pair):
    source, target = pair
    runtime.replace_file(source, target)
    assert target.read_text() == "new" and not source.exists()


def test_windows_is_asked_again(pair, monkeypatch):
    source, target = pair
    calls = refuse(monkeypatch, 5, "nt")
    runtime.replace_file(str(source), str(target))
    monkeypatch.undo()
    assert len(calls) == 6 and target.read_text() == "new"


def test_other_systems_mean_it(pair, monkeypatch):
    calls = refuse(monkeypatch, 5, "posix")
    with pytest.raises(PermissionError):
        runtime.replace_file(*map(str, pair))
    assert len(calls) == 1


def test_patience_ends(pair, monkeypatch):
    refuse(monkeypatch, 10**9, "nt")
    monkeypatch.setattr(runtime, "PATIENCE_S", 0.0)
    with pytest.raises(PermissionError, match="denied"):
        runtime.replace_file(*map(str, pair))


# --- freed memory is kept, where it is asked to and where it can ---


needs_glibc = pytest.mark.skipif(
    runtime._glibc() is None, reason="there is no glibc here"
)

# Takes, fills and frees a block three times; prints the page faults of the last time.
CHILD = """
import ctypes, json, resource, sys
from course_utils import runtime
libc = ctypes.CDLL(None)
libc.malloc.restype, libc.malloc.argtypes = ctypes.c_void_p, [ctypes.c_size_t]
libc.free.argtypes = [ctypes.c_void_p]
libc.memset.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_size_t]
size = 2**26
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
def resident():
    lines = open("/proc/self/status").read().splitlines()
    return int([line for line in lines if line.startswith("VmRSS")][0].split()[1])
if "keep" in sys.argv:
    assert runtime.keep_freed_memory()
for _ in range(3):
    before = faults()
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
    last = faults() - before
kept = resident()
if "give" in sys.argv:
    runtime.give_back_memory()
if "again" in sys.argv:
    assert runtime.keep_freed_memory()
print(json.dumps({"faults": last, "given": 1024 * (kept - resident()) / size}))
"""


def child(*words):
    command = [sys.executable, "-c", CHILD, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@needs_glibc
def test_a_block_that_was_freed_is_taken_again_without_page_faults():
    assert child("keep")["faults"] < 8
    assert child()["faults"] >= 16  # 32 pages of 2 MiB, or 16,384 of 4 KiB


@needs_glibc
def test_what_is_kept_can_be_given_back():
    assert child("keep", "give")["given"] > 0.9
    assert child("keep", "again")["given"] > 0.9, "as when the next model is loaded"
    assert child("keep")["given"] < 0.1


def test_a_trainer_that_nobody_has_any_more_is_given_back():
    trainer = SimpleNamespace(tensor=torch.ones(1))
    trainer.train = trainer.__init__  # as prepare_trainer's `train` names its trainer
    kept = weakref.ref(trainer.tensor)
    gc.disable()
    try:
        del trainer
        assert kept() is not None
        runtime.keep_freed_memory()
        assert kept() is None
    finally:
        gc.enable()


@needs_glibc
def test_an_older_glibc_gets_the_most_that_it_accepts(monkeypatch):
    settings = []

    class Old:
        def mallopt(self, what, value):
            settings.append((what, value))
            return value <= 2**25 or what != runtime.M_MMAP_THRESHOLD

        def malloc_trim(self, kept):
            assert kept == 0

    monkeypatch.setattr(runtime, "_glibc", Old)
    assert runtime.keep_freed_memory()
    assert settings[1:] == [
        (runtime.M_MMAP_THRESHOLD, 2**25),
        (runtime.M_TRIM_THRESHOLD, 2**31 - 1),
    ]


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(monkeypatch, capsys, system):
    monkeypatch.setattr(runtime.sys, "platform", system)
    assert runtime.keep_freed_memory() is False
    runtime.give_back_memory()
    assert capsys.readouterr() == ("", "")


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(runtime.sys, "platform", "linux")
    monkeypatch.setattr(runtime.ctypes, "CDLL", lambda _: object())
    assert runtime.keep_freed_memory() is False
    runtime.give_back_memory()


def test_what_a_process_holds_grows_with_what_it_fills():
    before = runtime.resident_bytes()
    with mmap.mmap(-1, 2**26) as block:
        block[:] = bytes([1]) * 2**26
        assert 2**25 < runtime.resident_bytes() - before < 2**40


def test_a_long_training_gives_back_what_is_too_much(monkeypatch):
    from course_utils.training_callbacks import BoundedMemory

    held, given = [], []
    monkeypatch.setattr(runtime, "resident_bytes", lambda: held[-1])
    monkeypatch.setattr(runtime, "give_back_memory", lambda: given.append(held[-1]))
    callback, state = BoundedMemory(), SimpleNamespace(global_step=10)  # resumed
    callback.on_train_begin(None, state, None)
    for held_now in (50, 100, 80, 120, 121, 90, 119, 200):
        held.append(held_now)
        state.global_step += 1
        callback.on_step_end(None, state, None)
    assert given == [121, 200]


@needs_glibc
def test_every_training_on_a_cpu_is_bounded(tmp_path):
    from small_models import byte_tokenizer, random_llama
    from transformers import Trainer

    from course_utils.formatting import CompletionCollator
    from course_utils.runtime import Profile
    from course_utils.training import prepare_trainer, training_arguments

    trainer = Trainer(
        random_llama(),
        training_arguments(Profile("cpu", "cpu", torch.float32, 0), tmp_path),
        data_collator=CompletionCollator(byte_tokenizer()),
        train_dataset=[],
    )
    prepare_trainer(trainer)
    names = [type(c).__name__ for c in trainer.callback_handler.callbacks]
    assert "BoundedMemory" in names
