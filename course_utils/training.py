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
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils import heap
from course_utils.packed_batches import shared_beginning
from course_utils.runtime import Profile
from course_utils.training_memory import plan_settings, use_memory_advice
from course_utils.training_speed import (
    completion_loss,
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
