"""Columns of public data sets: read, or named with a cure that leads to a file."""

import copy
import datetime
import decimal
import json
import re

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from small_models import byte_tokenizer

from course_utils import evaluation
from course_utils.data import DataError, load_examples
from course_utils.formatting import format_prompt, tokenize_dataset, tokenize_example


def user(text, **more):
    return {"role": "user", "content": text, **more}


def answer(text, **more):
    return {"role": "assistant", "content": text, **more}


def system(text):
    return {"role": "system", "content": text}


ASK = [user("Where is my parcel?"), answer("On its way.")]
SHARED = [
    {"from": "human", "value": "Where is my parcel?"},
    {"from": "gpt", "value": "On its way."},
]
PAIR = {"prompt": "Where is my parcel?", "completion": "On its way."}
ALPACA = {"instruction": "Where is my parcel?", "output": "On its way."}
LABEL = {"text": "Where is my parcel?", "label": "On its way."}


def load(folder, *records, name="a.jsonl"):
    path = folder / name
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return load_examples(path, "all").to_list()


def refusal(folder, *records):
    with pytest.raises(DataError) as caught:
        load(folder, *records)
    assert re.search(r"\. [A-Z].*\.$", str(caught.value)), caught.value
    return caught.value


def said(record):
    """The turns that a record is learned from, as `tokenize_example` sees them."""
    text = format_prompt(record, "chatml") + record.get("completion", "")
    if "messages" in record and record["messages"]:
        return [(turn["role"], turn["content"]) for turn in record["messages"]], text
    pair = ("user", record["prompt"]), ("assistant", record["completion"])
    return [*pair], text


# --- what is read ---

FORMS = [PAIR, ALPACA, LABEL, {"messages": ASK}, {"conversations": SHARED}]
ROLES = ("user", "assistant")
PIRATE = ("system", "Answer like a pirate.")
PLAIN = [("user", "Where is my parcel?"), ("assistant", "On its way.")]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form))
@pytest.mark.parametrize(
    "column", ["system", "system_prompt", "system_message", "system_instruction"]
)
def test_a_system_column_is_learned_with_each_form(form, column, tmp_path):
    (form_alone,) = load(tmp_path, form)
    records = [form | {column: PIRATE[1]}, form | {column: None}, form | {column: " "}]
    first, *others = load(tmp_path, *records)
    turns, text = said(first)
    assert turns == [PIRATE, *PLAIN]
    assert text.startswith(
        "<|im_start|>system\nAnswer like a pirate.<|im_end|>\n<|im_start|>user\nWhere"
    )
    for other in others:
        turns, text = said(other)
        assert turns == PLAIN and text == said(form_alone)[1]
        assert other[column] is None


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form))
@pytest.mark.parametrize(
    "history",
    [[["Weather today?", "Sun."]], ASK, "hello", 5, [["a", ""]], [[1]], {"a": "b"}],
)
def test_a_history_is_refused_and_can_be_written_as_messages(form, history, tmp_path):
    error = refusal(tmp_path, form | {"history": history})
    assert error.column == "history" and "write it into" in error.cure
    for nothing in ([], None, "", [[]]):
        assert load(tmp_path, form | {"history": nothing})


def test_records_are_tokenized_with_all_they_say(tmp_path):
    tokenizer = byte_tokenizer()

    def text(record):
        features = tokenize_dataset([record], tokenizer)[0]
        assert features == tokenize_example(record, tokenizer)
        return tokenizer.decode(features["input_ids"])

    pirate = {"conversations": SHARED, "system": "Answer like a pirate."}
    (record,) = load(tmp_path, pirate)
    assert text(record).startswith(
        "<|im_start|>system\nAnswer like a pirate.<|im_end|>\n<|im_start|>user\nWhere"
    )
    earlier = [system("Be brief."), user("Weather today?"), answer("Sun.")]
    prompt = [*earlier, user("And tomorrow?")]
    (record,) = load(tmp_path, {"prompt": prompt, "completion": [answer("Rain.")]})
    assert text(record) == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nWeather today?"
        "<|im_end|>\n<|im_start|>assistant\nSun.<|im_end|>\n<|im_start|>user\n"
        "And tomorrow?<|im_end|>\n<|im_start|>assistant\nRain.<|im_end|>\n"
    )
    assert (record["prompt"], record["completion"]) == ("And tomorrow?", "Rain.")


