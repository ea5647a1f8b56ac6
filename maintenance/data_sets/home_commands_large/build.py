"""Build the large training set of the home commands.

    python maintenance/data_sets/home_commands_large/build.py [--check]

It writes train.jsonl; with --check it compares the file with its rebuild.

The task, the schema and the way in which a sentence is filled, wrapped and joined are
those of home_commands/build.py, which this script loads. Here stand what is wider:
the patterns of skeletons.txt, the values of values.json, more spoken forms of times and
numbers, more slips of the finger. What the validation and test splits of home_commands
keep for themselves (patterns, wrappers, joining words, values) is refused by code.
Standard library only; always the same bytes.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import itertools
import json
import re
import sys
from pathlib import Path
from types import ModuleType

FOLDER = Path(__file__).resolve().parent
SMALL = FOLDER.parent / "home_commands"
DATA = FOLDER.parents[2] / "data"
SEED = 20261123
SIZES = {
    "unseen_phrasing": 6000,
    "multi_action": 3100,
    "negation": 2600,
    "typos": 1900,
    "out_of_scope": 1600,
}
MAX_WORDS, MAX_WORDS_OF_THREE = 22, 24  # of a sentence; with three commands
MAX_CHARACTERS = 260  # of a completion


def load_small_builder() -> ModuleType:
    """A copy of home_commands/build.py of our own, whose parts we may replace."""
    name = "home_commands_build_for_large"
    spec = importlib.util.spec_from_file_location(name, SMALL / "build.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module
    before, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    try:  # no __pycache__ among the data
        spec.loader.exec_module(module)
    finally:
        sys.dont_write_bytecode = before
    return module


small = load_small_builder()

# --- values ---------------------------------------------------------------------------

HELD_OUT = sorted(
    {
        form.casefold()
        for pools in small.VALUES.values()
        for value in pools["held_out"]
        for form in value.split("/")
    }
)
_HELD_OUT = re.compile(rf"\b(?:{'|'.join(map(re.escape, HELD_OUT))})\b")


def holds_a_held_out_value(text: str) -> bool:
    return _HELD_OUT.search(text.casefold()) is not None


def read_values() -> dict[str, dict[str, list[str]]]:
    """Each slot's pools: `seen` by hand, `compounds`, and the everyday `common`."""
    values = {}
    wide = json.loads((FOLDER / "values.json").read_text(encoding="utf-8"))
    for slot, pools in small.VALUES.items():
        ours = wide[slot]
        compounds = []
        for parts in ours.get("compounds", []):
            for chosen in itertools.product(*parts):
                forms = [" ".join(c) for c in _forms(chosen)]
                compounds.append("/".join(forms))
        made = {
            "seen": [*pools["seen"], *ours["seen"]],
            "compounds": compounds,
            "common": ours.get("common") or pools["seen"],
        }
        values[slot] = {
            pool: [v for v in dict.fromkeys(given) if not holds_a_held_out_value(v)]
            for pool, given in made.items()
        }
    return values


def _forms(chosen: tuple[str, ...]) -> list[tuple[str, ...]]:
    """("ripe", "apple/apples") -> ("ripe", "apple"), ("ripe", "apples")."""
    *front, last = chosen
    return [(*front, form) for form in last.split("/")]


VALUES = read_values()
# A typing error may stand in these only: an unheard-of room with one cannot be told.
EVERYDAY = {*VALUES["room"]["common"], *VALUES["door"]["common"]}

# --- spoken forms ---------------------------------------------------------------------

small_time_phrase = small.time_phrase
small_duration_phrase = small.duration_phrase
small_percent = small.percent
small_draw = small.draw
small_finish = small.finish
small_spoil = small.spoil
small_add_typos = small.add_typos


def draw_time(rng) -> tuple[int, int]:
    hour = rng.choice([5, 6, 6, 7, 7, 8, 8, 9, 10, 11, 12, *range(13, 24)])
    kind = rng.random()
    if kind < 0.15:
        return hour, 0
    if kind < 0.8:
        return hour, rng.choice([15, 30, 45, *range(5, 60, 5)])
    return hour, rng.randrange(1, 60)


