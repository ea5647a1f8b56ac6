"""Counters against PEFT, bitsandbytes and saved files; formulas against real models."""

import copy
import json

import peft
import pytest
import torch
from packaging.version import Version
from peft import (
    IA3Config,
    LoraConfig,
    PrefixTuningConfig,
    PromptEncoderConfig,
    PromptTuningConfig,
    get_peft_model,
)
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    BertConfig,
    GPT2Config,
    LlamaConfig,
    Qwen2Config,
)

from course_utils.parameters import (
    ParameterCount,
    adapter_bytes,
    adapter_parameters,
    count_parameters,
    lora_target_names,
    skeleton,
)

CLASSES = {
    "lora": LoraConfig,
    "dora": LoraConfig,
    "pissa": LoraConfig,
    "ia3": IA3Config,
    "prompt_tuning": PromptTuningConfig,
    "prefix_tuning": PrefixTuningConfig,
    "p_tuning": PromptEncoderConfig,
}
SMALL = dict(
    vocab_size=40,
    hidden_size=16,
    intermediate_size=24,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
)
CONFIGS = {
    "llama": LlamaConfig(**SMALL),
    "tied": LlamaConfig(**SMALL, tie_word_embeddings=True),
    "wide_heads": LlamaConfig(**SMALL, head_dim=6),
    "biased": LlamaConfig(**SMALL, attention_bias=True, mlp_bias=True),
    "qwen2": Qwen2Config(**SMALL),
    "gpt2": GPT2Config(vocab_size=40, n_embd=16, n_layer=2, n_head=4, n_positions=32),
}
TIED = {"ensure_weight_tying": True}
GRID = [
    ("lora", {}),
    ("lora", {"r": 3}),
    ("lora", {"r": 64, "target_modules": ["q_proj", "k_proj"]}),
    ("lora", {"r": 2, "target_modules": "all-linear"}),
    ("lora", {"r": 2, "target_modules": r".*\.1\..*(q|down)_proj"}),
    ("lora", {"target_modules": ["up_proj"], "layers_to_transform": [1]}),
    ("lora", {"target_modules": ["up_proj"], "layers_to_transform": 0}),
    (
        "lora",
        {
            "target_modules": ["up_proj"],
            "layers_to_transform": [0],
            "layers_pattern": "layers",
        },
    ),
    (
        "lora",
        {
            "target_modules": ["q_proj"],
            "exclude_modules": ["layers.0.self_attn.q_proj"],
        },
    ),
    (
        "lora",
        {
            "target_modules": "all-linear",
            "rank_pattern": {"q_proj": 5, "1.mlp.up_proj": 9},
        },
    ),
    ("lora", {"target_modules": ["embed_tokens", "q_proj"]}),
    ("lora", {"target_modules": ["lm_head", "q_proj"]}),
    ("lora", {"modules_to_save": ["lm_head"]}),
    ("lora", {"modules_to_save": ["embed_tokens", "norm"]}),
    ("lora", {"target_modules": "all-linear", "modules_to_save": ["mlp"]}),
    ("lora", {"modules_to_save": ["embed_tokens", "lm_head"], **TIED}),
    ("lora", {"target_modules": ["embed_tokens", "lm_head"], **TIED}),
    ("lora", {"trainable_token_indices": [1, 5, 7]}),
    ("lora", {"trainable_token_indices": {"embed_tokens": [1, 2]}, **TIED}),
    ("lora", {"layer_replication": [(0, 2), (0, 2)]}),
    ("lora", {"target_modules": [], "target_parameters": ["q_proj.weight"]}),
    ("lora", {"init_lora_weights": "mica"}),
    ("lora", {"init_lora_weights": "olora", "alpha_pattern": {"q_proj": 3}}),
    ("lora", {"bias": "all"}),
    ("lora", {"bias": "lora_only"}),
    ("lora", {"use_rslora": True, "lora_alpha": 32, "lora_dropout": 0.1}),
    ("pissa", {"r": 4}),
    ("dora", {"r": 4, "target_modules": "all-linear"}),
    ("dora", {"target_modules": ["embed_tokens", "down_proj"]}),
    ("ia3", {}),
    ("ia3", {"target_modules": ["k_proj", "up_proj"], "feedforward_modules": []}),
    (
        "ia3",
        {"target_modules": ["v_proj", "up_proj"], "feedforward_modules": ["up_proj"]},
    ),
    (
        "ia3",
        {
            "target_modules": r".*(q_proj|down_proj)",
            "feedforward_modules": r".*down_proj",
        },
    ),
    ("prompt_tuning", {"num_virtual_tokens": 7}),
    ("prefix_tuning", {"num_virtual_tokens": 7}),
    ("prefix_tuning", {"num_virtual_tokens": 5, "prefix_projection": True}),
    (
        "prefix_tuning",
        {"num_virtual_tokens": 5, "prefix_projection": True, "encoder_hidden_size": 11},
    ),
    ("p_tuning", {"num_virtual_tokens": 6}),
    ("p_tuning", {"num_virtual_tokens": 6, "encoder_hidden_size": 10}),
    ("p_tuning", {"num_virtual_tokens": 6, "encoder_reparameterization_type": "LSTM"}),
    (
        "p_tuning",
        {
            "num_virtual_tokens": 3,
            "encoder_reparameterization_type": "LSTM",
            "encoder_hidden_size": 5,
            "encoder_num_layers": 3,
        },
    ),
]
EXTRA = {
    ("biased", "lora", '{"bias": "all"}'),
    ("biased", "lora", '{"bias": "lora_only"}'),
    ("biased", "lora", '{"lora_bias": true}'),
    ("gpt2", "lora", "{}"),
    ("gpt2", "dora", '{"target_modules": "all-linear"}'),
    ("gpt2", "ia3", "{}"),
    ("gpt2", "prefix_tuning", '{"num_virtual_tokens": 3}'),
}
CASES = [(name, *case) for name in ("llama", "tied") for case in GRID]
CASES += [("wide_heads", *case) for case in GRID if "tuning" in case[0]]
CASES += [("qwen2", *case) for case in GRID[:6] + GRID[-8:]]
CASES += [
    (name, method, json.loads(options)) for name, method, options in sorted(EXTRA)
]


