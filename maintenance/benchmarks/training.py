"""Tasks that train: the paths side by side, and what each ingredient brings.

A task's function returns the fields of a recorded run. All train on the first records
of the training set, `paths.EXAMPLES` a step.
"""

from __future__ import annotations

import contextlib
import functools
import json
import math
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from course_utils import training_callbacks, training_speed
from course_utils.data import load_examples
from course_utils.formatting import IGNORE
from course_utils.models import load_tokenizer
from course_utils.runtime import Profile, get_profile, set_seed
from maintenance.benchmarks import paths
from maintenance.benchmarks.turns import Task

ROOT = Path(__file__).resolve().parents[2]


@functools.cache
def training_data(steps: int):
    """The first records, a step more than `steps`, and the tokenizer."""
    records = load_examples("home_commands")
    return records.select(range(paths.EXAMPLES * (steps + 1))), load_tokenizer()


def run_path(path: str, method: str, steps: int) -> dict:
    """Train by one of `paths.PATHS`."""
    set_seed(0)
    return paths.train(path, method, *training_data(steps), steps)


def training_tasks(steps: int, methods=paths.METHODS) -> list[Task]:
    """Every path by every method; LitGPT by LoRA, where its environment is."""
    tasks = []
    for method in methods:
        for path in paths.PATHS:
            if path == "litgpt" and (method != "lora" or not paths.litgpt_python()):
                continue
            tasks.append(
                Task(
                    "training",
                    path,
                    lambda _, p=path, m=method: run_path(p, m, steps),
                    {"method": method, "path": path, "steps": steps},
                )
            )
    return tasks


def run_pairs(
    method: str, steps: int, records=None, bare=None, limit_s=math.inf, **settings
) -> dict:
    """A step of the course's path, then one of the bare loop, and so on.

    On a machine with neighbours two runs one after the other meet different ones; a
    difference of a tenth shows only where step stands beside step. `bare` are options
    of `paths.bare_steps`; no pair begins after `limit_s` seconds.
    """
    start, (plain, tokenizer) = time.perf_counter(), training_data(steps)
    bare = paths.bare_steps(method, plain, tokenizer, steps, **bare or {})
    turns = paths.InTurn(bare, limit_s)
    set_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        data = (records or plain, tokenizer, steps, folder)
        timing = paths.course(method, *data, callbacks=[turns], **settings)
    bare.close()
    measured = {"course_s": turns.own, "course_tokens": timing.tokens}
    measured |= {"bare_loop_s": turns.others, "bare_loop_tokens": turns.other_tokens}
    measured["bare_loop_loss"] = turns.other_loss
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "loss": timing.loss, "measured": measured}


def pair_tasks(steps: int, methods=paths.METHODS) -> list[Task]:
    """`run_pairs` by every method."""
    return [
        Task(
            "pairs",
            "course and bare loop",
            lambda _, m=method: run_pairs(m, steps),
            {"method": method, "steps": steps},
            once=True,
        )
        for method in methods
    ]


def all_logits_loss(model, batch, learned_tokens=None):
    """`completion_loss` with a logit for every position, as models compute it."""
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    logits = model(**inputs | {"use_cache": False}).logits[:, :-1]
    targets = batch["labels"][:, 1:]
    total = torch.nn.functional.cross_entropy(
        logits.float().flatten(0, 1),
        targets.flatten(),
        ignore_index=IGNORE,
        reduction="sum",
    )
    return total / (learned_tokens or (targets != IGNORE).sum())


