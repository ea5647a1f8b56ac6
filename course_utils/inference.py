"""Generate answers: batched, streamed, and side by side.

What looks like a special token in a prompt stays text. The loop does what a general
``model.generate`` leaves out: tokens that all prompts begin with (a system turn,
virtual tokens) are read once a batch, and a row that has ended leaves it.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby, takewhile
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from course_utils.formatting import end_of_turn_ids, generation_prompt

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_utils.templates import Template

Rows = Sequence[Sequence[int]]  # token ids of each prompt
MIXING = ("LILY",)  # of PEFT's adapters, by a test of each (0.21.2)

_READS_PADDED: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # by model


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    template: str | Template | None = "chatml",
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
) -> list[str]:
    """Answer each prompt; greedy, so the same answers every time.

    A batch holds prompts of similar length, padded on the left, and each answer is
    the one that its prompt gets alone (in 16 bits a near tie may fall otherwise).
    An answer ends before the template's end of turn or the model's end of sequence.
    A repetition penalty in the model's own generation settings is not applied.

    Args:
        prompts: user texts; records, laid out with their fields, a last answer left
            out; or texts that are laid out already (``template=None``).
        system: None takes the template's default.
        batch_size: None means 128 on a CPU, 32 elsewhere.

    Raises TypeError if `prompts` is one string, or holds neither strings nor records,
    ValueError if a prompt is empty or too long, or an option out of its range.
    """
    import torch

    rows = _token_rows(model, tokenizer, prompts, template, system, max_new_tokens)
    stop = _stop_ids(model, tokenizer, template)
    if batch_size is None:
        batch_size = 128 if base_model(model).device.type == "cpu" else 32
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    if mixing_adapter(model):
        batch_size = 1
    own_loop = decodes(model)
    decode = _decode_rows if own_loop else _library_rows
    answers: list[list[int]] = [[] for _ in rows]
    with torch.no_grad(), inference_state(model):
        uneven = len(set(map(len, rows))) > 1
        alike = uneven and not own_loop and not _reads_padded(model)
        for places in _batches(rows, batch_size, alike):
            batch = [rows[i] for i in places]
            for pairs in decode(model, batch, stop, max_new_tokens):
                for row, token in pairs:
                    answers[places[row]].append(token)
    return [_text(tokenizer, tokens) for tokens in answers]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    template: str | Template | None = "chatml",
    system: str | None = None,
    max_new_tokens: int = 256,
) -> Iterator[str]:
    """Answer one prompt, piece by piece as it is written; no piece is empty.

    Together they are what ``generate`` returns, and it raises what that does. Until the
    last piece is taken, or the iterator is closed, the model stays in evaluation mode.
    A model that only ``model.generate`` can run gives its answer in one piece.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"the prompt is a string, not {type(prompt).__name__}")
    rows = _token_rows(model, tokenizer, [prompt], template, system, max_new_tokens)
    stop = _stop_ids(model, tokenizer, template)
    return _pieces(model, tokenizer, rows, stop, max_new_tokens)


def _batches(rows: Rows, batch_size: int, alike: bool) -> Iterator[list[int]]:
    """Places of rows, the longest first; each batch of one length, if `alike`."""
    longest_first = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    for _, group in groupby(longest_first, lambda i: alike and len(rows[i])):
        places = list(group)
        for start in range(0, len(places), batch_size):
            yield places[start : start + batch_size]


def _pieces(model, tokenizer, rows, stop, max_new_tokens) -> Iterator[str]:
    import torch

    tokens: list[int] = []
    sent = ""
    decode = _decode_rows if decodes(model) else _library_rows
    decode = torch.no_grad()(decode)  # not around the yield: it would reach the caller
    with inference_state(model):
        for pairs in decode(model, rows, stop, max_new_tokens):
            tokens += [token for _, token in pairs]
            text = _text(tokenizer, tokens)
            if text.endswith("\ufffd"):
                continue  # half a character: wait for the rest
            if len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text
        if rest := _text(tokenizer, tokens)[len(sent) :]:
            yield rest


