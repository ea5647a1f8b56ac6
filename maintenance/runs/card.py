"""Predicted against measured memory of training steps on a real card: recorded runs.

`run_card` predicts a case by formula, builds the model, lets the course's own trainer
take a few steps, and keeps both. In the way of a T4 everything is float16 with a
gradient scaler, attention has only the kernels that a T4 has, and PyTorch may take no
more of the card than a T4 has room for.
"""

from __future__ import annotations

import contextlib
import gc
import os
import tempfile
import time
import traceback
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from typing import Any

from course_utils.data import load_examples
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.memory import (
    GIB,
    MemoryEstimate,
    estimate_memory,
    gpu_gib,
    measure_memory,
    model_config,
    t4_plan,
)
from course_utils.models import (
    keep_4bit_weights_in_place,
    load_model,
    load_tokenizer,
    release,
)
from course_utils.parameters import peft_config
from course_utils.runtime import Profile, set_seed
from course_utils.sweep.experiment import new_run
from course_utils.training import (
    plan_settings,
    prepare_trainer,
    sft_config,
    training_arguments,
)
from maintenance.store import compute_metrics

BUILT_IN = "smollm2-135m"
SHORTER = 5  # tokens that one record of a batch lacks, so that there is padding


@dataclass(frozen=True)
class CardExperiment:
    """One case, described completely.

    Attributes:
        label: what a figure calls it.
        model: a name in `memory.KNOWN_MODELS`.
        method: `"full"`, `"lora"`, `"qlora"`, `"prompt_tuning"`, `"prefix_tuning"`.
        batch_size, sequence_length: B and T; all tokens are learned. A batch of more
            than one has padding.
        way: `"T4"`, what that card would be asked for; or `"own"`, bfloat16 and every
            kernel of the card that is there.
        gradient_checkpointing, optimizer, double_quant: as in `estimate_memory`.
        loss: `"chunked"`, by TRL's trainer, or `"logits"`, by transformers'.
        options: PEFT's fields for the method.
        steps: the last one is what counts: the gradient scaler may skip the first.
        data: tokens are taken from this data set.
    """

    label: str
    model: str
    method: str
    batch_size: int
    sequence_length: int
    way: str = "T4"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    double_quant: bool = True
    loss: str = "chunked"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    learning_rate: float = 1e-4
    seed: int = 0
    data: str = "instructions"

    def settings(self) -> dict[str, Any]:
        """All fields but label and seed, as a record holds them."""
        values = asdict(self)
        del values["label"], values["seed"]
        if self.loss == "chunked":  # the first records know of no other
            del values["loss"]
        return values


def plan_of(experiment: CardExperiment) -> MemoryEstimate:
    """What a reader predicts before the run: the closed form.

    Raises:
        ValueError: as `estimate_memory`; or the way is neither `"T4"` nor `"own"`.
    """
    names = ("batch_size", "sequence_length", "gradient_checkpointing", "optimizer")
    names += ("double_quant", "loss")
    shared = {name: getattr(experiment, name) for name in names} | experiment.options
    if experiment.way == "T4":
        return t4_plan(experiment.model, experiment.method, **shared)
    if experiment.way != "own":
        raise ValueError(f"way {experiment.way!r} is neither 'T4' nor 'own'")
    return estimate_memory(
        experiment.model,
        experiment.method,
        dtype="float32" if experiment.method == "full" else "bfloat16",
        autocast="bfloat16",
        **shared,
    )


def random_model(
    config: Any, *, dtype: Any, device: str, quantization: Any = None
) -> Any:
    """A causal model of a configuration with random weights, made on the device.

    One matrix after the other is made and, if asked, packed by bitsandbytes: the whole
    never exists in 16 bits.

    Args:
        config: a `transformers` configuration of the Llama, Mistral or Qwen2 family.
        dtype: torch dtype of what is not packed.
        quantization: a `BitsAndBytesConfig` for 4 bits, or None.
    """
    import torch
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    if quantization is not None:
        _pack_linear_layers(model, quantization, dtype, device)
    _fill(model, dtype, device)
    with torch.device(device):
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=model.config)
    if empty := [name for name, b in model.named_buffers() if b.is_meta]:
        raise ValueError(f"{type(model).__name__}: no values for {empty}")
    if quantization is not None:
        model.is_loaded_in_4bit = True
        model.config.quantization_config = quantization
        keep_4bit_weights_in_place(model)
    return model.eval()


def _pack_linear_layers(model: Any, quantization: Any, dtype: Any, device: str) -> None:
    from torch import nn

    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if type(module) is nn.Linear and module is not head:
            parent, _, last = name.rpartition(".")
            packed = _packed(module, quantization, dtype, device)
            setattr(model.get_submodule(parent), last, packed)


def _fill(model: Any, dtype: Any, device: str) -> None:
    """Random values for each parameter that has none yet; tied weights stay tied."""
    import torch

    made: dict[int, Any] = {}
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:
                new = torch.zeros(old.shape, dtype=dtype, device=device)
                if old.dim() == 1 and name == "weight":
                    new.fill_(1)  # a norm
                elif old.dim() > 1:
                    new.normal_(std=0.02)
                made[id(old)] = (torch.nn.Parameter(new), old)
            module._parameters[name] = made[id(old)][0]


