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
from typing import Any

from course_utils.experiment_card_setup import (
    CardExperiment,
    card_records,
    make_card_model,
    plan_of,
)
from course_utils.formatting import CompletionCollator
from course_utils.memory import GIB, MemoryEstimate, gpu_gib, measure_memory
from course_utils.models import load_tokenizer, release
from course_utils.runtime import Profile, set_seed
from course_utils.training import (
    plan_settings,
    prepare_trainer,
    sft_config,
    training_arguments,
)

__all__ = ["CardExperiment", "NoCard", "measure_case", "run_card"]


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
    kernels = [SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
    has_card = torch.cuda.is_available()
    if has_card and room:
        whole = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, room / whole))
    try:
        with sdpa_kernel(kernels):
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
        getattr(torch._C, "_cuda_clearCublasWorkspaces", lambda: None)()
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
        experiment, plan: the case and its prediction.
        device: `"cuda"`, or `"cpu"` for tests.
        room: bytes that PyTorch may take of the card, in the way of a T4.
        config, dtype: for tests: another configuration, another dtype to compute in.

    Returns:
        `loss` of each step; `peak_bytes` and `kept_bytes` (what is alive between
        steps) of the last; `requested_bytes`, the peak without the allocator's
        rounding; `workspace_bytes` of the library that multiplies matrices;
        `reserved_bytes`, the most that PyTorch took of the card;
        `step_seconds`; `steps`, the figures of each; `scale` of the gradient scaler.
    """
    import datasets
    import torch
    from transformers import Trainer
    from trl import SFTTrainer

    from course_utils.experiment_costs import EveryStep
    from course_utils.training_callbacks import PlainProgress

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
            tokenizer = load_tokenizer(None)
            vocab = model.config.vocab_size
            records = card_records(experiment, tokenizer, vocab)
            kinds = {
                "chunked": (SFTTrainer, sft_config),
                "logits": (Trainer, training_arguments),
            }
            make, arguments = kinds[experiment.loss]
            trainer = make(
                model=model,
                args=arguments(
                    profile,
                    folder,
                    max_steps=experiment.steps,
                    learning_rate=experiment.learning_rate,
                    **plan_settings(plan, device=device),
                ),
                train_dataset=datasets.Dataset.from_list(records),
                data_collator=CompletionCollator(tokenizer),
                processing_class=tokenizer,
            )
            prepare_trainer(trainer)
            trainer.pop_callback(PlainProgress)
            each = EveryStep(kind)
            trainer.add_callback(each)
            trainer.train()
        log = [e["loss"] for e in trainer.state.log_history if "loss" in e]
        scaler = getattr(trainer.accelerator, "scaler", None)
        last = each.steps[-1]
        return {
            "loss": log,
            "before_bytes": before,
            "peak_bytes": last["peak_bytes"] - before,
            "peak_of_all_bytes": max(s["peak_bytes"] for s in each.steps) - before,
            "kept_bytes": last["start_bytes"] - before,
            "reserved_bytes": max(s["reserved_bytes"] for s in each.steps),
            "step_seconds": last["seconds"],
            "build_seconds": built,
            "steps": each.steps,
            "requested_bytes": last.get("requested_bytes"),
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


def run_card(experiment: CardExperiment, device: str = "cuda", **tests: Any) -> dict:
    """Predict and measure one case; a failure is recorded in words.

    In the way of a T4 the card is first held to the T4's room; a case that does not
    fit is measured again without, and says so.

    Args:
        experiment: the case.
        device, tests: for tests, as in `measure_case`.

    Returns:
        A run in the schema of `course_utils.records`.

    Raises:
        NoCard: there is none.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise NoCard("this is measured on a CUDA card, and there is none here")
    # As large as on any card but Hopper's, whose own work space is 32 MiB
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
    begun, plan = time.perf_counter(), plan_of(experiment)
    kept = plan.static - plan.static_parts["gradients"]
    measured: dict[str, Any] = {
        "predicted_bytes": plan.total,
        "predicted_parts": plan.parts,
        "predicted_kept_bytes": kept,
        "moment": plan.moment,
    }
    found: dict[str, Any] = {}
    rooms = [gpu_gib("T4") * GIB, None] if experiment.way == "T4" else [None]
    for room in rooms:
        try:
            found = measure_case(experiment, plan, device, room=room, **tests)
            measured["held_to_bytes"] = room
            break
        except Exception as error:
            print(f"{experiment.label}\n{traceback.format_exc()}", flush=True)
            words = f"{type(error).__name__}: {error}".splitlines()[0][:300]
            if room and _is_memory(error):
                measured["did_not_fit"] = words
                continue
            measured["failed"] = words
            break
    trained, loss = found.pop("trained", plan.trainable), found.pop("loss", [])
    measured |= found
    if found:
        share = measured["predicted_bytes"] / measured["peak_bytes"]
        print(
            f"{experiment.label}: predicted {plan.total_gib:.3f} GiB, measured "
            f"{measured['peak_bytes'] / GIB:.3f}, ratio {share:.3f}, "
            f"{measured['step_seconds']:.2f} s a step",
            flush=True,
        )
    return {
        "label": experiment.label,
        "settings": experiment.settings(),
        "seed": experiment.seed,
        "loss": loss,
        "metrics": [*MEASURED] if found else [],
        "trainable_parameters": trained,
        "measured": measured,
        "seconds": time.perf_counter() - begun,
    }


def _is_memory(error: BaseException | None) -> bool:
    while error is not None:
        if "memory" in f"{type(error).__name__} {error}".lower():
            return True
        error = error.__cause__
    return False
