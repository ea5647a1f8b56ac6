"""Generate answers: batched, streamed, and side by side.

Every function takes the user's raw text and lays it out by a template; text that
looks like a special token stays text. The model and the tokenizer are left as found.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from course_utils.comparison import Comparison
from course_utils.decoding import (
    Pick,
    base_model,
    decode_rows,
    decodes,
    inference_state,
    library_rows,
    virtual_length,
)
from course_utils.formatting import end_of_turn_ids, generation_prompt

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from course_utils.formatting import Template

__all__ = ["Comparison", "compare_generations", "generate", "stream"]


def generate(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str | Mapping[str, Any]],
    *,
    template: str | Template | None = "chatml",
    system: str | None = None,
    max_new_tokens: int = 64,
    batch_size: int | None = None,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> list[str]:
    """Answer each prompt; greedy, so the same answers every time.

    A batch holds prompts of similar length, padded on the left, and each answer is
    the one that its prompt gets alone (in 16 bits a near tie may fall otherwise).
    An answer ends before the template's end of turn or the model's end of sequence.
    A repetition penalty in the model's own generation settings is not applied.

    Args:
        model: any causal language model, a PEFT model included, in any mode.
        tokenizer: its tokenizer; only read, its padding side does not matter.
        prompts: user texts, or texts that are laid out already (``template=None``);
            a record in place of a text is laid out with its fields, a last answer
            left out.
        template: a name in ``formatting.TEMPLATES``; None adds nothing.
        system: system text; None takes the template's default.
        max_new_tokens: an answer is cut there.
        batch_size: prompts at once; None means 128 on a CPU, 32 elsewhere.
        do_sample: draw from the model's distribution instead of taking its maximum.
        temperature: divides the logits; only with `do_sample`.
        top_p: keep the likeliest tokens that reach this probability; only with
            `do_sample`.
        seed: of the drawing; None continues torch's own.

    Returns:
        One string a prompt, in the order of `prompts`.

    Raises:
        TypeError: `prompts` is one string, or holds something else than strings
            and records.
        ValueError: an empty prompt, one too long for the model, or an option out of
            its range.
    """
    import torch

    rows = _token_rows(model, tokenizer, prompts, template, system, max_new_tokens)
    stop = _stop_ids(model, tokenizer, template)
    pick = _picker(model, do_sample, temperature, top_p, seed)
    if batch_size is None:
        batch_size = 128 if base_model(model).device.type == "cpu" else 32
    if batch_size < 1:
        raise ValueError(f"batch_size must be 1 or more, not {batch_size}")
    settings = {"stop": stop, "max_new_tokens": max_new_tokens}
    options = {"do_sample": do_sample}
    if do_sample:
        options |= {"temperature": temperature, "top_p": top_p, "top_k": 0}

    own_loop = decodes(model)
    order = sorted(range(len(rows)), key=lambda i: len(rows[i]), reverse=True)
    answers: list[list[int]] = [[] for _ in rows]
    fork = torch.random.fork_rng(enabled=seed is not None and not own_loop)
    with torch.no_grad(), inference_state(model), fork:
        if seed is not None and not own_loop:
            torch.manual_seed(seed)  # once: each batch draws anew
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [rows[i] for i in chosen]
            if own_loop:
                for pairs in decode_rows(model, batch, pick=pick, **settings):
                    for row, token in pairs:
                        answers[chosen[row]].append(token)
            else:
                written = library_rows(model, batch, options=options, **settings)
                for i, tokens in zip(chosen, written, strict=True):
                    answers[i] = tokens
    return [_text(tokenizer, tokens) for tokens in answers]


def stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompt: str,
    *,
    template: str | Template | None = "chatml",
    system: str | None = None,
    max_new_tokens: int = 256,
    do_sample: bool = False,
    temperature: float = 1.0,
    top_p: float = 1.0,
    seed: int | None = None,
) -> Iterator[str]:
    """Answer one prompt, piece by piece as it is written.

    The pieces together are the string that ``generate`` returns. Until the last piece
    is taken, or the iterator is closed, the model stays in evaluation mode. A model
    that only ``model.generate`` can run gives its answer in one piece.

    Args:
        model, tokenizer, template, system: as for ``generate``.
        prompt: one user text.
        max_new_tokens, do_sample, temperature, top_p, seed: as for ``generate``.

    Returns:
        An iterator over pieces of text, none empty.

    Raises:
        TypeError: `prompt` is not a string.
        ValueError: as for ``generate``.
    """
    if not isinstance(prompt, str):
        raise TypeError(f"the prompt is a string, not {type(prompt).__name__}")
    sampling = {"do_sample": do_sample, "temperature": temperature}
    sampling |= {"top_p": top_p, "seed": seed}
    layout = {"template": template, "system": system, "max_new_tokens": max_new_tokens}
    if not decodes(model):
        return iter(generate(model, tokenizer, [prompt], **layout, **sampling))
    rows = _token_rows(model, tokenizer, [prompt], template, system, max_new_tokens)
    stop = _stop_ids(model, tokenizer, template)
    pick = _picker(model, **sampling)
    return _pieces(model, tokenizer, rows, stop, max_new_tokens, pick)


def _pieces(model, tokenizer, rows, stop, max_new_tokens, pick) -> Iterator[str]:
    import torch

    tokens: list[int] = []
    sent = ""
    with inference_state(model):
        steps = decode_rows(
            model, rows, stop=stop, max_new_tokens=max_new_tokens, pick=pick
        )
        while True:
            with torch.no_grad():  # not around the yield: it would reach the caller
                pairs = next(steps, [])
            if not pairs:
                break
            tokens.append(pairs[0][1])
            text = _text(tokenizer, tokens)
            whole = not text.endswith("\ufffd")  # half a character: wait for the rest
            if whole and len(text) > len(sent) and text.startswith(sent):
                yield text[len(sent) :]
                sent = text
        rest = _text(tokenizer, tokens)[len(sent) :]
        if rest:
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
        tokenizer: the tokenizer of all these models.
        prompts: user texts.
        references: the right answers, for a last column.
        options: passed on to ``generate``.

    Raises:
        ValueError: a list of answers, or of references, has not one for each prompt.

    >>> both = compare_generations({"before": ["Sure!"], "after": ["{}"]}, None, ["Hi"])
    >>> print(both)
    prompt  Hi
    before  Sure!
    after   {}
    """
    answers = {}
    for name, model in models.items():
        given = isinstance(model, list | tuple)
        made = model if given else generate(model, tokenizer, prompts, **options)
        if len(made) != len(prompts):
            raise ValueError(f"{name}: {len(made)} answers to {len(prompts)} prompts")
        answers[name] = tuple(made)
    if references is not None and len(references) != len(prompts):
        raise ValueError(f"{len(references)} references for {len(prompts)} prompts")
    right = None if references is None else tuple(references)
    return Comparison(tuple(prompts), answers, right)


