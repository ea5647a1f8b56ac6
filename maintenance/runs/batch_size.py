"""Steps to a fixed loss by batch size and rate, for lesson 11, by the lesson's cells.

Three things a run holds of one batch size and seed, in `measured`: the steps to the
loss by rate, around the best one; the steps of the doubled batch where the best rate
stays, is doubled or is tripled; and the steps where it is five times too high or low.
The gradient-noise scale: McCandlish and others, 2018, arXiv 1812.06162, appendix A.
"""

from __future__ import annotations

import functools
import time
from dataclasses import asdict, dataclass
from typing import Any

from maintenance.cells import cells
from maintenance.store import compute_metrics

LESSON = "11_reading_curves"
CELLS = ("imports", "letters", "letters-model", "noise-scale", "noise-of", "steps-to")
METRICS = ("best_rate", "fewest_steps", "noise_scale")


@dataclass(frozen=True)
class BatchSizes:
    """Trainings of the lesson's model of letters, to a loss, at one batch size."""

    batch_size: int
    seed: int = 0
    target: float = 2.2  # nats a letter, of kept letters
    limit: int = 4_000  # steps, at most
    data: str = "home_commands"

    @property
    def label(self) -> str:
        return f"batch {self.batch_size}"

    def settings(self) -> dict[str, Any]:
        values = asdict(self)
        del values["seed"]
        return values


@functools.cache
def _lesson() -> Any:
    return cells(LESSON, *CELLS)


def run_batch_size(experiment: BatchSizes) -> dict[str, Any]:
    """Climb to the best rate by factors of two, and look around it."""
    begun = time.perf_counter()
    lesson, batch, seed = _lesson(), experiment.batch_size, experiment.seed
    found: dict[float, int | None] = {}

    def steps(rate: float, batch: int = batch, limit: int = experiment.limit) -> Any:
        return lesson.steps_to(experiment.target, batch, rate, seed, limit)

    def best() -> float:
        reached = {rate: n for rate, n in found.items() if n}
        return min(reached, key=lambda rate: (reached[rate], rate))

    rate = 2.0**-9
    found[rate] = steps(rate)
    while missing := [r for r in (2 * best(), best() / 2) if r not in found]:
        fewest = found[best()] or experiment.limit
        found[missing[0]] = steps(missing[0], limit=2 * fewest)
    rate, fewest = best(), found[best()] or experiment.limit
    after = {str(k): steps(k * rate, 2 * batch, 3 * fewest) for k in (1, 2, 3)}
    off = {name: steps(k * rate, limit=3 * fewest) for name, k in _OFF.items()}
    model = lesson.letter_model(seed)
    scales = [lesson.noise_scale(model)]
    lesson.steps_to(experiment.target, batch, rate, seed, experiment.limit, model)
    scales.append(lesson.noise_scale(model))
    measured = {"steps": {str(rate): n for rate, n in sorted(found.items())}}
    measured |= {"doubled": after, "off": off, "noise": scales}
    run = {"label": experiment.label, "settings": experiment.settings(), "seed": seed}
    run |= {"loss": [], "measured": measured}
    run["metrics"] = compute_metrics(run, METRICS)
    return run | {"seconds": time.perf_counter() - begun}


_OFF = {"a fifth": 1 / 5, "five times": 5}
