"""Answers are sampled as transformers samples them, whatever the batch."""

import math

import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from trl_crisp.evaluation.sampling import Completion, SamplingProgress, next_tokens, sample

EOS = [5, 9]


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=24,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        # Wide enough for distributions that are not flat, so that rows end at different steps
        initializer_range=0.6,
        bos_token_id=1,
        eos_token_id=EOS,
        pad_token_id=0,
    )
    return LlamaForCausalLM(config).float()


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    generator = np.random.default_rng(0)
    return [generator.integers(1, 24, size=size).tolist() for size in (3, 11, 7, 1, 5, 9, 4, 6, 2, 8)]


def test_greedy_equals_generate(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    # More tokens than the cache grows by at once, so that it has to grow
    cap_tokens = 150
    got = sample(model, prompts, max_new_tokens=cap_tokens, temperature=0, batch_size=4)
    for prompt, completion in zip(prompts, got, strict=True):
        expected = model.generate(torch.tensor([prompt]), max_new_tokens=cap_tokens, do_sample=False)
        assert completion.token_ids == expected[0, len(prompt) :].tolist()


def test_an_answer_ends_at_any_eos_and_keeps_it(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    got = sample(model, prompts * 4, max_new_tokens=40, temperature=1.0, top_p=1.0, top_k=0, seed=3)
    ended = [completion for completion in got if completion.ended_by_eos]
    assert {completion.token_ids[-1] for completion in ended} == set(EOS)
    for completion in got:
        assert not set(completion.token_ids[:-1]) & set(EOS)
        assert completion.ended_by_eos == (completion.token_ids[-1] in EOS)
        assert completion.ended_by_eos or len(completion.token_ids) == 40
    other = sample(model, prompts, max_new_tokens=40, seed=3, eos_token_ids={7})
    assert all(7 not in completion.token_ids[:-1] for completion in other)


def test_a_row_depends_neither_on_the_batch_nor_on_the_others(
    model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    arguments = {"max_new_tokens": 60, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    together = sample(model, prompts, batch_size=len(prompts), **arguments)
    assert together == sample(model, prompts, batch_size=1, **arguments)
    assert together[:4] == sample(model, prompts[:4], batch_size=3, **arguments)
    assert together != sample(model, prompts, **{**arguments, "seed": 2})


def test_a_part_of_the_prompts_gives_the_same_answers_at_their_places(
    model: LlamaForCausalLM, prompts: list[list[int]]
) -> None:
    arguments = {"max_new_tokens": 30, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "seed": 1}
    told: dict[int, Completion] = {}
    whole = sample(model, prompts, on_completion=told.__setitem__, **arguments)
    assert [told[index] for index in range(len(prompts))] == whole
    places = [4, 1]
    assert sample(model, [prompts[place] for place in places], places=places, **arguments) == [whole[4], whole[1]]


def test_progress_counts_up_to_all_rows(model: LlamaForCausalLM, prompts: list[list[int]]) -> None:
    model.train()
    reports: list[SamplingProgress] = []
    got = sample(model, prompts, max_new_tokens=20, batch_size=4, progress=reports.append)
    assert model.training
    model.eval()
    assert reports[-1].rows_done == reports[-1].rows == len(prompts)
    assert reports[-1].tokens == sum(len(completion.token_ids) for completion in got)
    assert reports[-1].left_at_most_s == 0
    assert all(report.left_at_most_s is None or report.left_at_most_s > 0 for report in reports[:-1])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens is 0"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"temperature": -1.0}, "temperature is -1.0"),
    ],
)
def test_sampling_settings_that_make_no_sense_are_refused(
    model: LlamaForCausalLM, changes: dict[str, float], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        sample(model, [[1]], **{"max_new_tokens": 2, **changes})  # type: ignore[arg-type]


def test_an_empty_prompt_and_a_missing_eos_are_refused(model: LlamaForCausalLM) -> None:
    with pytest.raises(ValueError, match="place 1 has no tokens"):
        sample(model, [[1], []], max_new_tokens=2)
    kept, model.generation_config.eos_token_id = model.generation_config.eos_token_id, None
    try:
        with pytest.raises(ValueError, match="no eos_token_id"):
            sample(model, [[1]], max_new_tokens=2)
    finally:
        model.generation_config.eos_token_id = kept


@pytest.mark.parametrize(("top_p", "top_k"), [(1.0, 0), (0.7, 0), (1.0, 3), (0.6, 4)])
def test_draws_have_the_cut_distribution(top_p: float, top_k: int) -> None:
    logits = [0.3, -1.2, 2.0, 0.0, 1.1, -0.4]
    temperature, draws = 0.8, 20_000
    # The oracle: plain loops over tokens sorted by probability
    weights = {token: math.exp(value / temperature) for token, value in enumerate(logits)}
    ranked = sorted(weights, key=lambda token: -weights[token])[: top_k or None]
    total = sum(weights[token] for token in ranked)
    kept, reached = [], 0.0
    for token in ranked:
        if reached < top_p:
            kept.append(token)
        reached += weights[token] / total
    mass = sum(weights[token] for token in kept)
    # Evenly spaced numbers make the frequencies exact up to one draw at each border
    uniforms = (torch.arange(draws) + 0.5) / draws
    ids = next_tokens(
        torch.tensor([logits]).expand(draws, -1), uniforms, temperature=temperature, top_p=top_p, top_k=top_k
    )
    counts = torch.bincount(ids, minlength=len(logits)) / draws
    for token in range(len(logits)):
        expected = weights[token] / mass if token in kept else 0.0
        assert counts[token].item() == pytest.approx(expected, abs=1e-3)


def test_a_draw_never_leaves_the_support() -> None:
    logits = torch.tensor([[float("-inf"), 0.0, 0.0, float("-inf")]]).expand(3, -1)
    ids = next_tokens(logits, torch.tensor([0.0, 0.5, 1 - 2**-24]), temperature=1.0)
    assert ids.tolist() == [1, 2, 2]
