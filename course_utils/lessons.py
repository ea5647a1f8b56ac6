"""What a lesson needs in order to teach: guesses, checks, result cards, results.

Nothing here raises on what a learner writes: a wrong answer is a line with a hint.
The tests of all exercises stand at the end. Each gets the learner's answer, never
trusted to be of the right type, and facts by name; it imports a heavy library itself,
so that other checks need not wait.
"""

from __future__ import annotations

import json
import math
import operator
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from course_utils import runtime, scoring
from course_utils.formatting import IGNORE, tokenize_example
from course_utils.memory import t4_plan
from course_utils.parameters import adapter_parameters
from course_utils.plotting import pareto_front
from course_utils.records import Table
from course_utils.sweep import best_of, neighbour

SIGNS = {"correct": "✓", "wrong": "✗", "unanswered": "…"}


@dataclass(frozen=True)
class Exercise:
    """One exercise: its number `N.M`, its test, and the hint after a wrong answer."""

    number: str
    test: Callable[..., bool]
    hint: str

    def accepts(self, answer: Any, **facts: Any) -> bool:
        """Say whether the answer is right; an exception in the test means it is not."""
        try:
            return bool(self.test(answer, **facts))
        except Exception:
            return False


REGISTER: dict[str, Exercise] = {}


class Verdict(str):
    """The result of a check: a string that a notebook does not echo below its line."""

    def _ipython_display_(self) -> None:
        """Show nothing: the check has already printed its line."""


def check(number: str, answer: Any = ..., **facts: Any) -> Verdict:
    """Check the answer to exercise `"N.M"`, and print and return the verdict.

    It is `"correct"`, `"wrong"`, or `"unanswered"` for `...` and None. Never raises.

    >>> verdict = check("99.1", ...)
    … Exercise 99.1: not answered yet.
    """
    exercise = REGISTER.get(number)
    if answer is None or answer is ...:
        verdict, message = "unanswered", "not answered yet."
    elif exercise is None:
        verdict, message = "wrong", "the course has no such exercise."
    elif exercise.accepts(answer, **facts):
        verdict, message = "correct", "correct."
    else:
        verdict, message = "wrong", f"not yet. Hint: {exercise.hint}"
    print(f"{SIGNS[verdict]} Exercise {number}: {message}")
    return Verdict(verdict)


@dataclass(frozen=True)
class Guess:
    """A guess made before the result is seen; `value` is `...` where there is none."""

    value: Any

    def _ipython_display_(self) -> None:
        """Show nothing: `guess` has already printed its line."""

    def compare(self, actual: Any, unit: str = "", *, word: str = "measured") -> None:
        """Print the guess beside what was measured (or `word`), both with the unit."""
        tail = f" {unit}" if unit else ""
        empty = self.value is None or self.value is ...
        said = word.capitalize() if empty else f"You guessed {self.value}{tail}; {word}"
        print(f"{said}: {actual}{tail}.")


def guess(value: Any, question: str) -> Guess:
    """Note a guess before the result is known, and print it; dots stand for none.

    >>> note = guess(3, "How many layers?")
    How many layers? Your guess: 3.
    >>> note.compare(30)
    You guessed 3; measured: 30.
    """
    empty = value is None or value is ...
    print(question if empty else f"{question} Your guess: {value}.")
    return Guess(value)


def result_card(title: str, **rows: Any) -> Table:
    """Return a table of one row per keyword; underscores in names become spaces.

    Floats are shown with three digits, other values as they are.

    >>> print(result_card("LoRA", exact_match="91 %", seconds=12.345))
    LoRA
    exact match  91 %
    seconds      12.3
    """
    texts = [f"{v:.3g}" if isinstance(v, float) else str(v) for v in rows.values()]
    names = [name.replace("_", " ") for name in rows]
    return Table((title, ""), tuple(zip(names, texts, strict=True)))


def save_result(lesson: str, headline: str, **numbers: Any) -> None:
    """Write the result of lesson `"NN"` to `build/results/NN.json`, print its headline.

    The numbers behind it are ints, floats, or 0-dimensional tensors, all finite.
    """
    if not re.fullmatch(r"\d\d", lesson):
        raise ValueError(f"a lesson is two digits such as '02', not {lesson!r}")
    plain = {k: v.item() if hasattr(v, "item") else v for k, v in numbers.items()}
    for name, value in plain.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"lesson {lesson}: {name} is {value}, not a finite number")
    result = {"lesson": lesson, "headline": headline}
    result |= {"profile": runtime.get_profile().name, "numbers": plain}
    path = _result_file(lesson)
    path.parent.mkdir(parents=True, exist_ok=True)
    written = path.with_suffix(f".{os.getpid()}.tmp")
    text = json.dumps(result, indent=1, ensure_ascii=False)
    written.write_text(text, encoding="utf-8")
    runtime.replace_file(written, path)
    print(f"Lesson {lesson}: {headline}")


