"""The large and the wide training set of the home commands.

Schema, leakage, balance, rebuild: each check runs on both sets.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import pytest
from builders import load_file, read_lines

ROOT = Path(__file__).resolve().parents[2]
DATA, SOURCES = ROOT / "data", ROOT / "maintenance" / "data_sets"
SMALL, LARGE = DATA / "home_commands", DATA / "home_commands_large"
SPLITS = ("train", "validation", "test")


# The checks of the small set, applied to this one.
checks = load_file(
    Path(__file__).with_name("test_home_commands.py"), "small_set_checks"
)
build = load_file(SOURCES / LARGE.name / "build.py", "home_commands_large_build")
OTHERS = {split: read_lines(SMALL / f"{split}.jsonl") for split in SPLITS}


@dataclass(frozen=True)
class Bounds:
    """What one set promises: records, bytes, patterns by hand, broadest values."""

    records: tuple[int, int]
    bytes: int
    patterns: dict[str, int]
    values: int
    everyday: float


BOUNDS = {
    "home_commands_large": Bounds(
        (14_000, 18_000),
        3_000_000,
        {"action": 40, "none": 150}
        | {"negation": 120, "multi": 100, "wrap": 60, "join2": 20},
        values=150,
        everyday=0.2,
    ),
    "home_commands_wide": Bounds(
        (19_200, 19_200),
        4_500_000,
        {"action": 50, "none": 400}
        | {"negation": 400, "multi": 350, "wrap": 100, "join2": 90},
        values=250,
        everyday=0.25,
    ),
}


class TrainingSet:
    """One of the two sets: its files, its builder, its patterns' own builder."""

    def __init__(self, name: str) -> None:
        self.folder, self.bounds = DATA / name, BOUNDS[name]
        self.train = read_lines(self.folder / "train.jsonl")
        self.prompts = {record["prompt"] for record in self.train}
        self.stripped = {checks.strip_slots(record) for record in self.train}
        path = SOURCES / name / "build.py"
        self.module = load_file(path, f"{name}_build_to_check")
        self.tools = getattr(self.module, "large", self.module)
        self.files, self.builder = self.module.build()


@pytest.fixture(scope="module", params=list(BOUNDS))
def ours(request) -> TrainingSet:
    return TrainingSet(request.param)


# --- shape ----------------------------------------------------------------------------


def test_size(ours):
    least, most = ours.bounds.records
    assert least <= len(ours.train) <= most
    assert (ours.folder / "train.jsonl").stat().st_size <= ours.bounds.bytes


def test_every_record_is_canonical_valid_and_short(ours):
    for record in ours.train:
        assert list(record) == ["prompt", "completion", "slice"]
        assert record["slice"] == "seen"
        answer = json.loads(record["completion"])
        assert record["completion"] == json.dumps(answer, ensure_ascii=False)
        assert checks.problems(answer) == [], record
        assert len(record["completion"]) <= 260
        prompt = record["prompt"]
        assert prompt == prompt.strip()
        most = 24 if len(checks.actions_of(record)) == 3 else 22
        assert 1 <= len(prompt.split()) <= most
        assert not re.search(r"[{}\[\]|\x00-\x1f]|  |\(n\)| ,|,,", prompt), prompt


def test_balance_of_actions(ours):
    counts = Counter(a["action"] for r in ours.train for a in checks.actions_of(r))
    shares = {name: n / counts.total() for name, n in counts.items()}
    assert set(shares) == set(ours.tools.small.SCHEMA)
    assert 0.10 <= shares.pop("none") <= 0.20
    assert min(shares.values()) >= 0.04, shares
    assert max(shares.values()) <= 2.2 * min(shares.values()), shares


