"""One recorded training, and what came out of it.

`run_experiment` trains on the path that the lessons use (`SFTTrainer` and
`prepare_trainer`), scores the test set and returns a run as `course_utils.records`
keeps it. A long run that is stopped goes on from its last checkpoint.
"""

from __future__ import annotations

import functools
import gc
import hashlib
import json
import shutil
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

from course_utils.data import data_hash, load_examples
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
from course_utils.experiment_setup import (
    Experiment,
    make_model,
    make_records,
    template_for,
)
from course_utils.experiment_weights import singular_values, to_dtype, weight_of
from course_utils.formatting import CompletionCollator, tokenize_dataset, with_examples
from course_utils.models import load_model, load_tokenizer, model_name
from course_utils.parameters import count_parameters
from course_utils.runtime import build_folder, data_folder, get_profile, set_seed
from course_utils.training import (
    LossHistory,
    find_checkpoint,
    prepare_trainer,
    sft_config,
)

METRICS = ("exact_match", "field_f1", "by_slice")
LOSSES = ("final_loss",)
LONG_RUN_STEPS = 500  # from here on a run with validation keeps checkpoints


def run_experiment(experiment: Experiment, *, progress: bool = True) -> dict[str, Any]:
    """Train, measure, and return a run in the schema of `course_utils.records`.

    Answers are generated with 16-bit weights where the profile computes in 16 bits.
    A run of `LONG_RUN_STEPS` or more keeps a checkpoint under `build/runs/` at each
    validation, until it is finished: called again after a kill, it goes on from there.

    Args:
        experiment: what to do.
        progress: print a line from time to time.

    Raises:
        ValueError: as `make_model`.
    """
    if isinstance(experiment, ClassifierExperiment):
        return run_classifier(experiment, progress=progress)
    if isinstance(experiment, CardExperiment):
        return run_card(experiment)
    if str(experiment.method).startswith("prompt:"):
        return _run_prompting(experiment)
    if str(experiment.method).startswith("round:"):
        from course_utils.experiment_rounding import run_rounding

        return run_rounding(experiment)
    if experiment.steps < LONG_RUN_STEPS or not experiment.eval_every:
        with tempfile.TemporaryDirectory() as folder:
            return _train_and_score(experiment, Path(folder), "no", progress)
    hashes = [data_hash(name) for name in (experiment.data, experiment.also) if name]
    what = (experiment, model_name(experiment.model), hashes)
    key = hashlib.sha256(repr(what).encode()).hexdigest()[:16]
    folder = build_folder() / "runs" / key
    run = _train_and_score(experiment, folder, "steps", progress)
    shutil.rmtree(folder, ignore_errors=True)  # the run itself is whole
    return run


def _train_and_score(
    experiment: Experiment, folder: Path, save: str, progress: bool
) -> dict[str, Any]:
    """The run itself; `save="steps"` keeps checkpoints, and goes on from the last."""
    import datasets
    from trl import SFTTrainer

    from course_utils import experiment_costs as costs
    from course_utils.training_callbacks import PlainProgress

    start, profile = time.perf_counter(), replace(get_profile(), seed=experiment.seed)
    tokenizer = load_tokenizer(experiment.model)
    template = template_for(tokenizer)
    set_seed(experiment.seed)
    model = make_model(experiment)
    before = {name: weight_of(model, name).clone() for name in experiment.spectra}
    validation = load_examples(experiment.data, "validation")
    validation = tokenize_dataset(
        stratified(validation, experiment.eval_examples), tokenizer, template=template
    )
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
            save_strategy=save,
            save_steps=every or 1,
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
    peak = costs.PeakOfStep()
    if experiment.costs:
        trainer.add_callback(peak)
    trained = count_parameters(trainer.model).trainable
    checkpoint = find_checkpoint(folder)
    before_s = costs.elapsed_seconds(checkpoint) if checkpoint else 0.0
    trainer.add_callback(costs.ElapsedSeconds(before_s))
    clock = time.perf_counter()
    trainer.train(resume_from_checkpoint=checkpoint)
    train_seconds = before_s + time.perf_counter() - clock
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
        run["measured"]["adapter_bytes"] = costs.saved_bytes(model)
    if experiment.keep_adapter:
        kept = data_folder() / "adapters" / experiment.keep_adapter
        size = costs.keep_adapter(model, kept, model_name(experiment.model))
        run["measured"]["adapter_bytes"] = size
    change = {name: weight_of(model, name) - old for name, old in before.items()}
    if change:
        run["measured"]["singular_values"] = {
            name: singular_values(value) for name, value in change.items()
        }
    del trainer
    to_dtype(model, profile.dtype)
    if experiment.test_examples != 0:
        test = load_examples(experiment.data, "test")
        scored = evaluate(
            model,
            tokenizer,
            test,
            template=template,
            limit=experiment.test_examples,
            as_text=free_text(test["completion"]),
        )
        run["measured"]["test_seconds"] = scored.seconds
        run |= _answers(scored)
        run["metrics"] += _score_names(scored)
        if experiment.costs and not scored.as_text:
            run["metrics"].append("by_field")
    if experiment.also_test:
        again = load_examples(experiment.also_test, "test")
        scored = evaluate(model, tokenizer, again, template=template)
        found = {"sha256": data_hash(experiment.also_test), **_answers(scored)}
        run["measured"]["also_test"] = found
        run["metrics"] += ["also_test_exact_match", "also_test_by_slice"]
    if experiment.validation_answers:
        like_training = load_examples(experiment.data, "validation")
        limit = experiment.validation_answers
        scored = evaluate(
            model, tokenizer, like_training, template=template, limit=limit
        )
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
    run["seconds"] = before_s + time.perf_counter() - start
    return run


def _run_prompting(experiment: Experiment) -> dict[str, Any]:
    """Score the untrained model, asked without help or with the best prompt."""
    start = time.perf_counter()
    tokenizer = load_tokenizer(experiment.model)
    template = template_for(tokenizer)
    if experiment.method == "prompt:few-shot":
        folder = data_folder() / experiment.data
        schema = (folder / "schema.txt").read_text(encoding="utf-8")
        shots = json.loads((folder / "few_shot.json").read_text(encoding="utf-8"))
        template = with_examples("chatml", shots, system=schema)
    test = load_examples(experiment.data, "test")
    scored = evaluate(
        load_model(experiment.model),
        tokenizer,
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


def _general(model: Any, tokenizer: Any) -> dict[str, float]:
    questions = load_examples("general_questions", "test")
    asked, layout = (model, tokenizer, questions), template_for(tokenizer)
    return {
        "loss": perplexity(*asked, template=layout).loss,
        "answer_share": answer_share(*asked, template=layout).share,
    }


@functools.cache
def _untuned(name: str | None) -> dict[str, float]:
    return _general(load_model(name), load_tokenizer(name))
