"""A row of a batch is read as alone: every method, windows and states of all kinds."""

import copy

import pytest
import torch
from families import make
from peft import get_peft_model
from small_models import PEFT, byte_tokenizer
from small_training import build
from transformers import Trainer
from trl import SFTTrainer

from course_utils.evaluation import evaluate, perplexity
from course_utils.formatting import (
    CompletionCollator,
    generation_prompt,
    tokenize_example,
)
from course_utils.inference import (
    _reads_padded,
    generate,
    inference_state,
    router_configs,
    stream,
)
from course_utils.training import LossHistory, prepare_trainer
from course_utils.training_speed import _can_be_packed, completion_loss

PROMPTS = ["Hi", "Turn on the light in the kitchen, please", "b", "Download it", "Ho"]
DATA = [{"prompt": text, "completion": "ok" * len(text)} for text in PROMPTS]
METHODS = ["none", *PEFT]
KEYS_AND_VALUES = ["gpt2", "mistral", "gemma3_text", "gpt_oss", "opt", "mixtral"]
STATES = ["qwen3_5_text", "lfm2", "bamba", "jamba", "mamba2", "recurrent_gemma"]
WINDOWS = ["mistral", "gemma2", "gemma3_text", "gpt_oss", "olmo3", "cohere2"]
OWN_POSITIONS = ["bart", "bloom", "mpt", "deepseek_v4", "falcon"]  # padding moves some


def tuned(kind, method, **changes):
    model = make(kind, **changes)
    if method == "none":
        return model
    model = get_peft_model(model, copy.deepcopy(PEFT[method])).eval()
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    return model


def step_by_step(model, text, new):
    """Greedy tokens by whole passes without a cache or padding, up to a near tie."""
    ids, written = generation_prompt(text, byte_tokenizer(), template="plain"), []
    with torch.no_grad(), inference_state(model):
        for _ in range(new):
            row = torch.tensor([ids + written])
            out = model(
                input_ids=row, attention_mask=torch.ones_like(row), use_cache=False
            )
            top = out.logits[0, -1].float().topk(2)
            if top.values[0] - top.values[1] < 1e-3 or top.indices[0] == 2:
                break
            written.append(int(top.indices[0]))
    return byte_tokenizer().decode(
        written, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )


def check_rows(model):
    tokenizer, plain = byte_tokenizer(), {"template": "plain"}
    together = generate(model, tokenizer, PROMPTS, max_new_tokens=5, **plain)
    expected = [step_by_step(model, text, 5) for text in PROMPTS]
    assert sum(map(len, expected)) > 5
    for answer, start in zip(together, expected, strict=True):
        assert answer.startswith(start)
    rows = [tokenize_example(row, tokenizer, **plain) for row in DATA]
    with torch.no_grad(), inference_state(model):
        alone = sum(
            completion_loss(model, {k: torch.tensor([v]) for k, v in row.items()}, 1)
            for row in rows
        )
        padded = completion_loss(model, CompletionCollator(tokenizer)(rows), 1)
    measured = perplexity(model, tokenizer, DATA, batch_size=3, **plain)
    torch.testing.assert_close(padded, alone, rtol=1e-5, atol=0)
    assert measured.loss * measured.tokens == pytest.approx(float(alone), rel=1e-5)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", KEYS_AND_VALUES + STATES)
def test_a_row_of_a_batch_is_read_as_alone(kind, method):
    if method == "lora" and kind == "mamba2":
        pytest.skip("PEFT names no targets for it")
    if method == "prefix" and kind in ("qwen3_5_text", "lfm2", "bamba", "jamba"):
        pytest.skip("PEFT has no prefixes for it")
    check_rows(tuned(kind, method))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("kind", WINDOWS)
def test_windows_smaller_than_the_prompt(kind, method):
    check_rows(tuned(kind, method, sliding_window=6))


@pytest.mark.parametrize("kind", OWN_POSITIONS)
def test_positions_that_padding_moves(kind):
    check_rows(make(kind))
    model = make(kind)
    with torch.no_grad(), inference_state(model):
        assert _reads_padded(model) == (kind not in ("bart", "deepseek_v4"))


EXPERTS = """
mixtral qwen2_moe qwen3_moe granitemoe gpt_oss olmoe phimoe jetmoe jamba minimax dots1
flex_olmo ernie4_5_moe deepseek_v2 deepseek_v3 granitemoe_swa qwen3_next llama4_text
qwen3_5_moe hunyuan_v1_moe mellum minimax_m2
"""
NO_PREFIX = """deepseek_v2 deepseek_v3 jamba minimax qwen3_next qwen3_5_moe"""


def reports(model, on):
    for module in model.modules():
        if hasattr(vars(module).get("config"), "output_router_logits"):
            module.config.output_router_logits = on


