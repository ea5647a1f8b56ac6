"""Train on any profile: arguments, plain progress, loss history, resume after a kill.

A lesson builds the library's own trainer in full view, with `sft_config` for its
arguments, and makes it ready with `prepare_trainer`.
"""

from __future__ import annotations

import functools
import math
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from course_utils import runtime, training_speed
from course_utils.inference import base_model
from course_utils.memory import GIB, estimate_memory
from course_utils.memory.estimate import MemoryEstimate, unfused
from course_utils.runtime import Profile
from course_utils.training_speed import completion_loss as completion_loss
from course_utils.training_speed import shared_beginning as shared_beginning

if TYPE_CHECKING:
    from transformers import TrainingArguments
    from trl import SFTConfig

# transformers' names of optimizers -> the planner's, where they differ
OPTIMIZERS = {
    "adamw_torch": "adamw",
    "adamw_torch_fused": "adamw",
    "adamw_bnb_8bit": "adamw_8bit",
    "paged_adamw_32bit": "paged_adamw",
}


def _settings(
    profile: Profile, output_dir: str | os.PathLike, own: dict[str, Any]
) -> dict[str, Any]:
    """What both trainers get by profile, and a lesson's own settings, which win.

    What the libraries would refuse late, or not at all, is refused at once.
    """
    rate = own.get("learning_rate", 1.0)
    if not isinstance(rate, int | float) or not 0 <= rate < float("inf"):
        raise ValueError(f"learning_rate must be a number, 0 or more, not {rate!r}")
    sizes = ("per_device_train_batch_size", "per_device_eval_batch_size")
    for name in (*sizes, "gradient_accumulation_steps"):
        size = own.get(name, 1)
        if not isinstance(size, int) or size < 1:
            raise ValueError(f"{name} must be a whole number, 1 or more, not {size!r}")
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
    } | own


def training_arguments(
    profile: Profile, output_dir: str | os.PathLike, **settings: Any
) -> TrainingArguments:
    """Arguments for `transformers.Trainer` that suit a profile; `settings` win.

    bfloat16 autocast where the profile computes in bfloat16, float16 with a gradient
    scaler on a T4, neither in float32; examples in random order; every step logged; no
    checkpoints, reports or progress bars. Raises ValueError for a learning rate or
    batch size that cannot train, TypeError for an unknown setting.
    """
    from transformers import TrainingArguments

    return TrainingArguments(**_settings(profile, output_dir, settings))


def sft_config(
    profile: Profile, output_dir: str | os.PathLike, **settings: Any
) -> SFTConfig:
    """Arguments for `trl.SFTTrainer` that suit a profile.

    As `training_arguments`, and without gradient checkpointing, which TRL switches on:
    on a small model it costs time for memory that is not short. Records keep their
    length (`max_length=None`); `tokenize_dataset` has cut them.
    """
    from trl import SFTConfig

    plain = {"gradient_checkpointing": False, "max_length": None}
    settings = _settings(profile, output_dir, plain | settings)
    newer = "activation_checkpointing"  # its name since transformers 5.23
    if newer in SFTConfig.__dataclass_fields__:
        settings.setdefault(newer, settings.pop("gradient_checkpointing"))
    return SFTConfig(**settings)


def prepare_trainer(
    trainer: Any, *, every: int | None = None, fast: bool = True, int8: bool = False
) -> None:
    """Make a built `Trainer` or `SFTTrainer` ready for the course.

    A plain line of progress `every` so many steps (None: about eight in all); trainable
    parameters in float32; errors before step 1; a model that can generate afterwards;
    checkpoints that resume with the same batches; AdaLoRA's ranks taken away, its
    penalty in no loss; advice where memory runs out. On a CPU, `fast` takes what
    `course_utils.training_speed` lists: the same losses, within 1e-4 a step in float32;
    `int8` its `int8_products`, where one gains: near losses.
    """
    from transformers import PrinterCallback

    from course_utils import training_callbacks as callbacks

    callbacks.fix_trainable_dtype(trainer.model)
    trainer.remove_callback(PrinterCallback)
    trainer.add_callback(callbacks.PlainProgress(every))
    trainer.add_callback(callbacks.CheckBeforeTraining())
    trainer.add_callback(callbacks.MarkCheckpoints())
    _use_seeded_batches(trainer)
    if trainer.args.device.type == "cpu":
        runtime.keep_freed_memory()
        trainer.add_callback(callbacks.BoundedMemory())
        if fast:
            training_speed.use_completion_loss(trainer)
            trainer.add_callback(callbacks.QuickAttention())
    if hasattr(getattr(trainer.model, "base_model", None), "rankallocator"):
        trainer.add_callback(callbacks.AllocateRanks(trainer))
    _wrap_train_and_evaluate(trainer, int8)


