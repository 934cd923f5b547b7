"""FLOPs of a step: against torch's counter of matrix products, and against arithmetic by hand."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.utils.flop_counter import FlopCounterMode

from tests.tiny_architectures import tiny_architecture
from tests.tiny_models import tiny_model
from trl_crisp.run.flops import MatrixWeights, count_matrix_weights, measure_limit, step_flops

ARCHITECTURES = [
    *("bloom", "cohere", "falcon", "gemma2", "gpt2", "gpt_neox", "gpt_oss", "granite", "llama", "mpt", "opt", "phi3"),
    *("qwen2", "qwen3", "xglm"),
    # Mixtures of experts, of which a token passes two of four
    *("deepseek_v3", "granitemoe", "minimax", "mixtral", "qwen2_moe", "qwen3_moe"),
]
TOKENS = 16


def counted_products(run) -> int:
    """Multiplications of a run's matrix products, by torch; attention's own are batched, and left out."""
    with FlopCounterMode(display=False) as counter:
        run()
    flops = {str(name): count for name, count in counter.get_flop_counts()["Global"].items()}
    return sum(count for name, count in flops.items() if name in ("aten.mm", "aten.addmm")) // 2


@pytest.mark.parametrize("kind", ARCHITECTURES)
def test_weights_are_those_that_a_token_is_multiplied_with(kind):
    model = tiny_architecture(kind)
    model.set_experts_implementation("eager")
    before = torch.get_rng_state()
    weights = count_matrix_weights(model)
    assert torch.equal(torch.get_rng_state(), before)
    assert weights.head == 64 * 32
    with torch.no_grad():
        products = counted_products(lambda: model(torch.arange(TOKENS)[None] + 3, use_cache=False))
    assert weights.body + weights.head == products / TOKENS


def test_a_llama_by_hand():
    """Two layers of width 32: queries and outputs of 32 x 32, keys and values of 16 x 32, three matrices of 48 x 32."""
    model = tiny_model("llama")
    by_hand = MatrixWeights(2 * (2 * 32 * 32 + 2 * 16 * 32 + 3 * 48 * 32), model.config.vocab_size * 32)
    assert count_matrix_weights(model) == by_hand
    lora = get_peft_model(tiny_model("llama"), LoraConfig(r=4, target_modules="all-linear"))
    assert count_matrix_weights(lora.get_base_model()) == by_hand
    tied = tiny_model("llama", tie_word_embeddings=True)
    assert count_matrix_weights(tied) == by_hand


def test_experts_without_a_count_are_refused():
    model = tiny_architecture("mixtral")
    model.config.num_experts_per_tok = 0
    with pytest.raises(ValueError, match="does not say how many a token is routed to"):
        count_matrix_weights(model)


@pytest.mark.parametrize(
    ("frozen", "recomputes", "needed", "recomputed"),
    # Student tokens 7, teacher tokens 11, in the loss 3; body 100, head 10
    [
        (False, False, 6 * 100 * 7 + 2 * 100 * 11 + (6 + 2) * 10 * 3, 0),
        (True, False, 4 * 100 * 7 + 2 * 100 * 11 + (4 + 2) * 10 * 3, 0),
        (False, True, 6 * 100 * 7 + 2 * 100 * 11 + (6 + 2) * 10 * 3, 2 * 100 * 7),
        (True, True, 4 * 100 * 7 + 2 * 100 * 11 + (4 + 2) * 10 * 3, 2 * 100 * 7),
    ],
)
def test_a_step_by_hand(frozen, recomputes, needed, recomputed):
    flops = step_flops(MatrixWeights(100, 10), 7, 11, 3, has_frozen_weights=frozen, recomputes=recomputes)
    assert (flops.needed, flops.recomputed) == (needed, recomputed)


def test_full_training_costs_what_torch_counts():
    """Forward and backward pass of all weights, every token in the loss."""
    model = tiny_model("llama").train()
    weights = count_matrix_weights(model)

    def run():
        model(torch.arange(TOKENS)[None] + 3, use_cache=False).logits.sum().backward()

    flops = step_flops(weights, TOKENS, 0, TOKENS, has_frozen_weights=False, recomputes=False)
    # Without the teacher's head
    assert flops.needed - 2 * weights.head * TOKENS == 2 * counted_products(run)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_limit_is_that_of_a_product_and_draws_nothing(dtype):
    before = torch.get_rng_state()
    limit = measure_limit(torch.device("cpu"), dtype, size=256)
    assert torch.equal(torch.get_rng_state(), before)
    # A core does between 100 million and 10 trillion a second
    assert 1e8 < limit < 1e13
