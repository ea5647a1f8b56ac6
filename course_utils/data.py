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
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from course_utils.data_files import READERS, DataError, Record, describe, read_records
from course_utils.runtime import data_folder
from course_utils.templates import first_misplaced_turn

if TYPE_CHECKING:
    import datasets

__all__ = ["SPLITS", "DataError", "data_hash", "load_examples"]

SPLITS = ("train", "validation", "test")
_HUB_ID = re.compile(r"([\w.-]+/[\w.-]+)(?::([\w.-]+))?")


def load_examples(
    source: str | Path,
    split: str = "train",
    *,
    limit: int | None = None,
    seed: int = 0,
) -> datasets.Dataset:
    """Load one split of a data set, checked and with the course's column names.

    Recognised columns: prompt + completion, texts or lists of turns; messages (role,
    content); conversations (from, value); instruction + output, with or without input;
    text + label. Instruction and input joined by an empty line become the prompt; a
    label's name, or else its number, becomes the completion. Beside any of them, a
    system text and a `history` of [asked, answered] pairs go into `messages`; tools,
    thoughts, images and their like are refused. All original columns are kept.

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
    folder = path.parent
    names = sorted(entry.name for entry in folder.iterdir()) if folder.is_dir() else []
    files = [file for file in names if Path(file).suffix.lower() in READERS]
    twins = [f for f in files if Path(f).stem.lower() == path.name.lower()]
    is_path = isinstance(source, Path) or name.startswith((".", "/", "~"))
    is_file = path.suffix.lower() in (*READERS, ".txt", ".tsv", ".xlsx", ".gz")
    is_near = twins or (folder.is_dir() and folder != Path())
    if is_path or is_file or is_near or "\\" in name or name.count("/") > 1:
        listing = ", ".join(files[:5]) or "none"
        cure = f"The data files in {folder.resolve()}: {listing}."
        cure = _did_you_mean(path.name, names) or cure
        if twins:
            cure = f"Did you mean {' or '.join(str(folder / twin) for twin in twins)}?"
        elif not folder.is_dir():
            cure = f"There is no folder {folder} either: check the path."
        elif _HUB_ID.fullmatch(name):
            cure += f" For a set on a hub, start where there is no folder {folder}."
        raise DataError("no such file", "an existing file", cure, file=path)
    if _HUB_ID.fullmatch(name):
        return None
    cure = _did_you_mean(name, bundled)
    cure = cure or "A file needs its ending (my.jsonl), a hub id its owner (org/name)."
    expected = "one of " + ", ".join(bundled)
    raise DataError(f"no bundled set named {name!r}", expected, cure)


def _did_you_mean(name: str, names: Iterable[str]) -> str:
    near = difflib.get_close_matches(name, list(names), n=3, cutoff=0.5)
    return f"Did you mean {' or '.join(near)}?" if near else ""


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


# --- which columns it has: the first record decides, all others must follow ---


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
    known = [s for s in _SCHEMAS if s.fits(first)]
    known += [s for s in _SCHEMAS if first.fields.keys() >= {*s.needed}]
    for record in records:
        if not known or not record.fields.keys() >= {*known[0].needed}:
            raise _not_recognised(record, known[:1] or _SCHEMAS, first)
        chats = [s for s in _SCHEMAS if s.needed[0] in _CHATS and s.fits(record)]
        fields = _convert(record, *(chats or known)[:1])
        normalised.append(record._replace(fields=fields))
    return normalised


def _convert(record: Record, schema: _Schema) -> dict[str, Any]:
    """A record's fields, and what is learned of it in the course's columns."""
    own, fields, turns = schema.read(record), dict(record.fields), []
    for name in [name for name in fields if name in (*_SYSTEM, "history")]:
        if not _said(fields[name]):
            fields[name] = None  # blanks are nothing
        elif name != "history":
            turns.append(_turn("system", _check_text(record, name, fields[name])))
    history = [] if fields.get("history") is None else fields["history"]
    pairs = history if isinstance(history, list) else [None]
    if all(isinstance(pair, list) and len(pair) == 2 for pair in pairs):
        history = [_turn(*t) for pair in pairs for t in zip(_TWO, pair, strict=True)]
    history = _read_turns(record, "history", history)
    lead = [turn for turn in own[:1] if turn["role"] == "system"]
    rest = own[len(lead) :]
    turns += [turn for turn in lead if turn not in turns]
    turns += rest if rest[: len(history)] == history else history + rest
    if fault := _fault_of_order([turn["role"] for turn in turns]):
        raise record.error(schema.needed[0], *fault)
    texts, read = [turn["content"] for turn in turns], (*schema.needed, *schema.also)
    others = {name: value for name, value in fields.items() if name not in read}
    _refuse_unread(record, others, texts, "", True)
    is_chat = schema.needed[0] in _CHATS
    if not is_chat or {"prompt", "completion"} <= fields.keys():
        fields = fields | {"prompt": texts[-2], "completion": texts[-1]}
    return fields | ({"messages": turns} if is_chat or len(turns) > 2 else {})


_TWO = ("user", "assistant")


def _turn(role: str, text: str) -> dict[str, Any]:
    return {"role": role, "content": text}


# --- what would not be learned is refused ---

_SYSTEM = ("system", "system_prompt", "system_message", "system_instruction")
_WHOLE = "Each answer is learned once, and whole: delete {!r}, or the record."
_RIGHT = "All answers are learned as right ones: keep those, and delete {!r}."
_BESIDE = "Put it into a text that is learned from, or delete {!r}."
_CURES = {  # by columns and fields of turns; after a dot, of turns alone
    "weight loss_weight loss_mask mask .loss .train .training .train_detail": _WHOLE,
    "rejected kto_tag": _RIGHT,
    "prompt completion instruction input output messages conversations chosen response "
    "question query inputs context passage document documents": _BESIDE,
    "reasoning reasoning_content reasoning_trace reasoning_details thinking think "
    "thought thoughts cot complex_cot chain_of_thought rationale": (
        "Put it before the answer, in <think> and </think>, or delete {!r}."
    ),
    "tools functions tool_calls function_call function_calls tool_call_id image images "
    "video videos audio audios chat_template_kwargs .name .refusal .prefix": (
        "Only the texts are learned: delete {!r}, or the record."
    ),
}
_UNREAD = {name: cure for names, cure in _CURES.items() for name in names.split()}


def _refuse_unread(
    record: Record, fields: dict[str, Any], texts: list[str], place: str, taught: bool
) -> None:
    """An error about a column or a turn's field that says what would not be learned."""
    for column, value in fields.items():
        name = re.sub(r"[\s-]", "_", column.strip().lower())
        cure = _UNREAD.get(name) or (place and _UNREAD.get("." + name))
        if name in (*_SYSTEM, "history", "input") and name != column:
            cure = f"Rename {{!r}} to {name!r}."
        elif name == "context" and record.fields.get("input") == "":
            cure = "Rename {!r} to 'input'."
        elif name == "label" and str(value) in ("True", "False"):
            cure = None if "text" in fields else _RIGHT
        usual = (taught, f"{taught:d}", f"{taught:.1f}") if cure is _WHOLE else ()
        said = _said(value) if cure and value not in usual else []
        if cure is _BESIDE:
            said = [t for t in said if not any(str(t) in text for text in texts)]
        asked = "\n\n".join(texts[:-1]).split("\n\n") if name == "prompt" else []
        is_rendering = asked and all(part in str(value) for part in asked)
        if said and not is_rendering:
            fault = describe(value), "nothing there, for it would not be learned"
            raise record.error(place + column, *fault, cure.format(column))


