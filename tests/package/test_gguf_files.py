"""The tokenizer that is read from a GGUF file: the same under every transformers."""

import hashlib
import json

import pytest
from gguf import GGUFWriter
from transformers import AutoTokenizer

from course_utils import models as bundled
from course_utils.models import gguf_tokenizer

TOKENS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "h", "i", "Ġ", "hi", "Ġhi"]


def write(path, kind="gpt2"):
    file = GGUFWriter(path, "llama")
    file.add_tokenizer_model(kind)
    file.add_token_list(TOKENS)
    file.add_token_types([3, 3, 3, 1, 1, 1, 1, 1])
    file.add_token_merges(["h i", "Ġ hi"])
    file.add_bos_token_id(1)
    file.add_eos_token_id(2)
    file.add_unk_token_id(0)
    file.add_pad_token_id(2)
    file.add_chat_template("{{ messages[0]['content'] }}<|im_end|>")
    file.write_header_to_file()
    file.write_kv_data_to_file()
    file.close()
    return path


def test_special_tokens_are_those_that_the_file_names(tmp_path):
    gguf_tokenizer(write(tmp_path / "tiny.gguf")).save_pretrained(tmp_path / "saved")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert tokenizer.bos_token == "<|im_start|>"
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert tokenizer.unk_token == "<|endoftext|>"
    assert tokenizer("hi hi<|im_end|>")["input_ids"] == [6, 7, 2]
    assert tokenizer.decode([6, 7, 7]) == "hi hi hi"
    assert tokenizer.apply_chat_template(
        [{"role": "user", "content": "hi"}], tokenize=False
    ) == ("hi<|im_end|>")


def test_the_file_is_plain_byte_level_bpe(tmp_path):
    """What transformers 5.15 added: byte fallback, and a space for each "▁"."""
    gguf_tokenizer(write(tmp_path / "tiny.gguf")).save_pretrained(tmp_path / "saved")
    saved = json.loads((tmp_path / "saved" / "tokenizer.json").read_text("utf-8"))
    assert saved["normalizer"] is None
    assert saved["pre_tokenizer"]["type"] == saved["decoder"]["type"] == "ByteLevel"
    assert not saved["model"]["byte_fallback"]
    special = [t["content"] for t in saved["added_tokens"] if t["special"]]
    assert special == TOKENS[:3]


def test_another_kind_of_tokenizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'llama' is not byte BPE"):
        gguf_tokenizer(write(tmp_path / "other.gguf", "llama"))


@pytest.mark.model
def test_the_built_in_models_tokenizer_is_the_one_of_the_records():
    file = bundled.prepare(bundled.SMOLLM2) / "tokenizer.json"
    found = hashlib.sha256(file.read_bytes()).hexdigest()
    assert found.startswith("bf346d64f6f0fbcefb4c1b6928a98241"), (
        "made by an older course under transformers below 5.23? Remove the model cache"
    )
