"""Which runs each lesson quotes: edit here what `make runs` makes.

`LESSON_RUNS` holds the families of each lesson. A family is a list of experiments, or
a function that returns one, where its runs follow from what is recorded.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from course_utils import records
from course_utils.sweep.experiment import (
    BUDGET,
    LORA,
    METHODS,
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
from maintenance.runs import curves
from maintenance.runs.batch_size import BatchSizes
from maintenance.runs.card import CardExperiment
from maintenance.runs.classifier import ClassifierExperiment
from maintenance.runs.experiment import Bottleneck
from maintenance.runs.experiment import RecordedExperiment as Run
from maintenance.runs.lesson import LessonExperiment
from maintenance.runs.peft_table import all_types
from maintenance.runs.rounding import LoftQ, QPiSSA, Rounding

Family = list[Any] | Callable[[], list[Any]]
LESSON_RUNS: dict[str, dict[str, Family]] = {}

# Enough to tell settings apart, and short enough to repeat.
SHORT = {"steps": 20, "batch_size": 4, "eval_examples": 32}
NO_TEST = SHORT | {"test_examples": 0}
# As long as two cores allow, for the run that a lesson's curves show.
MAIN = {"steps": 150, "batch_size": 8, "schedule": "cosine", "eval_every": 25}


def _recorded_losses(record: str, label: str) -> dict[float, float | None]:
    """{rate: final validation loss} of the recorded runs with the first seed."""
    begun = record in records.list_records()
    return {
        run["settings"]["learning_rate"]: run["metrics"]["final_eval_loss"]
        for run in (records.load_record(record)["runs"] if begun else [])
        if run["seed"] == SEEDS[0] and split_label(run)[0] == label
    }


def best_rate(name: str, label: str) -> float:
    """The recorded learning rate of that label's lowest final validation loss."""
    losses = _recorded_losses(name, label)
    best = best_of(losses)
    if best in (min(losses), max(losses)):
        raise ValueError(
            f"{name}: the best rate of {label!r}, {best:g}, is at an edge of "
            f"{sorted(losses)}: extend the grid"
        )
    return best


def _at_rates(label: str, rates: Sequence[float], **settings: Any) -> list[Run]:
    return [Run(f"{label} lr {r:g}", learning_rate=r, **settings) for r in rates]


# --- lesson 0: the untrained model, asked ------------------------------------------


def _asked(prefix: str, test_examples: int | None) -> list[Run]:
    settings = {"steps": 0, "test_examples": test_examples}
    return [
        Run(f"{prefix}zero-shot", Prompting(), **settings),
        Run(f"{prefix}few-shot", Prompting(few_shot=True), **settings),
    ]


LESSON_RUNS["00"] = {"00_prompting": _asked("", None)}

# --- lesson 2: full fine-tuning, short and long ------------------------------------

SPECTRA = tuple(
    f"model.layers.{layer}.{part}.weight"
    for layer in (0, 15, 29)
    for part in ("self_attn.q_proj", "self_attn.v_proj", "mlp.down_proj")
)
FULL_RATES = (3e-5, 1e-4, 3e-4, 1e-3)
SCORED = {"test_examples": None, "forgetting": True}
LONG_FULL = MAIN | {"steps": 240, "batch_size": 16, "eval_every": 40}
MANY_PASSES = LONG_FULL | SCORED | {"steps": 1425, "batch_size": 32, "eval_every": 95}
FULL_RUN = Run("full, long", "full", 3e-4, test_examples=None, **LONG_FULL)


