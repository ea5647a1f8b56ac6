"""Every type of adapter that PEFT has, on the built-in model, in numbers; no training.

What is counted (trained parameters, bytes of the saved file) is of the whole model.
What needs a forward pass (the start, merging, mixed batches) is measured on its first
two blocks, where each type does the same as in thirty.
"""

from __future__ import annotations

import copy
import functools
import tempfile
import time
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from course_utils.data import load_examples
from course_utils.models import load_model, load_tokenizer, model_name
from course_utils.parameters import count_parameters
from course_utils.runtime import set_seed
from maintenance.store import compute_metrics

# What a type cannot do without on a model of 576 by 192; the others keep defaults.
TOKENS = {"num_virtual_tokens": 20}
NEEDED: dict[str, dict[str, Any]] = {
    "ADALORA": {"total_step": 100},
    "ADAPTION_PROMPT": {"adapter_len": 10, "adapter_layers": -1},  # -1: all
    "C3A": {"block_size": 192},  # its default, 256, does not divide 576
    "CARTRIDGE": TOKENS,
    "CPT": {
        "cpt_token_ids": [3, 4, 5, 6, 7],
        "cpt_mask": [1] * 5,
        "cpt_tokens_type_mask": [1, 2, 2, 3, 4],
    },
    "MULTITASK_PROMPT_TUNING": TOKENS | {"num_tasks": 3},
    "POLY": {"n_tasks": 3},
    "PREFIX_TUNING": TOKENS,
    "PROMPT_TUNING": TOKENS,
    "P_TUNING": TOKENS,
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "VBLORA": {"vector_length": 192},  # its default, 256, does not divide 576
    "XLORA": {"hidden_size": 576},  # and two saved adapters of LoRA
}
# Of PEFT 0.21; a test says which an installed one has more.
TYPES = """
LORA ADALORA ADAPTION_PROMPT BEFT BOFT C3A CARTRIDGE CPT DEFT DELORA FOURIERFT FROD
GLORA GRALORA HIRA HRA IA3 LILY LN_TUNING LOHA LOKR MISS OFT SHIRA PROMPT_TUNING
MULTITASK_PROMPT_TUNING OSF P_TUNING PEANUT POLY PREFIX_TUNING PSOFT PVERA RANDLORA ROAD
SHADOW SUPERTUNING TINYLORA TRAINABLE_TOKENS UNILORA VBLORA VERA WAVEFT XLORA ADAMSS
"""
METRICS = ("file_bytes", "bytes_a_number", "start_change", "merge_error")


@dataclass(frozen=True)
class TypeExperiment:
    """One of PEFT's types, by its name, with what it cannot do without."""

    label: str
    options: Mapping[str, Any] = field(default_factory=dict)
    data: str = "instructions"
    seed: int = 0

    def settings(self) -> dict[str, Any]:
        return {"model": model_name(), "options": dict(self.options)}


def all_types() -> list[TypeExperiment]:
    """PEFT's types in its own order; last the one that needs scikit-learn."""
    return [TypeExperiment(name, NEEDED.get(name, {})) for name in TYPES.split()]


def adapted(model: Any, label: str, options: Mapping[str, Any], folder: Any) -> Any:
    """A copy of the model under that type; `folder` is where X-LoRA's adapters lie."""
    from peft import LoraConfig, PeftType, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS

    model, options = copy.deepcopy(model), dict(options)
    if options.get("adapter_layers") == -1:
        options["adapter_layers"] = model.config.num_hidden_layers
    if label == "XLORA":
        model.config.use_cache = False
        for name in "01":
            random = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
            lora = get_peft_model(model, random)
            lora.save_pretrained(Path(folder) / name)
            model = lora.unload()
        options["adapters"] = {name: str(Path(folder) / name) for name in "01"}
    set_seed(0)
    config = CONFIGS[PeftType(label)](task_type="CAUSAL_LM", **options)
    return get_peft_model(model, config).eval()


def blocks(model: Any, count: int) -> Any:
    """A copy of a Llama's first blocks, with its embeddings and head."""
    kept, model.model.layers = model.model.layers, model.model.layers[:count]
    try:
        cut = copy.deepcopy(model)
    finally:
        model.model.layers = kept
    cut.config.num_hidden_layers = count
    return cut


@functools.cache  # for all types
def _base() -> tuple[Any, Any, torch.Tensor]:
    """The model, its first two blocks, and one text as two equal rows (2, T)."""
    model = load_model(dtype=torch.float32).eval()
    text = load_examples("instructions", "validation")[0]["completion"][:150]
    ids = load_tokenizer()(text, return_tensors="pt")["input_ids"]
    return model, blocks(model, 2), ids.repeat(2, 1)


def run_type(experiment: TypeExperiment) -> dict[str, Any]:
    """The record of one type: bytes, counts, and the largest differences of a logit.

    `start_change` before training; `change`, with random numbers added to all that is
    trained; `merge_error`, what merging then adds to it. `merges` and `mixes` (a row of
    the name `__base__`) are "yes", an error's name, or in a word what comes out.
    """
    begun = time.perf_counter()
    name, options = experiment.label, experiment.options
    model, cut, ids = _base()
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore")
        whole = adapted(model, name, options, folder)
        trained = count_parameters(whole).trainable
        whole.save_pretrained(place := Path(folder) / "saved")
        size = sum(f.stat().st_size for f in place.rglob("adapter_model.safetensors"))
        del whole
        small = adapted(cut, name, options, folder)
        measured = {"trained": trained, "file_bytes": size}
        measured |= {"cut_trained": count_parameters(small).trainable}
        with torch.no_grad():
            measured |= _behaviour(small, cut(ids).logits, ids)
    run = {"label": name, "settings": experiment.settings(), "seed": experiment.seed}
    run |= {"loss": [], "trainable_parameters": trained, "measured": measured}
    absent = set() if "merge_error" in measured else {"merge_error"}
    run["metrics"] = compute_metrics(run, [m for m in METRICS if m not in absent])
    return run | {"seconds": time.perf_counter() - begun}


def _behaviour(model: Any, plain: torch.Tensor, ids: torch.Tensor) -> dict[str, Any]:
    more = {}
    if model.peft_config["default"].peft_type.value in (
        "POLY",
        "MULTITASK_PROMPT_TUNING",
    ):
        more = {"task_ids": torch.zeros(len(ids), dtype=int)}

    def ask(**names: Any) -> torch.Tensor:
        return model(ids, **more, **names).logits[:, -ids.shape[1] :]

    found: dict[str, Any] = {"start_change": (ask() - plain).abs().max().item()}
    torch.manual_seed(0)
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.add_(0.05 * torch.randn_like(parameter))
    own = ask()
    effect = (own - plain).abs().max()
    found["change"] = effect.item()
    try:
        mixed = ask(adapter_names=["default", "__base__"])
        base, same = ((mixed[1] - one[1]).abs().max() for one in (plain, own))
        found["mixes"] = "yes" if base < 0.01 * effect else "ignored"
        assert min(base, same) < 0.01 * effect
    except Exception as error:  # of whatever class: each type has its own
        found["mixes"] = type(error).__name__
    if not hasattr(model, "merge_and_unload"):
        return found | {"merges": "no method"}
    try:
        merged = model.merge_and_unload()
    except Exception as error:
        return found | {"merges": type(error).__name__}
    error = (merged(ids).logits - own).abs().max()
    wrong = error > 0.01 * effect
    return found | {"merges": "wrong" if wrong else "yes", "merge_error": error.item()}