class SeededBatches:
    """A sampler: shuffled, and if `together` > 1 similar lengths side by side.

    Sorting saves padding, but where length tells something about the answer, each batch
    holds one sort of answer only, and the model learns less well. The order depends on
    seed and epoch alone, so a resumed run sees the batches it would have seen.
    """

    def __init__(
        self, lengths: Sequence[int], batch_size: int, seed: int, *, together: int = 1
    ) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.together = together  # as many batches are sorted by length as one
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self) -> int:
        return len(self.lengths)

    def __iter__(self) -> Iterator[int]:
        import torch

        generator = torch.Generator().manual_seed(self.seed + 1000 * self.epoch)
        order = torch.randperm(len(self), generator=generator).tolist()
        chunk = self.together * self.batch_size
        batches = []
        for start in range(0, len(order), chunk):
            part = sorted(order[start : start + chunk], key=lambda i: -self.lengths[i])
            starts = range(0, len(part), self.batch_size)
            batches += [part[i : i + self.batch_size] for i in starts]
        last = batches.pop() if len(batches[-1]) < self.batch_size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        yield from (i for place in shuffled for i in batches[place])
        yield from last


def _use_seeded_batches(trainer: Any) -> None:
    """Give a built trainer `SeededBatches`, if it has a data set to take lengths of."""
    # As transformers, sort 50 batches together; leave any other order alone.
    data, args = trainer.train_dataset, trainer.args
    together = {"random": 1, "group_by_length": 50}.get(args.train_sampling_strategy)
    columns = getattr(data, "column_names", None) or ()
    if together is None or "input_ids" not in columns:
        return
    lengths = [len(ids) for ids in data["input_ids"]]
    size = args.train_batch_size * args.gradient_accumulation_steps
    seed = args.seed if args.data_seed is None else args.data_seed
    trainer._get_train_sampler = lambda *_: SeededBatches(
        lengths, size, seed, together=together
    )


def _wrap_train_and_evaluate(trainer: Any, int8: bool) -> None:
    """What has to happen around the trainer's own methods, also after an error."""
    from course_utils import training_callbacks as callbacks

    library_train, library_evaluate = trainer.train, trainer.evaluate
    library_load, library_best = trainer._load_from_checkpoint, trainer._load_best_model
    own_optimizer = trainer.optimizer is not None  # of which the plan knows nothing

    def train(resume_from_checkpoint: Any = None, **options: Any) -> Any:
        config = base_model(trainer.model).config
        attention = getattr(config, "_attn_implementation", None)
        try:
            if isinstance(resume_from_checkpoint, str | os.PathLike):
                resume_from_checkpoint = os.fspath(resume_from_checkpoint)
                finished = callbacks.load_finished_run(trainer, resume_from_checkpoint)
                if finished is not None:
                    return finished
            tuner = getattr(trainer.model, "base_model", None)
            if resume_from_checkpoint and hasattr(tuner, "update_and_allocate"):
                raise ValueError(
                    "AdaLoRA cannot be resumed: what it has learned of the importance "
                    "of its ranks is in no checkpoint. Train it in one go."
                )
            callbacks.check_data(trainer)
            plan = _trainer_estimate(trainer)
            room = _free_bytes(trainer.args.device.type) + _held_bytes(trainer)
            advice = functools.partial(_advice, trainer.args, plan, room)
            if plan and plan.total > room:
                if plan.static > room and not own_optimizer:
                    raise OutOfMemory(f"not enough memory for this run. {advice()}")
                print(f"Memory may run out. {advice()}")
            with _advised(advice), training_speed.int8_where_faster(trainer, int8):
                return library_train(resume_from_checkpoint, **options)
        finally:
            training_speed.set_attention(trainer.model, attention)
            _make_ready_to_generate(trainer)
            _forget_optimizer_overrides(trainer.optimizer)

    def evaluate(*args: Any, **options: Any) -> Any:
        size = trainer.args.per_device_eval_batch_size
        smaller = f"Set per_device_eval_batch_size={max(1, size // 2)} (now {size})."
        with _advised(lambda: smaller):
            return library_evaluate(*args, **options)

    def load(folder: Any, model: Any = None) -> None:
        library = functools.partial(library_load, folder, model)
        callbacks.load_trained_state(trainer, folder, library)

    def load_best() -> None:
        best = trainer.state.best_model_checkpoint
        callbacks.load_trained_state(trainer, best, library_best)

    trainer.train, trainer.evaluate = train, evaluate
    trainer._load_from_checkpoint, trainer._load_best_model = load, load_best