def test_values_are_many_and_evenly_drawn(ours):
    said = defaultdict(Counter)
    for record in ours.train:
        for action in checks.actions_of(record):
            for key, value in action.items():
                said[key][value] += 1
    for key in ("room", "door", "colour", "name", "item", "to", "title", "artist"):
        assert len(said[key]) >= ours.bounds.values, key
        assert len(said[key]) >= 0.1 * said[key].total(), key
    old = set(checks.build.VALUES["room"]["seen"])
    rooms = {room: n for room, n in said["room"].items() if room != "all"}
    everyday = sum(n for room, n in rooms.items() if room in old)
    assert everyday < ours.bounds.everyday * sum(rooms.values())


def test_free_text_is_copied_from_the_sentence(ours):
    """Rooms and doors too, unless they are everyday ones, which a typo may hit."""
    for record in ours.train:
        for action in checks.actions_of(record):
            for key, value in action.items():
                if key == "action" or value == "all" or value in ours.tools.EVERYDAY:
                    continue
                if ours.tools.small.SCHEMA[action["action"]][key][0] == "text":
                    assert value in record["prompt"], record


def test_many_patterns_by_hand(ours):
    small, written = ours.tools.small, defaultdict(set)
    path = SOURCES / ours.folder.name / "skeletons.txt"
    for line in small.read_skeletons(path, every=0):
        single = line.kind == "single"
        written[line.action if single else line.kind].add(line.text)
    least = dict(ours.bounds.patterns)
    each = least.pop("action")
    for what, count in (dict.fromkeys(small.SCHEMA, each) | least).items():
        assert len(written[what]) >= count, what


# --- leakage --------------------------------------------------------------------------


def test_no_prompt_twice_anywhere(ours):
    records = [*ours.train, *(r for split in SPLITS for r in OTHERS[split])]
    prompts = Counter(checks.plain(r["prompt"]) for r in records)
    assert [p for p, n in prompts.items() if n > 1] == []


@pytest.mark.parametrize("split", ["validation", "test"])
def test_stripped_sentences_are_unseen(ours, split):
    assert {checks.strip_slots(r) for r in OTHERS[split]} & ours.stripped == set()


def test_patterns_of_validation_and_test_are_unused(ours):
    """Cores, wrappers and joints, by the builder's own account, whatever the slots."""
    key, meta = ours.tools.anonymous, ours.builder.meta
    used = {key(text) for prompt in ours.prompts for text in meta[prompt]}
    of_split = defaultdict(set)
    for line in build.small.read_skeletons():
        of_split[line.split].add(key(line.text))
    assert of_split["test"] and of_split["test"] & used == set()
    assert of_split["validation"] and of_split["validation"] & used == set()
    assert len(of_split["train"] & used) > 300  # the old training patterns are there


def test_longer_patterns_of_test_are_no_part_of_ours(ours):
    key, meta = ours.tools.anonymous, ours.builder.meta
    everything = "|".join({f" {key(s)} " for p in ours.prompts for s in meta[p]})
    for line in build.small.read_skeletons():
        if line.split == "test" and len(key(line.text).replace("#", "").split()) > 2:
            assert f" {key(line.text)} " not in everything, line.text


def test_the_builder_refuses_what_leaks(ours):
    test = next(s for s in build.small.read_skeletons() if s.split == "test")
    assert ours.builder.reserved.pattern(test.text)
    assert ours.builder.refused  # some of our lines were such, and are not used
    record = OTHERS["test"][0]
    assert not ours.builder.acceptable(record["prompt"], record["completion"])
    assert not ours.builder.acceptable("vacuum the pantry", '{"action": "none"}')


def test_held_out_values_are_new(ours):
    learned = "\n".join(r["prompt"].casefold() for r in ours.train)
    assert len(ours.tools.HELD_OUT) > 80
    assert [v for v in ours.tools.HELD_OUT if checks.said_in(v, learned)] == []
    drawn = [
        v
        for pools in ours.tools.VALUES.values()
        for pool in pools.values()
        for v in pool
    ]
    assert not checks.said_in("pantry", "\n".join(drawn).casefold())


