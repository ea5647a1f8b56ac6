"""Build the home-commands data set: one spoken sentence, one JSON object.

    python maintenance/data_sets/home_commands/build.py           writes the files
    python maintenance/data_sets/home_commands/build.py --check   compares them

The sentences are hand-written in skeletons.txt, the values in values.json. This script
fills them, wraps and joins them, adds typing errors, and deals out the splits. It uses
the standard library only and always gives the same bytes.
"""

from __future__ import annotations

import json
import random
import re
import sys
from dataclasses import dataclass, field
from pathlib import Path

FOLDER = Path(__file__).resolve().parent
DATA = FOLDER.parents[2] / "data" / FOLDER.name
VALUES = json.loads((FOLDER / "values.json").read_text(encoding="utf-8"))
SEED = 20261122

# Argument -> (type, allowed values). A type is "text" (copied from the sentence),
# "integer" (allowed: smallest, largest), "time" ("HH:MM", 24 hours) or "choice".
ROOM = ("text", None)
DAYS = "monday tuesday wednesday thursday friday saturday sunday "
DAYS += "tomorrow weekdays daily"
DAY = ("choice", DAYS.split())
SCHEMA: dict[str, dict[str, tuple]] = {
    "set_light": {
        "room": ROOM,
        "state": ("choice", ["on", "off"]),
        "brightness": ("integer", (0, 100)),
        "colour": ("text", None),
        "change": ("choice", ["brighter", "dimmer"]),
    },
    "set_temperature": {
        "room": ROOM,
        "degrees": ("integer", (10, 30)),
        "change": ("choice", ["warmer", "cooler"]),
        "by": ("integer", (1, 9)),
    },
    "set_timer": {"name": ("text", None), "minutes": ("integer", (1, 600))},
    "set_alarm": {"time": ("time", None), "day": DAY},
    "move_blinds": {"room": ROOM, "position": ("integer", (0, 100))},
    "play_music": {
        "title": ("text", None),
        "artist": ("text", None),
        "genre": ("text", None),
        "room": ROOM,
    },
    "set_volume": {
        "room": ROOM,
        "level": ("integer", (0, 100)),
        "change": ("choice", ["louder", "quieter"]),
    },
    "add_item": {"item": ("text", None), "quantity": ("integer", (1, 99))},
    "set_reminder": {"text": ("text", None), "time": ("time", None), "day": DAY},
    "send_message": {"to": ("text", None), "text": ("text", None)},
    "set_lock": {"door": ("text", None), "state": ("choice", ["locked", "unlocked"])},
    "vacuum": {"command": ("choice", ["start", "stop", "dock"]), "room": ROOM},
    "set_oven": {
        "degrees": ("integer", (50, 250)),
        "mode": ("choice", ["fan", "grill", "steam"]),
        "minutes": ("integer", (1, 600)),
        "state": ("choice", ["off"]),
    },
    "set_fan": {"room": ROOM, "speed": ("choice", ["off", "low", "medium", "high"])},
    "start_scene": {"scene": ("text", None)},
    "cancel": {
        "kind": ("choice", ["timer", "alarm", "reminder"]),
        "name": ("text", None),
        "time": ("time", None),
        "text": ("text", None),
    },
    "none": {},
}
# The sets of arguments that may stand together; a trailing ? marks an optional one.
FORMS: dict[str, list[str]] = {
    "set_light": [
        "room state",
        "room brightness colour?",
        "room colour",
        "room change",
    ],
    "set_temperature": ["room? degrees", "room? change by?"],
    "set_timer": ["name? minutes"],
    "set_alarm": ["time day?"],
    "move_blinds": ["room position"],
    "play_music": ["title artist? room?", "artist room?", "genre room?"],
    "set_volume": ["room? level", "room? change"],
    "add_item": ["item quantity"],
    "set_reminder": ["text time day?"],
    "send_message": ["to text"],
    "set_lock": ["door state"],
    "vacuum": ["command room?"],
    "set_oven": ["degrees mode? minutes?", "state"],
    "set_fan": ["room speed"],
    "start_scene": ["scene"],
    "cancel": ["kind name", "kind time", "kind text"],
    "none": [""],
}
TEXT_SLOTS = set(VALUES) - {"countable", "uncountable"} | {"item", "qitem"}

