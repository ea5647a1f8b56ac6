"""Every causal family of the installed transformers: counts, 4-bit bytes, memory.

What stands for the truth is a model really built, wrapped or loaded on the CPU.
"""

import copy

import peft
import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from small_models import byte_tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from course_utils.memory import estimate_memory, measure_memory, t4_plan
from course_utils.models import load_model
from course_utils.parameters import (
    adapter_bytes,
    adapter_parameters,
    count_parameters,
    lora_target_names,
    peft_config,
    skeleton,
)

pytestmark = pytest.mark.filterwarnings("ignore")


def tiny(kind, **more):
    sizes = {"vocab_size": 512, "hidden_size": 32, "intermediate_size": 64}
    sizes |= {"num_hidden_layers": 2, "num_attention_heads": 4}
    sizes |= {"num_key_value_heads": 2, "max_position_embeddings": 256}
    return AutoConfig.for_model(kind, **(sizes | more))


def trained(model):
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def really(config, method, **options):
    """What requires a gradient in a model built on the CPU and wrapped by PEFT."""
    config = copy.deepcopy(config)
    if method == "full":
        return trained(AutoModelForCausalLM.from_config(config))
    wish = peft_config(method, **({"task_type": "CAUSAL_LM"} | options))
    return trained(get_peft_model(AutoModelForCausalLM.from_config(config), wish))


