"""The generation loop: a batch of prompts through the model, one token a step.

It does three things that a general ``model.generate`` leaves out: tokens that all
prompts begin with (a system turn, virtual tokens of prompt or prefix tuning) are read
once for the whole batch; a row that has ended leaves the batch; and nothing of the
model has to be set for it, so nothing has to be set back.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    import torch

Pick = Callable[["torch.Tensor"], "torch.Tensor"]  # logits (B, V) -> tokens (B,)


class Batch(NamedTuple):
    """Rows ready for one forward pass, their shared tokens read already.

    Attributes:
        network: what to call: the model, or under virtual tokens its base.
        shared: how many tokens of each row are in the cache already.
        inputs: ``input_ids`` (B, T) padded on the left, ``attention_mask``
            (B, past + T), ``position_ids`` (B, T), ``past_key_values``.
    """

    network: Any
    shared: int
    inputs: dict[str, Any]


@contextmanager
def inference_state(model: Any) -> Iterator[None]:
    """Put every module into evaluation mode, and back as found, also on an error.

    In evaluation mode dropout and gradient checkpointing rest, whatever is switched
    on; ``use_cache`` and the generation settings are set for ``library_rows`` alone.

    The output layer gets the states of the last positions as one block of memory.
    They come as a view into all B·T of them, and PyTorch multiplies such a view with
    frozen weights by making B copies of these, V·d numbers each, which took longer
    than all the rest of an evaluation.
    """
    modes = [(module, module.training) for module in model.modules()]
    base = base_model(model)
    found = [(base, "generation_config", getattr(base, "generation_config", None))]
    text_config = base.config.get_text_config()
    for config in {id(c): c for c in (base.config, text_config)}.values():
        if hasattr(config, "use_cache"):
            found.append((config, "use_cache", config.use_cache))
    head = base.get_output_embeddings()
    hook = None if head is None else head.register_forward_pre_hook(_one_block)
    try:
        model.eval()
        yield
    finally:
        if hook is not None:
            hook.remove()
        for module, training in modes:
            module.training = training
        for owner, name, value in found:
            setattr(owner, name, value)


def _one_block(module: Any, args: tuple) -> tuple:
    import torch

    # contiguous() would leave a row of one prompt, and its strides, as they are.
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def decodes(model: Any) -> bool:
    """Say whether the loop can run this model.

    It needs explicit positions, a cache that only grows, and virtual tokens (if any)
    that stand before the prompt. Other models go through ``library_rows``.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    base = base_model(model)
    wanted = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    if not wanted <= set(inspect.signature(type(base).forward).parameters):
        return False
    layers = DynamicCache(config=base.config).layers
    if any(type(layer) is not DynamicLayer for layer in layers):
        return False
    kinds = {None, "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
    return _virtual_tokens(model) in kinds


def _virtual_tokens(model: Any) -> str | None:
    """The active prompt-learning method of a PEFT model, by PEFT's name for it."""
    if getattr(model, "_adapters_disabled", False) or not hasattr(model, "peft_config"):
        return None
    config = model.active_peft_config
    return config.peft_type.value if config.is_prompt_learning else None


def virtual_length(model: Any) -> int:
    """How many virtual tokens stand before each row: 0 without prompt learning."""
    if _virtual_tokens(model) is None:
        return 0
    return model.active_peft_config.num_virtual_tokens


def left_batch(
    model: Any, rows: Sequence[Sequence[int]], *, share_at_most: int | None = None
) -> Batch:
    """Read what all rows share, then pad the rest of each on its left.

    Args:
        rows: B lists of token ids, none empty.
        share_at_most: leave the tokens from this position on to the forward pass;
            None shares all but a row's last token.
    """
    import torch
    from transformers import DynamicCache

    base, method = base_model(model), _virtual_tokens(model)
    device = base.get_input_embeddings().weight.device
    network, cache, virtual = model, DynamicCache(config=base.config), 0
    if method == "PREFIX_TUNING":
        network, cache = base, model.get_prompt(1)
    elif method is not None:
        network, embeds = base, model.get_prompt(1)
        embeds = embeds.to(base.get_input_embeddings().weight.dtype)
        base(inputs_embeds=embeds, past_key_values=cache, use_cache=True)
    if method is not None:
        virtual = cache.get_seq_length()

    limit = min(map(len, rows)) - 1
    limit = limit if share_at_most is None else min(limit, share_at_most)
    shared = _common_prefix(rows, limit) if len(rows) > 1 else 0
    if shared:
        network(
            input_ids=torch.tensor([list(rows[0][:shared])], device=device),
            attention_mask=torch.ones(1, virtual + shared, dtype=int, device=device),
            position_ids=torch.arange(virtual, virtual + shared, device=device)[None],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
    past = virtual + shared
    if past and len(rows) > 1:
        cache.batch_repeat_interleave(len(rows))

    length = max(map(len, rows)) - shared
    input_ids = torch.zeros(len(rows), length, dtype=torch.long)
    mask = torch.zeros(len(rows), past + length, dtype=torch.long)
    mask[:, :past] = 1
    for i, row in enumerate(rows):
        input_ids[i, length - len(row) + shared :] = torch.tensor(row[shared:])
        mask[i, past + length - len(row) + shared :] = 1
    positions = (mask.cumsum(1) - 1).clamp(min=0)[:, past:]
    inputs = {
        "input_ids": input_ids.to(device),
        "attention_mask": mask.to(device),
        "position_ids": positions.to(device),
        "past_key_values": cache,
        "use_cache": True,
    }
    return Batch(network, shared, inputs)


def _common_prefix(rows: Sequence[Sequence[int]], limit: int) -> int:
    low, high = min(rows), max(rows)  # the two that differ earliest
    n = 0
    while n < limit and low[n] == high[n]:
        n += 1
    return n


def decode_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    stop: set[int],
    max_new_tokens: int,
    pick: Pick,
) -> Iterator[list[tuple[int, int]]]:
    """Generate for B rows at once; yield the (row, token) pairs of each step.

    A token of `stop` ends its row and is not yielded. Call under ``torch.no_grad``
    and in ``inference_state``.
    """
    import torch

    network, _, inputs = left_batch(model, rows)
    cache = inputs["past_key_values"]
    here = list(range(len(rows)))  # the row at each place of the batch; None: ended
    for step in range(max_new_tokens):
        logits = network(**inputs, logits_to_keep=1).logits[:, -1]
        tokens = pick(logits)
        pairs = []
        for place, token in enumerate(tokens.tolist()):
            if here[place] is not None and token in stop:
                here[place] = None
            elif here[place] is not None:
                pairs.append((here[place], token))
        yield pairs
        if not pairs or step + 1 == max_new_tokens:
            return
        mask, positions = inputs["attention_mask"], inputs["position_ids"][:, -1:] + 1
        if len(pairs) <= 0.9 * len(here):  # moving the cache costs too: not every step
            stay = [i for i, row in enumerate(here) if row is not None]
            here = [here[i] for i in stay]
            index = torch.tensor(stay, device=mask.device)
            cache.batch_select_indices(index)
            tokens, mask, positions = tokens[index], mask[index], positions[index]
        inputs |= {
            "input_ids": tokens[:, None],
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            "position_ids": positions,
        }


def library_rows(
    model: Any,
    rows: Sequence[Sequence[int]],
    *,
    stop: set[int],
    max_new_tokens: int,
    options: dict[str, Any],
) -> list[list[int]]:
    """The same through ``model.generate``, for models that ``decodes`` refuses."""
    import torch
    from transformers import GenerationConfig

    base = base_model(model)
    base.generation_config = GenerationConfig()  # no repetition penalty of its own
    for config in (base.config, base.config.get_text_config()):
        config.use_cache = True
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), min(stop, default=0))
    mask = torch.zeros_like(input_ids)
    for i, row in enumerate(rows):
        input_ids[i, length - len(row) :] = torch.tensor(row)
        mask[i, length - len(row) :] = 1
    device = base.get_input_embeddings().weight.device
    written = model.generate(
        input_ids=input_ids.to(device),
        attention_mask=mask.to(device),
        generation_config=GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=sorted(stop) or None,
            pad_token_id=min(stop, default=0),
            use_cache=True,
            **options,
        ),
    )
    answers = []
    for row in written[:, length:].tolist():
        end = next((i for i, token in enumerate(row) if token in stop), len(row))
        answers.append(row[:end])
    return answers
