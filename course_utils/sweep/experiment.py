"""One training of the sweep: what it is, and how it is made.

`METHODS` are the sweep's methods, `BUDGET` what each of them gets.
"""

from __future__ import annotations

import contextlib
import gc
import json
import math
import os
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from course_utils import scoring
from course_utils.data import SPLITS, DataError, load_examples
from course_utils.evaluation import Evaluation, evaluate, free_text, stratified
from course_utils.formatting import CompletionCollator, tokenize_dataset, with_examples
from course_utils.models import load_model, load_tokenizer, model_name
from course_utils.parameters import count_parameters
from course_utils.runtime import data_folder, get_profile, set_seed
from course_utils.training import LossHistory, prepare_trainer, sft_config

BUILTIN_LAYERS = 30
OWN_DATA_SET = "home_commands"  # the course's own, which the sweep is trained on
ZERO_SHOT = "prompting, zero-shot"
SEEDS = (0, 1, 2)
# All methods alike: what is frozen is stored in float32 too, and multiplied in bfloat16
# where the processor can.
BUDGET = {
    "steps": 40,
    "batch_size": 6,
    "eval_every": 10,
    "eval_examples": 48,
    "test_examples": 96,
    "base_dtype": "float32",
    "costs": True,
}
LORA = {"peft_type": "LORA", "r": 8, "lora_alpha": 16, "target_modules": "all-linear"}
PROMPT = {
    "peft_type": "PROMPT_TUNING",
    "num_virtual_tokens": 20,
    "prompt_tuning_init": "TEXT",
    "prompt_tuning_init_text": (
        'Turn the sentence into one JSON object, "action" first, and answer with '
        "nothing else.\n"
    ),
}
P_TUNING = {
    "peft_type": "P_TUNING",
    "num_virtual_tokens": 20,
    "encoder_hidden_size": 576,
}
PREFIX = {"peft_type": "PREFIX_TUNING", "num_virtual_tokens": 32}

# A method, the first learning rate to try, and further settings of its experiments.
Candidate = tuple[Any, float, dict[str, Any]]


# --- what is trained ---------------------------------------------------------------


@dataclass(frozen=True)
class LastLayers:
    """Train the last layers and the final norm; embeddings and other layers stay."""

    count: int

    def stored(self, model: str | None) -> str:
        """As a record names it: of the built-in model, how many layers stay."""
        kept = BUILTIN_LAYERS - self.count
        return f"freeze:{kept}" if model is None else f"last:{self.count}"

    def freeze(self, model: Any) -> None:
        """Freeze the rest of a causal model, in place; ValueError if it is shorter."""
        layers = model.base_model.layers
        if not 0 <= self.count <= len(layers):
            raise ValueError(f"{self}: expected 'full' or 0 to {len(layers)} layers")
        model.get_input_embeddings().requires_grad_(False)
        for layer in layers[: len(layers) - self.count]:
            layer.requires_grad_(False)


@dataclass(frozen=True)
class Prompting:
    """No training: the model is asked, with the data set's best prompt or without."""

    few_shot: bool = False

    def stored(self, model: str | None) -> str:
        """As a record names it."""
        return "prompt:few-shot" if self.few_shot else "prompt:zero-shot"

    def template(self, data: str, otherwise: str) -> Any:
        """The layout of a question: few-shot reads the data set's schema and shots."""
        if not self.few_shot:
            return otherwise
        folder = data_folder() / data
        schema = (folder / "schema.txt").read_text(encoding="utf-8")
        shots = json.loads((folder / "few_shot.json").read_text(encoding="utf-8"))
        return with_examples("chatml", shots, system=schema)