CONVERSATIONAL = {
    "both lists": (ASK[:1], ASK[1:]),
    "a text asked": (PAIR["prompt"], ASK[1:]),
    "a text answered": (ASK[:1], PAIR["completion"]),
    "parts": ([{"type": "text", "text": PAIR["prompt"]}], ASK[1:]),
    "turns of parts": (
        [user([{"type": "text", "text": PAIR["prompt"]}])],
        [
            answer(
                [{"type": "text", "text": "On its"}, {"type": "text", "text": " way."}]
            )
        ],
    ),
}


@pytest.mark.parametrize("name", CONVERSATIONAL)
def test_lists_of_turns_as_prompt_and_completion(name, tmp_path):
    prompt, completion = CONVERSATIONAL[name]
    (record,) = load(tmp_path, {"prompt": prompt, "completion": completion})
    assert record == PAIR


def test_a_longer_conversational_prompt_becomes_messages(tmp_path):
    prompt = [system("Be brief."), user("Hi"), answer("Hello."), ASK[0]]
    (record,) = load(tmp_path, {"prompt": prompt, "completion": ASK[1:]})
    assert record["messages"] == prompt + ASK[1:]
    assert {name: record[name] for name in PAIR} == PAIR
    error = refusal(tmp_path, {"prompt": prompt[:3], "completion": ASK[1:]})
    assert "the assistant's turn in place 4" in str(error)


def test_shared_conversations_may_name_the_roles_of_messages(tmp_path):
    roles = {"human": "user", "gpt": "assistant"}
    turns = [{"from": roles[turn["from"]], "value": turn["value"]} for turn in SHARED]
    (record,) = load(tmp_path, {"system": PIRATE[1], "conversations": turns})
    assert said(record)[0] == [PIRATE, *PLAIN]


@pytest.mark.parametrize("column", ["messages", "conversations"])
def test_parts_of_text_are_joined(column, tmp_path):
    turns = copy.deepcopy(ASK if column == "messages" else SHARED)
    key = "content" if column == "messages" else "value"
    turns[0][key] = [{"type": "text", "text": t} for t in ("Where is ", "my parcel?")]
    turns[1][key] = [{"type": "text", "text": "On its way.", "image_url": None}]
    (record,) = load(tmp_path, {column: turns})
    assert record["messages"] == ASK


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image_url", "image_url": {"url": "x.png"}},
        {"type": "image"},
        {"type": "input_audio", "input_audio": {"data": "x"}},
        {"type": "video", "video": "x.mp4"},
        {"type": "text", "text": None},
        {"text": "no type"},
        "a bare text",
    ],
)
def test_other_parts_are_refused_in_words(part, tmp_path):
    turns = [user([{"type": "text", "text": "What is it?"}, part]), answer("A cat.")]
    error = refusal(tmp_path, {"messages": turns})
    assert error.column == "messages[1].content" and error.line == 1
    assert "parts of the type 'text' alone" in error.cure
    shown = refusal(tmp_path, {"prompt": turns[:1], "completion": turns[1:]})
    assert shown.column == "prompt[1].content"


# --- what is refused, by its column ---

