"""Soft prompts from scratch: equal to PEFT with the same random rows."""

from types import SimpleNamespace

import pytest
import torch
from cells import cells
from datasets import Dataset
from peft import PeftModel, PromptEncoderConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file
from small_models import byte_tokenizer, random_llama
from teacher_forcing import MARGIN, of_record, worst
from training_child import records
from trl import SFTTrainer

from course_utils.evaluation import evaluate
from course_utils.formatting import CompletionCollator, pack_examples
from course_utils.inference import generate
from course_utils.models import load_model, load_tokenizer
from course_utils.parameters import count_parameters
from course_utils.records import load_record
from course_utils.runtime import Profile, data_folder
from course_utils.training import (
    LossHistory,
    completion_loss,
    prepare_trainer,
    sft_config,
)
from course_utils.training_callbacks import CheckBeforeTraining

lesson = cells("05_prompt_tuning", "imports", "scratch", "ptuning", "words")
with_soft_prompt, nearest_words = lesson.with_soft_prompt, lesson.nearest_words
N, D, HIDDEN = 5, 32, 12
ROWS = [
    {"input_ids": [7, 8, 9, 10, 11, 12], "labels": [-100, -100, -100, 10, 11, 12]},
    {"input_ids": [40, 41, 42, 43], "labels": [-100, -100, 42, 43]},
]


def batch(side="right"):
    rows = [row | {"attention_mask": [1] * len(row["input_ids"])} for row in ROWS]
    return CompletionCollator(byte_tokenizer(), padding_side=side)(rows)


def random_rows(seed=3):
    return torch.randn(N, D, generator=torch.Generator().manual_seed(seed))


def frozen():
    return random_llama().requires_grad_(False)


def peft_prompt(rows):
    config = PromptTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM")
    theirs = get_peft_model(random_llama(), config).eval()
    theirs.prompt_encoder["default"].embedding.weight.data.copy_(rows)
    return theirs


def peft_encoder(kind):
    config = PromptEncoderConfig(
        num_virtual_tokens=N,
        encoder_hidden_size=HIDDEN,
        encoder_reparameterization_type=kind,
        task_type="CAUSAL_LM",
    )
    return get_peft_model(random_llama(), config).eval()


def copy_encoder(ours, theirs):
    """Give our network PEFT's random weights; fails if one has another shape."""
    weights = theirs.prompt_encoder["default"].state_dict()
    ours.load_state_dict({n.replace("mlp_head", "mlp"): w for n, w in weights.items()})


def difference(rows, theirs, data):
    """Largest gap to PEFT's logits, on the real tokens."""
    with torch.no_grad():
        ours = random_llama()(**with_soft_prompt(frozen(), rows, data)).logits
        gap = (ours - theirs(**data).logits)[:, N:].abs().amax(-1)
    return gap[data["attention_mask"].bool()].max().item()


def test_random_rows_give_the_logits_and_the_loss_of_peft():
    rows, data = random_rows(), batch()
    theirs = peft_prompt(rows)
    assert difference(rows, theirs, data) < 1e-5
    model = frozen()
    loss = model(**with_soft_prompt(model, rows, data)).loss
    torch.testing.assert_close(loss, theirs(**data).loss)


def test_one_per_cent_would_be_seen():
    rows, data = random_rows(), batch()
    assert difference(1.01 * rows, peft_prompt(rows), data) > 1e-4
    assert difference(rows.flip(0), peft_prompt(rows), data) > 1e-2


@pytest.mark.parametrize("key", ["attention_mask", "labels"])
def test_a_mask_or_labels_extended_wrongly_would_be_seen(key):
    rows, data, model = random_rows(), batch(), frozen()
    right = with_soft_prompt(model, rows, data)
    wrong = {k: v for k, v in right.items() if k != "position_ids"}
    wrong[key] = right[key].clone()
    wrong[key][:, 1] = 0 if key == "attention_mask" else 7
    assert abs(model(**wrong).loss - model(**right).loss) > 1e-4