@pytest.mark.parametrize("method", ["none", "prompt", "prefix"])
@pytest.mark.parametrize("kind", EXPERTS.split())
def test_experts_that_report_their_routing_answer_as_those_that_do_not(kind, method):
    if method == "prefix" and kind in NO_PREFIX.split():
        pytest.skip("PEFT has no prefixes for it")
    model, tokenizer = tuned(kind, method), byte_tokenizer()
    answers = []
    for on in (False, True):
        reports(model, on)
        assert bool(router_configs(model)) == on
        scored = evaluate(model, tokenizer, DATA, max_new_tokens=3, as_text=True)
        pieces = stream(model, tokenizer, "Hi", max_new_tokens=3)
        loss = perplexity(model, tokenizer, DATA).loss
        answers.append((scored.predictions, "".join(pieces), loss))
        assert bool(router_configs(model)) == on
    assert answers[0] == answers[1]


def test_the_report_is_asked_for_again_after_an_error_and_a_stream_cut_short():
    model = make("mixtral")
    reports(model, True)
    with pytest.raises(RuntimeError, match="stop"), inference_state(model):
        assert not router_configs(model)
        raise RuntimeError("stop")
    assert router_configs(model) == [model.config]
    pieces = stream(model, byte_tokenizer(), "Hi", max_new_tokens=20)
    next(pieces)
    pieces.close()
    assert router_configs(model) == [model.config]


def losses(trainer_class, kind, folder, fast, **settings):
    model = make(kind, std=0.05)
    reports(model, True)
    trainer = build(trainer_class, folder, model, max_steps=3, **settings)
    prepare_trainer(trainer, fast=fast)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert router_configs(trainer.model)
    generate(trainer.model, byte_tokenizer(), PROMPTS, max_new_tokens=2)
    return [before, *LossHistory.from_trainer(trainer).loss]


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize(
    "kind", ["mixtral", "qwen2_moe", "gpt_oss", "olmoe", "granitemoe"]
)
@pytest.mark.parametrize("trainer_class", [Trainer, SFTTrainer])
def test_a_fast_run_keeps_the_loss_that_balances_experts(
    trainer_class, kind, accumulation, tmp_path
):
    settings = {"gradient_accumulation_steps": accumulation}
    fast = losses(trainer_class, kind, tmp_path, True, **settings)
    if trainer_class is SFTTrainer and kind == "granitemoe":
        if accumulation == 2:  # TRL itself fails on it, and would share the loss out
            return
        trainer_class = Trainer
    slow = losses(trainer_class, kind, tmp_path, False, **settings)
    assert max(abs(a - b) for a, b in zip(fast, slow, strict=True)) < 1e-4


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_the_weight_that_is_asked_for_is_taken(weight, tmp_path):
    settings = {"router_aux_loss_coef": weight}
    runs = []
    for fast in (True, False):
        trainer = build(SFTTrainer, tmp_path, make("mixtral", std=0.05), **settings)
        prepare_trainer(trainer, fast=fast)
        runs.append(trainer.evaluate()["eval_loss"])
    assert runs[0] == pytest.approx(runs[1], abs=1e-4)


@pytest.mark.parametrize("kind", EXPERTS.split())
def test_completion_loss_holds_what_the_models_own_does(kind):
    model = make(kind)
    tokenizer = byte_tokenizer()
    rows = [tokenize_example(row, tokenizer) for row in DATA]
    batch = CompletionCollator(tokenizer)(rows)
    reports(model, True)
    with torch.no_grad():
        own, ours = model(**batch).loss, completion_loss(model, batch)
        reports(model, False)
        without = completion_loss(model, batch)
    torch.testing.assert_close(ours, own, atol=1e-5, rtol=1e-6)
    has_loss = kind not in ("dots1", "deepseek_v2", "deepseek_v3", "hunyuan_v1_moe")
    if kind not in ("llama4_text", "dots1") and has_loss:
        assert ours > without


@pytest.mark.parametrize("fast", [True, False])
def test_prefixes_on_experts_are_refused_before_step_1_with_the_routers_loss(
    fast, tmp_path
):
    for weight in (None, 0.0):
        model = get_peft_model(make("mixtral"), copy.deepcopy(PEFT["prefix"]))
        settings = {"max_steps": 1, "router_aux_loss_coef": weight}
        trainer = build(SFTTrainer, tmp_path, model, **settings)
        prepare_trainer(trainer, fast=fast)
        if weight is None:
            with pytest.raises(ValueError, match="router_aux_loss_coef=0.0 to SFT"):
                trainer.train()
            assert trainer.state.global_step == 0
        else:
            trainer.train()
            assert trainer.state.global_step == 1


def test_perplexity_refuses_what_the_model_cannot_read():
    model = make("llama")
    long = [{"prompt": "a" * model.config.max_position_embeddings, "completion": "b"}]
    with pytest.raises(ValueError, match="exceeds the"):
        perplexity(model, byte_tokenizer(), long, template="plain")
    model.resize_token_embeddings(100)
    with pytest.raises(ValueError, match="beyond the 100 embeddings"):
        perplexity(model, byte_tokenizer(), DATA, template="plain")


def test_a_noisy_embedding_is_not_packed():
    model = make("llama")
    batch = dict.fromkeys(("input_ids", "labels", "attention_mask"), torch.ones(2, 9))
    assert _can_be_packed(model, batch)
    model.get_input_embeddings().neftune_noise_alpha = 5
    assert not _can_be_packed(model, batch)
