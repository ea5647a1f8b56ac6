"""Rounding to 4 or 8 bits, adapters that start from what it loses, and what both do.

Lesson 7 builds the rounding in its cells; bitsandbytes rounds near ties, and one scale
in some hundreds, to the other neighbour, so recorded numbers need this arithmetic.

NF4 and double quantization: QLoRA, Dettmers and others, 2023, arXiv 2305.14314,
section 3 and appendix E. LoftQ: Li and others, 2023, arXiv 2310.08659, algorithm 1.
QPiSSA: Meng and others, 2024, arXiv 2404.02948, section 4. Both choose A, B and a
rounded weight Q so that `Q + alpha / r * B @ A` is nearer to the original than Q alone.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from course_utils.data import load_examples
from course_utils.evaluation import stratified
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.models import load_model, load_tokenizer
from course_utils.runtime import set_seed
from course_utils.sweep.experiment import new_run
from maintenance.store import compute_metrics

Arithmetic = Callable[[torch.Tensor], torch.Tensor]
Start = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

ALPHA = 16  # cancels out: an adapter's start does not depend on it


# --- the arithmetic ----------------------------------------------------------------


def levels_of(kind: str) -> torch.Tensor:
    """The rising levels from -1 to 1 of `"int8"`, `"int4"`, `"fp4"` or `"nf4"`."""
    if kind in ("int8", "int4"):
        top = 2 ** (int(kind[3:]) - 1) - 1
        return torch.arange(-top, top + 1) / top
    if kind == "fp4":  # the sixteenth pattern is a second zero
        positive = torch.tensor([0.0625, 2, 3, 4, 6, 8, 12]) / 12
        return torch.cat([-positive.flip(0), torch.zeros(1), positive])
    if kind == "nf4":  # quantiles of a normal distribution, eight positive, seven not
        edge = 1 - (1 / 32 + 1 / 30) / 2
        positive = torch.special.ndtri(torch.linspace(edge, 0.5, 9).double())[:-1]
        negative = -torch.special.ndtri(torch.linspace(edge, 0.5, 8).double())[:-1]
        levels = torch.cat([negative, torch.zeros(1).double(), positive.flip(0)])
        return (levels / levels.max()).float()
    raise ValueError(f"levels {kind!r}: expected int8, int4, fp4 or nf4")


def round_blocks(
    weight: torch.Tensor,
    levels: torch.Tensor,
    block: int,
    scale_rounding: Arithmetic | None = None,
) -> torch.Tensor:
    """Round each element to the nearest level times its block's largest absolute value.

    `block` elements share a scale; `scale_rounding` takes and gives scales (blocks,).
    The rounded weight is in float32 and has the same shape.
    """
    blocks = weight.float().reshape(-1, block)
    absmax = blocks.abs().amax(1)
    scaled = blocks * (1 / absmax.clamp(min=1e-38))[:, None]
    codes = torch.bucketize(scaled, (levels[:-1] + levels[1:]) / 2)
    scales = scale_rounding(absmax) if scale_rounding else absmax
    return (levels[codes] * scales[:, None]).reshape(weight.shape)


def round_scales(absmax: torch.Tensor) -> torch.Tensor:
    """Double quantization: scales (blocks,) less their mean in 8 bits, and back."""
    from bitsandbytes.functional import create_dynamic_map
    from torch.nn.functional import pad

    mean = absmax.mean()
    padded = pad(absmax - mean, (0, -len(absmax) % 256))
    return round_blocks(padded, create_dynamic_map(), 256)[: len(absmax)] + mean


def round_4bit(
    weight: torch.Tensor, kind: str = "nf4", *, double_quant: bool = False
) -> torch.Tensor:
    """The weight after its trip through 4 bits in blocks of 64, on the CPU."""
    scale_rounding = round_scales if double_quant else None
    return round_blocks(weight.detach().cpu(), levels_of(kind), 64, scale_rounding)


def low_rank(
    matrix: torch.Tensor, r: int, alpha: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best A (r, in) and B (out, r), `alpha / r * B @ A` nearest to the matrix.

    By a randomised SVD with 16 rounds; of the exact one's share of the squared sum it
    finds all but some thousandths.
    """
    q = min(2 * r, *matrix.shape)
    U, S, V = torch.svd_lowrank(matrix.float(), q, niter=16)
    root = (S[:r] * r / alpha).sqrt()
    return root[:, None] * V[:, :r].T, U[:, :r] * root


def set_start(model: Any, originals: Mapping[str, torch.Tensor], start: Any) -> int:
    """Give LoRA layers on bitsandbytes' 4-bit layers another start; say how many.

    `originals` are the weights before quantization, by the base model's names.
    """
    from bitsandbytes.nn import Params4bit

    changed = 0
    for name, layer in model.get_base_model().named_modules():
        if not hasattr(layer, "lora_A"):
            continue
        old = layer.base_layer.weight
        kind, double = old.quant_type, old.compress_statistics
        rounding = functools.partial(round_4bit, kind=kind, double_quant=double)
        (adapter,) = layer.active_adapters
        r, original = layer.r[adapter], originals[f"{name}.weight"].cpu()
        A, B, rounded = start(original, r, layer.scaling[adapter] * r, rounding)
        layer.lora_A[adapter].weight.data.copy_(A)
        layer.lora_B[adapter].weight.data.copy_(B)
        options = {"compress_statistics": double, "quant_type": kind}
        rounded = rounded.to(old.quant_state.dtype)
        new = Params4bit(rounded, requires_grad=False, **options)
        layer.base_layer.weight = new.to(old.device)
        changed += 1
    return changed


