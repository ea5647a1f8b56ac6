"""When memory is short: say before, or after, which setting to lower and to what.

`prepare_trainer` adds this. The numbers are the planner's (`course_utils.memory`), the
advice is trainer settings that can be pasted.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

from course_utils.heap import give_back
from course_utils.memory import GIB, MemoryEstimate, estimate_memory
from course_utils.memory_answer import unfused

# transformers' names of optimizers -> the planner's
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "adamw_8bit": "adamw_8bit",
    "paged_adamw": "paged_adamw",
    "paged_adamw_32bit": "paged_adamw",
    "paged_adamw_8bit": "paged_adamw_8bit",
    "sgd": "sgd",
}


class OutOfMemory(RuntimeError):
    """Memory ran out, or would; the message says which setting to lower, to what."""


def plan_settings(
    plan: MemoryEstimate, *, device: str, examples: int | None = None
) -> dict[str, Any]:
    """The trainer settings that a memory plan stands for.

    Args:
        plan: from `memory.t4_plan`, `memory.estimate_memory` or `cheapest_change`.
        device: `"cuda"`, `"cpu"` or `"mps"`. On CUDA 8-bit AdamW is the paged one,
            which moves its state to the host rather than fail.
        examples: examples that each optimiser step shall see in all, at least; None
            takes the plan's batch.

    Returns:
        Keywords for `sft_config` and `training_arguments`.

    >>> from course_utils.memory import t4_plan
    >>> plan = t4_plan("llama-3.2-1b", "lora", batch_size=2, sequence_length=512)
    >>> plan_settings(plan, device="cuda", examples=16)["gradient_accumulation_steps"]
    8
    """
    request = plan.request
    fused = "adamw_torch" if device == "mps" else "adamw_torch_fused"
    eight = "paged_adamw_8bit" if device == "cuda" else "adamw_bnb_8bit"
    names = {"adamw": fused, "adamw_8bit": eight, "sgd_momentum": "sgd"}
    return {
        "per_device_train_batch_size": request.batch_size,
        "gradient_accumulation_steps": math.ceil(
            (examples or request.batch_size) / request.batch_size
        ),
        "gradient_checkpointing": request.gradient_checkpointing,
        "optim": names.get(request.optimizer, request.optimizer),
    }


def trainer_estimate(trainer: Any) -> MemoryEstimate | None:
    """Predict the peak of a built trainer's steps; None where there is no formula.

    Args:
        trainer: with a data set that has `input_ids`; its longest record counts.
    """
    from course_utils.training_callbacks import QuickAttention

    args, model = trainer.args, trainer.model
    data = trainer.train_dataset
    if "input_ids" not in (getattr(data, "column_names", None) or ()):
        return None
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    configs = list(getattr(model, "peft_config", {}).values())
    four_bit = getattr(base.config, "quantization_config", None)
    if four_bit is not None and not getattr(four_bit, "load_in_4bit", False):
        return None
    stored = (p for p in base.parameters() if p.is_floating_point())
    frozen = [p for p in stored if configs and not p.requires_grad] or [
        p for p in base.parameters() if p.is_floating_point()
    ]
    half = "float16" if args.fp16 else "bfloat16" if args.bf16 else None
    chunked = "compute_loss" in vars(trainer) or _is_sft(trainer)
    callbacks = trainer.callback_handler.callbacks
    quick = any(isinstance(callback, QuickAttention) for callback in callbacks)
    method = configs[0].peft_type.value.lower() if configs else "full"
    alone = args.per_device_train_batch_size == 1 and args.fp16
    attention = "math" if alone and unfused(base.config, method) else "sdpa"
    try:
        return estimate_memory(
            base.config,
            configs[0] if configs else "full",
            batch_size=args.per_device_train_batch_size,
            sequence_length=max(map(len, data["input_ids"])),
            dtype=frozen[0].dtype,
            autocast=half,
            optimizer=OPTIMIZERS[str(getattr(args.optim, "value", args.optim))],
            gradient_checkpointing=args.gradient_checkpointing,
            attention="eager" if quick else attention,
            loss="chunked" if chunked else "logits",
            quantization=four_bit.bnb_4bit_quant_type if four_bit else None,
            gradient_accumulation=args.gradient_accumulation_steps > 1,
        )
    except (ValueError, KeyError):
        return None


def free_bytes(device: str) -> int | None:
    """Bytes that this process may still take on a device; None if nothing says it."""
    if device == "cuda":
        import torch

        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    try:
        import psutil
    except ImportError:
        return None
    give_back()  # what the process has freed and kept is free for it, too
    return psutil.virtual_memory().available


def advice(trainer: Any, plan: MemoryEstimate | None, room: int | None) -> str:
    """Say which settings to lower, and to what.

    Args:
        trainer: the trainer.
        plan: what it is predicted to need; None where there is no formula.
        room: bytes that the whole run may take, weights included; None if unknown.
    """
    args, device = trainer.args, trainer.args.device.type
    batch, steps = args.per_device_train_batch_size, args.gradient_accumulation_steps
    examples = batch * steps
    if plan is None or room is None:
        if batch == 1:
            return "Take a smaller model or shorter records: the batch is 1 already."
        smaller = max(b for b in range(1, batch // 2 + 1) if examples % b == 0)
        new = f"per_device_train_batch_size={smaller}"
        more = f"gradient_accumulation_steps={examples // smaller}"
        return f"Set {new}, {more}: the same examples a step, fewer activations."
    need = f"The plan for this run is {_size(plan.total)} at its peak"
    if plan.total <= room:
        room = int(0.8 * plan.total)
        need += ", which should have fitted: restart the kernel, and close what else "
        need += "holds memory. If it fails again, aim for 20 % less"
    else:
        need += f", and there is room for {_size(room)}"
    change = plan.cheapest_change(room / GIB)
    if change is None:
        return f"{need}. No change of settings is enough: take a smaller model."
    words, smaller = change
    now = {
        "per_device_train_batch_size": batch,
        "gradient_accumulation_steps": steps,
        "gradient_checkpointing": args.gradient_checkpointing,
        "optim": OPTIMIZERS.get(str(getattr(args.optim, "value", args.optim))),
    }
    new = plan_settings(smaller, device=device, examples=examples)
    if smaller.request.optimizer == now["optim"]:
        del new["optim"]
    todo = [f"{k}={v!r}" for k, v in new.items() if v != now.get(k)]
    if smaller.request.quantization != plan.request.quantization:
        todo.append('load_model(quantization="nf4") under the adapter')
    if smaller.request.loss != plan.request.loss:
        todo.append("SFTTrainer, whose loss never holds all logits")
    return (
        f"{need}. The cheapest change is {words}: set {', '.join(todo)} "
        f"(then {_size(smaller.total)})."
    )


def _held_bytes(trainer: Any) -> int:
    """Bytes of a run that are there already: weights, gradients, optimiser state."""
    tensors = [*trainer.model.parameters()]
    tensors += [p.grad for p in tensors if p.grad is not None]
    for state in getattr(trainer.optimizer, "state", {}).values():
        tensors += [value for value in state.values() if hasattr(value, "element_size")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def use_memory_advice(trainer: Any) -> None:
    """Let a trainer that runs out of memory, or is about to, say what to lower."""
    train, evaluate = trainer.train, trainer.evaluate
    own_optimizer = trainer.optimizer is not None  # of which the plan knows nothing

    def advised_train(*args: Any, **options: Any) -> Any:
        plan, device = trainer_estimate(trainer), trainer.args.device.type
        free = free_bytes(device)
        room = None if free is None else free + _held_bytes(trainer)
        if plan is not None and room is not None:
            if plan.static > room and not own_optimizer:
                raise OutOfMemory(
                    f"there is not enough memory for this run. "
                    f"{advice(trainer, plan, room)}"
                )
            if plan.total > room:
                print(f"Memory may run out. {advice(trainer, plan, room)}")
        return _advised(train, lambda: advice(trainer, plan, room), args, options)

    def advised_evaluate(*args: Any, **options: Any) -> Any:
        size = trainer.args.per_device_eval_batch_size
        words = f"Set per_device_eval_batch_size={max(1, size // 2)} (now {size})."
        return _advised(evaluate, lambda: words, args, options)

    trainer.train, trainer.evaluate = advised_train, advised_evaluate


def _advised(run: Callable, words: Callable[[], str], args: Any, options: Any) -> Any:
    try:
        return run(*args, **options)
    except (RuntimeError, MemoryError) as error:
        if isinstance(error, OutOfMemory) or not _is_memory(error):
            raise
        raise OutOfMemory(f"memory ran out. {words()}") from error


def _is_memory(error: Exception) -> bool:
    import torch

    kinds = (torch.OutOfMemoryError, MemoryError)
    words = ("can't allocate memory", "not enough memory", "out of memory")
    return isinstance(error, kinds) or any(word in str(error) for word in words)


def _is_sft(trainer: Any) -> bool:
    return any(kind.__name__ == "SFTTrainer" for kind in type(trainer).__mro__)


def _size(size: int) -> str:
    if size >= GIB / 10:
        return f"{size / GIB:.1f} GiB"
    return f"{size / 2**20:.1f} MiB"
