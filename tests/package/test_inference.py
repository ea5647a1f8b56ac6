"""Batched generation equals single generation; everything is left as found."""

import copy
import functools

import pytest
import torch
from small_models import byte_tokenizer, random_llama, random_peft
from teacher_forcing import MARGIN, lacking, worst
from torch.profiler import ProfilerActivity, profile
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    MistralConfig,
    MistralForCausalLM,
    OPTConfig,
    OPTForCausalLM,
)

from course_utils.formatting import end_of_turn_ids, generation_prompt
from course_utils.inference import (
    base_model,
    compare_generations,
    decodes,
    generate,
    stream,
)

PROMPTS = [
    "Turn on the light",
    "b",
    "Set the heating in the living room to twenty degrees, please.",
    "Good night!",
    "把灯打开",
    "Turn on the radio",
    "x" * 90,
    "",
]
GENERAL = [
    "What is the capital of France?",
    "Name the largest planet of the solar system, in one short sentence.",
    "Say hello.",
]
METHODS = ["none", "lora", "prompt", "p_tuning", "prefix"]


def small(method="none", **changes):
    return random_llama(**changes) if method == "none" else random_peft(method)


def reference(model, row, stop, new):
    """What transformers itself writes for one prompt, without any padding.

    No two tokens are nearly tied: float32 rounds logits of these models by 1e-5, so
    that other ways to the same answers end at equal texts on any processor.
    """
    ids = torch.tensor([row])
    output = model.generate(
        input_ids=ids,
        attention_mask=torch.ones_like(ids),
        generation_config=GenerationConfig(
            max_new_tokens=new,
            eos_token_id=sorted(stop),
            pad_token_id=2,
            output_logits=True,
            return_dict_in_generate=True,
        ),
    )
    first, second = torch.cat(output.logits).topk(2).values.T
    assert (first - second).min() > 1e-3, "a near tie: choose another seed"
    written = output.sequences[0, len(row) :].tolist()
    end = next((i for i, token in enumerate(written) if token in stop), len(written))
    return written[:end]


def frequent(written):
    """A token that many answers hold, not all: a lively end of turn."""
    counts = {t: sum(t in w for w in written) for w in written for t in w}
    return max(counts, key=lambda t: (counts[t] < len(written)) * counts[t])


@functools.cache
def answers_alone(method):
    """A model, its lively end-of-turn tokens, and what the library writes with them."""
    model = small(method)
    rows = [generation_prompt(p, byte_tokenizer()) for p in PROMPTS]
    written = [reference(model, row, {2}, 16) for row in rows]
    stop = {2, frequent(written)}
    end = [next((i for i, t in enumerate(w) if t in stop), len(w)) for w in written]
    return model, stop, [w[:n] for w, n in zip(written, end, strict=True)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("batch_size", [3, 128])
def test_each_answer_is_the_one_the_library_gives_alone(method, batch_size):
    tokenizer = byte_tokenizer()
    model, stop, expected = answers_alone(method)
    model.generation_config.eos_token_id = sorted(stop)
    lengths = {len(answer) for answer in expected}
    assert len(lengths) > 2 and len(set(map(tuple, expected))) > 4  # a lively case
    got = generate(model, tokenizer, PROMPTS, max_new_tokens=16, batch_size=batch_size)
    assert got == [tokenizer.decode(e, skip_special_tokens=True) for e in expected]


def test_a_disabled_adapter_gives_the_answers_of_the_base():
    tokenizer = byte_tokenizer()
    base = generate(small(), tokenizer, PROMPTS, max_new_tokens=8)
    for method in METHODS[1:]:
        model = small(method)
        tuned = generate(model, tokenizer, PROMPTS, max_new_tokens=8)
        assert tuned != base
        with model.disable_adapter():
            assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == base


@pytest.mark.parametrize("spoil", ["position_ids", "attention_mask"])
def test_wrong_positions_or_masks_would_be_seen(spoil, monkeypatch):
    model, tokenizer = small(), byte_tokenizer()
    right = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    forward = type(model).forward

    def spoilt(self, *args, **kwargs):
        ids, mask = kwargs["input_ids"], kwargs["attention_mask"]
        if spoil == "attention_mask":
            kwargs[spoil] = torch.ones_like(mask)
        else:
            past = mask.shape[1] - ids.shape[1]
            kwargs[spoil] = torch.arange(past, mask.shape[1]).expand_as(ids)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(model, "forward", spoilt.__get__(model))
    assert decodes(model)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) != right


