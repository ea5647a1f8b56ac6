"""A tiny random model of each causal family that the installed transformers knows."""

import copy
import functools
import warnings

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

LAYERS = 3
# What a field of this name holds in a tiny model, where the family's default is larger.
SMALL = {
    "vocab_size": 259,
    "hidden_size hidden_dim d_model n_embd embed_dim emb_dim embedding_size": 32,
    "lru_width word_embed_proj_dim attention_hidden_size mamba_expand_size": 32,
    "intermediate_size ffn_dim n_inner dff dim_ff d_inner decoder_ffn_dim": 48,
    "encoder_ffn_dim feed_forward_size ffn_hidden_size dense_intermediate_size": 48,
    "moe_intermediate_size shared_expert_intermediate_size expert_ffn_hidden_size": 16,
    "intermediate_size_mlp shared_intermediate_size moe_shared_expert_dim": 16,
    "num_hidden_layers n_layer n_layers num_layers decoder_layers": LAYERS,
    "encoder_layers num_encoder_layers num_decoder_layers": LAYERS,
    "num_attention_heads n_head n_heads num_heads attention_heads": 4,
    "decoder_attention_heads encoder_attention_heads num_decoder_attention_heads": 4,
    "num_encoder_attention_heads swa_num_attention_heads": 4,
    "num_key_value_heads num_kv_heads swa_num_key_value_heads": 2,
    "head_dim dim_head qk_nope_head_dim v_head_dim qk_rope_head_dim d_head": 8,
    "global_head_dim swa_head_dim swa_v_head_dim kv_channels attention_head_dim": 8,
    "linear_key_head_dim linear_value_head_dim index_head_dim attention_head_size": 8,
    "linear_num_key_heads linear_num_value_heads linear_num_heads": 2,
    "mamba_d_head mamba_head_dim": 16,
    "mamba_n_heads n_mamba_heads mamba_num_heads": 4,
    "mamba_d_state state_size ssm_state_size mamba_d_ssm": 8,
    "time_step_rank mamba_dt_rank": 4,
    "kv_lora_rank q_lora_rank o_lora_rank": 16,
    "num_experts num_local_experts n_routed_experts moe_num_experts": 4,
    "num_experts_per_tok moe_topk top_k num_experts_per_token moe_k": 2,
    "n_group topk_group num_expert_group n_groups o_groups": 1,
    "index_n_heads": 2,
    "index_topk": 512,
    "max_position_embeddings n_positions n_ctx max_seq_len context_length": 512,
    "rotary_dim": 4,
    "vocab_size_per_layer_input": 259,
    "hidden_size_per_layer_input": 8,
    "conv_dim": 32,
    "block_size": 16,
}
SMALL = {name: value for names, value in SMALL.items() for name in names.split()}


def shrunk(settings, layers=LAYERS):
    """The same settings, each field that says a size made small."""
    changes = {}
    for name, value in settings.items():
        if name in SMALL and isinstance(value, int) and value > SMALL[name]:
            changes[name] = SMALL[name]
        if name in ("layer_types", "block_types", "layers_block_type") and value:
            kinds = list(dict.fromkeys(value))
            changes[name] = (kinds * layers)[:layers]
    return changes


# Where sizes hang together otherwise.
PER_FAMILY = {
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {"rope_parameters": None},
    "cohere2_moe": {
        "layer_types": ["sliding_attention", "full_attention"] * 2,
        "num_hidden_layers": 4,
        "mlp_layer_types": ["sparse"] * 4,
    },
    "deepseek_v2": {"num_experts_per_tok": 2, "n_group": 1, "topk_group": 1},
    "dots1": {
        "n_routed_experts": 4,
        "n_group": 1,
        "topk_group": 1,
        "num_experts_per_tok": 2,
        "n_shared_experts": 1,
    },
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": {
        "intermediate_size": 48,
        "num_kv_shared_layers": 0,
        "laurel_rank": 4,
    },
    "gemma4_text": {"num_kv_shared_layers": 0, "head_dim": 8, "global_head_dim": 16},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]], "num_layers": 2},
    "granitemoehybrid": {"layer_types": ["mamba", "attention", "mamba"]},
    "hunyuan_v1_dense": {"head_dim": 8},
    "hunyuan_v1_moe": {"head_dim": 8},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1},
    "lfm2": {"layer_types": ["conv", "full_attention", "conv"]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv"]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "ministral": {"head_dim": 8},
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "zamba2": {
        "mamba_headdim": 16,
        "n_mamba_heads": 4,
        "mamba_ngroups": 1,
        "attention_head_dim": 16,
        "attention_hidden_size": 64,
    },
}


# No tiny text model of these is made here: images, sound, or sizes that hang together.
LEFT_OUT = """
blenderbot blt cohere_compass_text dbrx dots3_note dots3_note_text emu3 gemma3n gemma4
gemma4_assistant gemma4_unified gemma4_unified_assistant longcat_flash mllama musicgen
musicgen_melody phi4_multimodal qwen4_exp qwen4_exp_text reformer roc_bert xmod zamba
"""
FAMILIES = sorted(set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES) - set(LEFT_OUT.split()))


@functools.cache
def config_of(kind):
    settings = AutoConfig.for_model(kind).to_dict()
    changes = shrunk(settings)
    for name, value in settings.items():
        if (
            name.endswith("_config")
            and isinstance(value, dict)
            and "model_type" in value
        ):
            changes[name] = value | shrunk(value)
    if "kv_lora_rank" in settings:  # keys are made of a few numbers, for each head
        changes["num_key_value_heads"] = 4
        changes.pop("head_dim", None)
    if settings.get("is_decoder") is False:  # BERT's kind: else it sees what follows
        changes["is_decoder"] = True
    changes |= {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    return AutoConfig.for_model(kind, **changes | PER_FAMILY.get(kind, {}))


def make(kind, attention=None, std=0.2, **changes):
    """A random model in evaluation mode, its weights far enough apart to tell."""
    config = copy.deepcopy(config_of(kind))
    if changes:
        config = type(config).from_dict(config.to_dict() | changes)
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        how = {"attn_implementation": attention} if attention else {}
        model = AutoModelForCausalLM.from_config(config, **how).eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, 0, std)
    return model
