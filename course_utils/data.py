"""Load a data set: a bundled one, the reader's own file or folder, or one from a hub.

Whatever its columns are called, a set leaves here as a `datasets.Dataset` with
`prompt` and `completion`, or with `messages`; a record that cannot be used raises
`DataError`, which says where it stands and what to do. Nothing is dropped silently.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import random
import re
from bisect import bisect_left
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from course_utils.data_files import READERS, DataError, Record, describe, read_records
from course_utils.runtime import data_folder
from course_utils.templates import OF_TURNS, UNREAD, first_misplaced_turn

if TYPE_CHECKING:
    import datasets

SPLITS = ("train", "validation", "test")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def load_examples(
    source: str | Path, split: str = "train", *, limit: int | None = None, seed: int = 0
) -> datasets.Dataset:
    """Load one split of a data set, checked and with the course's column names.

    Recognised columns: prompt + completion, texts or lists of turns; messages (role,
    content); conversations (from, value); instruction + output, with or without input;
    text + label. Instruction and input joined by an empty line become the prompt; a
    label's name, or else its number, becomes the completion. A system text beside them
    goes into `messages`; tools, thoughts and images are refused; other columns stay.

    Args:
        source: A bundled set's name; a .jsonl, .json, .csv or .parquet file; a folder
            with train.jsonl, validation.jsonl and test.jsonl, or some of them; or a
            hub id, "org/name" or "org/name:configuration".
        split: "train", "validation", "test", or "all" of them. An own file is split
            80/10/10 by a hash of the prompt: equal prompts stay together, and a record
            never moves when others are added.
        limit: At most this many records, in an order that `seed` gives; without
            `limit` the file's order is kept.

    Raises DataError: the source, the split or a record cannot be used.

    >>> examples = load_examples("general_questions", "test", limit=3)
    >>> sorted(examples.column_names)
    ['answer', 'answers', 'completion', 'prompt']
    """
    if limit is not None and (not isinstance(limit, int) or limit < 1):
        raise ValueError(f"limit must be a positive whole number, not {limit!r}")
    place = _locate(source)
    if place is None:
        return _as_dataset(_normalise(_read_hub(str(source), split, limit, seed)))
    records = _read_split(place, str(source), split)
    if limit is not None:
        records = [records[i] for i in _order(len(records), seed)[:limit]]
    return _as_dataset(records)


def data_hash(source: str | Path) -> str:
    """SHA-256 (64 hex digits) of a file, or of a folder's split files and their names.

    Raises DataError: there is no such set or file, or it is on a hub.
    """
    place = _locate(source)
    if place is None:
        cure = "Record the revision of a hub set instead."
        raise DataError("a hub id", "a set, folder or file", cure, file=source)
    if place.is_file():
        return hashlib.sha256(place.read_bytes()).hexdigest()
    listing = ""
    for name, path in sorted(_split_files(place, str(source)).items()):
        listing += f"{name} {hashlib.sha256(path.read_bytes()).hexdigest()}\n"
    return hashlib.sha256(listing.encode()).hexdigest()


# --- where a set lies ---


def _bundled_sets() -> list[str]:
    root = data_folder()
    folders = {path.parent for path in root.rglob("*.jsonl") if path.stem in SPLITS}
    return sorted(folder.relative_to(root).as_posix() for folder in folders)


def _locate(source: str | Path) -> Path | None:
    """The file or folder that `source` names; None for a hub id."""
    name, bundled = str(source), _bundled_sets()
    if isinstance(source, str) and name.strip("/") in bundled:
        return data_folder() / name.strip("/")
    path = Path(name).expanduser()
    if path.exists():
        return path
    if (parts := name.rpartition("/"))[0] in bundled:
        cure = f"Write load_examples({parts[0]!r}, {parts[2]!r})."
        raise DataError(f"no bundled set named {name!r}", "its name alone", cure)
    folder = path.parent
    files = sorted(f.name for f in folder.glob("*") if f.suffix.lower() in READERS)
    near = [name for name in files if Path(name).stem.lower() == path.name.lower()]
    is_path = isinstance(source, Path) or name.startswith((".", "/", "~"))
    is_file = near or path.suffix.lower() in (*READERS, ".txt", ".tsv", ".xlsx", ".gz")
    in_folder = folder != Path() and folder.is_dir()
    if is_path or is_file or in_folder or "\\" in name or name.count("/") > 1:
        expected = "an existing file (or a hub id, its owner's name being no folder)"
        near = near or difflib.get_close_matches(path.name, files, cutoff=0.5)
        cure = f"In {folder.resolve()} are {', '.join(files[:5]) or 'no data files'}."
        if not folder.is_dir():
            cure = f"There is no folder {folder} either: check the path."
        elif near:
            cure = f"Did you mean {' or '.join(str(folder / name) for name in near)}?"
        raise DataError("no such file", expected, cure, file=path)
    if _HUB_ID.fullmatch(name):
        return None
    cure = "A file needs its ending (my.jsonl), a hub id its owner (org/name)."
    if near := difflib.get_close_matches(name, bundled, cutoff=0.5):
        cure = f"Did you mean {' or '.join(near)}?"
    expected = "one of " + ", ".join(bundled)
    raise DataError(f"no bundled set named {name!r}", expected, cure)


def _split_files(folder: Path, name: str) -> dict[str, Path]:
    """The file of each split in a folder, errors naming it `name`.

    A folder's shared_splits.json lists files of other folders that are its own, too.
    """
    paths = sorted(folder.iterdir())
    shared = folder / "shared_splits.json"
    if shared.is_file():
        listed = json.loads(shared.read_text(encoding="utf-8"))
        paths += [folder / path for path in listed]
    files: dict[str, Path] = {}
    for path in paths:
        if path.stem not in SPLITS or path.suffix.lower() not in READERS:
            continue
        other = files.setdefault(path.stem, path)
        if other is not path:
            fault, cure = f"{other.name} and {path.name}", "Delete or move one of them."
            raise DataError(fault, "one file for each split", cure, file=name)
    if not files:
        fault = "a folder without train, validation or test files"
        cure = "Name one of its files instead, or rename them so."
        raise DataError(fault, "train.jsonl or its like", cure, file=name)
    return {split: files[split] for split in SPLITS if split in files}


def _read_split(place: Path, name: str, split: str) -> list[Record]:
    """A folder's files of a split, or the part of one file that its hashes give."""
    is_folder = place.is_dir()
    files = _split_files(place, name) if is_folder else dict.fromkeys(SPLITS, place)
    if split not in (*files, "all"):
        expected = "one of " + ", ".join(map(repr, (*files, "all")))
        cure = f"Write load_examples({name!r}, {next(iter(files))!r})."
        raise DataError(f"no split {split!r}", expected, cure, file=name)
    if is_folder:
        paths = list(files.values()) if split == "all" else [files[split]]
        return _normalise([record for path in paths for record in read_records(path)])
    records = _normalise(read_records(place))
    part = [r for r in records if split in ("all", _hash_split(r.fields))]
    if not part:
        fault = f"none of its {len(records)} records in the split {split!r}"
        expected = "at least one (a file splits 80/10/10 by a hash of the prompt)"
        cure = "Add records, ask for 'all', or make a folder of train.jsonl and others."
        raise DataError(fault, expected, cure, file=name)
    return part


