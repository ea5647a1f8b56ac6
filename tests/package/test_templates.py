"""Chat templates of other models, tokenizers that change, and fields of records."""

import copy
import json
from pathlib import Path

import pytest
import trl
from small_models import CHATML, byte_tokenizer
from test_formatting import TOKENIZERS, byte_level, metaspace, prepended, special, wrap
from tokenizers import (
    AddedToken,
    Tokenizer,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import PreTrainedTokenizer

from course_utils import evaluation
from course_utils.formatting import (
    TEMPLATES,
    format_prompt,
    generation_prompt,
    tokenize_dataset,
    tokenize_example,
    with_examples,
)
from course_utils.sweep.experiment import template_for

PACKAGED = sorted(Path(trl.__file__).parent.glob("chat_templates/*.jinja"))


def says(role):
    return lambda content: {"role": role, "content": content}


SYSTEM, USER, ANSWER = says("system"), says("user"), says("assistant")
THOUGHT = "<think>\ntwo\n</think>\n\n4"
CHATS = {
    "pair": [USER("2+2?"), ANSWER("4")],
    "system": [SYSTEM("Be brief."), USER("2+2?"), ANSWER("4")],
    "chat": [USER("Hi"), ANSWER("Hello"), USER("2+2?"), ANSWER("4")],
    "thought": [USER("2+2?"), ANSWER(THOUGHT)],
    "on one line": [USER("2+2?"), ANSWER("<think>two</think>4")],
    "no newline": [USER("2+2?"), ANSWER("<think>two</think>\n4")],
    "empty": [USER("2+2?"), ANSWER("<think>\n\n</think>\n\n4")],
    "earlier": [USER("Hi"), ANSWER(THOUGHT), USER("2+2?"), ANSWER("4")],
    "both": [USER("Hi"), ANSWER(THOUGHT), USER("2+2?"), ANSWER(THOUGHT)],
    "last": [USER("Hi"), ANSWER("Hello"), USER("2+2?"), ANSWER(THOUGHT)],
    "system, thought": [SYSTEM("Be brief."), USER("2+2?"), ANSWER(THOUGHT)],
    "unicode": [USER("¿2+2?"), ANSWER("<think>\nzwölf 把\n</think>\n\n四🙂")],
    "spaces": [USER(" 2+2?\n"), ANSWER("\n 4 \n")],
    "tags asked about": [USER("What is </think>?"), ANSWER("A tag.")],
}


def with_template(chat_template, *tokens, **names):
    """A byte-level tokenizer of its own, which `<think>` is a token of, as Qwen3's."""
    names = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"} | names
    made = wrap(Tokenizer.from_str(byte_level().backend_tokenizer.to_str()), **names)
    thoughts = ("<think>", "</think>")
    made.add_tokens([AddedToken(t, special=False, normalized=False) for t in thoughts])
    made.add_tokens(special(tokens))
    made.chat_template = chat_template
    return made


def packaged(name):
    texts = [p.read_text(encoding="utf-8") for p in PACKAGED if p.stem == name]
    return with_template(*texts) if texts else pytest.skip(f"TRL packages no {name}")


def learned(tokenizer, features):
    return tokenizer.decode([label for label in features["labels"] if label != -100])


def begins(features):
    """Where the last learned stretch begins."""
    labels = features["labels"]
    last = max(i for i, label in enumerate(labels) if label != -100)
    return max((i for i in range(last) if labels[i] == -100), default=-1) + 1


@pytest.mark.parametrize("path", PACKAGED, ids=lambda path: path.stem)
def test_packaged_templates_are_learned_as_they_are_rendered_or_refused(path):
    tokenizer = with_template(path.read_text(encoding="utf-8"))
    for name, chat in CHATS.items():
        record = {"messages": chat}
        try:
            features = tokenize_example(record, tokenizer, template="tokenizer")
        except ValueError as error:
            assert "use template='plain'" in str(error), name
            plain = tokenize_example(record, tokenizer, template="plain")
            assert learned(tokenizer, plain).endswith(
                chat[-1]["content"] + "<|im_end|>"
            )
            continue
        text = tokenizer.decode(features["input_ids"])
        assert text == tokenizer.apply_chat_template(chat, tokenize=False), name
        asked = generation_prompt(record, tokenizer, template="tokenizer")
        assert asked == features["input_ids"][: begins(features)], name
        told = learned(tokenizer, features)
        for turn in chat:
            words = turn["content"].replace("<think>", "").split("</think>")
            for word in words * (turn["role"] == "assistant"):
                assert word.strip() in told, name


def test_a_thought_is_learned_as_qwen3_has_it():
    tokenizer = packaged("qwen3")
    for name in ("thought", "on one line", "no newline"):
        record = {"messages": CHATS[name]}
        features = tokenize_example(record, tokenizer, template="tokenizer")
        assert learned(tokenizer, features) == THOUGHT + "<|im_end|>\n"
        begun = tokenizer.decode(features["input_ids"][: begins(features)])
        assert begun.endswith("<|im_start|>assistant\n")
    pair = {"prompt": "2+2?", "completion": THOUGHT}
    same = tokenize_example(pair, tokenizer, template="tokenizer")
    assert same["input_ids"] == features["input_ids"]
    think = tokenizer.convert_tokens_to_ids("<think>")
    assert features["labels"].count(think) == 1


@pytest.mark.parametrize(
    ("name", "chat", "message"),
    [
        ("qwen3", "earlier", "leaves out 'two' of turn 2: take it out, end a record"),
        ("qwen3_6", "both", "leaves out 'two' of turn 2"),
        ("glm4moe_training", "earlier", "leaves out 'two' of turn 2"),
        ("deepseek_r1_distill", "thought", "leaves out 'two' of turn 2"),
        ("deepseekv3", "last", "leaves out 'two' of turn 4"),
        ("qwen3_5_nothink", "thought", "its own thought in turn 2: take the record's"),
        ("qwen3_8", "thought", "its own thought in turn 2"),
        ("nemotron_3_nano", "last", "its own thought in turn 4"),
        ("gemma", "system", "System role not supported"),
        ("glm4moe", "pair", "nothing after an answer to end it"),
    ],
)
def test_what_a_template_does_not_render_is_named_before_training(name, chat, message):
    rows = [{"messages": CHATS["pair"]}] * (name != "glm4moe")
    with pytest.raises(ValueError, match=f"row {len(rows)}: .*{message}.*'plain'"):
        rows += [{"messages": CHATS[chat]}]
        tokenize_dataset(rows, packaged(name), template="tokenizer")


def test_a_chat_is_continued_without_its_earlier_thoughts_as_the_template_has_it():
    for name in ("qwen3", "deepseek_r1_distill"):
        tokenizer = packaged(name)
        chat = CHATS["both"]
        asked = generation_prompt({"messages": chat}, tokenizer, template="tokenizer")
        text = tokenizer.decode(asked)
        own = tokenizer.apply_chat_template(chat[:3], tokenize=False)
        assert text.startswith(own) and "two" not in text


def test_a_prompt_that_the_template_rewrites_is_refused_as_in_training():
    tokenizer = with_template(
        "{% for m in messages %}{{ m.role + m.content | upper }}<|im_end|>{% endfor %}"
    )
    with pytest.raises(ValueError, match="rewrites 'Hello'"):
        generation_prompt("Hello", tokenizer, template="tokenizer")


def test_no_part_of_a_marker_is_learned_after_an_earlier_answer():
    tokenizer = packaged("gptoss")
    features = tokenize_example(
        {"messages": CHATS["chat"]}, tokenizer, template="tokenizer"
    )
    final = "<|channel|>final<|message|>"
    assert learned(tokenizer, features) == f"{final}Hello{final}4<|return|>"


# Which layout a model has, and who it is told that it is

IM = "{%% for m in messages %%}<|im_start|>{{ m.role }}%s{{ m.content }}<|im_end|>%s"
ASK = (
    "{%% endfor %%}{%% if add_generation_prompt %%}<|im_start|>assistant%s{%% endif %%}"
)
PHI4 = IM % ("<|im_sep|>", "") + ASK % "<|im_sep|>"
HERMES = "{{ bos_token }}" + IM % ("\n", "\n") + ASK % "\n"
TRIMS = (IM % ("\n", "\n") + ASK % "\n").replace("m.content", "m.content | trim")
DATED = "<|im_start|>system\n{{ strftime_now('%d %B') }}<|im_end|>\n" + HERMES
NO_NEWLINE = IM % ("\n", "") + ASK % "\n"
STARCHAT = (
    "{% for m in messages %}<|{{ m.role }}|>\n{{ m.content }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)
ANOTHER = CHATML.replace("SmolLM, trained by Hugging Face", "Yi")
PHI4_TOKENS, STARCHAT_TOKENS = ("<|im_sep|>",), ("<|user|>", "<|assistant|>", "<|end|>")
OTHERS = {
    "Phi-4": (PHI4, PHI4_TOKENS, "tokenizer"),
    "Hermes": (HERMES.replace("{{ bos_token }}", ""), (), "chatml"),
    "with a beginning": (HERMES, (), "chatml"),
    "another default": (ANOTHER, (), "chatml"),
    "trims": (TRIMS, (), "tokenizer"),
    "dated": (DATED, (), "tokenizer"),
    "no newline": (NO_NEWLINE, (), "tokenizer"),
    "StarChat": (STARCHAT, STARCHAT_TOKENS, "tokenizer"),
    "no template": (None, (), "chatml"),
    "Qwen2.5": ("qwen2_5", (), "chatml"),
    "Qwen3": ("qwen3", (), "tokenizer"),
    "Qwen3, 2507": ("qwen3_instruct_2507", (), "chatml"),
    "LFM2": ("lfm2", (), "chatml"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_another_model_has_its_own_layout_and_is_never_told_that_it_is_smollm(name):
    chat_template, tokens, expected = OTHERS[name]
    if chat_template and chat_template.isidentifier():
        tokenizer = packaged(chat_template)
    else:
        tokenizer = with_template(chat_template, *tokens)
    assert template_for(tokenizer) == expected
    records = [{"prompt": "A b", "completion": "4"}, {"messages": CHATS["chat"]}]
    for layout in [*TEMPLATES][: -1 if chat_template is None else None]:
        for record in records:
            ids = tokenize_example(record, tokenizer, template=layout)["input_ids"]
            assert "SmolLM" not in tokenizer.decode(ids), layout
            assert "SmolLM" not in format_prompt(record, layout, tokenizer=tokenizer)
            ids = generation_prompt(record, tokenizer, template=layout)
            assert "SmolLM" not in tokenizer.decode(ids), layout
    if chat_template:
        own = tokenizer.apply_chat_template(CHATS["chat"])["input_ids"]
        assert (
            tokenize_example(records[1], tokenizer, template=expected)["input_ids"]
            == own
        )


def test_the_built_in_model_and_lessons_without_a_tokenizer_keep_its_name():
    record = {"prompt": "A b", "completion": "4"}
    assert template_for(byte_tokenizer()) == "chatml"
    ids = tokenize_example(record, byte_tokenizer())["input_ids"]
    assert "named SmolLM" in byte_tokenizer().decode(ids)
    assert "named SmolLM" in format_prompt(record, "chatml")


@pytest.mark.parametrize("name", ["metaspace_first", "prefix_space", "word_piece"])
def test_a_base_model_without_a_template_gets_plain_text(name):
    made = TOKENIZERS[name]()
    tokenizer = wrap(made.backend_tokenizer, eos_token=made.eos_token)
    tokenizer.chat_template = None
    expected = "plain" if "<|im_end|>" not in tokenizer.get_vocab() else "chatml"
    assert template_for(tokenizer) == expected
    bare = wrap(Tokenizer.from_str(no_markers()), eos_token="!")
    assert template_for(bare) == "plain"
    record = {"prompt": "A b", "completion": "4"}
    with pytest.raises(ValueError, match="no <|im_start|>") as caught:
        tokenize_example(record, bare)
    assert "'tokenizer'" not in str(caught.value), "it has no template of its own"
    for layout in ("alpaca", "plain"):
        assert layout in str(caught.value)
        assert learned(bare, tokenize_example(record, bare, template=layout)) == "4!"
    few_shot = with_examples("chatml", [record], system="S")
    with pytest.raises(ValueError, match="no <|im_start|>"):
        generation_prompt("A", bare, template=few_shot)


def no_markers():
    """A byte-level tokenizer that knows no marker of any layout."""
    tokenizer = Tokenizer.from_str(byte_tokenizer().backend_tokenizer.to_str())
    text = tokenizer.to_str()
    for old, new in [("<|im_start|>", "<s>"), ("<|im_end|>", "</s>")]:
        text = text.replace(old, new)
    return text


# A tokenizer that is changed after its first use


def unchatty(make):
    """A copy of a tokenizer with a chat template, never used before."""
    made = copy.deepcopy(make())
    made.chat_template = made.chat_template or CHATML
    return made


def replace_template(tokenizer):
    tokenizer.chat_template = CHATML.replace("SmolLM", "Someone")


def replace_bos(tokenizer):
    tokenizer.chat_template = "{{ bos_token }}" + CHATML
    tokenize_example(GO, tokenizer, template="tokenizer")
    tokenizer.bos_token = "<|im_end|>"


def replace_eos(tokenizer):
    tokenizer.eos_token = "<|im_start|>"


def add_room(tokenizer):
    tokenizer.add_tokens(["KITCHEN"])


def add_marker(tokenizer):
    tokenizer.add_special_tokens({"additional_special_tokens": ["KITCHEN"]})


def make_special(tokenizer):
    tokenizer.add_tokens(["KITCHEN"])
    tokenize_example(GO, tokenizer, template="alpaca")
    tokenizer.add_tokens([AddedToken("KITCHEN", special=True)], special_tokens=True)


def lower_case(tokenizer):
    steps = [normalizers.Lowercase(), tokenizer.backend_tokenizer.normalizer]
    normalizer = normalizers.Sequence([step for step in steps if step])
    tokenizer.backend_tokenizer.normalizer = normalizer


def split_by_digits(tokenizer):
    old = tokenizer.backend_tokenizer.pre_tokenizer
    digits = pre_tokenizers.Digits(individual_digits=True)
    steps = pre_tokenizers.Sequence([digits, old]) if old else digits
    tokenizer.backend_tokenizer.pre_tokenizer = steps


def never_prepend(tokenizer):
    split = tokenizer.backend_tokenizer.pre_tokenizer
    if isinstance(split, pre_tokenizers.Metaspace):
        split.prepend_scheme = "never"


def no_beginning(tokenizer):
    tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()


def new_backend(tokenizer):
    state = json.loads(tokenizer.backend_tokenizer.to_str())
    state["model"]["merges"] = state["model"]["merges"][:5]
    tokenizer._tokenizer = Tokenizer.from_str(json.dumps(state))


CHANGES = [replace_template, replace_bos, replace_eos, add_room, add_marker]
CHANGES += [make_special, lower_case, split_by_digits, never_prepend, no_beginning]
GO = {"prompt": "Turn on 12", "completion": "go KITCHEN now 34"}


@pytest.mark.parametrize("name", TOKENIZERS)
@pytest.mark.parametrize("change", CHANGES, ids=lambda change: change.__name__)
def test_a_changed_tokenizer_is_read_anew(change, name):
    tokenizer = unchatty(TOKENIZERS[name])
    layouts = ["chatml", "alpaca", "llama2", "tokenizer"]
    before = [tokenize_example(GO, tokenizer, template=layout) for layout in layouts]
    change(tokenizer)
    fresh = copy.deepcopy(tokenizer)
    after = [tokenize_example(GO, tokenizer, template=layout) for layout in layouts]
    assert after == [tokenize_example(GO, fresh, template=layout) for layout in layouts]
    if change in (add_room, replace_template):
        assert after != before, "the test can fail"


@pytest.mark.parametrize("make", [metaspace, prepended, lambda: metaspace("always")])
def test_an_added_token_is_seen_in_the_answer(make):
    tokenizer = copy.deepcopy(make())
    tokenize_example(GO, tokenizer, template="alpaca")
    tokenizer.add_tokens(["KITCHEN"])
    room = tokenizer.convert_tokens_to_ids("KITCHEN")
    assert tokenize_example(GO, tokenizer, template="alpaca")["labels"].count(room) == 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["KITCHEN"]})
    labels = tokenize_example(GO, tokenizer, template="alpaca")["labels"]
    assert labels.count(room) == 0, "a typed marker is text"


def test_another_backend_is_read_anew():
    tokenizer = copy.deepcopy(metaspace())
    before = tokenize_example(GO, tokenizer, template="plain")
    new_backend(tokenizer)
    after = tokenize_example(GO, tokenizer, template="plain")
    fresh = copy.deepcopy(tokenizer)
    assert before != after == tokenize_example(GO, fresh, template="plain")


class Letters(PreTrainedTokenizer):
    """A tokenizer in Python: one token a character."""

    first = ""

    def __init__(self, **names):
        super().__init__(**names)

    @property
    def vocab_size(self):
        return 300

    def get_vocab(self):
        letters = {chr(i): i for i in range(300)}
        return letters | self.added_tokens_encoder

    def _tokenize(self, text, **_):
        return list(self.first + text)

    def _convert_token_to_id(self, token):
        return min(ord(token), 299)

    def _convert_id_to_token(self, index):
        return chr(index)


def test_a_tokenizer_in_python_works_or_is_refused():
    tokenizer = Letters(eos_token="</s>")
    features = tokenize_example(GO, tokenizer, template="plain")
    ids = [*map(ord, GO["completion"]), tokenizer.eos_token_id]
    assert [i for i in features["labels"] if i != -100] == ids
    typed = tokenize_example(GO | {"completion": "</s>"}, tokenizer, template="plain")
    assert typed["labels"].count(tokenizer.eos_token_id) == 1
    tokenizer = Letters(eos_token="</s>")
    tokenizer.first = "▁"
    with pytest.raises(
        ValueError, match="slow tokenizer: load it with a tokenizer.json"
    ):
        tokenize_example(GO, tokenizer, template="plain")


# Fields of a record

UNREAD = {
    "reasoning_content": "two and two",
    "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": "{}"}}],
    "function_call": {"name": "f", "arguments": "{}"},
    "weight": 0,
    "train": False,
    "thinking": "hm",
    "prefix": True,
    "name": "Ann",
}


