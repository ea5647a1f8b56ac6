"""What rounding all weights does to a model, without training: a recorded run.

`run_rounding` replaces each linear weight of the layers by its rounded self, and
compares the model with the original on two sets of texts.
"""

from __future__ import annotations

import functools
import os
import time
from dataclasses import dataclass
from typing import Any

from course_utils.data import load_examples
from course_utils.evaluation import stratified
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.models import load_model, load_tokenizer
from course_utils.runtime import set_seed
from course_utils.sweep.experiment import new_run
from maintenance.runs.experiment import LoftQ, QPiSSA, RecordedExperiment
from maintenance.store import METRICS, compute_metrics

ALPHA = 16  # cancels out: an adapter's start does not depend on it


@dataclass(frozen=True)
class Rounding:
    """No training: each linear weight takes a trip through few bits.

    Attributes:
        levels: `"int8"` (a row shares a scale), or `"int4"`, `"fp4"`, `"nf4"` in blocks
            of 64.
        double_quant: the scales of blocks are rounded too.
        rank: of the adapter, where an experiment has a start.
    """

    levels: str
    double_quant: bool = False
    rank: int | None = None

    def __post_init__(self) -> None:
        by_blocks = self.levels in ("int4", "fp4", "nf4")
        if not by_blocks and (self.levels != "int8" or self.double_quant):
            raise ValueError(
                f"{self}: expected int8 without double quantization, int4, fp4 or nf4"
            )

    def stored(self, model: str | None) -> str:
        """As a record names it."""
        rank = "" if self.rank is None else f":{self.rank}"
        return f"round:{self.levels}{'+dq' * self.double_quant}{rank}"

    def __call__(self, weight: Any) -> Any:
        """The (out, in) weight after its trip, in float32."""
        from course_utils import nf4

        if self.levels == "int8":
            levels = nf4.int_levels(8)
            parts = nf4.quantize_blocks(weight, levels, weight.shape[1])
            return nf4.dequantize_blocks(*parts, levels).reshape(weight.shape)
        packed = nf4.quantize_4bit(weight, self.levels, double_quant=self.double_quant)
        return packed.dequantize()


def rounded_weight(
    weight: Any, rounding: Rounding, start: LoftQ | QPiSSA | None = None
) -> Any:
    """The (out, in) weight that a start leaves: rounded, and the adapter's product."""
    if start is None:
        return rounding(weight)
    r = rounding.rank or 8
    A, B, rounded = start(weight, r, ALPHA, rounding)
    return rounded + ALPHA / r * B @ A


def run_rounding(experiment: RecordedExperiment) -> dict[str, Any]:
    """Measure an experiment whose method is a `Rounding`; see `rounded_weight`.

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
        sums = _compare(original, _log_probabilities(model, batch), batch)
        for name, values in sums.items():
            measured.setdefault(name, {}).setdefault(batch["set"], []).extend(values)
    run = new_run(experiment) | {"measured": measured, "trainable_parameters": 0}
    names = ("weight_error", "kl", "kl_standard_error", "loss_change")
    run["metrics"] = compute_metrics(run, names, METRICS)
    return run | {"seconds": time.perf_counter() - begun}


@functools.cache
def _batches(model: str | None, data: str, count: int) -> list[dict[str, Any]]:
    tokenizer = load_tokenizer(model)
    collate = CompletionCollator(tokenizer)
    sets = {
        data: stratified(load_examples(data, "validation"), count),
        "general_questions": load_examples("general_questions", "test"),
    }
    batches = []
    for name, rows in sets.items():
        records = list(tokenize_dataset(rows, tokenizer))
        records.sort(key=lambda row: len(row["input_ids"]))
        ids = [row["input_ids"] for row in records]
        shared = len(os.path.commonprefix(ids))
        for place in range(0, len(records), 8):
            batch = collate(records[place : place + 8])
            counted = batch["attention_mask"][:, 1:].bool()
            counted[:, : shared - 1] = False  # the target of position t is token t + 1
            batches.append(batch | {"set": name, "counted": counted})
    return batches


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