def test_padding_on_the_left_changes_nothing():
    rows, model = random_rows(), frozen()
    logits = {}
    for side in ("left", "right"):
        data = batch(side)
        found = model(**with_soft_prompt(model, rows, data)).logits[:, N:]
        logits[side] = found[data["attention_mask"].bool()]
    torch.testing.assert_close(logits["left"], logits["right"], atol=1e-4, rtol=0)


def test_the_encoder_makes_the_rows_of_peft():
    theirs, data = peft_encoder("MLP"), batch()
    ours = lesson.PromptEncoder(N, D, HIDDEN)
    copy_encoder(ours, theirs)
    rows = ours()
    torch.testing.assert_close(rows, theirs.get_prompt(1)[0])
    assert difference(rows, theirs, data) < 1e-5
    assert difference(1.01 * rows, theirs, data) > 1e-5
    trained = theirs.get_nb_trainable_parameters()[0]
    assert count_parameters(ours).trainable == trained


def test_only_the_rows_get_gradients_and_they_are_those_of_peft():
    data, theirs, model = batch(), peft_prompt(random_rows()), frozen()
    rows = torch.nn.Parameter(random_rows())
    model(**with_soft_prompt(model, rows, data)).loss.backward()
    theirs(**data).loss.backward()
    twin = theirs.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(rows.grad, twin.grad, atol=1e-6, rtol=1e-4)
    assert rows.grad.abs().max() > 0
    assert all(p.grad is None for p in model.parameters())


def test_the_rows_stay_float32_before_a_16_bit_model():
    model = frozen().bfloat16()
    rows = torch.nn.Parameter(random_rows())
    inputs = with_soft_prompt(model, rows, batch())
    assert inputs["inputs_embeds"].dtype == torch.bfloat16
    model(**inputs).loss.backward()
    assert rows.grad.dtype == torch.float32


def test_a_batch_without_labels_is_for_generating():
    data = batch()
    del data["labels"]
    assert "labels" not in with_soft_prompt(frozen(), random_rows(), data)


def test_the_nearest_word_of_a_words_own_row_is_that_word():
    model, tokenizer = frozen(), byte_tokenizer()
    table = model.get_input_embeddings().weight
    found = nearest_words(3 * table[[70, 80]], table, tokenizer, k=2)
    assert [pairs[0][0] for pairs in found] == [tokenizer.decode([i]) for i in (70, 80)]
    assert all(pairs[0][1] == pytest.approx(1) for pairs in found)
    assert all(pairs[0][1] > pairs[1][1] for pairs in found)


# --- the course's training and generation with virtual tokens ------------------------


def trained(kind, folder, *, fast=True):
    """Train PEFT's prompt for a few steps; returns the trainer and its losses."""
    torch.manual_seed(4)
    model = peft_prompt(random_rows()) if kind == "prompt" else peft_encoder(kind)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(
            Profile("cpu", "cpu", torch.float32, 0),
            folder,
            max_steps=4,
            per_device_train_batch_size=4,
            gradient_accumulation_steps=2,
            learning_rate=1e-2,
        ),
        train_dataset=records(),
        eval_dataset=records(8, seed=9),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )
    prepare_trainer(trainer, fast=fast)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return trainer, [before, *LossHistory.from_trainer(trainer).loss]


@pytest.mark.parametrize("kind", ["prompt", "MLP", "LSTM"])
def test_losses_of_a_fast_run_equal_those_of_the_library(kind, tmp_path):
    runs = [trained(kind, tmp_path, fast=fast)[1] for fast in (False, True)]
    assert len(runs[0]) == 5 and runs[0][-1] != runs[0][1]
    assert max(abs(a - b) for a, b in zip(*runs, strict=True)) < 1e-4


