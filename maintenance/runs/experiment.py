"""What a recorded run is: its settings, its model, its training records."""

from __future__ import annotations

import functools
import random
from dataclasses import asdict, dataclass, replace
from typing import Any

from course_utils.data import load_examples
from course_utils.formatting import IGNORE, tokenize_dataset
from course_utils.models import load_model, load_tokenizer, model_name
from course_utils.runtime import data_folder

# Younger than the first records, which know nothing of them.
ABSENT_WHEN_UNSET = (
    "quantization",
    "keep_adapter",
    "start",
    "prefix_from",
    "validation_answers",
    "costs",
    "also",
    "also_test",
)


@dataclass(frozen=True)
class Experiment:
    """One training run, described completely.

    Attributes:
        label: what a figure calls it; runs that differ in the seed alone share it.
        method: `"full"`; `"head"` (the output layer alone); `"freeze:k"` (embeddings
            and the first k layers stay); `"last:k"` (all but the last k layers stay);
            the fields of a PEFT configuration, as
            `{"peft_type": "LORA", "r": 8, "target_modules": "all-linear"}`; or,
            without training, `"prompt:zero-shot"` and `"prompt:few-shot"`.
        learning_rate: at its peak.
        steps, batch_size: optimiser steps, and examples in each.
        schedule: a name of transformers' schedules.
        warmup: share of the steps in which the rate rises, 0 to 1.
        max_grad_norm: gradients are clipped to this norm; 0 does not clip.
        seed: orders the data, initialises adapters.
        train_examples: train on that many examples only; None takes all.
        test_examples: answers generated and scored, chosen by slice; 0 for none, None
            for the whole test set.
        validation_answers: answers to validation sentences, which are of the training
            set's kind, generated and scored too; None for none.
        eval_every: validation loss every so many steps; 0 measures it at the end.
        eval_examples: validation examples for that.
        base_dtype: dtype of frozen weights; None takes the profile's. What is trained
            is float32 always.
        loraplus_ratio: LoRA+'s ratio of the rates of B and A; None for one rate.
        shuffle_labels: give each prompt another's completion.
        wrong_mask: learn the prompt in place of the answer.
        forgetting: measure the general questions before and after.
        spectra: weights whose change ΔW is taken apart into singular values.
        quantization: `"nf4"` or `"fp4"` loads the frozen weights in 4 bits.
        start: `"qpissa"`, or `"loftq:k"` with k rounds: how adapters on 4-bit weights
            begin (`course_utils.loftq`); None begins as PEFT does.
        prefix_from: `"schema"` starts a prefix at the keys and values of the data set's
            `schema.txt`, set as a system turn; None starts as PEFT does.
        costs: measure the most that tensors take in the second step, and the bytes of
            what a user of the method has to keep; None leaves both out.
        keep_adapter: keep the trained adapter in `data/adapters/` under this name.
        also: a second data set whose training sentences are mixed in; None for none.
        also_test: another data set whose whole test split is answered too and scored
            apart; None for none.
        data, model: names of the data set and, None for the built-in one, the model.
    """

    label: str
    method: Any = "full"
    learning_rate: float = 1e-4
    steps: int = 60
    batch_size: int = 8
    schedule: str = "linear"
    warmup: float = 0.1
    max_grad_norm: float = 1.0
    seed: int = 0
    train_examples: int | None = None
    test_examples: int | None = 120
    eval_every: int = 0
    eval_examples: int = 64
    base_dtype: str | None = None
    loraplus_ratio: float | None = None
    shuffle_labels: bool = False
    wrong_mask: bool = False
    forgetting: bool = False
    spectra: tuple[str, ...] = ()
    quantization: str | None = None
    keep_adapter: str | None = None
    prefix_from: str | None = None
    start: str | None = None
    validation_answers: int | None = None
    costs: bool | None = None
    also: str | None = None
    also_test: str | None = None
    data: str = "home_commands"
    model: str | None = None

    def settings(self) -> dict[str, Any]:
        """All fields but label and seed, as a record holds them (JSON types).

        Fields of `ABSENT_WHEN_UNSET` stand in a record only where they are set.
        """
        fields = asdict(self)
        fields["model"] = model_name(self.model)
        fields["spectra"] = list(self.spectra)
        unset = {name for name in ABSENT_WHEN_UNSET if fields[name] is None}
        return {k: v for k, v in fields.items() if k not in {"label", "seed"} | unset}

    def seeds(self, *seeds: int) -> list[Experiment]:
        """The same experiment with each of these seeds.

        >>> [e.seed for e in Experiment("full").seeds(0, 1, 2)]
        [0, 1, 2]
        """
        return [replace(self, seed=seed) for seed in seeds]