def build(name, method, options, **more):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(CONFIGS[name]))
    extra = {"dora": {"use_dora": True}, "pissa": {"init_lora_weights": "pissa"}}
    options = options | extra.get(method, {}) | more
    return get_peft_model(model, CLASSES[method](task_type="CAUSAL_LM", **options))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "method", "options"), CASES)
def test_formulas_equal_peft(name, method, options, tmp_path):
    config = CONFIGS[name]
    before = config.to_json_string()
    model = build(name, method, options)
    trainable, total = model.get_nb_trainable_parameters()
    assert adapter_parameters(config, method, **options) == trainable
    counted = count_parameters(model)
    assert (counted.trainable, counted.total) == (trainable, total)
    assert counted.bytes == 4 * total
    base = adapter_parameters(config, "full")
    # where base parameters train, too, or layers are repeated, it is no plain sum
    other = {"bias", "init_lora_weights", "layer_replication"}
    if not other & set(options):
        assert base + trainable == total
    assert config.to_json_string() == before

    if options.get("bias") == "lora_only" and Version(peft.__version__) < Version(
        "0.21"
    ):
        return  # it left these biases out of the file (mended in 0.21)
    model.save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert adapter_bytes(config, method, **options) == len(file) - header


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", {"r": 4, "target_modules": ["query", "value"]}),
        ("lora", {"r": 4, "target_modules": "all-linear"}),
        ("ia3", {"target_modules": ["key"], "feedforward_modules": []}),
        ("prompt_tuning", {"num_virtual_tokens": 5}),
        ("prefix_tuning", {"num_virtual_tokens": 5, "prefix_projection": True}),
        ("p_tuning", {"num_virtual_tokens": 5}),
    ],
)
def test_a_classifier_head_counts_as_trainable(method, options):
    config = BertConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_labels=3,
    )
    model = AutoModelForSequenceClassification.from_config(config)
    peft = CLASSES[method](task_type="SEQ_CLS", **options)
    model = get_peft_model(model, peft)
    trainable, total = model.get_nb_trainable_parameters()
    assert adapter_parameters(config, method, task_type="SEQ_CLS", **options) == (
        trainable
    )
    assert adapter_parameters(config, peft) == trainable
    base = count_parameters(skeleton(config, "SEQ_CLS")).total
    assert base + trainable == total


