"""The curves of lesson 11, by the lesson's own cells: its gallery, and its trial.

A gallery cell calls `show(name, changes, cure)`; here that collects what
each fault changes, and every fault, its cure and its rule of thumb run with each seed.
"""

from __future__ import annotations

import functools
import math
import os
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from maintenance.cells import cells, more_cells
from maintenance.store import compute_metrics

LESSON = "11_reading_curves"
MODEL = ("imports", "settings", "records", "row", "tiny", "learn", "loop", "look")
MODEL += ("looked-at", "run", "ends", "tells")
FAULTS = ("too-low", "too-high", "overfit", "leak", "warmup", "order")
DIVIDED = ("rate too high", "no warm-up", "bad batches", "data in order")
DIVIDED += ("overfitting", "shuffled labels", "prompt in the labels")
SEEDS = (0, 1, 2)
METRICS = ("final_eval_loss",)


@dataclass(frozen=True)
class Curve:
    """A run of the lesson's tiny model; `fault` names one of a base's trial cases."""

    label: str
    seed: int
    changes: Mapping[str, Any] = field(default_factory=dict)
    fault: str | None = None
    data: str = "home_commands"

    def settings(self) -> dict[str, Any]:
        """The recipe with its changes: numbers, functions' names, lengths of lists."""
        now = lesson().recipe | self.changes
        shown = {key: _shown(value) for key, value in now.items() if key != "places"}
        return shown | ({"fault": self.fault} if self.fault else {})


def _shown(value: Any) -> Any:
    if callable(value):
        return value.__name__.strip("<>")
    if isinstance(value, list):
        return f"{len(value)} records"
    if isinstance(value, dict):
        return {str(step): _shown(records) for step, records in value.items()}
    return value


@functools.cache
def lesson() -> Any:
    """The lesson's namespace: its model, its faults in `shown`, its diagnosis."""
    before = os.environ.get("COURSE_PROFILE", "")
    os.environ["COURSE_PROFILE"] = "cpu"
    space = cells(LESSON, *MODEL)
    os.environ["COURSE_PROFILE"] = before
    space.shown = {}

    def show(name: str, changes: dict, cure: dict | None = None) -> None:
        space.shown[name] = changes, cure

    space.show = show
    more_cells(space, LESSON, *FAULTS, "trial", "cases")
    return more_cells(space, LESSON, "evidence", "diagnose", definitions=True)


def gallery() -> list[Curve]:
    """Faults and their cures, and many passes with nothing wrong."""
    curves: dict[str, dict] = {"healthy": {}}
    for name, (changes, cure) in lesson().shown.items():
        curves[name] = changes
        if cure:
            curves[f"{name}, cured"] = cure
    many = {"train": lesson().train[:140], "steps": lesson().settings["passes"]}
    curves["many passes"] = many
    return [
        Curve(label, s, changes) for label, changes in curves.items() for s in SEEDS
    ]


def divided() -> list[Curve]:
    """Faults at a fifth of their rate: those that a rate could have to do with."""
    found = []
    for name in DIVIDED:
        changes, _ = lesson().shown[name]
        rate = changes.get("rate", lesson().recipe["rate"]) / 5
        found += [Curve(name, seed, changes | {"rate": rate}) for seed in SEEDS]
    return found


def trial() -> list[Curve]:
    """Each base's healthy run, and its faults, with each seed."""
    found = []
    for base, changes in lesson().bases.items():
        names = ["healthy", *lesson().cases(changes, {}, 0)]
        found += [
            Curve(f"{name}, {base}", seed, changes, name)
            for name in names
            for seed in SEEDS
        ]
    return found


@functools.cache
def _healthy(base: str | None, seed: int) -> dict[str, Any]:
    return lesson().run(seed, **(lesson().trial_base(base) if base else {}))


def run_curve(curve: Curve) -> dict[str, Any]:
    """Make one curve; what the lesson measured stands in `measured`, and its name."""
    begun, space, changes = time.perf_counter(), lesson(), dict(curve.changes)
    base = curve.label.rpartition(", ")[2] if curve.fault else None
    space.healthy = healthy = _healthy(base, curve.seed)
    if curve.fault:
        changes = space.trial_base(base)
        if curve.fault != "healthy":
            changes |= space.cases(space.bases[base], healthy, curve.seed)[curve.fault]
    bare = curve.fault == "healthy" or curve.label == "healthy"
    history = dict(healthy if bare else space.run(curve.seed, **changes))
    named, _ = space.diagnose(history)
    run = {"label": curve.label, "settings": curve.settings(), "seed": curve.seed}
    run |= {"loss": history.pop("loss"), "eval_loss": history.pop("kept_loss")}
    del history["weights"]
    run["measured"] = _short(history) | {"named": named}
    run |= {"loss": _short(run["loss"]), "eval_loss": _short(run["eval_loss"])}
    run["metrics"] = compute_metrics(run, METRICS)
    return run | {"seconds": time.perf_counter() - begun}


def _short(value: Any) -> Any:
    """Numbers to five digits, so that a record of many curves stays small."""
    if isinstance(value, dict):
        return {key: _short(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_short(item) for item in value]
    if isinstance(value, float) and math.isfinite(value):
        return float(f"{value:.5g}")
    return value