TOOLS = [{"type": "function", "function": {"name": "look", "parameters": {}}}]
OF_RECORDS = {
    "tools": [TOOLS, json.dumps(TOOLS)],
    "functions": [[{"name": "look"}]],
    "tool_calls": [TOOLS],
    "function_call": [{"name": "look", "arguments": "{}"}],
    "reasoning": ["first this, then that"],
    "reasoning_content": ["first this, then that"],
    "thinking": ["first this, then that"],
    "Complex_CoT": ["first this, then that"],
    "chain-of-thought": ["first this, then that"],
    "rationale": ["first this, then that"],
    "images": [["x.png"], [{"bytes": "x", "path": None}]],
    "image": ["x.png"],
    "audio": [{"array": [0.5]}],
    "rejected": ["No.", [answer("No.")]],
    "chosen": ["Another answer altogether."],
    "kto_tag": [True, False],
    "weight": [0, 0.5],
    "loss_mask": [[0, 1]],
    "context": ["The parcel left on Monday."],
    "documents": [[{"title": "t", "text": "The parcel left on Monday."}]],
    "chat_template_kwargs": [{"enable_thinking": False}],
    "System": ["Be brief."],
    "question": ["Something else?"],
}


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form))
@pytest.mark.parametrize("column", OF_RECORDS)
def test_a_column_that_would_not_be_learned_is_named(form, column, tmp_path):
    for value in OF_RECORDS[column]:
        error = refusal(tmp_path, form, form | {column: value})
        assert (error.column, error.line) == (column, 2)
        assert f"'{column}'" in error.cure and "not be learned" in error.expected
    for nothing in (None, "", " ", [], {}, "[]"):
        assert said(load(tmp_path, form | {column: nothing})[0])[0] == PLAIN
    for nothing in ([[]], {"a": None}):
        assert load(tmp_path, form | {column: nothing})


OF_TURNS = {
    "reasoning_content": "first this, then that",
    "reasoning": "first this, then that",
    "thinking": "first this, then that",
    "tool_calls": TOOLS,
    "function_call": {"name": "look", "arguments": "{}"},
    "tool_call_id": "call_1",
    "images": ["x.png"],
    "weight": 0,
    "loss": False,
    "train": 0.0,
    "loss_mask": [0, 1],
    "name": "Bob",
    "refusal": "I cannot.",
    "prefix": True,
}


@pytest.mark.parametrize("column", ["messages", "conversations"])
@pytest.mark.parametrize("field", OF_TURNS)
def test_a_field_of_a_turn_that_would_not_be_learned_is_named(column, field, tmp_path):
    turns = ASK if column == "messages" else SHARED
    record = {column: [turns[0], turns[1] | {field: OF_TURNS[field]}]}
    error = refusal(tmp_path, {column: turns}, record)
    assert (error.column, error.line) == (f"{column}[2].{field}", 2)
    assert f"delete '{field}'" in error.cure
    for nothing in (None, "", [], {}):
        record = {column: [turns[0], turns[1] | {field: nothing}]}
        assert said(load(tmp_path, record)[0])[0] == PLAIN


def test_an_answer_that_only_calls_a_tool_is_named_by_its_calls(tmp_path):
    call = {"role": "assistant", "content": None, "tool_calls": TOOLS}
    assert refusal(tmp_path, {"messages": [ASK[0], call]}).column.endswith("tool_calls")


def test_weights_that_say_what_is_learned_anyway_load(tmp_path):
    turns = [{"from": "system", "value": "Be brief.", "weight": None}]
    turns += [SHARED[0] | {"weight": 0.0}, SHARED[1] | {"weight": 1.0}]
    (record,) = load(tmp_path, {"conversations": turns, "weight": 1})
    assert said(record)[0] == [("system", "Be brief."), *PLAIN]
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,weight\nA?,B.,1\nC?,D.,1.0\n")
    assert len(load_examples(path, "all")) == 2
    turns[1]["weight"] = 1.0
    assert (
        refusal(tmp_path, {"conversations": turns}).column == "conversations[2].weight"
    )


def test_a_verdict_is_no_class(tmp_path):
    for verdict in (True, False):
        error = refusal(tmp_path, PAIR | {"label": verdict})
        assert error.column == "label" and "delete 'label'" in error.cure
    assert load(tmp_path, PAIR | {"label": 1}, PAIR | {"label": 0})[1]["label"] == 0
    path = tmp_path / "a.csv"
    path.write_text("prompt,completion,label\nWhere?,Here.,False\n")
    with pytest.raises(DataError, match='column "label".*delete'):
        load_examples(path, "all")
    path.write_text("text,label\nIt is so.,True\nIt is not.,False\n")
    assert load_examples(path, "all")["completion"] == ["True", "False"]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: "+".join(form))
