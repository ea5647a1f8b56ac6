"""Recognise the columns of a data set, check every record, rename to the course's.

The set's first record decides the schema, and all others must follow it.
"""

from __future__ import annotations

import difflib
from typing import Any

from course_utils.data_errors import DataError, Record, describe

# What each schema needs, in the order in which they are tried.
SCHEMAS: dict[str, tuple[str, ...]] = {
    "prompt and completion": ("prompt", "completion"),
    "chat": ("messages",),
    "conversations": ("conversations",),
    "alpaca": ("instruction", "output"),
    "classification": ("text", "label"),
}
EXPECTED = (
    "prompt + completion, messages, conversations, instruction + output "
    "(+ input), or text + label"
)
ROLES = ("system", "user", "assistant")
_SHAREGPT_ROLES = {"system": "system", "human": "user", "gpt": "assistant"}
_ROLE_HINTS = {
    "human": "user",
    "question": "user",
    "bot": "assistant",
    "gpt": "assistant",
    "ai": "assistant",
    "model": "assistant",
    "developer": "system",
}


def normalise(records: list[Record]) -> list[Record]:
    """The same records with `prompt` and `completion`, or with `messages`.

    Raises:
        DataError: A record does not follow the schema, or a field cannot be used.
    """
    if not records:
        raise DataError("no record", expected="at least one", cure="Add records.")
    schema = _recognise(records[0])
    convert = _CONVERTERS[schema]
    if schema == "classification":
        records = _number_labels(records)
    normalised = []
    for record in records:
        _check_fields(record, schema, records[0])
        normalised.append(record._replace(fields=convert(record)))
    return normalised


def _matches(fields: dict[str, Any], schema: str) -> bool:
    return all(fields.get(name) is not None for name in SCHEMAS[schema])


def _recognise(record: Record) -> str:
    for schema in SCHEMAS:
        if _matches(record.fields, schema):
            return schema
    for schema, needed in SCHEMAS.items():  # half there: say what is missing
        if any(name in record.fields for name in needed):
            return schema
    names = list(record.fields)
    wanted = {name for needed in SCHEMAS.values() for name in needed}
    hints = []
    for name in names:
        near = difflib.get_close_matches(name.strip().lower(), wanted, n=1, cutoff=0.8)
        hints += [f"{name!r} to {near[0]!r}"] if near else []
    raise record.error(
        None,
        "the fields " + ", ".join(map(repr, names)) if names else "no fields",
        EXPECTED,
        f"Rename {', '.join(hints)}."
        if hints
        else "Rename the fields to one of these.",
    )


def _check_fields(record: Record, schema: str, first: Record) -> None:
    for name in SCHEMAS[schema]:
        if name in record.fields:
            continue
        other = next((s for s in SCHEMAS if _matches(record.fields, s)), None)
        if other and record is not first:
            raise record.error(
                None,
                f"a record of the kind {other} ({' + '.join(SCHEMAS[other])})",
                f"the kind {schema} ({' + '.join(SCHEMAS[schema])}), "
                f"as in {first.unit} {first.line}",
                "Put each kind of record into a file of its own.",
            )
        names = list(record.fields)
        near = difflib.get_close_matches(name, names, n=1, cutoff=0.6)
        raise record.error(
            name,
            f"no field {name!r}, only {', '.join(map(repr, names)) or 'no fields'}",
            f"a field {name!r}",
            f"Rename {near[0]!r} to {name!r}." if near else f"Add {name!r}.",
        )


def _check_text(record: Record, column: str, value: Any, *, blank: bool = False):
    """`value` if it is a usable text, or else an error about `column`."""
    if not isinstance(value, str):
        raise record.error(
            column,
            describe(value),
            "a text",
            "Put double quotes around it."
            if isinstance(value, int | float)
            else "Write a text, or delete the record.",
        )
    try:
        value.encode("utf-8")
    except UnicodeEncodeError as error:
        raise record.error(
            column,
            f"half of a surrogate pair (\\u{ord(value[error.start]):04x})",
            "a text of whole characters",
            "Write the character itself, or both halves of its escape.",
        ) from None
    if not blank and not value.strip():
        raise record.error(
            column,
            describe(value),
            "a text with something to learn"
            if column in ("completion", "output")
            else "a text with something in it",
            "Write one, or delete the record.",
        )
    return value


def _from_pair(record: Record) -> dict[str, Any]:
    for name in ("prompt", "completion"):
        _check_text(record, name, record.fields[name])
    return record.fields


def _from_alpaca(record: Record) -> dict[str, Any]:
    fields = dict(record.fields)
    if fields.get("input") is None:
        fields["input"] = ""
    instruction = _check_text(record, "instruction", fields["instruction"])
    context = _check_text(record, "input", fields["input"], blank=True)
    completion = _check_text(record, "output", fields["output"])
    prompt = f"{instruction}\n\n{context}" if context.strip() else instruction
    return {**fields, "prompt": prompt, "completion": completion}