def _hash_split(fields: dict[str, Any]) -> str:
    prompt = fields.get("prompt") if "completion" in fields else None
    if prompt is None:  # a chat: what the user says first
        turns = fields["messages"]
        prompt = next(turn["content"] for turn in turns if turn["role"] == "user")
    digest = hashlib.sha256(prompt.encode("utf-8")).digest()
    share = int.from_bytes(digest[:8], "big") / 2**64
    return "train" if share < 0.8 else "validation" if share < 0.9 else "test"


def _order(count: int, seed: int) -> list[int]:
    order = list(range(count))
    random.Random(seed).shuffle(order)
    return order


def _read_hub(name: str, split: str, limit: int | None, seed: int) -> list[Record]:
    import datasets

    repository, configuration = _HUB_ID.fullmatch(name).groups()
    try:
        loaded = datasets.load_dataset(repository, configuration, split=split)
    except Exception as error:  # each hub client and version raises its own kinds
        reason = " ".join(str(error).split())[:200]
        fault = f"no data set that loads ({type(error).__name__}: {reason})"
        expected = "a hub id org/name or org/name:configuration, and its split"
        cure = "Check the network, the id and the split; bundled sets need no network: "
        cure += ", ".join(_bundled_sets()) + "."
        raise DataError(fault, expected, cure, file=name) from error
    if limit is not None:
        loaded = loaded.select(_order(len(loaded), seed)[:limit])
    rows = loaded.to_list()
    names = getattr(loaded.features.get("label"), "names", None)
    if names and "label_text" not in loaded.features:
        for row in rows:
            if row["label"] in range(len(names)):
                row["label_text"] = names[row["label"]]
    return [Record(name, line, "row", row) for line, row in enumerate(rows, start=1)]


