"""Train on any profile: arguments, plain progress, loss history, resume after a kill.

A lesson builds the library's own trainer in full view, then makes it ready:

    trainer = SFTTrainer(
        model=model,
        args=sft_config(profile, build_folder() / "02", max_steps=60),
        train_dataset=tokenize_dataset(train, tokenizer),
        data_collator=CompletionCollator(tokenizer),
        processing_class=tokenizer,
    )
    prepare_trainer(trainer)
    trainer.train()
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils import runtime as heap
from course_utils.memory import estimate_memory
from course_utils.memory.estimate import MemoryEstimate, unfused
from course_utils.memory.formula import GIB
from course_utils.runtime import Profile, give_back_memory
from course_utils.training_speed import (
    completion_loss,
    shared_beginning,
    use_completion_loss,
    use_seeded_batches,
)

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import SFTConfig

__all__ = [
    "LossHistory",
    "completion_loss",
    "find_checkpoint",
    "fix_trainable_dtype",
    "plan_settings",
    "prepare_trainer",
    "sft_config",
    "shared_beginning",
    "training_arguments",
]

# --- training_memory ---
# When memory is short: say before, or after, which setting to lower and to what.
#
# `prepare_trainer` adds this. The numbers are the planner's (`course_utils.memory`),
# the
# advice is trainer settings that can be pasted.

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
    give_back_memory()  # what the process has freed and kept is free for it, too
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


def _defaults(profile: Profile, output_dir: str | os.PathLike) -> dict[str, Any]:
    """What both trainers are told, by profile; a lesson's own settings come after."""
    dtype = str(profile.dtype).removeprefix("torch.")
    return {
        "output_dir": str(output_dir),
        "use_cpu": profile.device == "cpu",
        # The profile's dtype is for computing; trainable parameters stay in float32.
        "bf16": dtype == "bfloat16",
        "fp16": dtype == "float16",
        "per_device_train_batch_size": 16,
        "per_device_eval_batch_size": 16,
        "train_sampling_strategy": "random",
        "optim": "adamw_torch_fused" if profile.device != "mps" else "adamw_torch",
        "lr_scheduler_type": "linear",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "save_strategy": "no",
        "save_total_limit": 2,
        "report_to": "none",
        "disable_tqdm": True,
        "remove_unused_columns": False,
        "dataloader_pin_memory": profile.device == "cuda",
        "include_num_input_tokens_seen": "non_padding",
        "seed": profile.seed,
        "data_seed": profile.seed,
    }


def _checked(settings: dict[str, Any]) -> dict[str, Any]:
    """Refuse at once what the libraries would refuse late, or not at all."""
    rate = settings.get("learning_rate", 1.0)
    if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
        raise ValueError(f"learning_rate must be a number, 0 or more, not {rate!r}")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in (*sizes, "gradient_accumulation_steps"):
        size = settings.get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise ValueError(
                f"{name} must be a whole number of at least 1, not {size!r}"
            )
    return settings


def training_arguments(
    profile: Profile, output_dir: str | os.PathLike, **settings: Any
) -> TrainingArguments:
    """Arguments for `transformers.Trainer` that suit a profile.

    bfloat16 autocast where the profile computes in bfloat16, float16 with a gradient
    scaler on a T4, neither in float32; examples in random order
    (`train_sampling_strategy="group_by_length"` puts similar lengths together); every
    step logged; no checkpoints, reports or progress bars.

    Args:
        profile: from `runtime.get_profile()`.
        output_dir: folder for checkpoints.
        settings: fields of `TrainingArguments`; they win over the defaults.

    Raises:
        ValueError: a learning rate or batch size that cannot train.
        TypeError: a setting that there is not.
    """
    from transformers import TrainingArguments

    return TrainingArguments(**_defaults(profile, output_dir) | _checked(settings))


def sft_config(
    profile: Profile, output_dir: str | os.PathLike, **settings: Any
) -> SFTConfig:
    """Arguments for `trl.SFTTrainer` that suit a profile.

    As `training_arguments`, and without gradient checkpointing, which TRL switches on
    by default: on a small model it costs time for memory that is not short. Records
    keep their length (`max_length=None`); `tokenize_dataset` has cut them.

    Args:
        profile, output_dir: as for `training_arguments`.
        settings: fields of `SFTConfig`; they win over the defaults.

    Raises:
        ValueError, TypeError: as for `training_arguments`.
    """
    from trl import SFTConfig

    plain = {"gradient_checkpointing": False, "max_length": None}
    settings = _defaults(profile, output_dir) | plain | _checked(settings)
    newer = "activation_checkpointing"  # its name since transformers 5.23
    if newer in SFTConfig.__dataclass_fields__:
        settings.setdefault(newer, settings.pop("gradient_checkpointing"))
    return SFTConfig(**settings)


