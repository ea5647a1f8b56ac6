"""Build the reviews data set: a short review in, one of three verdicts out.

    python maintenance/data_sets/reviews/build.py [--check]

It writes the files; with --check it compares them with what it would write.

The reviews are hand-written, in threes of one topic and one kind (negative, mixed,
positive), in written.txt and written_test.txt. This script sorts them into splits. It
uses the standard library only and always gives the same bytes.
"""

from __future__ import annotations

import json
import random
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
DATA = FOLDER.parents[2] / "data" / FOLDER.name
SEED = 20261122
LABELS = {"-": "negative", "~": "mixed", "+": "positive"}
VALIDATION_EVERY = 4  # of each kind, every fourth three is validation


class Review(NamedTuple):
    text: str
    label: str
    slice: str
    topic: str

    def record(self) -> dict[str, str]:
        return self._asdict()


def written(name: str) -> list[list[Review]]:
    """The threes of one file, in its order."""
    threes: list[list[Review]] = []
    for number, line in enumerate(
        (FOLDER / name).read_text(encoding="utf-8").splitlines(), start=1
    ):
        mark, _, text = line.partition(" ")
        if mark == "#":
            kind, topic = (part.strip() for part in text.split("|"))
            threes.append([])
        elif mark in LABELS:
            threes[-1].append(Review(text, LABELS[mark], kind, topic))
        elif line:
            raise ValueError(f"{name}, line {number}: {line!r}")
    for three in threes:
        if [review.label for review in three] != list(LABELS.values()):
            raise ValueError(f"{name}: not negative, mixed, positive: {three}")
    return threes


def build() -> dict[str, str]:
    """Every generated file's text by name."""
    rng = random.Random(SEED)
    kinds: dict[str, int] = {}
    splits: dict[str, list[Review]] = {"train": [], "validation": [], "test": []}
    for three in written("written.txt"):
        kind = three[0].slice
        kinds[kind] = kinds.get(kind, 0) + 1
        held = kinds[kind] % VALIDATION_EVERY == 0
        splits["validation" if held else "train"] += three
    for three in written("written_test.txt"):
        splits["test"] += three
    files = {}
    for split, reviews in splits.items():
        rng.shuffle(reviews)
        lines = [json.dumps(r.record(), ensure_ascii=False) for r in reviews]
        files[f"{split}.jsonl"] = "\n".join(lines) + "\n"
    return files


def main(arguments: list[str]) -> int:
    different = []
    for name, text in build().items():
        path = DATA / name
        if "--check" in arguments:
            if not path.is_file() or path.read_bytes() != text.encode("utf-8"):
                different.append(name)
        else:
            path.write_bytes(text.encode("utf-8"))
    if different:
        print("differs from what the builder makes: " + ", ".join(different))
    return int(bool(different))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