def make_model(experiment: Experiment) -> Any:
    """Load the model and make trainable what the method trains.

    Raises:
        ValueError: the method is unknown, or there are fewer than k layers.
    """
    import torch

    method, name = experiment.method, experiment.model
    if isinstance(method, dict):
        from peft import get_peft_config, get_peft_model

        from course_utils.loftq import set_start

        if method.get("prompt_tuning_init") == "TEXT":  # a record holds no paths
            folder = load_tokenizer(name).name_or_path
            method = {"tokenizer_name_or_path": folder, **method}
        dtype = getattr(torch, experiment.base_dtype) if experiment.base_dtype else None
        config = get_peft_config({"task_type": "CAUSAL_LM", **method})
        base = load_model(name, dtype=dtype, quantization=experiment.quantization)
        model = get_peft_model(base, config)
        if experiment.start:
            originals = load_model(name, dtype=torch.float32).state_dict()
            set_start(model, originals, quantized_start(experiment.start))
        if experiment.prefix_from:
            from peft import initialize_kv_prefix_from_text

            file = data_folder() / experiment.data / f"{experiment.prefix_from}.txt"
            text, tokenizer = file.read_text(encoding="utf-8"), load_tokenizer(name)
            initialize_kv_prefix_from_text(model, tokenizer, text=text)
        return model
    model = load_model(name, dtype=torch.float32)
    if method == "full":
        return model
    kind, _, number = str(method).partition(":")
    if kind == "head":
        model.requires_grad_(False)
        model.get_output_embeddings().requires_grad_(True)
        return model
    layers = model.base_model.layers
    if kind == "last" and number.isdigit():
        kind, number = "freeze", str(len(layers) - int(number))
    if kind != "freeze" or not number.isdigit() or int(number) > len(layers):
        raise ValueError(
            f"method {method!r}: expected 'full', 'head', 'freeze:k' or 'last:k' with "
            f"k from 0 to {len(layers)}, or a dict with a PEFT configuration's fields"
        )
    model.get_input_embeddings().requires_grad_(False)
    for layer in layers[: int(number)]:
        layer.requires_grad_(False)
    return model


def quantized_start(name: str) -> Any:
    """The function of `course_utils.loftq` that an experiment's `start` names.

    Raises:
        ValueError: there is no such start.
    """
    from course_utils.loftq import loftq_init, qpissa_init

    kind, _, rounds = name.partition(":")
    if name == "qpissa":
        return qpissa_init
    if kind == "loftq" and rounds.isdigit() and int(rounds) > 0:
        return functools.partial(loftq_init, rounds=int(rounds))
    raise ValueError(f"start {name!r} is neither 'qpissa' nor 'loftq:k'")


def template_for(tokenizer: Any) -> str:
    """Name the layout: ChatML where its markers are known, else the tokenizer's own.

    Args:
        tokenizer: of the model.
    """
    return "chatml" if "<|im_end|>" in tokenizer.get_vocab() else "tokenizer"


def make_records(experiment: Experiment) -> list[dict[str, Any]]:
    """Tokenized training records, spoiled where the experiment says so."""
    tokenizer = load_tokenizer(experiment.model)
    limit, seed = experiment.train_examples, experiment.seed
    rows = list(load_examples(experiment.data, limit=limit, seed=seed))
    if experiment.also:
        rows += list(load_examples(experiment.also, limit=limit, seed=seed))
    if experiment.shuffle_labels:
        completions = [row["completion"] for row in rows]
        random.Random(seed).shuffle(completions)
        rows = [
            {**row, "completion": other}
            for row, other in zip(rows, completions, strict=True)
        ]
    template = template_for(tokenizer)
    tokenized = list(tokenize_dataset(rows, tokenizer, template=template))
    if experiment.wrong_mask:
        for row in tokenized:
            pairs = zip(row["input_ids"], row["labels"], strict=True)
            row["labels"] = [i if label == IGNORE else IGNORE for i, label in pairs]
    return tokenized
