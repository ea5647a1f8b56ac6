"""Tests and hints of the exercises in lesson 01."""

from __future__ import annotations

from course_utils.lessons import exercise


@exercise("1.1", hint="Which tokens follow the word before the turn is over?")
def _(answer, *, tokenizer):
    from course_utils.formatting import IGNORE, tokenize_example

    record = {"prompt": "Hi", "completion": "Hello"}
    labels = tokenize_example(record, tokenizer)["labels"]
    return answer == sum(label != IGNORE for label in labels)


@exercise("1.2", hint="One label for each token of the text, and none of them -100.")
def _(answer, *, input_ids):
    return list(answer) == list(input_ids)


@exercise("1.3", hint="Which examples should share a batch, so that little is filled?")
def _(answer, *, waste, count):
    order = list(answer)
    whole = sorted(order) == list(range(count))
    return whole and waste(order) < waste(range(count)) / 2