@pytest.mark.parametrize("kind", ["prompt", "MLP"])
def test_a_trained_prompt_answers_alone_as_in_a_batch_and_off_as_before(kind, tmp_path):
    model, tokenizer = trained(kind, tmp_path)[0].model, byte_tokenizer()
    prompts = ["Turn on the light", "b", "x" * 60, "Good night!"]
    together = generate(model, tokenizer, prompts, max_new_tokens=8)
    alone = [generate(model, tokenizer, [p], max_new_tokens=8)[0] for p in prompts]
    assert together == alone
    base = generate(random_llama(), tokenizer, prompts, max_new_tokens=8)
    assert together != base
    with model.disable_adapter():
        assert generate(model, tokenizer, prompts, max_new_tokens=8) == base
        off = completion_loss(model, batch())
    torch.testing.assert_close(off, completion_loss(random_llama(), batch()))
    test = [{"prompt": p, "completion": "{}"} for p in prompts]
    scored = evaluate(model, tokenizer, test, max_new_tokens=8)
    assert list(scored.predictions) == together


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["prompt", "MLP"])
def test_completion_loss_is_the_models_own(kind, side):
    model = peft_prompt(random_rows()) if kind == "prompt" else peft_encoder(kind)
    data = batch(side)
    torch.testing.assert_close(completion_loss(model, data), model(**data).loss)


def test_packed_examples_are_refused_in_words():
    (row,) = pack_examples(ROWS, 16)
    packed = {name: torch.tensor([values]) for name, values in row.items()}
    completion_loss(random_llama(), packed)
    with pytest.raises(ValueError, match="one example "):
        completion_loss(peft_prompt(random_rows()), packed)


def test_packed_data_are_refused_before_step_1_whatever_computes_the_loss():
    rows = Dataset.from_list(list(pack_examples(ROWS, 16)))
    loader = SimpleNamespace(dataset=rows)
    args = SimpleNamespace(fp16=False, gradient_checkpointing=False)
    check = CheckBeforeTraining().on_train_begin
    check(args, None, None, model=random_llama(), train_dataloader=loader)
    model = peft_prompt(random_rows())
    with pytest.raises(ValueError, match="one example "):
        check(args, None, None, model=model, train_dataloader=loader)


# --- the trained prompt that lesson 05 loads -----------------------------------------


@pytest.fixture
def kept():
    folder = data_folder() / "adapters" / "05_prompt_tuning"
    if not folder.exists():
        pytest.skip("make runs LESSON=05 has not kept a prompt yet")
    (run,) = load_record("05_long")["runs"]
    return folder, run


def test_the_kept_prompt_is_that_of_its_record(kept):
    folder, run = kept
    file = folder / "adapter_model.safetensors"
    assert file.stat().st_size == run["measured"]["adapter_bytes"]
    (rows,) = load_file(file).values()
    assert rows.shape == (run["settings"]["method"]["num_virtual_tokens"], 576)
    assert rows.numel() == run["trainable_parameters"]


@pytest.mark.model
# bfloat16 takes seconds for an answer where the processor has none
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 24), (torch.bfloat16, 8)])
def test_the_kept_prompt_gives_the_answers_of_its_record(kept, dtype, count):
    folder, run = kept
    model = PeftModel.from_pretrained(load_model(dtype=dtype), folder)
    assert worst(of_record(model, load_tokenizer(), run, count)) < MARGIN


@pytest.mark.model
def test_another_prompt_than_the_kept_one_would_be_seen(kept):
    folder, run = kept
    model = PeftModel.from_pretrained(load_model(dtype=torch.float32), folder)
    rows = model.prompt_encoder["default"].embedding.weight.data
    right = rows.clone()
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    first = torch.cat([0 * right[:1], right[1:]])
    for wrong in (right[order], 0 * right, 0.5 * right, 1.5 * right, first):
        rows.copy_(wrong)
        assert worst(of_record(model, load_tokenizer(), run, 8)) > 2 * MARGIN
