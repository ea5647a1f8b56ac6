"""Which runs each lesson quotes: edit here what `make runs` makes.

A family is a list of experiments, or a function that returns one, where its runs follow
from what is recorded. `LESSON_RUNS` names them all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from course_utils import records
from course_utils.sweep.experiment import (
    BUDGET,
    LORA,
    P_TUNING,
    PREFIX,
    PROMPT,
    SEEDS,
    Candidate,
    LastLayers,
    Prompting,
    best_of,
    grid,
    low_rank,
    other_methods,
)
from course_utils.sweep.results import split_label
from maintenance.runs.card import CardExperiment
from maintenance.runs.classifier import ClassifierExperiment
from maintenance.runs.experiment import LoftQ, QPiSSA, RecordedExperiment
from maintenance.runs.rounding import Rounding

Family = list[Any] | Callable[[], list[Any]]

# Enough to tell settings apart, and short enough to repeat.
SHORT = {"steps": 20, "batch_size": 4, "eval_examples": 32}
# As long as two cores allow, for the run that a lesson's curves show.
MAIN = {"steps": 150, "batch_size": 8, "schedule": "cosine", "eval_every": 25}


def recorded_losses(record: str, label: str) -> dict[float, float | None]:
    """{rate: final validation loss} of the runs with that label and the first seed.

    A record that is not begun has none.
    """
    begun = record in records.list_records()
    return {
        run["settings"]["learning_rate"]: run["metrics"]["final_eval_loss"]
        for run in (records.load_record(record)["runs"] if begun else [])
        if run["seed"] == SEEDS[0] and split_label(run)[0] == label
    }


def best_rate(name: str, label: str) -> float:
    """The learning rate of the record's lowest final validation loss with that label.

    Raises:
        ValueError: the best rate is at an edge of its grid: extend the grid.
    """
    losses = recorded_losses(name, label)
    best = best_of(losses)
    if best in (min(losses), max(losses)):
        raise ValueError(
            f"{name}: the best rate of {label!r}, {best:g}, is at an edge of "
            f"{sorted(losses)}: extend the grid"
        )
    return best


def _at_rates(
    label: str, rates: Sequence[float], **settings: Any
) -> list[RecordedExperiment]:
    return [
        RecordedExperiment(f"{label} lr {rate:g}", learning_rate=rate, **settings)
        for rate in rates
    ]


# --- lesson 0 ----------------------------------------------------------------------


def prompting_runs() -> dict[str, Family]:
    """The families of lesson 0: the untrained model, asked."""
    methods = {"zero-shot": Prompting(), "few-shot": Prompting(few_shot=True)}
    return {
        "00_prompting": [
            RecordedExperiment(label, method, steps=0, test_examples=None)
            for label, method in methods.items()
        ]
    }


# --- lesson 2 ----------------------------------------------------------------------

SPECTRA = tuple(
    f"model.layers.{layer}.{part}.weight"
    for layer in (0, 15, 29)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)
LONG = RecordedExperiment(
    "full, long",
    learning_rate=3e-4,
    steps=240,
    batch_size=16,
    schedule="cosine",
    test_examples=None,
    eval_every=40,
)
# For a card: the training set 28 times over.
MANY_PASSES = replace(
    LONG, label="full", steps=1425, batch_size=32, eval_every=95, forgetting=True
)
# Both training sets, 16,800 sentences: 1,260 steps of 16 read a fifth of them twice.
BOTH = replace(
    LONG,
    label="embeddings frozen, both sets",
    method=LastLayers(30),
    data="home_commands_large",
    also="home_commands",
    steps=1260,
    eval_every=210,
    eval_examples=150,
    forgetting=True,
)
# 19,200 sentences of other patterns, each read once.
WIDE = replace(
    BOTH,
    label="embeddings frozen, wide set",
    data="home_commands_wide",
    also=None,
    steps=1200,
    eval_every=200,
)
# Both larger sets, 34,400 sentences, of which 1,350 steps of 16 read five in eight;
# scored on a second test too, written after the first had been read.
WIDE_AND_LARGE = replace(
    WIDE,
    label="embeddings frozen, wide and large set",
    also="home_commands_large",
    also_test="home_commands_second_test",
    steps=1350,
    eval_every=225,
)
SCHEDULES = {
    "constant": {"schedule": "constant", "warmup": 0},
    "linear": {"warmup": 0},
    "linear, warm-up": {},
    "no clipping": {"max_grad_norm": 0},
}
FREEZING = {
    "nothing frozen": "full",
    "first 15 layers frozen": LastLayers(15),
    "first 28 layers frozen": LastLayers(2),
    "output layer alone": "head",
}
BAD_CURVES = {
    "good": {"learning_rate": 3e-4},
    "rate too high": {"learning_rate": 1e-2},
    "rate too low": {"learning_rate": 1e-6},
    "overfit": {"learning_rate": 3e-4, "train_examples": 16},
    "shuffled labels": {"learning_rate": 3e-4, "shuffle_labels": True},
    "wrong mask": {"learning_rate": 3e-4, "wrong_mask": True},
}


def full_runs() -> dict[str, Family]:
    """The families of lesson 2: full fine-tuning, short and long."""
    more = {"test_examples": None, "forgetting": True, "spectra": SPECTRA}
    full = RecordedExperiment("full", "full", 2e-4, **MAIN, **more)
    # 15,200 sentences, each read once
    more_data = {"data": "home_commands_large", "steps": 950, "eval_every": 95}
    return {
        "02_learning_rates": _at_rates(
            "full", (3e-5, 1e-4, 3e-4, 1e-3), **SHORT, test_examples=24
        ),
        "02_full": [full],
        "02_long": [replace(LONG, forgetting=True)],
        "02_more_data": [replace(LONG, **more_data)],
        "02_both_sets": [BOTH],
        "02_wide_set": [WIDE],
        "02_wide_and_large": [WIDE_AND_LARGE],
        "02_many_passes": [MANY_PASSES],
        "02_schedules": [
            RecordedExperiment(label, "full", 3e-4, **SHORT, test_examples=0, **more)
            for label, more in SCHEDULES.items()
        ],
        "02_freezing": [
            RecordedExperiment(label, method, 3e-4, **SHORT, test_examples=48)
            for label, method in FREEZING.items()
        ],
        "02_bad_curves": [
            RecordedExperiment(label, **SHORT, eval_every=10, test_examples=0, **more)
            for label, more in BAD_CURVES.items()
        ],
    }


# --- lessons 3 and 4 ---------------------------------------------------------------

GRID = {"steps": 20, "batch_size": 8, "eval_examples": 48, "test_examples": 48}
PISSA = LORA | {"init_lora_weights": "pissa"}


def _lora(
    label: str, *, learning_rate: float = 1e-3, **changes: Any
) -> RecordedExperiment:
    return RecordedExperiment(label, LORA | changes, learning_rate, **GRID)


def lora_runs() -> dict[str, Family]:
    """The families of lesson 3."""
    more = {"test_examples": None, "validation_answers": 150, "forgetting": True}
    long = RecordedExperiment("LoRA", LORA, 3e-3, **MAIN, **more)
    return {
        "03_learning_rates": _at_rates(
            "LoRA", (3e-4, 1e-3, 3e-3, 1e-2, 3e-2), method=LORA, **GRID
        ),
        "03_lora": [long],
        "03_grid": [
            _lora("r = 1", r=1, lora_alpha=2),
            *_lora("r = 8").seeds(0, 1, 2),
            *_lora("r = 64", r=64, lora_alpha=128).seeds(0, 1, 2),
            *_lora("q and v", target_modules=["q_proj", "v_proj"]).seeds(0, 1, 2),
            _lora("rsLoRA, r = 64", r=64, lora_alpha=16, use_rslora=True),
            _lora("LoRA, r = 64, alpha = 16", r=64, lora_alpha=16),
            _lora("DoRA", use_dora=True),
            RecordedExperiment("LoRA+", LORA, 3e-4, loraplus_ratio=16.0, **GRID),
        ],
    }


def _pissa_at_best_rates() -> list[RecordedExperiment]:
    settings = GRID | {"steps": 30, "eval_every": 10, "base_dtype": "float32"}
    runs = []
    for label, method in (("LoRA", LORA), ("PiSSA", PISSA)):
        rate = best_rate("04_learning_rates", label)
        runs += RecordedExperiment(label, method, rate, **settings).seeds(0, 1, 2)
    return runs


def pissa_runs() -> dict[str, Family]:
    """The families of lesson 4: LoRA and PiSSA, each at its own best rate."""
    rates = (3e-4, 1e-3, 3e-3, 1e-2)
    settings = GRID | {"test_examples": 0, "base_dtype": "float32"}
    return {
        "04_learning_rates": [
            *_at_rates("LoRA", (*rates, 3e-2), method=LORA, **settings),
            *_at_rates("PiSSA", rates, method=PISSA, **settings),
        ],
        "04_pissa": _pissa_at_best_rates,
    }


# --- lesson 5 ----------------------------------------------------------------------

NO_TEXT = {"prompt_tuning_init_text": None, "prompt_tuning_init": "RANDOM"}
VOCABULARY = NO_TEXT | {"prompt_tuning_init": "SAMPLE_VOCAB"}


def _prompt_starts() -> list[RecordedExperiment]:
    """Other starts and lengths at the best rate; what wants its own rate has that."""
    rate = best_rate("05_rates", "prompt")
    starts = (
        ("vocabulary", PROMPT | VOCABULARY, rate),
        ("random", PROMPT | NO_TEXT, rate),
        ("random, 10 times the rate", PROMPT | NO_TEXT, 10 * rate),
        ("5 rows", PROMPT | {"num_virtual_tokens": 5}, rate),
        ("50 rows", PROMPT | {"num_virtual_tokens": 50}, rate),
    )
    settings = SHORT | {"test_examples": 0}
    return [
        *(RecordedExperiment(*start, **settings) for start in starts),
        *_at_rates("P-tuning", (1e-3, 3e-3, 1e-2, 3e-2), method=P_TUNING, **settings),
    ]


def _long_prompt() -> list[RecordedExperiment]:
    rate = best_rate("05_rates", "prompt")
    settings = {"steps": 200, "eval_every": 40, "eval_examples": 32}
    kept = {"keep_adapter": "05_prompt_tuning"}
    return [RecordedExperiment("prompt", PROMPT, rate, **settings, **kept)]


def prompt_runs() -> dict[str, Family]:
    """The families of lesson 5."""
    rates = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
    return {
        "05_rates": _at_rates("prompt", rates, method=PROMPT, **SHORT, test_examples=0),
        "05_init": _prompt_starts,
        "05_long": _long_prompt,
    }


# --- lesson 6 ----------------------------------------------------------------------

# How a prefix begins: method, learning rates tried, where its first values are from.
PREFIX_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PROJECTED = PREFIX | {"prefix_projection": True, "encoder_hidden_size": 64}
PREFIX_STARTS: dict[str, tuple[dict, tuple[float, ...], str | None]] = {
    "prefix from text": (PREFIX, PREFIX_RATES, "schema"),
    "prefix random": (PREFIX, PREFIX_RATES[2:], None),
    "prefix zero": (PREFIX | {"init_weights": "zero"}, PREFIX_RATES, None),
    "prefix projected": (PROJECTED, (1e-3, 3e-3, 1e-2, 3e-2), None),
}
VIRTUAL = {"num_virtual_tokens": 16}
DEEP = {"peft_type": "PREFIX_TUNING"} | VIRTUAL
# Methods of classification, each with the learning rates tried.
CLASSIFIERS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "frozen": ("head", (1e-3, 3e-3, 1e-2)),
    "prompt": ({"peft_type": "PROMPT_TUNING"} | VIRTUAL, (1e-2, 3e-2, 1e-1, 3e-1)),
    "P-tuning": (
        {"peft_type": "P_TUNING", "encoder_hidden_size": 128} | VIRTUAL,
        (3e-4, 1e-3, 3e-3, 1e-2),
    ),
    "prefix": (DEEP, PREFIX_RATES),
    "prefix, projected": (
        DEEP | {"prefix_projection": True, "encoder_hidden_size": 128},
        (1e-3, 3e-3, 1e-2),
    ),
    "LoRA": (LORA, (3e-4, 1e-3, 3e-3, 1e-2)),
    "full": ("full", (3e-5, 1e-4, 3e-4, 1e-3)),
}
HEAD_RATE = 3e-3  # of every head behind a method; a frozen encoder's tries its own
SMALL_START = 0.1  # of PEFT's spread of 1, for virtual tokens that no network makes


def _classifier(name: str, rate: float, label: str) -> ClassifierExperiment:
    method, _ = CLASSIFIERS[name]
    return ClassifierExperiment(
        label,
        method,
        rate,
        head_rate=None if method == "head" else HEAD_RATE,
        start_scale=SMALL_START if name in ("prompt", "prefix") else 1.0,
    )


def _classifiers_at_best_rates() -> list[ClassifierExperiment]:
    runs = []
    for name in CLASSIFIERS:
        rate = best_rate("06_method_rates", name)
        runs += _classifier(name, rate, name).seeds(0, 1, 2)
    return runs


def prefix_runs() -> dict[str, Family]:
    """The families of lesson 6: prefixes on the language model, and classifiers."""
    more = {"test_examples": 240, "prefix_from": "schema"}
    more["keep_adapter"] = "06_prefix_tuning"
    long = RecordedExperiment("prefix", PREFIX, 3e-2, **MAIN, **more)
    settings = SHORT | {"test_examples": 0}
    starts = [
        _at_rates(label, rates, method=method, prefix_from=source, **settings)
        for label, (method, rates, source) in PREFIX_STARTS.items()
    ]
    return {
        "06_prefix": [long, *(run for runs in starts for run in runs)],
        "06_method_rates": [
            _classifier(name, rate, f"{name} lr {rate:g}")
            for name, (_, rates) in CLASSIFIERS.items()
            for rate in rates
        ],
        "06_methods": _classifiers_at_best_rates,
    }


# --- lesson 7 ----------------------------------------------------------------------

ROUNDINGS: dict[str, tuple[Rounding, LoftQ | QPiSSA | None]] = {
    "int8, by rows": (Rounding("int8"), None),
    "int4": (Rounding("int4"), None),
    "FP4": (Rounding("fp4"), None),
    "NF4": (Rounding("nf4"), None),
    "NF4, double": (Rounding("nf4", double_quant=True), None),
    "LoftQ, 1 round, r = 8": (Rounding("nf4", rank=8), LoftQ(1)),
    "LoftQ, 5 rounds, r = 8": (Rounding("nf4", rank=8), LoftQ(5)),
    "QPiSSA, r = 8": (Rounding("nf4", rank=8), QPiSSA()),
    "LoftQ, 1 round, r = 32": (Rounding("nf4", rank=32), LoftQ(1)),
    "LoftQ, 5 rounds, r = 32": (Rounding("nf4", rank=32), LoftQ(5)),
    "QPiSSA, r = 32": (Rounding("nf4", rank=32), QPiSSA()),
}
BASES = {"LoRA": None, "QLoRA, NF4": "nf4", "QLoRA, FP4": "fp4"}
QUANTIZED_STARTS = {"NF4": None, "NF4, LoftQ": LoftQ(1), "NF4, QPiSSA": QPiSSA()}
# PEFT's fields and methods of the cases that are measured on a card.
CARD_LORA = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
CARD_PREFIX = {"num_virtual_tokens": 20}
CARD_METHODS = {
    "full": ("full", {}),
    "LoRA": ("lora", CARD_LORA),
    "QLoRA": ("qlora", CARD_LORA),
    "prompt tuning": ("prompt_tuning", CARD_PREFIX),
    "prefix tuning": ("prefix_tuning", CARD_PREFIX),
}
# As the QLoRA paper's code trains.
CARD_RECIPE = {"r": 64, "lora_alpha": 16, "lora_dropout": 0.1}
CARD_RECIPE |= {"target_modules": ["q_proj", "v_proj"]}


def _case(name: str, model: str, size: tuple[int, int], **more: Any) -> CardExperiment:
    """A case whose label tells it from the others."""
    method, options = CARD_METHODS[name]
    words = [name, model, f"{size[0]} x {size[1]}"]
    words += ["checkpointing"] if more.get("gradient_checkpointing") else []
    words += [more["optimizer"]] if "optimizer" in more else []
    words += ["bfloat16"] if more.get("way") == "own" else []
    words += ["all logits"] if more.get("loss") == "logits" else []
    words.append(more.pop("note", ""))
    label = ", ".join(filter(None, words))
    more.setdefault("options", options)
    return CardExperiment(label, model, method, *size, **more)


def card_cases() -> list[CardExperiment]:
    """Training steps whose memory is predicted and measured on a card."""
    small, saving = "smollm2-135m", {"gradient_checkpointing": True}
    own, every = {"way": "own"}, {"loss": "logits"}
    paged = {"optimizer": "paged_adamw_8bit"}
    options = {"double_quant": False, "options": CARD_RECIPE, "note": "r 64"}
    recipe = saving | options
    return [
        *(
            _case(name, small, size, **more)
            for name in ("full", "LoRA", "QLoRA")
            for size, more in (((4, 256), {}), ((8, 512), {}), ((8, 512), saving))
        ),
        *(_case(f"{kind} tuning", small, (8, 512)) for kind in ("prompt", "prefix")),
        *(
            _case("QLoRA", model, (1, length), **saving)
            for model in ("llama-2-7b", "qwen2.5-7b", "mistral-7b")
            for length in (512, 1024)
        ),
        _case("LoRA", "llama-3.2-1b", (2, 512)),
        _case("LoRA", "llama-3.2-1b", (2, 512), **saving),
        _case("QLoRA", "llama-3.2-1b", (2, 512), **saving),
        _case("LoRA", "smollm2-360m", (4, 512)),
        _case("LoRA", "smollm2-1.7b", (2, 512), **saving),
        _case("LoRA", small, (1, 512)),
        _case("QLoRA", "llama-2-7b", (4, 1024), **recipe),
        _case("QLoRA", "qwen2.5-7b", (4, 1024), **recipe),
        *(_case(name, small, (8, 512), **own) for name in ("full", "LoRA", "QLoRA")),
        _case("LoRA", "llama-3.2-1b", (2, 512), **own),
        _case("QLoRA", "qwen2.5-7b", (1, 1024), **saving, **own),
        _case("full", small, (4, 256), **every),
        _case("LoRA", small, (8, 512), **every),
        _case("LoRA", "llama-3.2-1b", (2, 512), **every),
        _case("QLoRA", "llama-2-7b", (4, 1024), **recipe, **every),
        _case("QLoRA", "qwen2.5-7b", (2, 1024), **recipe, **every),
        _case("full", small, (8, 512), **paged),
        _case("QLoRA", "llama-2-7b", (1, 1024), **paged, **saving),
    ]


def quantized_runs() -> dict[str, Family]:
    """The families of lesson 7: what 4 bits do to a model, and to its training."""
    long = {"steps": 24, "batch_size": 8, "eval_every": 12, "eval_examples": 48}
    qlora, starts = [], []
    for label, base in BASES.items():
        run = RecordedExperiment(
            label, LORA, 3e-3, test_examples=60, quantization=base, **long
        )
        qlora += [run] if base == "fp4" else run.seeds(0, 1, 2)
    for label, start in QUANTIZED_STARTS.items():
        settings = SHORT | {"test_examples": 0, "quantization": "nf4"}
        run = RecordedExperiment(label, LORA, 1e-3, start=start, **settings)
        starts += run.seeds(0, 1, 2)
    return {
        "07_qlora": qlora,
        "07_starts": starts,
        "07_rounding": [
            RecordedExperiment(label, method, steps=0, test_examples=0, start=start)
            for label, (method, start) in ROUNDINGS.items()
        ],
        "07_card": card_cases(),  # last: it needs a card
    }


# --- lesson 8 ----------------------------------------------------------------------

# Seconds are compared apart: in one go, in rounds, with nothing else on the machine.
SPEED = BUDGET | {"steps": 6, "eval_every": 0, "eval_examples": 6}
SPEED |= {"test_examples": 0, "costs": None}


def sweep(
    record: str, methods: dict[str, Candidate], more: Sequence[Any] = ()
) -> Callable[[], list[RecordedExperiment]]:
    """What to run so far: rates around the best, then the best with further seeds.

    The list grows with its record, until every best rate lies inside its grid and has
    all seeds; `more` experiments are run last.
    """

    def experiments() -> list[RecordedExperiment]:
        tried, repeated = [], []
        for name, (method, first, settings) in methods.items():
            losses = recorded_losses(record, name)
            rates, inside = grid(first, losses)
            settings = BUDGET | settings
            tried += _at_rates(name, rates, method=method, **settings)
            if inside:
                settings |= {"method": method, "forgetting": True}
                (best,) = _at_rates(name, [best_of(losses)], **settings)
                repeated += best.seeds(*SEEDS[1:])
        return [*tried, *repeated, *more]

    return experiments


def _speed_runs(methods: dict[str, Candidate]) -> list[RecordedExperiment]:
    """A few steps of each method, twice, the methods in turn.

    Who meets a batch's shape first pays for what PyTorch prepares for it, so the second
    round begins with another method.
    """
    runs, names = [], list(methods)
    for number, seed in enumerate(SEEDS[:2]):
        turn = number * len(names) // 2
        for name in names[turn:] + names[:turn]:
            method, rate, settings = methods[name]
            settings = SPEED | settings | {"seed": seed}
            runs.append(RecordedExperiment(name, method, rate, **settings))
    return runs


def comparison_runs() -> dict[str, Family]:
    """The families of lesson 8: every method, its own best rate, three seeds."""
    budget = {"steps": 0, "test_examples": BUDGET["test_examples"]}
    untrained = [
        RecordedExperiment("prompting, zero-shot", Prompting(), **budget),
        RecordedExperiment("prompting, few-shot", Prompting(few_shot=True), **budget),
    ]
    kin, others = low_rank(LORA), other_methods(LORA, PROMPT)
    return {
        "08_low_rank": sweep("08_low_rank", kin),
        "08_others": sweep("08_others", others, untrained),
        "08_speed": _speed_runs(kin | others),
    }


LESSON_RUNS: dict[str, dict[str, Family]] = {
    "00": prompting_runs(),
    "02": full_runs(),
    "03": lora_runs(),
    "04": pissa_runs(),
    "05": prompt_runs(),
    "06": prefix_runs(),
    "07": quantized_runs(),
    "08": comparison_runs(),
}
