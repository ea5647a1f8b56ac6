"""What only recorded runs need of a training, beside what lesson 8's sweep has.

Spoiled labels, further data sets and tests, what was forgotten, singular values, LoRA+,
adapters that start from what 4 bits lose, long runs that go on from a checkpoint.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import hashlib
import json
import random
import shutil
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback

from course_utils.data import data_hash, load_examples
from course_utils.evaluation import answer_share, evaluate, perplexity
from course_utils.formatting import IGNORE, tokenize_dataset
from course_utils.models import load_model, load_tokenizer, model_name
from course_utils.runtime import build_folder, data_folder, get_profile, set_seed
from course_utils.sweep import experiment as sweep_runs
from course_utils.training import find_checkpoint
from course_utils.training_speed import int8_gain, int8_products
from maintenance.runs.rounding import LoftQ, QPiSSA, set_start, six_digits
from maintenance.store import compute_metrics

LONG_RUN_STEPS = 500  # from here on a run with validation keeps checkpoints
# Younger than the first records, which know nothing of them.
ABSENT_WHEN_UNSET = {
    *("quantization", "keep_adapter", "start", "prefix_from", "validation_answers"),
    *("costs", "also", "also_test", "int8"),
}


@dataclass(frozen=True)
class Bottleneck:
    """Houlsby's adapters, as lesson 9 builds them: two in each block of the decoder."""

    width: int = 36

    def stored(self, model: str | None) -> str:
        """As a record names it."""
        return f"bottleneck:{self.width}"

    def insert(self, model: Any) -> None:
        """Freeze the model, and put adapters behind attention and network, in place."""
        model.requires_grad_(False)
        for block in model.base_model.layers:
            for linear in (block.self_attn.o_proj, block.mlp.down_proj):
                d = linear.out_features
                down, up = (
                    torch.nn.Linear(d, self.width),
                    torch.nn.Linear(self.width, d),
                )
                torch.nn.init.normal_(down.weight, std=0.02)
                for start in (down.bias, up.weight, up.bias):
                    torch.nn.init.zeros_(start)
                linear.adapter = torch.nn.Sequential(down, torch.nn.GELU(), up)
                linear.register_forward_hook(lambda m, _, out: out + m.adapter(out))


@dataclass(frozen=True)
class RecordedExperiment(sweep_runs.Experiment):
    """A training that is recorded for a lesson, described completely.

    Its method may also be `"head"` (the output layer alone), a `Bottleneck` or a
    `Rounding`.
    """

    forgetting: bool = False  # measure the general questions before and after
    max_grad_norm: float = 1.0  # 0 does not clip
    train_examples: int | None = None
    loraplus_ratio: float | None = None  # LoRA+'s ratio of the rates of B and A
    shuffle_labels: bool = False  # give each prompt another's completion
    wrong_mask: bool = False  # learn the prompt in place of the answer
    spectra: tuple[str, ...] = ()  # weights whose change has its singular values kept
    start: LoftQ | QPiSSA | None = None  # of adapters on 4-bit weights
    validation_answers: int | None = None  # so many, generated and scored too
    keep_adapter: str | None = None  # in `data/adapters/`, under this name
    also: str | None = None  # a second data set, whose training sentences are mixed in
    also_test: str | None = None  # another data set, whose test is answered in full
    int8: bool | None = None  # frozen matrices multiplied in int8, faster here or not

    def settings(self) -> dict[str, Any]:
        """As a record holds them; a run that is found by them is not made again."""
        values = super().settings() | {"spectra": list(self.spectra)}
        if self.start:
            values["start"] = self.start.stored()
        for name in ABSENT_WHEN_UNSET:
            if values[name] is None:
                del values[name]
        return values

    def seeds(self, *seeds: int) -> list[RecordedExperiment]:
        """The same experiment with each of these seeds."""
        return [replace(self, seed=seed) for seed in seeds]