def test_columns_without_a_part_in_learning_are_kept(form, tmp_path):
    more = {"id": 7, "category": "qa", "source": "web", "url": "http://x", "score": 0.5}
    more |= {"language": "en", "difficulty": 3, "tags": ["a"], "meta": {"tools": "x"}}
    more |= {"name": "Bob", "answer": "Sent.", "answers": ["Sent."], "title": "T"}
    more |= {
        "train": False,
        "loss": 1.5,
        "length": 12,
        "ok": True,
        "date": "2024-01-01",
    }
    (record,) = load(tmp_path, form | more)
    assert said(record)[0] == PLAIN
    assert {name: record[name] for name in more} == more


def test_a_column_that_repeats_a_turn_is_kept(tmp_path):
    chat = {"messages": [system("S"), *ASK, user("And now?"), answer("Here.")]}
    for record in (
        chat | {"prompt": ASK[0]["content"], "prompt_id": "x"},
        chat | {"prompt": ASK[0]["content"], "completion": "Here."},
        chat | {"chosen": "Here."},
        {"messages": ASK, "conversations": SHARED, "context": "my parcel"},
        ALPACA | {"text": "### Where is my parcel? ### On its way."},
    ):
        (loaded,) = load(tmp_path, record)
        (again,) = load(tmp_path, loaded)  # what was saved after loading
        assert said(again) == said(loaded)
    for empty in ([], None, ""):
        assert load(tmp_path, PAIR | {"messages": empty, "conversations": empty})
        assert load(tmp_path, {"messages": ASK, "prompt": empty, "completion": empty})
    assert refusal(tmp_path, PAIR | {"input": 5}).column == "input"
    turns = [ASK[0] | {"prompt": "Quite another?"}, ASK[1]]
    assert refusal(tmp_path, {"messages": turns}).column == "messages[1].prompt"
    for record in (chat, PAIR, ALPACA):
        other = {"prompt": "Quite another?", "completion": "No."}
        first = next(iter(record))
        error = refusal(tmp_path, record | ({"messages": chat["messages"]} | other))
        assert error.column == "prompt", first


def test_a_second_system_text_is_refused(tmp_path):
    chat = {"messages": [system("Be brief."), *ASK], "system": "Be brief."}
    assert said(load(tmp_path, chat)[0])[0] == [("system", "Be brief."), *PLAIN]
    error = refusal(tmp_path, chat | {"system": "Be long."})
    assert "the system's turn in place 2" in str(error)


# --- cures that lead to a file that loads ---

PASSAGE = {"context": "It left on Monday.", "question": "When did it leave?"}
CURED = {  # a record of a public set, and whether following the words ends in loading
    "prompt + response": {"prompt": "A?", "response": "B."},
    "question + answer": {"question": "A?", "answer": "B."},
    "input + output": {"input": "A?", "output": "B."},
    "inputs + targets": {"inputs": "A?", "targets": "B.", "language": "eng"},
    "query + answers": {"query": "A?", "answers": "B.", "tools": '[{"name": "f"}]'},
    "Dolly": {"instruction": "A?", "context": "C.", "response": "B.", "category": "qa"},
    "Dolly half renamed": {"instruction": "A?", "context": "C.", "output": "B."},
    "no context": {"instruction": "A?", "context": "", "response": "B."},
    "instruction + response": {"instruction": "A?", "response": "B."},
    "OpenOrca": {"id": "x", "system_prompt": "S.", "question": "A?", "response": "B."},
    "passage": PASSAGE | {"answer": "On Monday."},
    "capitals": {"Question": "A?", "Complex_CoT": "Hm.", "Response": "B."},
    "Instruction": {"Instruction": "A?", "Input": "C.", "Output": "B."},
    "inputs and context": {"inputs": "A?", "context": "C.", "output": "B."},
    "typos": {"promt": "A?", "completions": "B."},
    "conversation of roles": {"conversation": ASK},
    "conversation of ShareGPT": {"conversation": SHARED},
    "conversations of roles": {"conversations": ASK},
    "messages of ShareGPT": {"messages": SHARED},
    "dialogue": {"id": 1, "dialogue": ASK, "topic": "mail"},
    "prompt beside chosen": {"prompt": "A?", "chosen": "B.", "rejected": "C."},
    "chosen chats": {"prompt": "x", "chosen": [user("x"), ASK[1]], "rejected": ASK},
    "chosen turns": {"prompt": ASK[:1], "chosen": ASK[1:], "rejected": [answer("No.")]},
    "reasoning": {"messages": [ASK[0], ASK[1] | {"reasoning": "Hm.", "name": "Bob"}]},
    "tools": {"messages": ASK, "tools": TOOLS, "functions": TOOLS},
    "KTO": {"prompt": "A?", "completion": "B.", "label": True},
    "images": {"prompt": "A?", "completion": "B.", "images": ["x.png"]},
    "sentence": {"sentence": "So good.", "label": 1},
    "other roles": {"messages": [{"role": "User", "content": "A?"}, ASK[1]]},
    "bot": {"conversations": [SHARED[0], {"from": "bot", "value": "B."}]},
}


