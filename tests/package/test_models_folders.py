"""Folders that hold no model, or another than they say: what is wrong, what to do."""

import json

import pytest
import torch
from peft import LoraConfig, PromptTuningConfig, get_peft_model
from safetensors.torch import load_file, save_file
from small_models import byte_tokenizer, random_llama, small_bert
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from course_utils.models import (
    ModelUnavailable,
    load_classifier,
    load_model,
    load_tokenizer,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def save(folder, model=None, *, tokenizer=True, **more):
    """A whole folder, as a training leaves it."""
    (model or random_llama()).save_pretrained(folder, **more)
    if tokenizer:
        byte_tokenizer().save_pretrained(folder)
    return folder


def edit(path, **changes):
    """Change entries of a JSON file; an Ellipsis takes one out."""
    entries = json.loads(path.read_text()) | changes
    entries = {name: value for name, value in entries.items() if value is not ...}
    path.write_text(json.dumps(entries))


def change_weights(folder, change, file="model.safetensors"):
    save_file(change(load_file(folder / file)), folder / file, {"format": "pt"})


def refused(folder, *words, load=load_model):
    with pytest.raises(ModelUnavailable) as caught:
        load(str(folder))
    message = str(caught.value)
    assert f"{str(folder)!r} could not be loaded" in message
    for word in (*words, "Cure"):
        assert word in message, message
    return message


# --- the tokenizer ---


def test_a_folder_without_a_tokenizer(tmp_path):
    folder = save(tmp_path / "model", tokenizer=False)
    assert load_model(folder).config.vocab_size == 259
    refused(
        folder,
        "no tokenizer in it",
        f"tokenizer.save_pretrained({str(folder)!r})",
        "load_tokenizer('name of the base model')",
        load=load_tokenizer,
    )
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no tokenizer in it", load=load_tokenizer)


def adapter(folder, base, config=None):
    model = AutoModelForCausalLM.from_pretrained(base)
    config = config or LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    get_peft_model(model, config).save_pretrained(folder)
    return folder


def test_an_adapters_folder_without_a_tokenizer_names_its_base(tmp_path):
    base = save(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base)
    assert load_model(folder).config.vocab_size == 259
    words = ("no tokenizer in it", f"load_tokenizer({str(base)!r})")
    refused(folder, *words, load=load_tokenizer)
    byte_tokenizer().save_pretrained(folder)
    assert len(load_tokenizer(folder)) == 259


def test_a_tokenizer_that_cannot_be_read(tmp_path):
    folder = save(tmp_path / "model")
    (folder / "tokenizer.json").write_text("{")
    refused(folder, "double quotes", load=load_tokenizer)


def test_a_classifier_without_a_tokenizer(tmp_path):
    small_bert(num_labels=2)[0].save_pretrained(tmp_path / "bert")
    refused(
        tmp_path / "bert",
        "no tokenizer in it",
        load=lambda folder: load_classifier(folder, num_labels=2),
    )


# --- weights and config.json ---


@pytest.mark.parametrize(
    "changes",
    [
        {"hidden_size": 64},
        {"intermediate_size": 64},
        {"vocab_size": 300},
        {"num_key_value_heads": 4},
        {"num_hidden_layers": 3},
        {"num_hidden_layers": 1},
        {"attention_bias": True},
        {"model_type": "gpt2", "architectures": ["GPT2LMHeadModel"]},
    ],
    ids=str,
)
@pytest.mark.parametrize("quantization", [None, "nf4", "int8"])
def test_weights_that_do_not_fit(changes, quantization, tmp_path):
    folder = save(tmp_path / "model")
    edit(folder / "config.json", **changes)
    refused(
        folder,
        "the weights do not fit config.json",
        "such as ",
        load=lambda name: load_model(name, quantization=quantization),
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda w: {k: v for k, v in w.items() if "q_proj" not in k}, "2 tensors are"),
        (lambda w: {k: v for k, v in w.items() if "lm_head" not in k}, "lm_head"),
        (lambda w: {"x." + k: v for k, v in w.items()}, "21 tensors are not"),
        (lambda w: w | {"lm_head.bias": torch.ones(259)}, "lm_head.bias"),
    ],
    ids=["no queries", "no head", "other names", "a bias more"],
)
def test_layers_that_would_be_random_or_unread(change, words, tmp_path):
    folder = save(tmp_path / "model")
    change_weights(folder, change)
    refused(folder, "the weights do not fit config.json", words)


def test_weights_in_8_bits_that_lost_their_mark(tmp_path):
    base = save(tmp_path / "base")
    eight = load_model(base, quantization="int8", dtype=torch.float32)
    folder = save(tmp_path / "eight", eight)
    assert load_model(folder).is_loaded_in_8bit
    edit(folder / "config.json", quantization_config=...)
    refused(folder, "in the file and not in the model", "SCB")


def test_an_encoder_is_no_language_model_but_gets_a_new_head(tmp_path):
    folder = save(tmp_path / "bert", small_bert(num_labels=2)[0])
    refused(folder, "tensors are not among the weights", "cls.predictions")
    load_classifier(str(folder), num_labels=2)
    words = "do not fit config.json and num_labels", "classifier.bias is (2,), not (3,)"
    refused(folder, *words, load=lambda name: load_classifier(name, num_labels=3))
    edit(folder / "config.json", num_hidden_layers=3)
    refused(
        folder,
        "bert.encoder.layer.2",
        load=lambda name: load_classifier(name, num_labels=2),
    )
    language = save(tmp_path / "llama")
    model, _ = load_classifier(str(language), num_labels=3)  # its head is new
    assert model.score.weight.shape == (3, 32)


