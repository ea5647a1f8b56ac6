"""What lesson 10 builds, run from its cells on small random models."""

import pytest
import torch
from cells import cells
from peft import LoraConfig, get_peft_model
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    T5Config,
    T5ForConditionalGeneration,
)

from course_utils.runtime import Profile
from maintenance.cells import more_cells

BUILT = ("imports", "mean", "freeze", "bitfit", "fit", "shift", "lora-conv")
DRAWN = ("train-head", "t5", "words", "draw", "vit", "pretrain", "write", "ways")


@pytest.fixture(scope="module")
def lesson():
    torch.manual_seed(0)
    return cells("10_beyond_text", *BUILT, definitions=True)


def small_bert():
    shape = {"hidden_size": 8, "intermediate_size": 12, "num_attention_heads": 2}
    config = BertConfig(**shape, num_hidden_layers=3, vocab_size=20, num_labels=3)
    return BertForSequenceClassification(config)


def trained(model):
    return {name for name, p in model.named_parameters() if p.requires_grad}


def test_the_mean_leaves_padding_out_and_has_the_length_of_a_root(lesson):
    states, mask = torch.randn(2, 5, 9), torch.tensor([[1] * 5, [1, 1, 0, 0, 0]])
    vector = lesson.mean_over_tokens(states, mask)
    torch.testing.assert_close(vector.norm(dim=1), torch.full((2,), 3.0))
    short = lesson.mean_over_tokens(states[1:, :2], mask[1:, :2])
    torch.testing.assert_close(vector[1:], short)
    states[1, 0] += 1
    assert not lesson.mean_over_tokens(states, mask)[1].allclose(vector[1])


def test_freezing_leaves_the_layers_above_and_the_head(lesson):
    model = small_bert()
    counts = [lesson.freeze_first(model, k) for k in range(4)]
    assert counts == sorted(counts, reverse=True) and len(set(counts)) == 4
    assert trained(model) == {"classifier.weight", "classifier.bias"}
    lesson.freeze_first(model, 2)
    places = {name.split(".")[3] for name in trained(model) if "layer." in name}
    assert places == {"2"} and not any("embeddings" in n for n in trained(model))


def test_bitfit_moves_biases_and_the_head_alone(lesson):
    model = small_bert()
    lesson.only_biases(model)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    batch = {"input_ids": torch.randint(20, (4, 6)), "labels": torch.arange(4) % 3}
    losses = lesson.fit(model, iter([batch] * 3), 3, 1e-2)
    assert len(losses) == 3 and not model.training
    moved = {n for n, p in model.named_parameters() if not p.equal(before[n])}
    assert moved <= trained(model) and "classifier.weight" in moved
    assert any(name.endswith("value.bias") for name in moved)
    assert not any(n.endswith("weight") for n in moved if "classifier" not in n)


def test_the_loss_by_hand_is_the_models(lesson):
    shape = {"vocab_size": 12, "d_model": 8, "d_kv": 4, "d_ff": 12, "num_heads": 2}
    config = T5Config(**shape, num_layers=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(config).eval()
    rows = {"input_ids": torch.randint(2, 12, (3, 4))}
    rows["labels"] = torch.randint(1, 12, (3, 5))
    wanted = model(**rows).loss
    torch.testing.assert_close(lesson.loss_by_hand(model, **rows), wanted)
    off = lesson.loss_by_hand(model, **rows, factor=1.01)
    assert (off - wanted).abs() > 1e-4


@pytest.mark.parametrize(("channels", "side", "r"), [(1, 4, 4), (3, 2, 3)])
def test_lora_on_a_patch_convolution_is_pefts(lesson, channels, side, r):
    model = torch.nn.Sequential(torch.nn.Conv2d(channels, 10, side, stride=side))
    options = {"target_modules": ["0"], "init_lora_weights": False}
    config = LoraConfig(r=r, lora_alpha=6, **options)
    layer = get_peft_model(model, config).base_model.model[0]
    A, B = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    assert A.shape == (r, channels, side, side) and B.shape == (10, r, 1, 1)
    x = torch.randn(2, channels, 8, 8)
    ours = lesson.lora_conv(layer.base_layer, x, A, B, 6 / r)
    torch.testing.assert_close(ours, layer(x), atol=1e-5, rtol=1e-5)
    off = lesson.lora_conv(layer.base_layer, x, A, 1.01 * B, 6 / r)
    assert not off.allclose(layer(x), atol=1e-5, rtol=1e-5)


def drawn(device, seed=0):
    """The lesson's own models and data, for a profile on that device."""
    lesson = cells("10_beyond_text", *BUILT, *DRAWN, definitions=True)
    cells_of = more_cells(lesson, "10_beyond_text", "faces")
    cells_of.profile = Profile("t4", device, torch.float16, seed)
    cells_of.settings = {"words": 4, "digits": 1}
    return cells_of


def test_small_models_and_their_batches_are_made_on_the_profiles_device(monkeypatch):
    lesson = drawn("meta")
    lesson.vit = lesson.small_vit(26)
    item = torch.Tensor.item  # which what is on "meta" lacks
    say = lambda tensor: "meta" if tensor.is_meta else item(tensor)  # noqa: E731
    monkeypatch.setattr(torch.Tensor, "item", say)
    words = lesson.word_batches("rising", 4)
    pictures = lesson.draw_pictures("01", 6, seed=1)
    models = {
        lesson.small_t5(): words,
        lesson.vit: lesson.picture_batches(pictures, 2),
        lesson.start("LoRA"): lesson.picture_batches(pictures, 2),
    }
    for model, batches in models.items():
        assert lesson.fit(model, batches, 1, 1e-3) == ["meta"]
        assert {p.device.type for p in model.parameters()} == {"meta"}
    assert lesson.score_words(lesson.small_t5(), "rising") == "meta"
    assert lesson.score_pictures(lesson.vit, pictures) == "meta"


def test_another_seed_draws_other_words_pictures_and_weights():
    first, same, other = drawn("cpu"), drawn("cpu"), drawn("cpu", seed=1)

    def everything(lesson):
        pictures = lesson.draw_pictures("01", 6, seed=1)["pixel_values"]
        words = lesson.rows_of("rising", 4, seed=1)["input_ids"]
        weights = [m.state_dict() for m in (lesson.small_t5(), lesson.small_vit(2))]
        numbers = [t.double().sum() for state in weights for t in state.values()]
        return words, pictures, torch.stack(numbers)

    for a, b, c in zip(*map(everything, (first, same, other)), strict=True):
        assert a.equal(b) and not a.equal(c)