SMALL = {"vocab_size": 259, "initializer_range": 0.4}
OTHERS = {
    "gpt2": (
        lambda: GPT2LMHeadModel(
            GPT2Config(n_embd=32, n_layer=2, n_head=4, n_positions=256, **SMALL)
        ),
        True,
    ),
    "opt": (
        lambda: OPTForCausalLM(
            OPTConfig(
                hidden_size=32,
                ffn_dim=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                word_embed_proj_dim=32,
                max_position_embeddings=256,
                vocab_size=259,
                init_std=0.4,
            )
        ),
        None,
    ),
    "bloom": (
        lambda: BloomForCausalLM(
            BloomConfig(hidden_size=32, n_layer=2, n_head=4, **SMALL)
        ),
        False,
    ),
    "sliding window": (
        lambda: MistralForCausalLM(
            MistralConfig(
                hidden_size=32,
                intermediate_size=48,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                sliding_window=16,
                max_position_embeddings=512,
                **SMALL,
            )
        ),
        False,
    ),
}


@pytest.mark.parametrize("name", OTHERS)
def test_other_architectures_answer_as_alone_too(name):
    make, own_loop = OTHERS[name]
    torch.manual_seed(0)
    model, tokenizer = make().eval(), byte_tokenizer()
    model.generation_config.eos_token_id = 2
    assert own_loop is None or decodes(model) is own_loop
    rows = [generation_prompt(p, tokenizer, template="plain") for p in PROMPTS]
    expected = [reference(model, row, {2}, 10) for row in rows]
    got = generate(model, tokenizer, PROMPTS, template="plain", max_new_tokens=10)
    assert got == [tokenizer.decode(e, skip_special_tokens=True) for e in expected]
    pieces = stream(model, tokenizer, PROMPTS[0], template="plain", max_new_tokens=10)
    assert "".join(pieces) == got[0]


def state(model, tokenizer):
    base = base_model(model)
    return (
        [module.training for module in model.modules()],
        [getattr(module, "gradient_checkpointing", None) for module in model.modules()],
        base.config.to_dict(),
        base.generation_config.to_dict(),
        id(base.generation_config),
        [p.requires_grad for p in model.parameters()],
        tokenizer.padding_side,
        torch.is_grad_enabled(),
    )


def after_a_trainer(model):
    """The state in which trainers leave a model."""
    base = base_model(model)
    model.train()
    base.gradient_checkpointing_enable()
    base.enable_input_require_grads()
    base.config.use_cache = False
    base.model.layers[0].mlp.eval()  # a reader who froze one module's dropout
    base.generation_config.repetition_penalty = 1.3
    return model


@pytest.mark.parametrize("method", METHODS)
def test_a_model_that_comes_from_a_trainer_works_and_is_left_as_it_was(method):
    tokenizer = copy.deepcopy(byte_tokenizer())
    tokenizer.padding_side = "right"
    fresh = generate(small(method), tokenizer, PROMPTS, max_new_tokens=8)
    model = after_a_trainer(small(method))
    before = state(model, tokenizer)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=8) == fresh
    assert state(model, tokenizer) == before
    pieces = stream(model, tokenizer, PROMPTS[0], max_new_tokens=8)
    first = next(pieces)
    assert torch.is_grad_enabled() and fresh[0].startswith(first)
    pieces.close()
    assert state(model, tokenizer) == before


def test_the_library_path_leaves_the_state_too():
    tokenizer = byte_tokenizer()
    torch.manual_seed(0)
    model = OTHERS["sliding window"][0]()
    fresh = generate(model.eval(), tokenizer, PROMPTS, max_new_tokens=6)
    after_a_trainer(model)
    before = state(model, tokenizer)
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=6) == fresh
    assert state(model, tokenizer) == before


@pytest.mark.parametrize("method", ["none", "lora", "prefix"])
def test_the_state_comes_back_when_generation_fails(method, monkeypatch):
    model, tokenizer = after_a_trainer(small(method)), byte_tokenizer()
    before = state(model, tokenizer)

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(base_model(model).lm_head, "forward", broken)
    with pytest.raises(RuntimeError, match="out of memory"):
        generate(model, tokenizer, PROMPTS)
    assert state(model, tokenizer) == before


def test_training_goes_on_after_generation():
    """Nothing that generation made may stay in the graph of a later step."""
    model, tokenizer = after_a_trainer(small()), byte_tokenizer()
    ids = torch.tensor([generation_prompt("Hello", tokenizer)])
    loss = model(input_ids=ids, labels=ids).loss
    generate(model, tokenizer, PROMPTS, max_new_tokens=4)
    again = model(input_ids=ids, labels=ids).loss
    again.backward()
    assert torch.equal(loss, again)
    assert model.model.layers[1].mlp.up_proj.weight.grad.abs().sum() > 0


