"""Sort texts into classes: tokenize, predict, score, and count confusions.

The model is an encoder with a head of one output per class, such as
`models.load_classifier` gives; labels are numbers 0, 1, ... in the order of
`label_names`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "accuracy",
    "confusion_matrix",
    "label_names",
    "macro_f1",
    "parameter_groups",
    "predict",
    "tokenize_texts",
]


def label_names(dataset: Any) -> list[str]:
    """The classes of a data set, as texts in alphabetical order (numbers in theirs).

    Args:
        dataset: rows with a `label`.

    Examples:
        >>> label_names([{"label": "good"}, {"label": "bad"}, {"label": "good"}])
        ['bad', 'good']
    """
    return [str(label) for label in sorted({row["label"] for row in dataset})]


def parameter_groups(model: Any, rate: float, head_rate: float) -> list[dict]:
    """What a classifier trains, as an optimiser wants it: its head at its own rate.

    A fresh head and an adapter or encoder want rates that differ a hundredfold.

    Args:
        model: a classifier whose head is called `classifier`, as PEFT wraps it or not.
        rate: learning rate of all trainable parameters outside the head.
        head_rate: learning rate of the head.

    Returns:
        Two groups, the head second; without parameters outside it, the head alone.
    """
    body, head = [], []
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            (head if "classifier" in name.split(".") else body).append(parameter)
    groups = [{"params": body, "lr": rate}, {"params": head, "lr": head_rate}]
    return [group for group in groups if group["params"]]


def tokenize_texts(
    dataset: Any,
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    max_length: int = 128,
) -> Dataset:
    """Turn `text` and `label` into what a classifier trains on.

    Args:
        dataset: rows with `text` and `label`.
        tokenizer: the classifier's.
        names: class names; a label's number is its place in them.
        max_length: longer texts lose their end, tokens.

    Returns:
        A data set with `input_ids`, `attention_mask` and `labels` (an int), not padded.

    Raises:
        ValueError: a label is not among the names.
    """
    import datasets

    rows = []
    for row in dataset:
        if str(row["label"]) not in names:
            raise ValueError(f"label {row['label']!r} is not one of {list(names)}")
        encoded = tokenizer(row["text"], truncation=True, max_length=max_length)
        rows.append(
            {
                "input_ids": encoded["input_ids"],
                "attention_mask": encoded["attention_mask"],
                "labels": names.index(str(row["label"])),
            }
        )
    return datasets.Dataset.from_list(rows)


def predict(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    texts: Sequence[str],
    names: Sequence[str],
    *,
    batch_size: int = 64,
    max_length: int = 128,
) -> list[str]:
    """Name the likeliest class of each text.

    Args:
        model: a classifier, with or without a PEFT adapter, in any mode.
        tokenizer: its tokenizer.
        texts: what to classify.
        names: class names, in the order of the model's outputs.
        batch_size: texts at once.
        max_length: longer texts lose their end, tokens.

    Returns:
        One name a text, in their order. The model's mode is as it was.
    """
    import torch

    modes = [(module, module.training) for module in model.modules()]
    found: list[str] = []
    options = {"truncation": True, "max_length": max_length, "padding": True}
    try:
        model.eval()
        for start in range(0, len(texts), batch_size):
            part = list(texts[start : start + batch_size])
            batch = tokenizer(part, return_tensors="pt", **options).to(model.device)
            batch.pop("token_type_ids", None)  # all 0; PEFT would warn of them
            with torch.no_grad():
                best = model(**batch).logits.argmax(-1)  # (B,)
            found += [names[i] for i in best.tolist()]
    finally:
        for module, training in modes:
            module.training = training
    return found


def accuracy(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The share of predictions that are right, 0 to 1.

    Args:
        predictions, references: class names, one a text.

    Examples:
        >>> accuracy(["good", "bad"], ["good", "good"])
        0.5
    """
    pairs = list(zip(predictions, references, strict=True))
    return sum(p == r for p, r in pairs) / len(pairs)


def confusion_matrix(
    predictions: Sequence[str], references: Sequence[str], names: Sequence[str]
) -> list[list[int]]:
    """Count each pair: a row is the true class, a column what was predicted.

    Args:
        predictions, references: class names, one a text.
        names: all classes, in the order of rows and columns.

    Examples:
        >>> confusion_matrix(["b", "b", "a"], ["a", "b", "a"], ["a", "b"])
        [[1, 1], [0, 1]]
    """
    counts = [[0] * len(names) for _ in names]
    for predicted, true in zip(predictions, references, strict=True):
        counts[names.index(true)][names.index(predicted)] += 1
    return counts


def macro_f1(predictions: Sequence[str], references: Sequence[str]) -> float:
    """The F1 of each class of the references, averaged with equal weight, 0 to 1.

    F1 is 2 · right / (predicted + true). A model that names one class all the time
    can be right often where that class is common, but not by this measure.

    Args:
        predictions, references: class names, one a text.

    Examples:
        >>> round(macro_f1(["a", "a", "a", "a"], ["a", "a", "a", "b"]), 3)
        0.429
    """
    scores = []
    for name in sorted(set(references)):
        right = sum(
            p == r == name for p, r in zip(predictions, references, strict=True)
        )
        named = sum(p == name for p in predictions)
        scores.append(2 * right / (named + sum(r == name for r in references)))
    return sum(scores) / len(scores)