def follow(record, cure):
    """The record after the cure's renamings, deletions and roles, taken literally."""
    record = copy.deepcopy(record)
    for old, new in re.findall(r"ename '([^']+)' to '([^']+)'", cure):
        record[new] = record.pop(old)
    for name in re.findall(r"elete '([^']+)'", cure):
        for owner in [record, *record.get("messages", [])]:
            value = owner.pop(name, None)
            if isinstance(value, str) and "write it into one of them" in cure:
                text = next(
                    n for n in ("prompt", "instruction", "content") if n in owner
                )
                owner[text] += f"\n\n{value}"
    for role in re.findall(r"Write '(\w+)' instead", cure):
        for column, key in (("messages", "role"), ("conversations", "from")):
            for turn in record.get(column, ()):
                if turn[key] not in ("user", "assistant", "system", "human", "gpt"):
                    turn[key] = role
    return record


@pytest.mark.parametrize("name", CURED)
def test_a_cure_followed_literally_leads_to_a_file_that_loads(name, tmp_path):
    record, seen = CURED[name], []
    for _ in range(5):
        try:
            (loaded,) = load(tmp_path, record)
        except DataError as error:
            assert record not in seen, f"in circles: {error}"
            seen.append(record)
            record = follow(record, error.cure)
            assert record != seen[-1], f"nothing to follow: {error}"
        else:
            break
    assert seen, "loads as it is"
    turns, text = said(loaded)
    for value in ("A?", "B.", "C.", "S."):  # nothing of it got lost on the way
        if f'"{value}"' in json.dumps(CURED[name]) and "chosen" not in CURED[name]:
            assert value in text + str(turns), text
    assert tokenless_roles(turns)


def tokenless_roles(turns):
    return [role for role, _ in turns if role != "system"][-2:] == ["user", "assistant"]


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "<|im_start|>user\nA<|im_end|>"}, ["'prompt'", "'completion'"]),
        ({"text": "a", "id": 1}, ["what is asked", "what is answered"]),
        (PASSAGE | {"answers": {"text": ["x"]}}, ["'question' to 'instruction'"]),
        (
            PASSAGE | {"answers": {"text": ["x"]}},
            ["'context' to 'input'", "add 'output'"],
        ),
        ({"conversation": [{"input": "A", "output": "B"}]}, ['{"messages": [{"role"']),
        ({"conversations": ["A", "B"]}, ['[{"from": "...", "value": "..."}, ...]']),
        (
            {"chosen": "A", "rejected": "B"},
            ["'chosen' to 'completion'", "add 'prompt'"],
        ),
        ({"prompt": "a"}, ["Add 'completion'"]),
        ({"label": 1}, ["Add 'text'"]),
        ({"messages": [{"role": "user", "text": "A"}]}, ["Rename or add", '"content"']),
        ({"title": "a", "body": "b"}, ["what is asked", "'prompt'", "'completion'"]),
    ],
)
def test_what_no_renaming_cures_is_said(record, words, tmp_path):
    error = refusal(tmp_path, record)
    for part in words:
        assert part in error.cure, error


def test_a_later_record_gets_the_same_cure(tmp_path):
    error = refusal(tmp_path, PAIR, {"prompt": "A?", "response": "B."})
    assert error.line == 2 and "Rename 'response' to 'completion'" in error.cure


# --- values that a table cannot hold as they stand ---