@contextlib.contextmanager
def _without(*patches: tuple[Any, str, Any]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for owner, name, replacement in patches:
            stack.enter_context(patch.object(owner, name, replacement))
        yield


def _nothing(*args: Any) -> None:
    return None


PADDED = (training_speed, "without_padding", lambda model, batch: batch)
# What is taken away: replaced functions, and settings of the trainer.
ABLATION: dict[str, tuple[list, dict]] = {
    "the course's path": ([], {}),
    "padding": ([PADDED], {}),
    "padding, grouped by length": (
        [PADDED],
        {"train_sampling_strategy": "group_by_length"},
    ),
    "a beginning for each record": (
        [(training_speed, "shared_beginning", lambda examples: 0)],
        {},
    ),
    "logits everywhere": ([(training_speed, "completion_loss", all_logits_loss)], {}),
    "fused attention": ([(training_callbacks, "set_attention", _nothing)], {}),
    "casts of LoRA inputs": ([(training_speed, "cast_lora_inputs", _nothing)], {}),
    "float32": ([], {"profile": Profile("cpu", "cpu", torch.float32, 0)}),
    "gradient checkpointing": ([], {"gradient_checkpointing": True}),
    "unfused AdamW": ([], {"optim": "adamw_torch"}),
}


def run_ablation(name: str, steps: int) -> dict:
    """The course's LoRA path with one ingredient taken away, beside the bare loop."""
    patches, settings = ABLATION[name]
    # Sorting by length is a draw from more records than the steps need.
    more = training_data(50)[0] if "group_by_length" in settings.values() else None
    with _without(*patches):
        return run_pairs("lora", steps, more, **settings)


def ablation_tasks(steps: int) -> list[Task]:
    """Every entry of `ABLATION`; the last ones matter for full fine-tuning too."""
    return [
        Task(
            "ablation",
            name,
            lambda _, n=name: run_ablation(n, steps),
            {"method": "lora", "steps": steps},
            once=True,
        )
        for name in ABLATION
    ]


@contextlib.contextmanager
def threads(count: int) -> Iterator[None]:
    """Let PyTorch use so many threads, for a while."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def run_threads(count: int, steps: int) -> dict:
    """The course's LoRA path with a number of threads."""
    with threads(count):
        return run_path("course", "lora", steps)


def run_processes(processes: int, count: int, steps: int) -> dict:
    """Several trainings at once, each a process with so many threads.

    Each waits until all are ready; `step_seconds` and `tokens` are lists of lists.
    """
    code = (
        "import sys; from maintenance.benchmarks import training; "
        "training.child(int(sys.argv[1]), int(sys.argv[2]))"
    )
    words = [sys.executable, "-c", code, str(count), str(steps)]
    settings = os.environ | {"OMP_NUM_THREADS": str(count)}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    children = [
        subprocess.Popen(words, env=settings, cwd=ROOT, **pipes)
        for _ in range(processes)
    ]
    try:
        for child in children:
            while (line := child.stdout.readline()).strip() != "ready":
                if not line:
                    raise RuntimeError("a training process ended before it began")
        for child in children:
            child.stdin.write("go\n")
            child.stdin.flush()
        lines = [child.communicate()[0].splitlines()[-1] for child in children]
    finally:
        for child in children:
            child.kill()
            child.wait()
    runs = [json.loads(line) for line in lines]
    return {
        "seconds": max(run["seconds"] for run in runs),
        "loss": runs[0]["loss"],
        "measured": {
            key: [run["measured"][key] for run in runs]
            for key in ("step_seconds", "tokens")
        },
    }


def child(count: int, steps: int) -> None:
    """One of several training processes: says ready, waits for a line, trains."""
    with threads(count):
        run_path("course", "lora", 1)  # loads all that is loaded at first use
        print("ready", flush=True)
        sys.stdin.readline()
        print(json.dumps(run_path("course", "lora", steps)), flush=True)


def thread_tasks(steps: int) -> list[Task]:
    """One and two threads, alone and two processes at once."""
    settings = {"method": "lora", "steps": steps}
    tasks = [
        Task(
            "threads",
            f"{count} {'thread' if count == 1 else 'threads'}",
            lambda _, c=count: run_threads(c, steps),
            settings | {"threads": count},
        )
        for count in (1, 2)
    ]
    return tasks + [
        Task(
            "threads",
            f"2 processes × {count}",
            lambda _, c=count: run_processes(2, c, steps),
            settings | {"threads": count, "processes": 2},
        )
        for count in (1, 2)
    ]


def run_compiled(steps: int) -> dict:
    """A LoRA step through `torch.compile`: its own cost, then seconds a step.

    The forward pass of each packed batch is padded to one shape, 256 tokens a row, so
    that it is compiled once; `plain_seconds` are the same steps without it.
    """
    records, tokenizer = training_data(steps)
    data = paths.tokenize_dataset(records, tokenizer)
    model = paths.make_model("lora", get_profile().dtype).train()
    training_speed.set_attention(model, "eager")
    training_speed.cast_lora_inputs(model, get_profile().dtype != torch.bfloat16)
    decoder, head = model.get_base_model().model, model.get_base_model().lm_head
    compiled = torch.compile(decoder, dynamic=False)
    batches = []
    for step in range(steps):
        rows = [data[step * paths.EXAMPLES + i] for i in range(paths.EXAMPLES)]
        batches.append(paths.side_by_side(rows, 256, exactly=True))
    bf16 = get_profile().dtype == torch.bfloat16
    seconds: dict[str, list[float]] = {"compiled": [], "plain": []}
    losses = []
    for name, forward in (("plain", decoder), ("compiled", compiled)):
        for batch in batches:
            start = time.perf_counter()
            targets = batch["labels"][:, 1:]
            learned = targets != IGNORE
            inputs = {k: v for k, v in batch.items() if k != "labels"}
            with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
                hidden = forward(**inputs, use_cache=False).last_hidden_state
                logits = head(hidden[:, :-1][learned]).float()
                loss = torch.nn.functional.cross_entropy(logits, targets[learned])
            loss.backward()
            model.zero_grad()
            seconds[name].append(time.perf_counter() - start)
            losses.append(loss.item())
    return {
        "seconds": sum(seconds["compiled"]),
        "loss": losses,
        "measured": {
            "compiled_seconds": seconds["compiled"],
            "plain_seconds": seconds["plain"],
        },
    }


def compile_tasks(steps: int) -> list[Task]:
    """`torch.compile`, once: it costs minutes."""
    settings = {"method": "lora", "steps": steps}
    return [Task("compile", "step", lambda _: run_compiled(steps), settings, once=True)]


def run_block(steps: int) -> dict:
    """The course's LoRA step beside a bare loop whose decoder block is compiled.

    The first steps, which compile, stand in it too.
    """
    from torch._inductor import cpp_builder, exc

    try:
        cpp_builder.get_cpp_compiler()
    except exc.InvalidCxxCompiler:
        return {"seconds": 0.0, "measured": {"failed": "there is no C++ compiler"}}
    return run_pairs("lora", steps, bare={"compiled": True})


def same_records(steps: int):
    """Records of which each step sees the same ones, so that steps can be compared."""
    records, tokenizer = training_data(1)
    first = list(range(paths.EXAMPLES))
    return records.select(first * (steps + 1)), tokenizer


def block_tasks(steps: int) -> list[Task]:
    """A compiled block beside the course's step, once: it costs half a minute."""
    settings = {"method": "lora", "steps": steps}
    return [Task("block", "compiled", lambda _: run_block(steps), settings, once=True)]