def test_the_wide_set_repeats_no_sentence_of_the_large_one():
    large = {checks.plain(r["prompt"]) for r in read_lines(LARGE / "train.jsonl")}
    wide = read_lines(DATA / "home_commands_wide" / "train.jsonl")
    assert not large & {checks.plain(r["prompt"]) for r in wide}


# --- spoken forms and typing errors ---------------------------------------------------


def test_spoken_times_mean_what_is_written():
    import random

    def said(h: int, m: int) -> set[str]:
        return {build.time_phrase(random.Random(i), h, m) for i in range(600)}

    assert {"19:15", "7:15pm", "7.15 pm", "nineteen fifteen"} <= said(19, 15)
    assert "a quarter past seven in the evening" in said(19, 15)
    assert {"five to eight in the morning", "07:55"} <= said(7, 55)
    assert "seven oh five am" in said(7, 5)
    assert {"7pm", "seven in the evening"} <= said(19, 0)
    assert said(12, 0) == {"noon"}
    for h in (5, 9, 10, 12, 16, 23):  # each says which half of the day it means
        for m in (0, 7, 15, 35, 48):
            for phrase in said(h, m):
                half = r"[ap]m$|^noon$| in the (morning|afternoon|evening)$| at night$"
                clock = re.search(r"^0\d:\d\d$|^(1[3-9]|2\d):\d\d$", phrase)
                assert clock or re.search(half, phrase) or h > 12, phrase


def test_spoken_durations():
    import random

    long = {build.duration_phrase(random.Random(i), 80) for i in range(600)}
    assert {"1 hr 20 min", "an hour and twenty minutes", "80 minutes"} & long
    assert not any(re.search(r"\bone hours|\b1 hours|one minutes", p) for p in long)
    assert {build.duration_phrase(random.Random(i), 1) for i in range(99)} == {
        "a minute",
        "one minute",
        "1 minute",
    }


def test_invented_words_are_words_to_copy():
    import random

    path = SOURCES / "home_commands_wide" / "build.py"
    wide = load_file(path, "wide_build_to_invent")
    rng = random.Random(0)
    words = {wide.invent(rng) for _ in range(2000)}
    assert len(words) > 1500
    assert all(re.fullmatch("[a-z]{4,14}", word) for word in words)
    for slot in wide.INVENTED:
        value = wide.invented_value(slot, rng)
        assert value == value.strip() and not wide.large.holds_a_held_out_value(value)
    with pytest.raises(KeyError):
        wide.invented_value("colour", rng)


def test_wordings_are_spelt_out():
    assert build.variants("[cut|kill] the [lamp|]") == [
        "cut the lamp",
        "cut the",
        "kill the lamp",
        "kill the",
    ]


# --- files ----------------------------------------------------------------------------


def test_the_builder_makes_this_file(ours):
    assert list(ours.files) == ["train.jsonl"]
    assert (ours.folder / "train.jsonl").read_bytes() == ours.files[
        "train.jsonl"
    ].encode()


def test_check_option_sees_a_changed_file(tmp_path, ours):
    made = lambda: (ours.files, ours.builder)  # noqa: E731
    path = tmp_path / "train.jsonl"
    path.write_bytes((ours.folder / "train.jsonl").read_bytes())
    assert build.small.main(["--check"], tmp_path, made) == 0
    path.write_bytes(path.read_bytes()[:-2] + b" \n")
    assert build.small.main(["--check"], tmp_path, made) == 1


def test_data_card_has_the_hash_and_the_count(ours):
    card = (ours.folder / "README.md").read_text("utf-8")
    digest = hashlib.sha256((ours.folder / "train.jsonl").read_bytes()).hexdigest()
    row = re.search(r"`train\.jsonl` \| (\d[\d,]*) \| `([0-9a-f]{64})`", card)
    assert (int(row[1].replace(",", "")), row[2]) == (len(ours.train), digest)
    assert "CC BY 4.0" in card