def _make_ready_to_generate(trainer: Any) -> None:
    """Evaluation mode, cache on, checkpointing and autocast off."""
    model, base = trainer.model, base_model(trainer.model)
    base.config.use_cache = True
    if getattr(base, "generation_config", None) is not None:
        base.generation_config.use_cache = True
    if trainer.args.gradient_checkpointing:
        base.gradient_checkpointing_disable()
    own = model.__dict__.get("_original_forward")
    trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    if own is not None:  # Accelerate unwraps too far: to below TRL's own forward
        model.forward = own
    model._is_accelerate_prepared = False  # or another training has no autocast
    model.eval()


def _forget_optimizer_overrides(optimizer: Any) -> None:
    """Free the embeddings that bitsandbytes 0.50.2 keeps to give them 32-bit states.

    Whatever a later 8-bit optimizer has at their places would get 32 bits, too.
    """
    optimizer = getattr(optimizer, "optimizer", optimizer)  # out of Accelerate's
    if type(optimizer).__module__.startswith("bitsandbytes"):
        from bitsandbytes.optim import GlobalOptimManager

        GlobalOptimManager.get_instance().initialize()


@dataclass(frozen=True)
class LossHistory:
    """What a training logged, as plain tuples ready to draw."""

    steps: tuple[int, ...]  # the optimiser steps that logged a loss
    loss: tuple[float, ...]  # nats a token
    eval_steps: tuple[int, ...] = ()  # the same for the validation set
    eval_loss: tuple[float, ...] = ()

    @classmethod
    def from_trainer(cls, trainer: Any) -> LossHistory:
        """Read a trainer's log; a resumed trainer's holds the steps before, too."""

        def read(key: str) -> tuple[tuple[int, ...], tuple[float, ...]]:
            entries = [entry for entry in trainer.state.log_history if key in entry]
            steps = tuple(entry["step"] for entry in entries)
            return steps, tuple(float(entry[key]) for entry in entries)

        return cls(*read("loss"), *read("eval_loss"))


def find_checkpoint(output_dir: str | os.PathLike) -> str | None:
    """The path of the newest complete checkpoint that this course wrote, or None.

    `trainer.train(resume_from_checkpoint=find_checkpoint(folder))` begins anew where
    there is none. A checkpoint that a kill cut short does not count.
    """
    from course_utils.training_callbacks import is_complete

    complete = [p for p in Path(output_dir).glob("checkpoint-*") if is_complete(p)]
    steps = {int(path.name.removeprefix("checkpoint-")): str(path) for path in complete}
    return steps[max(steps)] if steps else None


class OutOfMemory(RuntimeError):
    """Memory ran out, or would; the message says which setting to lower, to what."""


def plan_settings(
    plan: MemoryEstimate, *, device: str, examples: int | None = None
) -> dict[str, Any]:
    """The keywords for `sft_config` that a memory plan stands for.

    Each optimiser step sees at least so many `examples`; None takes the plan's batch.
    On CUDA 8-bit AdamW is the paged one, whose state can move to the host.
    """
    request = plan.request
    fused = "adamw_torch" if device == "mps" else "adamw_torch_fused"
    eight = "paged_adamw_8bit" if device == "cuda" else "adamw_bnb_8bit"
    names = {"adamw": fused, "adamw_8bit": eight, "sgd_momentum": "sgd"}
    examples = examples or request.batch_size
    return {
        "per_device_train_batch_size": request.batch_size,
        "gradient_accumulation_steps": math.ceil(examples / request.batch_size),
        "gradient_checkpointing": request.gradient_checkpointing,
        "optim": names.get(request.optimizer, request.optimizer),
    }


