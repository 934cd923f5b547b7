"""The estimate of a run's memory: parameters as really built, and each part by independent arithmetic."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    MambaConfig,
    PretrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
    T5Config,
)

from tests.tiny_models import tiny_model
from trl_crisp.models.memory import GIB_BYTES, RunMemory, estimate_memory

# Released shapes; the parameters are those that the model cards print
QWEN3_8B = Qwen3Config(
    vocab_size=151936,
    hidden_size=4096,
    intermediate_size=12288,
    num_hidden_layers=36,
    num_attention_heads=32,
    num_key_value_heads=8,
    head_dim=128,
    tie_word_embeddings=False,
)
RUN = {"prompt_tokens": 100, "completion_tokens": 412}


def in_bytes(gib: float) -> int:
    return round(gib * GIB_BYTES)


def bytes_of(parameters) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_states_and_teacher_are_those_of_the_built_model(kind, dtype):
    model = tiny_model(kind).to(dtype)
    memory = estimate_memory(model.config, dtype=dtype, **RUN)
    weights = bytes_of(model.parameters())
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    states = bytes_of(
        value for state in optimizer.state.values() for name, value in state.items() if name.startswith("exp_avg")
    )
    assert memory.parameters == memory.trained_parameters == sum(p.numel() for p in model.parameters())
    assert in_bytes(memory.weights_gib) == in_bytes(memory.teacher_gib) == weights
    assert in_bytes(memory.gradients_gib) == bytes_of(p.grad for p in model.parameters())
    assert in_bytes(memory.optimizer_gib) == states
    # Autocast copies float32 weights to bfloat16; weights of that dtype are used as they are
    assert in_bytes(memory.autocast_gib) == (weights // 2 if dtype == torch.float32 else 0)


@pytest.mark.parametrize("targets", ["all-linear", ["q_proj", "v_proj"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_an_adapter_is_that_of_peft(targets, dtype):
    model = tiny_model("llama").to(dtype)
    before = bytes_of(model.parameters())
    memory = estimate_memory(model.config, lora_r=4, lora_target_modules=targets, dtype=dtype, **RUN)
    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=targets, task_type="CAUSAL_LM"))
    trained = [parameter for parameter in adapted.parameters() if parameter.requires_grad]
    adapter = bytes_of(trained)
    assert memory.trained_parameters == sum(p.numel() for p in trained) < memory.parameters
    assert in_bytes(memory.weights_gib) == before + adapter == bytes_of(adapted.parameters())
    assert in_bytes(memory.teacher_gib) == in_bytes(memory.gradients_gib) == adapter
    assert in_bytes(memory.optimizer_gib) == 2 * adapter


@pytest.mark.parametrize("kind", ["llama", "gemma"])
def test_the_cache_of_rollouts_is_that_of_the_model(kind):
    # A window of 64 tokens in every other layer of Gemma
    model = tiny_model(kind)
    memory = estimate_memory(model.config, prompt_tokens=10, completion_tokens=110, rollouts_at_once=3)
    with torch.no_grad():
        cache = model(torch.ones(3, 120, dtype=torch.long), use_cache=True).past_key_values
    # Between two steps a layer with a window keeps one token less than the window
    kept = sum(
        (layer.keys.shape[-2] + layer.is_sliding) * layer.keys[:, :, 0].numel() * 2 * 4 for layer in cache.layers
    )
    assert in_bytes(memory.rollout_cache_gib) == kept


def test_the_parts_of_a_released_model_by_hand():
    memory = estimate_memory(QWEN3_8B, prompt_tokens=1024, completion_tokens=8192)
    tokens = 2 * 9216
    assert memory.parameters == 8_190_735_360
    assert in_bytes(memory.rollout_cache_gib) == 32 * 9216 * 36 * 2 * 8 * 128 * 4
    assert in_bytes(memory.checkpoints_gib) == 36 * tokens * 4096 * 4
    # Residual stream and norms in float32; norm outputs, attention output and MLP output; q, k, v; MLP: in bfloat16
    layer = 2 * 4096 * 4 + 2 * 4096 * 4 + 2 * (4 * 4096 + 3 * 32 * 128 + 3 * 8 * 128 + 4 * 12288)
    assert in_bytes(memory.layer_gib) == 2 * tokens * layer
    assert in_bytes(memory.loss_gib) == 2 * 4096 * 32768 * 4 + 3 * 2 * 8192 * 4096 * 4
    assert memory.update_gib == pytest.approx(30.513 * 5 + 15.256 + 10.125 + 1.75, abs=0.01)
    # Here the 32 rollouts of 9,216 tokens need more than the update
    assert memory.peak_gib == pytest.approx(30.513 * 4 + 81, abs=0.01)
    lora = estimate_memory(QWEN3_8B, prompt_tokens=1024, completion_tokens=8192, lora_r=32)
    assert lora.update_gib == pytest.approx(30.513 + 5 * 0.3252 + 10.125 + 1.75 + 7.805, abs=0.01)


@pytest.mark.parametrize(
    # Qwen3 also keeps the inputs of the norms of queries and keys
    ("config_type", "dtype", "tolerance"),
    [(LlamaConfig, torch.float32, 0.02), (Qwen3Config, torch.float32, 0.15), (Qwen3Config, torch.bfloat16, 0.05)],
)
def test_a_layer_keeps_what_was_counted_for_its_backward_pass(config_type, dtype, tolerance):
    """Half of the estimate: the other half is for the gradients."""
    tokens = 320
    config = config_type(
        vocab_size=64,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=1,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=32,
    )
    model = AutoModelForCausalLM.from_config(config, dtype=dtype).train()
    hidden = model.model.embed_tokens(torch.zeros((1, tokens), dtype=torch.long)).detach().requires_grad_()
    positions = torch.arange(tokens)[None]
    rotations = model.model.rotary_emb(hidden, positions)
    saved: dict[int, int] = {}
    kept = []

    def pack(tensor):
        # Weights, and their copies in bfloat16, have no dimension of the tokens
        if tokens in tensor.shape:
            kept.append(tensor)
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor)
    with torch.autocast("cpu", torch.bfloat16), hooks:
        model.model.layers[0](hidden, position_embeddings=rotations, attention_mask=None, position_ids=positions)
    memory = estimate_memory(config, prompt_tokens=1, completion_tokens=tokens - 1, micro_batch=1, dtype=dtype)
    assert in_bytes(memory.layer_gib) / 2 == pytest.approx(sum(saved.values()), rel=tolerance)


def test_a_tied_or_rounded_head_has_a_gradient_of_its_own_in_the_kernel():
    tied = tiny_model("gemma").config
    assert tied.tie_word_embeddings
    by_hand = 2 * min(2 * 412, 4096) * 32768 * 4 + 3 * 2 * 412 * 32 * 4
    head = tied.vocab_size * 32 * 4
    assert in_bytes(estimate_memory(tied, **RUN).loss_gib) == by_hand + head
    assert in_bytes(estimate_memory(tied, lora_r=2, **RUN).loss_gib) == by_hand
    untied = tiny_model("llama").config
    assert in_bytes(estimate_memory(untied, **RUN).loss_gib) == by_hand
    rounded = estimate_memory(untied, dtype=torch.bfloat16, **RUN)
    assert in_bytes(rounded.loss_gib) == by_hand + untied.vocab_size * 32 * 4


def test_an_expert_model_counts_all_experts_and_computes_with_some():
    sizes = {"vocab_size": 64, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 16}
    experts = {"num_experts": 8, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "num_key_value_heads": 1}
    memory = estimate_memory(Qwen3MoeConfig(**sizes, **experts), **RUN)
    mlp = 8 * 3 * 32 * 12
    attention = 2 * 32 * 32 + 2 * 32 * 16 + 2 * 16
    assert memory.parameters == mlp + attention + 32 * 8 + 2 * 32 + 32 + 2 * 64 * 32
    per_token = 2 * 32 * 4 + 2 * 32 * 4 + 2 * (4 * 32 + 3 * 32 + 3 * 16 + 4 * 2 * 12)
    assert in_bytes(memory.layer_gib) == 2 * 2 * 512 * per_token


def test_more_of_anything_needs_more():
    base = estimate_memory(QWEN3_8B, **RUN)
    assert estimate_memory(QWEN3_8B, prompt_tokens=100, completion_tokens=500).peak_gib > base.peak_gib
    assert estimate_memory(QWEN3_8B, micro_batch=4, **RUN).update_gib > base.update_gib
    assert estimate_memory(QWEN3_8B, rollouts_at_once=64, **RUN).rollout_cache_gib == 2 * base.rollout_cache_gib
    assert estimate_memory(QWEN3_8B, lora_r=32, **RUN).peak_gib < base.peak_gib
    assert estimate_memory(GPT2Config(), **RUN).parameters == 124_439_808


def test_the_peak_is_the_larger_one_of_sampling_and_updating():
    parts = dict.fromkeys(RunMemory.__dataclass_fields__, 1.0)
    assert RunMemory(**{**parts, "rollout_cache_gib": 9.0, "layer_gib": 2.0}).peak_gib == 3 + 9
    assert RunMemory(**{**parts, "rollout_cache_gib": 1.0, "layer_gib": 2.0}).peak_gib == 6 + 2
    assert RunMemory(**{**parts, "rollout_cache_gib": 9.0, "autocast_gib": 5.0}).update_gib == 6 + 5


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"micro_batch": 0}, "micro_batch=0 must be at least 1"),
        ({"lora_r": 0}, "lora_r=0 must be at least 1"),
        ({"completion_tokens": 0}, "completion_tokens=0"),
        ({"lora_r": 2, "lora_target_modules": ["nowhere"]}, "nowhere"),
    ],
)
def test_bad_numbers_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        estimate_memory(tiny_model("llama").config, **{**RUN, **fields})


@pytest.mark.parametrize(
    ("config", "words"),
    [
        (T5Config(), r"a 't5' cannot be estimated: .* Give a causal language model"),
        (PretrainedConfig(), "cannot be estimated: .* Give a causal language model"),
        (MambaConfig(num_hidden_layers=1, vocab_size=8), r"a 'mamba' cannot be estimated: .* no num_attention_heads"),
    ],
)
def test_a_config_of_another_kind_of_model_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        estimate_memory(config, **RUN)