def prepare_trainer(
    trainer: Any, *, every: int | None = None, fast: bool = True
) -> None:
    """Make a built `Trainer` or `SFTTrainer` ready for the course.

    Progress in plain lines; trainable parameters in float32; a clear error before step
    1 where training could not work; a model that can generate afterwards, also after
    an interruption; checkpoints that say when they are complete; the batches of a
    resumed run as they would have been; advice where memory runs out. On a CPU, freed
    memory is kept for the next step, within bounds (`course_utils.heap`); with `fast`
    also what `course_utils.training_speed` lists; losses stay the same, within 1e-4 a
    step in float32.

    Args:
        trainer: before `trainer.train()`.
        every: a line of progress every so many steps; None prints about eight.
        fast: False leaves the library's own loss and attention.
    """
    from transformers import PrinterCallback

    from course_utils import training_callbacks as callbacks

    fix_trainable_dtype(trainer)
    trainer.remove_callback(PrinterCallback)
    for callback in (
        callbacks.PlainProgress(every),
        callbacks.CheckBeforeTraining(),
        callbacks.ReadyToGenerate(trainer),
        callbacks.MarkCheckpoints(),
    ):
        trainer.add_callback(callback)
    use_seeded_batches(trainer)
    use_memory_advice(trainer)
    callbacks.keep_finished_runs(trainer)
    callbacks.ready_after_interruption(trainer)
    on_cpu = trainer.args.device.type == "cpu"
    if on_cpu:
        heap.keep_freed_memory()
        trainer.add_callback(callbacks.BoundedMemory())
    if fast and on_cpu:
        use_completion_loss(trainer)
        trainer.add_callback(callbacks.QuickAttention())


def fix_trainable_dtype(trainer: Any) -> int:
    """Cast every trainable parameter to float32, and say how many were not.

    TRL casts the adapters of a quantised model to bfloat16, whatever `fp16` says; a
    T4's gradient scaler then fails at step 1, and small updates are lost anywhere.

    Args:
        trainer: before `trainer.train()`; a model will do too.

    Returns:
        The number of parameter tensors that were cast.
    """
    import torch

    model, cast = trainer, 0
    if not isinstance(trainer, torch.nn.Module):
        model = trainer.model
    for parameter in model.parameters():
        if parameter.requires_grad and parameter.dtype != torch.float32:
            parameter.data = parameter.data.float()
            cast += 1
    return cast


@dataclass(frozen=True)
class LossHistory:
    """What a training logged, as plain tuples ready to draw.

    Attributes:
        steps, loss: the optimiser steps and their training losses, nats a token.
        eval_steps, eval_loss: the same for the validation set.
    """

    steps: tuple[int, ...]
    loss: tuple[float, ...]
    eval_steps: tuple[int, ...] = ()
    eval_loss: tuple[float, ...] = ()

    @classmethod
    def from_trainer(cls, trainer: Any) -> LossHistory:
        """Read a trainer's log; a resumed trainer's holds the steps before, too."""
        return cls.from_log(trainer.state.log_history)

    @classmethod
    def from_log(cls, log: Sequence[Mapping[str, Any]]) -> LossHistory:
        """Read the entries of `trainer.state.log_history`.

        >>> log = [{"step": 1, "loss": 2.5}, {"step": 1, "eval_loss": 2}]
        >>> LossHistory.from_log(log)
        LossHistory(steps=(1,), loss=(2.5,), eval_steps=(1,), eval_loss=(2.0,))
        """

        def read(key: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
            found = [(e["step"], float(e[key])) for e in log if key in e]
            return tuple(s for s, _ in found), tuple(v for _, v in found)

        return cls(*read("loss"), *read("eval_loss"))


def find_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The newest complete checkpoint that this course wrote, to resume from.

    `trainer.train(resume_from_checkpoint=find_checkpoint(folder))` begins anew where
    there is none. A checkpoint counts only if its manifest is there and every file has
    the size the manifest says; one that a kill cut short does not.

    Args:
        output_dir: the `output_dir` of the trainer's arguments.

    Returns:
        Its path, or None.
    """
    folder = Path(output_dir)
    found = []
    for path in folder.glob("checkpoint-*"):
        step = re.fullmatch(r"checkpoint-(\d+)", path.name)
        if step and _is_complete(path, int(step[1])):
            found.append((int(step[1]), str(path)))
    return max(found)[1] if found else None


def _is_complete(checkpoint: Path, step: int) -> bool:
    try:
        manifest = json.loads((checkpoint / "complete.json").read_text())
        files = dict(manifest["files"])
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    return manifest["step"] == step and bool(files) and sizes == files