MOE = {
    "mixtral": tiny("mixtral", num_local_experts=4),
    "qwen3_moe": tiny(
        "qwen3_moe",
        head_dim=16,
        moe_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "qwen2_moe": tiny(
        "qwen2_moe",
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=4,
        num_experts_per_tok=2,
    ),
    "granitemoe": tiny("granitemoe", num_local_experts=4),
    "gpt_oss": tiny("gpt_oss", num_local_experts=4, head_dim=16),
    "olmoe": tiny("olmoe", num_experts=4, num_experts_per_tok=2),
    "deepseek_v3": tiny(
        "deepseek_v3",
        num_key_value_heads=4,
        moe_intermediate_size=16,
        n_routed_experts=8,
        n_group=2,
        topk_group=1,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        q_lora_rank=16,
        kv_lora_rank=16,
        qk_rope_head_dim=8,
        qk_nope_head_dim=8,
        v_head_dim=8,
    ),
    "glm4_moe": tiny(
        "glm4_moe",
        moe_intermediate_size=16,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
        head_dim=8,
    ),
}
GPT2 = AutoConfig.for_model(
    "gpt2", n_embd=32, n_layer=2, n_head=4, vocab_size=512, n_positions=256
)
FALCON = AutoConfig.for_model(
    "falcon",
    hidden_size=32,
    num_hidden_layers=2,
    num_attention_heads=4,
    vocab_size=512,
)
GEMMA4 = tiny(
    "gemma4_text",
    head_dim=16,
    global_head_dim=32,
    layer_types=["sliding_attention", "full_attention"],
    hidden_size_per_layer_input=0,
    num_kv_shared_layers=0,
)
GEMMA3 = transformers.Gemma3Config(
    text_config=tiny("gemma3_text", head_dim=8).to_dict(),
    vision_config={
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "image_size": 28,
        "patch_size": 14,
    },
    mm_tokens_per_image=4,
)
OTHERS = {
    "gpt2": GPT2,
    "falcon": FALCON,
    "gemma4_text": GEMMA4,
    "gemma3": GEMMA3,
    "gpt_neox": tiny("gpt_neox"),
    "bloom": AutoConfig.for_model(
        "bloom", vocab_size=512, hidden_size=32, n_layer=2, n_head=4
    ),
    "gptj": AutoConfig.for_model(
        "gptj", vocab_size=512, n_embd=32, n_layer=2, n_head=4, rotary_dim=4
    ),
    "tied": tiny("qwen3", head_dim=16, tie_word_embeddings=True),
}
T5 = transformers.T5Config(
    vocab_size=512, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4
)
BERT = transformers.BertConfig(
    vocab_size=512,
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_labels=3,
)
ALL_LINEAR = {"r": 4, "target_modules": "all-linear"}

# --- every family, by a configuration that is made small without knowing it -------

SIZES = {
    64: "vocab_size n_words pronunciation_vocab_size shape_vocab_size "
    "vocab_size_per_layer_input encoder_hash_byte_group_vocab",
    66: "max_position_embeddings n_positions max_seq_len",
    32: "hidden_size d_model n_embd hidden_dim embedding_dim emb_dim input_hidden_size "
    "lru_width",
    48: "intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim n_inner "
    "moe_intermediate_size expert_ffn_hidden_size ffn_hidden_size "
    "shared_expert_intermediate_size",
    16: "hidden_size_per_layer_input",
    8: "head_dim index_head_dim",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers "
    "num_key_value_heads num_experts_per_tok moe_topk moe_k",
    4: "num_attention_heads n_head n_heads num_heads encoder_attention_heads "
    "decoder_attention_heads attention_heads num_experts num_local_experts "
    "n_routed_experts moe_num_experts index_n_heads",
}
SIZE_OF = {name: size for size, names in SIZES.items() for name in names.split()}
# fields to leave alone, where a family does not take them all
LEFT = ((), ("num_hidden_layers",), ("head_dim",), ("num_key_value_heads",))
# No configuration comes out by names alone: it lacks a field or a library, or its parts
# depend on each other.
NOT_MADE = {
    *("cohere_compass_text", "dbrx", "dots1", "gemma3n", "gemma3n_text"),
    *("gemma4_assistant", "gemma4_unified_assistant", "hunyuan_v1_dense"),
    *("hunyuan_v1_moe", "lfm2_moe", "ministral", "musicgen", "musicgen_melody"),
    *("nemotron", "reformer", "zamba"),
}
# PEFT says so itself, in both: it adapts no Mamba layer by name, and does not find the
# number of layers or heads of these.
REFUSED = {
    "lora": {"falcon_h1", "falcon_mamba", "mamba", "mamba2", "nemotron_h"},
    "virtual": {
        *("blt", "falcon_mamba", "mamba", "mpt", "prophetnet", "rwkv", "trocr"),
        *("xglm", "xlm"),
    },
}


def shrink(config, left):
    for name in config.sub_configs:
        if isinstance(part := getattr(config, name, None), PretrainedConfig):
            shrink(part, left)
    fields = config.to_dict()
    for name, size in (SIZE_OF | {"pad_token_id": 0}).items():
        if name not in left and type(fields.get(name)) is int:
            setattr(config, name, size)
    return config


def made_small(kind):
    for left in LEFT:
        try:
            config = shrink(AutoConfig.for_model(kind), left)
            size = sum(p.numel() for p in skeleton(config).parameters())
        except Exception:  # of whatever class: each family has its own
            continue
        if size < 1e7:
            return config
    return None


@pytest.mark.parametrize("kind", MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
def test_every_family_is_counted_as_peft_wraps_it_or_is_refused_by_name(kind):
    config = made_small(kind)
    if config is None:
        assert kind in NOT_MADE
        pytest.skip("no small configuration by the names of its fields")
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    for method, options, refused in (
        ("prompt_tuning", {"num_virtual_tokens": 3}, REFUSED["virtual"]),
        ("prefix_tuning", {"num_virtual_tokens": 3}, REFUSED["virtual"]),
        ("lora", ALL_LINEAR, REFUSED["lora"]),
    ):
        try:
            wish = peft_config(method, task_type="CAUSAL_LM", **options)
            expected = trained(get_peft_model(model, wish))
        except Exception as error:
            assert kind in refused, (method, error)
            with pytest.raises(ValueError, match=f"PEFT puts no .*'{kind}'.*; choose"):
                adapter_parameters(config, method, **options)
            continue
        assert adapter_parameters(config, method, **options) == expected, method
    if kind not in REFUSED["lora"]:  # the names are what "all-linear" finds
        names = lora_target_names(skeleton(config))
        assert adapter_parameters(config, "lora", r=4, target_modules=names) == expected


def test_what_is_not_counted_is_a_short_list(capsys):
    print("not made:", *sorted(NOT_MADE), "\nrefused by PEFT:", REFUSED)
    assert len(NOT_MADE) <= 16
    assert len(REFUSED["lora"]) <= 5 and len(REFUSED["virtual"]) <= 9


# --- counts: experts, subclasses of Linear, widths per layer, tied weights -----------


@pytest.mark.parametrize("kind", [*MOE, *OTHERS])
@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("lora", ALL_LINEAR),
        ("dora", ALL_LINEAR),
        ("prefix_tuning", {"num_virtual_tokens": 5}),
        ("prompt_tuning", {"num_virtual_tokens": 5}),
        ("p_tuning", {"num_virtual_tokens": 5}),
        ("full", {}),
    ],
)
def test_counts_of_families_with_parts_of_their_own(kind, method, options):
    config = (MOE | OTHERS)[kind]
    try:
        expected = really(config, method, **options)
    except Exception as error:  # PEFT's DoRA knows no fused experts
        assert kind in MOE and method == "dora", error
        with pytest.raises(ValueError, match="PEFT puts no LORA on"):
            adapter_parameters(config, method, **options)
        return
    assert adapter_parameters(config, method, **options) == expected