def _said(value: Any) -> list[Any]:
    """The texts and numbers in a value, but for blanks, nulls and names of roles."""
    if isinstance(value, dict):
        value = [v for k, v in value.items() if k not in ("role", "from")]
    if isinstance(value, list):
        return [text for inner in value for text in _said(inner)]
    value = value.strip() if isinstance(value, str) else value
    return [] if value in (None, "", "[]", "{}", "null") or value != value else [value]


_ASKED = ("prompt", "question", "query", "instruction", "inputs", "input")
_ANSWERED = ("completion", "response", "answer", "answers", "output", "targets")
_ALSO_CALLED = {"prompt": _ASKED, "instruction": _ASKED[:3], "text": ("sentence",)}
_ALSO_CALLED |= {"completion": (*_ANSWERED, "chosen"), "output": _ANSWERED}
_ALSO_CALLED |= {"input": ("context", "passage", "document")}


def _not_recognised(
    record: Record, schemas: Sequence[_Schema], first: Record
) -> DataError:
    """An error about a record without the columns that any of `schemas` needs."""
    other = next((other for other in _SCHEMAS if other.fits(record)), None)
    if other:
        expected = f"{schemas[0]}, as in {first.unit} {first.line}"
        cure = "Put each kind of record into a file of its own."
        return record.error(None, f"a record with {other}", expected, cure)
    fields, plans = record.fields, []
    both_lists = _chat_column(fields.get("prompt")) is not None
    for schema in schemas:
        kinds = list if both_lists or schema.needed[0] in _CHATS else (str, int, float)
        alike = {n.strip().lower(): n for n in fields if n not in schema.needed}
        renames = {}
        for name in (*schema.needed, *schema.also):
            near = [name, *_ALSO_CALLED.get(name, ())]
            near += difflib.get_close_matches(name, alike, n=1, cutoff=0.7)
            near = [alike[n] for n in near if n in alike]
            if name in _CHATS:
                near = [n for n in fields if _chat_column(fields[n]) == name]
            near = [n for n in near if isinstance(fields[n], kinds) and n != "rejected"]
            if near and name not in fields:
                renames[name] = near[0]
        lacking = [name for name in schema.needed if name not in fields | renames]
        rank = lacking == [*schema.needed], len(lacking), "input" not in renames
        plans.append((rank, len(renames), len(plans), lacking, renames, schema))
    *_, lacking, renames, schema = min(plans)
    steps = [f"rename {old!r} to {new!r}" for new, old in renames.items()]
    steps += [f"add {name!r}" for name in lacking]
    names = ", ".join(map(repr, fields))
    column = next(name for name in schema.needed if name not in fields)
    fault = f"no field {column!r}, only {names}"
    if lacking in ([*schema.needed], ["label"]):
        column, fault = None, f"the fields {names}" if names else "no fields"
        steps = ["rename what is asked to 'prompt', what is answered to 'completion'"]
        steps += ['or write {"messages": [{"role": "user", "content": "..."}, ...]}']
    cure = ", ".join(steps)
    expected = "one of " + ", ".join(map(str, schemas))
    return record.error(column, fault, expected, f"{cure[0].upper()}{cure[1:]}.")