def _frozen_embeddings(sets: str, data: str, steps: int, **more: Any) -> list[Run]:
    settings = LONG_FULL | {"steps": steps, "eval_every": steps // 6} | SCORED
    settings |= more | {"data": data, "eval_examples": 150}
    return [Run(f"embeddings frozen, {sets}", LastLayers(30), 3e-4, **settings)]


def _short(label: str, method: Any = "full", **more: Any) -> Run:
    settings = {"learning_rate": 3e-4} | SHORT | more
    return Run(label, method, **settings)


LESSON_RUNS["02"] = {
    "02_learning_rates": _at_rates("full", FULL_RATES, **SHORT, test_examples=24),
    "02_full": [Run("full", "full", 2e-4, spectra=SPECTRA, **MAIN, **SCORED)],
    "02_long": [replace(FULL_RUN, forgetting=True)],
    # 15,200 sentences, each read once.
    "02_more_data": [
        replace(FULL_RUN, data="home_commands_large", steps=950, eval_every=95)
    ],
    # Both training sets, 16,800 sentences: 1,260 steps of 16 read a fifth again.
    "02_both_sets": _frozen_embeddings(
        "both sets", "home_commands_large", steps=1260, also="home_commands"
    ),
    # 19,200 sentences of other patterns, each read once.
    "02_wide_set": _frozen_embeddings("wide set", "home_commands_wide", steps=1200),
    # Both larger sets, 34,400 sentences, of which 1,350 steps of 16 read five in eight;
    # scored on a second test too, written after the first had been read.
    "02_wide_and_large": _frozen_embeddings(
        "wide and large set",
        "home_commands_wide",
        steps=1350,
        also="home_commands_large",
        also_test="home_commands_second_test",
    ),
    # For a card: the training set 28 times over.
    "02_many_passes": [Run("full", "full", 3e-4, **MANY_PASSES)],
    "02_schedules": [
        _short("constant", test_examples=0, schedule="constant", warmup=0),
        _short("linear", test_examples=0, warmup=0),
        _short("linear, warm-up", test_examples=0),
        _short("no clipping", test_examples=0, max_grad_norm=0),
    ],
    "02_freezing": [
        _short("nothing frozen", test_examples=48),
        _short("first 15 layers frozen", LastLayers(15), test_examples=48),
        _short("first 28 layers frozen", LastLayers(2), test_examples=48),
        _short("output layer alone", "head", test_examples=48),
    ],
    "02_bad_curves": [
        _short(label, eval_every=10, test_examples=0, **more)
        for label, more in {
            "good": {},
            "rate too high": {"learning_rate": 1e-2},
            "rate too low": {"learning_rate": 1e-6},
            "overfit": {"train_examples": 16},
            "shuffled labels": {"shuffle_labels": True},
            "wrong mask": {"wrong_mask": True},
        }.items()
    ],
}

# --- lessons 3 and 4: LoRA, and PiSSA at its own best rate -------------------------

GRID = {"steps": 20, "batch_size": 8, "eval_examples": 48, "test_examples": 48}
LORA_RATES = (3e-4, 1e-3, 3e-3, 1e-2, 3e-2)
PISSA = LORA | {"init_lora_weights": "pissa"}


def _lora(label: str, **changes: Any) -> Run:
    return Run(label, LORA | changes, 1e-3, **GRID)


LESSON_RUNS["03"] = {
    "03_learning_rates": _at_rates("LoRA", LORA_RATES, method=LORA, **GRID),
    "03_lora": [Run("LoRA", LORA, 3e-3, validation_answers=150, **MAIN, **SCORED)],
    "03_grid": [
        _lora("r = 1", r=1, lora_alpha=2),
        *_lora("r = 8").seeds(*SEEDS),
        *_lora("r = 64", r=64, lora_alpha=128).seeds(*SEEDS),
        *_lora("q and v", target_modules=["q_proj", "v_proj"]).seeds(*SEEDS),
        _lora("rsLoRA, r = 64", r=64, lora_alpha=16, use_rslora=True),
        _lora("LoRA, r = 64, alpha = 16", r=64, lora_alpha=16),
        _lora("DoRA", use_dora=True),
        Run("LoRA+", LORA, 3e-4, loraplus_ratio=16.0, **GRID),
    ],
}

FLOAT32 = GRID | {"test_examples": 0, "base_dtype": "float32"}
LONGER = FLOAT32 | {"test_examples": 48, "steps": 30, "eval_every": 10}
LESSON_RUNS["04"] = {
    "04_learning_rates": [
        *_at_rates("LoRA", LORA_RATES, method=LORA, **FLOAT32),
        *_at_rates("PiSSA", LORA_RATES[:4], method=PISSA, **FLOAT32),
    ],
    "04_pissa": lambda: [
        Run(label, method, best_rate("04_learning_rates", label), seed=seed, **LONGER)
        for label, method in (("LoRA", LORA), ("PiSSA", PISSA))
        for seed in SEEDS
    ],
}

# --- lesson 5: prompts -------------------------------------------------------------

NO_TEXT = {"prompt_tuning_init_text": None, "prompt_tuning_init": "RANDOM"}


def _prompt_starts() -> list[Run]:
    """Other starts and lengths at the best rate; what wants its own rate has that."""
    rate = best_rate("05_rates", "prompt")
    random = PROMPT | NO_TEXT
    starts = (
        ("vocabulary", random | {"prompt_tuning_init": "SAMPLE_VOCAB"}, rate),
        ("random", random, rate),
        ("random, 10 times the rate", random, 10 * rate),
        ("5 rows", PROMPT | {"num_virtual_tokens": 5}, rate),
        ("50 rows", PROMPT | {"num_virtual_tokens": 50}, rate),
    )
    return [
        *(Run(*start, **NO_TEST) for start in starts),
        *_at_rates("P-tuning", NETWORK_RATES, method=P_TUNING, **NO_TEST),
    ]


LONG_PROMPT = {"steps": 200, "eval_every": 40, "eval_examples": 32}
LONG_PROMPT |= {"keep_adapter": "05_prompt_tuning"}
NETWORK_RATES = (1e-3, 3e-3, 1e-2, 3e-2)  # of virtual tokens that a network makes
PROMPT_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0, 3.0)
LESSON_RUNS["05"] = {
    "05_rates": _at_rates("prompt", PROMPT_RATES, method=PROMPT, **NO_TEST),
    "05_init": _prompt_starts,
    "05_long": lambda: [
        Run("prompt", PROMPT, best_rate("05_rates", "prompt"), **LONG_PROMPT)
    ],
}

