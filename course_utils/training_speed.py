"""Why the course's runs are fast on a CPU: the same loss and gradients, less work.

Four things, each measured by `make bench`: no logits where nothing is learned;
examples side by side in fewer rows, without padding, and what they all begin with read
once a row (`course_utils.packed_batches`); plain attention instead of the fused kernel
(whose backward pass is slow for short sequences on a CPU); and no cast of a LoRA
layer's input to float32 that autocast would undo.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from course_utils.formatting import IGNORE
from course_utils.packed_batches import without_padding

if TYPE_CHECKING:
    import torch


def completion_loss(
    model: Any, batch: Mapping[str, torch.Tensor], learned_tokens: Any = None
) -> torch.Tensor:
    """Cross-entropy of the learned tokens, from logits at those positions only.

    Position t predicts label t + 1. The model's own loss projects all B·T hidden
    states to the vocabulary, then throws away those whose label is -100; here the
    others never meet the output layer, the largest matrix of a small model.

    Args:
        model: a causal language model, with or without a PEFT adapter.
        batch: ``input_ids``, ``labels`` (B, T) and what else the model takes.
        learned_tokens: divide the sum by this, the number of learned tokens in all
            batches of an optimiser step; None takes this batch's own, so that the
            result is a mean in nats a token.

    Returns:
        A scalar, 0 for a batch without a learned token.

    Raises:
        ValueError: the batch is packed and the model has virtual tokens, which would
            stand before each row instead of each example.
    """
    from torch.nn.functional import cross_entropy

    if "position_ids" in batch and "attention_mask" not in batch:
        refuse_virtual_tokens(model)
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    labels = batch["labels"][:, 1:]
    learned = labels != IGNORE
    with _only_these_positions(model.get_output_embeddings(), learned):
        logits = model(**inputs | {"use_cache": False}).logits  # (learned, V)
    targets = labels[learned].to(logits.device)
    total = cross_entropy(logits.float(), targets, reduction="sum")
    count = learned.sum().clamp(min=1) if learned_tokens is None else learned_tokens
    return total / count


def refuse_virtual_tokens(model: Any) -> None:
    """Raise if a model that is to read packed rows has a prompt or prefix adapter.

    Raises:
        ValueError: it has.
    """
    configs = getattr(model, "peft_config", {}).values()
    if any(getattr(config, "is_prompt_learning", False) for config in configs):
        raise ValueError(
            "packed examples and virtual tokens do not go together: one prompt would "
            "stand before the whole row, and PEFT ignores position_ids. Put one "
            "example into each row: CompletionCollator pads them."
        )


@contextmanager
def _only_these_positions(head: Any, learned: torch.Tensor) -> Iterator[None]:
    """While inside, `head` sees the hidden states (B, T, d) of learned positions only.

    Virtual tokens of prompt tuning stand in front; the mask (B, T - 1) is read from
    the end.
    """

    def select(module: Any, args: tuple) -> tuple:
        hidden, width = args[0], learned.shape[1]
        return (hidden[:, -width - 1 : -1][learned.to(hidden.device)],)

    hook = head.register_forward_pre_hook(select)
    try:
        yield
    finally:
        hook.remove()


class SeededBatches:
    """A sampler: shuffled, and if asked with examples of similar length side by side.

    Grouping by length saves padding, at a price: where length tells something about
    the answer, each batch then holds one kind of answer only, and the model learns the
    kinds less well. So `together` is 1 unless a lesson asks for more.

    The order depends on the seed and the epoch alone, so that a resumed run sees the
    batches it would have seen. Transformers' own sampler draws from the global
    generator, whose state at the start of an epoch no checkpoint holds.

    >>> batches = SeededBatches([5, 60, 6, 61], batch_size=2, seed=0)
    >>> sorted(batches) == [0, 1, 2, 3]
    True
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        seed: int,
        *,
        together: int = 1,
    ) -> None:
        self.lengths, self.batch_size, self.seed = list(lengths), batch_size, seed
        self.together = together  # as many batches are sorted by length as one
        self.epoch = 0

    def set_epoch(self, epoch: int) -> None:
        """Take another order for this epoch, counted from 0."""
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
            batches += [
                part[i : i + self.batch_size]
                for i in range(0, len(part), self.batch_size)
            ]
        last = batches.pop() if len(batches[-1]) < self.batch_size else []
        shuffled = torch.randperm(len(batches), generator=generator).tolist()
        yield from (i for place in shuffled for i in batches[place])
        yield from last


