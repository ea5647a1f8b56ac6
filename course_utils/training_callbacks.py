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

from course_utils import runtime
from course_utils.formatting import IGNORE
from course_utils.inference import base_model, router_configs
from course_utils.training_speed import refuse_packed, set_attention, virtual_tokens

MANIFEST = "complete.json"
TRAINED_STATE = "trained_state.safetensors"


class PlainProgress(TrainerCallback):
    """One short line every `every` steps: step, loss, validation loss, time left."""

    def __init__(self, every: int | None = None) -> None:
        self.every = every

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.first, self.start = state.global_step, time.perf_counter()
        self.due = self.first + 1

    def on_log(self, args, state, control, logs=None, **_: Any) -> None:
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

    def on_train_begin(self, args, state, control, model=None, **more: Any) -> None:
        _check_trainable(model, fp16=args.fp16)
        _check_prefixes(model, args.gradient_checkpointing)
        loader = more.get("train_dataloader")
        columns = getattr(getattr(loader, "dataset", None), "column_names", None) or ()
        joined = getattr(getattr(loader, "collate_fn", None), "padding_free", False)
        if joined or {"position_ids", "seq_lengths"} & set(columns):  # TRL's, or ours
            refuse_packed(model)


class AllocateRanks(TrainerCallback):
    """Calls AdaLoRA's `update_and_allocate`, which PEFT leaves to others, by the step.

    Its penalty is in the gradient, once a step, and in no loss: PEFT adds it to every
    loss, `Trainer` multiplies it by the accumulation, `SFTTrainer` leaves it out.
    """

    def __init__(self, trainer: Any) -> None:
        self.tuner, self.library = trainer.model.base_model, trainer.compute_loss
        self.name = self.tuner.trainable_adapter_name
        self.config, self.trainer = self.tuner.peft_config[self.name], trainer
        trainer.compute_loss = self.compute_loss

    def compute_loss(self, model: Any, inputs: Any, *args: Any, **options: Any) -> Any:
        weight, self.config.orth_reg_weight = self.config.orth_reg_weight, 0.0
        try:
            loss = self.library(model, inputs, *args, **options)
        finally:
            self.config.orth_reg_weight = weight
        if not model.training:
            return loss
        if options.get("num_items_in_batch") is not None:  # else Trainer divides all
            weight = weight / self.trainer.current_gradient_accumulation_steps
        layers = [m for m in self.tuner.modules() if hasattr(m, "lora_E")]
        rows = [p for m in layers for p in (m.lora_A[self.name], m.lora_B[self.name].T)]
        norms = [(p @ p.T - p.new_ones(len(p)).diag()).norm() for p in rows]
        penalty = weight * sum(norms) / len(norms)
        return loss + penalty - penalty.detach()

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        config, steps = self.config, state.max_steps
        if config.total_step != steps:
            print(f"AdaLoRA's total_step is {steps}, as this run's, not the given one.")
            config.total_step = steps
        if config.tinit + config.tfinal >= steps or config.target_r >= config.init_r:
            needed = f"tinit + tfinal < {steps}, the steps, and target_r < init_r"
            raise ValueError(f"AdaLoRA takes no rank away unless {needed}.")

    def on_optimizer_step(self, args, state, control, **_: Any) -> None:
        self.tuner.update_and_allocate(state.global_step + 1)


def _check_trainable(model: Any, *, fp16: bool) -> None:
    """Raise unless there is something to train and all of it is float32."""
    import torch

    trainable = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    if not trainable:
        raise ValueError("nothing to train: every parameter has requires_grad=False.")
    for name, parameter in trainable:
        if parameter.is_floating_point() and parameter.dtype != torch.float32:
            reason = "its small updates would be rounded away"
            if fp16:
                reason = "the fp16 gradient scaler refuses it at the first step"
            raise ValueError(
                f"{name} is trainable in {parameter.dtype}: {reason}. Call "
                "training_callbacks.fix_trainable_dtype(model), or load the model with "
                "dtype=torch.float32."
            )


