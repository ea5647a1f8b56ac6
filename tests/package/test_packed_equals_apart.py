"""Which families keep packed examples apart: the verdict is what the loss shows."""

import copy

import pytest
import torch
from families import FAMILIES, make
from peft import LoraConfig, get_peft_model
from small_models import PEFT, byte_tokenizer, random_llama
from small_training import FP32, batch, begun, build
from torch.nn.functional import cross_entropy
from training_child import records
from transformers import Trainer
from trl import SFTConfig, SFTTrainer

from course_utils import training_speed
from course_utils.formatting import CompletionCollator, pack_examples
from course_utils.training import LossHistory, prepare_trainer
from course_utils.training_speed import (
    _keeps_packed_apart,
    completion_loss,
    refuse_packed,
    without_padding,
)

LEAK = {
    "opt",
    "bloom",
    "gpt_oss",
    "qwen3_5_text",
    "qwen3_next",
    "mamba",
    "jamba",
    "lfm2",
}
APART = {
    "llama",
    "mistral",
    "gemma3_text",
    "gpt2",
    "gpt_neox",
    "mixtral",
    "phi3",
    "olmo2",
}


def summed(model, example):
    """The loss summed over learned tokens, and how many they are."""
    inputs = {name: v for name, v in example.items() if name != "labels"}
    with torch.no_grad():
        logits = model(**inputs, use_cache=False).logits[:, :-1].float()
    labels = example["labels"][:, 1:]
    learned = labels != -100
    total = cross_entropy(logits[learned], labels[learned], reduction="sum")
    return total.item(), int(learned.sum())


def packed_against_apart(model, rows):
    together = CompletionCollator(byte_tokenizer())(pack_examples(rows, 256))
    alone = [{k: torch.tensor([v]) for k, v in row.items()} for row in rows]
    total, learned = summed(model, together)
    return abs(total - sum(summed(model, one)[0] for one in alone)) / learned


@pytest.mark.parametrize("kind", FAMILIES)
def test_the_verdict_on_each_family_is_the_truth(kind):
    """Measured by the loss, packed and apart, with each attention that it has."""
    rows, seen = list(records(6)), {}
    for attention in ("eager", "sdpa"):
        try:
            model = make(kind, attention)
        except ValueError as error:
            assert "does not support" in str(error)
            continue
        try:
            apart = packed_against_apart(model, rows) < 1e-3
        except TypeError:
            apart = False  # it takes no positions
        assert _keeps_packed_apart(model) == apart
        seen[attention] = apart
        if not apart:
            print(f"{kind} ({attention}) lets packed examples see each other")
            data = CompletionCollator(byte_tokenizer())(rows)
            assert without_padding(model, data) is data
            with pytest.raises(ValueError, match="do not go together"):
                refuse_packed(model)
            continue
        text = model.config.get_text_config()
        for name in vars(text):  # draws would be others
            if "drop" in name or "jitter" in name:
                setattr(text, name, 0.0)
        for beginning in (0, 12):
            begun_rows = [begun(row, beginning) for row in rows]
            data = CompletionCollator(byte_tokenizer())(begun_rows)
            unpadded = without_padding(model, data)
            assert "position_ids" in unpadded
            expected = completion_loss(model, data).item()
            assert completion_loss(model, unpadded).item() == pytest.approx(
                expected, abs=2e-5
            )
    assert len(set(seen.values())) == 1
    assert not (kind in LEAK and True in seen.values())
    assert not (kind in APART and False in seen.values())


@pytest.mark.parametrize(
    "kind", ["mistral", "gemma2", "gemma3_text", "olmo3", "cohere2"]
)
def test_a_window_smaller_than_an_example_is_kept_in_packed_rows(kind):
    model, data = make(kind, sliding_window=6), batch(9, beginning=12)
    unpadded = without_padding(model, data)
    assert set(unpadded) == {"input_ids", "labels", "position_ids"}
    expected = completion_loss(model, data).item()
    assert completion_loss(model, unpadded).item() == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", sorted(LEAK | APART))
@pytest.mark.parametrize("std", [0.2, 0.02])
def test_the_verdict_does_not_hang_on_the_number_format(kind, dtype, std):
    assert _keeps_packed_apart(make(kind, std=std).to(dtype)) == (kind in APART)


@pytest.mark.parametrize("std", [0.2, 0.02])
def test_positions_alone_may_leak(std, monkeypatch):
    """Examples that do not see each other, but of which the second begins at 8."""
    model = make("gpt2", std=std)
    assert _keeps_packed_apart(model)
    monkeypatch.setattr(
        model.transformer.wpe,
        "forward",
        lambda ids: model.transformer.wpe.weight[torch.arange(ids.shape[-1])][None],
    )
    training_speed._KEPT_APART.clear()
    assert not _keeps_packed_apart(model)