@pytest.mark.parametrize("field", UNREAD)
def test_a_field_of_a_turn_that_would_be_dropped_is_named(field):
    chat = [*CHATS["pair"][:1], ANSWER("4") | {field: UNREAD[field]}]
    forms = [{"messages": chat}, {"prompt": chat[:1], "completion": chat[1:]}]
    for record in forms:
        for layout in ("chatml", "plain", "tokenizer"):
            with pytest.raises(ValueError, match=f"row 0: {field} of turn 2 would not"):
                tokenize_dataset([record], byte_tokenizer(), template=layout)
        with pytest.raises(ValueError, match=f"{field} of turn 2"):
            generation_prompt(record, byte_tokenizer())
    with pytest.raises(ValueError, match="tools would not be learned"):
        tokenize_example({"messages": CHATS["pair"], "tools": [{}]}, byte_tokenizer())
    for nothing in (None, "", [], {}):
        chat[1][field] = nothing
        same = tokenize_example({"messages": chat}, byte_tokenizer())
        assert same == tokenize_example({"messages": CHATS["pair"]}, byte_tokenizer())


def test_a_thought_put_into_the_content_is_learned_as_its_own_field_is_rendered():
    tokenizer = packaged("qwen3")
    own = tokenizer.apply_chat_template(
        [USER("2+2?"), ANSWER("4") | {"reasoning_content": "two"}]
    )["input_ids"]
    record = {"messages": CHATS["thought"]}
    assert tokenize_example(record, tokenizer, template="tokenizer")["input_ids"] == own


