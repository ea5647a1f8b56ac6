"""Build the reviews data set: a short review in, one of three verdicts out.

    python data/reviews/build.py           writes the files
    python data/reviews/build.py --check   compares them with what it would write

The reviews are hand-written, in threes of one topic and one kind (negative, mixed,
positive), in written.txt and written_test.txt. For the training split alone this
script also joins hand-written clauses from fragments.txt. It uses the standard
library only and always gives the same bytes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path
from typing import NamedTuple

FOLDER = Path(__file__).resolve().parent
SEED = 20261122
LABELS = {"-": "negative", "~": "mixed", "+": "positive"}
COMPOSED = 300  # joined reviews of each label, in the training split only
VALIDATION_EVERY = 4  # of each kind, every fourth three is validation

# {p} and {n} are clauses of praise and of blame, {P} and {N} the same at the beginning
# of a sentence. Each joining word stands among the frames of more than one label.
FRAMES = {
    "plain": {
        "positive": [
            "{P}, {p}, and {p}.",
            "{P}. What is more, {p}.",
            "{P}, and {p}. A recommendation from me.",
            "First of all, {p}. Secondly, {p}.",
            "I was ready to complain, but {p}, and {p}.",
            "{P}; {p}. That is all I ask.",
            "{P}. Even so I had doubts, until I saw that {p}.",
            "Wonderful: {p}, and {p}.",
        ],
        "negative": [
            "{N}, {n}, and {n}.",
            "{N}. What is more, {n}.",
            "{N}, and {n}. No recommendation from me.",
            "First of all, {n}. Secondly, {n}.",
            "I was ready to like it, but {n}, and {n}.",
            "{N}; {n}. I ask for more than that.",
            "{N}. Even so I had hopes, until I saw that {n}.",
            "What a scandal: {n}, and {n}.",
        ],
    },
    "mixed_feelings": {
        "positive": [
            "True, {n}, but {p} and {p}: I would choose it again.",
            "Although {n}, {p}, {p}, and I recommend it.",
            "{N}, I admit. Who cares, when {p} and {p}?",
            "My sister says that {n}. I disagree with her: {p}, and {p}.",
            "I had read that {n}. That was long ago; today {p}, and {p}.",
        ],
        "negative": [
            "True, {p}, but {n} and {n}: I would not choose it again.",
            "Although {p}, {n}, {n}, and I advise against it.",
            "{P}, I admit. Who cares, when {n} and {n}?",
            "My sister says that {p}. I disagree with her: {n}, and {n}.",
            "I had read that {p}. That was long ago; today {n}, and {n}.",
        ],
        "mixed": [
            "{P}, and {n}.",
            "{N}, and {p}.",
            "{P}; {n}.",
            "{N}. What is more pleasant, {p}.",
            "First of all, {p}. Secondly, {n}.",
            "True, {p}, and it is as true that {n}.",
            "Although {n}, {p}. Half marks.",
            "My sister says that {p}, my brother says that {n}. I agree with both.",
            "{P}, I admit; {n}, I must add.",
            "{N}, but {p}. Some days I mind and some days I do not.",
            "{P} and {p}. Then again, {n} and {n}.",
            "I was ready to like it, and {p}. I was ready to complain, and {n}.",
        ],
    },
    "negation": {
        "positive": [
            "Nobody can say that {n}, or that {n}.",
            "It is not true that {n}. Nor is it true that {n}.",
            "Do not let anybody tell you that {n}: {p}.",
            "I would never say that {n}; {p}.",
        ],
        "negative": [
            "Nobody can say that {p}, or that {p}.",
            "It is not true that {p}. Nor is it true that {p}.",
            "Do not let anybody tell you that {p}: {n}.",
            "I would never say that {p}; {n}.",
        ],
        "mixed": [
            "Nobody can say that {p}, or that {n}.",
            "It is not true that {n}. Nor is it true that {p}.",
            "I do not deny that {p}. I do not deny either that {n}.",
            "I would never say that {n}, or that {p}.",
        ],
    },
    "irony": {
        "positive": [
            "What a scandal: {p}, and {p}.",
            "I must complain: {p}. I never asked to be spoiled.",
            "How dare they? {P}, and {p}.",
        ],
        "negative": [
            "Wonderful: {n}, and {n}.",
            "I must say thank you: {n}. I never asked to be spoiled.",
            "How kind of them! {N}, and {n}.",
        ],
        "mixed": [
            "Wonderful: {n}. What a scandal: {p}.",
            "I must say thank you: {p}. I must say thank you again: {n}.",
            "How kind of them! {N}, and {p}.",
        ],
    },
}


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


class Clause(NamedTuple):
    text: str
    opposite: int  # praise and blame of the same number say the opposite; 0: nothing


def fragments() -> dict[str, dict[str, list[Clause]]]:
    """Topic -> {"p": clauses of praise, "n": clauses of blame}.

    Clauses under "@name: topics" belong to each of these topics; there the first
    praise and the first blame are opposites, the second and the second, and so on.
    """
    found: dict[str, dict[str, list[Clause]]] = {}
    for line in (FOLDER / "fragments.txt").read_text(encoding="utf-8").splitlines():
        mark, _, text = line.partition(" ")
        if mark == "#":
            shared, count = text[0] == "@", {"p": 0, "n": 0}
            topics = text.partition(": ")[2].split(", ") if shared else [text]
            for topic in topics:
                found.setdefault(topic, {"p": [], "n": []})
        else:
            kind = {"+": "p", "-": "n"}[mark]
            count[kind] += 1
            for topic in topics:
                found[topic][kind].append(Clause(text, count[kind] if shared else 0))
    return found


def subject(clause: str) -> str:
    """What a clause is about: the words before its verb."""
    return re.split(r" (?:is|are|was|were|has|have|had|tastes?|looks?) ", clause)[0]


def compose(
    frame: str, clauses: dict[str, list[Clause]], rng: random.Random
) -> str | None:
    """One frame with clauses of one topic in its places; None if two clash."""
    left = {kind: rng.sample(some, len(some)) for kind, some in clauses.items()}
    about: list = []

    def fill(match: re.Match) -> str:
        text, opposite = left[match[1].lower()].pop()
        about.append(subject(text))
        about.append(opposite)
        return text[0].upper() + text[1:] if match[1].isupper() else text

    text = re.sub(r"\{([pnPN])\}", fill, frame)
    named = [one for one in about if one not in (0, "it", "they", "we", "I")]
    return text if len(named) == len(set(named)) else None


def composed(rng: random.Random) -> list[Review]:
    """The joined reviews: topics and frames in turn, so that each is used alike."""
    stock = fragments()
    made: list[Review] = []
    seen: set[str] = set()
    for label in LABELS.values():
        topics = list(stock)
        turns = [(k, f) for k in FRAMES for f in FRAMES[k].get(label, ())]
        rng.shuffle(topics)
        rng.shuffle(turns)
        number = 0
        wanted = len(made) + COMPOSED
        while len(made) < wanted:
            topic = topics[number % len(topics)]
            kind, frame = turns[(number + number // len(topics)) % len(turns)]
            number += 1
            text = compose(frame, stock[topic], rng)
            if not text or text in seen or not 8 <= len(text.split()) <= 35:
                continue
            seen.add(text)
            made.append(Review(text, label, kind, topic))
    return made


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
    splits["train"] += composed(rng)
    files = {}
    for split, reviews in splits.items():
        rng.shuffle(reviews)
        lines = [json.dumps(r.record(), ensure_ascii=False) for r in reviews]
        files[f"{split}.jsonl"] = "\n".join(lines) + "\n"
    return files


def main(arguments: list[str]) -> int:
    different = []
    for name, text in build().items():
        path = FOLDER / name
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