FAMILIES = {
    "llama": {"tie_word_embeddings": True},
    "gpt2": {},
    "opt": {"ffn_dim": 64, "word_embed_proj_dim": 32},
    "gemma3_text": {"head_dim": 8},
    "qwen3": {"head_dim": 8},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_neox": {},
    "bloom": {},
    "falcon": {},
    "mamba": {},
}


@pytest.mark.parametrize("name", FAMILIES)
def test_what_fits_is_loaded_whatever_the_family(name, tmp_path):
    base = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    base |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    base |= {"num_key_value_heads": 2, "max_position_embeddings": 64}
    config = AutoConfig.for_model(name, **(base | FAMILIES[name]))
    model = AutoModelForCausalLM.from_config(config)
    model.save_pretrained(tmp_path)
    loaded = load_model(tmp_path, dtype=torch.float32).state_dict()
    for key, tensor in model.state_dict().items():
        assert torch.equal(loaded[key], tensor), key
    load_model(tmp_path, quantization="nf4", dtype=torch.float32)


def test_what_old_files_hold_besides_is_no_misfit(tmp_path):
    folder = save(tmp_path / "model", random_llama(tie_word_embeddings=True))
    change_weights(
        folder,
        lambda weights: (
            weights
            | {
                "lm_head.weight": weights["model.embed_tokens.weight"].clone(),
                "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4),
            }
        ),
    )
    load_model(folder)


# --- files ---


def test_folders_that_are_none_or_hold_nothing(tmp_path):
    folder = save(tmp_path / "model")
    for load in (load_model, load_tokenizer):
        file = folder / "model.safetensors"
        refused(file, "a file; name the folder that it lies in", load=load)
    (tmp_path / "empty").mkdir()
    refused(tmp_path / "empty", "no config.json in it")
    byte_tokenizer().save_pretrained(tmp_path / "words")
    refused(tmp_path / "words", "no config.json in it")
    assert len(load_tokenizer(tmp_path / "words")) == 259


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"model_type": ...}, "model_type"),
        ({"model_type": "newllama"}, "newllama"),
        ({"hidden_size": "wide"}, "hidden_size"),
        ({"auto_map": {"AutoConfig": "m.C"}, "model_type": "own"}, "custom code"),
        ({"quantization_config": {"quant_method": "gptq", "bits": 4}}, "optimum"),
        ({"quantization_config": {"quant_method": "awq", "bits": 4}}, "gptqmodel"),
        ({"quantization_config": {"quant_method": "aqlm"}}, "pip install aqlm"),
    ],
    ids=str,
)
def test_a_config_that_cannot_be_followed(changes, words, tmp_path):
    folder = save(tmp_path / "model")
    edit(folder / "config.json", **changes)
    refused(folder, words)


@pytest.mark.parametrize("left", [0, 50, 5000])
def test_weights_cut_short(left, tmp_path):
    folder = save(tmp_path / "model")
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:left])
    refused(folder, "header")


def test_a_shard_that_is_not_there(tmp_path):
    folder = save(tmp_path / "model", max_shard_size="20KB")
    sorted(folder.glob("model-*"))[0].unlink()
    refused(folder, "No such file", "model-00001-of")


# --- adapters ---


def test_an_adapter_of_another_base_or_of_none(tmp_path):
    base = save(tmp_path / "base")
    folder = adapter(tmp_path / "adapter", base)
    settings = folder / "adapter_config.json"
    other = save(tmp_path / "other", random_llama(hidden_size=64))
    deep = save(tmp_path / "deep", random_llama(num_hidden_layers=3))
    for model, word in ((other, "(4, 32), not (4, 64)"), (deep, "layers.2")):
        edit(settings, base_model_name_or_path=str(model))
        refused(folder, word, f"an adapter of the model {str(model)!r}")
    edit(settings, base_model_name_or_path=str(tmp_path / "gone"))
    gone = repr(str(tmp_path / "gone"))
    refused(folder, "no base model", f"an adapter of the model {gone}")
    edit(settings, base_model_name_or_path=None)
    refused(folder, "(it names none)")


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"target_modules": ["nothing"]}, "nothing"),
        ({"peft_type": "NEWLORA"}, "'NEWLORA' is not known"),
    ],
    ids=str,
)
def test_an_adapter_that_cannot_be_followed(changes, words, tmp_path):
    folder = adapter(tmp_path / "adapter", save(tmp_path / "base"))
    edit(folder / "adapter_config.json", **changes)
    refused(folder, words, "an adapter of the model")


def test_an_adapter_that_lacks_weights(tmp_path):
    folder = adapter(tmp_path / "adapter", save(tmp_path / "base"))
    file = "adapter_model.safetensors"
    change_weights(
        folder, lambda w: {k: v for k, v in w.items() if "layers.1" not in k}, file
    )
    refused(folder, "2 tensors are not among the weights", "lora_A")
    (folder / file).unlink()
    refused(folder, file)


def test_virtual_tokens_in_a_folder(tmp_path):
    config = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=4)
    folder = adapter(tmp_path / "adapter", save(tmp_path / "base"), config)
    refused(folder, "an adapter of the model")


def test_more_tokens_than_embeddings_are_no_fault_of_the_folder(tmp_path):
    """Who adds tokens resizes next; training and generating check it."""
    folder = save(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["KITCHEN"])
    tokenizer.save_pretrained(folder)
    assert len(load_tokenizer(folder)) == 260
    assert load_model(folder).config.vocab_size == 259