def parts(*texts):
    return [{"type": "text", "text": text} for text in texts]


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [USER(parts("2+", "2?")), ANSWER("4")]},
        {"messages": [USER(["2+2?"]), ANSWER(parts("4"))]},
        {"messages": [USER([parts("2+2?")[0] | {"image": None}]), ANSWER("4")]},
        {"prompt": [USER("2+2?")], "completion": [ANSWER(parts("4"))]},
        {"prompt": [USER("2+2?")], "completion": "4"},
        {"prompt": "2+2?", "completion": [ANSWER("4")]},
        {"prompt": "2+2?", "completion": "4", "messages": CHATS["pair"]},
        {"prompt": "2+2?", "completion": "4", "messages": None, "history": []},
        {"prompt": "2+2?", "completion": "4", "tools": "[]", "system": " "},
        {"messages": CHATS["pair"], "tools": None, "system": None},
    ],
)
def test_texts_in_parts_and_mixed_forms_are_the_same_record(record):
    wanted = tokenize_example({"messages": CHATS["pair"]}, byte_tokenizer())
    assert tokenize_example(record, byte_tokenizer()) == wanted


@pytest.mark.parametrize(
    "content",
    [
        *(None, 7, [{"type": "image"}], [*parts("a"), {"type": "image_url"}]),
        *([{"type": "reasoning", "text": "two"}], [{"type": "text"}], [None]),
    ],
)
def test_a_content_that_is_no_text_is_refused(content):
    with pytest.raises(ValueError, match="the user turn's content is not text"):
        tokenize_example({"messages": [USER(content), ANSWER("4")]}, byte_tokenizer())


