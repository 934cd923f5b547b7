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
from trl_crisp.loss import kernel, kernel_torch
from trl_crisp.loss.divergence import OutputHead
from trl_crisp.loss.kernel import fused_loss
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
    # 690 tokens of logits, the student's hidden states in float32 with a copy in bfloat16, the teacher's, both heads in bfloat16, the head's gradient
    logits = 690 * 151936 * (4 + 4 + 2)
    hidden_states = 2 * 8192 * 4096 * (4 + 2 + 2 + 4)
    head = 151936 * 4096
    assert in_bytes(memory.logits_gib) == logits
    assert in_bytes(memory.loss_gib) == hidden_states + head * (2 * 2 + 4)
    assert memory.update_gib == pytest.approx(30.513 * 5 + 15.256 + 10.125 + 6.363, abs=0.01)
    # Here the 32 rollouts of 9,216 tokens need more than the update
    assert memory.peak_gib == pytest.approx(30.513 * 4 + 81, abs=0.01)
    lora = estimate_memory(QWEN3_8B, prompt_tokens=1024, completion_tokens=8192, lora_r=32)
    assert in_bytes(lora.logits_gib) == logits
    assert in_bytes(lora.loss_gib) == hidden_states + head * 2
    # Here a layer in the backward pass takes more than the logits before it
    assert lora.update_gib == pytest.approx(30.513 + 5 * 0.3252 + 10.125 + 1.910 + 7.805, abs=0.01)


def test_an_offloaded_teacher_leaves_its_head_and_its_hidden_states():
    run = {"prompt_tokens": 1024, "completion_tokens": 8192}
    plain = estimate_memory(QWEN3_8B, **run)
    memory = estimate_memory(QWEN3_8B, teacher_offload=True, **run)
    head = 151936 * 4096 * 4
    assert in_bytes(memory.teacher_gib) == head + 32 * 8192 * 4096 * 2
    assert in_bytes(memory.offloaded_gib) == in_bytes(plain.teacher_gib) - head
    assert memory.update_gib == pytest.approx(plain.update_gib - plain.teacher_gib + memory.teacher_gib)
    # It comes while the rollouts are sampled
    assert memory.sampling_gib == pytest.approx(plain.sampling_gib + 32 * 8192 * 4096 * 2 / GIB_BYTES)
    assert plain.offloaded_gib == 0
    lora = {"lora_r": 4, **RUN}
    assert estimate_memory(QWEN3_8B, teacher_offload=True, **lora) == estimate_memory(QWEN3_8B, **lora)


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


@pytest.mark.parametrize("kind", ["gemma", "llama"])
@pytest.mark.parametrize("lora_r", [None, 2])
@pytest.mark.parametrize(
    ("dtype", "compute_dtype", "per_token", "heads"),
    [
        (torch.float32, torch.bfloat16, 4 + 2 + 2 + 4, 2),
        (torch.bfloat16, torch.bfloat16, 2 + 2 + 4, 0),
        (torch.float32, torch.float32, 4 + 4 + 4, 0),
    ],
)
def test_the_loss_by_hand(kind, lora_r, dtype, compute_dtype, per_token, heads):
    """The head tied and not, trained and not, converted and not."""
    config = tiny_model(kind).config
    memory = estimate_memory(config, lora_r=lora_r, dtype=dtype, compute_dtype=compute_dtype, **RUN)
    tokens, vocab = 2 * 412, config.vocab_size
    logits = tokens * vocab * (8 + (2 if compute_dtype == torch.bfloat16 else 0))
    copies = heads * (2 if lora_r is None else 1)
    head = vocab * 32 * (copies + (4 if lora_r is None else 0))
    assert in_bytes(memory.logits_gib) == logits
    assert in_bytes(memory.loss_gib) == tokens * 32 * per_token + head


def test_the_loss_of_a_real_pass_fits_the_estimate():
    """The most bytes that a forward and a backward hold at once, as torch's profiler counts them on a CPU."""
    tokens, hidden, vocab = 600, 64, 4096
    config = LlamaConfig(vocab_size=vocab, hidden_size=hidden, num_hidden_layers=1, num_attention_heads=2)
    estimate = estimate_memory(
        config, prompt_tokens=1, completion_tokens=tokens, micro_batch=1, compute_dtype=torch.float32
    )
    student_NH = torch.randn(tokens, hidden, requires_grad=True)
    teacher_NH, weight = torch.randn(tokens, hidden), torch.randn(vocab, hidden, requires_grad=True)
    heads = OutputHead(weight), OutputHead(weight.detach() + 1)
    ids, weights = torch.zeros(tokens, dtype=torch.long), torch.full((tokens,), 1 / tokens)
    with torch.profiler.profile(profile_memory=True) as profile:
        loss, _ = fused_loss(student_NH, heads[0], teacher_NH, heads[1], ids, weights, 1.0, 1.0)
        loss.backward()
    alive = peak = 0
    for event in profile.profiler.kineto_results.events():
        if event.name() == "[memory]":
            alive += event.nbytes()
            peak = max(peak, alive)
    # The hidden states were there before. On a CPU a chunk has 256 tokens, and the plain pass makes two tensors of a block
    others = (
        2 * tokens * hidden * 4
        + 2 * 4 * vocab * (tokens - kernel.CPU_CHUNK_TOKENS)
        - 2 * 4 * kernel_torch.BLOCK_LOGITS
    )
    assert peak == pytest.approx(in_bytes(estimate.loss_gib) + in_bytes(estimate.logits_gib) - others, rel=0.02)


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
    parts = {**dict.fromkeys(RunMemory.__dataclass_fields__, 1.0), "offloaded_gib": 0.0}
    assert RunMemory(**{**parts, "rollout_cache_gib": 9.0, "layer_gib": 2.0}).peak_gib == 3 + 9
    assert RunMemory(**{**parts, "rollout_cache_gib": 1.0, "layer_gib": 3.0}).peak_gib == 6 + 3
    assert RunMemory(**{**parts, "rollout_cache_gib": 9.0, "autocast_gib": 5.0}).update_gib == 6 + 5 + 1


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
