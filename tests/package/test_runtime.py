"""The profile and its dtype are right for each kind of machine, faked."""

import importlib.metadata
import random

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
    assert runtime.choose_dtype("cpu") == torch.bfloat16


def test_arm_processors_compute_in_float32(machine, monkeypatch):
    machine(cpu_bf16=True)
    monkeypatch.setattr(runtime.platform, "machine", lambda: "aarch64")
    assert runtime.choose_dtype("cpu") == torch.float32


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
    root = runtime.checkout_folder()
    assert runtime.data_folder() == root / "data"
    assert runtime.build_folder() == root / "build"


def test_build_folder_without_a_checkout(monkeypatch, tmp_path):
    monkeypatch.delenv("COURSE_BUILD", raising=False)
    monkeypatch.setattr(runtime, "checkout_folder", lambda: None)
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
    old = dict.fromkeys(runtime.version_floors(), "99.0") | {
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
    runtime.version_floors.cache_clear()
    yield
    runtime.version_floors.cache_clear()


def test_floors_of_an_installed_package_are_those_of_its_metadata(
    monkeypatch, fresh_floors
):
    in_checkout = runtime.version_floors()
    assert in_checkout["torch"] == "2.6" and len(in_checkout) == 10
    runtime.version_floors.cache_clear()
    lines = [f"{name}>={floor}" for name, floor in in_checkout.items()]
    lines += ['ruff>=0.14; extra == "dev"']
    known = {"course-utils": lines}
    monkeypatch.setattr(importlib.metadata, "requires", known.__getitem__)
    monkeypatch.setattr(runtime, "checkout_folder", lambda: None)
    assert runtime.version_floors() == in_checkout


def test_versions_are_those_installed():
    assert runtime.versions()["torch"] != "absent"