def test_system_text_and_history_beside_a_pair_are_learned_or_refused():
    tokenizer, pair = byte_tokenizer(), {"prompt": "2+2?", "completion": "4"}
    turns = [SYSTEM("Be brief."), *CHATS["chat"]]
    wanted = tokenize_example({"messages": turns}, tokenizer)
    assert tokenize_example(pair | {"messages": turns}, tokenizer) == wanted
    record = {"messages": CHATS["chat"], "system": "Be brief."}
    assert tokenize_example(record, tokenizer) == wanted
    short = tokenize_example({"messages": CHATS["system"]}, tokenizer)
    assert tokenize_example(pair | {"system": "Be brief."}, tokenizer) == short
    for more in ({"history": [["Hi", "Hello"]]}, {"system_prompt": "Be brief."}):
        with pytest.raises(ValueError, match="would not be learned|into messages"):
            tokenize_example(pair | more, tokenizer)
    alpaca = {"instruction": "Add", "input": "2 2", "output": "4"}
    joined = {"prompt": "Add\n\n2 2", "completion": "4"}
    turns = [*turns[:3], USER("Add\n\n2 2"), ANSWER("4")]
    record = alpaca | joined | {"messages": turns}
    text = format_prompt(record, "alpaca", tokenizer=tokenizer)
    assert text.startswith("Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello")
    assert text.endswith("Add\n\n### Input:\n2 2\n\n### Response:\n")


@pytest.mark.parametrize("more", [{"system": "S"}, {"messages": CHATS["system"]}, {}])
def test_what_is_scored_is_asked_as_it_was_trained(monkeypatch, more):
    asked = []

    def fake(model, tokenizer, prompts, **options):
        asked.extend(prompts)
        return ["4"] * len(prompts)

    monkeypatch.setattr(evaluation, "generate", fake)
    record = {"prompt": "2+2?", "completion": "4"} | more
    evaluation.evaluate(None, byte_tokenizer(), [record], as_text=True)
    assert asked == [record]