# --- which columns it has ---


class _Schema(NamedTuple):
    needed: tuple[str, ...]
    read: Callable[[Record], list[dict[str, Any]]]  # checks a record; its turns
    also: tuple[str, ...] = ()  # read, too, where it is there

    def __str__(self) -> str:
        return " + ".join(self.needed)

    def fits(self, record: Record) -> bool:
        return all(_said(record.fields.get(name)) for name in self.needed)


def _normalise(records: list[Record]) -> list[Record]:
    """The same records with `prompt` and `completion`, with `messages`, or with all."""
    if not records:
        raise DataError("no record", "at least one", "Add records.")
    first, normalised = records[0], []
    for record in records:
        whole = [s for s in _SCHEMAS if s.fits(record)]
        named = [s for s in _SCHEMAS if record.fields.keys() >= {*s.needed}]
        if not named:
            raise _not_recognised(record)
        schema = whole[0] if whole else named[-1]  # an empty chat may stand beside it
        if not first.fields.keys() >= {*schema.needed}:
            expected = f"columns as in {first.unit} {first.line}"
            cure = "Put each kind of record into a file of its own."
            raise record.error(None, f"a record with {schema}", expected, cure)
        normalised.append(record._replace(fields=_convert(record, schema)))
    if data_folder() not in Path(first.file).parents:
        read = {name for s in _SCHEMAS for name in (*s.needed, *s.also)} | {*_SYSTEM}
        others = [f"{name!r}" for name in first.fields if name not in read]
        if others:
            print(f"{first.file}: kept, but not learned: {', '.join(others)}")
    return normalised


def _convert(record: Record, schema: _Schema) -> dict[str, Any]:
    """A record's fields, and what is learned of it in the course's columns."""
    turns, fields = schema.read(record), dict(record.fields)
    for name in [name for name in _SYSTEM if name in fields]:
        if not _said(fields[name]):
            fields[name] = None  # blanks are nothing
            continue
        turn = _turn("system", _check_text(record, name, fields[name]))
        if turn not in turns:
            turns.insert(0, turn)
    roles = [turn["role"] for turn in turns]
    wrong = first_misplaced_turn(roles)
    if wrong is not None or roles[-1:] != ["assistant"]:
        place = len(roles) if wrong is None else wrong
        due = "assistant" if roles[:place][-1:] == ["user"] else "user"
        fault = "no" if wrong is None else f"the {roles[wrong]}'s"
        fault += f" turn in place {place + 1}"
        expected = f"the {due}'s there (a system turn may only be the first)"
        cure = "Add it, or join, move or delete turns, or the record."
        raise record.error(schema.needed[0], fault, expected, cure)
    texts, read = [turn["content"] for turn in turns], (*schema.needed, *schema.also)
    others = {n: v for n, v in fields.items() if n not in (*read, *_SYSTEM)}
    _refuse_unread(record, others, texts, "", True)
    is_chat = schema.needed[0] in _CHATS
    if not is_chat or {"prompt", "completion"} <= fields.keys():
        fields |= {"prompt": texts[-2], "completion": texts[-1]}
    return fields | ({"messages": turns} if is_chat or len(turns) > 2 else {})


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
# Learned where what is asked, or all that is learned, repeats them.
_ASKED = re.compile(
    r"prompt|instruction|inputs?|question|query|contexts?|passages?|documents?|article|"
    r"choices|options|system(_prompt|_message|_instruction)?"
)
_TOLD = re.compile(
    r"messages|conversations|completion|output|chosen|response|rationale|"
    r"reasoning(_trace|_details)?|think|thoughts?|cot|complex_cot|chain_of_thought"
)
_WEIGHTS = re.compile(r"(loss_|sample_)?(weight|mask)s?|(do_)?train(ing|able)?|loss")


