"""One recorded training of a classifier, for the families of lesson 06."""

from __future__ import annotations

import tempfile
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

from course_utils.classification import (
    label_names,
    parameter_groups,
    predict,
    tokenize_texts,
)
from course_utils.data import load_examples
from course_utils.models import load_classifier
from course_utils.runtime import get_profile, set_seed
from course_utils.sweep.experiment import saved_bytes, trained_run
from course_utils.training import prepare_trainer, training_arguments
from maintenance.cells import cells
from maintenance.store import compute_metrics


@dataclass(frozen=True)
class ClassifierExperiment:
    """One training run of the built-in encoder, described completely."""

    label: str  # runs that differ in the seed alone share it
    method: Any = "full"  # "head" (the new one alone), "biases" too, or PEFT's fields
    learning_rate: float = 1e-4  # at its peak; it falls to 0 along a line
    head_rate: float | None = None  # None means the same
    steps: int = 60
    batch_size: int = 16
    warmup: float = 0.1  # share of the steps in which the rate rises
    seed: int = 0
    eval_every: int = 30
    start_scale: float = 1.0  # of the random virtual tokens of PEFT
    data: str = "reviews"

    def settings(self) -> dict[str, Any]:
        values = asdict(self)
        del values["label"], values["seed"]
        return values


def make_classifier(
    method: Any, num_labels: int, start_scale: float = 1.0
) -> tuple[Any, Any]:
    """The encoder with what the method trains trainable, and its tokenizer."""
    model, tokenizer = load_classifier(num_labels=num_labels)
    if isinstance(method, dict):
        from peft import get_peft_config, get_peft_model

        config = get_peft_config({"task_type": "SEQ_CLS", **method})
        model = get_peft_model(model, config)
        if start_scale != 1:
            model.prompt_encoder["default"].embedding.weight.data *= start_scale
    elif method == "head":
        model.base_model.requires_grad_(False)
    elif method == "biases":
        cells("10_beyond_text", "bitfit").only_biases(model)
    elif method != "full":
        raise ValueError(
            f"method {method!r}: expected 'full', 'head', 'biases' or a dict"
        )
    return model, tokenizer


def run_classifier(
    experiment: ClassifierExperiment, *, progress: bool = True
) -> dict[str, Any]:
    """Train and measure a classifier, and return a run as records hold it."""
    from course_utils.training_callbacks import PlainProgress

    begun = time.perf_counter()
    splits = ("train", "validation", "test")
    parts = {split: load_examples(experiment.data, split) for split in splits}
    names = label_names(parts["train"])
    set_seed(experiment.seed)
    method, scale = experiment.method, experiment.start_scale
    model, tokenizer = make_classifier(method, len(names), scale)
    rows = {s: tokenize_texts(parts[s], tokenizer, names) for s in parts}
    with tempfile.TemporaryDirectory() as folder:
        trainer = _make_trainer(experiment, model, tokenizer, rows, folder)
        if not progress:
            trainer.pop_callback(PlainProgress)
        clock = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - clock
        log = trainer.state.log_history  # validations are no training
        seconds -= sum(entry.get("eval_runtime", 0.0) for entry in log)
        run = trained_run(experiment, trainer, seconds)
    run["measured"]["adapter_bytes"] = saved_bytes(model)
    test = parts["test"]
    run["predictions"] = predict(model, tokenizer, test["text"], names)
    run["references"] = [str(label) for label in test["label"]]
    metrics = ["final_loss", "final_eval_loss", "accuracy", "macro_f1"]
    if "slice" in test.column_names:
        run["slices"] = list(test["slice"])
        metrics.append("accuracy_by_slice")
    run["metrics"] = compute_metrics(run, metrics)
    return run | {"seconds": time.perf_counter() - begun}


def _make_trainer(
    experiment: ClassifierExperiment, model: Any, tokenizer: Any, rows: Any, folder: str
) -> Any:
    import torch
    from transformers import DataCollatorWithPadding, Trainer

    rate, head_rate = experiment.learning_rate, experiment.head_rate
    groups = parameter_groups(model, rate, rate if head_rate is None else head_rate)
    trainer = Trainer(
        model=model,
        args=training_arguments(
            replace(get_profile(), seed=experiment.seed),
            folder,
            max_steps=experiment.steps,
            per_device_train_batch_size=experiment.batch_size,
            per_device_eval_batch_size=64,
            learning_rate=rate,
            warmup_steps=round(experiment.warmup * experiment.steps),
            eval_strategy="steps",
            eval_steps=experiment.eval_every,
            label_names=["labels"],
        ),
        train_dataset=rows["train"],
        eval_dataset=rows["validation"],
        data_collator=DataCollatorWithPadding(tokenizer),
        optimizers=(torch.optim.AdamW(groups, weight_decay=0.0), None),
    )
    prepare_trainer(trainer)
    return trainer