def _packed(linear: Any, quantization: Any, dtype: Any, device: str) -> Any:
    """A Linear4bit of the same shape, with random weights, packed on the device."""
    import bitsandbytes as bnb
    import torch

    options = {
        "compress_statistics": quantization.bnb_4bit_use_double_quant,
        "quant_type": quantization.bnb_4bit_quant_type,
    }
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=quantization.bnb_4bit_compute_dtype,
        device="meta",
        **options,
    )
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device)
    weight.normal_(std=0.02)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, module=layer, **options
    ).to(device)
    if layer.bias is not None:
        bias = torch.zeros(linear.out_features, dtype=dtype, device=device)
        layer.bias = torch.nn.Parameter(bias)
    return layer


def make_card_model(
    experiment: CardExperiment, plan: MemoryEstimate, device: str, config: Any = None
) -> Any:
    """The model of a case as the course trains it, with its adapter.

    Args:
        experiment, plan: the case, and its `plan_of`, which says the dtype.
        device, config: for tests `"cpu"`, and what stands for the model's own.
    """
    import torch
    from peft import get_peft_model
    from transformers import BitsAndBytesConfig

    dtype, quantization = getattr(torch, plan.request.dtype), None
    if plan.request.quantization:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=plan.request.quantization,
            bnb_4bit_use_double_quant=experiment.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    stored = {"dtype": dtype, "quantization": quantization}
    if experiment.model == BUILT_IN and config is None:
        model = load_model(**stored)
    else:
        config = config or model_config(experiment.model)
        model = random_model(config, device=device, **stored)
    if experiment.method == "full":
        return model
    method = "lora" if experiment.method == "qlora" else experiment.method
    adapter = peft_config(method, task_type="CAUSAL_LM", **experiment.options)
    return get_peft_model(model, adapter)