def load_result(lesson: str) -> dict[str, Any] | None:
    """Return what `save_result` wrote for the lesson, or None if it has not run."""
    path = _result_file(lesson)
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _result_file(lesson: str) -> Path:
    return runtime.build_folder() / "results" / f"{lesson}.json"


def _exercise(number: str, hint: str) -> Callable:
    """Register the decorated function as the test of exercise `N.M`."""

    def register(test: Callable[..., bool]) -> None:
        REGISTER[number] = Exercise(number, test, hint)

    return register


def _number(number: str, hint: str, right: float, rel_tol: float = 0) -> None:
    """Register an exercise whose answer is one number."""
    _exercise(number, hint)(lambda answer: math.isclose(answer, right, rel_tol=rel_tol))


_number("0.1", "Multiply the parameters by the bytes of each.", 134_515_008 * 2)
_number(
    "2.3", "How many numbers of 4 bytes a parameter?", 6_738_415_616 * 16 / 1e9, 0.01
)
_number("4.1", "Count A and B only; their shapes are LoRA's.", 8 * (1536 + 576))
_number("5.1", "One row has the model's width, 4 bytes each.", 100 * 4096 * 4)
_number(
    "6.1", "Keys and values, 8 heads, each as wide as one of 32.", 20 * 2 * 16 * 8 * 64
)
_number("6.3", "Softmax: a score 0 has the weight e to the power of 0.", 1 / 33, 1e-3)
_number(
    "7.1",
    "8 bits for each block, and 32 more for 256 blocks.",
    right=4 + 8 / 128 + 32 / (128 * 256),
    rel_tol=1.2e-4,
)
_number("8.1", "Set the standard error to 0.01, and solve for n.", 0.25 / 0.01**2, 2e-4)
_number("9.1", "2 d m + m + d in one place, and 64 places.", right=67_379_200)
_number("9.3", "C has 64 directions, the product 8.", right=512)
_number("10.1", "Count the biases of one layer first.", 12 * (7 * 768 + 3072))
_number("10.2", "A sees a patch in all its colours.", 16 * (3 * 14 * 14 + 1024))
_number("11.4", "How far apart are numbers from 2 to 4? Take half a gap.", 2**-7)
_number("12.1", "How often does an adapter fit into the base? One more.", right=101)
_number("12.3", "c takes the place of b: a was used after it.", right=4)

_exercise("12.2", "x A^T B^T, scaled, for row 1 alone.")(
    lambda answer, *, right: answer.allclose(right, atol=1e-5)
)
_exercise("11.1", "The loss is too high, the steps are ordinary: what else is?")(
    lambda answer, *, fault: answer.strip().lower() == fault
)
_exercise("11.2", "Training goes well. Look at the kept rows themselves.")(
    lambda answer, *, fault: answer.strip().lower() == fault
)
_exercise("11.3", "The same length for each weight: how long are all together?")(
    lambda answer, *, right: math.isclose(answer, right, rel_tol=0.02)
)
_exercise("0.2", "Count the pairs that are the same JSON, and divide by all.")(
    lambda answer, *, given, references: math.isclose(
        answer, scoring.exact_match(given, references), rel_tol=1e-3
    )
)
_exercise("0.3", "Does the bot need a new form, or facts that change?")(
    lambda answer: answer.strip().lower() == "facts in the prompt"
)
_exercise("1.2", "One label for each token of the text, and none of them -100.")(
    lambda answer, *, input_ids: list(answer) == list(input_ids)
)
_exercise("3.4", "4 bytes for each parameter: how many are there with this rank?")(
    lambda answer, *, r_64_bytes: answer == r_64_bytes // 4
)
_exercise("6.2", "A prefix is (L, 2, H_kv, n, d_head): which one counts tokens?")(
    lambda answer, *, whole: whole.equal(answer)
)
_exercise("8.2", "Walk from the cheapest up, and keep each new best score.")(
    lambda answer, *, points: sorted(answer) == sorted(pareto_front(points))
)
_exercise("8.3", "If the lowest loss is at an edge, go one rate further.")(
    lambda answer, *, losses: math.isclose(
        answer, neighbour(best_of(losses), -1), rel_tol=0.01
    )
)
_exercise("9.2", "Input j meets column j of the weight.")(
    lambda answer, *, right: answer.allclose(right, atol=1e-5)
)
_exercise("10.3", "Shift, then fill.")(lambda answer, *, right: right.equal(answer))
_exercise("6.4", "Right ones of a row, divided by the sum of that row.")(
    lambda answer, *, matrix: all(
        math.isclose(share, row[i] / sum(row), abs_tol=1e-6)
        for i, (share, row) in enumerate(zip(answer, matrix, strict=True))
    )
)