@dataclass(frozen=True)
class Experiment:
    """One training, described completely. What is trained is float32 always."""

    label: str  # what a figure calls it; runs that differ in the seed alone share it
    method: Any = "full"  # or LastLayers, Prompting, a PEFT configuration's fields
    learning_rate: float = 1e-4
    steps: int = 60  # of the optimiser
    batch_size: int = 8
    schedule: str = "linear"  # of transformers
    warmup: float = 0.1  # share of the steps in which the learning rate rises
    seed: int = 0  # orders the data, initialises adapters
    test_examples: int | None = 120  # answered and scored, chosen by slice; None: all
    eval_every: int = 0  # steps between validation losses; 0 measures it at the end
    eval_examples: int = 64  # for the validation loss
    base_dtype: str | None = None  # of frozen weights; None takes the profile's
    quantization: str | None = None  # "nf4" or "fp4": frozen weights in 4 bits
    # "schema" starts a prefix at the keys and values of the data set's `schema.txt`,
    # set as a system turn; None starts as PEFT does.
    prefix_from: str | None = None
    costs: bool | None = None  # measure peak bytes in a step, and the bytes to be kept
    data: str = "home_commands"
    model: str | None = None  # None is the built-in one
    template: str | None = None  # None takes what `template_for` names

    def settings(self) -> dict[str, Any]:
        """All fields but label and seed, in JSON types."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        del values["label"], values["seed"]
        if self.template is None:  # as records were made before there was one
            del values["template"]
        if not isinstance(self.method, str | dict):
            values["method"] = self.method.stored(self.model)
        return values | {"model": model_name(self.model)}


def low_rank(lora: dict[str, Any]) -> dict[str, Candidate]:
    """LoRA and its kin, by name."""
    attention = ["q_proj", "k_proj", "v_proj", "o_proj"]
    # rsLoRA divides alpha by the root of r: at r = 64 its factor is the 2 of the others
    wide = {"r": 64, "lora_alpha": 16, "use_rslora": True}
    return {
        "LoRA": (lora, 1e-2, {}),
        "LoRA, attention": (lora | {"target_modules": attention}, 1e-2, {}),
        "rsLoRA, r = 64": (lora | wide, 3e-3, {}),
        "DoRA": (lora | {"use_dora": True}, 1e-2, {}),
        "PiSSA": (lora | {"init_lora_weights": "pissa"}, 1e-3, {}),
    }


def other_methods(lora: dict[str, Any], prompt: dict[str, Any]) -> dict[str, Candidate]:
    """All other trained methods, by name."""
    return {
        "full": ("full", 3e-4, {}),
        "last 6 layers": (LastLayers(6), 1e-3, {}),
        "QLoRA": (lora, 1e-2, {"quantization": "nf4"}),
        "prompt tuning": (prompt, 3e-1, {}),
        "P-tuning": (P_TUNING, 3e-3, {}),
        "prefix tuning": (PREFIX, 3e-2, {"prefix_from": "schema"}),
    }


METHODS = low_rank(LORA) | other_methods(LORA, PROMPT)


# --- the learning rates that are tried ---------------------------------------------


def neighbour(rate: float, turn: int) -> float:
    """The next rate of 1, 3, 10, 30, ... up (`turn` 1) or down (-1).

    >>> neighbour(0.003, 1), neighbour(0.003, -1)
    (0.01, 0.001)
    """
    place = round(2 * math.log10(rate)) + turn  # 10^(1/2) is 3.16
    return float(f"{(1, 3)[place % 2]}e{place // 2}")


def grid(first: float, losses: dict[float, float | None]) -> tuple[list[float], bool]:
    """The rates to try: three, and further ones while the best is at an edge.

    `first` is the middle of the first three, `losses` are {rate: final validation loss}
    of what is known, None where it is not a number. Returns rates from the lowest up,
    and whether all are known with the best inside.

    >>> grid(1e-3, {3e-4: 0.5, 1e-3: 0.6, 3e-3: 0.9})
    ([0.0001, 0.0003, 0.001, 0.003], False)
    >>> grid(1e-3, {3e-4: 0.5, 1e-3: 0.4, 3e-3: None})
    ([0.0003, 0.001, 0.003], True)
    """
    rates = sorted({neighbour(first, -1), first, neighbour(first, 1), *losses})
    if not set(rates) <= losses.keys():
        return rates, False
    best = best_of(losses)
    if best == rates[0]:
        return [neighbour(best, -1), *rates], False
    if best == rates[-1]:
        return [*rates, neighbour(best, 1)], False
    return rates, True


def best_of(losses: dict[float, float | None]) -> float:
    """The rate of the lowest loss; the lowest rate where no loss is a number."""
    return min(
        sorted(losses), key=lambda r: math.inf if losses[r] is None else losses[r]
    )


def run_experiment(experiment: Experiment, *, progress: bool = True) -> dict[str, Any]:
    """Train, measure, score the test set, and return a run as records hold it.

    It has `label`, `settings`, `seed`, `loss` by step (nats a token), `eval_loss` as
    [step, loss] pairs, `trainable_parameters`, `metrics`, `measured` (seconds, bytes),
    `seconds` in all; with test examples `predictions`, `references` and, where there
    are some, `slices`.
    """
    begun = time.perf_counter()
    if isinstance(experiment.method, Prompting):
        model = load_model(experiment.model)
        run = new_run(experiment) | {"trainable_parameters": 0}
    else:
        set_seed(experiment.seed)
        model = make_model(experiment)
        tokenizer = load_tokenizer(experiment.model)
        rows = load_examples(experiment.data, seed=experiment.seed)
        template = experiment.template or template_for(tokenizer)
        rows = tokenize_dataset(rows, tokenizer, template=template)
        with tempfile.TemporaryDirectory() as folder:
            run = train(experiment, model, list(rows), folder, progress=progress)
    if experiment.test_examples != 0:
        add_test(run, experiment, model)
    del model
    gc.collect()
    return run | {"seconds": time.perf_counter() - begun}


def new_run(experiment: Any) -> dict[str, Any]:
    """A run before anything has happened: no losses, no metrics, nothing measured."""
    identity = {"label": experiment.label, "settings": experiment.settings()}
    empty = {"loss": [], "eval_loss": [], "metrics": {}, "measured": {}}
    return identity | {"seed": experiment.seed} | empty


def make_model(experiment: Experiment) -> Any:
    """Load the model and make trainable what the method trains.

    Raises ValueError: the method is unknown, or there are fewer layers than it trains.
    """
    import torch
    from peft import get_peft_config, get_peft_model, initialize_kv_prefix_from_text

    method, name = experiment.method, experiment.model
    if isinstance(method, LastLayers) or method == "full":
        model = load_model(name, dtype=torch.float32)
        if method != "full":
            method.freeze(model)
        return model
    if not isinstance(method, dict):
        raise ValueError(
            f"method {method!r}: expected 'full', LastLayers(n), or a dict with a PEFT "
            "configuration's fields"
        )
    if method.get("prompt_tuning_init") == "TEXT":  # a record holds no paths
        method = {"tokenizer_name_or_path": load_tokenizer(name).name_or_path, **method}
    dtype = getattr(torch, experiment.base_dtype) if experiment.base_dtype else None
    base = load_model(name, dtype=dtype, quantization=experiment.quantization)
    model = get_peft_model(base, get_peft_config({"task_type": "CAUSAL_LM", **method}))
    if experiment.prefix_from:
        file = data_folder() / experiment.data / f"{experiment.prefix_from}.txt"
        text = file.read_text(encoding="utf-8")
        initialize_kv_prefix_from_text(model, load_tokenizer(name), text=text)
    return model


def template_for(tokenizer: Any) -> str:
    """Name the layout: ChatML where the tokenizer has it, else its own, else plain."""
    own = "tokenizer" if tokenizer.chat_template else "plain"
    roles = ("system", *("user", "assistant") * 2)
    turns = [{"role": role, "content": " A b\n"} for role in roles]
    chats, names = [{"messages": turns[i:]} for i in (0, 1, 3)], ("chatml", own)
    try:
        first, other = (tokenize_dataset(chats, tokenizer, template=n) for n in names)
    except ValueError:  # one of the two it does not have
        return own
    return "chatml" if own == "plain" or first[:] == other[:] else own


def train(
    experiment: Experiment,
    model: Any,
    records: Sequence[dict],
    folder: str | os.PathLike,
    *,
    progress: bool = True,
    optimizer: Any = None,
    callbacks: Sequence[Any] = (),
    resume_from: str | None = None,
    before_s: float = 0.0,
    **arguments: Any,
) -> dict[str, Any]:
    """Train on the path that the lessons use, and return a run without answers.

    `model` is of `make_model`, `records` the tokenized training set, `folder` for
    checkpoints, `resume_from` one to go on from, `before_s` seconds of training old;
    `arguments` are of `sft_config`, and win over the experiment's.
    """
    import datasets
    from trl import SFTTrainer

    from course_utils.training_callbacks import PeakOfStep, PlainProgress

    tokenizer = load_tokenizer(experiment.model)
    template = experiment.template or template_for(tokenizer)
    validation = load_examples(experiment.data, "validation")
    validation = stratified(validation, experiment.eval_examples)
    every, steps = experiment.eval_every, experiment.steps
    settings = {
        "max_steps": steps,
        "per_device_train_batch_size": experiment.batch_size,
        "learning_rate": experiment.learning_rate,
        "lr_scheduler_type": experiment.schedule,
        "warmup_steps": round(experiment.warmup * experiment.steps),
        "eval_strategy": "steps" if every else "no",
        "eval_steps": every or None,
        "save_strategy": "no",
    }
    profile = replace(get_profile(), seed=experiment.seed)
    trainer = SFTTrainer(
        model=model,
        args=sft_config(profile, folder, **settings | arguments),
        train_dataset=datasets.Dataset.from_list(records),
        eval_dataset=tokenize_dataset(validation, tokenizer, template=template),
        data_collator=CompletionCollator(tokenizer),
        processing_class=tokenizer,
        optimizers=(optimizer, None),
    )
    prepare_trainer(trainer)
    if not progress:
        trainer.pop_callback(PlainProgress)
    peak = PeakOfStep()
    for callback in [peak] * bool(experiment.costs) + [*callbacks]:
        trainer.add_callback(callback)
    clock = time.perf_counter()
    trainer.train(resume_from_checkpoint=resume_from)
    seconds = before_s + time.perf_counter() - clock - peak.seconds
    # Validation inside the training is not training time.
    seconds -= sum(e.get("eval_runtime", 0) for e in trainer.state.log_history)
    if not every or steps % every:
        trainer.evaluate()
    run = trained_run(experiment, trainer, seconds)
    if experiment.costs:
        costs = {"peak_bytes": peak.peak_bytes, "adapter_bytes": saved_bytes(model)}
        run["measured"] |= costs
    return run


def trained_run(experiment: Any, trainer: Any, seconds: float) -> dict[str, Any]:
    """A run with what a trainer that has trained so many seconds logged."""
    history = LossHistory.from_trainer(trainer)
    pairs = zip(history.eval_steps, history.eval_loss, strict=True)
    last = {"final_loss": history.loss, "final_eval_loss": history.eval_loss}
    return new_run(experiment) | {
        "loss": list(history.loss),
        "eval_loss": [list(pair) for pair in pairs],
        "metrics": {name: next(reversed(v), None) for name, v in last.items()},
        "trainable_parameters": count_parameters(trainer.model).trainable,
        "tokens_per_s": trainer.state.num_input_tokens_seen / seconds,
        "measured": {"train_seconds": seconds},
    }


def saved_bytes(model: Any) -> int:
    """Bytes of the file that a method leaves: an adapter, else the trained weights."""
    if not hasattr(model, "peft_config"):
        return sum(p.nbytes for p in model.parameters() if p.requires_grad)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        return sum(f.stat().st_size for f in Path(folder).glob("*.safetensors"))


def add_test(run: dict[str, Any], experiment: Experiment, model: Any) -> None:
    """Put a model's answers to the test set, and their scores, into its run."""
    to_dtype(model, get_profile().dtype)
    tokenizer, method = load_tokenizer(experiment.model), experiment.method
    template = experiment.template or template_for(tokenizer)
    if isinstance(method, Prompting):
        template = method.template(experiment.data, template)
    test = load_examples(experiment.data, "test")
    options = {"template": template, "limit": experiment.test_examples}
    as_text = free_text(test["completion"])
    scored = evaluate(model, tokenizer, test, as_text=as_text, **options)
    run["measured"]["test_seconds"] = scored.seconds
    run |= answers_of(scored)
    if scored.as_text:
        run["metrics"]["exact_text"] = scored.exact_match
        return
    run["metrics"] |= {"exact_match": scored.exact_match, "field_f1": scored.field_f1}
    if scored.slices:
        run["metrics"]["by_slice"] = scored.by_slice()
    if experiment.costs:
        answers = scored.predictions, scored.references
        run["metrics"]["by_field"] = scoring.by_field(*answers)