def card_records(experiment: CardExperiment, tokenizer: Any, vocab: int) -> list[dict]:
    """One batch: B records of T tokens of the data set, the last of them shorter."""
    rows = tokenize_dataset(load_examples(experiment.data), tokenizer)
    tokens = [i % vocab for ids in rows["input_ids"] for i in ids]
    B, T = experiment.batch_size, experiment.sequence_length
    tokens *= -(-B * T // len(tokens))
    records = []
    for place in range(B):
        end = T - SHORTER if place == B - 1 and B > 1 else T
        ids = tokens[place * T : place * T + end]
        record = {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}
        records.append(record)
    return records


# --- the measured run --------------------------------------------------------------


class NoCard(RuntimeError):
    """A case is measured on a CUDA card, and there is none here."""


MEASURED = ("memory_ratio", "kept_ratio", "predicted_gib", "measured_gib", "step_s")


@contextlib.contextmanager
def _as_on_a_t4(way: str, room: float | None) -> Iterator[None]:
    """Attention kernels of a T4, and `room` bytes of the card; nothing for `"own"`."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if way != "T4":
        yield
        return
    has_card = torch.cuda.is_available()
    if has_card and room:
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / total))
    try:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        if has_card:
            torch.cuda.set_per_process_memory_fraction(1.0)


def _start_of_case() -> None:
    """Nothing of an earlier case is alive, the library's work space included."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        _workspace_bytes()
        torch.cuda.empty_cache()


def _workspace_bytes() -> int:
    """What cuBLAS holds of the card; it is given back."""
    import torch

    before = torch.cuda.memory_allocated()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    return before - torch.cuda.memory_allocated()


def measure_case(
    experiment: CardExperiment,
    plan: MemoryEstimate,
    device: str = "cuda",
    *,
    room: float | None = None,
    config: Any = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Build the model, take the steps, and return what was measured.

    Args:
        room: bytes that PyTorch may take of the card, in the way of a T4.
        device, config, dtype: for tests: `"cpu"`, another configuration, another dtype
            to compute in.

    Returns:
        `loss` of each step; `peak_bytes` and `kept_bytes` (what is alive between
        steps) of the last; `requested_bytes`, the peak without the allocator's
        rounding; `workspace_bytes` of the library that multiplies matrices;
        `reserved_bytes`, the most that PyTorch took of the card;
        `step_seconds`; `steps`, the figures of each; `scale` of the gradient scaler.
    """
    import torch

    kind = "cuda" if device == "cuda" else "allocator"
    _start_of_case()
    with measure_memory(kind) as now:
        pass
    before, clock = now.start_bytes, time.perf_counter()
    set_seed(experiment.seed)
    model = trainer = None
    try:
        with _as_on_a_t4(experiment.way, room), tempfile.TemporaryDirectory() as folder:
            model = make_card_model(experiment, plan, device, config)
            built = time.perf_counter() - clock
            compute = dtype or getattr(torch, plan.request.autocast)
            profile = Profile("t4", device, compute, experiment.seed)
            trainer = _make_trainer(experiment, plan, model, profile, folder)
            steps = _train(trainer, kind)
        log = trainer.state.log_history
        scaler = getattr(trainer.accelerator, "scaler", None)
        return _figures(steps, before) | {
            "loss": [entry["loss"] for entry in log if "loss" in entry],
            "build_seconds": built,
            "workspace_bytes": _workspace_bytes() if device == "cuda" else 0,
            "scale": scaler.get_scale() if scaler is not None else None,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    finally:
        if trainer is not None:
            trainer.optimizer = trainer.lr_scheduler = None
        if model is not None:
            release(model)
        model = trainer = None
        _start_of_case()


def _make_trainer(
    experiment: CardExperiment,
    plan: MemoryEstimate,
    model: Any,
    profile: Profile,
    folder: str,
) -> Any:
    import datasets
    from transformers import Trainer
    from trl import SFTTrainer

    from course_utils.training_callbacks import PlainProgress

    tokenizer = load_tokenizer(None)
    records = card_records(experiment, tokenizer, model.config.vocab_size)
    chunked = experiment.loss == "chunked"
    make, arguments = (
        (SFTTrainer, sft_config) if chunked else (Trainer, training_arguments)
    )
    trainer = make(
        model=model,
        args=arguments(
            profile,
            folder,
            max_steps=experiment.steps,
            learning_rate=experiment.learning_rate,
            **plan_settings(plan, device=profile.device),
        ),
        train_dataset=datasets.Dataset.from_list(records),
        data_collator=CompletionCollator(tokenizer),
        processing_class=tokenizer,
    )
    prepare_trainer(trainer)
    trainer.pop_callback(PlainProgress)
    return trainer


def _train(trainer: Any, kind: str) -> list[dict[str, Any]]:
    from maintenance.runs.costs import EveryStep

    each = EveryStep(kind)
    trainer.add_callback(each)
    trainer.train()
    return each.steps


def _figures(steps: list[dict[str, Any]], before: int) -> dict[str, Any]:
    """Bytes above those that were alive `before`, of the last step and of all."""
    last = steps[-1]
    return {
        "before_bytes": before,
        "peak_bytes": last["peak_bytes"] - before,
        "peak_of_all_bytes": max(s["peak_bytes"] for s in steps) - before,
        "kept_bytes": last["start_bytes"] - before,
        "reserved_bytes": max(s["reserved_bytes"] for s in steps),
        "step_seconds": last["seconds"],
        "steps": steps,
        "requested_bytes": last.get("requested_bytes"),
    }


def run_card(experiment: CardExperiment, device: str = "cuda", **tests: Any) -> dict:
    """Predict and measure one case; a failure is recorded in words.

    In the way of a T4 the card is first held to the T4's room; a case that does not
    fit is measured again without, and says so. For tests there are `device` and what
    else `measure_case` takes.

    Raises:
        NoCard: there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise NoCard("this is measured on a CUDA card, and there is none here")
    # As large as on any card but Hopper's, whose own work space is 32 MiB
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    begun, plan = time.perf_counter(), plan_of(experiment)
    predicted = {
        "predicted_bytes": plan.total,
        "predicted_parts": plan.parts,
        "predicted_kept_bytes": plan.static - plan.static_parts["gradients"],
        "moment": plan.moment,
    }
    figures, remarks = _try_rooms(experiment, plan, device, **tests)
    run = new_run(experiment) | {
        "loss": figures.pop("loss", []),
        "trainable_parameters": figures.pop("trained", plan.trainable),
        "measured": predicted | remarks | figures,
    }
    if figures:
        run["metrics"] = compute_metrics(run, MEASURED)
        ratio, peak = run["metrics"]["memory_ratio"], figures["peak_bytes"] / GIB
        print(
            f"{experiment.label}: predicted {plan.total_gib:.3f} GiB, measured "
            f"{peak:.3f}, ratio {ratio:.3f}, {figures['step_seconds']:.2f} s a step",
            flush=True,
        )
    return run | {"seconds": time.perf_counter() - begun}


def _try_rooms(
    experiment: CardExperiment, plan: MemoryEstimate, device: str, **tests: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured, and remarks: the room it was held to, a failure in words."""
    remarks: dict[str, Any] = {}
    rooms = [gpu_gib("T4") * GIB, None] if experiment.way == "T4" else [None]
    for room in rooms:
        try:
            figures = measure_case(experiment, plan, device, room=room, **tests)
        except Exception as error:
            print(f"{experiment.label}\n{traceback.format_exc()}", flush=True)
            words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if not (room and _is_memory(error)):
                return {}, remarks | {"failed": words}
            remarks["did_not_fit"] = words
        else:
            return figures, remarks | {"held_to_bytes": room}
    return {}, remarks


def _is_memory(error: BaseException | None) -> bool:
    while error is not None:
        if "memory" in f"{type(error).__name__} {error}".lower():
            return True
        error = error.__cause__
    return False