def test_a_model_is_asked_once_and_left_as_it_was():
    model = get_peft_model(random_llama(), copy.deepcopy(PEFT["lora"]))
    model.train()
    model.base_model.model.model.layers[0].mlp.eval()
    calls = []
    model.get_base_model().register_forward_hook(lambda *_: calls.append(1))

    def state():
        return (
            [module.training for module in model.modules()],
            [
                len(m._forward_hooks) + len(m._forward_pre_hooks)
                for m in model.modules()
            ],
            [p.requires_grad for p in model.parameters()],
            [p.grad for p in model.parameters()],
            torch.is_grad_enabled(),
            torch.random.get_rng_state().tolist(),
            model.config.to_dict(),
        )

    before = state()
    with torch.no_grad():
        assert _keeps_packed_apart(model)
    assert state() == before and len(calls) == 2  # packed, and alone
    assert _keeps_packed_apart(model) and len(calls) == 2
    model.get_base_model().set_attn_implementation("eager")
    assert _keeps_packed_apart(model) and len(calls) == 4
    other = random_llama()
    with torch.inference_mode():
        assert _keeps_packed_apart(other)


@pytest.mark.model
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_the_built_in_model_keeps_examples_apart(dtype, attention):
    from course_utils.models import load_model

    model = load_model(dtype=dtype)
    model.set_attn_implementation(attention)
    assert _keeps_packed_apart(model)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", sorted(LEAK | APART))
def test_a_card_gives_the_same_verdict(kind, dtype):
    assert _keeps_packed_apart(make(kind).to("cuda", dtype)) == (kind in APART)


def packed_rows(count=8):
    from datasets import Dataset

    return Dataset.from_list(pack_examples(list(records(count)), 64))


@pytest.mark.parametrize("fast", [True, False])
def test_a_leaking_model_is_refused_before_step_1(fast, tmp_path):
    model = make("opt", std=0.05)
    data = CompletionCollator(byte_tokenizer())(list(packed_rows()))
    with pytest.raises(ValueError, match="OPTForCausalLM.*one example a row"):
        completion_loss(model, data)
    trainer = build(Trainer, tmp_path, model)
    trainer.train_dataset = packed_rows()
    prepare_trainer(trainer, fast=fast)
    with pytest.raises(ValueError, match="OPTForCausalLM.*one example a row"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("fast", [True, False])
@pytest.mark.parametrize("how", ["packing", "padding_free"])
@pytest.mark.parametrize("kind", ["opt", "llama"])
def test_packing_by_trl_is_seen_too(kind, how, fast, tmp_path):
    settings = {how: True} | ({"max_length": 64} if how == "packing" else {})
    trainer = SFTTrainer(
        model=make(kind, std=0.05),
        args=SFTConfig(
            tmp_path, max_steps=1, logging_steps=1,
            use_cpu=True, bf16=False, report_to=[],
            gradient_checkpointing=False, **{"max_length": None} | settings,
        ),
        train_dataset=records(8),
        processing_class=byte_tokenizer(),
    )  # fmt: skip
    prepare_trainer(trainer, fast=fast)
    if kind == "llama":
        trainer.train()
        assert len(LossHistory.from_trainer(trainer).loss) == 1
        return
    with pytest.raises(ValueError, match="packing and padding_free"):
        trainer.train()
    assert trainer.state.global_step == 0


@pytest.mark.parametrize("kind", ["gpt2", "seed_oss", "phimoe", "llama"])
def test_losses_of_a_fast_run_hold_where_the_model_draws(kind, tmp_path):
    """Dropout and a router's jitter draw by place: other rows, other numbers."""
    changes = {"attention_dropout": 0.1} if kind == "llama" else {}
    runs = []
    for fast in (False, True):
        trainer = build(Trainer, tmp_path, make(kind, "eager", std=0.05, **changes))
        prepare_trainer(trainer, fast=fast)
        trainer.train()
        runs.append(LossHistory.from_trainer(trainer).loss)
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4


@pytest.mark.parametrize("kind", sorted(APART - {"gpt2"}))
def test_losses_of_a_fast_run_hold_on_other_families(kind, tmp_path):
    assert FP32.dtype == torch.float32
    runs = []
    for fast in (False, True):
        model = get_peft_model(
            make(kind, std=0.05), LoraConfig(r=4, target_modules="all-linear")
        )
        trainer = build(Trainer, tmp_path, model, max_steps=3)
        prepare_trainer(trainer, fast=fast)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        runs.append([before, *LossHistory.from_trainer(trainer).loss])
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4
    data = batch(9)
    packed = without_padding(trainer.model, data)
    assert (packed is data) == (kind == "gpt_neox")  # its classifier has dropout