def test_the_counts_that_were_reported():
    def count(config, method="lora", **options):
        return adapter_parameters(config, method, **options)

    assert count(MOE["qwen3_moe"], **ALL_LINEAR) == 8480
    assert count(FALCON, **ALL_LINEAR) == 3712
    assert count(GEMMA4, "prefix_tuning", num_virtual_tokens=5) == 1280
    saved = ["embed_tokens", "lm_head"]
    both = {"modules_to_save": saved, "ensure_weight_tying": True, "r": 8}
    assert count(OTHERS["tied"], target_modules=["q_proj", "v_proj"], **both) == 18_944
    qwen = tiny(
        "qwen3_moe",
        hidden_size=2048,
        moe_intermediate_size=768,
        num_hidden_layers=48,
        num_attention_heads=32,
        num_key_value_heads=4,
        head_dim=128,
        num_experts=128,
        num_experts_per_tok=8,
        vocab_size=151_936,
    )
    large = {"r": 16, "target_modules": "all-linear"}
    assert count(qwen, **large) == 996_507_648
    assert count(transformers.MixtralConfig(), **large) == 359_665_664
    seven = AutoConfig.for_model(
        "falcon", hidden_size=4544, num_hidden_layers=32, num_attention_heads=71
    )
    assert count(seven, **large) == 32_636_928


def test_a_model_for_which_peft_has_no_targets_is_told_its_own():
    with pytest.raises(ValueError, match="`target_modules`.*among gate, k_proj"):
        adapter_parameters(MOE["mixtral"], "lora")
    with pytest.raises(ValueError, match="'mpt'.*Please specify `num_attention_heads`"):
        config = transformers.MptConfig(d_model=32, n_heads=4, n_layers=2)
        adapter_parameters(config, "prompt_tuning", num_virtual_tokens=3)


def test_experts_names_are_those_of_their_layers_before_fusion():
    names = lora_target_names(skeleton(MOE["mixtral"]))
    assert names == ["gate", "k_proj", "o_proj", "q_proj", "v_proj", "w1", "w2", "w3"]
    names = lora_target_names(skeleton(FALCON))
    assert names == ["dense", "dense_4h_to_h", "dense_h_to_4h", "query_key_value"]


