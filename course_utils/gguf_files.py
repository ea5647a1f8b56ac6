"""From llama.cpp's GGUF file to a folder that `from_pretrained` reads."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def convert_gguf(source: Path, target: Path) -> None:
    """Read a GGUF file through transformers and save plain safetensors (float32).

    Args:
        source: the file.
        target: an empty folder; gets weights, configuration and tokenizer.

    Raises:
        ValueError: the file's tokenizer is no byte-level BPE.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    place = {"pretrained_model_name_or_path": source.parent, "gguf_file": source.name}
    read = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    # A model read from GGUF refuses save_pretrained ("quantized"): its weights are
    # plain float32 by now, so a model without that mark takes them over.
    settings = read.config.to_dict()
    settings.pop("quantization_config", None)
    settings["_name_or_path"] = ""
    config = AutoConfig.for_model(**settings)
    with torch.device("meta"):
        plain = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    plain.load_state_dict(read.state_dict(), assign=True)
    plain.tie_weights()
    plain.generation_config = read.generation_config
    plain.save_pretrained(target)
    gguf_tokenizer(source).save_pretrained(target)


def gguf_tokenizer(source: Path) -> Any:
    """Make the byte-level BPE tokenizer that a GGUF file of the kind "gpt2" describes.

    Not left to transformers: 5.15 and 5.23 make different ones of the same file, and
    in 5.15's the start of a turn stands for its end.

    Args:
        source: the file.

    Returns:
        The tokenizer, with the file's chat template and special tokens.

    Raises:
        ValueError: the file holds another kind of tokenizer.
    """
    from gguf import GGUFReader
    from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers, processors
    from tokenizers.models import BPE
    from transformers import PreTrainedTokenizerFast

    fields = GGUFReader(source).fields

    def read(name: str) -> Any:
        return fields[f"tokenizer.{name}"].contents()

    if read("ggml.model") != "gpt2":
        raise ValueError(f"{source.name}: {read('ggml.model')!r} is not byte BPE")
    tokens = read("ggml.tokens")
    merges = [tuple(pair.split(" ")) for pair in read("ggml.merges")]
    model = BPE(
        vocab={token: i for i, token in enumerate(tokens)},
        merges=merges,
        continuing_subword_prefix="",
        end_of_word_suffix="",
    )
    made = Tokenizer(model)
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    made.post_processor = processors.TemplateProcessing(
        single="$A:0", pair="$A:0 $B:1", special_tokens=[]
    )
    control = 3  # llama.cpp's token type of what a text can never contain
    kinds = read("ggml.token_type")
    made.add_special_tokens(
        [
            AddedToken(token, normalized=False, special=True)
            for token, kind in zip(tokens, kinds, strict=True)
            if kind == control
        ]
    )
    names = {"bos": "bos", "eos": "eos", "unk": "unknown", "pad": "padding"}
    ends = {f"{k}_token": tokens[read(f"ggml.{v}_token_id")] for k, v in names.items()}
    return PreTrainedTokenizerFast(
        tokenizer_object=made, chat_template=read("chat_template"), **ends
    )
