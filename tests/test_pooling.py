"""The mean over tokens as a text's vector: padding, virtual tokens, saving."""

import copy

import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from test_classification import small_bert

from course_utils import models
from course_utils.pooling import MeanPooler, use_mean_pooling

IDS = torch.tensor([[5, 6, 7, 8, 9, 10], [11, 12, 13, 2, 2, 2]])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1], [1, 1, 1, 0, 0, 0]])


@pytest.fixture
def model():
    torch.manual_seed(0)
    return use_mean_pooling(small_bert(num_labels=3)[0])


def rows_of(model, **batch):
    return model.bert(**batch).last_hidden_state


def test_the_vector_is_the_mean_over_the_text_at_length_root_width(model):
    rows = rows_of(model, input_ids=IDS, attention_mask=MASK)
    mean = torch.stack([rows[0].mean(0), rows[1, :3].mean(0)])
    expected = mean / mean.norm(dim=1, keepdim=True) * 32**0.5
    found = model.bert(input_ids=IDS, attention_mask=MASK).pooler_output
    torch.testing.assert_close(found, expected)
    logits = model(input_ids=IDS, attention_mask=MASK).logits
    torch.testing.assert_close(logits, model.classifier(expected))
    assert (found - model.bert(input_ids=IDS).pooler_output)[1].abs().max() > 1e-2


def test_padding_changes_nothing_and_no_mask_means_no_padding(model):
    alone = model(input_ids=IDS[1:, :3]).logits
    padded = model(input_ids=IDS, attention_mask=MASK).logits[1:]
    torch.testing.assert_close(padded, alone)
    torch.testing.assert_close(model.bert(IDS, MASK)[1][1:], model.bert(IDS[1:, :3])[1])


def test_the_rows_of_a_prefix_are_not_there_and_those_of_a_prompt_count(model):
    options = {"task_type": "SEQ_CLS", "num_virtual_tokens": 4}
    kept, seen = {}, {}
    for kind in (PrefixTuningConfig, PromptTuningConfig):
        wrapped = get_peft_model(copy.deepcopy(model), kind(**options)).eval()
        pooler = wrapped.base_model.bert.pooler
        pooler.register_forward_hook(
            lambda pooler, args, found: seen.update(rows=args[0], found=found)
        )
        wrapped(input_ids=IDS, attention_mask=MASK)
        kept[kind] = dict(seen)
    prefix, prompt = kept.values()
    assert prefix["rows"].shape[1] == 6 and prompt["rows"].shape[1] == 4 + 6
    for run, own in ((prefix, 3), (prompt, 4 + 3)):
        mean = run["rows"][1, :own].mean(0)
        expected = mean / mean.norm() * 32**0.5
        torch.testing.assert_close(run["found"][1], expected)


def test_it_has_no_weights_and_a_copy_has_its_own_mask(model):
    assert not list(MeanPooler().parameters())
    assert not [name for name in model.state_dict() if "pooler" in name]
    twin = copy.deepcopy(model)
    model.bert.pooler.remember(model.bert, (), {"attention_mask": MASK})
    assert twin.bert.pooler.mask is None
    torch.testing.assert_close(
        twin(input_ids=IDS, attention_mask=MASK).logits,
        model(input_ids=IDS, attention_mask=MASK).logits,
    )
    assert model.bert.pooler.mask is None  # none is kept for the next batch


def test_a_saved_classifier_pools_alike_when_it_is_loaded(model, tmp_path):
    model.save_pretrained(tmp_path)
    small_bert(num_labels=3)[1].save_pretrained(tmp_path)
    again, _ = models.load_classifier(str(tmp_path), num_labels=3)
    torch.testing.assert_close(
        again(input_ids=IDS, attention_mask=MASK).logits,
        model(input_ids=IDS, attention_mask=MASK).logits,
    )


@pytest.mark.model
def test_the_built_in_encoder_reads_meaning_from_the_mean():
    """Two sentences of one meaning are nearer than two that share their words."""
    model, tokenizer = models.load_classifier(num_labels=3)
    texts = [
        "The cat sleeps on the sofa.",
        "A kitten is resting on the couch.",
        "The sofa company sleeps on its debts.",
    ]
    with torch.no_grad():
        batch = tokenizer(texts, padding=True, return_tensors="pt")
        vectors = model.bert(**batch).pooler_output
    assert vectors.norm(dim=1).tolist() == pytest.approx([384**0.5] * 3, rel=1e-4)
    near, far = (torch.cosine_similarity(vectors[0], v, dim=0) for v in vectors[1:])
    assert near > far + 0.05  # 0.70 and 0.57 in float32