Q_AND_V = {"target_modules": ["q_proj", "v_proj"]}
PEFT_CONFIGS = [
    peft.AdaLoraConfig(total_step=10, **Q_AND_V),
    peft.AdaptionPromptConfig(
        adapter_len=3, adapter_layers=2, target_modules="self_attn"
    ),
    peft.BOFTConfig(**Q_AND_V),
    peft.C3AConfig(block_size=16, **Q_AND_V),
    peft.FourierFTConfig(n_frequency=10, **Q_AND_V),
    peft.HRAConfig(**Q_AND_V),
    peft.IA3Config(target_modules=["k_proj", "fc1"], feedforward_modules=["fc1"]),
    peft.LNTuningConfig(target_modules=["input_layernorm", "norm"]),
    peft.LoHaConfig(r=4, **Q_AND_V),
    peft.LoKrConfig(r=4, **Q_AND_V),
    peft.MultitaskPromptTuningConfig(num_virtual_tokens=4, num_tasks=3),
    peft.OFTConfig(oft_block_size=8, **Q_AND_V),
    peft.PolyConfig(r=4, **Q_AND_V),
    peft.PromptTuningConfig(num_virtual_tokens=4),
    peft.RandLoraConfig(r=4, **Q_AND_V),
    peft.RoadConfig(group_size=8, **Q_AND_V),
    peft.TrainableTokensConfig(token_indices=[1, 2, 3]),
    peft.VBLoRAConfig(vector_length=8, num_vectors=4, **Q_AND_V),
    peft.VeraConfig(r=4, **Q_AND_V),
    LoraConfig(r=4, lora_bias=True, **Q_AND_V),
    LoraConfig(r=4, use_rslora=True, exclude_modules=["layers.0.*"], **Q_AND_V),
    LoraConfig(r=4, target_parameters=["mlp.up_proj.weight"], **Q_AND_V),
    LoraConfig(r=4, layers_to_transform=[1], modules_to_save=["norm"], **Q_AND_V),
]


@pytest.mark.parametrize("config", PEFT_CONFIGS, ids=lambda c: c.peft_type.value)
def test_every_method_of_peft_is_counted_and_weighed(config, tmp_path):
    config.task_type = "CAUSAL_LM"
    base = tiny("llama", num_key_value_heads=4)
    model = get_peft_model(
        AutoModelForCausalLM.from_config(base), copy.deepcopy(config)
    )
    assert adapter_parameters(base, config) == trained(model)
    model.save_pretrained(tmp_path)
    file = (tmp_path / "adapter_model.safetensors").read_bytes()
    header = 8 + int.from_bytes(file[:8], "little")
    assert adapter_bytes(base, config) == len(file) - header


def test_a_text_to_start_virtual_tokens_from_needs_no_tokenizer():
    config = peft.PromptTuningConfig(
        task_type="CAUSAL_LM",
        num_virtual_tokens=4,
        prompt_tuning_init="TEXT",
        prompt_tuning_init_text="Be brief.",
        tokenizer_name_or_path="no/where",
    )
    assert adapter_parameters(tiny("llama"), config) == 4 * 32


@pytest.mark.parametrize(
    ("task", "auto_class", "base"),
    [
        ("SEQ_2_SEQ_LM", "AutoModelForSeq2SeqLM", T5),
        ("FEATURE_EXTRACTION", "AutoModel", BERT),
        ("TOKEN_CLS", "AutoModelForTokenClassification", BERT),
        ("QUESTION_ANS", "AutoModelForQuestionAnswering", BERT),
        ("SEQ_CLS", "AutoModelForSequenceClassification", tiny("llama", num_labels=3)),
        ("SEQ_CLS", "AutoModelForSequenceClassification", GPT2),
    ],
)
@pytest.mark.parametrize("method", ["lora", "ia3", "prefix_tuning", "p_tuning"])
def test_other_tasks_count_with_their_heads(method, task, auto_class, base):
    options = {"num_virtual_tokens": 3} if "tuning" in method else {}
    wish = peft_config(method, task_type=task, **options)
    model = getattr(transformers, auto_class).from_config(copy.deepcopy(base))
    assert adapter_parameters(base, wish) == trained(get_peft_model(model, wish))