def answers_of(scored: Evaluation) -> dict[str, list[str]]:
    """`predictions`, `references` and, where there are some, `slices`."""
    names = ("predictions", "references", "slices")
    return {name: list(texts) for name in names if (texts := getattr(scored, name))}


def to_dtype(model: Any, dtype: Any) -> None:
    """Cast to the dtype to generate with; a PEFT model's adapters stay in float32."""
    adapted = hasattr(model, "peft_config")
    for parameter in model.parameters():
        trained = adapted and parameter.requires_grad
        if parameter.is_floating_point() and not trained:  # 4-bit weights are bytes
            parameter.data = parameter.data.to(dtype)


# --- the sweep's methods on other data ---------------------------------------------


def split_sizes(data: str, batch_size: int) -> dict[str, int]:
    """Count the examples of each split; DataError where they cannot be compared on."""
    columns = load_examples(data, "all").column_names
    if missing := {"prompt", "completion"} - set(columns):
        raise DataError(
            f"no {' and no '.join(sorted(missing))} in {columns}",
            expected="records with prompt and completion",
            cure="Write one prompt and one completion from each conversation.",
            file=data,
        )
    sizes = dict.fromkeys(SPLITS, 0)
    for split in SPLITS:
        with contextlib.suppress(DataError):  # the data are fine, a split is empty
            sizes[split] = len(load_examples(data, split))
    if not all(sizes.values()) or sizes["train"] < batch_size:
        counts = ", ".join(f"{n} {split}" for split, n in sizes.items())
        raise DataError(
            f"too few examples: {counts}",
            expected=f"{batch_size} or more to train on, and one of each other split",
            cure="One file splits 80/10/10 by a hash of the prompt, so 50 examples "
            "fill every split as a rule; or make a folder with a file for each.",
            file=data,
        )
    answers = load_examples(data, "test")["completion"]
    objects = sum(not free_text([answer]) for answer in answers)
    if 0 < objects < len(answers):
        raise DataError(
            f"{objects} of {len(answers)} test completions are JSON objects",
            expected="all of them, compared field by field, or none, compared as text",
            cure="Write the others as JSON objects too, or put them into another file.",
            file=data,
        )
    return sizes


