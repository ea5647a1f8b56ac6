"""`make bench`: how fast the course is; writes data/runs/bench.json, prints a table.

    python -m maintenance.benchmarks [--only training answers] [--methods lora]
                               [--rounds 3] [--steps 3] [--fresh]

Nothing else should run meanwhile: each run keeps the load it met. Each finished run is
kept in `build/bench/` and not repeated until `--fresh`. Whole parts, with three rounds
and steps or more, take the place of the same parts in the record; the rest of it stays,
and what was made on another machine says so. A round measures the things of a group
one after the other, beginning with another one each time.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Sequence
from typing import Any

import torch

from course_utils import records
from course_utils.data import data_hash
from course_utils.models import load_model, release
from course_utils.runtime import build_folder, versions
from maintenance.benchmarks import (
    company,
    everyday,
    paths,
    products,
    rivals,
    summary,
    training,
    where,
)
from maintenance.benchmarks.turns import Task, in_turn
from maintenance.store import hardware, save_record

PARTS = (
    "start",
    "training",
    "pairs",
    "ablation",
    "threads",
    "answers",
    "profile",
    "compile",
    "block",
    "company",
    "products",
    "int8",
    "server",
)


def tasks_of(
    parts: Sequence[str], methods: Sequence[str], rounds: int, steps: int
) -> list[Task]:
    """All tasks of some parts, those of a group side by side."""
    every = [
        *everyday.everyday_tasks(rounds),
        *training.training_tasks(steps, methods),
        *training.pair_tasks(4 * steps, methods),
        *training.ablation_tasks(3 * steps),
        *training.thread_tasks(steps),
        *where.profile_tasks(),
        *training.compile_tasks(steps + 2),
        *training.block_tasks(4 * steps),
        *company.company_tasks(steps),
        *products.product_tasks(4 * steps),
        *rivals.rival_tasks(4 * steps),
    ]
    return [task for task in every if task.part in parts]


def identity_of(task: Task, number: int) -> dict:
    """What a run of that round will be told by: label, settings, seed."""
    settings = {"threads": torch.get_num_threads(), "part": task.part}
    settings |= {"name": task.name} | task.settings
    return {"label": task.label, "settings": settings, "seed": number}


def measure(task: Task, number: int) -> dict:
    """One run, in the shape that records have."""
    run = identity_of(task, number) | {"loss": [], "metrics": {}}
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    run |= task.function(number)
    if load is not None:
        run["measured"] = run.get("measured", {}) | {"load_before": round(load, 2)}
    return run


def key_of(run: dict) -> tuple:
    """What tells one run from another."""
    return run["label"], run["seed"], json.dumps(run["settings"], sort_keys=True)


def record_parts(runs: Sequence[dict], parts: Sequence[str]) -> None:
    """Put the runs of whole parts into the record, in place of those that it has.

    The lessons' seconds, of another command, are renewed with all parts only. A record
    that was begun on another machine, or with other versions, keeps those; each new run
    then says where it was made.
    """
    machine: dict[str, Any] = {"hardware": hardware(), "versions": versions()}
    kept, begun_on = [], machine
    if set(parts) != set(PARTS):
        runs = [run for run in runs if summary.part_of(run) in parts]
        if "bench" in records.list_records():
            record = records.load_record("bench")
            begun_on = {key: record[key] for key in machine}
            kept = [r for r in record["runs"] if summary.part_of(r) not in parts]
    if machine != begun_on:
        runs = [run | {"machine": machine} for run in runs]
    every = [*kept, *runs]
    source = {"name": "home_commands", "sha256": data_hash("home_commands")}
    record = {"command": "make bench", **begun_on, "data": source, "runs": every}
    save_record("bench", record | {"seconds": sum(run["seconds"] for run in every)})


def main(arguments: Iterable[str] | None = None) -> None:
    """The command line; see the module's own text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=PARTS, default=PARTS)
    parser.add_argument("--methods", nargs="+", default=paths.METHODS)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=3, help="the first is a warm-up")
    parser.add_argument("--fresh", action="store_true", help="forget finished runs")
    options = parser.parse_args(arguments)
    store = build_folder() / "bench" / f"{options.rounds}x{options.steps}.jsonl"
    store.parent.mkdir(parents=True, exist_ok=True)
    if options.fresh:
        store.unlink(missing_ok=True)
    lines = store.read_text(encoding="utf-8").splitlines() if store.is_file() else []
    done = {key_of(run): run for run in map(json.loads, lines)}
    if not paths.litgpt_python():
        print("LitGPT is left out: it has no environment; `make build/litgpt` makes it")
    if not rivals.others_folder():
        print("torchao and llama.cpp fail: `make build/others` installs them")
    release(load_model())  # the conversion, the first time, is measured by itself
    begun, runs = time.perf_counter(), []
    tasks = tasks_of(options.only, options.methods, options.rounds, options.steps)
    for task, number in in_turn(tasks, options.rounds):
        run = done.get(key_of(identity_of(task, number)))
        if run is None:
            run = measure(task, number)
            with store.open("a", encoding="utf-8") as file:
                file.write(json.dumps(run, ensure_ascii=False) + "\n")
            gone = time.perf_counter() - begun
            print(f"{gone:5.0f} s · round {number + 1} · {task.label}", flush=True)
        runs.append(run)
    runs += everyday.lesson_runs()
    print("\n".join(summary.table(summary.summarise(runs))))
    all_methods = set(options.methods) == set(paths.METHODS)
    if not all_methods or min(options.rounds, options.steps) < 3:
        print("not all methods, or fewer than 3 rounds or steps: nothing is recorded")
        return
    record_parts(runs, options.only)


if __name__ == "__main__":
    main()