def test_a_configuration_without_a_model_for_the_task_is_refused_by_name():
    with pytest.raises(ValueError, match="CausalLM builds no 'llava'"):
        adapter_parameters(transformers.LlavaConfig(), "lora")
    with pytest.raises(ValueError, match="'hunyuan_v1_dense'.*complete the config"):
        adapter_parameters(AutoConfig.for_model("hunyuan_v1_dense"), "full")


def test_a_method_that_reads_the_weights_is_refused():
    config = peft.ShiraConfig(r=2, task_type="CAUSAL_LM", **Q_AND_V)
    with pytest.raises(ValueError, match="PEFT puts no SHIRA on 'llama'"):
        adapter_parameters(tiny("llama"), config)


# --- memory --------------------------------------------------------------------------


def folder_of(config, dtype, path):
    model = AutoModelForCausalLM.from_config(copy.deepcopy(config))
    model.to(dtype).save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    return str(path)


@pytest.mark.parametrize("kind", [*MOE, *OTHERS])
def test_4_bit_bytes_are_those_of_a_loaded_model(kind, tmp_path):
    """Also GPT-2's Conv1D, which becomes 4-bit, and Falcon's layer, which does not."""
    dtype = torch.float16 if kind == "gpt_oss" else torch.bfloat16
    folder = folder_of((MOE | OTHERS)[kind], dtype, tmp_path)
    model = load_model(folder, quantization="nf4", dtype=dtype)
    parts = estimate_memory(
        model.config,
        "qlora",
        batch_size=2,
        sequence_length=32,
        dtype=dtype,
        engine="exact",
        **ALL_LINEAR,
    ).static_parts
    counted = count_parameters(model)
    assert parts["weights"] + parts["quantization"] == counted.bytes
    if kind == "gpt2":
        assert counted.bytes == 72_384


@pytest.mark.parametrize("kind", MOE)
def test_experts_have_an_estimate_in_every_dtype(kind):
    step = {"batch_size": 1, "sequence_length": 64, "engine": "exact", **ALL_LINEAR}
    totals = {
        dtype: estimate_memory(MOE[kind], "lora", dtype=dtype, **step).total
        for dtype in ("bfloat16", "float16", "float32")
    }
    # gpt-oss keeps its norms in float32 beside float16
    near = pytest.approx(totals["bfloat16"], rel=1e-3)
    assert totals["float16"] == near and totals["bfloat16"] < totals["float32"]
    plan = t4_plan(MOE[kind], "lora", loss="chunked", **step)
    assert plan.total < totals["bfloat16"] and plan.fits("T4")
    assert plan.verdict("T4").startswith("Fits") and plan.cheapest_change("T4") is None
    with pytest.raises(ValueError, match="engine='exact'"):
        t4_plan(MOE[kind], "lora", batch_size=1, sequence_length=64)


@pytest.mark.parametrize("kernel", [True, False])
def test_the_step_of_experts_is_what_the_allocator_sees(kernel, monkeypatch):
    """With the kernel of newer cards and of the CPU, and with the loop of a T4."""
    config = tiny("mixtral", hidden_size=64, intermediate_size=256, num_local_experts=8)
    wish = LoraConfig(r=16, target_modules=["q_proj"], task_type="CAUSAL_LM")
    settings = {"batch_size": 2, "sequence_length": 64, "dtype": "float32"}
    autocast = None if kernel else "float16"
    if not kernel:
        name = "transformers.integrations.moe._can_use_grouped_mm"
        monkeypatch.setattr(name, lambda *_: False)
    model = get_peft_model(AutoModelForCausalLM.from_config(config), wish).train()
    model.config.use_cache = False
    optimizer = torch.optim.AdamW(p for p in model.parameters() if p.requires_grad)
    ids = torch.arange(128).reshape(2, 64)
    mask = torch.ones_like(ids)

    def step():
        with torch.autocast("cpu", torch.float16, enabled=not kernel):
            model(input_ids=ids, labels=ids, attention_mask=mask).loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    with measure_memory("allocator") as used:
        step()
    guess = estimate_memory(config, wish, engine="exact", autocast=autocast, **settings)
    kept = guess.static - guess.static_parts["gradients"]
    assert guess.total - kept == pytest.approx(used.added_bytes, rel=0.1)