def time_phrase(rng, h: int, m: int, part: bool = True) -> str:
    """The small set's forms, and "7pm", "7.15 pm", "seven oh five am" and the like."""
    if rng.random() < 0.6 or not part or (h, m) in ((12, 0), (0, 0)):
        return small_time_phrase(rng, h, m, part)
    half = "am" if h < 12 else "pm"
    daytime = "in the morning" if h < 12 else "in the afternoon"
    if h >= 17:
        daytime = "in the evening" if h < 21 else "at night"
    hour, following = small.words((h - 1) % 12 + 1), small.words(h % 12 + 1)
    digits = f"{(h - 1) % 12 + 1}"
    forms = [f"{digits}:{m:02d}{half}", f"{digits}.{m:02d} {half}"]
    if m == 0:
        forms = [f"{digits}{half}", f"{digits} {daytime}", f"{hour} {daytime}"]
        forms += [f"{hour} o'clock {daytime}"]
    elif m < 10:
        forms.append(f"{hour} oh {small.words(m)} {half}")
        forms.append(f"{hour} oh {small.words(m)} {daytime}")
    else:
        forms.append(f"{hour} {small.words(m)} {daytime}")
        forms.append(f"{digits}:{m:02d} {daytime}")
    if m in (15, 45):
        near = f"past {hour}" if m == 15 else f"to {following}"
        forms += [f"a quarter {near} {daytime}"] * 2
    elif m == 30:
        forms += [f"half past {hour} {daytime}"] * 2
    elif m in (5, 10, 20, 25):
        forms += [f"{small.words(m)} minutes past {hour} {daytime}"]
        forms += [f"{small.words(m)} past {hour} {daytime}"] * 2
    elif m in (35, 40, 50, 55):
        forms += [f"{small.words(60 - m)} minutes to {following} {daytime}"]
        forms += [f"{small.words(60 - m)} to {following} {daytime}"] * 2
    if m and not 10 <= h <= 12:  # 10:30 alone may mean the evening
        forms.append(f"{h:02d}:{m:02d}")
    if h >= 13 and m >= 10:
        forms.append(f"{small.words(h)} {small.words(m)}")
    return rng.choice(forms)


def duration_phrase(rng, minutes: int) -> str:
    """The small set's forms, and "20 mins", "1 hour 20", "an hour and ten minutes"."""
    if minutes == 1:
        return rng.choice(["a minute", "one minute", "1 minute"])
    if rng.random() < 0.7:
        return small_duration_phrase(rng, minutes)
    hours, rest = divmod(minutes, 60)
    if not hours:
        return f"{minutes} {rng.choice(['mins', 'min', 'minutes'])}"
    many, spoken = "s" if hours > 1 else "", small.words(hours)
    if not rest:
        return rng.choice([f"{hours} hour{many}", f"{spoken} hour{many}", f"{hours} h"])
    tail = " minutes"
    return rng.choice(
        [
            f"{spoken} hour{many} {small.words(rest)}",
            f"{spoken} hour{many} and {rest}{tail}",
            f"{hours} hour{many} and {rest}{tail}",
            f"{hours} hr {rest} min",
            f"{hours} h {rest} min",
            f"{spoken} hour{many} and {small.words(rest)}{tail}",
        ]
    )


def percent(rng, n: int) -> str:
    if rng.random() < 0.1:
        return f"{n} per cent"
    return small_percent(rng, n)


def draw(slot: str, rng, pool: str) -> tuple[str, dict]:
    """As in the small set, from wider pools of values and of numbers."""
    if slot in small.VALUES and slot not in ("countable", "uncountable"):
        pools = VALUES[slot]
        given = pools["common"] if pool == "common" and rng.random() < 0.8 else None
        if given is None:
            compound = pools["compounds"] and rng.random() < 0.5
            given = pools["compounds"] if compound else pools["seen"]
        value = rng.choice(given)
        key = {"person": "to", "message": "text"}.get(slot, slot)
        keep = slot in ("room", "door") and value not in EVERYDAY
        return (f"\x01{value}\x02" if keep else value), {key: value}
    if slot == "qitem" and rng.random() < 0.3:
        singular, plural = rng.choice(small.VALUES["countable"]["seen"]).split("/")
        n = rng.choice([1, 2, 36, *range(2, 51)])
        said = {1: "a single", 36: "three dozen"}.get(n, small.number(rng, n))
        if n == 2 and rng.random() < 0.5:
            said = "a pair of"
        item = singular if n == 1 else plural
        return f"{said} {item}", {"item": item, "quantity": n}
    if slot == "degrees":
        n = rng.randrange(12, 30)
        return small.number(rng, n), {"degrees": n}
    if slot == "by":
        n = rng.choice([2, 3, 4, 5, *range(2, 10)])
        return small.number(rng, n), {"by": n}
    if slot == "oven":
        n = rng.choice([*range(100, 251, 10), *range(50, 251, 5)])
        return small.number(rng, n), {"degrees": n}
    return small_draw(slot, rng, "seen")


def finish(draft, rng, no_commas: bool = False) -> str:
    """Commas may go unsaid where one plain command is given."""
    return small_finish(draft, rng, draft.commas_may_go)


# --- typing errors --------------------------------------------------------------------

ROWS = ("qwertyuiop", "asdfghjkl", "zxcvbnm")
BESIDE = {
    letter: "".join(
        row[j] for row in ROWS for j in (i - 1, i + 1) if row == at and 0 <= j < len(at)
    )
    for at in ROWS
    for i, letter in enumerate(at)
}


