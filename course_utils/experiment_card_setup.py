"""A case whose memory is predicted, then measured on a card: settings, plan, model.

Models that are not built in get random weights in their published shapes: bytes do not
depend on what the weights are.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from typing import Any

from course_utils.data import load_examples
from course_utils.formatting import tokenize_dataset
from course_utils.memory import MemoryEstimate, estimate_memory, model_config, t4_plan
from course_utils.models import keep_4bit_weights_in_place, load_model
from course_utils.parameters import peft_config

BUILT_IN = "smollm2-135m"
SHORTER = 5  # tokens that one record of a batch lacks, so that there is padding


@dataclass(frozen=True)
class CardExperiment:
    """One case, described completely.

    Attributes:
        label: what a figure calls it.
        model: a name in `memory.KNOWN_MODELS`.
        method: `"full"`, `"lora"`, `"qlora"`, `"prompt_tuning"`, `"prefix_tuning"`.
        batch_size, sequence_length: B and T; all tokens are learned. A batch of more
            than one has padding.
        way: `"T4"`, what that card would be asked for; or `"own"`, bfloat16 and every
            kernel of the card that is there.
        gradient_checkpointing, optimizer, double_quant: as in `estimate_memory`.
        loss: `"chunked"`, by TRL's trainer, or `"logits"`, by transformers'.
        options: PEFT's fields for the method.
        steps: the last one is what counts: the gradient scaler may skip the first.
        data: tokens are taken from this data set.
    """

    label: str
    model: str
    method: str
    batch_size: int
    sequence_length: int
    way: str = "T4"
    gradient_checkpointing: bool = False
    optimizer: str = "adamw"
    double_quant: bool = True
    loss: str = "chunked"
    options: dict[str, Any] = field(default_factory=dict)
    steps: int = 4
    learning_rate: float = 1e-4
    seed: int = 0
    data: str = "instructions"

    # What `experiment_lists.estimate_seconds` asks of any experiment.
    kind = "encoder"
    eval_every = eval_examples = test_examples = 0
    forgetting = False

    def settings(self) -> dict[str, Any]:
        """All fields but label and seed, as a record holds them.

        The first records know of no other loss than the chunked one.
        """
        left_out = {"label", "seed"} | ({"loss"} if self.loss == "chunked" else set())
        return {k: v for k, v in asdict(self).items() if k not in left_out}


def plan_of(experiment: CardExperiment) -> MemoryEstimate:
    """What a reader predicts before the run: the closed form.

    Raises:
        ValueError: as `estimate_memory`; or the way is neither `"T4"` nor `"own"`.
    """
    shared = {
        "batch_size": experiment.batch_size,
        "sequence_length": experiment.sequence_length,
        "gradient_checkpointing": experiment.gradient_checkpointing,
        "optimizer": experiment.optimizer,
        "double_quant": experiment.double_quant,
        "loss": experiment.loss,
        **experiment.options,
    }
    if experiment.way == "T4":
        return t4_plan(experiment.model, experiment.method, **shared)
    if experiment.way != "own":
        raise ValueError(f"way {experiment.way!r} is neither 'T4' nor 'own'")
    return estimate_memory(
        experiment.model,
        experiment.method,
        dtype="float32" if experiment.method == "full" else "bfloat16",
        autocast="bfloat16",
        **shared,
    )


def random_model(
    config: Any, *, dtype: Any, device: str, quantization: Any = None
) -> Any:
    """A causal model of a configuration with random weights, made on the device.

    One matrix after the other is made and, if asked, packed by bitsandbytes: the whole
    never exists in 16 bits.

    Args:
        config: a `transformers` configuration of the Llama, Mistral or Qwen2 family.
        dtype: torch dtype of what is not packed.
        device: where.
        quantization: a `BitsAndBytesConfig` for 4 bits, or None.
    """
    import torch
    from torch import nn
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, attn_implementation="sdpa"
        )
    head, made = model.get_output_embeddings(), {}
    for name, module in list(model.named_modules()):
        if (
            quantization is not None
            and type(module) is nn.Linear
            and module is not head
        ):
            parent, _, last = name.rpartition(".")
            packed = _packed(module, quantization, dtype, device)
            setattr(model.get_submodule(parent), last, packed)
    for module in model.modules():
        for name, old in list(module._parameters.items()):
            if old is None or not old.is_meta:
                continue
            if id(old) not in made:  # tied weights stay tied
                new = torch.zeros(old.shape, dtype=dtype, device=device)
                if old.dim() == 1 and name == "weight":
                    new.fill_(1)  # a norm
                elif old.dim() > 1:
                    new.normal_(std=0.02)
                made[id(old)] = (nn.Parameter(new), old)
            module._parameters[name] = made[id(old)][0]
    with torch.device(device):
        rotary = model.model.rotary_emb
        model.model.rotary_emb = type(rotary)(config=model.config)
    left = [n for n, t in model.named_buffers() if t.is_meta]
    if left:
        raise ValueError(f"{type(model).__name__}: no values for {left}")
    if quantization is not None:
        model.is_loaded_in_4bit = True
        model.config.quantization_config = quantization
        keep_4bit_weights_in_place(model)
    return model.eval()


def _packed(linear: Any, quantization: Any, dtype: Any, device: str) -> Any:
    """A Linear4bit of the same shape, with random weights, packed on the device."""
    import bitsandbytes as bnb
    import torch

    options = {
        "compress_statistics": quantization.bnb_4bit_use_double_quant,
        "quant_type": quantization.bnb_4bit_quant_type,
    }
    layer = bnb.nn.Linear4bit(
        linear.in_features,
        linear.out_features,
        bias=linear.bias is not None,
        compute_dtype=quantization.bnb_4bit_compute_dtype,
        device="meta",
        **options,
    )
    weight = torch.empty(linear.weight.shape, dtype=dtype, device=device)
    weight.normal_(std=0.02)
    layer.weight = bnb.nn.Params4bit(
        weight, requires_grad=False, module=layer, **options
    ).to(device)
    if layer.bias is not None:
        bias = torch.zeros(linear.out_features, dtype=dtype, device=device)
        layer.bias = torch.nn.Parameter(bias)
    return layer


def make_card_model(
    experiment: CardExperiment, plan: MemoryEstimate, device: str, config: Any = None
) -> Any:
    """The model of a case as the course trains it, with its adapter.

    Args:
        experiment: the case.
        plan: of `plan_of`; says the dtype.
        device: `"cuda"`, or `"cpu"` for tests.
        config: in place of the model's own, for tests.
    """
    import torch
    from peft import get_peft_model
    from transformers import BitsAndBytesConfig

    dtype, quantization = getattr(torch, plan.request.dtype), None
    if plan.request.quantization:
        quantization = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type=plan.request.quantization,
            bnb_4bit_use_double_quant=experiment.double_quant,
            bnb_4bit_compute_dtype=dtype,
        )
    if experiment.model == BUILT_IN and config is None:
        model = load_model(dtype=dtype, quantization=quantization)
    else:
        model = random_model(
            config or model_config(experiment.model),
            dtype=dtype,
            device=device,
            quantization=quantization,
        )
    if experiment.method == "full":
        return model
    method = "lora" if experiment.method == "qlora" else experiment.method
    adapter = peft_config(method, task_type="CAUSAL_LM", **experiment.options)
    return get_peft_model(model, adapter)


def card_records(experiment: CardExperiment, tokenizer: Any, vocab: int) -> list[dict]:
    """One batch: B records of T tokens of the data set, the last of them shorter."""
    rows = tokenize_dataset(load_examples(experiment.data), tokenizer)
    tokens = [i % vocab for ids in rows["input_ids"] for i in ids]
    B, T = experiment.batch_size, experiment.sequence_length
    tokens *= -(-B * T // len(tokens))
    found = []
    for place in range(B):
        end = T - SHORTER if place == B - 1 and B > 1 else T
        ids = tokens[place * T : place * T + end]
        found.append(
            {"input_ids": ids, "labels": ids, "attention_mask": [1] * len(ids)}
        )
    return found