def test_the_published_example_comes_out_without_weights():
    llama_2_7b = LlamaConfig(num_hidden_layers=32, vocab_size=32_000, hidden_size=4096)
    added = adapter_parameters(
        llama_2_7b, "lora", r=64, target_modules=["q_proj", "v_proj"]
    )
    base = adapter_parameters(llama_2_7b, "full")
    line = str(ParameterCount(base + added, added, bytes=0))
    assert line == (
        "trainable params: 33,554,432 || all params: 6,771,970,048 || "
        "trainable%: 0.4955"
    )
    assert adapter_parameters(llama_2_7b, LoraConfig(r=64)) == 33_554_432
    assert round(adapter_bytes(llama_2_7b, "lora", r=64) / 1e6) == 134
    assert adapter_bytes(llama_2_7b, "full", dtype="float16") // 10**9 == 13
    # PEFT's method comparison, Llama-3.2-3B, rank 32 on q and v
    llama_32_3b = LlamaConfig(
        hidden_size=3072,
        intermediate_size=8192,
        num_hidden_layers=28,
        num_attention_heads=24,
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
    )
    assert adapter_parameters(llama_32_3b, "lora", r=32) == 9_175_040


def test_a_saved_copy_of_a_module_trains_its_bias_once():
    options = {"bias": "all", "modules_to_save": ["o_proj"]}
    trainable, _ = build("biased", "lora", options).get_nb_trainable_parameters()
    assert adapter_parameters(CONFIGS["biased"], "lora", **options) == trainable


def test_the_line_is_pefts_own(capsys):
    model = build("llama", "lora", {"r": 5})
    model.print_trainable_parameters()
    assert capsys.readouterr().out.strip() == str(count_parameters(model))


@pytest.mark.parametrize("tied", [False, True])
def test_tied_weights_count_once(tied):
    model = AutoModelForCausalLM.from_config(CONFIGS["tied" if tied else "llama"])
    count = count_parameters(model)
    assert count.total == sum(t.numel() for t in model.parameters())
    other = count_parameters(AutoModelForCausalLM.from_config(CONFIGS["llama"]))
    assert other.total - count.total == (40 * 16 if tied else 0)
    assert count.bytes == 4 * count.total
    assert count.trainable == count.total
    model.model.requires_grad_(False)
    assert count_parameters(model).trainable == (0 if tied else 40 * 16)


