"""Classes, predictions, scores and confusions."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from small_models import byte_tokenizer, small_bert

from course_utils.classification import (
    accuracy,
    confusion_matrix,
    label_names,
    macro_f1,
    predict,
    tokenize_texts,
)

NAMES = ["bad", "good", "mixed"]
ROWS = [
    {"text": f"{word} {i}", "label": name, "slice": "plain" if i % 2 else "irony"}
    for i in range(8)
    for name, word in zip(NAMES, ("aaa", "zzz", "mmm"), strict=True)
]


def test_labels_become_numbers_in_the_order_of_the_names():
    assert label_names(ROWS) == NAMES
    rows = [ROWS[0], ROWS[1], ROWS[2] | {"text": "a" * 500}]
    rows = tokenize_texts(rows, byte_tokenizer(), NAMES)
    assert rows["labels"] == [0, 1, 2]
    assert [len(ids) for ids in rows["input_ids"]] == [5, 5, 128]
    with pytest.raises(ValueError, match="'bad' is not one of"):
        tokenize_texts(ROWS[:1], byte_tokenizer(), ["good"])


def test_predictions_do_not_depend_on_the_batch_and_leave_the_mode():
    model, tokenizer = small_bert(num_labels=3)
    model.train()
    model.bert.eval()
    texts = ["a", "a much longer text than the others", "zz", "mmm mmm"]
    one = [predict(model, tokenizer, [text], NAMES)[0] for text in texts]
    assert predict(model, tokenizer, texts, NAMES, batch_size=3) == one
    assert model.training and not model.bert.training
    assert predict(model, tokenizer, [], NAMES) == []


pairs = st.lists(
    st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)), min_size=1, max_size=30
)


@given(pairs)
def test_scores_follow_from_the_confusions(found):
    predictions, references = zip(*found, strict=True)
    matrix = torch.tensor(confusion_matrix(predictions, references, NAMES))
    assert matrix.sum() == len(found)
    right = matrix.diagonal()
    assert accuracy(predictions, references) == pytest.approx(
        right.sum().item() / len(found)
    )
    true, named = matrix.sum(1), matrix.sum(0)
    f1 = (2 * right / (true + named))[true > 0]
    assert macro_f1(predictions, references) == pytest.approx(f1.mean().item())


def test_a_class_without_a_place_is_named():
    with pytest.raises(ValueError, match=r"\['c'\] is none of the classes"):
        confusion_matrix(["c"], ["a"], ["a", "b"])
    with pytest.raises(ValueError, match="none of the classes"):
        confusion_matrix(["a"], ["c"], ["a", "b"])