def column(data: Any, name: str) -> tuple[Any, Any] | None:
    """All whole numbers in a column of records, and how many each record has.

    Two NumPy arrays; None where there is no such column, or no length.
    """
    import numpy as np
    import pyarrow as pa
    from pyarrow import compute as pc

    names = getattr(data, "column_names", None) or ()
    if name not in names or not hasattr(data, "__len__"):
        return None
    values = data.select_columns([name]).with_format("arrow")[:][name]
    lengths = np.ones(len(values))
    if hasattr(values.type, "value_field"):
        lengths = pc.list_value_length(values).to_numpy()
    while hasattr(values.type, "value_field"):
        values = pc.list_flatten(values)
    return (values.to_numpy(), lengths) if pa.types.is_integer(values.type) else None


def check_data(trainer: Any) -> None:
    """Raise a ValueError for records that the model cannot read, or learn from.

    Sets that are not tokenized, or are read as they come, are left to the trainer.
    """
    more = trainer.eval_dataset
    more = more if isinstance(more, dict) else {"evaluation": more}
    for name, data in ({"training": trainer.train_dataset} | more).items():
        if hasattr(data, "__len__") and not len(data):
            raise ValueError(f"the {name} set is empty: give it records, or None.")
        _check_numbers(trainer.model, data, name)
        _check_lengths(trainer.model, data, name)


def _check_numbers(model: Any, data: Any, place: str) -> None:
    """Raise if the model has no row, or no class, for a number in the records."""
    base = base_model(model)
    text = column(data, "input_ids")
    table, head = text and base.get_input_embeddings(), base.get_output_embeddings()
    tokens, out = (len(getattr(layer, "weight", ())) for layer in (table, head))
    classes = getattr(base, "num_labels", 0)  # a classifier's
    if classes == 1 or "single" not in (base.config.problem_type or "single"):
        classes = 0  # its labels are amounts, or vectors
    resize = "model.resize_token_embeddings(len(tokenizer)) before adapter and trainer"
    more = "count labels from 0, and load the model with as many num_labels"
    types = getattr(base.config, "type_vocab_size", 0)
    for name, rows, cure in (
        ("input_ids", tokens, f"embeddings: call {resize}"),
        ("labels", out, f"outputs: call {resize}"),
        ("labels", classes, f"labels: {more}"),
        ("label", classes, f"labels: {more}"),
        ("token_type_ids", types, "types of token: remove that column"),
    ):
        found = column(data, name) if rows else None
        if found is None:
            continue
        numbers = found[0][found[0] != IGNORE] if "label" in name else found[0]
        if not len(numbers):
            raise ValueError(f"no record of the {place} set has {name} to learn.")
        wrong = numbers.max() if numbers.max() >= rows else numbers.min()
        if not 0 <= wrong < rows:
            where = f"{name} of the {place} set: {wrong}"
            raise ValueError(f"{where} is beyond the model's {rows} {cure}.")


def _check_lengths(model: Any, data: Any, place: str) -> None:
    """Raise if a record is longer than the model's positions, learned or computed."""
    base, text = base_model(model), column(data, "input_ids")
    most = getattr(base.config.get_text_config(), "max_position_embeddings", 0) or 0
    if most <= 0 or text is None:
        return
    for name, layer in base.named_modules():  # RoBERTa's begin after that of padding
        if "position" in name and getattr(layer, "padding_idx", None) is not None:
            most -= layer.padding_idx + 1
    virtual = virtual_tokens(model)
    most -= virtual
    longest = int(max(text[1], default=0))
    for name, extra in (("position_ids", 1), ("seq_lengths", 0)):
        if packed := column(data, name):  # each example begins at position 0
            longest = packed[0].max() + extra
    if longest > most:
        beside = f" beside {virtual} virtual ones" if virtual else ""
        raise ValueError(
            f"the longest record of the {place} set has {longest} tokens; the model "
            f"has {most} positions{beside}: cut records with max_length={most}."
        )