def _chat_column(turns: Any) -> str | None:
    """The column in which turns of this form belong, if they are turns."""
    turn = turns[0] if isinstance(turns, list) and turns else None
    keys = turn.keys() if isinstance(turn, dict) else ()
    return next((c for c, (*pair, _) in _CHATS.items() if {*pair} <= {*keys}), None)


# --- from a record to turns ---


def _check_text(record: Record, column: str, value: Any) -> str:
    """`value` if it is a usable text, or else an error about `column`."""
    cure = "Write one, or delete the record."
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
            turns.append(_turn(role, _joined(record, name, value)))
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


def _read_turns(record: Record, column: str, turns: Any = None) -> list[dict[str, Any]]:
    """The checked turns of a column, or of `turns` in its place."""
    turns = record.fields[column] if turns is None else turns
    role_key, text_key, roles = _CHATS.get(column, _CHATS["messages"])
    form = f'[{{"{role_key}": "...", "{text_key}": "..."}}, ...]'
    form = '[["asked", "answered"], ...]' if column == "history" else form
    if not isinstance(turns, list):
        is_csv = record.file.lower().endswith(".csv")
        cure = "A CSV holds no lists: use .jsonl." if is_csv else f"Write {form}."
        raise record.error(column, describe(turns), "a list of turns", cure)
    messages = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            fault = f"turn {number}, {describe(turn)}"
            expected = f"an object with {role_key!r} and {text_key!r}"
            cure = f"Rename or add the fields, as in {form}."
            other = _chat_column(turns)
            if column in _CHATS and other not in (None, column):
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
        _refuse_unread(record, turn, [], place, roles[name] == "assistant")
        text = _joined(record, place + text_key, turn[text_key])
        messages.append(_turn(roles[name], text))
    return messages