def _refuse_unread(
    record: Record, fields: dict[str, Any], texts: list[str], place: str, answer: bool
) -> None:
    """An error about a column, or a field of a turn, that would not be learned.

    `texts` are learned; `place` is a turn's, `answer` whether all in it is learned.
    """
    usual = (answer, f"{answer:d}", f"{answer:.1f}")  # weights; 1 and 1.0 are True
    for column, value in fields.items():
        name, said = re.sub(r"[\s-]", "_", column.strip().lower()), _said(value)
        is_unread = UNREAD.fullmatch(name) or re.search("(weight|mask)s?$", name)
        if _ASKED.fullmatch(name) or _TOLD.fullmatch(name):
            learned = texts if _TOLD.fullmatch(name) else texts[:-1]
            said = [t for t in said if not any(str(t) in text for text in learned)]
        elif name == "label":
            said = str(value).lower() in ("true", "false")  # a verdict, no class
        elif (place and OF_TURNS.fullmatch(name)) or not (place or is_unread):
            continue
        if said and not (_WEIGHTS.fullmatch(name) and value in usual):
            fault = describe(value), "nothing there, for it would not be learned"
            cure = "Only prompts and answers are learned, each once and whole: write "
            cure += f"it into one of them, or delete {column!r} or the record."
            raise record.error(place + column, *fault, cure)


def _said(value: Any) -> list[Any]:
    """The texts and numbers in a value, but for blanks, nulls and names of roles."""
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k not in ("role", "from")]
    if isinstance(value, list):
        return [text for inner in value for text in _said(inner)]
    value = value.strip() if isinstance(value, str) else value
    return [] if value in (None, "", "[]", "{}", "null") or value != value else [value]


_ANSWERED = "response answer answers completion output targets"
_OTHER_NAMES = {
    "prompt": "question query instruction inputs input",
    "completion": f"{_ANSWERED} chosen",
    "instruction": "question query prompt inputs input",
    "output": _ANSWERED,
    "input": "context passage document",
    "text": "sentence",
}


def _not_recognised(record: Record) -> DataError:
    """An error about a record that lacks columns: what to rename, what to add."""
    fields = record.fields
    schema = max(_SCHEMAS, key=lambda s: len(_find_columns(s, fields)))
    found = _find_columns(schema, fields)
    lacking = [name for name in schema.needed if name not in found]
    steps = [f"rename {old!r} to {new!r}" for new, old in found.items() if old != new]
    steps += [f"add {name!r}" for name in lacking]
    if not found or lacking == ["label"]:
        steps = ["rename what is asked to 'prompt', what is answered to 'completion'"]
        steps += ['or write {"messages": [{"role": "user", "content": "..."}, ...]}']
    names = ", ".join(map(repr, fields))
    fault = f"the fields {names}" if names else "no fields"
    expected, cure = "one of " + ", ".join(map(str, _SCHEMAS)), ", ".join(steps)
    return record.error(None, fault, expected, f"{cure[0].upper()}{cure[1:]}.")


