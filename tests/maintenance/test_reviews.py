"""The reviews data set: balance, slices, leakage, shortcuts, hashes, rebuild."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import subprocess
import sys
from collections import Counter, defaultdict
from itertools import combinations
from pathlib import Path

import pytest
from builders import load_file

from course_utils.data import load_examples

ROOT = Path(__file__).resolve().parents[2]
FOLDER = ROOT / "data" / "reviews"
SOURCES = ROOT / "maintenance" / "data_sets" / "reviews"
SPLITS = ("train", "validation", "test")
LABELS = {"negative", "mixed", "positive"}
KINDS = {"plain", "mixed_feelings", "irony", "negation", "understatement"}


build = load_file(SOURCES / "build.py", "reviews_build")
RECORDS = {
    split: [
        json.loads(line)
        for line in (FOLDER / f"{split}.jsonl").read_text("utf-8").splitlines()
    ]
    for split in SPLITS
}
LEARNED = RECORDS["train"] + RECORDS["validation"]


def words(text: str) -> list[str]:
    return re.findall(r"[\w']+", text.casefold())


# --- shape ----------------------------------------------------------------------------


def test_sizes_slices_and_balance():
    assert sum(map(len, RECORDS.values())) >= 600
    assert len(RECORDS["train"]) >= 400
    assert len(RECORDS["validation"]) >= 100
    assert len(RECORDS["test"]) >= 240
    counts = Counter((r["slice"], r["label"]) for r in RECORDS["test"])
    slices = KINDS | {"unseen_topic"}
    assert counts == {(name, label): 16 for name in slices for label in LABELS}
    for split in ("train", "validation"):
        assert {r["slice"] for r in RECORDS[split]} == KINDS
    for split in SPLITS:
        labels = Counter(r["label"] for r in RECORDS[split])
        assert set(labels) == LABELS
        assert len(set(labels.values())) == 1  # balanced exactly


@pytest.mark.parametrize("split", SPLITS)
def test_every_record_is_a_clean_short_review(split):
    for record in RECORDS[split]:
        assert list(record) == ["text", "label", "slice", "topic"]
        text = record["text"]
        assert text == text.strip()
        assert 8 <= len(text.split()) <= 35, text
        assert text[0].isupper() and text[-1] in ".?!", text
        assert not re.search(r"[{}\x00-\x1f“”’]|  | [,.;:!?]|,,|\.\.", text), text


def test_enough_of_the_hard_kinds_is_written():
    threes = build.written("written.txt") + build.written("written_test.txt")
    kinds = Counter(three[0].slice for three in threes)
    assert 3 * sum(kinds.values()) >= 700
    assert 3 * (kinds["irony"] + kinds["mixed_feelings"] + kinds["negation"]) >= 400
    whole = {review.text for three in threes for review in three}
    assert {r["text"] for s in SPLITS for r in RECORDS[s]} == whole


def test_the_threes_of_one_subject_stay_in_one_split():
    place = {r["text"]: split for split in SPLITS for r in RECORDS[split]}
    for name in ("written.txt", "written_test.txt"):
        for three in build.written(name):
            assert len({place[review.text] for review in three}) == 1


# --- leakage --------------------------------------------------------------------------


def grams(text: str, n: int) -> set[tuple[str, ...]]:
    found = words(text)
    return {tuple(found[i : i + n]) for i in range(len(found) - n + 1)}


def test_no_review_twice_and_none_nearly():
    texts = [" ".join(words(r["text"])) for s in SPLITS for r in RECORDS[s]]
    assert [text for text, n in Counter(texts).items() if n > 1] == []
    written = [
        frozenset(words(review.text))
        for name in ("written.txt", "written_test.txt")
        for three in build.written(name)
        for review in three
    ]
    near = [(a, b) for a, b in combinations(written, 2) if len(a & b) > len(a | b) / 2]
    assert near == []


def test_test_and_validation_share_no_phrase_with_training():
    """No five words in a row: neither a sentence nor its skeleton comes back."""
    learned = {gram for r in LEARNED for gram in grams(r["text"], 5)}
    assert [
        g for r in RECORDS["test"] for g in grams(r["text"], 5) if g in learned
    ] == []
    # The same measure does see a phrase that comes back.
    first = RECORDS["test"][0]
    planted = "Well: " + " ".join(first["text"].split()[1:8])
    assert grams(planted, 5) & grams(first["text"], 5)


HELD_OUT = {
    "ferry": "ferry|ferries",
    "podcast": "podcasts?",
    "swimming pool": "pools?",
    "desk lamp": "lamps?",
    "umbrella": "umbrellas?",
    "mattress": "mattress(es)?",
    "printer": "printers?",
    "escape room": "escape rooms?",
    "cheese stall": "cheeses?|stalls?",
    "garden seeds": "radish(es)?|seedlings?|gardeners?",
    "puppet theatre": "puppets?|theatres?",
    "guitar": "guitars?",
    "zoo": "zoos?",
    "doorbell": "doorbells?",
    "sunglasses": "sunglasses",
}


def test_held_out_topics_are_never_mentioned_in_training():
    new = {r["topic"] for r in RECORDS["test"] if r["slice"] == "unseen_topic"}
    assert new == set(HELD_OUT)
    known = {r["topic"] for r in LEARNED}
    assert new & known == set()
    assert {r["topic"] for r in RECORDS["test"]} - new <= known
    pattern = re.compile(rf"\b(?:{'|'.join(HELD_OUT.values())})\b", re.I)
    assert [r["text"] for r in LEARNED if pattern.search(r["text"])] == []


# --- shortcuts ------------------------------------------------------------------------


def best_word_rule(records: list[dict]) -> tuple[float, str]:
    """The most right of any rule "with this word one label, without it another"."""
    total = Counter(r["label"] for r in records)
    by_word: dict[str, Counter] = defaultdict(Counter)
    for record in records:
        for word in set(words(record["text"])):
            by_word[word][record["label"]] += 1
    return max(
        (max(c.values()) + max(total[x] - c[x] for x in total), word)
        for word, c in by_word.items()
    )


def test_no_single_word_gives_the_label_away():
    for split in SPLITS:
        right, word = best_word_rule(RECORDS[split])
        assert right / len(RECORDS[split]) < 0.5, (split, word)
    planted = [
        {**r, "text": r["text"] + " but" * (r["label"] == "mixed")}
        for r in RECORDS["test"]
    ]
    right, word = best_word_rule(planted)
    assert word == "but" and right / len(planted) > 0.6


def test_neither_length_nor_topic_gives_the_label_away():
    for split in SPLITS:
        total = Counter(r["label"] for r in RECORDS[split])
        for limit in range(9, 35):
            short = Counter(
                r["label"] for r in RECORDS[split] if len(r["text"].split()) < limit
            )
            right = max(short.values(), default=0)
            right += max(total[x] - short[x] for x in total)
            assert right / len(RECORDS[split]) < 0.5, (split, limit)
    by_topic: dict[str, Counter] = defaultdict(Counter)
    for record in RECORDS["train"]:
        by_topic[record["topic"]][record["label"]] += 1
    right = sum(max(c.values()) for c in by_topic.values())
    assert right / len(RECORDS["train"]) < 0.4


def test_a_word_counting_classifier_does_not_solve_it():
    """Naive Bayes on the words of the training split stays far from a good score."""
    from math import log

    counts = {label: Counter() for label in LABELS}
    for record in RECORDS["train"]:
        counts[record["label"]].update(set(words(record["text"])))
    vocabulary = set().union(*counts.values())
    sums = {label: sum(c.values()) + len(vocabulary) for label, c in counts.items()}

    def guess(text: str) -> str:
        known = [w for w in set(words(text)) if w in vocabulary]
        return max(
            sorted(LABELS),
            key=lambda x: sum(log((counts[x][w] + 1) / sums[x]) for w in known),
        )

    def share(records: list[dict]) -> float:
        return sum(guess(r["text"]) == r["label"] for r in records) / len(records)

    assert share(RECORDS["test"]) < 0.6
    assert share(RECORDS["train"]) > 0.8  # it does learn


# --- files ----------------------------------------------------------------------------


def test_the_builder_makes_these_files():
    for name, text in build.build().items():
        assert (FOLDER / name).read_bytes() == text.encode("utf-8"), name


def test_check_option_sees_a_changed_file(tmp_path):
    sources = tmp_path / "maintenance" / "data_sets" / "reviews"
    built = tmp_path / "data" / "reviews"
    shutil.copytree(SOURCES, sources)
    shutil.copytree(FOLDER, built)
    command = [sys.executable, str(sources / "build.py"), "--check"]
    assert subprocess.run(command, capture_output=True).returncode == 0
    changed = built / "validation.jsonl"
    changed.write_bytes(changed.read_bytes()[:-2] + b" \n")
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 1
    assert "validation.jsonl" in result.stdout


def test_data_card_has_the_hash_and_the_counts_of_each_file():
    card = (FOLDER / "README.md").read_text("utf-8")
    for split in SPLITS:
        data = (FOLDER / f"{split}.jsonl").read_bytes()
        row = re.search(
            rf"^\| `{split}\.jsonl` \| (\d+) \| `([0-9a-f]{{64}})`", card, re.M
        )
        assert row, split
        assert int(row[1]) == len(RECORDS[split])
        assert row[2] == hashlib.sha256(data).hexdigest()
    assert "CC BY 4.0" in card
    counts = {s: Counter(r["slice"] for r in RECORDS[s]) for s in SPLITS}
    for name in KINDS | {"unseen_topic"}:
        row = " | ".join(str(counts[split][name]) for split in SPLITS)
        assert f"| `{name}` | {row} |" in card
    assert f"{sum(map(len, RECORDS.values()))} reviews are written whole" in card


def test_load_examples_gives_texts_label_names_and_the_courses_columns():
    for split in SPLITS:
        examples = load_examples("reviews", split)
        assert len(examples) == len(RECORDS[split])
        assert {"text", "label", "slice", "topic", "prompt", "completion"} == set(
            examples.column_names
        )
        assert examples["text"] == examples["prompt"]
        assert examples["label"] == examples["completion"]
        assert set(examples["label"]) == LABELS