def _joined(record: Record, column: str, value: Any) -> str:
    """A checked text; of a list of parts, the text that they make together."""
    parts = value if isinstance(value, list) else []
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        if kind != "text" or not isinstance(part.get("text"), str):
            cure = "Only texts are learned: write a text, or delete the record."
            fault = f"a list with a part of type {kind!r}"
            raise record.error(column, fault, "a text, or parts of type 'text'", cure)
    value = "".join(part["text"] for part in parts) if parts else value
    return _check_text(record, column, value)


def _fault_of_order(roles: list[str]) -> tuple[str, str, str] | None:
    """What is wrong with the order of the turns, what is expected, and the cure."""
    wrong = first_misplaced_turn(roles)
    if not roles:
        return "a list without a turn", "at least two turns", "Delete the record."
    if wrong is None and "assistant" not in roles:
        return "no assistant turn", "at least one, to learn from", "Add the answer."
    if wrong is None and roles[-1] == "user":
        fault = f"the user's turn last (turn {len(roles)})"
        return fault, "an assistant turn last", "Add the answer, or delete that turn."
    if wrong is None:
        return None
    number, role = wrong + 1, roles[wrong]
    if role == "system":
        cure = "Move it to the beginning, or delete it."
        return f"a system turn in place {number}", "the system turn first", cure
    due = "user" if role == "assistant" else "assistant"
    fault = f"two {role} turns in a row (turns {wrong} and {number})"
    cure = "Join the two turns, or add the one between them."
    if wrong == 0 or roles[wrong - 1] == "system":
        fault = f"the {role}'s turn first"
        cure = "Put the user's turn before it, or delete it."
    return fault, f"user and assistant in turn, so {due} in turn {number}", cure


_SCHEMAS = (
    _Schema(("prompt", "completion"), _from_pair),
    *(_Schema((name,), partial(_read_turns, column=name)) for name in _CHATS),
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
    """The values as a `pyarrow.Array`, or None where they are of several kinds.

    Whole numbers beyond 64 bits become texts.
    """
    import pyarrow

    try:
        return pyarrow.array(values)
    except OverflowError:
        whole = json.loads(json.dumps(values, default=str), parse_int=str)
        return _as_array(whole)
    except (pyarrow.ArrowException, UnicodeError):
        return None


def _mixed_column(name: str, values: list[Any], records: list[Record]) -> DataError:
    """The first record whose value does not go with those before it."""
    counts = range(1, len(values) + 1)
    i = bisect_left(counts, True, key=lambda n: _as_array(values[:n]) is None)
    fault = f"{describe(values[i])}, unlike the values before it"
    if _as_array(values[i : i + 1]) is None:
        fault = f"{describe(values[i])} made of several kinds"
        if isinstance(values[i], str):
            _check_text(records[i], name, values[i])  # half of a character
    cure = "Write all its values the same way, for example all as texts."
    return records[i].error(name, fault, "values of one kind in a column", cure)