# --- lesson 6: prefixes on the language model, and classifiers ---------------------

PREFIX_RATES = (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
PROJECTED = PREFIX | {"prefix_projection": True, "encoder_hidden_size": 64}
ZERO = PREFIX | {"init_weights": "zero"}
FROM_TEXT = NO_TEST | {"prefix_from": "schema"}
LONG_PREFIX = MAIN | {"prefix_from": "schema"}
LONG_PREFIX |= {"test_examples": 240, "keep_adapter": "06_prefix_tuning"}
VIRTUAL = {"num_virtual_tokens": 16}
NETWORK = VIRTUAL | {"encoder_hidden_size": 128}
PROJECTION = NETWORK | {"prefix_projection": True}
DEEP = {"peft_type": "PREFIX_TUNING"}
# Methods of classification, each with the learning rates tried.
CLASSIFIERS: dict[str, tuple[Any, tuple[float, ...]]] = {
    "frozen": ("head", (1e-3, 3e-3, 1e-2)),
    "prompt": ({"peft_type": "PROMPT_TUNING"} | VIRTUAL, (1e-2, 3e-2, 1e-1, 3e-1)),
    "P-tuning": ({"peft_type": "P_TUNING"} | NETWORK, (3e-4, 1e-3, 3e-3, 1e-2)),
    "prefix": (DEEP | VIRTUAL, PREFIX_RATES),
    "prefix, projected": (DEEP | PROJECTION, (1e-3, 3e-3, 1e-2)),
    "LoRA": (LORA, LORA_RATES[:4]),
    "full": ("full", FULL_RATES),
}
HEAD_RATE = 3e-3  # of every head behind a method; a frozen encoder's tries its own
SMALL_START = 0.1  # of PEFT's spread of 1, for virtual tokens that no network makes


def _classifier(name: str, rate: float, label: str) -> ClassifierExperiment:
    method, _ = CLASSIFIERS[name]
    head_rate = None if method == "head" else HEAD_RATE
    scale = SMALL_START if name in ("prompt", "prefix") else 1.0
    starts = {"head_rate": head_rate, "start_scale": scale}
    return ClassifierExperiment(label, method, rate, **starts)


LESSON_RUNS["06"] = {
    "06_prefix": [
        Run("prefix", PREFIX, 3e-2, **LONG_PREFIX),
        *_at_rates("prefix from text", PREFIX_RATES, method=PREFIX, **FROM_TEXT),
        *_at_rates("prefix random", PREFIX_RATES[2:], method=PREFIX, **NO_TEST),
        *_at_rates("prefix zero", PREFIX_RATES, method=ZERO, **NO_TEST),
        *_at_rates("prefix projected", NETWORK_RATES, method=PROJECTED, **NO_TEST),
    ],
    "06_method_rates": [
        _classifier(name, rate, f"{name} lr {rate:g}")
        for name, (_, rates) in CLASSIFIERS.items()
        for rate in rates
    ],
    "06_methods": lambda: [
        replace(_classifier(name, best_rate("06_method_rates", name), name), seed=seed)
        for name in CLASSIFIERS
        for seed in SEEDS
    ],
}

# --- lesson 7: what 4 bits do to a model, and to its training ----------------------

# Fields of PEFT's configurations in the cases that are measured on a card.
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
# What a case may have beside a method, a model and a size, as its label says it.
CARD_CHANGES: dict[str, dict[str, Any]] = {
    "checkpointing": {"gradient_checkpointing": True},
    "paged_adamw_8bit": {"optimizer": "paged_adamw_8bit"},
    "bfloat16": {"way": "own"},
    "all logits": {"loss": "logits"},
    "r 64": {"double_quant": False, "options": CARD_RECIPE},
}


def _case(name: str, model: str, B: int, T: int, *changes: str) -> CardExperiment:
    method, options = CARD_METHODS[name]
    settings: dict[str, Any] = {"options": options}
    for change in changes:
        settings |= CARD_CHANGES[change]
    label = ", ".join([name, model, f"{B} x {T}", *changes])
    return CardExperiment(label, model, method, B, T, **settings)


def card_cases() -> list[CardExperiment]:
    """Training steps whose memory is predicted and measured on a card."""
    small, large = "smollm2-135m", ("llama-2-7b", "qwen2.5-7b", "mistral-7b")
    llama, qwen, _ = large
    saving, every, recipe = "checkpointing", "all logits", ("checkpointing", "r 64")
    return [
        *(
            _case(name, small, *size)
            for name in ("full", "LoRA", "QLoRA")
            for size in ((4, 256), (8, 512), (8, 512, saving))
        ),
        *(_case(f"{kind} tuning", small, 8, 512) for kind in ("prompt", "prefix")),
        *(_case("QLoRA", m, 1, T, saving) for m in large for T in (512, 1024)),
        _case("LoRA", "llama-3.2-1b", 2, 512),
        _case("LoRA", "llama-3.2-1b", 2, 512, saving),
        _case("QLoRA", "llama-3.2-1b", 2, 512, saving),
        _case("LoRA", "smollm2-360m", 4, 512),
        _case("LoRA", "smollm2-1.7b", 2, 512, saving),
        _case("LoRA", small, 1, 512),
        _case("QLoRA", llama, 4, 1024, *recipe),
        _case("QLoRA", qwen, 4, 1024, *recipe),
        *(_case(m, small, 8, 512, "bfloat16") for m in ("full", "LoRA", "QLoRA")),
        _case("LoRA", "llama-3.2-1b", 2, 512, "bfloat16"),
        _case("QLoRA", qwen, 1, 1024, saving, "bfloat16"),
        _case("full", small, 4, 256, every),
        _case("LoRA", small, 8, 512, every),
        _case("LoRA", "llama-3.2-1b", 2, 512, every),
        _case("QLoRA", llama, 4, 1024, saving, every, "r 64"),
        _case("QLoRA", qwen, 2, 1024, saving, every, "r 64"),
        _case("full", small, 8, 512, "paged_adamw_8bit"),
        _case("QLoRA", llama, 1, 1024, saving, "paged_adamw_8bit"),
    ]


LONGER_LORA = {"method": LORA, "learning_rate": 3e-3, "steps": 24, "eval_every": 12}
QLORA = LONGER_LORA | {"eval_examples": 48, "test_examples": 60}
INT8 = NO_TEST | LONGER_LORA | {"base_dtype": "float32"}
NF4 = NO_TEST | {"method": LORA, "learning_rate": 1e-3, "quantization": "nf4"}
ROUNDED = {"steps": 0, "test_examples": 0}
LESSON_RUNS["07"] = {
    "07_qlora": [
        *Run("LoRA", **QLORA).seeds(*SEEDS),
        *Run("QLoRA, NF4", quantization="nf4", **QLORA).seeds(*SEEDS),
        Run("QLoRA, FP4", quantization="fp4", **QLORA),
    ],
    "07_starts": [
        *Run("NF4", **NF4).seeds(*SEEDS),
        *Run("NF4, LoftQ", start=LoftQ(1), **NF4).seeds(*SEEDS),
        *Run("NF4, QPiSSA", start=QPiSSA(), **NF4).seeds(*SEEDS),
    ],
    "07_rounding": [
        Run("int8, by rows", Rounding("int8"), **ROUNDED),
        Run("int4", Rounding("int4"), **ROUNDED),
        Run("FP4", Rounding("fp4"), **ROUNDED),
        Run("NF4", Rounding("nf4"), **ROUNDED),
        Run("NF4, double", Rounding("nf4", double_quant=True), **ROUNDED),
        *(
            Run(f"{name}, r = {r}", Rounding("nf4", rank=r), start=start, **ROUNDED)
            for r in (8, 32)
            for name, start in (
                ("LoftQ, 1 round", LoftQ(1)),
                ("LoftQ, 5 rounds", LoftQ(5)),
                ("QPiSSA", QPiSSA()),
            )
        ),
    ],
    "07_int8": [
        *Run("exact", **INT8).seeds(*SEEDS),
        *Run("int8", int8=True, **INT8).seeds(*SEEDS),
    ],
    "07_card": card_cases(),  # last: it needs a card
}

# --- lesson 8: every method, its own best rate, three seeds ------------------------

# Seconds are compared apart: in one go, in rounds, with nothing else on the machine.
TIMED = BUDGET | {"steps": 6, "eval_every": 0, "eval_examples": 6}
TIMED |= {"test_examples": 0, "costs": None}


def sweep_family(
    record: str,
    methods: dict[str, Candidate],
    more: Sequence[Any] = (),
    *,
    budget: dict[str, Any] = BUDGET,
    best_also: dict[str, Any] | None = None,
) -> Callable[[], list[Run]]:
    """What to run so far: rates around the best, then the best with further seeds.

    The list grows with its record, until every best rate lies inside its grid and has
    all seeds, those with `best_also`; `more` experiments are run last.
    """

    def experiments() -> list[Run]:
        tried, repeated = [], []
        for name, (method, first, settings) in methods.items():
            rates, inside = grid(first, _recorded_losses(record, name))
            settings = budget | settings | {"method": method}
            tried += _at_rates(name, rates, **settings)
            if inside:
                settings |= {"forgetting": True} if best_also is None else best_also
                (best,) = _at_rates(name, [best_rate(record, name)], **settings)
                repeated += best.seeds(*SEEDS[1:])
        return [*tried, *repeated, *more]

    return experiments


def _speed_runs(methods: dict[str, Candidate]) -> list[Run]:
    """A few steps of each method, twice, the methods in turn.

    Who meets a batch's shape first pays for what PyTorch prepares for it, so the second
    round begins with another method.
    """
    runs, names = [], list(methods)
    for number, seed in enumerate(SEEDS[:2]):
        turn = number * len(names) // 2
        for name in names[turn:] + names[:turn]:
            method, rate, settings = methods[name]
            settings = TIMED | settings | {"seed": seed}
            runs.append(Run(name, method, rate, **settings))
    return runs


UNTRAINED = _asked("prompting, ", BUDGET["test_examples"])
LESSON_RUNS["08"] = {
    "08_low_rank": sweep_family("08_low_rank", low_rank(LORA)),
    "08_others": sweep_family("08_others", other_methods(LORA, PROMPT), UNTRAINED),
    "08_speed": _speed_runs(METHODS),
}

# --- lesson 9: the wider family, each at its own rate ------------------------------

Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}
BRIEF = {"steps": 12, "batch_size": 4, "eval_examples": 24, "test_examples": 0}
BRIEF |= {"template": "plain", "base_dtype": "float32"}
RANKS_LEAVE = {"init_r": 12, "target_r": 4, "lora_alpha": 64, "total_step": 12}
RANKS_LEAVE |= {"tinit": 2, "tfinal": 4}
FAMILY = {
    "LoRA": ({"peft_type": "LORA", "r": 8, "lora_alpha": 16} | Q_AND_V, 1e-2, {}),
    "IA3": ({"peft_type": "IA3"}, 3e-2, {}),
    "AdaLoRA": ({"peft_type": "ADALORA", **RANKS_LEAVE} | Q_AND_V, 3e-2, {}),
    "LN tuning": ({"peft_type": "LN_TUNING"}, 1e-2, {}),
    "OFT": ({"peft_type": "OFT"} | Q_AND_V, 3e-3, {}),
    "bottleneck": (Bottleneck(), 3e-3, {}),
    "LoHa": ({"peft_type": "LOHA"} | Q_AND_V, 3e-2, {}),
    "VeRA": ({"peft_type": "VERA"} | Q_AND_V, 1e-1, {}),
    "LoKr": ({"peft_type": "LOKR"} | Q_AND_V, 3e-2, {}),
}
LESSON_RUNS["09"] = {
    "09_peft_types": all_types,
    "09_rates": sweep_family("09_rates", FAMILY, budget=BRIEF, best_also={}),
}

