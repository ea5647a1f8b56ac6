"""Sort texts into classes: tokenize, predict, score, and count confusions.

The model is one of `models.load_classifier`; its outputs are the classes in the order
of `label_names`. Scores take class names, one a text.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from course_utils.inference import inference_state

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

# Longer texts lose their end. Token types are all 0, and PEFT would warn of them.
_TOKENIZING = {"truncation": True, "max_length": 128, "return_token_type_ids": False}


def label_names(dataset: Any) -> list[str]:
    """Return the classes of rows with a `label`, as texts; numbers in their order.

    >>> label_names([{"label": "good"}, {"label": "bad"}, {"label": "good"}])
    ['bad', 'good']
    """
    labels = {str(row["label"]) for row in dataset}
    return sorted(labels, key=int if all(map(str.isdecimal, labels)) else str)


def parameter_groups(model: Any, rate: float, head_rate: float) -> list[dict]:
    """Return what a classifier trains, for an optimiser: its head at its own rate.

    A fresh head (called `classifier`) and an adapter or encoder want rates that differ
    a hundredfold. The head's group is last, and alone where nothing else is trained.
    """
    body, head = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if "classifier" in name.split(".") else body).append(parameter)
    groups = [{"params": body, "lr": rate}, {"params": head, "lr": head_rate}]
    return [group for group in groups if group["params"]]


def tokenize_texts(
    dataset: Any, tokenizer: PreTrainedTokenizerBase, names: Sequence[str]
) -> Dataset:
    """Turn rows with `text` and `label` into token ids, masks and places in `names`."""
    import datasets

    rows = []
    for row in dataset:
        if str(row["label"]) not in names:
            raise ValueError(f"label {row['label']!r} is not one of {list(names)}")
        encoded = tokenizer(row["text"], **_TOKENIZING)
        rows.append({**encoded, "labels": names.index(str(row["label"]))})
    return datasets.Dataset.from_list(rows)


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    batch_size: int = 64,
) -> list[str]:
    """Name the likeliest class of each text; the model's mode stays as it was."""
    import torch

    predictions: list[str] = []
    with torch.no_grad(), inference_state(model):
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = tokenizer(part, padding=True, return_tensors="pt", **_TOKENIZING)
            best = model(**batch.to(model.device)).logits.argmax(-1)  # (B,)
            predictions += [names[i] for i in best.tolist()]
    return predictions


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the share of predictions that are right, 0 to 1.

    >>> accuracy(["good", "bad"], ["good", "good"])
    0.5
    """
    pairs = list(zip(predictions, references, strict=True))
    return sum(p == r for p, r in pairs) / len(pairs)


def confusion_matrix(
    predictions: Sequence[str], references: Sequence[str], names: Sequence[str]
) -> list[list[int]]:
    """Count each pair: a row is the true class, a column what was predicted.

    >>> confusion_matrix(["b", "b", "a"], ["a", "b", "a"], ["a", "b"])
    [[1, 1], [0, 1]]
    """
    if unknown := {*references, *predictions} - {*names}:
        raise ValueError(f"{sorted(unknown)} is none of the classes {list(names)}")
    counts = Counter(zip(references, predictions, strict=True))
    return [[counts[true, predicted] for predicted in names] for true in names]


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """Return the F1 of each class of the references, averaged alike, 0 to 1.

    F1 is 2 · right / (predicted + true). A model that always names the commonest class
    can be right often, but not by this measure.

    >>> round(macro_f1(["a", "a", "a", "a"], ["a", "a", "a", "b"]), 3)
    0.429
    """
    right = Counter(p for p, r in zip(predictions, references, strict=True) if p == r)
    predicted, true = Counter(predictions), Counter(references)
    scores = [2 * right[n] / (predicted[n] + true[n]) for n in sorted(true)]
    return sum(scores) / len(scores)