def _find_columns(schema: _Schema, fields: dict[str, Any]) -> dict[str, str]:
    """A record's columns by the names that they have, or should have, in a schema."""
    found = {}
    kinds = list if isinstance(fields.get("prompt"), list) else (str, int, float)
    for name in (*schema.needed, *schema.also):
        others = [n for n in fields if n not in (*found.values(), "rejected")]
        alike = {n.strip().lower(): n for n in others}
        near = difflib.get_close_matches(name, alike, n=1, cutoff=0.7)
        near += _OTHER_NAMES.get(name, "").split()
        columns = [alike[n] for n in near if n in alike]
        columns = [n for n in columns if isinstance(fields[n], kinds)]
        if name in _CHATS:
            columns = [n for n in others if _chat_column(fields[n]) == name]
        if name in fields or columns:
            found[name] = name if name in fields else columns[0]
    return found


def _chat_column(turns: Any) -> str | None:
    """The column in which turns of this form belong, if they are turns."""
    turn = turns[0] if isinstance(turns, list) and turns else None
    keys = turn.keys() if isinstance(turn, dict) else ()
    return next((c for c, (*pair, _) in _CHATS.items() if {*pair} <= {*keys}), None)


# --- from a record to turns ---


def _check_text(record: Record, column: str, value: Any) -> str:
    """A usable text, a list of its parts joined, or else an error about `column`."""
    cure = "Write one, or delete the record."
    if isinstance(value, list):
        cure = "Write one, or parts of the type 'text' alone, or delete the record."
        parts = [part if isinstance(part, dict) else {} for part in value]
        texts = [part.get("text") for part in parts if part.get("type") == "text"]
        if len(texts) == len(value) and all(isinstance(text, str) for text in texts):
            value = "".join(texts)
    if not isinstance(value, str):
        if isinstance(value, int | float):
            cure = "Put it in double quotes."
        elif hasattr(value, "isoformat"):  # `datasets` makes dates of a hub's texts
            cure = "Write it as a text; from a hub, load the downloaded file."
        raise record.error(column, describe(value), "a text", cure)
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        fault = f"half of a surrogate pair (\\u{ord(value[error.start]):04x})"
        cure = "Write the character itself, or both halves of its escape."
        raise record.error(column, fault, "whole characters", cure) from None
    if not value.strip() and column != "input":
        is_answer = column in ("completion", "output")
        expected = "a text with something " + ("to learn" if is_answer else "in it")
        raise record.error(column, describe(value), expected, cure)
    return value


def _from_pair(record: Record) -> list[dict[str, Any]]:
    turns = []
    for name, role in (("prompt", "user"), ("completion", "assistant")):
        value = record.fields[name]
        if _chat_column(value):
            turns += _read_turns(record, name)
        else:
            turns.append(_turn(role, _check_text(record, name, value)))
    return turns


def _from_alpaca(record: Record) -> list[dict[str, Any]]:
    fields = record.fields
    if fields.get("input") is None:
        fields["input"] = ""
    names = ("instruction", "input", "output")
    instruction, context, answer = (_check_text(record, n, fields[n]) for n in names)
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return [_turn("user", prompt), _turn("assistant", answer)]


def _from_classification(record: Record) -> list[dict[str, Any]]:
    text = _check_text(record, "text", record.fields["text"])
    label = record.fields["label"]
    is_number = isinstance(label, int) and not isinstance(label, bool)
    if not isinstance(label, str) and not (is_number and label >= 0):
        cure = "This split has no labels: use another." if is_number else "Write one."
        expected = "a whole number from 0 or a name"
        raise record.error("label", describe(label), expected, cure)
    name = record.fields.get("label_text")
    answer = _check_text(record, "label", str(label) if name is None else name)
    return [_turn("user", text), _turn("assistant", answer)]