# --- what an experiment names -------------------------------------------------------


@dataclass(frozen=True)
class LoftQ:
    """LoftQ: round, then put the best part of the error into the adapter, in turn.

    After one round the rounded weight is plain 4-bit.
    """

    rounds: int = 1

    def stored(self) -> str:
        return f"loftq:{self.rounds}"

    def __call__(
        self, weight: torch.Tensor, r: int, alpha: float, rounding: Arithmetic
    ) -> Start:
        """In float32 `A` (r, in), `B` (out, r) and the rounded weight (out, in)."""
        update = torch.zeros_like(weight)
        for _ in range(self.rounds):
            rounded = rounding(weight - update)
            A, B = low_rank(weight - rounded, r, alpha)
            update = alpha / r * B @ A
        return A, B, rounded


@dataclass(frozen=True)
class QPiSSA:
    """QPiSSA: the principal part is the adapter, what is left is rounded."""

    def stored(self) -> str:
        return "qpissa"

    def __call__(
        self, weight: torch.Tensor, r: int, alpha: float, rounding: Arithmetic
    ) -> Start:
        A, B = low_rank(weight, r, alpha)
        return A, B, rounding(weight - alpha / r * B @ A)


@dataclass(frozen=True)
class Rounding:
    """No training: each linear weight takes a trip through few bits."""

    levels: str  # "int8" (a row shares a scale); "int4", "fp4", "nf4" in blocks of 64
    double_quant: bool = False  # the scales of blocks are rounded too
    rank: int | None = None  # of the adapter, where an experiment has a start

    def stored(self, model: str | None) -> str:
        rank = "" if self.rank is None else f":{self.rank}"
        return f"round:{self.levels}{'+dq' * self.double_quant}{rank}"

    def __call__(self, weight: Any) -> Any:
        """The (out, in) weight after its trip, in float32."""
        if self.levels == "int8":
            return round_blocks(weight, levels_of("int8"), weight.shape[1])
        return round_4bit(weight, self.levels, double_quant=self.double_quant)


# --- the recorded run ----------------------------------------------------------------


def rounded_weight(
    weight: Any, rounding: Rounding, start: LoftQ | QPiSSA | None = None
) -> Any:
    """The (out, in) weight that a start leaves: rounded, and the adapter's product."""
    if start is None:
        return rounding(weight)
    r = rounding.rank or 8
    A, B, rounded = start(weight, r, ALPHA, rounding)
    return rounded + ALPHA / r * B @ A


def run_rounding(experiment: Any) -> dict[str, Any]:
    """A `RecordedExperiment` of a `Rounding`: its model compared with the original one.

    By matrix the squared errors; by text, over the tokens after what all texts begin
    with (the template's system turn), KL(original || rounded) in nats, and both losses.
    """
    begun = time.perf_counter()
    set_seed(experiment.seed)
    model = load_model(experiment.model, dtype=torch.float32)
    errors, norms = [], []
    with torch.no_grad():
        for name, module in model.base_model.named_modules():
            if isinstance(module, torch.nn.Linear) and "layers." in name:
                old = module.weight.cpu()
                new = rounded_weight(old, experiment.method, experiment.start)
                errors.append(six_digits((new - old).square().sum()))
                norms.append(six_digits(old.square().sum()))
                module.weight.copy_(new)
    measured: dict[str, Any] = {"squared_error": errors, "squared_norm": norms}
    key = experiment.model, experiment.data, experiment.eval_examples
    for batch, original in zip(_batches(*key), _original(*key), strict=True):
        sums = _compare(original, _log_probabilities(model, batch), batch)
        for name, values in sums.items():
            measured.setdefault(name, {}).setdefault(batch["set"], []).extend(values)
    run = new_run(experiment) | {"measured": measured, "trainable_parameters": 0}
    names = ("weight_error", "kl", "kl_standard_error", "loss_change")
    run["metrics"] = compute_metrics(run, names)
    return run | {"seconds": time.perf_counter() - begun}


@functools.cache  # for all runs of a family
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
    names = ("input_ids", "attention_mask", "counted")
    ids, mask, counted = (batch[name].to(model.device) for name in names)
    with torch.no_grad():
        logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1]
        return logits[counted].log_softmax(-1)


@functools.cache
def _original(model: str | None, data: str, count: int) -> list[Any]:
    """The original model's answers, once for all runs of a family (about 1 GB)."""
    original = load_model(model, dtype=torch.float32)
    return [_log_probabilities(original, b) for b in _batches(model, data, count)]


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
        name: [six_digits(part.sum()) for part in values.split(counts)]
        for name, values in by_token.items()
    }
    return sums | {"tokens": counts}


def six_digits(value: Any) -> float:
    return float(f"{float(value):.6g}")
