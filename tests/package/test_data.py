"""Data sets: bundled, own and hub; every kind of broken input has its own sentence."""

import hashlib
import json
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import given
from hypothesis import strategies as st

from course_utils import data
from course_utils.data import DataError, _bundled_sets, data_hash, load_examples
from course_utils.data_files import Record
from course_utils.runtime import data_folder

PAIR = '{"prompt": "a", "completion": "b"}\n'


def chat(*turns, role="role", text="content", key="messages"):
    """One JSON line: a chat from (role, text) pairs."""
    messages = [{role: name, text: words} for name, words in turns]
    return json.dumps({key: messages}) + "\n"


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)
    return path


# --- broken input: file name, content, line, column, what the message must say ---

BROKEN = {
    "empty file": ("a.jsonl", b"", None, None, ["an empty file", "was saved"]),
    "blank file": ("a.json", " \n \n", None, None, ["a file of blanks", "was saved"]),
    "Latin-1": (
        "a.jsonl",
        PAIR.encode() + '{"prompt": "é", "completion": "b"}'.encode("latin-1"),
        *(2, 13, ["0xE9", "not UTF-8", "Latin-1"]),
    ),
    "GBK": (
        "a.csv",
        "prompt,completion\n你好,b\n".encode("gbk"),
        *(2, 1, ["0xC4", "Save it again as UTF-8"]),
    ),
    "UTF-16": ("a.jsonl", PAIR.encode("utf-16"), None, None, ["UTF-16", "UTF-8"]),
    "UTF-16 without a mark": (
        "a.jsonl",
        PAIR.encode("utf-16-le"),
        *(1, 2, ["NUL byte", "save it again as UTF-8"]),
    ),
    "NUL byte": (
        "a.csv",
        b"prompt,completion\na,b\nx,\0\n",
        *(3, 3, ["NUL byte (0x00)", "binary, damaged"]),
    ),
    "Parquet named JSON": ("a.json", b"PAR1xx", None, None, ["a Parquet", ".parquet"]),
    "Excel named CSV": (
        "a.csv",
        b"PK\x03\x04x",
        None,
        None,
        ["Excel", "Save it as CSV"],
    ),
    "gzip": ("a.jsonl", b"\x1f\x8b\x08\0", None, None, ["gzip", "Decompress"]),
    "comma missing": (
        "a.jsonl",
        PAIR + '{"prompt": "a" "completion": "b"}\n',
        *(2, 16, ["broken JSON", "Expecting ',' delimiter"]),
    ),
    "single quotes": (
        "a.jsonl",
        "{'prompt': 'a', 'completion': 'b'}\n",
        *(1, 2, ["broken JSON", "in double quotes"]),
    ),
    "text not closed": (
        "a.jsonl",
        PAIR + PAIR + '{"prompt": "a, "completion": "b"}x\n',
        *(3, 17, ["broken JSON", "Put a comma there; write a quote in a text as"]),
    ),
    "ends in a text": (
        "a.jsonl",
        '{"prompt": "a", "completion": "b\n',
        *(1, 31, ["Unterminated string", "Close the text"]),
    ),
    "two records on a line": (
        "a.jsonl",
        PAIR + PAIR.strip() + PAIR,
        *(2, 35, ["Extra data", "line of its own"]),
    ),
    "one record on many lines": (
        "a.jsonl",
        '{\n"prompt": "a",\n"completion": "b"\n}\n',
        *(1, None, ["broken JSON", "one line, or rename the file to end in .json"]),
    ),
    "NaN": ("a.jsonl", '{"prompt": NaN}', 1, None, ["NaN, which is not JSON", "null"]),
    "too many levels": (
        "a.jsonl",
        PAIR + "[" * 100_000,
        *(2, None, ["JSON that cannot be held", "Simplify"]),
    ),
    "list with a comma at its end": (
        "a.json",
        '[\n{"prompt": "a", "completion": "b"},]',
        *(2, None, ["broken JSON", "no comma at the end"]),
    ),
    "list without a comma": (
        "a.json",
        '[{"prompt": "a", "completion": "b"}\n  {"prompt": "c"}]',
        *(2, 3, ["broken JSON", "Expecting ',' delimiter"]),
    ),
    "broken inside a list": (
        "a.json",
        '[\n{"prompt": "a", "completion": "b"},\n{"prompt": oops}\n]',
        *(3, 12, ["broken JSON (Expecting value)", "double quotes"]),
    ),
    "text after the list": (
        "a.json",
        '[{"prompt": "a", "completion": "b"}]\nmore',
        *(2, 1, ["broken JSON (Extra data)", "Delete what follows"]),
    ),
    "lines named .json": (
        "a.json",
        PAIR + PAIR,
        *(2, None, ["broken JSON (Extra data)", "rename the file to end in .jsonl"]),
    ),
    "one object named .json": ("a.json", PAIR, 1, None, ["not a list", "[ and ]"]),
    "list named .jsonl": ("a.jsonl", "[1]", 1, None, ["a list as a record", ".json."]),
    "list without a record": ("a.json", "[ ]", None, None, ["without a record", "Add"]),
    "duplicate key": (
        "a.jsonl",
        PAIR + '{"prompt": "a", "completion": "b", "prompt": "c"}\n',
        *(2, "prompt", ['"prompt" twice in one object', "Delete or rename"]),
    ),
    "duplicate key inside": (
        "a.json",
        '[\n\n{"messages": [{"role": "user", "role": "user", "content": "x"}]}]',
        *(3, "role", ['"role" twice', "Delete or rename"]),
    ),
    "record is a number": (
        "a.jsonl",
        PAIR + "7\n",
        *(2, None, ["the number 7 as a record", "an object", "Write records as"]),
    ),
    "record is null in a list": (
        "a.json",
        '[{"prompt": "a", "completion": "b"},\nnull]',
        *(2, None, ["nothing (null) as a record", "named fields"]),
    ),
    "missing completion": (
        "a.jsonl",
        PAIR + '{"prompt": "a", "completoin": "b"}\n',
        *(2, None, ["the fields 'prompt', 'completoin'", "Rename 'completoin'"]),
    ),
    "missing from all": (
        "a.jsonl",
        '{"prompt": "a"}\n',
        *(1, None, ["the fields 'prompt'", "Add 'completion'"]),
    ),
    "unknown columns": (
        "a.jsonl",
        '{"Prompt": "a", "Completion": "b"}\n',
        *(1, None, ["'Prompt', 'Completion'", "Rename 'Prompt' to 'prompt'"]),
    ),
    "columns of nothing known": (
        "a.csv",
        "q,reply\n1,2\n",
        *(2, None, ["'q', 'reply'", ", prompt + completion, instruction", "Rename"]),
    ),
    "no columns": ("a.jsonl", "{}", 1, None, ["found no fields", "Rename"]),
    "number for a text": (
        "a.jsonl",
        PAIR + '{"prompt": "a", "completion": 3}\n',
        *(2, "completion", ["the number 3", "a text", "double quotes"]),
    ),
    "null for a text": (
        "a.jsonl",
        PAIR + '{"prompt": null, "completion": "b"}\n',
        *(2, "prompt", ["nothing (null)", "delete the record"]),
    ),
    "list for a text": (
        "a.jsonl",
        '{"instruction": ["a"], "output": "b"}\n',
        *(1, "instruction", ["found a list", "a text"]),
    ),
    "empty completion": (
        "a.jsonl",
        PAIR + '{"prompt": "a", "completion": ""}\n',
        *(2, "completion", ["an empty text", "something to learn", "delete"]),
    ),
    "blank completion": (
        "a.csv",
        'prompt,completion\na,b\nc," "\n',
        *(3, "completion", ["a text of blanks", "something to learn", "delete"]),
    ),
    "empty prompt": (
        "a.jsonl",
        '{"prompt": "", "completion": "b"}\n',
        *(1, "prompt", ["an empty text", "something in it"]),
    ),
    "empty output": (
        "a.jsonl",
        '{"instruction": "a", "input": "", "output": "\\n"}\n',
        *(1, "output", ["a text of blanks", "something to learn"]),
    ),
    "half of a pair": (
        "a.jsonl",
        PAIR + '{"prompt": "\\ud83d", "completion": "b"}\n',
        *(2, "prompt", ["half of a surrogate pair (\\ud83d)", "both halves"]),
    ),
    "mixed schemas": (
        "a.jsonl",
        PAIR + PAIR + chat(("user", "a"), ("assistant", "b")),
        *(3, None, ["a record with messages", "as in line 1", "file of its own"]),
    ),
    "messages as a text": (
        "a.jsonl",
        '{"messages": "hello"}\n',
        *(1, "messages", ['the text "hello"', "a list of turns", '"role"']),
    ),
    "messages in a CSV": (
        "a.csv",
        'messages\n"[{}]"\n',
        *(2, "messages", ["a list of turns", "use .jsonl"]),
    ),
    "no turn": (
        "a.jsonl",
        '{"messages": []}',
        *(1, "messages", ["no turn in place 1", "delete turns, or the record"]),
    ),
    "turn without content": (
        "a.jsonl",
        '{"messages": [{"role": "user", "text": "a"}]}',
        *(1, "messages", ["turn 1", "'text'", "'role' and 'content'", "Rename"]),
    ),
    "turn is a text": (
        "a.jsonl",
        '{"messages": ["hi", "ho"]}',
        *(1, "messages", ['turn 1, the text "hi"', "Rename or add"]),
    ),
    "unknown role": (
        "a.jsonl",
        chat(("user", "a"), ("assistant", "b")) + chat(("human", "a"), ("ai", "b")),
        *(2, "messages", ["the role 'human' in turn 1", "Write 'user' instead"]),
    ),
    "tool role": (
        "a.jsonl",
        chat(("user", "a"), ("tool", "b")),
        *(1, "messages", ["the role 'tool' in turn 2", "one of system, user"]),
    ),
    "role is a number": (
        "a.jsonl",
        chat((1, "a")),
        *(1, "messages", ["the role 1 in turn 1", "Rename the role"]),
    ),
    "two user turns": (
        "a.jsonl",
        chat(("user", "a"), ("user", "b"), ("assistant", "c")),
        *(
            1,
            "messages",
            ["the user's turn in place 2", "the assistant's there", "join"],
        ),
    ),
    "assistant first": (
        "a.jsonl",
        chat(("system", "s"), ("assistant", "a")),
        *(
            1,
            "messages",
            ["the assistant's turn in place 2", "the user's there", "Add it"],
        ),
    ),
    "system later": (
        "a.jsonl",
        chat(("user", "a"), ("assistant", "b"), ("system", "c")),
        *(
            1,
            "messages",
            ["the system's turn in place 3", "may only be the first", "move"],
        ),
    ),
    "no assistant": (
        "a.jsonl",
        chat(("system", "a"), ("user", "b")),
        *(1, "messages", ["no turn in place 3", "the assistant's there", "Add it"]),
    ),
    "user last": (
        "a.jsonl",
        chat(("user", "a"), ("assistant", "b"), ("user", "c")),
        *(
            1,
            "messages",
            ["no turn in place 4", "the assistant's there", "delete turns"],
        ),
    ),
    "empty turn": (
        "a.jsonl",
        chat(("user", "a"), ("assistant", " ")),
        *(1, "messages[2].content", ["a text of blanks", "delete the record"]),
    ),
    "sharegpt role": (
        "a.jsonl",
        chat(
            ("human", "a"), ("bot", "b"), role="from", text="value", key="conversations"
        ),
        *(1, "conversations", ["the role 'bot' in turn 2", "one of system, human"]),
    ),
    "label is a fraction": (
        "a.jsonl",
        '{"text": "a", "label": 0.5}\n',
        *(
            1,
            "label",
            ["the number 0.5", "a whole number from 0 or a name", "Write one"],
        ),
    ),
    "label is negative": (
        "a.jsonl",
        '{"text": "a", "label": -1}\n',
        *(1, "label", ["the number -1", "no labels"]),
    ),
    "labels of two kinds": (
        "a.jsonl",
        '{"text": "a", "label": 1}\n{"text": "b", "label": "good"}\n',
        *(2, "label", ['"good"', "unlike the values before", "the same way"]),
    ),
    "column of two kinds": (
        "a.jsonl",
        PAIR[:-2] + ', "note": "x"}\n' + PAIR + PAIR[:-2] + ', "note": [1]}\n',
        *(3, "note", ["a list, unlike the values before", "the same way"]),
    ),
    "row too short": (
        "a.csv",
        "prompt,completion\na,b\nc\n",
        *(3, None, ["found 1 fields", "expected 2", "double quotes"]),
    ),
    "row too long, after a line break": (
        "a.csv",
        'prompt,completion\n"a\na",b\nyes, I do,c\n',
        *(4, None, ["found 3 fields", "as in the header", "a comma or a quote"]),
    ),
    "header only": ("a.csv", "prompt,completion\n", None, None, ["without a record"]),
    "duplicate header": (
        "a.csv",
        "prompt,completion,prompt\na,b,c\n",
        *(1, "prompt", ['"prompt" twice in the header', "Rename or delete"]),
    ),
    "nameless header": (
        "a.csv",
        "prompt,completion,\na,b,c\n",
        *(1, 3, ["without a name in the header", "Rename or delete"]),
    ),
    "semicolons": (
        "a.csv",
        "prompt;completion\na;b\n",
        *(1, None, ["separated by semicolons", "CSV with commas"]),
    ),
    "quote not closed": (
        "a.csv",
        'prompt,completion\na,b\nc,"d\ne,f\n',
        *(3, None, ["broken CSV", "Close the quote"]),
    ),
    "broken Parquet": ("a.parquet", b"PAR1", None, None, ["no readable Parquet"]),
    "suffix unknown": ("a.txt", "a", None, None, ["'.txt'", "one of .jsonl", "Save"]),
    "no suffix": ("data", "a", None, None, ["without a type", ".parquet", "Save"]),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_input_says_where_what_and_the_cure(kind, tmp_path):
    name, content, line, column, parts = BROKEN[kind]
    path = write(tmp_path, name, content)
    with pytest.raises(DataError) as caught:
        load_examples(path)
    message = str(caught.value)
    for part in [str(path), "found ", "; expected ", *parts]:
        assert part in message, f"{part!r} is not in: {message}"
    assert caught.value.file == str(path)
    assert caught.value.line == line
    if column is not None:
        assert caught.value.column == column, message
    if line is not None:
        assert f"line {line}" in message
    assert re.search(r"\. [A-Z].*\.$", message), f"no cure in: {message}"


def test_each_kind_has_its_own_sentence(tmp_path):
    kinds = {}
    for kind, (name, content, *_) in BROKEN.items():
        with pytest.raises(DataError) as caught:
            load_examples(write(tmp_path, name, content))
        error = caught.value
        kinds.setdefault((error.found, error.expected, error.cure), []).append(kind)
    # The same fault at another place in the file has the same sentence.
    assert sorted(same for same in kinds.values() if len(same) > 1) == [
        ["UTF-16 without a mark", "NUL byte"],
        ["blank completion", "empty output"],
        ["comma missing", "text not closed", "list without a comma"],
        ["list with a comma at its end", "broken inside a list"],
        ["list without a record", "header only"],
    ]


def test_broken_row_of_a_parquet_file_is_called_a_row(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": "c", "completion": None}]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    with pytest.raises(DataError, match=r'row 2, column "completion": found nothing'):
        load_examples(path)


# --- sources that are not there ---


def test_missing_file_suggests_its_neighbours(tmp_path):
    write(tmp_path, "questions.jsonl", PAIR)
    with pytest.raises(DataError, match="no such file.*mean .*questions.jsonl"):
        load_examples(tmp_path / "question.jsonl")
    with pytest.raises(DataError, match="In .* are questions.jsonl"):
        load_examples(str(tmp_path / "zzz.csv"))
    with pytest.raises(DataError, match="There is no folder .*nowhere either"):
        load_examples(tmp_path / "nowhere" / "a.jsonl")
    with pytest.raises(DataError, match="no such file"):
        load_examples("./a")


def test_unknown_set_lists_the_names():
    with pytest.raises(DataError) as caught:
        load_examples("home_comands")
    message = str(caught.value)
    assert all(name in message for name in _bundled_sets())
    assert "Did you mean home_commands or home_commands_wide or" in message
    with pytest.raises(DataError, match="a hub id its owner"):
        load_examples("zzzzzz")


def test_unknown_split_says_which_there_are(tmp_path):
    with pytest.raises(DataError, match="no split 'train'; expected one of 'test'"):
        load_examples("general_questions")
    path = write(tmp_path, "a.jsonl", PAIR)
    with pytest.raises(DataError, match="no split 'dev'; .*'train', 'validation'"):
        load_examples(path, "dev")


def test_split_without_a_record_is_an_error_not_an_empty_set(tmp_path):
    path = write(tmp_path, "a.jsonl", PAIR)
    held = [s for s in data.SPLITS if s in _splits_that_load(path)]
    assert len(held) == 1
    empty = next(s for s in data.SPLITS if s not in held)
    with pytest.raises(DataError, match="none of its 1 records in the split"):
        load_examples(path, empty)
    assert len(load_examples(path, "all")) == 1


def _splits_that_load(path):
    for split in data.SPLITS:
        try:
            load_examples(path, split)
            yield split
        except DataError:
            pass


def test_folder_with_no_or_two_files_of_a_split(tmp_path):
    with pytest.raises(DataError, match="without train, validation or test files"):
        load_examples(tmp_path)
    write(tmp_path, "train.jsonl", PAIR)
    write(tmp_path, "train.csv", "prompt,completion\na,b\n")
    with pytest.raises(DataError, match=r"train.csv and train.jsonl.*Delete or move"):
        load_examples(tmp_path)


def test_hub_failure_names_the_cures(monkeypatch):
    def refuse(*args, **kwargs):
        raise ConnectionError("no route")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    with pytest.raises(DataError, match="no route.*Check the network.*home_commands"):
        load_examples("org/name")
    with pytest.raises(DataError, match="found a hub id"):
        data_hash("org/name")


@pytest.mark.parametrize("limit", [0, -1, 2.5, "3"])
def test_limit_must_be_a_positive_number(limit):
    with pytest.raises(ValueError, match="limit must be a positive whole number"):
        load_examples("general_questions", "test", limit=limit)


# --- what is recognised ---

SAME = [("Say hi.\n\nIn French", "Salut")]
RECOGNISED = {
    "pair.jsonl": '{"prompt": "Say hi.\\n\\nIn French", "completion": "Salut", "n": 1}',
    "bom.jsonl": '\ufeff{"prompt": "Say hi.\\n\\nIn French", "completion": "Salut"}',
    "crlf.jsonl": '\r\n{"prompt": "Say hi.\\n\\nIn French", "completion": "Salut"}\r\n',
    "list.json": ' [ {"prompt": "Say hi.\\n\\nIn French", "completion": "Salut"} ] ',
    "alpaca.jsonl": (
        '{"instruction": "Say hi.", "input": "In French", "output": "Salut"}'
    ),
    "table.csv": 'n,prompt,completion\r\n1,"Say hi.\n\nIn French",Salut\r\n\r\n',
    "bom.csv": '\ufeff"prompt","completion"\n"Say hi.\n\nIn French","Salut"',
    "upper.JSONL": '{"prompt": "Say hi.\\n\\nIn French", "completion": "Salut"}',
}


@pytest.mark.parametrize("name", RECOGNISED)
def test_forms_and_files_give_the_same_example(name, tmp_path):
    examples = load_examples(write(tmp_path, name, RECOGNISED[name]), "all")
    assert list(zip(examples["prompt"], examples["completion"], strict=True)) == SAME


def test_alpaca_without_input_and_with_other_columns(tmp_path):
    rows = [
        {"instruction": "a", "output": "b", "source": "x"},
        {"instruction": "c", "input": None, "output": "d"},
        {"instruction": "e", "input": "f", "output": "g", "later": 1},
    ]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    examples = load_examples(write(tmp_path, "a.jsonl", text), "all")
    assert examples["prompt"] == ["a", "c", "e\n\nf"]
    assert examples["input"] == ["", "", "f"]
    assert examples["source"] == ["x", None, None]
    assert examples["later"] == [None, None, 1]


def test_chats_and_sharegpt_conversations(tmp_path):
    turns = [("system", "s"), ("user", "a"), ("assistant", "b")]
    path = write(tmp_path, "a.jsonl", chat(*turns))
    messages = load_examples(path, "all")["messages"][0]
    assert [(turn["role"], turn["content"]) for turn in messages] == turns
    shared = [("system", "s"), ("human", "a"), ("gpt", "b")]
    keys = {"role": "from", "text": "value", "key": "conversations"}
    path = write(tmp_path, "b.jsonl", chat(*shared, **keys))
    examples = load_examples(path, "all")
    assert examples["messages"][0] == messages
    assert set(examples.column_names) == {"conversations", "messages"}


def test_classification_labels(tmp_path):
    path = write(tmp_path, "a.csv", "text,label\ngood,1\nbad,0\n")
    examples = load_examples(path, "all")
    assert examples["label"] == examples["completion"] == ["1", "0"]  # as a CSV has it
    path = write(tmp_path, "b.csv", "text,label\ngood,1\nbad,no\n")
    assert load_examples(path, "all")["label"] == ["1", "no"]
    line = '{"text": "good", "label": 1, "label_text": "positive"}\n'
    examples = load_examples(write(tmp_path, "c.jsonl", line), "all")
    assert examples[0]["completion"] == "positive"
    assert examples[0]["label"] == 1
    assert examples[0]["prompt"] == examples[0]["text"] == "good"


def test_parquet_keeps_columns_and_their_types(tmp_path):
    path = tmp_path / "a.parquet"
    rows = [{"prompt": f"p{i}", "completion": "c", "n": i} for i in range(5)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert load_examples(path, "all").to_list() == rows


def test_hub_set_is_asked_for_and_normalised(monkeypatch):
    asked = []

    def load(*args, **kwargs):
        asked.append((args, kwargs))
        features = datasets.Features(
            text=datasets.Value("string"),
            label=datasets.ClassLabel(names=["negative", "positive"]),
        )
        rows = {"text": [f"t{i}" for i in range(9)], "label": [0, 1, 0] * 3}
        return datasets.Dataset.from_dict(rows, features=features)

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples = load_examples("org/name:small", "test", limit=4, seed=3)
    assert asked == [(("org/name", "small"), {"split": "test"})]
    assert len(examples) == 4
    names = ["negative", "positive"]
    assert examples["completion"] == [names[label] for label in examples["label"]]


@given(
    st.lists(
        st.tuples(
            st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
            st.text(st.characters(codec="utf-8"), min_size=1).filter(str.strip),
        ),
        min_size=1,
        max_size=5,
    ),
    st.booleans(),
)
def test_any_text_survives_jsonl_and_json(tmp_path_factory, pairs, ascii_only):
    folder = tmp_path_factory.mktemp("texts")
    rows = [{"prompt": prompt, "completion": answer} for prompt, answer in pairs]
    lines = [json.dumps(row, ensure_ascii=ascii_only) for row in rows]
    path = write(folder, "a.jsonl", "\n".join(lines))
    assert load_examples(path, "all").to_list() == rows
    path = write(folder, "a.json", "[" + ",\n".join(lines) + "]")
    assert load_examples(path, "all").to_list() == rows


# --- splits and limits ---


def _numbered(folder, count, name="a.jsonl"):
    rows = [{"prompt": f"p{i}", "completion": "c", "n": i} for i in range(count)]
    return write(folder, name, "".join(json.dumps(row) + "\n" for row in rows))


def test_own_file_splits_by_prompt_and_loses_nothing(tmp_path):
    path = _numbered(tmp_path, 2000)
    parts = {split: load_examples(path, split)["n"] for split in data.SPLITS}
    assert sorted(sum((list(part) for part in parts.values()), [])) == list(range(2000))
    shares = {split: len(part) / 2000 for split, part in parts.items()}
    expected = {"train": 0.8, "validation": 0.1, "test": 0.1}
    assert shares == pytest.approx(expected, abs=0.03)
    assert all(list(part) == sorted(part) for part in parts.values())
    longer = _numbered(tmp_path, 2500, "b.jsonl")
    for split in data.SPLITS:  # added records move none of the others
        kept = [n for n in load_examples(longer, split)["n"] if n < 2000]
        assert kept == list(parts[split])


def test_equal_prompts_stay_in_one_split(tmp_path):
    rows = [{"prompt": "same", "completion": str(i)} for i in range(50)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    assert len(list(_splits_that_load(write(tmp_path, "a.jsonl", text)))) == 1


def test_limit_takes_a_seeded_order_and_a_longer_one_contains_it(tmp_path):
    path = _numbered(tmp_path, 100)
    ten = list(load_examples(path, "all", limit=10, seed=1)["n"])
    assert ten == list(load_examples(path, "all", limit=10, seed=1)["n"])
    assert ten == list(load_examples(path, "all", limit=30, seed=1)["n"])[:10]
    assert ten != list(load_examples(path, "all", limit=10, seed=2)["n"])
    assert ten != list(range(10))
    assert sorted(load_examples(path, "all", limit=500)["n"]) == list(range(100))
    assert list(load_examples(path, "all", seed=9)["n"]) == list(range(100))


def test_own_folder_with_split_files(tmp_path):
    _numbered(tmp_path, 3, "train.jsonl")
    write(tmp_path, "test.csv", "prompt,completion,n\nx,y,7\n")
    assert len(load_examples(tmp_path)) == 3
    assert load_examples(tmp_path, "test")["n"] == ["7"]
    with pytest.raises(DataError, match="no split 'validation'"):
        load_examples(tmp_path, "validation")


# --- the bundled sets ---


def test_every_bundled_set_loads_and_hashes():
    names = _bundled_sets()
    assert {"home_commands", "instructions", "instructions/chats"} <= set(names)
    for name in names:
        examples = load_examples(name, "all")
        kind = {"prompt", "completion"}, {"messages"}
        assert any(columns <= set(examples.column_names) for columns in kind), name
        assert re.fullmatch("[0-9a-f]{64}", data_hash(name))


@pytest.mark.parametrize(
    ("name", "times"), [("home_commands_large", 9), ("home_commands_wide", 12)]
)
def test_the_larger_sets_share_validation_and_test(name, times):
    for split in ("validation", "test"):
        ours = load_examples("home_commands", split)
        assert load_examples(name, split).to_list() == ours.to_list()
    assert len(load_examples(name)) >= times * len(load_examples("home_commands"))
    assert data_hash(name) != data_hash("home_commands")


def test_a_folder_names_the_splits_that_it_shares(tmp_path):
    for name, count in (("small", 2), ("large", 5)):
        (tmp_path / name).mkdir()
        _numbered(tmp_path / name, count, "train.jsonl")
    _numbered(tmp_path / "small", 3, "test.jsonl")
    large = tmp_path / "large"
    alone = data_hash(large)
    write(large, "shared_splits.json", '["../small/test.jsonl"]')
    assert len(load_examples(large)) == 5
    assert len(load_examples(large, "test")) == 3
    assert data_hash(large) != alone
    write(large, "shared_splits.json", '["../small/train.jsonl"]')
    with pytest.raises(DataError, match="one file for each split"):
        load_examples(large)


def test_an_own_folder_of_that_name_shares_nothing(tmp_path):
    folder = tmp_path / "home_commands_large"
    folder.mkdir()
    _numbered(folder, 3, "train.jsonl")
    assert len(load_examples(folder, "all")) == 3
    with pytest.raises(DataError, match="no split 'test'"):
        load_examples(folder, "test")


def test_data_hash_changes_with_one_byte_and_ignores_other_files(tmp_path):
    path = _numbered(tmp_path, 3, "train.jsonl")
    before, file_before = data_hash(tmp_path), data_hash(path)
    assert file_before == hashlib.sha256(path.read_bytes()).hexdigest()
    write(tmp_path, "README.md", "words")
    assert data_hash(tmp_path) == before
    path.write_bytes(path.read_bytes() + b"\n")
    assert data_hash(tmp_path) != before
    path.rename(tmp_path / "test.jsonl")
    assert data_hash(tmp_path) != before


def test_a_bundled_set_loads_quickly_and_writes_no_file(tmp_path):
    code = """if True:
        import time, datasets
        from course_utils.data import load_examples
        start = time.process_time()
        for name in ("home_commands", "instructions", "instructions/chats"):
            load_examples(name)
        print(time.process_time() - start)
    """
    homes = {"HF_HOME": str(tmp_path / "hf"), "HOME": str(tmp_path)}
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **homes, "XDG_CACHE_HOME": str(tmp_path / "cache")},
        cwd=Path(data.__file__).parents[1],
        capture_output=True,
        text=True,
        check=True,
    )
    assert float(done.stdout) < 0.75  # of the processor, for three sets
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def _chinese(text):
    return re.search("[\u4e00-\u9fff]", text) is not None


def test_instructions_are_enough_half_and_half_and_without_repeats():
    examples = load_examples("instructions", "all").to_list()
    assert len(examples) >= 200
    assert all(e.keys() >= {"instruction", "input", "output"} for e in examples)
    assert 0.25 < sum(bool(e["input"]) for e in examples) / len(examples) < 0.45
    assert len({e["prompt"] for e in examples}) == len(examples)
    assert len({e["completion"] for e in examples}) >= len(examples) - 2
    chats = load_examples("instructions/chats", "all")["messages"]
    assert len(chats) >= 40
    roles = [[turn["role"] for turn in chat] for chat in chats]
    assert all(2 <= turns.count("user") <= 4 for turns in roles)
    assert 8 <= sum(turns[0] == "system" for turns in roles) < len(chats)
    assert len({chat[-1]["content"] for chat in chats}) == len(chats)
    for texts in (
        [e["instruction"] for e in examples],
        ["".join(turn["content"] for turn in chat) for chat in chats],
    ):
        assert sum(map(_chinese, texts)) == len(texts) / 2


def test_general_questions_have_answers_that_their_completions_contain():
    questions = load_examples("general_questions", "test").to_list()
    assert len(questions) >= 60
    assert len({q["prompt"] for q in questions}) == len(questions)
    for q in questions:
        assert q["answer"] == q["answers"][0]
        found = [a for a in q["answers"] if a.casefold() in q["completion"].casefold()]
        assert found, q
        assert q["completion"].endswith(".")
    shares = Counter(q["answer"] for q in questions)
    assert shares.most_common(1)[0][1] <= 4  # no constant answer scores well


# --- the cards ---


def _card_row(path, root):
    """The row about `path` in the nearest card above it: (records, sha256)."""
    for folder in path.parents:
        card = folder / "README.md"
        name = path.relative_to(folder).as_posix()
        rows = re.findall(
            rf"^\| `{re.escape(name)}` \| ([\d,]+) \| `([0-9a-f]{{64}})` \|$",
            card.read_text(encoding="utf-8") if card.is_file() else "",
            re.MULTILINE,
        )
        if rows:
            assert len(rows) == 1, f"{card}: several rows about {name}"
            return int(rows[0][0].replace(",", "")), rows[0][1]
        if folder == root:
            break
    raise AssertionError(f"no card has a row about {path.relative_to(root)}")


def test_every_file_has_a_card_with_its_count_and_hash():
    root = data_folder()
    files = [p for p in root.rglob("*.jsonl") if root / "runs" not in p.parents]
    assert len(files) >= 8
    for path in sorted(files):
        raw = path.read_bytes()
        records, sha256 = _card_row(path, root)
        assert raw.endswith(b"\n") and b"\r" not in raw, path
        assert raw.count(b"\n") == records, path
        assert hashlib.sha256(raw).hexdigest() == sha256, path


def test_the_index_links_every_set_and_its_licence():
    root = data_folder()
    index = (root / "README.md").read_text(encoding="utf-8")
    assert "CC BY 4.0" in index
    for name in _bundled_sets():
        assert f"`{name}`" in index, name
    for link in re.findall(r"\]\(([^)#:]+)\)", index):
        assert (root / link).exists(), link


def test_codes_with_leading_zeros_stay_apart(tmp_path):
    path = write(tmp_path, "codes.csv", "text,label\na,0111\nb,0112\nc,111\n")
    examples = load_examples(path)
    assert examples["label"] == ["0111", "0112", "111"]
    assert examples["completion"] == ["0111", "0112", "111"]
    path = write(tmp_path, "numbers.csv", "text,label\na,0\nb,10\n")
    assert load_examples(path)["label"] == ["0", "10"]


@pytest.mark.parametrize("name", [r"D:\mine\data", "data/my/own"])
def test_a_path_that_is_not_there_is_no_hub_id(name):
    with pytest.raises(DataError, match="no such file"):
        load_examples(name)


def test_a_long_text_in_a_csv_is_a_text(tmp_path):
    long = "word " * 40_000
    path = write(tmp_path, "a.csv", f'prompt,completion\n"{long}",b\n')
    (row,) = load_examples(path, "all")
    assert row["prompt"] == long


def test_the_first_value_of_another_kind_is_found_quickly(monkeypatch):
    tried, real = [], pyarrow.array

    def array(values):
        tried.append(len(values))
        return real(values)

    monkeypatch.setattr(pyarrow, "array", array)
    for place in (1, 2, 3211, 4999):
        rows = [{"id": "x" if i == place else i} for i in range(5000)]
        records = [Record("a.jsonl", i + 1, "line", row) for i, row in enumerate(rows)]
        error = data._mixed_column("id", [row["id"] for row in rows], records)
        assert error.line == place + 1
    assert len(tried) < 60
