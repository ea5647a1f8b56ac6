"""One recorded training, and what came out of it.

`run_experiment` trains on the path that the lessons use (`SFTTrainer` and
`prepare_trainer`), scores the test set and returns a run as `course_utils.records`
keeps it.
"""

from __future__ import annotations

import functools
import gc
import json
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from course_utils.data import load_examples
from course_utils.evaluation import (
    Evaluation,
    answer_share,
    evaluate,
    free_text,
    perplexity,
    stratified,
)
from course_utils.experiment_card import CardExperiment, run_card
from course_utils.experiment_classifier import ClassifierExperiment, run_classifier
from course_utils.experiment_setup import Experiment, make_model, make_records
from course_utils.formatting import CompletionCollator, tokenize_dataset, with_examples
from course_utils.models import load_model, load_tokenizer, model_name
from course_utils.parameters import count_parameters
from course_utils.runtime import data_folder, get_profile, set_seed
from course_utils.training import LossHistory, prepare_trainer, sft_config

METRICS = ("exact_match", "field_f1", "by_slice")
LOSSES = ("final_loss",)


def run_experiment(experiment: Experiment, *, progress: bool = True) -> dict[str, Any]:
    """Train, measure, and return a run in the schema of `course_utils.records`.

    Answers are generated with 16-bit weights where the profile computes in 16 bits.

    Args:
        experiment: what to do.
        progress: print a line from time to time.

    Raises:
        ValueError: as `make_model`.
    """
    import datasets
    from trl import SFTTrainer

    from course_utils.experiment_costs import PeakOfStep, saved_bytes
    from course_utils.training_callbacks import PlainProgress

    if isinstance(experiment, ClassifierExperiment):
        return run_classifier(experiment, progress=progress)
    if isinstance(experiment, CardExperiment):
        return run_card(experiment)
    if str(experiment.method).startswith("prompt:"):
        return _run_prompting(experiment)
    if str(experiment.method).startswith("round:"):
        from course_utils.experiment_rounding import run_rounding

        return run_rounding(experiment)
    start, profile = time.perf_counter(), replace(get_profile(), seed=experiment.seed)
    tokenizer = load_tokenizer(experiment.model)
    set_seed(experiment.seed)
    model = make_model(experiment)
    before = {name: _weight(model, name).clone() for name in experiment.spectra}
    validation = load_examples(experiment.data, "validation")
    validation = tokenize_dataset(
        stratified(validation, experiment.eval_examples), tokenizer
    )
    with tempfile.TemporaryDirectory() as folder:
        every = experiment.eval_every
        trainer = SFTTrainer(
            model=model,
            args=sft_config(
                profile,
                folder,
                max_steps=experiment.steps,
                per_device_train_batch_size=experiment.batch_size,
                learning_rate=experiment.learning_rate,
                lr_scheduler_type=experiment.schedule,
                warmup_steps=round(experiment.warmup * experiment.steps),
                max_grad_norm=experiment.max_grad_norm,
                eval_strategy="steps" if every else "no",
                eval_steps=every or None,
            ),
            train_dataset=datasets.Dataset.from_list(make_records(experiment)),
            eval_dataset=validation,
            data_collator=CompletionCollator(tokenizer),
            processing_class=tokenizer,
            optimizers=(_loraplus(model, experiment), None),
        )
        prepare_trainer(trainer)
        if not progress:
            trainer.pop_callback(PlainProgress)
        peak = PeakOfStep()
        if experiment.costs:
            trainer.add_callback(peak)
        trained = count_parameters(trainer.model).trainable
        clock = time.perf_counter()
        trainer.train()
        train_seconds = time.perf_counter() - clock
        if not every or experiment.steps % every:
            trainer.evaluate()
    log = trainer.state.log_history
    history = LossHistory.from_log(log)
    # Validation inside the training is not training time; the last one may be outside.
    inside = [entry for entry in log if "eval_runtime" in entry and every]
    inside = inside[: experiment.steps // every] if every else []
    train_seconds -= sum(entry["eval_runtime"] for entry in inside) + peak.seconds
    run = {
        "label": experiment.label,
        "settings": experiment.settings(),
        "seed": experiment.seed,
        "loss": list(history.loss),
        "eval_loss": [list(pair) for pair in _pairs(history)],
        "metrics": [*LOSSES, "final_eval_loss"],
        "trainable_parameters": trained,
        "tokens_per_s": trainer.state.num_input_tokens_seen / train_seconds,
        "measured": {"train_seconds": train_seconds},
    }
    if experiment.costs:
        run["measured"]["peak_bytes"] = peak.peak_bytes
        run["measured"]["adapter_bytes"] = saved_bytes(model)
    if experiment.keep_adapter:
        folder = data_folder() / "adapters" / experiment.keep_adapter
        run["measured"]["adapter_bytes"] = _keep_adapter(model, folder, experiment)
    change = {name: _weight(model, name) - old for name, old in before.items()}
    if change:
        run["measured"]["singular_values"] = {
            name: _singular_values(value) for name, value in change.items()
        }
    del trainer
    _to_profile_dtype(model, profile.dtype)
    if experiment.test_examples != 0:
        test = load_examples(experiment.data, "test")
        scored = evaluate(
            model,
            tokenizer,
            test,
            limit=experiment.test_examples,
            as_text=free_text(test["completion"]),
        )
        run["measured"]["test_seconds"] = scored.seconds
        run |= _answers(scored)
        run["metrics"] += _score_names(scored)
        if experiment.costs and not scored.as_text:
            run["metrics"].append("by_field")
    if experiment.validation_answers:
        like_training = load_examples(experiment.data, "validation")
        limit = experiment.validation_answers
        scored = evaluate(model, tokenizer, like_training, limit=limit)
        run["measured"]["validation"] = {
            "predictions": list(scored.predictions),
            "references": list(scored.references),
        }
        run["metrics"].append("validation_exact_match")
    if experiment.forgetting:
        old, new = _untuned(experiment.model), _general(model, tokenizer)
        run["measured"]["general_questions"] = {"before": old, "after": new}
    del model
    gc.collect()
    run["seconds"] = time.perf_counter() - start
    return run


def _keep_adapter(model: Any, folder: Path, experiment: Experiment) -> int:
    """Save an adapter without the paths of this machine; returns its bytes.

    How a prompt was initialised is in the record; the file holds what was learned.
    """
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = model_name(experiment.model)
    if "prompt_tuning_init" in config:
        config["prompt_tuning_init"] = "RANDOM"
        config["prompt_tuning_init_text"] = config["tokenizer_name_or_path"] = None
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _run_prompting(experiment: Experiment) -> dict[str, Any]:
    """Score the untrained model, asked without help or with the best prompt."""
    start, template = time.perf_counter(), "chatml"
    if experiment.method == "prompt:few-shot":
        folder = data_folder() / experiment.data
        schema = (folder / "schema.txt").read_text(encoding="utf-8")
        shots = json.loads((folder / "few_shot.json").read_text(encoding="utf-8"))
        template = with_examples("chatml", shots, system=schema)
    test = load_examples(experiment.data, "test")
    scored = evaluate(
        load_model(experiment.model),
        load_tokenizer(experiment.model),
        test,
        template=template,
        limit=experiment.test_examples,
        as_text=free_text(test["completion"]),
    )
    return {
        "label": experiment.label,
        "settings": experiment.settings(),
        "seed": experiment.seed,
        "loss": [],
        "eval_loss": [],
        "metrics": _score_names(scored),
        "trainable_parameters": 0,
        "measured": {"test_seconds": scored.seconds},
        **_answers(scored),
        "seconds": time.perf_counter() - start,
    }


def _answers(scored: Evaluation) -> dict[str, list[str]]:
    names = ("predictions", "references", "slices")
    return {
        name: list(getattr(scored, name)) for name in names if getattr(scored, name)
    }


def _score_names(scored: Evaluation) -> list[str]:
    if scored.as_text:
        return ["exact_text"]
    return [*METRICS] if scored.slices else [*METRICS[:2]]


def _pairs(history: LossHistory) -> Any:
    return zip(history.eval_steps, history.eval_loss, strict=True)


def _loraplus(model: Any, experiment: Experiment) -> Any:
    if experiment.loraplus_ratio is None:
        return None
    import torch
    from peft.optimizers import create_loraplus_optimizer

    return create_loraplus_optimizer(
        model,
        torch.optim.AdamW,
        lr=experiment.learning_rate,
        loraplus_lr_ratio=experiment.loraplus_ratio,
        fused=True,
    )


def _weight(model: Any, name: str) -> Any:
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_parameter(name).detach()


def _singular_values(matrix: Any) -> list[float]:
    """From the greatest down, to six digits."""
    import torch

    values = torch.linalg.svdvals(matrix.float())
    return [float(f"{value:.6g}") for value in values.tolist()]


def _to_profile_dtype(model: Any, dtype: Any) -> None:
    """16-bit weights to generate with; a PEFT model's adapters stay in float32."""
    adapted = hasattr(model, "peft_config")
    for parameter in model.parameters():
        trained = adapted and parameter.requires_grad
        if parameter.is_floating_point() and not trained:  # 4-bit weights are bytes
            parameter.data = parameter.data.to(dtype)


def _general(model: Any, tokenizer: Any) -> dict[str, float]:
    questions = load_examples("general_questions", "test")
    return {
        "loss": perplexity(model, tokenizer, questions).loss,
        "answer_share": answer_share(model, tokenizer, questions).share,
    }


@functools.cache
def _untuned(name: str | None) -> dict[str, float]:
    return _general(load_model(name), load_tokenizer(name))
