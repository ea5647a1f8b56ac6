"""What the field's trainers lack: plain progress, dtype checks, honest checkpoints.

`course_utils.training.prepare_trainer` adds them; import this module inside functions
only, since it needs transformers at its top.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from typing import Any

from transformers import EarlyStoppingCallback, TrainerCallback, TrainerState
from transformers.trainer_utils import TrainOutput

from course_utils import runtime as heap
from course_utils.runtime import replace_file
from course_utils.training_speed import refuse_virtual_tokens, set_attention

MANIFEST = "complete.json"


class PlainProgress(TrainerCallback):
    """One short line every `every` steps: step, loss, validation loss, time left."""

    def __init__(self, every: int | None = None) -> None:
        self.every = every
        self.loss: float | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first, self.start = state.global_step, time.perf_counter()
        self.due = self.first + 1

    def on_log(
        self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any
    ) -> None:
        logs = logs or {}
        if "eval_loss" in logs:
            print(f"step {state.global_step} · validation loss {logs['eval_loss']:.3f}")
        if "loss" not in logs:
            return
        step, last = state.global_step, state.max_steps
        every = self.every or max(1, round(last / 8))
        if step < self.due and step not in (1, last):
            return
        self.due = (step // every + 1) * every
        gone = time.perf_counter() - self.start
        left = gone / max(1, step - self.first) * (last - step)
        ending = f"{left:.0f} s left" if step < last else f"{gone:.0f} s in all"
        print(f"step {step} of {last} · loss {logs['loss']:.3f} · {ending}", flush=True)


class CheckBeforeTraining(TrainerCallback):
    """Refuse, before step 1, what would fail or go wrong without a word later."""

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **more: Any
    ) -> None:
        check_trainable(model, fp16=args.fp16)
        check_prompt_methods(model, args.gradient_checkpointing)
        data = getattr(more.get("train_dataloader"), "dataset", None)
        if "position_ids" in (getattr(data, "column_names", None) or ()):
            refuse_virtual_tokens(model)


def check_trainable(model: Any, *, fp16: bool) -> None:
    """Raise unless there is something to train and all of it is float32.

    Raises:
        ValueError: says which parameter, why, and what to do.
    """
    import torch

    found = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not found:
        raise ValueError("nothing to train: every parameter has requires_grad=False.")
    for name, parameter in found:
        if not parameter.is_floating_point() or parameter.dtype == torch.float32:
            continue
        dtype = str(parameter.dtype).removeprefix("torch.")
        reason = (
            "the fp16 gradient scaler refuses it at the first step"
            if fp16
            else "its small updates would be rounded away"
        )
        raise ValueError(
            f"{name} is trainable in {dtype}: {reason}. Call "
            "fix_trainable_dtype(trainer), or load the model with dtype=torch.float32 "
            "for full fine-tuning."
        )


def check_prompt_methods(model: Any, gradient_checkpointing: bool) -> None:
    """Raise if prefix tuning meets gradient checkpointing.

    Raises:
        ValueError: prefixes are keys and values in a cache, which checkpointing drops;
            the library's own error is a mismatch of shapes.
    """
    configs = getattr(model, "peft_config", {}).values()
    names = {str(getattr(c.peft_type, "value", c.peft_type)) for c in configs}
    kinds = names & {"PREFIX_TUNING", "CARTRIDGE"}
    on = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if kinds and (gradient_checkpointing or on):
        raise ValueError(
            f"{kinds.pop()} does not work with gradient checkpointing: pass "
            "gradient_checkpointing=False to the trainer's arguments, and call "
            "model.get_base_model().gradient_checkpointing_disable()."
        )


class QuickAttention(TrainerCallback):
    """Plain attention while training; afterwards the model's own."""

    had: str | None = None

    def on_train_begin(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        self.had = set_attention(model, "eager")

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        if self.had is not None:
            set_attention(model, self.had)
            self.had = None


class BoundedMemory(TrainerCallback):
    """Gives back what glibc keeps, where the process holds half more than at first.

    The first three steps say what is usual: gradients and optimiser state are there.
    """

    most = 1.5  # times the usual

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.usual, self.settled = 0, state.global_step + 3

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        held = heap.resident_bytes()
        if held is None:
            return
        if state.global_step <= self.settled:
            self.usual = max(self.usual, held)
        elif held > self.most * self.usual:
            heap.give_back_memory()


class ReadyToGenerate(TrainerCallback):
    """After training: evaluation mode, cache on, checkpointing and autocast off."""

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_end(
        self, args: Any, state: Any, control: Any, model: Any = None, **_: Any
    ) -> None:
        base = model.get_base_model() if hasattr(model, "get_base_model") else model
        base.config.use_cache = True
        if getattr(base, "generation_config", None) is not None:
            base.generation_config.use_cache = True
        if args.gradient_checkpointing:
            base.gradient_checkpointing_disable()
        own = model.__dict__.get("_original_forward")
        self.trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        if own is not None:  # Accelerate unwraps too far: to below TRL's own forward
            model.forward = own
        model._is_accelerate_prepared = False  # or another training has no autocast
        model.eval()


def ready_after_interruption(trainer: Any) -> None:
    """Let a run that ends by an error or a key leave a model like one that finished.

    Transformers calls `on_train_end` only where a run comes to its end; without it the
    model would keep plain attention, the training mode and autocast.
    """
    train = trainer.train

    def train_and_finish(*args: Any, **options: Any) -> Any:
        try:
            return train(*args, **options)
        except BaseException:
            for callback in trainer.callback_handler.callbacks:
                if isinstance(callback, QuickAttention | ReadyToGenerate):
                    now = (trainer.args, trainer.state, trainer.control)
                    callback.on_train_end(*now, model=trainer.model)
            raise

    trainer.train = train_and_finish


class MarkCheckpoints(TrainerCallback):
    """Write a manifest as the last file of each checkpoint: names and sizes.

    A checkpoint without it, or that differs from it, was being written (or deleted)
    when the process ended, or is not from this course.
    """

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        draft = folder / f".{MANIFEST}.tmp"
        draft.write_text(json.dumps({"step": state.global_step, "files": files}))
        replace_file(draft, folder / MANIFEST)


def _stopped_early(trainer: Any, state: TrainerState) -> bool:
    """Whether the trainer's early stopping had lost its patience; more goes on."""
    name = EarlyStoppingCallback.__name__
    found = state.stateful_callbacks.get(name, {})
    kept = found[0] if isinstance(found, list) else found
    counter = kept.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return any(
        counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


def keep_finished_runs(trainer: Any) -> None:
    """Let `train` load a finished run's checkpoint instead of training on.

    Transformers does one more step when it resumes from the last checkpoint of a run
    that was complete, and so changes the weights; after an early stop, whose patience
    it forgets, many more. Where the run was to end with its best weights, those are
    loaded.
    """
    train = trainer.train

    def train_what_is_left(resume_from_checkpoint: Any = None, **options: Any) -> Any:
        if not isinstance(resume_from_checkpoint, str | os.PathLike):
            return train(resume_from_checkpoint=resume_from_checkpoint, **options)
        folder, args = Path(resume_from_checkpoint), trainer.args
        state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
        done = state.epoch is not None and state.epoch >= args.num_train_epochs
        if args.max_steps > 0:
            done = state.global_step >= args.max_steps
        if not (done or _stopped_early(trainer, state)):
            return train(resume_from_checkpoint=str(folder), **options)
        best = args.load_best_model_at_end and state.best_model_checkpoint
        wanted = best if best and Path(best).is_dir() else folder
        trainer._load_from_checkpoint(str(wanted))
        trainer.state = state
        trainer.model.eval()
        print(f"nothing left to train: {folder.name} is the end of this run")
        losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
        mean = sum(losses) / max(1, len(losses))
        return TrainOutput(state.global_step, mean, {})

    trainer.train = train_what_is_left


class PeakOfStep(TrainerCallback):
    """Measures the most that tensors take in the second step.

    In the first there is no optimizer state yet; in the second weights, gradients,
    state and activations are all there.

    Attributes:
        peak_bytes: of the step, once it has ended.
        seconds: what the measuring itself took.
    """

    STEP = 2

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, None
        self._meter: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from course_utils.memory import measure_memory

        if state.global_step == self.STEP - 1:
            clock = time.perf_counter()
            device = args.device.type
            on_card = device in ("cuda", "mps")
            self._meter = measure_memory(device if on_card else "allocator")
            self._used = self._meter.__enter__()
            self.seconds += time.perf_counter() - clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._meter is not None:
            clock = time.perf_counter()
            self._meter.__exit__(None, None, None)
            self.peak_bytes, self._meter = self._used.peak_bytes, None
            self.seconds += time.perf_counter() - clock