def _from_classification(record: Record) -> dict[str, Any]:
    text = _check_text(record, "text", record.fields["text"])
    label = record.fields["label"]
    if isinstance(label, bool) or not isinstance(label, int | str):
        raise record.error(
            "label",
            describe(label),
            "a whole number from 0, or a name",
            "Write the class as its number or its name.",
        )
    if isinstance(label, int) and label < 0:
        raise record.error(
            "label",
            describe(label),
            "a whole number from 0, or a name",
            "A negative label means that this split has no labels: use another.",
        )
    name = record.fields.get("label_text")
    completion = _check_text(record, "label", str(label) if name is None else name)
    return {**record.fields, "prompt": text, "completion": completion}


def _number_labels(records: list[Record]) -> list[Record]:
    """A CSV file holds only texts: labels that are all numbers become numbers.

    Codes with leading zeros stay texts: "0111" and "111" are two classes.
    """
    labels = [record.fields.get("label") for record in records]
    digits = all(
        isinstance(label, str) and label.isdecimal() and str(int(label)) == label
        for label in labels
    )
    if not digits or not records[0].file.lower().endswith(".csv"):
        return records
    return [
        record._replace(fields={**record.fields, "label": int(record.fields["label"])})
        for record in records
    ]


def _from_messages(record: Record) -> dict[str, Any]:
    messages = record.fields["messages"]
    _check_turns(record, "messages", messages, "role", "content")
    return record.fields


def _from_conversations(record: Record) -> dict[str, Any]:
    turns = record.fields["conversations"]
    _check_turns(record, "conversations", turns, "from", "value")
    messages = [
        {"role": _SHAREGPT_ROLES[turn["from"]], "content": turn["value"]}
        for turn in turns
    ]
    return {**record.fields, "messages": messages}


def _check_turns(
    record: Record, column: str, turns: Any, role_key: str, text_key: str
) -> None:
    """Roles known, system first if at all, then user and assistant in turn."""

    def fail(found: str, expected: str, cure: str) -> DataError:
        return record.error(column, found, expected, cure)

    known = {role: role for role in ROLES} if role_key == "role" else _SHAREGPT_ROLES
    if not isinstance(turns, list):
        cure = (
            "A CSV cell cannot hold a list: use .jsonl."
            if record.file.lower().endswith(".csv")
            else f'Write [{{"{role_key}": "...", "{text_key}": "..."}}, ...].'
        )
        raise fail(describe(turns), "a list of turns", cure)
    if not turns:
        raise fail("a list without a turn", "at least two turns", "Delete the record.")
    roles = []
    for number, turn in enumerate(turns, start=1):
        if not isinstance(turn, dict) or not {role_key, text_key} <= turn.keys():
            keys = ", ".join(map(repr, turn)) if isinstance(turn, dict) else ""
            raise fail(
                f"turn {number}, {describe(turn)}" + (f" with {keys}" if keys else ""),
                f"an object with {role_key!r} and {text_key!r}",
                "Rename or add the fields.",
            )
        name = turn[role_key]
        role = known.get(name) if isinstance(name, str) else None
        if role is None:
            hint = _ROLE_HINTS.get(str(name).strip().lower(), str(name).lower().strip())
            cure = (
                f"Write {hint!r} instead."
                if hint in known and role_key == "role"
                else "Rename the role, or delete the turn."
            )
            raise fail(
                f"the role {name!r} in turn {number}",
                f"one of {', '.join(known)}",
                cure,
            )
        _check_text(record, f"{column}[{number}].{text_key}", turn[text_key])
        if role == "system" and number > 1:
            raise fail(
                f"a system turn in place {number}",
                "the system turn first",
                "Move it to the beginning, or delete it.",
            )
        wanted = "user" if not roles or roles[-1] == "assistant" else "assistant"
        if role not in ("system", wanted):
            raise fail(
                f"two {role} turns in a row (turns {number - 1} and {number})"
                if roles
                else f"the {role}'s turn first",
                f"user and assistant in turn, so {wanted} in turn {number}",
                "Join the two turns, or add the one between them."
                if roles
                else "Put the user's turn before it, or delete it.",
            )
        roles += [role] if role != "system" else []
    if "assistant" not in roles:
        raise fail(
            "no assistant turn", "at least one, to learn from", "Add the answer."
        )
    if roles[-1] != "assistant":
        raise fail(
            f"the user's turn last (turn {len(turns)})",
            "an assistant turn last",
            "Add the answer, or delete that turn.",
        )


_CONVERTERS = {
    "prompt and completion": _from_pair,
    "chat": _from_messages,
    "conversations": _from_conversations,
    "alpaca": _from_alpaca,
    "classification": _from_classification,
}