def spoil(word: str, rng) -> str:
    """The small set's slips, and a neighbouring key hit instead, or as well."""
    if rng.random() < 0.65:
        return small_spoil(word, rng)
    i = rng.randrange(1, len(word))
    near = rng.choice(BESIDE.get(word[i], "e"))
    return word[:i] + near + word[i + (rng.random() < 0.7) :]


def add_typos(draft, rng, known: set[str]) -> None:
    """The small set's typing errors; now and then a lost space or a late shift key."""
    kind = rng.random()
    if kind > 0.15:
        small_add_typos(draft, rng, known)
    pieces = re.split(r"(\x01.*?\x02)", draft.text)
    if kind < 0.3:
        gap = r"(?<=[a-z]{2}) (?=[a-z]{2,}\b)"
        _once(pieces, gap, lambda m: "", rng)
    elif kind < 0.4:
        _once(pieces, r"\b[a-z]{3,}\b", lambda m: m[0][:2].upper() + m[0][2:], rng)
    elif kind < 0.45:
        _once(pieces, r"\b[a-z]{3,}\b", lambda m: m[0].upper(), rng)
    draft.text = "".join(pieces)


def _once(pieces: list[str], pattern: str, new, rng) -> None:
    """Change one match, drawn from those outside of the protected values."""
    found = [
        (i, match)
        for i, piece in enumerate(pieces)
        if piece[:1] != "\x01"
        for match in re.finditer(pattern, piece)
    ]
    if found:
        i, match = rng.choice(found)
        pieces[i] = pieces[i][: match.start()] + new(match) + pieces[i][match.end() :]


# --- what must stay unseen ------------------------------------------------------------

NUMBER = (
    r"(?:\d+(?::\d+)?|zero|one|two|three|four|five|six|seven|eight|nine|ten|eleven|"
    r"twelve|thirteen|fourteen|fifteen|sixteen|seventeen|eighteen|nineteen|twenty|"
    r"thirty|forty|fifty|sixty|seventy|eighty|ninety|hundred|half|quarters?|noon|"
    r"midnight|dozen|hours?|minutes?|o'clock|am|pm|percent|%)"
)
FILLERS = r"(?:\s+(?:and|past|to|a|an|of))*"
DAY = (
    r"\b(?:on (?:mon|tues|wednes|thurs|fri|satur|sun)day|tomorrow|every day|"
    r"every weekday|in the (?:morning|afternoon|evening)|"
    r"(?:morning|afternoon|evening) (?=at)|at night)\b"
)


def words_only(text: str) -> str:
    return " ".join(re.sub(r"[^\w#']+", " ", text.casefold()).split())


def stripped(prompt: str, completion: str) -> str:
    """A sentence without its values, numbers, times and days."""
    answer = json.loads(completion)
    text = re.sub(DAY, " # ", prompt.casefold())
    values = {
        value.casefold()
        for action in answer.get("actions", [answer])
        for key, value in action.items()
        if isinstance(value, str) and key != "action"
    }
    for value in sorted(values, key=len, reverse=True):
        if value in text:
            text = re.sub(rf"\b{re.escape(value)}\b", " # ", text)
    text = words_only(re.sub(rf"\b{NUMBER}\b|%", " # ", text))
    return words_only(re.sub(rf"#(?:{FILLERS}\s+#)+", "#", text))


def sentence_key(prompt: str) -> str:
    return re.sub(r"[^a-z0-9%: ]", "", prompt.lower())


def anonymous(pattern: str) -> str:
    return words_only(re.sub(r"\{[^}]*\}", " # ", pattern))


class Reserved:
    """The patterns and sentences of the splits that measure."""

    def __init__(self, skeletons: list) -> None:
        own = [s for s in skeletons if s.split in ("test", "validation")]
        self.patterns = {anonymous(s.text) for s in own}
        # A longer test pattern may not even be a part of a training pattern.
        self.parts = [
            f" {anonymous(s.text)} "
            for s in own
            if s.split == "test" and len(anonymous(s.text).replace("#", "").split()) > 2
        ]
        self.sentences, self.stripped = set(), set()
        for split in ("train", "validation", "test"):
            path = DATA / SMALL.name / f"{split}.jsonl"
            for line in path.read_text(encoding="utf-8").splitlines():
                record = json.loads(line)
                self.sentences.add(sentence_key(record["prompt"]))
                if split != "train":
                    self.stripped.add(stripped(record["prompt"], record["completion"]))

    def pattern(self, text: str) -> bool:
        key = anonymous(text)
        return key in self.patterns or any(p in f" {key} " for p in self.parts)


# --- the builder ----------------------------------------------------------------------


