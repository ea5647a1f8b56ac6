"""Examples become batches: dynamic padding, and packing without a leak."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

from course_utils.encoding import IGNORE

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase


class CompletionCollator:
    """Pads a list of examples to the longest of them and makes LongTensors (B, T).

    Padding is known by its position, never by its id: it has attention mask 0 and
    label -100, and an end-of-turn token keeps its label where pad = eos. Examples
    from `pack_examples` give `position_ids` in place of an attention mask; their
    padding is a document of its own, which nothing else attends to.

    Attributes:
        tokenizer: gives the id to pad with (its pad token, else eos, else 0).
        pad_to_multiple_of: round T up to a multiple of this.
        padding_side: "right" for training, "left" for generation.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        pad_to_multiple_of: int | None = None,
        padding_side: str = "right",
    ) -> None:
        if padding_side not in ("left", "right"):
            raise ValueError(f"padding_side is 'left' or 'right', not {padding_side!r}")
        self.tokenizer = tokenizer
        self.pad_to_multiple_of = pad_to_multiple_of
        self.padding_side = padding_side

    def __call__(
        self, examples: Sequence[Mapping[str, Sequence[int]]]
    ) -> dict[str, torch.Tensor]:
        import torch

        length = max(len(example["input_ids"]) for example in examples)
        multiple = self.pad_to_multiple_of or 1
        length = -(-length // multiple) * multiple
        candidates = (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0)
        pad = next(token for token in candidates if token is not None)
        packed = "position_ids" in examples[0]
        rows: dict[str, list] = {"input_ids": [], "labels": []}
        rows["position_ids" if packed else "attention_mask"] = []
        for example in examples:
            ids = list(example["input_ids"])
            extra = length - len(ids)
            filling = {
                "input_ids": (ids, [pad] * extra),
                "labels": (list(example["labels"]), [IGNORE] * extra),
            }
            if packed:
                positions = list(example["position_ids"])
                filling["position_ids"] = (positions, list(range(extra)))
            else:
                mask = list(example.get("attention_mask", [1] * len(ids)))
                filling["attention_mask"] = (mask, [0] * extra)
            for name, (values, padding) in filling.items():
                right = self.padding_side == "right"
                rows[name].append(values + padding if right else padding + values)
        return {name: torch.tensor(values) for name, values in rows.items()}


def pack_examples(
    examples: Iterable[Mapping[str, Sequence[int]]], max_length: int
) -> list[dict[str, list[int]]]:
    """Put whole examples side by side in rows of at most `max_length` tokens.

    First-fit decreasing: longest first (ties in the given order), each into the first
    row with room. Positions begin again at 0 with each example, by which transformers
    keeps examples from seeing each other: pass `position_ids` and no attention mask,
    in training or with `use_cache=False`. The first label of each example is -100, as
    it would be predicted from the example before.

    Raises:
        ValueError: an example is empty or longer than `max_length`.

    >>> short, long = [[{"input_ids": x, "labels": x}] for x in ([7, 8], [4, 5, 6])]
    >>> pack_examples(short + long, 8)[0]["position_ids"]
    [0, 1, 2, 0, 1]
    """
    examples = list(examples)
    for i, example in enumerate(examples):
        length = len(example["input_ids"])
        if not 0 < length <= max_length:
            raise ValueError(
                f"example {i} has {length} tokens: give each 1 to {max_length} "
                "(tokenize with that max_length, or raise it)"
            )
    rows: list[dict[str, list[int]]] = []
    for example in sorted(examples, key=lambda e: -len(e["input_ids"])):
        ids, labels = list(example["input_ids"]), list(example["labels"])
        room = max_length - len(ids)
        row = next((row for row in rows if len(row["input_ids"]) <= room), None)
        if row is None:
            row = {"input_ids": [], "labels": [], "position_ids": []}
            rows.append(row)
        row["input_ids"] += ids
        row["labels"] += [IGNORE, *labels[1:]]
        row["position_ids"] += range(len(ids))
    return rows