@_exercise("1.1", "Which tokens follow the word before the turn is over?")
def _(answer, *, tokenizer):
    record = {"prompt": "Hi", "completion": "Hello"}
    labels = tokenize_example(record, tokenizer)["labels"]
    return answer == sum(label != IGNORE for label in labels)


@_exercise("1.3", "Which examples should share a batch, so that little is filled?")
def _(answer, *, waste, count):
    order = list(answer)
    complete = sorted(order) == list(range(count))
    return complete and waste(order) < waste(range(count)) / 2


@_exercise("2.1", "In the first step, what are m_hat and v_hat of one gradient?")
def _(answer):
    big, small = answer
    return all(math.isclose(step, 1e-4, rel_tol=0.01) for step in (big, small))


@_exercise("2.2", "Go back to sums over tokens, then divide once by all tokens.")
def _(answer, *, means, tokens):
    total = sum(m * n for m, n in zip(means, tokens, strict=True))
    return math.isclose(answer, total / sum(tokens), rel_tol=1e-6)


@_exercise("2.4", "Try sizes between the two that are printed.")
def _(answer, *, peak_gib):
    batch = int(answer)
    return answer == batch and peak_gib(batch) <= 14 < peak_gib(batch + 1)


@_exercise("3.1", "A and B of each target: r * d_in and d_out * r, in each layer.")
def _(answer, *, config):
    options = {"r": 16, "target_modules": ["q_proj", "v_proj"]}
    return answer == adapter_parameters(config, "lora", **options)


@_exercise("3.2", "B A has the shape of W; how often does it count?")
def _(answer, *, W, A, B, alpha, r):
    return answer.allclose(W + alpha / r * (B @ A), rtol=1e-5, atol=1e-6)


@_exercise("3.3", "Layer 2 is `layers.2.`, layer 20 is `layers.20.`: mind the dot.")
def _(answer, *, names):
    last = re.compile(r".*layers\.[2-9]\d\.(.+\.)?[qv]_proj")
    wanted = [name for name in names if last.fullmatch(name)]
    return [name for name in names if re.fullmatch(answer, name)] == wanted


@_exercise("4.2", "The last r columns of U and rows of Vh; each side takes a root.")
def _(answer, *, weight, r):
    import torch

    A, B = answer
    U, S, Vh = torch.linalg.svd(weight.float(), full_matrices=False)
    wanted = U[:, -r:] @ torch.diag(S[-r:]) @ Vh[-r:]
    shapes = A.shape == (r, weight.shape[1]) and B.shape == (weight.shape[0], r)
    return shapes and torch.allclose(B @ A, wanted, atol=1e-3 * wanted.abs().max())


@_exercise("4.3", "Raise the rank until held(...) first reaches 0.9.")
def _(answer, *, singular_values):
    energy = singular_values.double() ** 2
    held = energy.cumsum(0) / energy.sum()  # by the ranks 1, 2, ...
    return operator.index(answer) == 1 + (held < 0.9).sum()


@_exercise("5.2", "`pad(x, (left, right), value=...)`: which side, which label?")
def _(answer, *, labels, n):
    before, behind = answer.split([labels.shape[1], n], dim=1)
    return before.equal(labels) and (behind == -100).all()


@_exercise("5.3", "`rows.flip(0)` turns the order round; the rest is as above.")
def _(answer, *, model, rows, batch, with_soft_prompt):
    loss = model(**with_soft_prompt(model, rows.flip(0), batch)).loss.item()
    return math.isclose(answer, loss, rel_tol=1e-4)


@_exercise("7.2", "Which weights did the adapter see while it was trained?")
def _(answer, *, four_bit, state, A, B, scale):
    from bitsandbytes.functional import dequantize_4bit

    wanted = dequantize_4bit(four_bit, state) + scale * B @ A
    return answer.shape == wanted.shape and answer.allclose(wanted, atol=1e-5)


@_exercise("7.3", "Try batch_size 8, then 12, and look at plan.fits('T4').")
def _(answer, *, recipe):
    options = {"sequence_length": 1024, "gradient_checkpointing": True, **recipe}
    options["double_quant"] = False
    sizes = operator.index(answer), answer + 1
    plans = [t4_plan("llama-2-7b", "qlora", batch_size=n, **options) for n in sizes]
    return [plan.fits("T4") for plan in plans] == [True, False]