def plan(
    data: str, methods: Sequence[str], rates: Mapping[str, float], **settings: Any
) -> dict[str, Experiment]:
    """Define one experiment a method: {its name: its experiment}.

    Prompt tuning and a prefix start from the course's own task in the sweep; on other
    data they start from the vocabulary and as PEFT does. Names are of `METHODS` or
    `ZERO_SHOT`, in any case; where `rates`, {name: learning rate}, has none, it is the
    sweep's first one. Raises ValueError: a name is unknown; says the known ones.
    """
    names = {name.lower(): name for name in [*METHODS, ZERO_SHOT]}
    if unknown := [m for m in [*methods, *rates] if m.lower() not in names]:
        known = ", ".join(names.values())
        raise ValueError(f"unknown method {unknown[0]!r}; known: {known}")
    rates = {name.lower(): rate for name, rate in rates.items()}
    planned = {}
    for name in [names[method.lower()] for method in methods]:
        if name == ZERO_SHOT:
            untrained = settings | {"steps": 0, "costs": None, "data": data}
            planned[name] = Experiment(name, Prompting(), **untrained)
            continue
        method, first_rate, more = METHODS[name]
        rate = rates.get(name.lower()) or first_rate
        if data != OWN_DATA_SET:
            more = more | {"prefix_from": None}
            if isinstance(method, dict) and "prompt_tuning_init" in method:
                start = {"prompt_tuning_init": "SAMPLE_VOCAB"}
                method = method | start | {"prompt_tuning_init_text": None}
        label, more = f"{name} lr {rate:g}", settings | more | {"data": data}
        planned[name] = Experiment(label, method, rate, **more)
    return planned