def fix_trainable_dtype(model: Any) -> None:
    """Cast every trainable parameter to float32.

    TRL casts the adapters of a quantised model to bfloat16, whatever `fp16` says; a
    T4's gradient scaler then fails at step 1, and small updates are lost anywhere.
    """
    import torch

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(torch.float32)


def _check_prefixes(model: Any, gradient_checkpointing: bool) -> None:
    """Raise if prefix tuning meets gradient checkpointing, or a routers' loss.

    Prefixes lie in a cache, which checkpointing drops; shapes would not match then.
    """
    configs = getattr(model, "peft_config", {}).values()
    methods = {c.peft_type.value for c in configs} & {"PREFIX_TUNING", "CARTRIDGE"}
    on = any(getattr(m, "gradient_checkpointing", False) for m in model.modules())
    if methods and (gradient_checkpointing or on):
        raise ValueError(
            f"{methods.pop()} does not work with gradient checkpointing: pass "
            "gradient_checkpointing=False to the trainer's arguments, and call "
            "model.get_base_model().gradient_checkpointing_disable()."
        )
    if methods and router_configs(model):
        raise ValueError(
            f"{methods.pop()} does not work with the loss of a model's routers, which "
            "counts no prefix: pass router_aux_loss_coef=0.0 to SFTConfig, or set "
            "output_router_logits=False in the model's configuration."
        )


class QuickAttention(TrainerCallback):
    """Plain attention while training; what wraps `train` puts the model's own back."""

    def on_train_begin(self, args, state, control, model=None, **_: Any) -> None:
        set_attention(model, "eager")


class BoundedMemory(TrainerCallback):
    """Gives back what glibc keeps, where the process holds a fifth more than at first.

    The first three steps say what is usual: gradients and optimiser state are there.
    """

    most = 1.2  # times the usual

    def on_train_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        self.usual, self.settled = 0, state.global_step + 3

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        held = runtime.resident_bytes()
        if state.global_step <= self.settled:
            self.usual = max(self.usual, held)
        elif held > self.most * self.usual:
            runtime.give_back_memory()
            self.usual = max(self.usual, runtime.resident_bytes() / self.most)


def _trained_state(model: Any) -> dict[str, Any]:
    """Parameters that train, and all tensors of adapters: some are drawn at random."""
    adapters = set(getattr(model, "peft_config", {}))
    return {
        name: tensor.detach()
        for name, tensor in [*model.named_parameters(), *model.named_buffers()]
        if tensor.requires_grad or adapters.intersection(name.split("."))
    }


def _library_keeps(model: Any, folder: Path) -> bool:
    """Whether a checkpoint holds all that trains, by names that are read again.

    PEFT's files lack P-tuning's encoder, and others rename the experts of a mixture.
    """
    import torch
    from peft import PeftModel, get_peft_model_state_dict
    from safetensors import safe_open

    names: set[str] = set()
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            names.update(file.keys())
    kept = {t.data_ptr() for name, t in model.state_dict().items() if name in names}
    if isinstance(model, PeftModel):
        with torch.random.fork_rng():  # where an encoder has dropout, PEFT draws
            for name in model.peft_config:
                saved = get_peft_model_state_dict(model, None, name, False, False)
                kept |= {tensor.data_ptr() for tensor in saved.values()}
    return all(t.data_ptr() in kept for t in _trained_state(model).values())


def load_trained_state(trainer: Any, checkpoint: str, library_load: Any) -> None:
    """Load a checkpoint's trained state, or call `library_load` where that is all.

    Raises ValueError: it lacks something, or is of another model.
    """
    from safetensors.torch import load_file

    path, state = Path(checkpoint, TRAINED_STATE), _trained_state(trainer.model)
    if not path.is_file():
        if _library_keeps(trainer.model, path.parent):
            return library_load()
        raise ValueError(
            f"{path} is not there, and the other files lack what this run needs to go "
            "on: begin anew; prepare_trainer(trainer) before train writes it."
        )
    saved = load_file(path)
    ours, theirs = ({(n, t.shape) for n, t in s.items()} for s in (state, saved))
    if ours != theirs:
        raise ValueError(
            f"{path} is of another model or adapter: {min(ours ^ theirs)[0]} differs. "
            "Build both as they were, or begin in a new output_dir."
        )
    for name, tensor in state.items():
        tensor.copy_(saved[name])