@pytest.mark.parametrize(
    ("values", "loaded"),
    [
        ([17293822569102704640], ["17293822569102704640"]),
        ([2**64 - 1, 3, None], ["18446744073709551615", "3", None]),
        ([5, 2**64], ["5", "18446744073709551616"]),
        ([-(2**63) - 1, -1], ["-9223372036854775809", "-1"]),
        ([[2**70, 1], []], [["1180591620717411303424", "1"], []]),
        ([{"a": [2**65]}, None], [{"a": ["36893488147419103232"]}, None]),
        ([2**63 - 1, -(2**63)], [2**63 - 1, -(2**63)]),
        ([1, 2.5], [1.0, 2.5]),
    ],
)
def test_whole_numbers_of_any_size_load(values, loaded, tmp_path):
    rows = load(tmp_path, *(PAIR | {"id": value} for value in values))
    assert [row["id"] for row in rows] == loaded


@pytest.mark.parametrize(
    ("values", "line", "words"),
    [
        ([0, "x-1"], 2, "unlike the values before it"),
        ([[1, "a"]], 1, "a list, made of several kinds"),
        ([{"a": [1, "b"]}, {}], 1, "an object with 'a', made of several kinds"),
        ([2.5, 2**64], 2, "unlike the values before it"),
        (["fine", "\ud83d"], 2, "half of a surrogate pair (\\ud83d)"),
        (["\ud83d"], 1, "half of a surrogate pair (\\ud83d)"),
        ([True, 1], 2, "unlike the values before it"),
    ],
)
def test_what_is_said_of_a_mixed_column_is_true(values, line, words, tmp_path):
    error = refusal(tmp_path, *(PAIR | {"id": value} for value in values))
    assert (error.line, error.column) == (line, "id")
    assert words in str(error)
    assert str(error).encode()  # it can be printed


def test_parquet_columns_of_every_kind_load(tmp_path):
    day = datetime.date(2024, 1, 2)
    columns = {
        "prompt": pyarrow.array(["A?", "B?"]),
        "completion": pyarrow.array(["a", "b"]),
        "map": pyarrow.array(
            [[("a", 1)], [("b", 2)]], pyarrow.map_(pyarrow.string(), pyarrow.int64())
        ),
        "maps": pyarrow.array(
            [[{"m": [("a", 1)]}], []],
            pyarrow.list_(
                pyarrow.struct([("m", pyarrow.map_(pyarrow.string(), pyarrow.int64()))])
            ),
        ),
        "day": pyarrow.array([day, None]),
        "price": pyarrow.array([decimal.Decimal("1.50"), None]),
        "nested": pyarrow.array([{"x": {"y": [1]}}, None]),
        "big": pyarrow.array([2**64 - 1, 0], pyarrow.uint64()),
        "kind": pyarrow.array(["x", "y"]).dictionary_encode(),
        "raw": pyarrow.array([b"x", None]),
    }
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(columns), path)
    first, second = load_examples(path, "all").to_list()
    assert first["map"]["a"] == 1 and second["map"]["b"] == 2
    assert first["maps"][0]["m"]["a"] == 1
    assert (first["day"], first["price"]) == (day, decimal.Decimal("1.50"))
    assert (first["nested"], first["kind"]) == ({"x": {"y": [1]}}, "x")
    assert str(first["big"]) == str(2**64 - 1)


@pytest.mark.parametrize("value", [datetime.date(2024, 1, 2), datetime.datetime.now()])
def test_a_text_that_a_reader_made_a_date_of_is_named(value, tmp_path, monkeypatch):
    rows = {"prompt": ["When?"], "completion": [value]}
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table(rows), path)
    with pytest.raises(DataError, match='column "completion".*Write it as a text'):
        load_examples(path, "all")
    made = datasets.Dataset.from_dict(rows)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: made)
    with pytest.raises(DataError, match="load the downloaded file"):
        load_examples("org/name")


# --- a path beside a file of that name ---