# --- lesson 10: an encoder's biases, a small T5, pictures ---------------------------

BIAS_RATES = (3e-4, 1e-3, 3e-3, 1e-2)
WORD_RATES = {
    "full": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA": (3e-3, 1e-2, 3e-2, 1e-1),
    "IA3": (3e-2, 1e-1, 2e-1, 5e-1),
    "prefix": (3e-1, 1.0, 3.0, 10.0),
}
WAY_RATES = {
    "head alone": (3e-3, 1e-2, 3e-2, 1e-1, 3e-1),
    "first 2 frozen": (1e-3, 3e-3, 1e-2, 3e-2),
    "all weights": (3e-4, 1e-3, 3e-3, 1e-2),
    "from scratch": (1e-3, 3e-3, 1e-2, 3e-2),
    "LoRA": (1e-3, 3e-3, 1e-2, 3e-2),
}
PLACES = ("few, alike", "few, unlike", "many, alike", "many, unlike")
DRAWN = "10_beyond_text: words"


def _rates_known(record: str, rates: dict[str, tuple[float, ...]]) -> bool:
    """Whether a record has each of these rates of each label, with the first seed."""
    known = {label: _recorded_losses(record, label).keys() for label in rates}
    return all(known[label] >= set(tried) for label, tried in rates.items())


