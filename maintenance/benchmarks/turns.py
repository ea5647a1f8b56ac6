"""What is measured, and in which order."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Task:
    """One thing to measure; `once` where a single round says enough."""

    part: str
    name: str
    function: Callable[[int], dict]
    settings: dict[str, Any] = field(default_factory=dict)
    once: bool = False

    @property
    def label(self) -> str:
        method = self.settings.get("method")
        return " · ".join(filter(None, [self.part, method, self.name]))


def in_turn(tasks: Sequence[Task], rounds: int) -> Iterator[tuple[Task, int]]:
    """(task, round): each round begins a group with another of its tasks."""
    groups: dict[tuple, list[Task]] = {}
    for task in tasks:
        groups.setdefault((task.part, task.settings.get("method")), []).append(task)
    for number in range(rounds):
        for group in groups.values():
            due = [task for task in group if number == 0 or not task.once]
            turn = number % len(due) if due else 0
            for task in due[turn:] + due[:turn]:
                yield task, number