def variants(text: str) -> list[str]:
    """All wordings of a pattern: "[cut|kill] it" -> "cut it", "kill it"."""
    pieces = [
        piece[1:-1].split("|") if piece[:1] == "[" else [piece]
        for piece in re.split(r"(\[[^]]*\])", text)
    ]
    made = ("".join(chosen) for chosen in itertools.product(*pieces))
    return [re.sub(r" +(?=[,.?!]|$)", "", re.sub("  +", " ", m)) for m in made]


def use_wide_parts() -> None:
    """Let the loaded builder draw from here; its files and splits stay as they are."""
    small.SEED = SEED
    small.VALUES = {
        slot: pools | {"seen": pools["seen"] + pools["compounds"]}
        if slot.endswith("countable")
        else pools
        for slot, pools in VALUES.items()
    }
    small.PERCENTS = [*range(5, 100, 5), *range(5, 100, 5), *range(1, 100)]
    small.MINUTES = [*small.MINUTES, *range(1, 60)]
    small.HOURS = [*small.HOURS, *range(60, 241, 5)]
    small.draw_time, small.time_phrase = draw_time, time_phrase
    small.duration_phrase, small.percent = duration_phrase, percent
    small.draw, small.finish = draw, finish
    small.spoil, small.add_typos = spoil, add_typos
    small.Draft.commas_may_go = property(
        lambda draft: len(draft.actions) == 1 and not draft.open_ended
    )


use_wide_parts()


class LargeBuilder(small.Builder):
    three = 0.45  # many of these come out too long and are made again

    def __init__(self) -> None:
        super().__init__()
        everything = self.skeletons
        self.reserved = Reserved(everything)
        self.prompts |= self.reserved.sentences
        self.wordings: dict = {}
        self.refused: list[str] = []
        self.skeletons = []
        lines = small.read_skeletons(FOLDER / "skeletons.txt", every=0)
        self.admit([s for s in everything if s.split == "train"] + lines)
        self.known |= set(re.findall(r"[a-z']+", " ".join(s.text for s in lines)))
        self.pool = "seen"

    def admit(self, lines: list) -> None:
        """Take lines into the deck, less the wordings that must stay unseen."""
        for line in lines:
            allowed = []
            for text in variants(line.text):
                leaks = self.reserved.pattern(text) or holds_a_held_out_value(text)
                (self.refused if leaks else allowed).append(text)
            if allowed and line not in self.wordings:
                self.wordings[line] = allowed
                self.skeletons.append(line)

    def pick(self, key: str, candidates: list):
        """Deal the lines like a deck; each time one of its wordings is drawn."""
        line = super().pick(key, candidates)
        if line not in self.wordings:  # a name: what is dealt are actions
            return line
        return dataclasses.replace(line, text=self.rng.choice(self.wordings[line]))

    def single(self, split: str, action: str, pool: str = "seen"):
        more = self.rng.random()  # joins hold few texts, which must come last
        if action != "none" and more < 0.07:
            action = "set_reminder" if more < 0.045 else "send_message"
        return super().single(split, action, self.pool)

    def negation(self, split: str):
        """A quarter are whole commands taken back, with or without another instead."""
        if self.rng.random() > 0.25:
            return super().negation(split)
        count = self.rng.random() < 0.65
        names = self.actions_for(split, 1 + count, open_last=False)
        if count and self.rng.random() < 0.4:
            names = [names[0], names[0]]
        parts = [self.clause(split, name, last=False) for name in names]
        if count and parts[0].actions == parts[1].actions:
            return self.negation(split)
        draft = self.join("withdraw" if count else "withdraw0", split, parts)
        draft.actions = parts[1].actions if count else [{"action": "none"}]
        return draft

    def add(self, out, make, split: str, name: str, typos: bool = False) -> None:
        """Typing errors stand mostly among everyday values, some in long sentences."""
        self.pool = "common" if typos else "seen"
        if typos and self.rng.random() < 0.15:
            longer = self.rng.choice([self.multi, self.negation])
            make = lambda: longer(split)  # noqa: E731
        super().add(out, make, split, name, typos)

    def acceptable(self, prompt: str, completion: str) -> bool:
        three = completion.count('"action":') == 3
        return (
            len(prompt.split()) <= (MAX_WORDS_OF_THREE if three else MAX_WORDS)
            and len(completion) <= MAX_CHARACTERS
            and not holds_a_held_out_value(prompt)
            and stripped(prompt, completion) not in self.reserved.stripped
        )


def build() -> tuple[dict[str, str], LargeBuilder]:
    """Every generated file's text by name, and the builder that made it."""
    builder = LargeBuilder()
    records = builder.split("train", SIZES)
    lines = [json.dumps(record, ensure_ascii=False) for record in records]
    return {"train.jsonl": "\n".join(lines) + "\n"}, builder


if __name__ == "__main__":
    sys.exit(small.main(sys.argv[1:], DATA / FOLDER.name, build))