def _bitfit_runs() -> list[ClassifierExperiment]:
    """The head alone, BitFit at each rate, and then at its best with all seeds."""
    rate = best_rate("06_method_rates", "frozen")
    head = _classifier("frozen", rate, "head alone")
    tried = [
        ClassifierExperiment(f"BitFit lr {r:g}", "biases", r, head_rate=HEAD_RATE)
        for r in BIAS_RATES
    ]
    repeated = [head]
    if _rates_known("10_bitfit", {"BitFit": BIAS_RATES}):
        best = best_rate("10_bitfit", "BitFit")
        repeated += [run for run in tried if run.learning_rate == best]
    again = [replace(run, seed=seed) for seed in SEEDS[1:] for run in repeated]
    return [head, *tried, *again]


def _word_run(name: str, rate: float, label: str) -> LessonExperiment:
    return LessonExperiment(label, "words", name, DRAWN, rate)


def _picture_run(way: str, place: str, rate: float, label: str) -> LessonExperiment:
    drawn = f"{DRAWN} faces draw"
    return LessonExperiment(label, "pictures", way, drawn, rate, place)


def _picture_runs() -> list[LessonExperiment]:
    """Each way in each place with all seeds, once the rates are recorded."""
    if not _rates_known("10_picture_rates", WAY_RATES):
        return []
    best = {way: best_rate("10_picture_rates", way) for way in WAY_RATES}
    return [
        replace(_picture_run(way, place, rate, f"{way}, {place}"), seed=seed)
        for seed in SEEDS
        for way, rate in best.items()
        for place in PLACES
    ]


