"""Prefix tuning from scratch: equal to PEFT, positions right, the prefix learns."""

import copy

import datasets
import pytest
import torch
from cells import cells
from peft import (
    PeftModel,
    PrefixTuningConfig,
    get_peft_model,
    initialize_kv_prefix_from_text,
)
from safetensors.torch import load_file
from small_models import byte_tokenizer, random_llama
from teacher_forcing import MARGIN, of_record, worst
from trl import SFTTrainer

from course_utils.formatting import CompletionCollator
from course_utils.inference import generate
from course_utils.models import load_model, load_tokenizer
from course_utils.parameters import adapter_parameters, count_parameters
from course_utils.records import load_record
from course_utils.runtime import Profile, data_folder, set_seed
from course_utils.sweep import experiment
from course_utils.sweep.experiment import make_model
from course_utils.training import LossHistory, prepare_trainer, sft_config
from maintenance.runs.lists import LESSON_RUNS

lesson = cells(
    *("06_prefix_tuning", "imports", "from-text", "scratch-cache", "scratch"),
    *("shape", "mlp"),
)
with_prefix, prefix_from_text = lesson.with_prefix, lesson.prefix_from_text
prefix_cache, prefix_shape = lesson.prefix_cache, lesson.prefix_shape
from_peft_rows, to_peft_rows = lesson.from_peft_rows, lesson.to_peft_rows
PrefixMLP = lesson.PrefixMLP
PROJECTED = {"prefix_projection": True, "encoder_hidden_size": 7}
TOKENIZER = byte_tokenizer()
N = 5
IDS = torch.arange(3, 19).reshape(2, 8)
MASK = torch.ones_like(IDS)
MASK[1, -2:] = 0
LABELS = IDS.masked_fill(MASK == 0, -100)
LABELS[:, :3] = -100


