"""Rows of the embedding matrix that no record teaches, before and after a training.

Lesson 11 asks whether their drift spoils answers that need them. One thing is changed
at a time: the rows of tokens that no training record holds are put back after the
training; or the whole matrix is left alone while the rest is trained.
"""

from __future__ import annotations

import random
import time
from dataclasses import asdict, dataclass
from typing import Any

import torch

from course_utils import training
from course_utils.data import load_examples
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.models import load_model, load_tokenizer
from course_utils.runtime import set_seed
from maintenance.store import compute_metrics

METRICS = ("moved", "taught_loss", "untaught_loss")


@dataclass(frozen=True)
class Drift:
    """A short full fine-tuning, with the embedding matrix (the head too) or without."""

    label: str
    frozen: bool = False
    seed: int = 0
    steps: int = 16
    batch_size: int = 4
    learning_rate: float = 1e-3
    longest: int = 48  # tokens of a training record, at most
    asked: int = 24  # test sentences with unseen values
    data: str = "home_commands_large"

    def settings(self) -> dict[str, Any]:
        values = asdict(self)
        del values["label"], values["seed"]
        return values


def run_drift(experiment: Drift) -> dict[str, Any]:
    """Train; losses of answers before, after, and with old rows put back."""
    begun = time.perf_counter()
    set_seed(experiment.seed)
    model, tokenizer = load_model(dtype=torch.float32), load_tokenizer()
    records = _training_records(experiment, tokenizer)
    matrix = model.get_output_embeddings().weight
    matrix.requires_grad_(not experiment.frozen)
    old = matrix.detach().clone()
    taught = torch.zeros(len(old), dtype=torch.bool)
    taught[sorted({token for row in records for token in row["input_ids"]})] = True
    test = load_examples("home_commands", "test")
    test = test.filter(lambda row: row["slice"] == "unseen_values")
    rows = list(tokenize_dataset(test.select(range(experiment.asked)), tokenizer))
    losses = {"before": _losses(model, rows, taught)}
    collate, loss = CompletionCollator(tokenizer), []
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(
        trained, lr=experiment.learning_rate, weight_decay=0.0, fused=True
    )
    for step in range(experiment.steps):
        size = experiment.batch_size
        batch = collate(records[size * step : size * (step + 1)])
        value = training.completion_loss(model.train(), batch)
        value.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.append(value.item())
    del optimizer
    losses["after"] = _losses(model, rows, taught)
    new = matrix.detach().clone()
    share = (new - old).norm(dim=1) / old.norm(dim=1)
    with torch.no_grad():
        matrix[~taught] = old[~taught]
        losses["rows put back"] = _losses(model, rows, taught)
    moved = {"taught": share[taught].median(), "untaught": share[~taught].median()}
    measured = {"losses": losses, "moved": {k: v.item() for k, v in moved.items()}}
    measured |= {"taught_tokens": int(taught.sum())}
    run = {"label": experiment.label, "settings": experiment.settings()}
    run |= {"seed": experiment.seed, "loss": loss, "measured": measured}
    run["trainable_parameters"] = sum(p.numel() for p in trained)
    run["metrics"] = compute_metrics(run, METRICS)
    return run | {"seconds": time.perf_counter() - begun}


def _training_records(experiment: Drift, tokenizer: Any) -> list[dict[str, Any]]:
    """Short records, in an order of the seed, as many as the steps read."""
    examples = load_examples(experiment.data, limit=600, seed=experiment.seed)
    rows = list(tokenize_dataset(examples, tokenizer))
    rows = [row for row in rows if len(row["input_ids"]) <= experiment.longest]
    random.Random(experiment.seed).shuffle(rows)
    return rows[: experiment.steps * experiment.batch_size]


@torch.no_grad()
def _losses(model: Any, rows: list[dict], taught: torch.Tensor) -> dict[str, list]:
    """By sentence: summed losses and counts of taught and untaught answer tokens."""
    sums: dict[str, list] = {"taught": [], "untaught": []}
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])[1:]
        place = (labels != -100).nonzero()[:, 0]
        states = model.eval().base_model(ids).last_hidden_state[0, place]
        logits = model.get_output_embeddings()(states).float()
        loss = torch.nn.functional.cross_entropy(
            logits, labels[place], reduction="none"
        )
        known = taught[labels[place]]
        for name, chosen in (("taught", known), ("untaught", ~known)):
            total = float(f"{loss[chosen].sum().item():.6g}")
            sums[name].append([total, int(chosen.sum())])
    return sums