def compare_generations(
    models: Mapping[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    references: Sequence[str] | None = None,
    **options: Any,
) -> Comparison:
    """Answer the same prompts with several models, side by side.

    Args:
        models: {name: a model, or the list of its answers made earlier}. Training
            changes a model in place: keep the answers from before as a list.
        references: the right answers, for a last column.
        options: of ``generate``.
    """
    columns = [("prompt", list(prompts)), *models.items()]
    if references is not None:
        columns.append(("right answer", list(references)))
    for i, (name, texts) in enumerate(columns):
        if not isinstance(texts, list | tuple):
            texts = generate(texts, tokenizer, prompts, **options)
        if len(texts) != len(prompts):
            raise ValueError(f"{name}: {len(texts)} answers to {len(prompts)} prompts")
        columns[i] = name, tuple(texts)
    return Comparison(tuple(columns))


@dataclass(frozen=True)
class Comparison:
    """Answers of several models to the same prompts; a notebook shows it as a table."""

    columns: tuple[tuple[str, tuple[str, ...]], ...]  # pairs of a name and its texts

    def __str__(self) -> str:
        width = max(len(name) for name, _ in self.columns)
        indent = "\n" + " " * (width + 2)
        named = [[f"{n:<{width}}  {t}" for t in texts] for n, texts in self.columns]
        columns = [[t.replace("\n", indent).rstrip() for t in c] for c in named]
        return "\n\n".join(map("\n".join, zip(*columns, strict=True)))

    def _repr_markdown_(self) -> str:
        names, texts = zip(*self.columns, strict=True)
        rows = [map(_cell, row) for row in zip(*texts, strict=True)]
        head, *body = ["| " + " | ".join(row) + " |" for row in (names, *rows)]
        return "\n".join([head, "|" + "---|" * len(names), *body])


def _cell(text: str) -> str:
    """Any text as one cell of a Markdown table, in a code span."""
    text = " ⏎ ".join(text.splitlines()).replace("|", "\\|").strip()
    fence = "`"
    while fence in text:
        fence += "`"
    space = " " if len(fence) > 1 else ""
    return f"{fence}{space}{text}{space}{fence}" if text else "*(empty)*"


def base_model(model: Any) -> Any:
    """The transformers model inside a PEFT model; any other model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


@contextmanager
def inference_state(model: Any) -> Iterator[None]:
    """Put every module into evaluation mode, and back as found, also on an error.

    The generation settings are put back, too, which ``_library_run`` sets. Routers of
    experts report nothing: their loss is for training, and fails on a cache. The output
    layer gets its states as one block of memory: of a view into all B·T of them PyTorch
    makes the product by B copies of frozen weights, slower than all the rest.
    """
    modes = [(module, module.training) for module in model.modules()]
    base = base_model(model)
    settings = getattr(base, "generation_config", None)
    routed = router_configs(model)
    head = base.get_output_embeddings()
    try:
        model.eval()
        for config in routed:
            config.output_router_logits = False
        hook = head.register_forward_pre_hook(_one_block) if head is not None else None
        with hook or nullcontext():
            yield
    finally:
        for module, training in modes:
            module.training = training
        for config in routed:
            config.output_router_logits = True
        base.generation_config = settings


def router_configs(model: Any) -> list[Any]:
    """The configurations by which a model adds its routers' loss to its own."""
    found = [vars(module).get("config") for module in model.modules()]
    found = {id(c): c for c in found if getattr(c, "output_router_logits", False)}
    return list(found.values())


def _one_block(module: Any, args: tuple) -> tuple:
    import torch

    # contiguous() would leave a row of one prompt, and its strides, as they are.
    return (args[0].clone(memory_format=torch.contiguous_format), *args[1:])


def decodes(model: Any) -> bool:
    """Whether the loop can run this model; others go through ``_library_rows``.

    It needs explicit positions from 0 (RoBERTa's begin behind that of padding), a cache
    that only grows, and virtual tokens, if any, before the prompt.
    """
    from transformers import DynamicCache
    from transformers.cache_utils import DynamicLayer

    base = base_model(model)
    needed = {"attention_mask", "position_ids", "past_key_values", "logits_to_keep"}
    if not needed <= set(inspect.signature(type(base).forward).parameters):
        return False
    layers = DynamicCache(config=base.config).layers
    before_the_prompt = {None, "PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING"}
    grows = all(type(layer) is DynamicLayer for layer in layers)
    first = _prompt_method(model) in before_the_prompt
    tables = (m for n, m in base.named_modules() if "position" in n)
    from_0 = all(getattr(table, "padding_idx", None) is None for table in tables)
    return grows and first and from_0 and not mixing_adapter(model)


def mixing_adapter(model: Any) -> str | None:
    """The adapter, if any, that averages over a batch: each row is in all answers."""
    configs = getattr(model, "peft_config", {}).values()
    return next((c.peft_type.value for c in configs if c.peft_type in MIXING), None)


def _prompt_method(model: Any) -> str | None:
    """The active prompt-learning method of a PEFT model, by PEFT's name for it."""
    if getattr(model, "_adapters_disabled", False) or not hasattr(model, "peft_config"):
        return None
    config = model.active_peft_config
    return config.peft_type.value if config.is_prompt_learning else None


def _left_batch(
    model: Any, rows: Rows, *, share_at_most: float = math.inf
) -> tuple[Any, dict[str, Any]]:
    """Read what all rows share, then pad the rest of each on its left.

    The tokens from `share_at_most` on are left to the forward pass of the rows.
    Returns what to call, the model or under virtual tokens its base, and its inputs:
    ``input_ids`` (B, T), ``attention_mask`` (B, past + T), ``position_ids`` (B, T) ...
    """
    import torch

    network, cache = read_virtual_tokens(model)
    device = base_model(model).get_input_embeddings().weight.device
    virtual = cache.get_seq_length()
    low, high = min(rows), max(rows)  # the two that differ earliest
    limit = min(min(map(len, rows)) - 1, share_at_most) if len(rows) > 1 else 0
    shared = next((n for n in range(limit) if low[n] != high[n]), limit)
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
    input_ids, mask = _pad_left([row[shared:] for row in rows], device)
    mask = torch.cat([mask.new_ones(len(rows), past), mask], dim=1)
    return network, {
        "input_ids": input_ids,
        "attention_mask": mask,
        "position_ids": (mask.cumsum(1) - 1).clamp(min=0)[:, past:],
        "past_key_values": cache,
        "use_cache": True,
    }


def _reads_padded(model: Any) -> bool:
    """Whether ``model.generate`` reads a row behind padding as alone: asked once.

    Virtual tokens are not read so: PEFT puts them before the padding.
    """
    import torch

    base = base_model(model)
    if _prompt_method(model) is not None:
        return False
    if base not in _READS_PADDED:
        short, long = range(8), range(16)
        alone, padded = (
            torch.stack(_library_run(model, r, set(), 3, output_logits=True).logits)
            for r in ([short], [short, long])
        )
        alone, padded = alone[:, 0].float(), padded[:, 0].float()
        near = 1e-3 if base.dtype == torch.float32 else 0.25  # rounding of 30 layers
        _READS_PADDED[base] = bool((padded - alone).norm() < near * alone.norm())
    return _READS_PADDED[base]


def read_virtual_tokens(model: Any) -> tuple[Any, Any]:
    """What to call, and a cache of one row that holds the virtual tokens, if any."""
    from transformers import DynamicCache

    base, method = base_model(model), _prompt_method(model)
    if method == "PREFIX_TUNING":
        return base, model.get_prompt(1)
    cache = DynamicCache(config=base.config)
    if method is None:
        return model, cache
    embeds = model.get_prompt(1).to(base.get_input_embeddings().weight.dtype)
    base(inputs_embeds=embeds, past_key_values=cache, use_cache=True, logits_to_keep=1)
    return base, cache


def _pad_left(rows: Rows, device: Any, pad: int = 0) -> tuple[Any, Any]:
    """Ids and attention mask, both (B, T), of rows aligned at their end."""
    import torch

    length = max(map(len, rows))
    ids = [[pad] * (length - len(row)) + list(row) for row in rows]
    mask = [[0] * (length - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


def last_logits(
    model: Any, rows: Rows, keep: int, *, share_at_most: float
) -> torch.Tensor:
    """Logits (B, at most `keep`, V) of the last positions, rows aligned at their end.

    `share_at_most` tokens that all begin with are read once. A model that the loop
    cannot run (``decodes``) takes rows of one length.
    """
    import torch

    for row in rows:
        _refuse_unreadable(model, row, "a record")
    if decodes(model):
        network, inputs = _left_batch(model, rows, share_at_most=share_at_most)
        return network(**inputs, logits_to_keep=keep).logits
    ids = torch.tensor(rows, device=base_model(model).device)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return model(**inputs, use_cache=False).logits[:, -keep:]  # as in training


def _decode_rows(
    model: Any, rows: Rows, stop: set[int], max_new_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """Generate for B rows at once; yield the (row, token) pairs of each step.

    A token of `stop` ends its row and is not yielded. Call under ``torch.no_grad``
    and in ``inference_state``.
    """
    import torch

    network, inputs = _left_batch(model, rows)
    cache = inputs["past_key_values"]
    row_at: list[int | None] = list(range(len(rows)))  # by place; None: ended
    for step in range(max_new_tokens):
        logits = network(**inputs, logits_to_keep=1).logits[:, -1]
        tokens = logits.max(-1).indices  # twice as fast as argmax
        written = list(zip(row_at, tokens.tolist(), strict=True))
        row_at = [None if token in stop else row for row, token in written]
        pairs = [(row, t) for row, t in written if row is not None and t not in stop]
        yield pairs
        if not pairs or step + 1 == max_new_tokens:
            return
        mask, positions = inputs["attention_mask"], inputs["position_ids"][:, -1:] + 1
        if len(pairs) <= 0.9 * len(row_at):  # moving the cache costs too
            places = [i for i, row in enumerate(row_at) if row is not None]
            row_at = [row for row, _ in pairs]
            index = torch.tensor(places, device=mask.device)
            cache.batch_select_indices(index)
            tokens, mask, positions = tokens[index], mask[index], positions[index]
        inputs |= {
            "input_ids": tokens[:, None],
            "attention_mask": torch.cat([mask, mask.new_ones(len(mask), 1)], dim=1),
            "position_ids": positions,
        }


def _library_rows(
    model: Any, rows: Rows, stop: set[int], max_new_tokens: int
) -> Iterator[list[tuple[int, int]]]:
    """The same in one step of ``model.generate``, if ``decodes`` refuses a model."""
    written = _library_run(model, rows, stop, max_new_tokens).sequences
    new = written[:, max(map(len, rows)) :].tolist()
    answers = [takewhile(lambda token: token not in stop, row) for row in new]
    yield [(i, token) for i, answer in enumerate(answers) for token in answer]


def _library_run(
    model: Any, rows: Rows, stop: set[int], max_new_tokens: int, **options: Any
) -> Any:
    from transformers import DynamicCache, GenerationConfig
    from transformers.cache_utils import DynamicLayer

    base = base_model(model)
    base.generation_config = GenerationConfig()  # no repetition penalty of its own
    pad = min(stop, default=0)
    ids, mask = _pad_left(rows, base.get_input_embeddings().weight.device, pad)
    layers = DynamicCache(config=base.config).layers
    # In another state than keys and values PEFT does not find its virtual tokens again.
    caches = all(isinstance(layer, DynamicLayer) for layer in layers)
    options |= {"use_cache": caches or _prompt_method(model) is None}
    options |= {"eos_token_id": sorted(stop) or None, "pad_token_id": pad}
    options |= {"max_new_tokens": max_new_tokens, "return_dict_in_generate": True}
    inputs = {"input_ids": ids, "attention_mask": mask}
    return model.generate(**inputs, generation_config=GenerationConfig(**options))


def _token_rows(
    model: Any, tokenizer: Any, prompts: Any, template: Any, system: Any, new: int
) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of strings; for one prompt write [prompt]")
    if new < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {new}")
    if template is None and system is not None:
        raise ValueError("with template=None the system text stands in the prompt")
    rows = []
    for i, prompt in enumerate(prompts):
        if not isinstance(prompt, str if template is None else str | Mapping):
            raise TypeError(f"prompt {i} is {type(prompt).__name__}, not a string")
        if template is None:
            bos = tokenizer.bos_token
            add = not (bos and prompt.startswith(bos))
            row = list(tokenizer(prompt, add_special_tokens=add)["input_ids"])
        else:
            row = generation_prompt(prompt, tokenizer, template=template, system=system)
        if not row:
            raise ValueError(f"prompt {i} has no tokens")
        _refuse_unreadable(model, row, f"prompt {i}", new)
        rows.append(row)
    return rows


def _refuse_unreadable(model: Any, row: Any, place: str, new: int = 0) -> None:
    """A ValueError about tokens that a model has no embedding, or no position, for."""
    base = base_model(model)
    longest = getattr(base.config, "max_position_embeddings", 0)
    embeddings = len(base.get_input_embeddings().weight)
    learned = _prompt_method(model) is not None
    virtual = model.active_peft_config.num_virtual_tokens if learned else 0
    if max(row) >= embeddings:
        raise ValueError(
            f"{place}: token {max(row)} is beyond the {embeddings} embeddings: call "
            "model.resize_token_embeddings(len(tokenizer))"
        )
    if 0 < longest < virtual + len(row) + new:
        more = f" and {virtual} virtual ones" if virtual else ""
        raise ValueError(
            f"{place} has {len(row)} tokens{more}; with {new} new ones it exceeds the "
            f"{longest} that this model can read"
        )


def _stop_ids(model: Any, tokenizer: Any, template: Any) -> set[int]:
    """End of turn of the template, end of sequence of tokenizer and model."""
    stop = set() if template is None else set(end_of_turn_ids(tokenizer, template))
    settings = getattr(base_model(model), "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    stop |= set(eos) if isinstance(eos, list | tuple) else {eos}
    return (stop | {tokenizer.eos_token_id}) - {None}


def _text(tokenizer: Any, tokens: list[int]) -> str:
    options = {"skip_special_tokens": True, "clean_up_tokenization_spaces": False}
    return tokenizer.decode(tokens, **options)
