"""What rounding all weights does to a model, without training: a recorded run.

`run_rounding` replaces each linear weight of the layers by its rounded self, and
compares the model with the original on two sets of texts.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable
from typing import Any

from course_utils.data import load_examples
from course_utils.evaluation import stratified
from course_utils.experiment_setup import Experiment, quantized_start
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.models import load_model, load_tokenizer
from course_utils.runtime import set_seed

ALPHA = 16  # cancels out: an adapter's start does not depend on it


def rounding_of(name: str) -> Callable[[Any], Any]:
    """The rounding that a name stands for.

    Args:
        name: `"int8"` (a row shares a scale), or `"int4"`, `"fp4"`, `"nf4"` in blocks
            of 64, with `"+dq"` for double quantization.

    Raises:
        ValueError: an unknown name.
    """
    from course_utils import nf4

    if name == "int8":

        def rows(weight: Any) -> Any:
            levels = nf4.int_levels(8)
            parts = nf4.quantize_blocks(weight, levels, weight.shape[1])
            return nf4.dequantize_blocks(*parts, levels).reshape(weight.shape)

        return rows
    kind, _, double = name.partition("+")
    if kind not in nf4.LEVELS or double not in ("", "dq"):
        raise ValueError(f"rounding {name!r}: expected int8, int4, fp4, nf4 or nf4+dq")
    return lambda weight: nf4.quantize_4bit(
        weight, kind, double_quant=bool(double)
    ).dequantize()


def rounded_weight(weight: Any, method: str, start: str | None) -> Any:
    """The weight that a start leaves: rounded, and the adapter's product added.

    Args:
        weight: (out, in).
        method: `"round:nf4"`, or `"round:nf4:32"` with the rank of the adapter.
        start: as in `Experiment`; None for no adapter.

    Returns:
        A weight of the same shape, in float32.
    """
    _, name, *rank = method.split(":")
    rounding = rounding_of(name)
    if start is None:
        return rounding(weight)
    r = int(rank[0]) if rank else 8
    A, B, rounded = quantized_start(start)(weight, r, ALPHA, rounding)
    return rounded + ALPHA / r * B @ A


def run_rounding(experiment: Experiment) -> dict[str, Any]:
    """Measure an experiment whose method is `"round:..."`; see `rounded_weight`.

    Errors of weights, by matrix; and by text, over the tokens after what all texts
    begin with (the template's system turn): the Kullback-Leibler divergence
    KL(original || rounded) in nats, and the loss of both.

    Args:
        experiment: its `eval_examples` validation records are one set of texts, the
            general questions with their answers the other.

    Returns:
        A run in the schema of `course_utils.records`.
    """
    import torch

    begun = time.perf_counter()
    set_seed(experiment.seed)
    model = load_model(experiment.model, dtype=torch.float32)
    errors, norms = [], []
    with torch.no_grad():
        for name, module in model.base_model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers." in name:
                old = module.weight.cpu()
                new = rounded_weight(old, experiment.method, experiment.start)
                errors.append(_digits((new - old).square().sum()))
                norms.append(_digits(old.square().sum()))
                module.weight.copy_(new)
    measured: dict[str, Any] = {"squared_error": errors, "squared_norm": norms}
    key = experiment.model, experiment.data, experiment.eval_examples
    for batch, original in zip(_batches(*key), _original(*key), strict=True):
        found = _compare(original, _log_probabilities(model, batch), batch)
        for what, values in found.items():
            measured.setdefault(what, {}).setdefault(batch["set"], []).extend(values)
    return {
        "label": experiment.label,
        "settings": experiment.settings(),
        "seed": experiment.seed,
        "loss": [],
        "eval_loss": [],
        "metrics": ["weight_error", "kl", "kl_standard_error", "loss_change"],
        "measured": measured,
        "trainable_parameters": 0,
        "seconds": time.perf_counter() - begun,
    }


@functools.cache
def _batches(model: str | None, data: str, count: int) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(model)
    collate = CompletionCollator(tokenizer)
    sets = {
        data: stratified(load_examples(data, "validation"), count),
        "general_questions": load_examples("general_questions", "test"),
    }
    found = []
    for name, rows in sets.items():
        records = list(tokenize_dataset(rows, tokenizer))
        records.sort(key=lambda row: len(row["input_ids"]))
        ids = [row["input_ids"] for row in records]
        shared = len(os.path.commonprefix(ids))
        for place in range(0, len(records), 8):
            batch = collate(records[place : place + 8])
            counted = batch["attention_mask"][:, 1:].bool()
            counted[:, : shared - 1] = False  # the target of position t is token t + 1
            found.append(batch | {"set": name, "counted": counted})
    return found


def _log_probabilities(model: Any, batch: dict[str, Any]) -> Any:
    """Of the next token, at each position that counts: (n, V)."""
    import torch

    device = model.device
    with torch.no_grad():
        logits = model(
            input_ids=batch["input_ids"].to(device),
            attention_mask=batch["attention_mask"].to(device),
        ).logits[:, :-1]
        return logits[batch["counted"].to(device)].log_softmax(-1)


@functools.cache
def _original(model: str | None, data: str, count: int) -> list[Any]:
    """The original model's answers, once for all runs of a family (about 1 GB)."""
    import torch

    original = load_model(model, dtype=torch.float32)
    batches = _batches(model, data, count)
    return [_log_probabilities(original, batch) for batch in batches]


def _compare(p: Any, q: Any, batch: dict[str, Any]) -> dict[str, list[float]]:
    """Sums over the tokens of each text."""
    targets = batch["input_ids"][:, 1:][batch["counted"]]
    counts = batch["counted"].sum(1).tolist()
    token = targets.to(p.device)[:, None]
    by_token = {
        "kl": (p.exp() * (p - q)).sum(-1),
        "loss_before": -p.gather(1, token)[:, 0],
        "loss_after": -q.gather(1, token)[:, 0],
    }
    sums = {
        what: [_digits(part.sum()) for part in values.split(counts)]
        for what, values in by_token.items()
    }
    return sums | {"tokens": counts}


def _digits(value: Any) -> float:
    return float(f"{float(value):.6g}")