def test_meta_and_filled_models_count_alike():
    config = CONFIGS["tied"]
    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    full = AutoModelForCausalLM.from_config(config)
    assert count_parameters(empty) == count_parameters(full)
    assert adapter_parameters(config, "full") == count_parameters(full).total
    half = count_parameters(full.to(torch.bfloat16))
    assert half.bytes == 2 * half.total


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("double", [False, True])
def test_packed_4_bit_weights_count_their_elements(double):
    bnb = pytest.importorskip("bitsandbytes")
    plain = torch.nn.Sequential(torch.nn.Linear(256, 128), torch.nn.Linear(128, 64))
    packed = torch.nn.Sequential(
        *[
            bnb.nn.Linear4bit(a, b, compress_statistics=double, quant_type="nf4")
            for a, b in ((256, 128), (128, 64))
        ]
    )
    packed.load_state_dict(plain.state_dict())
    packed = packed.to("cpu")  # this packs
    elements = 256 * 128 + 128 * 64
    count = count_parameters(packed)
    assert packed[0].weight.numel() == 256 * 128 // 2
    assert count.total == count_parameters(plain).total == elements + 192
    # by arithmetic: half a byte an element, float32 biases, a scale for each block of
    # 64; double quantization keeps a scale in one byte, and for each 256 scales of a
    # layer a float32 scale of their own, and an offset a layer
    blocks = [256 * 128 // 64, 128 * 64 // 64]
    expected = elements // 2 + 4 * 192
    if double:
        expected += sum(blocks) + 4 * (2 + 1) + 4 * 2
    else:
        expected += 4 * sum(blocks)
    states = [layer.weight.quant_state for layer in packed]
    states += [state.state2 for state in states if double]
    books = {id(state.code): 4 * state.code.numel() for state in states}
    assert count.bytes == expected + sum(books.values())


@pytest.mark.filterwarnings("ignore")
def test_a_quantized_peft_model_agrees_with_peft():
    pytest.importorskip("bitsandbytes")
    import bitsandbytes as bnb

    plain = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    model = copy.deepcopy(plain)
    for name, module in list(model.named_modules()):
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            parent = model.get_submodule(name.rpartition(".")[0])
            new = bnb.nn.Linear4bit(module.in_features, module.out_features, bias=False)
            new.load_state_dict(module.state_dict())
            setattr(parent, name.rpartition(".")[2], new.to("cpu"))
    names = lora_target_names(model)
    assert names == lora_target_names(
        AutoModelForCausalLM.from_config(CONFIGS["llama"])
    )
    model = get_peft_model(model, LoraConfig(r=2, target_modules=names))
    count = count_parameters(model)
    assert (count.trainable, count.total) == model.get_nb_trainable_parameters()
    added = adapter_parameters(CONFIGS["llama"], "lora", r=2, target_modules=names)
    assert count.total == adapter_parameters(CONFIGS["llama"], "full") + added


def test_8_bit_weights_count_their_scales():
    bnb = pytest.importorskip("bitsandbytes")
    layer = bnb.nn.Linear8bitLt(64, 32, bias=False, has_fp16_weights=False)
    layer.load_state_dict(torch.nn.Linear(64, 32, bias=False).state_dict())
    layer = layer.to("cpu")
    assert layer.weight.dtype == torch.int8
    assert count_parameters(layer).total == 64 * 32
    assert count_parameters(layer).bytes == 64 * 32 + 32 * 4


def test_linear_names_are_what_peft_finds():
    model = AutoModelForCausalLM.from_config(CONFIGS["llama"])
    names = lora_target_names(model)
    assert names == sorted(
        ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    )
    by_hand = get_peft_model(model, LoraConfig(target_modules=names))
    all_linear = build("llama", "lora", {"target_modules": "all-linear"})
    assert (
        by_hand.get_nb_trainable_parameters()
        == all_linear.get_nb_trainable_parameters()
    )
    assert lora_target_names(AutoModelForCausalLM.from_config(CONFIGS["gpt2"])) == [
        "c_attn",
        "c_fc",
        "c_proj",
    ]


@pytest.mark.parametrize(
    ("method", "options", "error", "words"),
    [
        ("bitfit", {}, ValueError, "unknown method 'bitfit'; known: full, lora"),
        ("lora", {"rank": 8}, TypeError, "rank"),
        ("lora", {"target_modules": ["query"]}, ValueError, "among down_proj, gate_"),
        ("lora", {"init_lora_weights": "corda"}, ValueError, "run `preprocess_corda`"),
        ("prefix_tuning", {"num_virtual_tokens": 0}, ValueError, "num_virtual_tokens"),
        ("prompt_tuning", {}, ValueError, "needs num_virtual_tokens"),
        ("full", {"r": 8}, ValueError, "no options"),
        (LoraConfig(r=8), {"r": 8}, ValueError, "already holds"),
        ("lora", {"task_type": "IMAGES"}, ValueError, "task type"),
        ("lora", {"task_type": "SEQ_2_SEQ_LM"}, ValueError, "Seq2SeqLM builds no '"),
    ],
)
def test_errors_say_what_is_wrong(method, options, error, words):
    with pytest.raises(error, match=words):
        adapter_parameters(CONFIGS["llama"], method, **options)


def test_a_config_object_is_left_as_it_was():
    config = LoraConfig(r=3, target_modules="all-linear", bias="all")
    before = config.to_dict()
    adapter_parameters(CONFIGS["biased"], config)
    adapter_bytes(CONFIGS["biased"], config)
    assert config.to_dict() == before
