"""Real models of a few thousand parameters, made in memory, with a byte-level tokenizer and real chat templates."""

from pathlib import Path

import torch
import trl
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
)

# The file of TRL's chat template, and the special tokens that it writes
TEMPLATES = {
    "llama": ("llama3.jinja", ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]),
    "qwen3": ("qwen3.jinja", ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]),
    "gemma": ("gemma.jinja", ["<bos>", "<start_of_turn>", "<end_of_turn>", "<eos>"]),
    "deepseek": (
        "deepseek_r1_distill.jinja",
        ["<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>", "<think>", "</think>"],  # noqa: RUF001
    ),
}
_EOS = {"llama": "<|eot_id|>", "qwen3": "<|im_end|>", "gemma": "<end_of_turn>", "deepseek": "<｜end▁of▁sentence｜>"}  # noqa: RUF001
_BOS = {"llama": "<|begin_of_text|>", "gemma": "<bos>", "deepseek": "<｜begin▁of▁sentence｜>"}  # noqa: RUF001
_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 4096,
}


def chat_template(kind: str = "llama") -> str:
    """Return the real chat template that TRL carries for a family."""
    return (Path(trl.__file__).parent / "chat_templates" / TEMPLATES[kind][0]).read_text(encoding="utf-8")


def tiny_tokenizer(kind: str = "llama") -> PreTrainedTokenizerFast:
    """Return a tokenizer of one token a byte, with the special tokens and the chat template of a family."""
    alphabet = sorted(ByteLevel.alphabet())
    special = ["<pad>", *TEMPLATES[kind][1]]
    backend = Tokenizer(BPE(vocab={symbol: i for i, symbol in enumerate(alphabet)}, merges=[]))
    backend.pre_tokenizer = ByteLevel(add_prefix_space=False)
    backend.decoder = ByteLevelDecoder()
    backend.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token=_EOS[kind],
        bos_token=_BOS.get(kind),
        padding_side="left",
        chat_template=chat_template(kind),
    )


def tiny_model(kind: str = "llama", seed: int = 0, scale: float = 8.0, **overrides) -> PreTrainedModel:
    """
    Return a random model of a family, float32, in evaluation mode.

    Args:
        kind: llama, qwen3, deepseek (a Llama) or gemma (tied head and soft-capped logits).
        seed: Of the weights.
        scale: The head's weights are multiplied by it, so that the distributions are far from uniform.
        overrides: Fields of the model's config.
    """
    tokenizer = tiny_tokenizer(kind)
    sizes = {
        **_SIZES,
        "vocab_size": len(tokenizer) + 3,  # padded beyond the tokenizer, as released models are
        "pad_token_id": tokenizer.pad_token_id,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
    }
    config: PretrainedConfig
    if kind == "qwen3":
        config = Qwen3Config(**{**sizes, "head_dim": 16, "tie_word_embeddings": False, **overrides})
    elif kind == "gemma":
        gemma = {"head_dim": 16, "query_pre_attn_scalar": 16, "final_logit_softcapping": 4.0, "sliding_window": 64}
        config = Gemma2Config(**{**sizes, **gemma, **overrides})
    else:
        config = LlamaConfig(**{**sizes, "tie_word_embeddings": False, **overrides})
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(scale)
    return model.eval()


def tiny_llama(**overrides) -> PreTrainedModel:
    """Return a random Llama."""
    return tiny_model("llama", **overrides)


def save_tiny(path: str | Path, kind: str = "llama", dtype: torch.dtype = torch.float32, **overrides) -> str:
    """Save a random model of a family with its tokenizer, and return the directory."""
    tiny_model(kind, **overrides).to(dtype).save_pretrained(path)
    tiny_tokenizer(kind).save_pretrained(path)
    return str(path)