def _token_rows(
    model: Any, tokenizer: Any, prompts: Any, template: Any, system: Any, new: int
) -> list[list[int]]:
    if isinstance(prompts, str):
        raise TypeError("prompts is a list of strings; for one prompt write [prompt]")
    if new < 1:
        raise ValueError(f"max_new_tokens must be 1 or more, not {new}")
    if template is None and system is not None:
        raise ValueError("with template=None the system text stands in the prompt")
    rows, longest = [], getattr(base_model(model).config, "max_position_embeddings", 0)
    virtual = virtual_length(model)
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
        if longest and virtual + len(row) + new > longest:
            learned = f" and {virtual} virtual ones" if virtual else ""
            raise ValueError(
                f"prompt {i} has {len(row)} tokens{learned}; with {new} new ones it "
                f"exceeds the {longest} that this model can read"
            )
        rows.append(row)
    return rows


def _stop_ids(model: Any, tokenizer: Any, template: Any) -> set[int]:
    """End of turn of the template, end of sequence of tokenizer and model."""
    stop = set() if template is None else set(end_of_turn_ids(tokenizer, template))
    settings = getattr(base_model(model), "generation_config", None)
    eos = getattr(settings, "eos_token_id", None)
    stop |= set(eos) if isinstance(eos, list | tuple) else {eos}
    return (stop | {tokenizer.eos_token_id}) - {None}


def _picker(
    model: Any, do_sample: bool, temperature: float, top_p: float, seed: int | None
) -> Pick:
    import torch

    if not do_sample:
        return lambda logits: logits.max(-1).indices  # twice as fast as argmax
    if not (temperature > 0 and 0 < top_p <= 1):
        raise ValueError("sampling needs temperature > 0 and 0 < top_p <= 1")
    generator = None
    if seed is not None:
        device = base_model(model).device
        generator = torch.Generator(device).manual_seed(seed)

    def draw(logits: torch.Tensor) -> torch.Tensor:
        chances = (logits.float() / temperature).softmax(-1)
        chances, tokens = chances.sort(-1, descending=True)
        chances[chances.cumsum(-1) - chances >= top_p] = 0  # the likeliest one stays
        drawn = torch.multinomial(chances, 1, generator=generator)
        return tokens.gather(-1, drawn)[:, 0]

    return draw


def _text(tokenizer: Any, tokens: list[int]) -> str:
    return tokenizer.decode(
        tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