def random_prefix(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(prefix_shape(model.config, N), generator=generator)


def peft_model(**options):
    config = PrefixTuningConfig(num_virtual_tokens=N, task_type="CAUSAL_LM", **options)
    return get_peft_model(random_llama(), config).eval()


def peft_with(prefix):
    model = peft_model()
    encoder = model.prompt_encoder["default"]
    with torch.no_grad():
        encoder.embedding.weight.copy_(to_peft_rows(prefix))
    return model


def test_the_prefix_counts_heads_of_keys_and_values():
    config = random_llama().config
    assert config.num_key_value_heads < config.num_attention_heads
    assert prefix_shape(config, N) == (2, 2, 2, N, 8)
    assert prefix_cache(torch.zeros(prefix_shape(config, N)), 3).get_seq_length() == N


@pytest.mark.parametrize("mask", [None, MASK])
def test_a_random_prefix_gives_the_logits_of_peft(mask):
    ours = random_llama()
    prefix = random_prefix(ours)
    theirs = peft_with(prefix)(IDS, attention_mask=mask).logits
    logits = with_prefix(ours, prefix, IDS, mask).logits
    real = slice(None) if mask is None else mask.bool()
    torch.testing.assert_close(logits[real], theirs[real], rtol=0, atol=1e-4)
    assert (logits - ours(IDS).logits).abs().max() > 0.1
    off = with_prefix(ours, 1.01 * prefix, IDS, mask).logits
    assert (off[real] - theirs[real]).abs().max() > 1e-3, "one per cent is not seen"


def test_loss_and_gradient_are_those_of_peft():
    ours, batch = random_llama().requires_grad_(False), {"labels": LABELS}
    prefix = random_prefix(ours).requires_grad_()
    theirs = peft_with(prefix)
    loss = with_prefix(ours, prefix, IDS, MASK, **batch).loss
    loss.backward()
    twin = theirs(IDS, attention_mask=MASK, **batch).loss
    twin.backward()
    assert loss.item() == pytest.approx(twin.item(), abs=1e-5)
    rows = theirs.prompt_encoder["default"].embedding.weight.grad
    torch.testing.assert_close(to_peft_rows(prefix.grad), rows)
    assert rows.abs().min() > 0
    trained = {n for n, p in theirs.named_parameters() if p.grad is not None}
    assert trained == {"prompt_encoder.default.embedding.weight"}
    assert all(p.grad is None for p in ours.parameters())


def test_positions_are_counted_behind_the_prefix():
    """PEFT gives none; the model counts from the length of the cache."""
    ours, given = random_llama(), {}
    hook = ours.model.rotary_emb.register_forward_pre_hook(
        lambda _m, args, kwargs: given.update(kwargs), with_kwargs=True
    )
    theirs = peft_with(random_prefix(ours))
    theirs.get_base_model().model.rotary_emb.register_forward_pre_hook(
        lambda _m, args, kwargs: given.update(peft=kwargs["position_ids"]),
        with_kwargs=True,
    )
    with_prefix(ours, random_prefix(ours), IDS)
    theirs(IDS)
    hook.remove()
    assert given["position_ids"].tolist() == [list(range(N, N + 8))]
    assert given["peft"].tolist() == given["position_ids"].tolist()


def test_the_layouts_turn_into_each_other():
    prefix = random_prefix(random_llama())
    rows = to_peft_rows(prefix)
    assert rows.shape == (N, prefix.numel() // N)
    assert torch.equal(from_peft_rows(rows, tuple(prefix.shape)), prefix)


def test_a_prefix_made_from_text_is_that_text():
    model = random_llama()
    text, rest = IDS[:1, :N], IDS[:1, N:]
    prefix = prefix_from_text(model, text)
    whole = model(IDS[:1]).logits[:, N:]
    behind = with_prefix(model, prefix, rest).logits
    torch.testing.assert_close(behind, whole, rtol=0, atol=1e-4)
    assert not torch.allclose(model(rest).logits, whole, atol=1e-2)


def test_a_prefix_from_text_is_the_one_of_peft():
    theirs, tokenizer = peft_model(), byte_tokenizer()
    text = "Turn it off."
    initialize_kv_prefix_from_text(
        theirs, tokenizer, text=text, use_chat_template=False
    )
    ids = tokenizer(text, return_tensors="pt")["input_ids"][:, :N]
    prefix = prefix_from_text(random_llama(), ids)
    rows = theirs.prompt_encoder["default"].embedding.weight
    torch.testing.assert_close(to_peft_rows(prefix), rows, rtol=0, atol=1e-5)


def our_network(theirs):
    """Our network with the numbers of PEFT's."""
    config = theirs.get_base_model().config
    shape = prefix_shape(config, N)
    ours = PrefixMLP(shape, width=shape[2] * shape[4], hidden=7)
    encoder = theirs.prompt_encoder["default"]
    with torch.no_grad():
        ours.rows.copy_(encoder.embedding.weight)
        ours.mlp.load_state_dict(encoder.transform.state_dict())
    return ours


def test_the_network_is_that_of_peft():
    theirs = peft_model(**PROJECTED)
    ours = our_network(theirs)
    logits = with_prefix(random_llama(), ours(), IDS, MASK).logits
    expected = theirs(IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits, expected, rtol=0, atol=1e-4)
    config = theirs.peft_config["default"]
    count = sum(p.numel() for p in ours.parameters())
    assert count == count_parameters(theirs).trainable
    assert count == adapter_parameters(theirs.get_base_model().config, config)


def test_the_network_is_not_needed_after_training(tmp_path):
    theirs = peft_model(**PROJECTED)
    theirs.save_pretrained(tmp_path)
    saved = load_file(tmp_path / "adapter_model.safetensors")
    assert set(saved) == {"prompt_embeddings"}
    again = PeftModel.from_pretrained(random_llama(), tmp_path).eval()
    assert torch.allclose(again(IDS).logits, theirs(IDS).logits, atol=1e-5)
    fixed = our_network(theirs)().detach()  # the same by hand: keep what it gives
    torch.testing.assert_close(to_peft_rows(fixed), saved["prompt_embeddings"])


def test_the_prefix_is_cast_to_the_models_dtype():
    model = random_llama().bfloat16().requires_grad_(False)
    prefix = random_prefix(model).requires_grad_()
    loss = with_prefix(model, prefix, IDS, labels=LABELS).loss
    loss.backward()
    assert prefix.grad.dtype == torch.float32 and prefix.grad.abs().max() > 0


def trainer_for(model, folder, **settings):
    rows = [
        {"input_ids": [*range(5, 15 + i)], "attention_mask": [1] * (10 + i)}
        for i in range(4)
    ]
    for row in rows:
        row["labels"] = [-100] * 4 + row["input_ids"][4:]
    options = {"max_steps": 3, "per_device_train_batch_size": 2} | settings
    return SFTTrainer(
        model=model,
        args=sft_config(Profile("cpu", "cpu", torch.float32, 0), folder, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        data_collator=CompletionCollator(byte_tokenizer()),
        processing_class=byte_tokenizer(),
    )


@pytest.mark.parametrize("options", [{}, PROJECTED])
def test_the_courses_trainer_gives_the_librarys_losses(options, tmp_path):
    losses = []
    for fast in (True, False):
        set_seed(0)
        trainer = trainer_for(peft_model(**options), tmp_path, learning_rate=0.1)
        prepare_trainer(trainer, fast=fast)
        trainer.train()
        losses.append(LossHistory.from_trainer(trainer).loss)
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)
    assert losses[0][-1] < losses[0][0]


def test_checkpointing_is_refused_wherever_it_was_switched_on(tmp_path):
    for model, settings in (
        (peft_model(), {"gradient_checkpointing": True}),
        (peft_model(), {}),
    ):
        trainer = trainer_for(model, tmp_path, **settings)
        if not settings:
            model.get_base_model().gradient_checkpointing_enable()
        prepare_trainer(trainer)
        with pytest.raises(ValueError, match="does not work with gradient checkpoint"):
            trainer.train()


def test_a_prefix_generates_whatever_a_trainer_has_left(tmp_path):
    model = peft_with(random_prefix(random_llama()))
    base, tokenizer = model.get_base_model(), byte_tokenizer()
    fresh = generate(model, tokenizer, ["Hello", "Dim it"], max_new_tokens=6)
    base.config.use_cache = base.generation_config.use_cache = False
    model.train()
    base.gradient_checkpointing_enable()
    with pytest.raises(RuntimeError):
        model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6)
    assert generate(model, tokenizer, ["Hello", "Dim it"], max_new_tokens=6) == fresh
    base.gradient_checkpointing_disable()
    trainer = trainer_for(model, tmp_path, learning_rate=0.0)
    prepare_trainer(trainer)
    trainer.train()
    assert base.config.use_cache and base.generation_config.use_cache
    model.generate(input_ids=IDS, attention_mask=MASK, max_new_tokens=6)
    assert generate(model, tokenizer, ["Hello", "Dim it"], max_new_tokens=6) == fresh


def test_a_recorded_run_starts_from_the_instructions(monkeypatch):
    bare = copy.deepcopy(byte_tokenizer())
    bare.chat_template = None  # PEFT would lay the text out by it
    for name, value in (("load_model", random_llama()), ("load_tokenizer", bare)):
        monkeypatch.setattr(experiment, name, lambda *_, v=value, **__: v)
    long, *others = LESSON_RUNS["06"]["06_prefix"]
    assert long.prefix_from == "schema" and others[-1].prefix_from is None
    rows = make_model(long).prompt_encoder["default"].embedding.weight
    text = (data_folder() / long.data / "schema.txt").read_text(encoding="utf-8")
    ids = bare(text, return_tensors="pt")["input_ids"][:, : len(rows)]
    expected = to_peft_rows(prefix_from_text(random_llama(), ids))
    torch.testing.assert_close(rows.detach(), expected, rtol=0, atol=1e-4)


@pytest.fixture
def kept():
    folder = data_folder() / "adapters" / "06_prefix_tuning"
    if not folder.exists():
        pytest.skip("make runs LESSON=06 has not kept a prefix yet")
    (run,) = [r for r in load_record("06_prefix")["runs"] if r["label"] == "prefix"]
    return folder, run


def test_the_kept_prefix_is_that_of_its_record(kept):
    folder, run = kept
    file = folder / "adapter_model.safetensors"
    assert file.stat().st_size == run["measured"]["adapter_bytes"]
    (rows,) = load_file(file).values()
    assert rows.shape == (run["settings"]["method"]["num_virtual_tokens"], 30 * 2 * 192)
    assert rows.numel() == run["trainable_parameters"]


@pytest.mark.model
# bfloat16 takes seconds for an answer where the processor has none
@pytest.mark.parametrize(("dtype", "count"), [(torch.float32, 24), (torch.bfloat16, 8)])
def test_the_kept_prefix_gives_the_answers_of_its_record(kept, dtype, count):
    folder, run = kept
    model = PeftModel.from_pretrained(load_model(dtype=dtype), folder)
    assert worst(of_record(model, load_tokenizer(), run, count)) < MARGIN


@pytest.mark.model
def test_another_prefix_than_the_kept_one_would_be_seen(kept):
    """Not one in another order: its keys have no positions, and attention is a sum."""
    folder, run = kept
    model = PeftModel.from_pretrained(load_model(dtype=torch.float32), folder)
    rows = model.prompt_encoder["default"].embedding.weight.data
    right = rows.clone()
    first = torch.cat([0 * right[:1], right[1:]])
    for wrong in (0 * right, 0.5 * right, 1.5 * right, first):
        rows.copy_(wrong)
        assert worst(of_record(model, load_tokenizer(), run, 8)) > 2 * MARGIN
