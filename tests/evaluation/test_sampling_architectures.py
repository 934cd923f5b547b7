"""The sampler's batches on many architectures: each answer is the one that the model gives alone."""

import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model

from tests.tiny_architectures import VOCAB_SIZE, tiny_architecture
from tests.tiny_models import tiny_model
from trl_crisp.evaluation.sampling import sample

# A cache that rows can leave, and padding that is not seen
BATCHED = [
    "biogpt",
    "bloom",
    "gpt2",
    "gpt_bigcode",
    "jamba",
    "llama",
    "llama4_text",
    "mpt",
    "opt",
    "qwen3_moe",
    "qwen3_next",
]
BATCHED += ["xglm"]
# No such cache, or a model that ignores the mask
ALONE = ["bart", "mamba", "mamba2", "minimax", "openai-gpt", "rwkv"]
NEW_TOKENS = 8


def prompts() -> list[list[int]]:
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(5, VOCAB_SIZE, (n,), generator=generator).tolist() for n in (3, 14, 7, 4)]


def greedy(model, prompt: list[int]) -> list[int]:
    """The answer of one prompt, all its tokens passed at each step; ended by id 1."""
    ids = list(prompt)
    while len(ids) < len(prompt) + NEW_TOKENS and (len(ids) == len(prompt) or ids[-1] != 1):
        with torch.no_grad():
            ids.append(model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax().item())
    return ids[len(prompt) :]


@pytest.mark.parametrize("kind", [*BATCHED, *ALONE])
def test_greedy_answers_are_those_of_each_prompt_alone(kind):
    model = tiny_architecture(kind)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        answers = sample(model, prompts(), max_new_tokens=NEW_TOKENS, temperature=0, eos_token_ids={1})
    assert [answer.token_ids for answer in answers] == [greedy(model, prompt) for prompt in prompts()]
    assert any("each prompt is answered alone" in str(w.message) for w in said) == (kind in ALONE)


@pytest.mark.filterwarnings("ignore:.*each prompt is answered alone")
@pytest.mark.parametrize("kind", ["rwkv", "openai-gpt"])
def test_a_row_answered_alone_draws_by_its_place(kind):
    """As in a batch: neither the batch size nor the other rows change it."""
    model = tiny_architecture(kind)
    fields = {"max_new_tokens": NEW_TOKENS, "temperature": 1.0, "seed": 5, "eos_token_ids": {1}}
    together = sample(model, prompts(), **fields)
    assert sample(model, prompts()[1:2], places=[1], batch_size=3, **fields) == together[1:2]
    assert sample(model, prompts(), **{**fields, "seed": 6}) != together


def test_an_adapter_on_learned_positions_is_batched():
    """PEFT's forward does not name the positions that it hands on."""
    model = get_peft_model(
        tiny_architecture("gpt2"), LoraConfig(r=4, init_lora_weights=False, fan_in_fan_out=True)
    ).eval()
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*each prompt is answered alone")
        answers = sample(model, prompts(), max_new_tokens=NEW_TOKENS, temperature=0, eos_token_ids={1})
    assert [answer.token_ids for answer in answers] == [greedy(model, prompt) for prompt in prompts()]


@pytest.mark.parametrize("mask_value", [-torch.inf, torch.finfo(torch.float32).min])
def test_masked_tokens_do_not_keep_rows_from_sharing_a_batch(mask_value):
    model = tiny_model()
    head = torch.nn.Linear(32, model.config.vocab_size)
    head.weight = model.lm_head.weight
    with torch.no_grad():
        head.bias.zero_()
        head.bias[[3, 5]] = mask_value
    model.lm_head = head
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*each prompt is answered alone")
        answers = sample(model, prompts(), max_new_tokens=NEW_TOKENS, temperature=0, eos_token_ids={1})
    assert [answer.token_ids for answer in answers] == [greedy(model, prompt) for prompt in prompts()]