_ROLES = {role: role for role in ("system", "user", "assistant")}
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"} | _ROLES
_CHATS = {  # by column: a turn's fields, and its roles' names
    "messages": ("role", "content", _ROLES),
    "conversations": ("from", "value", _SHAREGPT_ROLES),
}
_ROLE_HINTS = _SHAREGPT_ROLES | dict.fromkeys(("bot", "ai", "model"), "assistant")


def _read_turns(record: Record, column: str) -> list[dict[str, Any]]:
    """The checked turns of a column, but for their order."""
    turns = record.fields[column]
    kind = column if column in _CHATS else _chat_column(turns)
    role_key, text_key, roles = _CHATS[kind]
    form = f'[{{"{role_key}": "...", "{text_key}": "..."}}, ...]'
    if not isinstance(turns, list):
        cure = f"Write {form}; a CSV holds no lists: use .jsonl."
        raise record.error(column, describe(turns), "a list of turns", cure)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            fault = f"turn {number}, {describe(turn)}"
            expected = f"an object with {role_key!r} and {text_key!r}"
            cure = f"Rename or add the fields, as in {form}."
            if (other := _chat_column(turns)) not in (None, kind):
                cure = f"Rename {column!r} to {other!r}."
            raise record.error(column, fault, expected, cure)
        name = turn[role_key]
        if not isinstance(name, str) or name not in roles:
            hint = _ROLE_HINTS.get(str(name).strip().lower())
            cure = "Rename the role, or delete the turn."
            cure = f"Write {hint!r} instead." if hint else cure
            fault, expected = f"the role {name!r} in turn {number}", ", ".join(roles)
            raise record.error(column, fault, f"one of {expected}", cure)
        place = f"{column}[{number}]."
        if roles[name] == "system" and not _said(turn[text_key]):
            continue
        others = {k: v for k, v in turn.items() if k not in (role_key, text_key)}
        _refuse_unread(record, others, [], place, roles[name] == "assistant")
        text = _check_text(record, place + text_key, turn[text_key])
        messages.append(_turn(roles[name], text))
    return messages


_SCHEMAS = (  # of several that a record has, the first is read
    *(_Schema((name,), partial(_read_turns, column=name)) for name in _CHATS),
    _Schema(("prompt", "completion"), _from_pair),
    _Schema(("instruction", "output"), _from_alpaca, also=("input",)),
    _Schema(("text", "label"), _from_classification),
)


# --- from records to columns ---


def _as_dataset(records: list[Record]) -> datasets.Dataset:
    """Columns from records; a field that a record lacks becomes None."""
    import datasets
    import pyarrow

    table = dict.fromkeys(name for record in records for name in record.fields)
    for name in table:
        values = [record.fields.get(name) for record in records]
        table[name] = _as_array(values)
        if table[name] is None:
            raise _mixed_column(name, values, records)
    return datasets.Dataset(pyarrow.table(table))


def _as_array(values: list[Any]) -> Any:
    """The values as a `pyarrow.Array`, or None where they are of several kinds."""
    import pyarrow

    try:
        return pyarrow.array(values)
    except OverflowError:  # whole numbers beyond 64 bits become texts
        return _as_array(json.loads(json.dumps(values, default=str), parse_int=str))
    except (pyarrow.ArrowException, UnicodeError):
        return None


def _mixed_column(name: str, values: list[Any], records: list[Record]) -> DataError:
    """The first record whose value does not go with those before it."""
    counts = range(1, len(values) + 1)
    i = bisect_left(counts, True, key=lambda n: _as_array(values[:n]) is None)
    if isinstance(values[i], str) and values[i].strip():
        _check_text(records[i], name, values[i])  # half of a character
    is_mixed = _as_array(values[i : i + 1]) is None
    fault = "made of several kinds" if is_mixed else "unlike the values before it"
    fault = f"{describe(values[i])}, {fault}"
    cure = "Write all its values the same way, for example all as texts."
    return records[i].error(name, fault, "values of one kind in a column", cure)