def cast_lora_inputs(model: Any, on: bool) -> None:
    """Let PEFT's LoRA layers cast their input to the adapter's dtype, or not.

    Under autocast that cast is undone at once by the matrix product; without autocast
    it is needed.
    """
    for module in model.modules():
        if hasattr(module, "lora_A") and hasattr(module, "_cast_input_dtype"):
            module.cast_input_dtype_enabled = on


@contextmanager
def _mixed_precision(trainer: Any) -> Iterator[None]:
    """Products in bfloat16 where the trainer asks for it, also after its training.

    Accelerate's own autocast is off the model then, so that it can generate.
    """
    import torch

    if not trainer.args.bf16:
        yield
        return
    modules = trainer.model.modules()
    if not any(getattr(module, "gradient_checkpointing", False) for module in modules):
        # The second forward of checkpointing comes later, and must be as the first.
        cast_lora_inputs(trainer.model, False)
    try:
        with torch.autocast(trainer.args.device.type, torch.bfloat16):
            yield
    finally:  # a run that is interrupted leaves a model that can generate
        cast_lora_inputs(trainer.model, True)


def use_completion_loss(trainer: Any) -> None:
    """Make a built `Trainer` or `SFTTrainer` compute `completion_loss`, unpadded.

    Batches without labels for each token (a classifier's), and evaluations that need
    logits (`compute_metrics`), go the trainer's own way. So does a trainer whose loss
    is another one: `label_smoothing_factor`, `compute_loss_func`, TRL's `loss_type`, or
    a `compute_loss` of a subclass.
    """
    if _has_own_loss(trainer):
        return
    original = trainer.compute_loss

    def compute_loss(
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        needs_logits = return_outputs and trainer.compute_metrics is not None
        labels = inputs.get("labels")  # a classifier has one for each text: (B,)
        if labels is None or labels.dim() != 2 or needs_logits:
            return original(model, inputs, return_outputs, num_items_in_batch)
        inputs = without_padding(trainer.model, inputs)
        with _mixed_precision(trainer):
            loss = completion_loss(model, inputs, num_items_in_batch)
        return (loss, {"loss": loss}) if return_outputs else loss

    trainer.compute_loss = compute_loss


def _has_own_loss(trainer: Any) -> bool:
    written_in = type(trainer).compute_loss.__module__.partition(".")[0]
    return (
        written_in not in ("transformers", "trl")
        or trainer.compute_loss_func is not None
        or trainer.label_smoother is not None
        or getattr(trainer.args, "loss_type", "nll") != "nll"
    )


def use_seeded_batches(trainer: Any) -> None:
    """Give a built trainer `SeededBatches`, if it has a data set to take lengths of.

    With `train_sampling_strategy="group_by_length"` 50 batches are sorted together, as
    transformers does; any order but `"random"` and that one is left alone.
    """
    data, args = trainer.train_dataset, trainer.args
    sorted_together = {"random": 1, "group_by_length": 50}
    together = sorted_together.get(args.train_sampling_strategy)
    if together is None:
        return
    if data is None or "input_ids" not in (getattr(data, "column_names", None) or ()):
        return
    lengths = [len(ids) for ids in data["input_ids"]]
    size = args.train_batch_size * args.gradient_accumulation_steps
    seed = args.seed if args.data_seed is None else args.data_seed
    trainer._get_train_sampler = lambda *_: SeededBatches(
        lengths, size, seed, together=together
    )


def set_attention(model: Any, name: str) -> str | None:
    """Switch a model's attention kernel; returns the one it had.

    `"eager"` multiplies matrices one after the other; `"sdpa"` is PyTorch's fused
    kernel.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    had = getattr(base.config, "_attn_implementation", None)
    if had is not None and had != name:
        base.set_attn_implementation(name)
    return had