def run_training(
    experiment: RecordedExperiment, *, progress: bool = True
) -> dict[str, Any]:
    """Train, measure, and return a run as `run_experiment` does.

    A run of `LONG_RUN_STEPS` or more keeps a checkpoint under `build/runs/` at each
    validation, until it is finished: called again after a kill, it goes on from there.
    """
    if experiment.steps < LONG_RUN_STEPS or not experiment.eval_every:
        with tempfile.TemporaryDirectory() as folder:
            return _train_and_measure(experiment, Path(folder), progress, "no")
    hashes = [data_hash(name) for name in (experiment.data, experiment.also) if name]
    identity = repr((experiment, model_name(experiment.model), hashes))
    key = hashlib.sha256(identity.encode()).hexdigest()[:16]
    folder = build_folder() / "runs" / key
    run = _train_and_measure(experiment, folder, progress, "steps")
    shutil.rmtree(folder, ignore_errors=True)  # the run itself is whole
    return run


class ElapsedSeconds(TrainerCallback):
    """Seconds of a training, all sittings, in the log that its checkpoints keep."""

    def __init__(self, before_s: float = 0.0) -> None:
        self.before_s = before_s

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._clock = time.perf_counter() - self.before_s

    def on_log(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        state.log_history[-1]["elapsed_s"] = time.perf_counter() - self._clock


def elapsed_seconds(checkpoint: str) -> float:
    """Seconds of training that led to a checkpoint, as `ElapsedSeconds` logged them."""
    state = json.loads((Path(checkpoint) / "trainer_state.json").read_text())
    return max(entry.get("elapsed_s", 0.0) for entry in state["log_history"])


def _train_and_measure(
    experiment: RecordedExperiment, folder: Path, progress: bool, save: str
) -> dict[str, Any]:
    """The run itself; `save="steps"` keeps checkpoints, and goes on from the last."""
    begun = time.perf_counter()
    set_seed(experiment.seed)
    model = make_recorded_model(experiment)
    before = {name: weight_of(model, name).clone() for name in experiment.spectra}
    checkpoint = find_checkpoint(folder)
    before_s = elapsed_seconds(checkpoint) if checkpoint else 0.0
    with int8_products(model) if experiment.int8 else contextlib.nullcontext():
        run = sweep_runs.train(
            experiment,
            model,
            make_recorded_rows(experiment),
            folder,
            progress=progress,
            optimizer=_loraplus(model, experiment),
            callbacks=[ElapsedSeconds(before_s)],
            resume_from=checkpoint,
            before_s=before_s,
            max_grad_norm=experiment.max_grad_norm,
            save_strategy=save,
            save_steps=experiment.eval_every or 1,
        )
    if experiment.int8:
        half = get_profile().dtype == torch.bfloat16
        run["measured"]["int8_gain"] = int8_gain(model, bf16=half)
    if experiment.keep_adapter:
        folder = data_folder() / "adapters" / experiment.keep_adapter
        size = keep_adapter(model, folder, model_name(experiment.model))
        run["measured"]["adapter_bytes"] = size
    for name, old in before.items():
        change = (weight_of(model, name) - old).float().cpu()  # MPS has no SVD
        values = [six_digits(value) for value in torch.linalg.svdvals(change)]
        run["measured"].setdefault("singular_values", {})[name] = values
    if ranks := ranks_left(model):
        run["measured"]["ranks"] = ranks
        run["metrics"] |= compute_metrics(run, ["ranks"])
    _add_tests(run, experiment, model)
    del model
    gc.collect()
    return run | {"seconds": before_s + time.perf_counter() - begun}


def ranks_left(model: Any) -> dict[str, list[int]]:
    """What AdaLoRA leaves: the singular values that are not 0, layer by layer."""
    found: dict[str, list[int]] = {}
    for name, module in model.named_modules():
        for values in getattr(module, "lora_E", {}).values():
            kind = found.setdefault(name.rpartition(".")[2], [])
            kind.append(int(values.ne(0).sum()))
    return found


def keep_adapter(model: Any, folder: Path, base: str) -> int:
    """Save a PEFT model's adapter without this machine's paths, and count its bytes."""
    model.save_pretrained(folder)
    (folder / "README.md").unlink(missing_ok=True)
    file = folder / "adapter_config.json"
    config = json.loads(file.read_text(encoding="utf-8"))
    config["base_model_name_or_path"] = base
    if "prompt_tuning_init" in config:  # how it began is in the record
        config["prompt_tuning_init"] = "RANDOM"
        config["prompt_tuning_init_text"] = config["tokenizer_name_or_path"] = None
    file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    return sum(file.stat().st_size for file in folder.glob("*.safetensors"))


def _add_tests(run: dict[str, Any], experiment: RecordedExperiment, model: Any) -> None:
    """Put answers to all tests into the run, and what the model forgot."""
    sweep_runs.to_dtype(model, get_profile().dtype)
    if experiment.test_examples != 0:
        sweep_runs.add_test(run, experiment, model)
    tokenizer, names = load_tokenizer(experiment.model), []
    template = sweep_runs.template_for(tokenizer)
    if experiment.forgetting:
        before, after = _untuned(experiment.model), _general(model, tokenizer)
        run["measured"]["general_questions"] = {"before": before, "after": after}
    if experiment.also_test:
        test = load_examples(experiment.also_test, "test")
        scored = evaluate(model, tokenizer, test, template=template)
        answers = {"sha256": data_hash(experiment.also_test)}
        run["measured"]["also_test"] = answers | sweep_runs.answers_of(scored)
        names += ["also_test_exact_match", "also_test_by_slice"]
    if limit := experiment.validation_answers:
        test = load_examples(experiment.data, "validation")
        scored = evaluate(model, tokenizer, test, template=template, limit=limit)
        run["measured"]["validation"] = sweep_runs.answers_of(scored)
        run["measured"]["validation"].pop("slices", None)
        names.append("validation_exact_match")
    run["metrics"] |= compute_metrics(run, names)


def _general(model: Any, tokenizer: Any) -> dict[str, float]:
    questions = load_examples("general_questions", "test")
    template = sweep_runs.template_for(tokenizer)
    loss = perplexity(model, tokenizer, questions, template=template).loss
    answered = answer_share(model, tokenizer, questions, template=template)
    return {"loss": loss, "answer_share": answered.share}


@functools.cache
def _untuned(name: str | None) -> dict[str, float]:
    return _general(load_model(name), load_tokenizer(name))


def make_recorded_model(experiment: RecordedExperiment) -> Any:
    """As `make_model`, with the head alone, and starts on 4-bit weights."""
    if experiment.method == "head":
        model = sweep_runs.make_model(replace(experiment, method="full"))
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
        return model
    if isinstance(experiment.method, Bottleneck):
        model = sweep_runs.make_model(replace(experiment, method="full"))
        experiment.method.insert(model)
        return model
    model = sweep_runs.make_model(experiment)
    if experiment.start:
        originals = load_model(experiment.model, dtype=torch.float32).state_dict()
        set_start(model, originals, experiment.start)
    return model


def make_recorded_rows(experiment: RecordedExperiment) -> list[dict[str, Any]]:
    """Tokenized training records, spoiled where the experiment says so."""
    tokenizer = load_tokenizer(experiment.model)
    limit, seed, rows = experiment.train_examples, experiment.seed, []
    for name in filter(None, (experiment.data, experiment.also)):
        rows += load_examples(name, limit=limit, seed=seed)
    if experiment.shuffle_labels:
        completions = [row["completion"] for row in rows]
        random.Random(seed).shuffle(completions)
        pairs = zip(rows, completions, strict=True)
        rows = [row | {"completion": other} for row, other in pairs]
    template = experiment.template or sweep_runs.template_for(tokenizer)
    tokenized = list(tokenize_dataset(rows, tokenizer, template=template))
    if experiment.wrong_mask:
        for row in tokenized:
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            row["labels"] = [i if label == IGNORE else IGNORE for i, label in pairs]
    return tokenized


def weight_of(model: Any, name: str) -> Any:
    """A parameter by its name in the base model, detached."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return base.get_parameter(name).detach()


def _loraplus(model: Any, experiment: RecordedExperiment) -> Any:
    if not experiment.loraplus_ratio:
        return None
    from peft.optimizers import create_loraplus_optimizer

    rates = {"lr": experiment.learning_rate}
    rates |= {"loraplus_lr_ratio": experiment.loraplus_ratio}
    return create_loraplus_optimizer(model, torch.optim.AdamW, fused=True, **rates)