class MarkCheckpoints(TrainerCallback):
    """Complete each checkpoint; the last file is a manifest of names and sizes.

    A checkpoint without it, or that differs from it, was being written (or deleted)
    when the process ended, or is not from this course.
    """

    def on_save(self, args, state, control, model=None, **_: Any) -> None:
        from safetensors.torch import save_file

        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if not _library_keeps(model, folder):
            own = {n: t.contiguous().clone() for n, t in _trained_state(model).items()}
            save_file(own, folder / TRAINED_STATE)
        if args.save_only_model:
            return  # without an optimizer there is nothing to go on from
        files = {
            path.relative_to(folder).as_posix(): path.stat().st_size
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != MANIFEST
        }
        draft = folder / f".{MANIFEST}.tmp"
        draft.write_text(json.dumps({"step": state.global_step, "files": files}))
        runtime.replace_file(draft, folder / MANIFEST)


def is_complete(checkpoint: Path) -> bool:
    """Whether a checkpoint's manifest is there, and tells of its files as they are."""
    try:
        manifest = json.loads((checkpoint / MANIFEST).read_text())
        files = dict(manifest["files"])
        sizes = {name: (checkpoint / name).stat().st_size for name in files}
    except (OSError, ValueError, KeyError, TypeError):
        return False
    named = checkpoint.name == f"checkpoint-{manifest['step']}"
    return named and bool(files) and sizes == files


def load_finished_run(trainer: Any, checkpoint: str | os.PathLike) -> Any:
    """Load a checkpoint that is the end of its run, or its best one, if asked for.

    Transformers would train on from it. Returns a `TrainOutput`, or None where there is
    something left to train.
    """
    folder, args = Path(checkpoint), trainer.args
    state = TrainerState.load_from_json(str(folder / "trainer_state.json"))
    done = state.epoch is not None and state.epoch >= args.num_train_epochs
    if args.max_steps > 0:
        done = state.global_step >= args.max_steps
    if not (done or _stopped_early(trainer, state)):
        return None
    best = args.load_best_model_at_end and state.best_model_checkpoint
    trainer._load_from_checkpoint(best if best and Path(best).is_dir() else str(folder))
    trainer.state = state
    print(f"nothing left to train: {folder.name} is the end of this run")
    losses = [entry["loss"] for entry in state.log_history if "loss" in entry]
    return TrainOutput(state.global_step, sum(losses) / max(1, len(losses)), {})


def _stopped_early(trainer: Any, state: TrainerState) -> bool:
    """Whether the trainer's early stopping had lost its patience; more goes on."""
    saved = state.stateful_callbacks.get(EarlyStoppingCallback.__name__, {})
    saved = saved[0] if isinstance(saved, list) else saved
    counter = saved.get("attributes", {}).get("early_stopping_patience_counter", 0)
    return any(
        counter >= callback.early_stopping_patience
        for callback in trainer.callback_handler.callbacks
        if isinstance(callback, EarlyStoppingCallback)
    )


class PeakOfStep(TrainerCallback):
    """Measures `peak_bytes` of the second step, the first with optimizer state.

    `seconds` is what the measuring itself took.
    """

    def __init__(self) -> None:
        self.seconds, self.peak_bytes = 0.0, None
        self._meter: Any = None

    def on_step_begin(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        from course_utils.memory import measure_memory

        if state.global_step == 1:  # one is done
            clock = time.perf_counter()
            kind = args.device.type if args.device.type != "cpu" else "allocator"
            self._meter = measure_memory(kind)
            self._used = self._meter.__enter__()
            self.seconds += time.perf_counter() - clock

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        if self._meter is not None:
            clock = time.perf_counter()
            self._meter.__exit__(None, None, None)
            self.peak_bytes, self._meter = self._used.peak_bytes, None
            self.seconds += time.perf_counter() - clock
