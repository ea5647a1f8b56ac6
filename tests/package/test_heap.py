"""Freed memory is kept by the process, where it is asked to and where it can."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from course_utils import runtime as heap

needs_glibc = pytest.mark.skipif(heap._glibc() is None, reason="there is no glibc here")

# Takes, fills and frees a block three times; prints the page faults of the last time.
CHILD = """
import ctypes, json, resource, sys
from course_utils import runtime as heap
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
    assert heap.keep_freed_memory()
for _ in range(3):
    before = faults()
    block = libc.malloc(size)
    libc.memset(block, 1, size)
    libc.free(block)
    last = faults() - before
kept = resident()
if "give" in sys.argv:
    heap.give_back_memory()
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
    assert child("keep")["given"] < 0.1


@needs_glibc
def test_an_older_glibc_gets_the_most_that_it_accepts(monkeypatch):
    told = []

    class Old:
        def mallopt(self, what, value):
            told.append((what, value))
            return value <= 2**25 or what != heap.M_MMAP_THRESHOLD

    monkeypatch.setattr(heap, "_glibc", Old)
    assert heap.keep_freed_memory()
    assert told[1:] == [
        (heap.M_MMAP_THRESHOLD, 2**25),
        (heap.M_TRIM_THRESHOLD, 2**31 - 1),
    ]


@pytest.mark.parametrize("system", ["darwin", "win32"])
def test_elsewhere_nothing_is_done(monkeypatch, capsys, system):
    monkeypatch.setattr(heap.sys, "platform", system)
    assert heap.keep_freed_memory() is False
    heap.give_back_memory()
    assert capsys.readouterr() == ("", "")


def test_a_c_library_without_mallopt_is_left_alone(monkeypatch):
    monkeypatch.setattr(heap.sys, "platform", "linux")
    monkeypatch.setattr(heap.ctypes, "CDLL", lambda _: object())
    assert heap.keep_freed_memory() is False
    heap.give_back_memory()


def test_what_a_process_holds_is_read_where_linux_says_it(monkeypatch):
    if sys.platform == "linux":
        assert 10 * 2**20 < heap.resident_bytes() < 2**40

    def absent(*args, **options):
        raise FileNotFoundError

    monkeypatch.setattr("builtins.open", absent)
    assert heap.resident_bytes() is None


def test_a_long_training_gives_back_what_is_too_much(monkeypatch):
    from course_utils.training_callbacks import BoundedMemory

    held, given = [], []
    monkeypatch.setattr(heap, "resident_bytes", lambda: held[-1])
    monkeypatch.setattr(heap, "give_back_memory", lambda: given.append(held[-1]))
    callback, state = BoundedMemory(), SimpleNamespace(global_step=10)  # resumed
    callback.on_train_begin(None, state, None)
    for held_now in (50, 100, 80, 150, 151, 90, 149, 200):
        held.append(held_now)
        state.global_step += 1
        callback.on_step_end(None, state, None)
    assert given == [151, 200]
    held.append(None)  # no Linux
    callback.on_step_end(None, state, None)


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
    names = [type(one).__name__ for one in trainer.callback_handler.callbacks]
    assert "BoundedMemory" in names