def _trainer_estimate(trainer: Any) -> MemoryEstimate | None:
    """The peak of a trainer's steps, by its longest record; None without a formula."""
    from course_utils.training_callbacks import QuickAttention, column

    args, model = trainer.args, trainer.model
    tokens = column(trainer.train_dataset, "input_ids")
    if tokens is None:
        return None
    base = base_model(model)
    four_bit = getattr(base.config, "quantization_config", None)
    if four_bit is not None and not getattr(four_bit, "load_in_4bit", False):
        return None
    adapters = list(getattr(model, "peft_config", {}).values())
    weights = [p for p in base.parameters() if p.is_floating_point()]
    frozen = [p for p in weights if adapters and not p.requires_grad]
    method = adapters[0] if adapters else "full"
    callbacks = trainer.callback_handler.callbacks
    quick = any(isinstance(callback, QuickAttention) for callback in callbacks)
    alone = args.per_device_train_batch_size == 1 and args.fp16
    scores = alone and unfused(base.config, method)  # all of them, as on a T4
    is_sft = any(parent.__name__ == "SFTTrainer" for parent in type(trainer).__mro__)
    try:
        return estimate_memory(
            base.config,
            method,
            batch_size=args.per_device_train_batch_size,
            sequence_length=int(tokens[1].max()),
            dtype=(frozen or weights)[0].dtype,
            autocast="float16" if args.fp16 else "bfloat16" if args.bf16 else None,
            optimizer=OPTIMIZERS.get(args.optim, args.optim),
            gradient_checkpointing=args.gradient_checkpointing,
            attention="eager" if quick else "math" if scores else "sdpa",
            loss="chunked" if is_sft or "compute_loss" in vars(trainer) else "logits",
            quantization=four_bit.bnb_4bit_quant_type if four_bit else None,
            gradient_accumulation=args.gradient_accumulation_steps > 1,
        )
    except (ValueError, KeyError):
        return None


def _free_bytes(device: str) -> int:
    """Bytes that this process may still take on a device."""
    import psutil
    import torch

    if device == "cuda":
        unused = torch.cuda.memory_reserved() - torch.cuda.memory_allocated()
        return torch.cuda.mem_get_info()[0] + unused
    runtime.give_back_memory()  # what the process has freed and kept is free for it
    return psutil.virtual_memory().available


def _held_bytes(trainer: Any) -> int:
    """Bytes of a run that are there already: weights, gradients, optimiser state."""
    tensors = [*trainer.model.parameters()]
    tensors += [p.grad for p in tensors if p.grad is not None]
    for state in getattr(trainer.optimizer, "state", {}).values():
        tensors += [value for value in state.values() if hasattr(value, "element_size")]
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@contextmanager
def _advised(advice: Callable[[], str]) -> Iterator[None]:
    """While inside, let an error of memory that ran out say what to lower."""
    import torch

    words = ("can't allocate memory", "not enough memory", "out of memory")
    kinds = (MemoryError, torch.OutOfMemoryError)
    try:
        yield
    except OutOfMemory:
        raise
    except (RuntimeError, MemoryError) as error:
        if not isinstance(error, kinds) and not any(w in str(error) for w in words):
            raise
        raise OutOfMemory(f"memory ran out. {advice()}") from error


def _advice(args: TrainingArguments, plan: MemoryEstimate | None, room: int) -> str:
    """Which settings to lower, and to what, for a run that may take `room` bytes."""
    batch = args.per_device_train_batch_size
    examples = batch * args.gradient_accumulation_steps  # a step, then as now
    if plan is None and batch == 1:
        return "Take a smaller model or shorter records: the batch is 1 already."
    if plan is None:
        half = max(b for b in range(1, batch // 2 + 1) if examples % b == 0)
        return (
            f"Set per_device_train_batch_size={half}, gradient_accumulation_steps="
            f"{examples // half}: the same examples a step, fewer activations."
        )
    need = f"The plan for this run is {plan.total_gib:.3g} GiB at its peak, "
    if plan.total > room:
        need += f"and there is room for {room / GIB:.3g} GiB"
    else:
        room = int(0.8 * plan.total)
        need += "which should have fitted: restart the kernel, and close what else "
        need += "holds memory. If it fails again, aim for 20 % less"
    change = plan.cheapest_change(room / GIB)
    if change is None:
        return f"{need}. No change of settings is enough: take a smaller model."
    words, smaller = change
    new = plan_settings(smaller, device=args.device.type, examples=examples)
    if smaller.request.optimizer == plan.request.optimizer:
        del new["optim"]
    settings = [f"{k}={v!r}" for k, v in new.items() if v != getattr(args, k)]
    if smaller.request.quantization != plan.request.quantization:
        settings.append('load_model(quantization="nf4") under the adapter')
    if smaller.request.loss != plan.request.loss:
        settings.append("SFTTrainer, whose loss never holds all logits")
    cheapest = f"The cheapest change is {words}: set {', '.join(settings)}"
    return f"{need}. {cheapest} (then {smaller.total_gib:.3g} GiB)."
