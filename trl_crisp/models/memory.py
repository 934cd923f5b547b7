"""Estimates the GPU memory of a run from a model's config, part by part. No weights are loaded."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PretrainedConfig

from trl_crisp.loss.kernel import GPU_CHUNK_LOGITS

GIB_BYTES = 2**30
_FLOAT32_BYTES = 4
# AdamW keeps two moving averages of each trained parameter, in its dtype (torch.optim.AdamW)
_ADAMW_STATES = 2


class NoEstimateError(ValueError):
    """There are no formulas for this kind of model."""


@dataclass(frozen=True)
class RunMemory:
    """
    The memory that a run needs on one GPU, in GiB, by part. An estimate: no part was measured.

    Attributes:
        parameters: The model's parameters; tied ones count once. With LoRA without the adapter.
        trained_parameters: All of them, or those of the adapter.
        weights_gib: The student, with the adapter.
        teacher_gib: The teacher's copy during an update: of the whole model, or of the adapter only with LoRA. With `teacher_offload` its
            output head, and its hidden states of the step's rollouts.
        offloaded_gib: The rest of the teacher with `teacher_offload`, which is on the GPU while the rollouts are sampled.
        optimizer_gib: AdamW's two states of each trained parameter.
        gradients_gib: One for each trained parameter.
        rollout_cache_gib: Keys and values of the rollouts that are sampled at once, each as long as the cap.
        checkpoints_gib: The hidden states that gradient checkpointing keeps, one tensor before each layer.
        layer_gib: The tensors of one layer, which the backward pass computes again, and their gradients.
        autocast_gib: The copies of the trained weights in the dtype of the computation, which autocast keeps during the forward pass.
        loss_gib: The divergence: both models' hidden states, the gradients, and the heads in the dtype of the computation.
        logits_gib: A chunk of both models' logits, which the divergence makes and drops before the backward pass.
    """

    parameters: int
    trained_parameters: int
    weights_gib: float
    teacher_gib: float
    offloaded_gib: float
    optimizer_gib: float
    gradients_gib: float
    rollout_cache_gib: float
    checkpoints_gib: float
    layer_gib: float
    autocast_gib: float
    loss_gib: float
    logits_gib: float

    @property
    def update_gib(self) -> float:
        """
        The peak of an update, GiB: all parts but the rollouts' cache. vLLM's share comes on top of it, if vLLM samples the rollouts.

        The copies of autocast and the logits are there before the backward pass, and the tensors of one layer in it, so the larger ones
        count. CUDA's own memory (about 1 GiB) and fragmentation are not in it.
        """
        both_gib = self.weights_gib + self.teacher_gib + self.optimizer_gib + self.gradients_gib
        return (
            both_gib + self.checkpoints_gib + self.loss_gib + max(self.layer_gib, self.autocast_gib + self.logits_gib)
        )

    @property
    def peak_gib(self) -> float:
        """The larger one of updating and sampling by transformers, GiB. Sampling has no gradients: they are freed after each step."""
        return max(self.update_gib, self.sampling_gib)

    @property
    def sampling_gib(self) -> float:
        """The peak of sampling by transformers, GiB."""
        both_gib = self.weights_gib + self.teacher_gib + self.offloaded_gib
        return both_gib + self.optimizer_gib + self.rollout_cache_gib


def estimate_memory(
    config: PretrainedConfig,
    *,
    prompt_tokens: int,
    completion_tokens: int,
    micro_batch: int = 2,
    rollouts_at_once: int = 32,
    lora_r: int | None = None,
    lora_target_modules: str | Sequence[str] = "all-linear",
    dtype: torch.dtype = torch.float32,
    compute_dtype: torch.dtype = torch.bfloat16,
    teacher_offload: bool = False,
) -> RunMemory:
    """
    Estimate the memory of a run on one GPU: rollouts by transformers, gradient checkpointing, AdamW, a `periodic` or `base` teacher.

    With P parameters of b bytes, of which the t trained ones have b_t bytes; L layers of width H; B rollouts in a micro-batch of T tokens
    each, prompt included, of which C are the completion's; c bytes of the dtype of the computation:

    - weights: P b, with LoRA + t b_t. PEFT keeps an adapter in float32 if the model has a lower precision (`autocast_adapter_dtype`).
    - teacher: P b ([`~trl_crisp.teacher.copied.CopyTeacher`]); with LoRA t b_t ([`~trl_crisp.teacher.adapter.AdapterTeacher`]). With
      `teacher_offload` V H b for the head, and C H c for each of the `rollouts_at_once`, during an update.
    - optimizer: 2 t b_t. Gradients: t b_t.
    - rollout cache: `rollouts_at_once` rows of T tokens; each layer has keys and values of every key-value head. A layer with a sliding
      window keeps no more tokens than the window. The dtype is the weights', as rotary embeddings raise the keys to it; the values may
      take less.
    - checkpoints: L B T H b, one tensor before each layer (Chen et al., arXiv 1604.06174).
    - one layer: B T times its tensors per token, and as much again for their gradients. Our count for a layer with a gated MLP of width I
      (of a mixture of experts: of those that a token uses) and Q query and K key-value heads of width D: 2 H b for the residual stream;
      8 H for the norms' float32 inputs; c (4 H + 3 Q D + 3 K D + 4 I) for the norms' outputs, queries and keys before and after the
      rotary embedding, values, the attention's two outputs, the MLP's four tensors and its output. The attention matrix is not kept (SDPA).
      A Llama layer keeps 1% more than this on a CPU, a Qwen3 layer, which also has norms of queries and keys, 15% more.
    - autocast: t c for full fine-tuning of weights of another dtype. Only weights that are trained are kept (torch's autocast cache).
    - logits: of a chunk ([`~trl_crisp.loss.kernel`]) both models' in float32, and the gradient in c bytes if c is below 4.
    - loss: B C H (b + c + 4), for the student's hidden states, the teacher's and the gradient, and B C H c for a copy of the student's in
      another dtype of the computation. For a head of V words: V H c for each model's, if the dtype of the
      computation is another, and with full fine-tuning 4 V H for its gradient, which exists beside that of the micro-batches before.

    Args:
        config: The model's config.
        prompt_tokens: The longest prompt.
        completion_tokens: The cap of the rollouts (`max_completion_length`).
        micro_batch: `per_device_train_batch_size`. The default is the paper's.
        rollouts_at_once: TRL samples the rollouts of a step at once: `per_device_train_batch_size` x `gradient_accumulation_steps`. The
            default is the paper's batch on one process.
        lora_r: The rank of a LoRA adapter; full fine-tuning if `None`.
        lora_target_modules: As in `peft.LoraConfig`.
        dtype: The dtype of the weights. The default is TRL's.
        compute_dtype: The dtype of the computation (`bf16`, the default on a GPU).
        teacher_offload: As in [`~trl_crisp.CRISPConfig`]. With LoRA it changes nothing.

    Raises:
        NoEstimateError: If the config is not that of a causal language model of transformers with attention.
        ValueError: If a number is below 1, or no layer has a name of the targets.
    """
    numbers = {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "micro_batch": micro_batch,
        "rollouts_at_once": rollouts_at_once,
    }
    for name, value in {**numbers, **({} if lora_r is None else {"lora_r": lora_r})}.items():
        if value < 1:
            raise ValueError(f"{name}={value} must be at least 1.")
    model = _on_meta(config, dtype)
    parameters = sum(parameter.numel() for parameter in model.parameters())
    head_values = model.get_output_embeddings().weight.numel()
    text = config.get_text_config()
    for name in ("hidden_size", "num_hidden_layers", "num_attention_heads"):
        if getattr(text, name, None) is None:
            raise _unknown(config, f"its config has no {name}, and the formulas are for transformers with attention.")
    weight_bytes, compute_bytes = dtype.itemsize, compute_dtype.itemsize
    weights_bytes = parameters * weight_bytes
    if lora_r is None:
        trained, trained_bytes = parameters, weights_bytes
        teacher_bytes = weights_bytes
        autocast_bytes = 0 if dtype == compute_dtype else trained * compute_bytes
        head_bytes = head_values * _FLOAT32_BYTES
    else:
        trained, trained_bytes = _adapter_of(model, lora_r, lora_target_modules)
        teacher_bytes = trained_bytes
        weights_bytes += trained_bytes
        autocast_bytes = trained * compute_bytes
        head_bytes = 0
    if dtype != compute_dtype:
        # With LoRA both models have the same head
        head_bytes += (2 if lora_r is None else 1) * head_values * compute_bytes
    tokens = prompt_tokens + completion_tokens
    batch_tokens = micro_batch * tokens
    hidden = text.hidden_size
    per_token_bytes = (
        sum(_cached_values(text, layer, tokens) for layer in range(text.num_hidden_layers)) * weight_bytes
    )
    offloaded_bytes = 0
    if teacher_offload and lora_r is None:
        on_gpu_bytes = head_values * weight_bytes
        offloaded_bytes = teacher_bytes - on_gpu_bytes
        teacher_bytes = on_gpu_bytes + rollouts_at_once * completion_tokens * hidden * compute_bytes
    loss_tokens = micro_batch * completion_tokens
    vocab_size = text.vocab_size
    chunk_tokens = min(loss_tokens, max(1, GPU_CHUNK_LOGITS // vocab_size))
    logit_bytes = 2 * _FLOAT32_BYTES + (compute_bytes if compute_bytes < _FLOAT32_BYTES else 0)
    # The student's hidden states, their copy in the dtype of the computation, the teacher's, and the gradient
    token_bytes = weight_bytes + compute_bytes + _FLOAT32_BYTES + (compute_bytes if dtype != compute_dtype else 0)
    loss_bytes = loss_tokens * hidden * token_bytes + head_bytes
    return RunMemory(
        parameters=parameters,
        trained_parameters=trained,
        weights_gib=weights_bytes / GIB_BYTES,
        teacher_gib=teacher_bytes / GIB_BYTES,
        offloaded_gib=offloaded_bytes / GIB_BYTES,
        optimizer_gib=_ADAMW_STATES * trained_bytes / GIB_BYTES,
        gradients_gib=trained_bytes / GIB_BYTES,
        rollout_cache_gib=rollouts_at_once * per_token_bytes / GIB_BYTES,
        checkpoints_gib=text.num_hidden_layers * batch_tokens * hidden * weight_bytes / GIB_BYTES,
        layer_gib=2 * batch_tokens * _layer_bytes(text, weight_bytes, compute_bytes) / GIB_BYTES,
        autocast_gib=autocast_bytes / GIB_BYTES,
        loss_gib=loss_bytes / GIB_BYTES,
        logits_gib=chunk_tokens * vocab_size * logit_bytes / GIB_BYTES,
    )


def _unknown(config: PretrainedConfig, reason: str) -> "NoEstimateError":
    return NoEstimateError(f"the memory of a {config.model_type!r} cannot be estimated: {reason}")


def _on_meta(config: PretrainedConfig, dtype: torch.dtype) -> Any:
    with torch.device("meta"):
        try:
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        except ValueError as error:
            # The second line lists all classes
            reason = str(error).partition("\n")[0]
            raise _unknown(config, f"{reason} Give a causal language model of transformers.") from error
    # Moving to the meta device makes two parameters of a tied one in some models
    model.tie_weights()
    return model


def _adapter_of(model: Any, r: int, target_modules: str | Sequence[str]) -> tuple[int, int]:
    """Return the parameters and the bytes of a LoRA adapter."""
    from peft import LoraConfig, get_peft_model

    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    with torch.device("meta"):
        try:
            adapted = get_peft_model(model, LoraConfig(r=r, target_modules=targets, task_type="CAUSAL_LM"))
        except ValueError as error:
            raise ValueError(f"lora_target_modules={targets!r}: {error}") from error
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    return sum(one.numel() for one in trained), sum(one.numel() * one.element_size() for one in trained)


def _cached_values(text: PretrainedConfig, layer: int, tokens: int) -> int:
    """Return how many values a layer's cache has for one row of `tokens` tokens."""
    kind = (getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers)[layer]
    if "attention" not in kind or kind == "linear_attention":
        # A recurrent state does not grow with the row
        return 0
    window = getattr(text, "sliding_window", None)
    if kind == "sliding_attention" and window is not None:
        tokens = min(tokens, window)
    if (rope_dim := getattr(text, "qk_rope_head_dim", None)) is not None:
        # Multi-head latent attention: transformers keeps the keys and values of every head
        return tokens * text.num_attention_heads * (text.qk_nope_head_dim + rope_dim + text.v_head_dim)
    _, kv_width = _attention_widths(text)
    return tokens * 2 * kv_width


def _attention_widths(text: PretrainedConfig) -> tuple[int, int]:
    """Return the width of all query heads together, and of all key-value heads."""
    heads = text.num_attention_heads
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    return heads * width, (getattr(text, "num_key_value_heads", None) or heads) * width


def _mlp_width(text: PretrainedConfig) -> int:
    per_token = getattr(text, "num_experts_per_tok", None)
    expert = getattr(text, "moe_intermediate_size", None)
    if per_token is not None:
        shared = getattr(text, "shared_expert_intermediate_size", None) or 0
        return per_token * (expert or text.intermediate_size) + shared
    for name in ("intermediate_size", "n_inner", "ffn_dim"):
        if (width := getattr(text, name, None)) is not None:
            return width
    return 4 * text.hidden_size


def _layer_bytes(text: PretrainedConfig, weight_bytes: int, compute_bytes: int) -> int:
    hidden = text.hidden_size
    query, kv = _attention_widths(text)
    computed = 4 * hidden + 3 * query + 3 * kv + 4 * _mlp_width(text)
    return 2 * hidden * weight_bytes + 2 * hidden * _FLOAT32_BYTES + computed * compute_bytes
