"""The recorded runs of lesson 07: what 4 bits do to a model, and to its training."""

from __future__ import annotations

from typing import Any

from course_utils.experiment_card_setup import CardExperiment
from course_utils.experiment_setup import Experiment

ROUNDINGS = {
    "int8, by rows": ("int8", None),
    "int4": ("int4", None),
    "FP4": ("fp4", None),
    "NF4": ("nf4", None),
    "NF4, double": ("nf4+dq", None),
    "LoftQ, 1 round, r = 8": ("nf4:8", "loftq:1"),
    "LoftQ, 5 rounds, r = 8": ("nf4:8", "loftq:5"),
    "QPiSSA, r = 8": ("nf4:8", "qpissa"),
    "LoftQ, 1 round, r = 32": ("nf4:32", "loftq:1"),
    "LoftQ, 5 rounds, r = 32": ("nf4:32", "loftq:5"),
    "QPiSSA, r = 32": ("nf4:32", "qpissa"),
}
BASES = {"LoRA": None, "QLoRA, NF4": "nf4", "QLoRA, FP4": "fp4"}
STARTS = {"NF4": None, "NF4, LoftQ": "loftq:1", "NF4, QPiSSA": "qpissa"}

ALL = {"r": 16, "lora_alpha": 32, "target_modules": "all-linear"}
PREFIX = {"num_virtual_tokens": 20}
RECIPE = {
    "r": 64,
    "lora_alpha": 16,
    "lora_dropout": 0.1,
    "target_modules": ["q_proj", "v_proj"],
}
NAMES = {
    "full": ("full", {}),
    "LoRA": ("lora", ALL),
    "QLoRA": ("qlora", ALL),
    "prompt tuning": ("prompt_tuning", PREFIX),
    "prefix tuning": ("prefix_tuning", PREFIX),
}


def _case(name: str, model: str, size: tuple[int, int], **more: Any) -> CardExperiment:
    """A case whose label tells it from the others."""
    method, options = NAMES[name]
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
    own = {"way": "own"}
    cases = [
        _case(name, small, size, **more)
        for name in ("full", "LoRA", "QLoRA")
        for size, more in (((4, 256), {}), ((8, 512), {}), ((8, 512), saving))
    ]
    cases += [_case(f"{kind} tuning", small, (8, 512)) for kind in ("prompt", "prefix")]
    cases += [
        _case("QLoRA", model, (1, length), **saving)
        for model in ("llama-2-7b", "qwen2.5-7b", "mistral-7b")
        for length in (512, 1024)
    ]
    cases += [
        _case("LoRA", "llama-3.2-1b", (2, 512)),
        _case("LoRA", "llama-3.2-1b", (2, 512), **saving),
        _case("QLoRA", "llama-3.2-1b", (2, 512), **saving),
        _case("LoRA", "smollm2-360m", (4, 512)),
        _case("LoRA", "smollm2-1.7b", (2, 512), **saving),
        _case("LoRA", small, (1, 512)),
    ]
    recipe = {**saving, "double_quant": False, "options": RECIPE, "note": "r 64"}
    cases += [
        _case("QLoRA", model, (4, 1024), **recipe)
        for model in ("llama-2-7b", "qwen2.5-7b")
    ]
    cases += [_case(name, small, (8, 512), **own) for name in ("full", "LoRA", "QLoRA")]
    cases += [
        _case("LoRA", "llama-3.2-1b", (2, 512), **own),
        _case("QLoRA", "qwen2.5-7b", (1, 1024), **saving, **own),
    ]
    every = {"loss": "logits"}
    cases += [
        _case("full", small, (4, 256), **every),
        _case("LoRA", small, (8, 512), **every),
        _case("LoRA", "llama-3.2-1b", (2, 512), **every),
        _case("QLoRA", "llama-2-7b", (4, 1024), **recipe, **every),
        _case("QLoRA", "qwen2.5-7b", (2, 1024), **recipe, **every),
        _case("full", small, (8, 512), optimizer="paged_adamw_8bit"),
        _case("QLoRA", "llama-2-7b", (1, 1024), optimizer="paged_adamw_8bit", **saving),
    ]
    return cases


def quantized_runs(lora: dict[str, Any], short: dict[str, Any]) -> dict[str, list]:
    """The families of lesson 07.

    Args:
        lora: fields of the PEFT configuration that all lessons share.
        short: settings of a short run.
    """
    long = {"steps": 24, "batch_size": 8, "eval_every": 12, "eval_examples": 48}
    families: dict[str, list] = {"07_qlora": [], "07_starts": []}
    for label, base in BASES.items():
        one = Experiment(label, lora, 3e-3, test_examples=60, quantization=base, **long)
        families["07_qlora"] += one.seeds(0, 1, 2) if base != "fp4" else [one]
    families["07_rounding"] = [
        Experiment(label, f"round:{name}", steps=0, test_examples=0, start=start)
        for label, (name, start) in ROUNDINGS.items()
    ]
    for label, start in STARTS.items():
        one = Experiment(
            label, lora, 1e-3, **short, test_examples=0, quantization="nf4", start=start
        )
        families["07_starts"] += one.seeds(0, 1, 2)
    families["07_card"] = card_cases()  # last: it needs a card
    return families
