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

import torch
from transformers import TrainerCallback

from course_utils import memory, models, training
from course_utils.data import load_examples
from course_utils.formatting import CompletionCollator, tokenize_dataset
from course_utils.parameters import peft_config
from course_utils.runtime import Profile, set_seed
from course_utils.sweep.experiment import new_run
from maintenance.store import compute_metrics

Plan = memory.MemoryEstimate
BUILT_IN = "smollm2-135m"
SHORTER = 5  # tokens that one record of a batch lacks, so that there is padding


@dataclass(frozen=True)
class CardExperiment:
    """One case, described completely; model and method are those of `estimate_memory`.

    All tokens are learned. A batch of more than one has padding.
    """

    label: str
    model: str
    method: str
    batch_size: int
    sequence_length: int
    way: str = "T4"  # or "own": bfloat16, and every kernel of the card that is there
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    double_quant: bool = True
    loss: str = "chunked"  # by TRL's trainer; or "logits", by transformers'
    options: dict[str, Any] = field(default_factory=dict)  # PEFT's fields
    steps: int = 4  # the last one counts: the gradient scaler may skip the first
    learning_rate: float = 1e-4
    seed: int = 0
    data: str = "instructions"  # where the tokens are from

    def settings(self) -> dict[str, Any]:
        values = asdict(self)
        del values["label"], values["seed"]
        if self.loss == "chunked":  # the first records know of no other
            del values["loss"]
        return values


def plan_of(experiment: CardExperiment) -> Plan:
    """What a reader predicts before the run: the closed form."""
    names = ("batch_size", "sequence_length", "gradient_checkpointing", "optimizer")
    names += ("double_quant", "loss")
    shared = {name: getattr(experiment, name) for name in names} | experiment.options
    model, method = experiment.model, experiment.method
    if experiment.way == "T4":
        return memory.t4_plan(model, method, **shared)
    shared |= {"dtype": "float32" if method == "full" else "bfloat16"}
    return memory.estimate_memory(model, method, autocast="bfloat16", **shared)


def random_model(
    config: Any, *, dtype: Any, device: str, quantization: Any = None
) -> Any:
    """A causal model of a configuration with random weights, made on the device.

    One matrix after the other is made and, given a `BitsAndBytesConfig` for 4 bits,
    packed: the whole never exists in 16 bits.
    """
    from transformers import AutoModelForCausalLM
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    options = {"dtype": dtype, "attn_implementation": "sdpa"}
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, **options)
    if quantization is not None:
        replace_with_bnb_linear(model, ["lm_head"], quantization)
        model.is_loaded_in_4bit = True
        model.config.quantization_config = quantization
        models.keep_4bit_weights_in_place(model)
    made: dict[Any, Any] = {None: None}  # tied weights stay tied
    for module in model.modules():
        for name, old in module._parameters.items():
            if old not in made:
                made[old] = _random_parameter(module, old, dtype, device)
            module._parameters[name] = made[old]
    with torch.device(device):
        model.model.rotary_emb = type(model.model.rotary_emb)(config=model.config)
    return model.eval()


def _random_parameter(module: Any, old: Any, dtype: Any, device: str) -> Any:
    """A parameter of the shape of `old`, which has no values; packed if that is."""
    from bitsandbytes.nn import Params4bit

    values = torch.zeros(old.shape, dtype=dtype, device=device)
    if old.dim() > 1:
        values.normal_(std=0.02)
    elif old is module.weight:
        values.fill_(1)  # a norm
    if not isinstance(old, Params4bit):
        return torch.nn.Parameter(values)
    options = {"compress_statistics": old.compress_statistics, "module": module}
    options |= {"requires_grad": False, "quant_type": old.quant_type}
    return Params4bit(values, **options).to(device)


def make_card_model(
    experiment: CardExperiment, plan: Plan, device: str, config: Any = None
) -> Any:
    """The model of a case as the course trains it, with its adapter.

    For tests a configuration may stand for the model's own.
    """
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
        model = models.load_model(**stored)
    else:
        config = config or memory.model_config(experiment.model)
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
    parts = [tokens[place : place + T] for place in range(0, B * T, T)]
    if B > 1:
        parts[-1] = parts[-1][:-SHORTER]
    return [
        {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}
        for ids in parts
    ]


# --- the measured run --------------------------------------------------------------


class NoCard(RuntimeError):
    """A case is measured on a CUDA card, and there is none here."""


MEASURED = ("memory_ratio", "kept_ratio", "predicted_gib", "measured_gib", "step_s")


