"""Templates, labels, truncation, padding and packing."""

import copy
import functools
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from small_models import CHATML
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from course_utils import templates
from course_utils.formatting import (
    TEMPLATES,
    CompletionCollator,
    _end_of_turn_suffix,
    end_of_turn_ids,
    format_prompt,
    generation_prompt,
    pack_examples,
    tokenize_dataset,
    tokenize_example,
    with_examples,
)

CORPUS = [
    "Turn on the kitchen light and set it to 40 percent, please.",
    '{"action": "set_light", "room": "kitchen", "brightness": 40}',
    "Human: Assistant: user assistant system ### Instruction: Response: Input:",
    "把客厅的灯打开。 What is the capital of France? The capital is Paris.",
] * 3
IM = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]


def special(names):
    return [AddedToken(name, special=True, normalized=False) for name in names]


def wrap(tokenizer, **names):
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


@functools.cache
def byte_level():
    """Like the built-in model's: bos is <|im_start|>, eos = pad = <|im_end|>."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=450,
        special_tokens=special(IM),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    made = wrap(
        tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    made.chat_template = CHATML
    return made


@functools.cache
def metaspace(scheme="first"):
    """Like Llama 2's: word-initial spaces, bytes for the unknown, <s> in front."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(
        prepend_scheme=scheme, split=False
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=700,
        special_tokens=special(["<unk>", "<s>", "</s>", *IM[1:]])
        + [f"<0x{byte:02X}>" for byte in range(256)],
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
    )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def prepended():
    """The same by normalizers, as in older conversions."""
    tokenizer = Tokenizer.from_str(metaspace().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = None
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def prefix_space():
    """Byte-level with a space put before a text's first word."""
    tokenizer = Tokenizer.from_str(byte_level().backend_tokenizer.to_str())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    return wrap(tokenizer, eos_token="<|im_end|>")


@functools.cache
def unigram():
    """Its ordinary vocabulary holds </s> too, as converted SentencePiece models do."""
    pieces = [("<unk>", 0.0), ("<s>", 0.0), ("</s>", 0.0), ("▁", -2.0), ("▁the", -3.0)]
    pieces += [(chr(c), -5.0) for c in range(33, 127)]
    pieces += [(f"<0x{byte:02X}>", -9.0) for byte in range(256)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0, byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always")
    tokenizer.decoder = decoders.Sequence(
        [decoders.ByteFallback(), decoders.Metaspace(prepend_scheme="always")]
    )
    tokenizer.add_special_tokens(special(["<unk>", "<s>", "</s>", *IM[1:]]))
    return wrap(tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


@functools.cache
def word_piece():
    """Like BERT's: lower case, no white space, unknown words; loses text."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *IM[1:]]
    trainer = trainers.WordPieceTrainer(vocab_size=300, special_tokens=special(names))
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return wrap(
        tokenizer,
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        eos_token="[SEP]",
        pad_token="[PAD]",
    )


@pytest.fixture(scope="session")
def builtin():
    from course_utils.models import load_tokenizer

    return load_tokenizer()


TOKENIZERS = {
    "byte_level": byte_level,
    "metaspace_first": metaspace,
    "metaspace_always": functools.partial(metaspace, "always"),
    "prepended": prepended,
    "prefix_space": prefix_space,
    "unigram": unigram,
    "word_piece": word_piece,
}
BUILT = ["chatml", "alpaca", "llama2", "plain"]
LIGHT = {
    "prompt": "Kitchen light on",
    "completion": '{"action": "set_light", "room": "kitchen"}',
}
LOOK_ALIKES = (
    "<|im_end|>",
    "<|im_start|>assistant\n",
    "<s>",
    "</s>",
    "[SEP]",
    "[INST]",
    "<|endoftext|>",
    "<0x41>",
)
TEXTS = st.one_of(
    st.text(),
    st.lists(st.one_of(st.text(max_size=4), st.sampled_from(LOOK_ALIKES))).map("".join),
)


def learned(features):
    return [label for label in features["labels"] if label != -100]


def text_ids(tokenizer, text):
    return tokenizer(
        text, add_special_tokens=False, split_special_tokens=True
    ).input_ids


def check_labels(name, template, prompt, completion):
    """The labels are the completion and its end of turn, and nothing else."""
    tokenizer = TOKENIZERS[name]()
    assume(text_ids(tokenizer, completion))
    assume(name != "unigram" or "<0x" not in completion)  # its names for bytes
    example = {"prompt": prompt, "completion": completion}
    features = tokenize_example(example, tokenizer, template=template)
    ids, labels = features["input_ids"], features["labels"]
    start = labels.count(-100)
    assert labels == [-100] * start + ids[start:]
    assert ids[:start] == generation_prompt(prompt, tokenizer, template=template)
    suffix = _end_of_turn_suffix(tokenizer, template)
    answer = ids[start : len(ids) - len(suffix)]
    assert ids[len(ids) - len(suffix) :] == suffix
    stops = set(end_of_turn_ids(tokenizer, template))
    assert stops.isdisjoint(answer)
    if name in ("byte_level", "prefix_space"):
        assert tokenizer.decode(answer) == completion
        assert name != "byte_level" or answer == text_ids(tokenizer, completion)
    elif name == "word_piece":  # which loses text
        expected = tokenizer.decode(text_ids(tokenizer, completion))
        assert tokenizer.decode(answer) == expected
    else:
        # These decoders drop one space where a text begins; an answer begins none.
        context = tokenizer.convert_tokens_to_ids("<0x0A>")
        expected = "\n" + completion.replace("▁", " ")  # their sign for a space
        assert tokenizer.decode([context, *answer]) == expected


FEW = settings(max_examples=200)
MANY = settings(max_examples=2000, derandomize=False)


@pytest.mark.parametrize("name", TOKENIZERS)
@FEW
@given(st.sampled_from(BUILT), TEXTS, TEXTS.filter(bool))
def test_labels_are_the_completion_for_any_text(name, template, prompt, completion):
    check_labels(name, template, prompt, completion)


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("name", TOKENIZERS)
@MANY
@given(st.sampled_from(BUILT), TEXTS, TEXTS.filter(bool))
def test_labels_are_the_completion_for_very_many_texts(
    name, template, prompt, completion
):
    check_labels(name, template, prompt, completion)


# Templates


def test_the_text_of_each_template():
    alpaca = {"instruction": "Sort", "input": "b a", "output": "a b"}
    assert format_prompt(LIGHT, "plain") == "Human: Kitchen light on\n\nAssistant: "
    assert format_prompt(LIGHT, "llama2") == "[INST] Kitchen light on [/INST] "
    assert format_prompt(LIGHT, "llama2", system="Be brief.") == (
        "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nKitchen light on [/INST] "
    )
    assert format_prompt(LIGHT, "chatml") == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by "
        "Hugging Face<|im_end|>\n<|im_start|>user\nKitchen light on<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert format_prompt(alpaca, "alpaca") == (
        "Below is an instruction that describes a task, paired with an input that "
        "provides further context. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nSort\n\n### Input:\nb a\n\n### Response:\n"
    )
    assert format_prompt({**alpaca, "input": ""}, "alpaca") == (
        "Below is an instruction that describes a task. Write a response that "
        "appropriately completes the request.\n\n### Instruction:\nSort\n\n"
        "### Response:\n"
    )
    assert format_prompt(alpaca, "plain") == "Human: Sort\n\nb a\n\nAssistant: "


def test_unknown_template_and_unreadable_records_are_named():
    with pytest.raises(ValueError, match="'gpt'.*'chatml'.*'tokenizer'"):
        format_prompt(LIGHT, "gpt")
    with pytest.raises(ValueError, match=r"its fields are \['question'\]"):
        format_prompt({"question": "?"}, "plain")
    with pytest.raises(ValueError, match="found int: 7"):
        format_prompt({"prompt": 7}, "plain")
    turns = [{"role": "assistant", "content": "Hi"}]
    with pytest.raises(ValueError, match=r"alternate.*\['assistant'\]"):
        format_prompt({"messages": turns}, "plain")


def own_rendering(tokenizer, example, **options):
    messages = [
        {"role": "user", "content": example["prompt"]},
        {"role": "assistant", "content": example["completion"]},
    ]
    return tokenizer.apply_chat_template(messages, **options)["input_ids"]


ORDINARY = st.text(
    st.characters(codec="utf-8", exclude_characters="<"), min_size=1, max_size=60
)


@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
@FEW
@given(ORDINARY, ORDINARY)
def test_chatml_is_the_tokenizers_own_rendering(template, prompt, completion):
    """White space that begins an answer may join the newline before it, there only."""
    assume(not completion[0].isspace())
    example = {"prompt": prompt, "completion": completion}
    features = tokenize_example(example, byte_level(), template=template)
    assert features["input_ids"] == own_rendering(byte_level(), example)


@pytest.mark.model
@pytest.mark.parametrize("template", ["chatml", "tokenizer"])
def test_chatml_is_the_built_in_models_own_rendering(builtin, template):
    texts = [*CORPUS[:4], "  two spaces", "\n\nlines\n", "tab\t", "emoji 🙂", "x" * 300]
    for prompt in texts:
        for completion in [text.strip() for text in texts]:
            example = {"prompt": prompt, "completion": completion}
            features = tokenize_example(example, builtin, template=template)
            assert features["input_ids"] == own_rendering(builtin, example)
            assert builtin.decode(learned(features)) == completion + "<|im_end|>\n"
    assert _end_of_turn_suffix(builtin, "chatml") == builtin("<|im_end|>\n").input_ids


def test_chatml_keeps_another_models_default_system_turn():
    tokenizer = byte_level()
    other = wrap(tokenizer.backend_tokenizer, eos_token="<|im_end|>")
    other.chat_template = CHATML.replace("SmolLM, trained by", "Someone, made by")
    features = tokenize_example(LIGHT, other)
    assert features["input_ids"] == own_rendering(other, LIGHT)
    assert "Someone" in other.decode(features["input_ids"])
    other.chat_template = CHATML.replace("loop.first and", "false and")
    assert "system" not in other.decode(tokenize_example(LIGHT, other)["input_ids"])


def test_chatml_needs_its_tokens():
    tokenizer = Tokenizer(models.WordLevel({"a": 0, "</s>": 1}, unk_token="a"))
    made = wrap(tokenizer, eos_token="</s>", unk_token="a")
    with pytest.raises(ValueError, match="no <|im_start|> .* use template='tokenizer'"):
        tokenize_example(LIGHT, made)
    with pytest.raises(ValueError, match="carries|chat template"):
        tokenize_example(LIGHT, made, template="tokenizer")


OWN = {
    "bos, header, trim": (
        "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n\n"
        "{{ m.content | trim }}<|im_end|>{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n\n{% endif %}"
    ),
    "inst": (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
        "{{ '[INST] ' + m.content.strip() + ' [/INST]' }}{% else %}"
        "{{ ' ' + m.content.strip() + ' ' + eos_token }}{% endif %}{% endfor %}"
    ),
    "text headers": (
        "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + eos_token + "
        "'\n' }}{% endfor %}{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    ),
    "think": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n"
        "{% if m.role == 'assistant' and loop.last %}<think>\n\n</think>\n\n{% endif %}"
        "{{ m.content }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    ),
}
CHAT = [
    {"role": "user", "content": "Turn on the light"},
    {"role": "assistant", "content": "Which light?"},
    {"role": "user", "content": " kitchen "},
    {"role": "assistant", "content": "Done."},
]
HINTS = {
    "bos, header, trim": ["Which light?<|im_end|>", "Done.<|im_end|>"],
    "inst": [" Which light? </s>", " Done. </s>"],
    "text headers": ["Which light?</s>\n", "Done.</s>\n"],
    "think": ["Which light?<|im_end|>\n", "<think>\n\n</think>\n\nDone.<|im_end|>\n"],
}


def spans(features):
    """The stretches of learned ids."""
    out, inside = [], False
    for label in features["labels"]:
        if label != -100 and not inside:
            out.append([])
        inside = label != -100
        if inside:
            out[-1].append(label)
    return out


@pytest.mark.parametrize("name", ["metaspace_first", "metaspace_always", "prepended"])
@pytest.mark.parametrize("own", OWN)
def test_any_chat_template(own, name):
    tokenizer = copy.deepcopy(TOKENIZERS[name]())
    tokenizer.chat_template = OWN[own]
    features = tokenize_example({"messages": CHAT}, tokenizer, template="tokenizer")
    newline = tokenizer.convert_tokens_to_ids("<0x0A>")

    def decode(ids):  # with something before it, so that no first space is dropped
        return tokenizer.decode([newline, *ids])[1:].replace("> \n", ">\n")

    assert features["input_ids"] == tokenizer.apply_chat_template(CHAT)["input_ids"]
    assert [decode(span) for span in spans(features)] == HINTS[own]
    prompt = CHAT[0]["content"]
    one = {"prompt": prompt, "completion": "Which light?"}
    single = tokenize_example(one, tokenizer, template="tokenizer")
    start = single["labels"].count(-100)
    begun = generation_prompt(prompt, tokenizer, template="tokenizer")
    assert begun == single["input_ids"][:start]
    asked = tokenizer.apply_chat_template(CHAT[:1], add_generation_prompt=True)
    assert begun == asked["input_ids"]
    assert end_of_turn_ids(tokenizer, "tokenizer")[0] in learned(single)


@pytest.mark.parametrize(
    ("chat_template", "message"),
    [
        ("{{ messages[-1].content }}<|im_end|>", "leaves out .* of turn 1"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "nothing after"),
        ("{% for m in messages %}{{ m.content | upper }}</s>{% endfor %}", "rewrites"),
    ],
)
def test_chat_templates_that_cannot_be_learned_from(chat_template, message):
    tokenizer = copy.deepcopy(metaspace())
    tokenizer.chat_template = chat_template
    with pytest.raises(ValueError, match=message):
        tokenize_example({"messages": CHAT}, tokenizer, template="tokenizer")


# Several turns


@pytest.mark.parametrize("template", BUILT)
def test_every_answer_of_a_chat_is_learned_with_its_end(template):
    tokenizer = byte_level()
    features = tokenize_example({"messages": CHAT}, tokenizer, template=template)
    end = "<|im_end|>\n" if template == "chatml" else "<|im_end|>"
    answers = ["Which light?" + end, "Done." + end]
    assert [tokenizer.decode(span) for span in spans(features)] == answers
    text = format_prompt({"messages": CHAT}, template, tokenizer=tokenizer)
    assert tokenizer.decode(features["input_ids"]) == text + "Done." + end
    for i, label in zip(features["input_ids"], features["labels"], strict=True):
        assert label in (-100, i)


def test_system_text_of_the_record_comes_first():
    tokenizer = byte_level()
    turns = [{"role": "system", "content": "Be brief."}, *CHAT]
    features = tokenize_example({"messages": turns}, tokenizer, system="Be long.")
    own = tokenizer.apply_chat_template(turns)["input_ids"]
    assert features["input_ids"] == own
    features = tokenize_example({"messages": CHAT}, tokenizer, system="Be brief.")
    assert features["input_ids"] == own


def test_the_conversational_form_of_prompt_and_completion():
    record = {"prompt": CHAT[:3], "completion": CHAT[3:]}
    assert tokenize_example(record, byte_level()) == tokenize_example(
        {"messages": CHAT}, byte_level()
    )


def test_bos_comes_where_the_tokenizer_puts_it():
    tokenizer = metaspace()
    ids = tokenize_example(LIGHT, tokenizer, template="plain")["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    prompt = tokenizer(format_prompt(LIGHT, "plain")).input_ids
    assert ids[: len(prompt)] == prompt
    chat = tokenize_example({"messages": CHAT}, tokenizer, template="llama2")
    assert chat["input_ids"].count(tokenizer.bos_token_id) == 2
    assert tokenize_example(LIGHT, word_piece(), template="plain")["input_ids"][0] == 2


# Never an example with nothing to learn


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "Hi"},
        {"prompt": "Hi", "completion": ""},
        {"prompt": "Hi", "completion": None},
        {"messages": CHAT[:3]},
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}, *CHAT[2:]]},
    ],
)
def test_nothing_to_learn_is_refused(record):
    with pytest.raises(ValueError, match="nothing to learn"):
        tokenize_example(record, byte_level())


def test_an_answer_without_tokens_is_refused():
    with pytest.raises(ValueError, match="nothing to learn: no token stands for"):
        tokenize_example({"prompt": "Hi", "completion": " \n"}, word_piece())


def test_no_end_of_sequence_token_is_refused():
    tokenizer = wrap(byte_level().backend_tokenizer)
    with pytest.raises(ValueError, match="set tokenizer.eos_token"):
        tokenize_example(LIGHT, tokenizer, template="plain")


# Look-alikes


@pytest.mark.parametrize("template", BUILT)
@pytest.mark.parametrize("name", TOKENIZERS)
def test_typed_special_tokens_are_text(name, template):
    tokenizer = TOKENIZERS[name]()
    plain = tokenize_example(LIGHT, tokenizer, template=template)["input_ids"]
    typed = "".join(LOOK_ALIKES)
    record = {"prompt": typed, "completion": typed}
    ids = tokenize_example(record, tokenizer, template=template)["input_ids"]
    for token in set(tokenizer.all_special_ids) - {tokenizer.unk_token_id}:
        assert ids.count(token) == plain.count(token)
    # The test can fail: read without care, the same text gives special tokens.
    careless = tokenizer(typed, add_special_tokens=False).input_ids
    assert set(careless) & set(tokenizer.all_special_ids)


@pytest.mark.model
def test_the_built_in_models_special_tokens_are_text_when_typed(builtin):
    typed = " ".join(builtin.all_special_tokens) + "<|im_end|>\n<|im_start|>user\n"
    features = tokenize_example({"prompt": typed, "completion": typed}, builtin)
    plain = tokenize_example(LIGHT, builtin)["input_ids"]
    for token in builtin.all_special_ids:
        assert features["input_ids"].count(token) == plain.count(token)
    assert builtin.decode(learned(features)) == typed + "<|im_end|>\n"


def test_added_tokens_in_a_template_may_swallow_white_space():
    tokenizer = byte_level()
    other = wrap(
        Tokenizer.from_str(tokenizer.backend_tokenizer.to_str()), eos_token="<|end|>"
    )
    other.add_special_tokens(
        {
            "additional_special_tokens": [
                AddedToken("<|user|>", rstrip=True, special=True),
                AddedToken("<|bot|>", rstrip=True, special=True),
                AddedToken("<|end|>", rstrip=True, special=True),
            ]
        }
    )
    other.chat_template = (
        "{% for m in messages %}{{ '<|user|>\n' if m.role == 'user' else '<|bot|>\n' }}"
        "{{ m.content + '<|end|>\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|bot|>\n' }}{% endif %}"
    )
    features = tokenize_example({"messages": CHAT}, other, template="tokenizer")
    assert features["input_ids"] == other.apply_chat_template(CHAT)["input_ids"]


# Too long


@FEW
@given(st.sampled_from(BUILT), st.text(max_size=200), st.integers(0, 120))
def test_a_long_prompt_is_cut_from_its_left(template, prompt, room):
    tokenizer = byte_level()
    record = {"prompt": prompt, "completion": "Done."}
    whole = tokenize_example(record, tokenizer, template=template)
    empty = tokenize_example({**record, "prompt": ""}, tokenizer, template=template)
    limit = len(empty["input_ids"]) + room
    cut = tokenize_example(record, tokenizer, template=template, max_length=limit)
    assert len(cut["input_ids"]) <= limit
    assert learned(cut) == learned(whole)
    tails = [
        tokenize_example({**record, "prompt": prompt[k:]}, tokenizer, template=template)
        for k in range(len(prompt) + 1)
    ]
    kept = tails.index(cut)  # exactly what a shorter prompt would have given
    if len(whole["input_ids"]) <= limit:
        assert kept == 0
    else:  # and one character more would not have fitted
        assert len(tails[kept - 1]["input_ids"]) > limit


def test_given_system_text_is_cut_after_the_users():
    tokenizer = byte_level()
    record = {"prompt": "user " * 20, "completion": "Done."}
    bare = {**record, "prompt": ""}
    limit = len(tokenize_example(bare, tokenizer, system="be brief")["input_ids"])
    whole = "be brief"
    cut = tokenize_example(record, tokenizer, system=whole, max_length=limit)
    assert "system\nbe brief<|im_end|>" in tokenizer.decode(cut["input_ids"])
    cut = tokenize_example(record, tokenizer, system=whole, max_length=limit - 2)
    assert "system\nbe brief" not in tokenizer.decode(cut["input_ids"])
    assert len(cut["input_ids"]) <= limit - 2


def test_a_completion_that_does_not_fit_is_refused():
    tokenizer = byte_level()
    whole = tokenize_example(LIGHT, tokenizer, template="plain")
    empty = tokenize_example({**LIGHT, "prompt": ""}, tokenizer, template="plain")
    n, marks = len(learned(whole)), empty["labels"].count(-100)
    limit = len(empty["input_ids"])
    tokenize_example(LIGHT, tokenizer, template="plain", max_length=limit)
    message = f"has {n} tokens .* markers {marks}, .*max_length={limit - 1}: raise"
    with pytest.raises(ValueError, match=message):
        tokenize_example(LIGHT, tokenizer, template="plain", max_length=limit - 1)


def test_a_long_chat_loses_its_oldest_exchanges():
    tokenizer = byte_level()
    turns = [{"role": "system", "content": "Be brief."}, *CHAT]
    last = {"messages": [turns[0], *turns[3:]]}
    expected = tokenize_example(last, tokenizer)
    whole = len(tokenize_example({"messages": turns}, tokenizer)["input_ids"])
    cut = tokenize_example({"messages": turns}, tokenizer, max_length=whole - 1)
    assert cut == expected
    shorter = len(expected["input_ids"]) - 1
    cut = tokenize_example({"messages": turns}, tokenizer, max_length=shorter)
    assert len(cut["input_ids"]) <= shorter
    assert learned(cut) == learned(expected)


# Data sets


def test_tokenize_dataset_is_tokenize_example_row_by_row():
    rows = [{**LIGHT, "prompt": f"Light {i}", "slice": "train"} for i in range(5)]
    made = tokenize_dataset(rows, byte_level(), template="plain", max_length=40)
    assert made.column_names == ["input_ids", "labels", "attention_mask"]
    assert made[3] == tokenize_example(
        rows[3], byte_level(), template="plain", max_length=40
    )
    rows[4]["completion"] = ""
    with pytest.raises(ValueError, match="row 4: nothing to learn"):
        tokenize_dataset(rows, byte_level())


# Padding


def features_of_two_lengths():
    return [
        tokenize_example(LIGHT, byte_level()),
        tokenize_example({**LIGHT, "prompt": "On"}, byte_level()),
    ]


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("multiple", [None, 8])
def test_padding_is_by_position_where_pad_is_eos(side, multiple):
    tokenizer = byte_level()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    examples = features_of_two_lengths()
    collate = CompletionCollator(
        tokenizer, pad_to_multiple_of=multiple, padding_side=side
    )
    batch = collate(examples)
    lengths = [len(example["input_ids"]) for example in examples]
    width = max(lengths) if multiple is None else -(-max(lengths) // 8) * 8
    for name, padding in [("input_ids", 2), ("labels", -100), ("attention_mask", 0)]:
        assert batch[name].shape == (2, width)
        assert batch[name].dtype == torch.int64
        for row, example in zip(batch[name].tolist(), examples, strict=True):
            extra = [padding] * (width - len(example[name]))
            values = example[name]
            assert row == (values + extra if side == "right" else extra + values)
    for labels in batch["labels"].tolist():
        assert labels.count(tokenizer.eos_token_id) == 1  # the real end of turn


def test_collator_refuses_another_side_and_pads_without_a_pad_token():
    with pytest.raises(ValueError, match="'up'"):
        CompletionCollator(byte_level(), padding_side="up")
    tokenizer = wrap(byte_level().backend_tokenizer)
    batch = CompletionCollator(tokenizer)(features_of_two_lengths())
    assert batch["input_ids"][1, -1] == 0


# Packing

EXAMPLES = st.lists(
    st.lists(st.integers(3, 99), min_size=1, max_size=12).map(
        lambda ids: {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}
    ),
    max_size=20,
)


@FEW
@given(EXAMPLES, st.integers(12, 30))
def test_packing_loses_no_token(examples, max_length):
    rows = pack_examples(examples, max_length)
    assert rows == pack_examples(examples, max_length)
    documents = []
    for row in rows:
        assert len(row["input_ids"]) <= max_length
        positions = zip(*(row[name] for name in row), strict=True)
        for token, label, position in positions:
            if position == 0:
                documents.append([])
                assert label == -100
            else:
                assert label == token
            assert position == len(documents[-1])
            documents[-1].append(token)
    given_ids = [example["input_ids"] for example in examples]
    assert sorted(documents) == sorted(given_ids)


def test_packing_fills_rows_and_refuses_what_cannot_fit():
    made = [{"input_ids": [5] * n, "labels": [5] * n} for n in (3, 7, 5, 4)]
    rows = pack_examples(made, 10)
    assert [len(row["input_ids"]) for row in rows] == [10, 9]
    with pytest.raises(ValueError, match="example 1 has 7 tokens: give each 1 to 6"):
        pack_examples(made, 6)


@functools.cache
def tiny_llama():
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=500,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        initializer_range=0.5,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).eval()


@torch.no_grad()
def test_a_packed_document_has_the_logits_it_has_alone():
    model = tiny_llama()
    examples = features_of_two_lengths()
    alone = [
        model(torch.tensor([example["input_ids"]])).logits[0] for example in examples
    ]
    [row] = pack_examples(examples, 400)
    batch = CompletionCollator(byte_level(), pad_to_multiple_of=64)([row])
    assert set(batch) == {"input_ids", "labels", "position_ids"}
    padding = list(range(batch["labels"].shape[1] - len(row["labels"])))
    assert batch["position_ids"][0].tolist() == row["position_ids"] + padding
    packed = model(**batch, use_cache=False).logits[0]
    start = 0
    for logits in alone:
        part = packed[start : start + len(logits)]
        torch.testing.assert_close(part, logits, atol=1e-4, rtol=0)
        start += len(logits)
    joined = torch.tensor([row["input_ids"]])
    naive = model(joined, use_cache=False).logits[0]
    first = len(alone[0])
    assert (naive[:first] - alone[0]).abs().max() < 1e-4
    assert (naive[first:] - alone[1]).abs().max() > 0.1


@torch.no_grad()
def test_packing_two_rows_in_a_batch_gives_the_loss_of_the_documents():
    """Token by token, the packed loss is the loss of the documents one by one."""
    model = tiny_llama()
    examples = features_of_two_lengths() * 3
    rows = pack_examples(examples, 3 * len(examples[0]["input_ids"]))
    assert len(rows) == 2
    batch = CompletionCollator(byte_level())(rows)
    losses = [
        (model(**CompletionCollator(byte_level())([e])).loss, len(learned(e)))
        for e in examples
    ]
    expected = sum(loss * n for loss, n in losses) / sum(n for _, n in losses)
    packed = model(**batch, use_cache=False).loss
    torch.testing.assert_close(packed, expected, atol=1e-4, rtol=0)


def test_all_templates_are_tested():
    assert [*BUILT, "tokenizer"] == [*TEMPLATES]


@pytest.mark.model
def test_worked_examples_are_earlier_turns_of_the_chat():
    from course_utils.models import load_tokenizer

    tokenizer = load_tokenizer()
    shots = [{"prompt": "one", "completion": "1"}, {"prompt": "two", "completion": "2"}]
    layout = with_examples("chatml", shots, system="Count.")
    chat = [{"role": "system", "content": "Count."}]
    for shot in shots:
        chat.append({"role": "user", "content": shot["prompt"]})
        chat.append({"role": "assistant", "content": shot["completion"]})
    chat.append({"role": "user", "content": "three"})
    text = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, tokenize=False
    )
    expected = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert generation_prompt("three", tokenizer, template=layout) == expected


@pytest.mark.model
def test_worked_examples_stay_below_other_system_text(builtin):
    shots = [{"prompt": "one", "completion": "1"}]
    layout = with_examples("chatml", shots, system="Count.")
    text = builtin.decode(
        generation_prompt("two", builtin, template=layout, system="S")
    )
    assert text.startswith("<|im_start|>system\nS<|im_end|>\n<|im_start|>user\none")
    assert "Count." not in text and text.count("<|im_start|>user") == 2


def test_prompt_and_completion_are_the_record_whatever_stands_beside_them():
    tokenizer = byte_level()
    record = {"prompt": "p", "completion": "right"}
    wanted = tokenize_example(record, tokenizer)
    chat = [{"role": "user", "content": "o"}, {"role": "assistant", "content": "wrong"}]
    assert tokenize_example(record | {"messages": chat}, tokenizer) == wanted
    alpaca = tokenize_example(record, tokenizer, template="alpaca")
    noted = record | {"instruction": "Annotator: easy", "output": "wrong"}
    assert tokenize_example(noted, tokenizer, template="alpaca") == alpaca


def test_a_record_is_asked_as_it_was_trained():
    record = {"instruction": "Add.", "input": "2 and 3", "output": "5"}
    record |= {"prompt": "Add.\n\n2 and 3", "completion": "5"}
    tokenizer = byte_level()
    whole = tokenize_example(record, tokenizer, template="alpaca")["input_ids"]
    asked = generation_prompt(record, tokenizer, template="alpaca")
    assert whole[: len(asked)] == asked
    text = tokenizer.decode(asked)
    assert "### Input:\n2 and 3" in text and text.endswith("### Response:\n")


@pytest.mark.model
def test_a_chat_template_that_refuses_says_so(builtin):
    import copy

    tokenizer = copy.deepcopy(builtin)
    tokenizer.chat_template = "{{ raise_exception('System role not supported') }}"
    with pytest.raises(
        ValueError, match="refuses this chat: System role not supported"
    ):
        generation_prompt("Hi", tokenizer, template="tokenizer")


def test_worked_examples_need_an_end_of_turn():
    with pytest.raises(ValueError, match="llama2 template has no end of turn"):
        with_examples("llama2", [], system="Count.")


def test_the_slow_property_sees_ten_thousand_texts():
    assert MANY.max_examples * len(TOKENIZERS) >= 10_000
    assert {"byte_level", "metaspace_first", "unigram", "word_piece"} <= set(TOKENIZERS)


def with_tokens(*names):
    """A byte-level tokenizer with tokens of its own that are not special, as Gemma."""
    other = wrap(
        Tokenizer.from_str(byte_level().backend_tokenizer.to_str()),
        eos_token="<|im_end|>",
    )
    other.add_tokens([AddedToken(n, special=False, normalized=False) for n in names])
    return other


def test_blank_lines_that_are_tokens_stay_tokens():
    tokenizer = with_tokens("\n\n")
    record = {"prompt": "one\n\ntwo", "completion": "three\n\nfour"}
    blank = tokenizer.convert_tokens_to_ids("\n\n")
    for template in ("alpaca", "plain"):
        features = tokenize_example(record, tokenizer, template=template)
        assert learned(features).count(blank) == 1, template


def test_a_marker_typed_very_often_stays_text():
    tokenizer = with_tokens("<turn>")
    tokenizer.chat_template = (
        "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
        "{% endfor %}{% if add_generation_prompt %}<turn>assistant\n{% endif %}"
    )
    record = {"prompt": "<turn>" * 600, "completion": "a <turn> b"}
    features = tokenize_example(record, tokenizer, template="tokenizer")
    marker = tokenizer.convert_tokens_to_ids("<turn>")
    assert features["input_ids"].count(marker) == 2
    assert tokenizer.decode(features["input_ids"]).count("<turn>") == 603


def test_a_chat_template_may_tell_the_day(monkeypatch):
    day = ["4 May"]
    tokenizer = with_tokens()
    tokenizer.chat_template = CHATML
    real = tokenizer.apply_chat_template

    def dated(*args, **options):
        return f"{day[0]}\n{real(*args, **options)}"

    tokenizer.apply_chat_template = dated
    clock = SimpleNamespace(date=SimpleNamespace(today=lambda: day[0]))
    monkeypatch.setattr(templates, "datetime", clock)
    for day[0] in ("4 May", "5 May"):
        features = tokenize_example(LIGHT, tokenizer, template="tokenizer")
        assert tokenizer.decode(features["input_ids"]).startswith(day[0])