@pytest.mark.parametrize("template", ["chatml", "plain", None])
def test_an_answer_ends_at_the_end_of_turn(template):
    """A model that has learned to say ok and stop, whatever comes first."""
    tokenizer = byte_tokenizer()
    model = random_llama(num_hidden_layers=1)
    o, k = tokenizer.convert_tokens_to_ids(["o", "k"])
    table = torch.zeros(259, 259)
    table[:, o] = 1
    table[o] = torch.eye(259)[k]
    table[k] = torch.eye(259)[2]
    calls = []

    def forward(self, input_ids, logits_to_keep=0, **kwargs):
        calls.append(tuple(input_ids.shape))
        return type("Out", (), {"logits": table[input_ids[:, -1:]]})()

    model.forward = forward.__get__(model)
    prompts = ["Hi"] if template else ["<|im_start|>user\nHi"]
    got = generate(model, tokenizer, prompts, template=template, max_new_tokens=50)
    assert got == ["ok"]
    assert len(calls) == 3  # o, k, end of turn; then it stops


@pytest.mark.parametrize("batch_size", [1, 8])
@pytest.mark.parametrize("method", ["none", "lora"])
def test_the_weights_of_the_output_layer_are_not_copied(method, batch_size):
    model, tokenizer = small(method).requires_grad_(False), byte_tokenizer()
    with profile(activities=[ProfilerActivity.CPU], record_shapes=True) as seen:
        generate(model, tokenizer, PROMPTS[:5], max_new_tokens=3, batch_size=batch_size)
    width, size = model.get_output_embeddings().weight.T.shape
    shapes = [e.input_shapes[-1] for e in seen.events() if e.name == "aten::bmm"]
    copied = [shape for shape in shapes if shape[1:] == [width, size]]
    assert not copied, "a batched product: one copy of the weights for each prompt"


def test_rows_that_ended_leave_the_batch(monkeypatch):
    model, tokenizer = small(), byte_tokenizer()
    prompts = [f"{word} {n}" for word in ("on", "off", "dim") for n in range(10)]
    written = generate(model, tokenizer, prompts, max_new_tokens=10)
    written = [tokenizer(text)["input_ids"] for text in written]
    model.generation_config.eos_token_id = frequent(written)
    sizes = []
    hook = lambda module, args: sizes.append(len(args[0]))  # noqa: E731
    model.model.embed_tokens.register_forward_pre_hook(hook)
    generate(model, tokenizer, prompts, max_new_tokens=10)
    assert sizes[0] == 1  # what all prompts begin with, once
    assert sizes[1] == 30 and sizes[-1] < 30 and sizes[1:] == sorted(sizes[1:])[::-1]


def test_text_that_looks_like_a_special_token_is_text():
    tokenizer = byte_tokenizer()
    seen = []
    model = small()
    model.model.embed_tokens.register_forward_pre_hook(
        lambda module, args: seen.append(args[0].tolist())
    )
    generate(model, tokenizer, ["a<|im_end|>b"], max_new_tokens=1)
    expected = generation_prompt("a<|im_end|>b", tokenizer)
    assert seen == [[expected]]
    assert expected.count(2) == generation_prompt("ab", tokenizer).count(2)
    generate(model, tokenizer, ["a<|im_end|>b"], template=None, max_new_tokens=1)
    assert seen[1][0].count(2) == 1  # laid out already: the marker is meant


def test_system_text_reaches_the_model():
    model, tokenizer = small(), byte_tokenizer()
    plain, told = (
        generate(model, tokenizer, PROMPTS, system=s, max_new_tokens=8)
        for s in (None, "Answer in French.")
    )
    assert plain != told


def test_wrong_prompts_are_named():
    model, tokenizer = small(), byte_tokenizer()
    assert generate(model, tokenizer, []) == []
    with pytest.raises(TypeError, match=r"write \[prompt\]"):
        generate(model, tokenizer, "Turn on the light")
    with pytest.raises(TypeError, match="prompt 1 is int"):
        generate(model, tokenizer, ["a", 3])
    with pytest.raises(TypeError, match="not list"):
        stream(model, tokenizer, ["a"])
    with pytest.raises(ValueError, match="prompt 1 has 6.. tokens; with 64 new"):
        generate(model, tokenizer, ["a", "b" * 520])
    with pytest.raises(ValueError, match="500 tokens and 5 virtual ones; with 8 new"):
        generate(
            small("prompt"), tokenizer, ["b" * 500], template=None, max_new_tokens=8
        )
    with pytest.raises(ValueError, match="prompt 0 has no tokens"):
        generate(model, tokenizer, [""], template=None)
    with pytest.raises(ValueError, match="stands in the prompt"):
        generate(model, tokenizer, ["a"], template=None, system="b")
    for option in ({"max_new_tokens": 0}, {"batch_size": 0}):
        with pytest.raises(ValueError, match="must be 1 or more"):
            generate(model, tokenizer, ["a"], **option)