@pytest.mark.parametrize(
    ("files", "asked", "words"),
    [
        (["mydata/train.jsonl"], "mydata/train", "Did you mean mydata/train.jsonl?"),
        (["mydata/train.JSONL"], "mydata/train", "Did you mean mydata/train.JSONL?"),
        (["mydata/train.csv"], "mydata/Train", "Did you mean mydata/train.csv?"),
        (
            ["mydata/a.csv", "mydata/a.json"],
            "mydata/a",
            "mydata/a.csv or mydata/a.json",
        ),
        (["mydata/other.jsonl"], "mydata/train", "other.jsonl"),
        (["mydata/notes.txt"], "mydata/train", "no data files"),
        (["mydata.jsonl"], "mydata", "Did you mean mydata.jsonl?"),
        (["train.csv"], "train", "Did you mean train.csv?"),
        (["home_command.parquet"], "home_command", "home_command.parquet?"),
        (["mydata/train.jsonl"], "mydata/train:en", "train.jsonl"),
        (["a/b/train.jsonl"], "a/b/train", "Did you mean a/b/train.jsonl?"),
        (["train.jsonl"], "train.JSON", "Did you mean train.jsonl?"),
    ],
)
def test_a_path_beside_a_file_is_answered_at_once(
    files, asked, words, tmp_path, monkeypatch
):
    def refuse(*args, **kwargs):
        raise AssertionError("asked a hub")

    monkeypatch.setattr(datasets, "load_dataset", refuse)
    monkeypatch.chdir(tmp_path)
    for file in files:
        (tmp_path / file).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / file).write_text("{}")
    with pytest.raises(DataError, match="no such file") as caught:
        load_examples(asked)
    assert words in caught.value.cure


# --- everything after loading ---


def test_a_model_is_asked_with_the_system_text_and_earlier_turns(tmp_path, monkeypatch):
    asked = []

    def generate(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return ["On its way."] * len(prompts)

    monkeypatch.setattr(evaluation, "generate", generate)
    prompt = [system("Be brief."), user("Hi"), answer("Hello."), ASK[0]]
    records = [{"prompt": prompt, "completion": ASK[1:]}, PAIR]
    for record in load(tmp_path, *records):
        record = {n: v for n, v in record.items() if v is not None}
        evaluation.evaluate(None, byte_tokenizer(), [record], as_text=True)
    assert [format_prompt(p, "chatml") for p in asked[:1]] == [
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n<|im_start|>user\n"
        "Where is my parcel?<|im_end|>\n<|im_start|>assistant\n"
    ]
    assert asked[1:] == [PAIR]
    rows = load_examples(tmp_path / "a.jsonl", "all")
    result = evaluation.evaluate(None, byte_tokenizer(), rows, as_text=True)
    assert result.exact_match == 1.0 and asked[2:] == list(rows)


def test_equal_prompts_stay_in_one_split_whatever_stands_before_them(tmp_path):
    records = [PAIR | {"system": f"Be {n}."} for n in range(30)]
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps(record) + "\n" for record in records[:30]))
    sizes = []
    for split in ("train", "validation", "test"):
        try:
            sizes.append(len(load_examples(path, split)))
        except DataError:
            continue
    assert sizes == [30]


def test_what_stands_in_the_answer_alone_was_not_asked(tmp_path):
    for asked, told in (("Repeat the input.", "The cat."), ("Is it prime?", "7 is.")):
        record = {"prompt": asked, "completion": told, "input": told.split(" is")[0]}
        assert refusal(tmp_path, record).column == "input"
    assert load(tmp_path, {"prompt": "Is 7?", "completion": "Yes.", "input": "7"})


def test_columns_that_are_not_read_are_named(tmp_path, capsys):
    load(tmp_path, PAIR | {"facts": "The sky is blue.", "id": 3})
    assert "kept, but not learned: 'facts', 'id'" in capsys.readouterr().out
    load(tmp_path, PAIR)
    load_examples("home_commands", "validation")
    assert capsys.readouterr().out == ""


def test_a_blank_system_turn_is_nothing(tmp_path):
    turns = [{"role": "system", "content": " "}, *ASK]
    (loaded,) = load(tmp_path, {"messages": turns})
    assert loaded["messages"] == ASK


def test_a_split_behind_a_bundled_set_is_named_at_once():
    with pytest.raises(DataError, match=r"Write load_examples\('reviews', 'test'\)"):
        load_examples("reviews/test")