LESSON_RUNS["10"] = {
    "10_word_rates": [
        _word_run(name, rate, f"{name} lr {rate:g}")
        for name, rates in WORD_RATES.items()
        for rate in rates
    ],
    "10_words": lambda: [
        replace(_word_run(name, best_rate("10_word_rates", name), name), seed=seed)
        for seed in SEEDS
        for name in WORD_RATES
    ],
    # Each way at its best rate where pictures are many and unlike.
    "10_picture_rates": [
        _picture_run(way, PLACES[-1], rate, f"{way} lr {rate:g}")
        for way, rates in WAY_RATES.items()
        for rate in rates
    ],
    "10_pictures": _picture_runs,
    "10_bitfit": _bitfit_runs,
}

# --- lesson 11: curves and batch sizes, by the lesson's own cells -------------------

LESSON_RUNS["11"] = {
    "11_gallery": curves.gallery,
    "11_diagnosis": curves.trial,
    "11_divided": curves.divided,
    "11_batch_size": [
        BatchSizes(2**k, seed=seed) for seed in SEEDS for k in range(4, 11)
    ],
}

# --- lesson 12: adapters combined, and switched ------------------------------------


def _combined(kind: str, seed: int) -> LessonExperiment:
    return LessonExperiment(
        kind, "combining", kind, "home_commands", also="reviews", seed=seed
    )


LESSON_RUNS["12"] = {
    "12_combining": [
        _combined(kind, seed)
        for seed in SEEDS
        for kind in ("cat", "svd", "linear", "ties")
    ],
    "12_switching": [
        LessonExperiment("switching", "switching", "switching", "home_commands")
    ],
}
