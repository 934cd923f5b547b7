"""Random models of many architectures of transformers, a few thousand parameters each, float32."""

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

VOCAB_SIZE = 64
_SIZES = {
    "vocab_size": VOCAB_SIZE,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "eos_token_id": 1,
    "bos_token_id": 2,
}
_GROUPED = {"num_key_value_heads": 2}
_GPT2 = {"n_positions": 512, "n_embd": 32, "n_layer": 2, "n_head": 4}
_OPT = {"word_embed_proj_dim": 32, "ffn_dim": 48}
_SEQ2SEQ = {
    "d_model": 32,
    "decoder_layers": 2,
    "encoder_layers": 2,
    "decoder_attention_heads": 4,
    "encoder_attention_heads": 4,
    "decoder_ffn_dim": 48,
    "encoder_ffn_dim": 48,
}
_EXPERTS = {
    **_GROUPED,
    "num_experts": 4,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
}
_LINEAR_ATTENTION = {
    **_EXPERTS,
    "head_dim": 8,
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
_MAMBA2 = {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_expand": 2}
_MLA = {
    "q_lora_rank": 8,
    "kv_lora_rank": 8,
    "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8,
    "v_head_dim": 8,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "moe_intermediate_size": 16,
    "first_k_dense_replace": 1,
}

# Rows can be padded as they are: relative positions, or the model derives the positions from the mask
PADDED_AS_THEY_ARE: dict[str, dict] = {
    "bamba": {**_GROUPED, **_MAMBA2, "attn_layer_indices": [1]},
    "bloom": {"n_layer": 2, "n_head": 4},
    "codegen": {**_GPT2, "rotary_dim": 4, "n_ctx": 512},
    "cohere": _GROUPED,
    "cohere2": _GROUPED,
    "deepseek_v3": _MLA,
    "falcon": {},
    "falcon-alibi": {"alibi": True},
    "falcon_mamba": {"state_size": 8},
    "gemma2": {**_GROUPED, "head_dim": 8},
    "gemma3_text": {**_GROUPED, "head_dim": 8},
    "gpt_neox": {},
    "gpt_oss": {**_EXPERTS, "head_dim": 8},
    "gptj": {**_GPT2, "rotary_dim": 4},
    "granite": {**_GROUPED, "logits_scaling": 4.0},
    "granitemoe": _EXPERTS,
    "granitemoehybrid": {**_EXPERTS, **_MAMBA2, "layer_types": ["mamba", "attention"], "shared_intermediate_size": 16},
    "jamba": {**_EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "mamba_d_state": 8},
    "lfm2": {**_GROUPED, "layer_types": ["conv", "full_attention"]},
    "llama": _GROUPED,
    "llama4_text": {**_EXPERTS, "head_dim": 8, "intermediate_size_mlp": 48},
    "mamba": {"state_size": 8},
    "mamba2": {"num_heads": 8, "head_dim": 8, "state_size": 8, "n_groups": 1},
    "minimax": {**_EXPERTS, "head_dim": 8},
    "mistral": {**_GROUPED, "head_dim": 8},
    "mixtral": _EXPERTS,
    "mpt": {"d_model": 32, "n_heads": 4, "n_layers": 2, "max_seq_len": 512},
    "nemotron": _GROUPED,
    "olmo2": _GROUPED,
    "opt": _OPT,
    "persimmon": {},
    "phi": {},
    "phi3": _GROUPED,
    "qwen2": _GROUPED,
    "qwen2_moe": _EXPERTS,
    "qwen3": {**_GROUPED, "head_dim": 8},
    "qwen3_moe": {**_EXPERTS, "head_dim": 8},
    "qwen3_next": _LINEAR_ATTENTION,
    "stablelm": _GROUPED,
    "starcoder2": _GROUPED,
}
# Learned or absolute positions, which have to be counted from the first token
NEEDS_POSITIONS: dict[str, dict] = {
    "biogpt": {},
    "ctrl": {**_GPT2, "dff": 48},
    "gpt2": _GPT2,
    "gpt_bigcode": _GPT2,
    "gpt_neo": {"num_layers": 2, "num_heads": 4, "attention_types": [[["global", "local"], 1]]},
    "hunyuan_v1_dense": {**_GROUPED, "head_dim": 8},
    "openai-gpt": _GPT2,
    "xglm": {"d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48},
    "bert-generation": {"is_decoder": True},
}
# Refused, by a part of the error
REFUSED: dict[str, tuple[dict, str]] = {
    "bart": (_SEQ2SEQ, "padded on its left"),
    "bert": ({}, "than its output head"),
    "bert-decoder": ({"is_decoder": True}, "than its output head"),
    "bert-generation-encoder": ({}, "is not causal"),
    "cpmant": ({"dim_head": 8, "dim_ff": 48}, "is not causal"),
    "mbart": (_SEQ2SEQ, "padded on its left"),
    "modernbert-decoder": ({}, "than its output head"),
    "roberta": ({"is_decoder": True}, "than its output head"),
    "rwkv": ({"attention_hidden_size": 32}, "padded on its left"),
    "trocr": (_SEQ2SEQ, "padded on its left"),
    "whisper": (_SEQ2SEQ, "padded on its left"),
}


def tiny_architecture(kind: str, **overrides) -> PreTrainedModel:
    """Return a random model of one of the architectures above, in evaluation mode; `overrides` are fields of its config."""
    fields = {**PADDED_AS_THEY_ARE, **NEEDS_POSITIONS, **{name: row[0] for name, row in REFUSED.items()}}[kind]
    name = kind.removesuffix("-alibi").removesuffix("-encoder")
    config = AutoConfig.for_model("bert" if name == "bert-decoder" else name, **{**_SIZES, **fields, **overrides})
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            # Away from the initial values, at which biases, and much of what positions do, are near zero
            if parameter.dim() > 1:
                parameter.mul_(3.0)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # Distributions that are far from uniform
        model.get_output_embeddings().weight.mul_(3.0)
    return model.eval()