def test_a_nested_configuration_is_its_text_model_and_a_vision_tower():
    step = {"batch_size": 1, "sequence_length": 64, "dtype": "bfloat16", "r": 16}
    step |= {"engine": "exact", "target_modules": ["q_proj"]}
    step["exclude_modules"] = ".*vision.*"
    whole = estimate_memory(GEMMA3, "lora", **step)
    step.pop("exclude_modules")
    text = estimate_memory(GEMMA3.get_text_config(), "lora", **step)
    count = adapter_parameters
    vision = count(GEMMA3, "full") - count(GEMMA3.get_text_config(), "full")
    assert vision > 0
    assert whole.static - text.static == 2 * vision
    assert whole.parts["logits"] == text.parts["logits"]
    with pytest.raises(ValueError, match="has only 256 positions"):
        estimate_memory(GEMMA3, "lora", **(step | {"sequence_length": 257}))


def test_a_family_with_parts_of_its_own_has_verdicts_and_no_closed_form():
    for config in (GPT2, FALCON, GEMMA4, MOE["mixtral"], GEMMA3):
        with pytest.raises(ValueError, match="engine='exact'"):
            t4_plan(config, "full", batch_size=1, sequence_length=32)
        wide = t4_plan(
            config, "full", batch_size=9000, sequence_length=256, engine="exact"
        )
        assert "closed form knows no change" in wide.verdict("T4")


@pytest.mark.parametrize("kind", ["gpt_neox", "gpt2", "gptj", "gemma3", "qwen3_moe"])
def test_the_chunked_loss_leaves_out_the_logits_whatever_the_head_is_called(kind):
    step = {"batch_size": 4, "sequence_length": 128, "dtype": "float32"}
    step |= {"engine": "exact", **ALL_LINEAR}
    config = (OTHERS | MOE)[kind]
    plain, chunked = (
        estimate_memory(config, "lora", loss=loss, **step)
        for loss in ("logits", "chunked")
    )
    logits = 4 * 128 * 512 * 4
    assert plain.total - chunked.total > logits
    assert chunked.parts.get("logits", 0) <= logits


def test_a_step_that_cannot_run_is_refused_in_one_sentence(capfd):
    config = tiny("phimoe", num_local_experts=4)  # its router gives PEFT a tuple
    step = {"batch_size": 1, "sequence_length": 16, "dtype": "float32"}
    with pytest.raises(ValueError, match="no step of lora on 'phimoe' .* measure_mem"):
        estimate_memory(config, "lora", engine="exact", **step, **ALL_LINEAR)
    with pytest.raises(ValueError, match="no step of prefix_tuning on 'gpt_neox'"):
        estimate_memory(
            OTHERS["gpt_neox"],
            "prefix_tuning",
            num_virtual_tokens=3,
            engine="exact",
            **step,
        )
    assert "Traceback" not in "".join(capfd.readouterr())


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True},
        {"bias": "all"},
        {"modules_to_save": ["lm_head"]},
        {"trainable_token_indices": [1]},
        {"layer_replication": [(0, 2), (0, 2)]},
        {"target_parameters": ["up_proj.weight"]},
    ],
    ids=str,
)
def test_the_closed_form_refuses_what_it_does_not_know(options):
    step = {"batch_size": 1, "sequence_length": 16, "dtype": "float32"}
    options = {"target_modules": ["q_proj"]} | options
    with pytest.raises(ValueError, match=f"{next(reversed(options))}.*engine='exact'"):
        estimate_memory(tiny("llama"), "lora", **step, **options)
    exact = estimate_memory(tiny("llama"), "lora", engine="exact", **step, **options)
    assert exact.trainable == adapter_parameters(tiny("llama"), "lora", **options)