# --- numbers, times and durations in words --------------------------------------------

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
ONES += ["ten", "eleven", "twelve", "thirteen", "fourteen", "fifteen", "sixteen"]
ONES += ["seventeen", "eighteen", "nineteen"]
TENS = ["", "", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty"]
TENS += ["ninety"]


def words(n: int) -> str:
    """An integer from 0 to 999 in words."""
    if n < 20:
        return ONES[n]
    if n < 100:
        return TENS[n // 10] + (f"-{ONES[n % 10]}" if n % 10 else "")
    rest = f" and {words(n % 100)}" if n % 100 else ""
    return f"{'a' if n < 200 else ONES[n // 100]} hundred{rest}"


def number(rng: random.Random, n: int) -> str:
    return str(n) if rng.random() < 0.5 else words(n)


def time_phrase(rng: random.Random, h: int, m: int, part: bool = True) -> str:
    """A time of day as people say it; `part` adds "in the evening" and the like."""
    if (h, m) in ((12, 0), (0, 0)) and part:
        return "noon" if h else "midnight"
    if h < 12:
        daytime, half = "in the morning", "am"
    else:
        half = "pm"
        daytime = "in the afternoon" if h < 17 else "in the evening"
        if h >= 21:
            daytime = "at night"
    hour, following = words((h - 1) % 12 + 1), words(h % 12 + 1)
    kind = rng.random()
    if m % 5 == 0 and kind < 0.6:
        if m == 0:
            spoken = rng.choice([f"{hour} o'clock", hour])
        elif m in (15, 30, 45):
            spoken = {15: f"quarter past {hour}", 30: f"half past {hour}"}.get(
                m, f"quarter to {following}"
            )
        elif m < 30:
            spoken = f"{words(m)} past {hour}"
        else:
            spoken = f"{words(60 - m)} to {following}"
        return f"{spoken} {daytime}" if part else spoken
    if kind < 0.75 and (m == 0 or m >= 10):
        spoken = f"{hour} {words(m)}" if m else hour
        return f"{spoken} {half}" if part else spoken
    if h >= 13 and kind < 0.88:
        return f"{h}:{m:02d}"
    digits = f"{(h - 1) % 12 + 1}" + (f":{m:02d}" if m else "")
    if not part:
        return digits
    return f"{digits} {half}" if kind < 0.95 else f"{digits} {daytime}"


def clock_phrase(rng: random.Random, h: int, m: int) -> str:
    """A short time that can stand before a noun: "the 7:15 am alarm"."""
    if (h, m) == (12, 0):
        return "noon"
    hour, half = (h - 1) % 12 + 1, "am" if h < 12 else "pm"
    if (m == 0 or m >= 10) and rng.random() < 0.5:
        return f"{words(hour)} {words(m) + ' ' if m else ''}{half}"
    return f"{hour}:{m:02d} {half}" if m else f"{hour} {half}"


def duration_phrase(rng: random.Random, minutes: int) -> str:
    special = {
        15: ["a quarter of an hour"],
        30: ["half an hour"],
        45: ["three quarters of an hour"],
        60: ["an hour", "one hour"],
        75: ["an hour and a quarter", "an hour and fifteen minutes"],
        90: ["an hour and a half", "one and a half hours"],
        105: ["an hour and three quarters"],
        120: ["two hours", "2 hours"],
        135: ["two and a quarter hours", "two hours and fifteen minutes"],
        150: ["two and a half hours", "two hours and thirty minutes"],
        180: ["three hours", "3 hours"],
        210: ["three and a half hours"],
        240: ["four hours"],
    }.get(minutes, [])
    if special and rng.random() < 0.75:
        return rng.choice(special)
    hours, rest = divmod(minutes, 60)
    if hours and rest and rng.random() < 0.75:
        long = "an hour" if hours == 1 else f"{words(hours)} hours"
        short = f"{hours} hour{'s' if hours > 1 else ''}"
        return rng.choice(
            [f"{long} and {words(rest)} minutes", f"{short} {rest} minutes"]
        )
    return f"{number(rng, minutes)} minutes"


# --- slots: what may stand in {braces} ------------------------------------------------

PERCENTS = list(range(5, 100, 5))
SHARES = {25: "a quarter", 50: "half", 75: "three quarters"}
MINUTES = [3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 14, 15, 16, 18, 20, 22, 25, 28, 30, 35, 40]
MINUTES += [45, 50, 55]
HOURS = [60, 65, 70, 75, 80, 85, 90, 95, 100, 105, 110, 120, 130, 135, 140, 150, 160]
HOURS += [180, 200, 210, 240]


def percent(rng: random.Random, n: int) -> str:
    return rng.choice([f"{n}%", f"{n} percent", f"{words(n)} percent"])


def draw_time(rng: random.Random) -> tuple[int, int]:
    hour = rng.choice([5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, *range(13, 24)])
    minute = rng.choice([0, 0, 15, 30, 45, 5, 10, 20, 25, 35, 40, 50, 55])
    if rng.random() < 0.1:
        minute = rng.randrange(10, 60)
    return hour, minute


def draw(slot: str, rng: random.Random, pool: str) -> tuple[str, dict]:
    """The words for one slot and the arguments they mean."""
    if slot in VALUES:
        value = rng.choice(VALUES[slot][pool])
        key = {"person": "to", "message": "text"}.get(slot, slot)
        return value, {key: value}
    if slot in ("qitem", "item"):
        if slot == "item" or rng.random() < 0.3:
            value = rng.choice(VALUES["uncountable"][pool])
            return value, {"item": value, "quantity": 1}
        singular, plural = rng.choice(VALUES["countable"][pool]).split("/")
        n = rng.choice([1, 2, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 15, 20, 24])
        if n == 1:
            phrase = rng.choice(["a(n)", "one"])
            return f"{phrase} {singular}", {"item": singular, "quantity": 1}
        special = {2: "a couple of", 6: "half a dozen", 12: "a dozen", 24: "two dozen"}
        phrase = number(rng, n)
        if n in special and rng.random() < 0.6:
            phrase = special[n]
        return f"{phrase} {plural}", {"item": plural, "quantity": n}
    if slot in ("brightness", "position", "openness"):
        n = rng.choice([*PERCENTS, 25, 50, 75])
        key = "brightness" if slot == "brightness" else "position"
        if n in SHARES and rng.random() < 0.6:
            share = SHARES[n]
            if slot == "brightness":
                return ("half brightness" if n == 50 else f"{n}%"), {key: n}
            if slot == "position":
                return ("halfway" if n == 50 else f"{share} of the way"), {key: n}
            return f"{share} open", {key: n}
        tail = " open" if slot == "openness" else ""
        return percent(rng, n) + tail, {key: n}
    if slot == "level":
        n = rng.choice(PERCENTS)
        return rng.choice([str(n), words(n), percent(rng, n)]), {"level": n}
    if slot == "degrees":
        n = rng.randrange(15, 27)
        return number(rng, n), {"degrees": n}
    if slot == "by":
        n = rng.randrange(2, 6)
        return number(rng, n), {"by": n}
    if slot == "oven":
        n = rng.choice([*range(100, 251, 10), 175, 185, 225])
        return number(rng, n), {"degrees": n}
    if slot == "mode":
        return (value := rng.choice(["fan", "grill", "steam"])), {"mode": value}
    if slot == "speed":
        return (value := rng.choice(["low", "medium", "high"])), {"speed": value}
    if slot == "setting":
        value = rng.choice(["low", "medium", "high"])
        names = {"low": "lowest", "medium": "middle", "high": "highest"}
        return f"the {names[value]} setting", {"speed": value}
    if slot == "duration":
        n = rng.choice(MINUTES if rng.random() < 0.5 else HOURS)
        return duration_phrase(rng, n), {"minutes": n}
    if slot == "duration_adjective":
        n = rng.choice([*MINUTES, 60, 90, 120, 30])
        named = {30: "half-hour", 60: "one-hour", 90: "ninety-minute", 120: "two-hour"}
        return named.get(n, f"{number(rng, n)}-minute"), {"minutes": n}
    if slot in ("day", "oneday"):
        choices = [(f"on {d.capitalize()}", d) for d in DAYS.split()[:7]]
        choices += [("tomorrow", "tomorrow")] * 3
        if slot == "day":
            choices += [("every weekday", "weekdays"), ("every day", "daily")] * 2
        phrase, day = rng.choice(choices)
        return phrase, {"day": day}
    if slot in ("time", "when", "clock"):
        h, m = draw_time(rng)
        args = {"time": f"{h:02d}:{m:02d}"}
        if slot == "clock":
            return clock_phrase(rng, h, m), args
        if slot == "time":
            return time_phrase(rng, h, m), args
        if rng.random() < 0.5:
            return f"at {time_phrase(rng, h, m)}", args
        phrase, day = draw("day", rng, pool)
        if phrase == "tomorrow" and (h < 12 or 12 < h < 17 or 17 <= h < 21):
            part = "morning" if h < 12 else "afternoon" if h < 17 else "evening"
            said = time_phrase(rng, h, m, part=False)
            return f"tomorrow {part} at {said}", args | day
        said = time_phrase(rng, h, m)
        return rng.choice([f"{phrase} at {said}", f"at {said} {phrase}"]), args | day
    raise ValueError(f"unknown slot {{{slot}}}")


# --- skeletons ------------------------------------------------------------------------


@dataclass(frozen=True)
class Skeleton:
    text: str
    clause: bool
    split: str
    kind: str
    actions: tuple[tuple[str, tuple[tuple[str, str], ...]], ...] = ()

    @property
    def slots(self) -> list[str]:
        return re.findall(r"\{([\w.]+)\}", self.text)

    @property
    def open_ended(self) -> bool:
        """Ends in free text, so nothing may follow it."""
        return any(s.split(".")[-1] in ("text", "message") for s in self.slots)

    @property
    def action(self) -> str:
        return self.actions[0][0]


def read_skeletons(path: Path | None = None, every: int = 7) -> list[Skeleton]:
    """Every line of skeletons.txt; each seventh training line is for validation."""
    path = path or FOLDER / "skeletons.txt"
    found, kind, actions, split, seen = [], "", (), "", 0
    for raw in path.read_text(encoding="utf-8").splitlines():
        line = raw.strip()
        if not line or line.startswith("#"):
            continue
        if line.startswith("=="):
            kind, _, rest = line[2:].strip().partition(" ")
            actions = tuple(
                (part.split()[0], tuple(tuple(a.split("=")) for a in part.split()[1:]))
                for part in rest.split("|")
                if part.strip()
            )
        elif line in ("train", "test"):
            split = line
        else:
            own = split
            if split == "train" and kind in ("single", "negation", "multi"):
                seen += 1
                own = "validation" if every and seen % every == 0 else "train"
            found.append(Skeleton(line[2:], line[0] == "+", own, kind, actions))
    return found


@dataclass
class Draft:
    """A sentence under construction: values stand between \\x01 and \\x02."""

    text: str
    actions: list[dict]
    skeletons: list[str]
    used: dict[str, list[dict]] = field(default_factory=dict)
    open_ended: bool = False
    clause: bool = False


def canonical(action: str, args: dict) -> dict:
    """The arguments in the schema's order, "action" first."""
    return {"action": action} | {k: args[k] for k in SCHEMA[action] if k in args}


def fill(text: str, rng, pool: str, used: dict) -> tuple[str, list[tuple[int, dict]]]:
    """Fill the slots of one text; the drawn values of one kind never repeat."""
    found: list[tuple[int, dict]] = []

    def one(match: re.Match) -> str:
        name = match.group(1)
        index, _, slot = name.rpartition(".")
        distractor = slot.startswith("x_")
        slot = slot.removeprefix("x_")
        for _ in range(200):
            phrase, args = draw(slot, rng, "seen" if distractor else pool)
            family = {"when": "time", "clock": "time", "qitem": "item"}
            family |= {"openness": "position", "setting": "speed"}
            taken = used.setdefault(family.get(slot, slot), [])
            first = next(iter(args.values()))
            if first not in taken:
                break
        taken.append(first)
        if not distractor:
            found.append((int(index or 1) - 1, args))
        # Typing errors may touch rooms and doors, never a value that must be copied.
        return phrase if slot in ("room", "door") else f"\x01{phrase}\x02"

    return re.sub(r"\{([\w.]+)\}", one, text), found


def realise(skeleton: Skeleton, rng, pool: str = "seen", used=None) -> Draft:
    used = {} if used is None else used
    text, found = fill(skeleton.text, rng, pool, used)
    args: list[dict] = [{} for _ in skeleton.actions]
    for index, values in found:
        args[index] |= values
    actions = []
    for (name, fixed), given in zip(skeleton.actions, args, strict=True):
        for key, value in fixed:
            if value.startswith("@"):
                index, key_there = value[1:].split(".")
                value = args[int(index) - 1][key_there]
            number_like = isinstance(value, str) and value.isdigit()
            given[key] = int(value) if number_like else value
        actions.append(canonical(name, given))
    return Draft(
        text, actions, [skeleton.text], used, skeleton.open_ended, skeleton.clause
    )


def finish(draft: Draft, rng, no_commas: bool = False) -> str:
    """Spoken or written style: capital letter and full stop, or neither."""
    text = draft.text
    starts_with_value = text[0] == "\x01" or draft.skeletons[0][0] == "{"
    text = text.replace("\x01", "").replace("\x02", "")
    text = re.sub(
        r"\b([Aa])\(n\) (\w+)",
        lambda m: m[1] + ("n" if _vowel(m[2]) else "") + " " + m[2],
        text,
    )
    style = rng.random()
    if style < 0.5:
        if not starts_with_value:
            text = text[0].upper() + text[1:]
        return text if text[-1] in "?.!" else text + "."
    text = text.rstrip(".")
    if style < 0.75:
        text = text.rstrip("?")
    if no_commas and style > 0.85:
        text = text.replace(",", "")
    return text


def _vowel(word: str) -> bool:
    if word[0].isdigit():
        return word[0] == "8" or word in ("11", "18")
    return word[0] in "aeiou" and not word.startswith(("one", "uti"))


# --- typing errors --------------------------------------------------------------------

FIXED_TYPOS = {
    "the": "teh",
    "and": "adn",
    "turn": "trun",
    "please": "pleas",
    "lights": "ligths",
    "tomorrow": "tommorow",
    "remind": "remnd",
    "don't": "dont",
    "kitchen": "kichen",
    "temperature": "temprature",
    "message": "mesage",
    "shopping": "shoping",
    "vacuum": "vaccum",
    "with": "wiht",
    "that": "taht",
}
BESIDE = dict(zip("qwrtpsdfghjklzxcvbnm", "wetyoadgfjhlkxzvcnbn", strict=True))


def spoil(word: str, rng) -> str:
    """One slip of the finger inside a word; its first letter stays."""
    if word in FIXED_TYPOS and (len(word) < 4 or rng.random() < 0.5):
        return FIXED_TYPOS[word]
    i = rng.randrange(1, len(word) - 1)
    kinds = [0, 0, 0, 1, 2, 2, 3, 3] if len(word) >= 6 else [0, 0, 1, 2]
    kind = rng.choice(kinds)
    if kind == 0:
        return word[:i] + word[i + 1] + word[i] + word[i + 2 :]
    if kind == 1:
        return word[:i] + word[i] + word[i:]
    if kind == 2:
        return word[:i] + word[i + 1 :]
    return word[:i] + BESIDE.get(word[i], word[i] * 2) + word[i + 1 :]


def add_typos(draft: Draft, rng, known: set[str]) -> None:
    """Spoil one to three words in place (more in a longer sentence)."""
    pieces = re.split(r"(\x01.*?\x02)", draft.text)
    tokens = [
        t
        for piece in pieces
        for t in ([piece] if piece[:1] == "\x01" else re.split(r"([A-Za-z']+)", piece))
    ]
    able = [
        i
        for i, t in enumerate(tokens)
        if (t in FIXED_TYPOS and (len(t) > 3 or rng.random() < 0.25))
        or (re.fullmatch(r"[a-z]{4,}", t) and t not in FIXED_TYPOS)
    ]
    wanted = 1 if len(able) < 3 else 2 if len(able) < 6 else 3
    for i in rng.sample(able, min(wanted, len(able))):
        for _ in range(20):
            new = spoil(tokens[i], rng)
            if new != tokens[i] and new not in known:
                tokens[i] = new
                break
    draft.text = "".join(tokens)


# --- the splits -----------------------------------------------------------------------


class Builder:
    three = 0.25  # the share of three commands among the joined sentences

    def __init__(self) -> None:
        self.rng = random.Random(SEED)
        self.skeletons = read_skeletons()
        self.prompts: set[str] = set()
        self.meta: dict[str, list[str]] = {}
        text = " ".join(s.text for s in self.skeletons) + json.dumps(VALUES)
        self.known = set(re.findall(r"[a-z']+", text.lower()))
        self.known |= {"shit", "cunt", "look", "cold", "loft", "star", "form", "dock"}
        self.turns: dict[str, list[Skeleton]] = {}
        self.lines_of: dict[tuple[str, str, str | None], list[Skeleton]] = {}
        self.lines_sorted = 0

    def pick(self, key: str, candidates: list[Skeleton]) -> Skeleton:
        """Deal the candidates like a shuffled deck, so that each has its turn."""
        if not self.turns.get(key):
            deck = list(candidates)
            self.rng.shuffle(deck)
            self.turns[key] = deck
        return self.turns[key].pop()

    def of(self, kind: str, split: str, action: str | None = None) -> list[Skeleton]:
        if self.lines_sorted != len(self.skeletons):
            self.lines_of, self.lines_sorted = {}, len(self.skeletons)
            for s in self.skeletons:
                for name in {None, *(name for name, _ in s.actions[:1])}:
                    self.lines_of.setdefault((s.kind, s.split, name), []).append(s)
        return self.lines_of.get((kind, split, action), [])

    def frames(self, kind: str, split: str) -> list[Skeleton]:
        return self.of(kind, "test" if split == "test" else "train")

    def wrap(self, draft: Draft, split: str) -> Draft:
        frames = [
            f
            for f in self.frames("wrap", split)
            if not draft.open_ended or f.text.rstrip("?").endswith("{c}")
        ]
        frame = self.pick(f"wrap {split} {draft.open_ended}", frames)
        outer, _ = fill(frame.text.replace("{c}", "\x03"), self.rng, "seen", draft.used)
        draft.text = outer.replace("\x03", draft.text)
        draft.skeletons.append(frame.text)
        return draft

    def single(self, split: str, action: str, pool: str = "seen") -> Draft:
        candidates = self.of("single", split, action)
        if pool == "held_out":
            candidates = [c for c in candidates if TEXT_SLOTS & set(c.slots)]
        skeleton = self.pick(f"single {split} {action} {pool}", candidates)
        draft = realise(skeleton, self.rng, pool)
        wrapped = 0.55 if action != "none" else 0.35
        if skeleton.clause and self.rng.random() < wrapped:
            draft = self.wrap(draft, split)
        return draft

    def clause(self, split: str, action: str, last: bool) -> Draft:
        candidates = [c for c in self.of("single", split, action) if c.clause]
        if not last:
            candidates = [c for c in candidates if not c.open_ended]
        if not candidates and split == "validation":
            return self.clause("train", action, last)
        key = f"clause {split} {action} {last}"
        return realise(self.pick(key, candidates), self.rng)

    def join(self, kind: str, split: str, parts: list[Draft]) -> Draft:
        frame = self.pick(f"{kind} {split}", self.frames(kind, split))
        text = frame.text
        for i, part in enumerate(parts):
            spoken = part.text
            if kind.startswith("avoid") and i == 0:  # "don't play any jazz"
                spoken = re.sub(r"\bsome\b", "any", spoken)
            text = text.replace(f"{{{i + 1}}}", spoken)
        if ". " in text:
            first, _, second = text.partition(". ")
            text = f"{first}. {second[0].upper()}{second[1:]}"
        names = [n for p in parts for n in p.skeletons]
        return Draft(text, [], [*names, frame.text])

    def actions_for(self, split: str, n: int, open_last: bool) -> list[str]:
        """n different actions; one whose clauses end in free text comes last."""
        key = f"mix {split}"
        chosen: list[str] = []
        while len(chosen) < n:
            name = self.pick(key, [a for a in SCHEMA if a != "none"])
            if name not in chosen:
                chosen.append(name)
        ends = [a for a in chosen if a in ("set_reminder", "send_message")]
        rest = [a for a in chosen if a not in ends]
        if len(ends) > 1 or (ends and not open_last):
            return self.actions_for(split, n, open_last)
        return rest + ends

    def multi(self, split: str) -> Draft:
        if self.rng.random() < 0.35:
            skeleton = self.pick(f"multi {split}", self.of("multi", split))
            draft = realise(skeleton, self.rng)
            if skeleton.clause and self.rng.random() < 0.4:
                draft = self.wrap(draft, split)
            return draft
        n = 3 if self.rng.random() < self.three else 2
        names = self.actions_for(split, n, open_last=True)
        parts = [self.clause(split, a, i == n - 1) for i, a in enumerate(names)]
        draft = self.join(f"join{n}", split, parts)
        draft.actions = [a for p in parts for a in p.actions]
        return draft

    def negation(self, split: str) -> Draft:
        kind = self.rng.random()
        if kind < 0.55:
            skeleton = self.pick(f"negation {split}", self.of("negation", split))
            return realise(skeleton, self.rng)
        count = 0 if kind < 0.65 else 2 if kind < 0.75 else 1
        names = self.actions_for(split, count + 1, open_last=False)
        if count == 1 and self.rng.random() < 0.3:
            names = [names[0], names[0]]
        parts = [self.clause(split, a, last=False) for a in names]
        if count == 1 and parts[0].actions == parts[1].actions:
            return self.negation(split)
        frame = {0: "avoid0", 1: "avoid", 2: "avoid2"}[count]
        draft = self.join(frame, split, parts)
        draft.actions = [a for p in parts[1:] for a in p.actions]
        draft.actions = draft.actions or [{"action": "none"}]
        return draft

    def acceptable(self, prompt: str, completion: str) -> bool:
        return len(prompt.split()) <= 25

    def add(self, out: list, make, split: str, name: str, typos: bool = False) -> None:
        """Make one new record; a sentence that exists already is made again."""
        for _ in range(300):
            draft = make()
            if typos:
                add_typos(draft, self.rng, self.known)
            plain = name in ("unseen_phrasing", "unseen_values", "out_of_scope")
            prompt = finish(draft, self.rng, plain and not draft.open_ended)
            key = re.sub(r"[^a-z0-9%: ]", "", prompt.lower())
            answer = draft.actions[0]
            if len(draft.actions) > 1:
                answer = {"actions": draft.actions}
            completion = json.dumps(answer, ensure_ascii=False)
            if key in self.prompts or not self.acceptable(prompt, completion):
                continue
            self.prompts.add(key)
            self.meta[prompt] = draft.skeletons
            out.append({"prompt": prompt, "completion": completion, "slice": name})
            return
        raise RuntimeError(f"no new sentence for {split} {name}")

    def split(self, split: str, sizes: dict[str, int]) -> list[dict]:
        """One split; `sizes` counts the records of each slice."""
        out: list[dict] = []
        actions = [a for a in SCHEMA if a != "none"]
        copied = [a for a in actions if a not in ("set_alarm", "set_oven")]

        def turn(key: str, choices: list[str]) -> str:
            if not self.turns.get(key):
                self.turns[key] = self.rng.sample(choices, len(choices))
            return self.turns[key].pop()

        makers = {
            "unseen_phrasing": lambda: self.single(split, turn("a" + split, actions)),
            "unseen_values": lambda: self.single(
                split, turn("v" + split, copied), "held_out"
            ),
            "multi_action": lambda: self.multi(split),
            "negation": lambda: self.negation(split),
            "typos": lambda: self.single(split, turn("t" + split, actions)),
            "out_of_scope": lambda: self.single(split, "none"),
        }
        for name, size in sizes.items():
            label = name if split == "test" else "seen"
            for _ in range(size):
                self.add(out, makers[name], split, label, typos=name == "typos")
        self.rng.shuffle(out)
        return out


SIZES = {
    "train": {
        "unseen_phrasing": 850,
        "multi_action": 280,
        "negation": 180,
        "typos": 150,
        "out_of_scope": 140,
    },
    "validation": {
        "unseen_phrasing": 85,
        "multi_action": 28,
        "negation": 18,
        "typos": 15,
        "out_of_scope": 14,
    },
    "test": {
        "unseen_phrasing": 80,
        "unseen_values": 80,
        "multi_action": 80,
        "negation": 80,
        "typos": 80,
        "out_of_scope": 80,
    },
}


def few_shot(train: list[dict]) -> list[dict]:
    """Three worked examples for a prompt: a time in words, two actions, none."""

    def first(test) -> dict:
        return next(
            {"prompt": r["prompt"], "completion": r["completion"]}
            for r in train
            if test(r["prompt"], json.loads(r["completion"]))
        )

    return [
        first(
            lambda p, c: (
                c.get("action") == "set_alarm" and "day" in c and " to " in p[6:]
            )
        ),
        first(lambda p, c: len(c.get("actions", [])) == 2 and "no" not in p),
        first(lambda p, c: c.get("action") == "none" and p.endswith("?")),
    ]


def build() -> tuple[dict[str, str], Builder]:
    """Every generated file's text by name, and the builder that made it."""
    builder = Builder()
    files = {}
    for split, sizes in SIZES.items():
        records = builder.split(split, sizes)
        lines = [json.dumps(r, ensure_ascii=False) for r in records]
        files[f"{split}.jsonl"] = "\n".join(lines) + "\n"
        if split == "train":
            shots = json.dumps(few_shot(records), ensure_ascii=False, indent=2)
            files["few_shot.json"] = shots + "\n"
    return files, builder


def main(arguments: list[str], folder: Path = DATA, make=build) -> int:
    files, _ = make()
    different = []
    for name, text in files.items():
        path = folder / name
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