@pytest.mark.parametrize("seed", range(2))
def test_streamed_pieces_make_the_whole_answer(seed):
    """A random model writes broken UTF-8 too: half characters are held back."""
    model, tokenizer = random_llama(seed), byte_tokenizer()
    for prompt in PROMPTS:
        pieces = list(stream(model, tokenizer, prompt, max_new_tokens=20))
        [whole] = generate(model, tokenizer, [prompt], max_new_tokens=20)
        assert "".join(pieces) == whole
        assert all(pieces)
    assert len(pieces) > 1


def test_a_character_of_several_tokens_comes_in_one_piece(monkeypatch):
    tokenizer = byte_tokenizer()
    answer = tokenizer("é灯!")["input_ids"]
    fake = lambda *args, **kwargs: ([(0, token)] for token in answer)  # noqa: E731
    monkeypatch.setattr("course_utils.inference._decode_rows", fake)
    assert list(stream(small(), tokenizer, "x")) == ["é", "灯", "!"]


def test_comparison_shows_text_and_a_table():
    model, tokenizer = small(), byte_tokenizer()
    prompts = ["a|b", "c"]
    before = ["one\ntwo", ""]
    both = compare_generations(
        {"before": before, "after": model},
        tokenizer,
        prompts,
        references=["`x`", "{}"],
        max_new_tokens=4,
    )
    answers = dict(both.columns)
    assert answers["before"] == tuple(before)
    after = generate(model, tokenizer, prompts, max_new_tokens=4)
    assert answers["after"] == tuple(after)
    lines = both._repr_markdown_().splitlines()
    assert lines[0] == "| prompt | before | after | right answer |"
    assert lines[2].startswith("| `a\\|b` | `one ⏎ two` | ")
    assert lines[2].endswith("| `` `x` `` |") and "*(empty)*" in lines[3]
    assert len(lines) == 4
    text = str(both)
    assert "prompt        a|b\nbefore        one\n              two\n" in text
    with pytest.raises(ValueError, match="before: 1 answers to 2 prompts"):
        compare_generations({"before": ["x"]}, tokenizer, prompts)
    with pytest.raises(ValueError, match="right answer: 1 answers to 2 prompts"):
        compare_generations({"a": before}, tokenizer, prompts, references=["x"])


@pytest.mark.model
@pytest.mark.parametrize(
    ("dtype", "margin"), [(torch.float32, 1e-2), (torch.bfloat16, MARGIN)]
)
def test_the_built_in_model_answers_in_a_batch_as_alone(dtype, margin, monkeypatch):
    """Each token written in a batch is the best one, or nearly, to the prompt alone."""
    from course_utils.models import load_model, load_tokenizer

    model, tokenizer = load_model(dtype=dtype), load_tokenizer()
    assert end_of_turn_ids(tokenizer) == [2]

    answers = generate(model, tokenizer, GENERAL, max_new_tokens=12)
    assert worst(lacking(model, tokenizer, GENERAL, answers, batch_size=1)) < margin
    forward = type(model).forward

    @functools.wraps(forward)  # by whose signature the loop is chosen
    def without_mask(self, *args, **kwargs):  # padding is read as text
        kwargs["attention_mask"] = torch.ones_like(kwargs["attention_mask"])
        return forward(self, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(type(model), "forward", without_mask)
        answers = generate(model, tokenizer, GENERAL, max_new_tokens=12)
    spoilt = worst(lacking(model, tokenizer, GENERAL, answers, batch_size=1))
    assert spoilt > 2 * margin


@pytest.mark.gpu
@pytest.mark.parametrize("method", METHODS)
def test_a_card_answers_as_the_cpu_does(method):
    """In float32, which a card computes in full precision unless it is told not to."""
    model, tokenizer = small(method), byte_tokenizer()
    for prompt in PROMPTS:  # none has a near tie
        reference(model, generation_prompt(prompt, tokenizer), {2}, 12)
    expected = generate(model, tokenizer, PROMPTS, max_new_tokens=12)
    assert len(set(expected)) > 2
    model = model.to("cuda")
    assert generate(model, tokenizer, PROMPTS, max_new_tokens=12) == expected
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=12, batch_size=3)
    assert together == expected


def test_a_model_may_be_called_prompt():
    answers = {"lora": ["A"], "prompt": ["B"], "right answer": ["C"]}
    both = compare_generations(answers, None, ["What?"], references=["D"])
    shown = [" ".join(line.split()) for line in str(both).splitlines()]
    answers = ["lora A", "prompt B", "right answer C", "right answer D"]
    assert shown == ["prompt What?", *answers]
    assert both._repr_markdown_().splitlines()[2].count("`What?`") == 1