@contextlib.contextmanager
def _as_on_a_t4(way: str, room: float | None) -> Iterator[None]:
    """Attention kernels of a T4, and `room` bytes of the card; nothing for `"own"`."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    if way != "T4":
        yield
        return
    hold_to = torch.cuda.set_per_process_memory_fraction
    if room and torch.cuda.is_available():
        hold_to(min(1.0, room / torch.cuda.get_device_properties(0).total_memory))
    try:
        with sdpa_kernel([SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]):
            yield
    finally:
        if torch.cuda.is_available():
            hold_to(1.0)


def _start_of_case() -> None:
    """Nothing of an earlier case is alive, the library's work space included."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        _workspace_bytes()
        torch.cuda.empty_cache()


def _workspace_bytes() -> int:
    """What cuBLAS holds of the card; it is given back."""
    before = torch.cuda.memory_allocated()
    getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
    return before - torch.cuda.memory_allocated()


def measure_case(
    experiment: CardExperiment,
    plan: Plan,
    device: str = "cuda",
    *,
    room: float | None = None,
    config: Any = None,
    dtype: Any = None,
) -> dict[str, Any]:
    """Build the model, take the steps, and return what was measured.

    PyTorch may take `room` bytes of the card in the way of a T4. For tests there are
    `"cpu"`, another configuration, and another dtype to compute in.
    """
    kind = "cuda" if device == "cuda" else "allocator"
    _start_of_case()
    with memory.measure_memory(kind) as now:
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
            each = EveryStep(kind)
            trainer.add_callback(each)
            trainer.train()
        scaler = getattr(trainer.accelerator, "scaler", None)
        return _figures(each.steps, before) | {
            "loss": training.LossHistory.from_trainer(trainer).loss,
            "build_seconds": built,
            "workspace_bytes": _workspace_bytes() if device == "cuda" else 0,
            "scale": scaler.get_scale() if scaler is not None else None,
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
        }
    finally:
        if trainer is not None:
            trainer.optimizer = trainer.lr_scheduler = None
        if model is not None:
            models.release(model)
        model = trainer = None
        _start_of_case()


class EveryStep(TrainerCallback):
    """Measures each step of a training, with a kind of `memory.measure_memory`."""

    def __init__(self, kind: str) -> None:
        self.kind, self.steps = kind, []

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter = memory.measure_memory(self.kind)
        self._used = self._meter.__enter__()
        self._clock = time.perf_counter()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self._meter.__exit__(None, None, None)
        names = ("start_bytes", "peak_bytes", "reserved_bytes")
        step = {name: getattr(self._used, name) for name in names}
        if self._used.kind == "cuda":
            peak = torch.cuda.memory_stats().get("requested_bytes.all.peak")
            step["requested_bytes"] = peak
        self.steps.append(step | {"seconds": time.perf_counter() - self._clock})


def _make_trainer(
    experiment: CardExperiment, plan: Plan, model: Any, profile: Profile, folder: str
) -> Any:
    import datasets
    from transformers import Trainer
    from trl import SFTTrainer

    from course_utils.training_callbacks import PlainProgress

    tokenizer = models.load_tokenizer(None)
    records = card_records(experiment, tokenizer, model.config.vocab_size)
    chunked = experiment.loss == "chunked"
    settings = training.plan_settings(plan, device=profile.device)
    settings |= {"max_steps": experiment.steps}
    settings |= {"learning_rate": experiment.learning_rate}
    arguments = training.sft_config if chunked else training.training_arguments
    trainer = (SFTTrainer if chunked else Trainer)(
        model=model,
        args=arguments(profile, folder, **settings),
        train_dataset=datasets.Dataset.from_list(records),
        data_collator=CompletionCollator(tokenizer),
        processing_class=tokenizer,
    )
    training.prepare_trainer(trainer)
    trainer.pop_callback(PlainProgress)
    return trainer


def _figures(steps: list[dict[str, Any]], before: int) -> dict[str, Any]:
    """Figures of the last step, in bytes above those that were alive `before`.

    `kept_bytes` are alive between steps, `requested_bytes` the peak without the
    allocator's rounding, `reserved_bytes` the most that PyTorch took of the card.
    """
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
    fit is measured again without, and says so.
    """
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
        print(f"{experiment.label}: {run['metrics']}", flush=True)
    return run | {"seconds": time.perf_counter() - begun}


def _try_rooms(
    experiment: CardExperiment, plan: Plan, device: str, **tests: Any
) -> tuple[dict[str, Any], dict[str, Any]]:
    """What was measured, and remarks: the room it was held to, a failure in words."""
    remarks: dict[str, Any] = {}
    t4_room = memory.gpu_gib("T4") * memory.GIB
    for room in [t4_room, None] if experiment.way == "T4" else [None]:
        try:
            figures = measure_case(experiment, plan, device, room=room, **tests)
        except Exception as error:
            print(f"{experiment.label}\n{traceback.format_exc()}", flush=True)
            words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if not (room and "memory" in words.lower()):
                return {}, remarks | {"failed": words}
            remarks["did_not_fit"] = words
        else:
            return figures, remarks | {"held_to_bytes": room}
    return {}, remarks
