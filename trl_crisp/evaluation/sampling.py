"""Samples answers from a transformers model, in batches that finished rows leave.

`model.generate` computes all rows until the longest one has ended. Here a row that has ended leaves the batch and its cache, so a
few long answers cost less than the whole batch. A row's random numbers depend only on the seed and the row's place among the
prompts, not on the batch size or the other rows. If a model gives other answers in such a batch than alone (it ignores the mask, or
rows cannot be taken out of its cache), it answers one prompt at a time.
"""

import time
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.models.hidden_states import causal_model, difference, positions_of, takes, tolerance_of

# Ours: the buffers of the cache grow by this many tokens when they are full. A larger number copies less often and leaves more
# memory unused.
_CACHE_GROWTH_TOKENS = 128
# Ours: finished rows leave when they are an eighth of the batch, because each time the cache of the other rows is copied
_COMPACT_SHARE = 1 / 8
# Ours: the longest prompt of the trial, so that the short rows have enough padding to show its effect
_TRIED_TOKENS = 24
# Ours: the first steps of a batch are slower, so no pace is reported from them
_PACE_STEPS = 8
# Ours: rows at once. Most models fit into memory with so many.
BATCH_ROWS = 32


@dataclass(frozen=True)
class Completion:
    """One sampled answer: its token ids, including the eos token that ended it, and whether one ended it."""

    token_ids: list[int]
    ended_by_eos: bool


@dataclass(frozen=True)
class SamplingProgress:
    """
    The progress of a call of [`sample`].

    Attributes:
        rows_done, rows: How many answers have ended, of how many.
        tokens: How many tokens have been sampled.
        tokens_per_s: How many per second, since the start.
        left_at_most_s: The seconds that are left at this pace if every open row runs to the cap; `None` in the first steps of a batch.
    """

    rows_done: int
    rows: int
    tokens: int
    tokens_per_s: float
    left_at_most_s: float | None


class _GrowingLayer(DynamicLayer):
    """A `DynamicLayer` with spare room for new tokens. The parent copies all keys and values at every token."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self._buffers: list[torch.Tensor] = []
        start_tokens = self.get_seq_length()
        end_tokens = start_tokens + key_states.shape[-2]
        if not self._buffers or self._buffers[0].shape[-2] < end_tokens:
            old = [self.keys, self.values]
            self._buffers = []
            for new, past in zip((key_states, value_states), old, strict=True):
                shape = (*new.shape[:-2], end_tokens + _CACHE_GROWTH_TOKENS, new.shape[-1])
                buffer = new.new_empty(shape)
                if start_tokens:
                    assert past is not None
                    buffer[..., :start_tokens, :] = past
                self._buffers.append(buffer)
        for buffer, new in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start_tokens:end_tokens, :] = new
        self.keys, self.values = (buffer[..., :end_tokens, :] for buffer in self._buffers)
        return self.keys, self.values

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)
        self._buffers = []


def _new_cache(model: Any) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    # Layers of other kinds (sliding windows, recurrent states) have a bounded size
    cache.layers = [_GrowingLayer() if type(layer) is DynamicLayer else layer for layer in cache.layers]
    return cache


def eos_token_ids_of(generation_config: Any) -> set[int]:
    """Return the ids that end a model's answer, from its generation config. Raises `ValueError` if it has none."""
    eos = generation_config.eos_token_id
    if eos is None:
        raise ValueError(
            "The model's generation config has no eos_token_id, so no answer could end: set "
            "model.generation_config.eos_token_id, or pass eos_token_ids."
        )
    return {eos} if isinstance(eos, int) else set(eos)


def next_tokens(
    logits: torch.Tensor, uniforms: torch.Tensor, *, temperature: float, top_p: float = 1.0, top_k: int = 0
) -> torch.Tensor:
    """
    Return one token id per row, [rows], drawn by inverting the cumulative distribution.

    Args:
        logits: [rows, vocabulary].
        uniforms: Uniform random numbers in [0, 1), [rows].
        temperature: 0 takes the most likely token.
        top_p: 1 turns it off.
        top_k: 0 turns it off. It cuts before `top_p`, as in transformers.
    """
    if temperature == 0:
        return logits.argmax(dim=-1)
    logits = logits.float() / temperature
    # Draw only among the tokens that the cuts leave, in order of probability
    ids = None
    if 0 < top_k < logits.shape[-1]:
        logits, ids = logits.topk(top_k, dim=-1)
    elif top_p < 1:
        logits, ids = logits.sort(dim=-1, descending=True)
    probabilities = logits.softmax(dim=-1)
    if top_p < 1:
        # A token stays if the more likely ones together are below top_p, so the first one always stays
        probabilities = probabilities.masked_fill(probabilities.cumsum(dim=-1) - probabilities >= top_p, 0.0)
    cumulative = probabilities.cumsum(dim=-1)
    # The sum may be rounded below 1. The target is scaled by it and kept strictly below it, so that a token without probability is
    # never drawn.
    total = cumulative[:, -1:]
    targets = torch.minimum(uniforms.to(total).unsqueeze(1) * total, torch.nextafter(total, torch.zeros_like(total)))
    places = torch.searchsorted(cumulative, targets, right=True)
    return (places if ids is None else ids.gather(1, places)).squeeze(1)


@torch.inference_mode()
def sample(
    model: Any,
    prompt_token_ids: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = EvaluationSettings.temperature,
    top_p: float = EvaluationSettings.top_p,
    top_k: int = EvaluationSettings.top_k,
    seed: int = EvaluationSettings.seed,
    batch_size: int = BATCH_ROWS,
    eos_token_ids: set[int] | None = None,
    places: Sequence[int] | None = None,
    progress: Callable[[SamplingProgress], None] | None = None,
    on_completion: Callable[[int, Completion], None] | None = None,
) -> list[Completion]:
    """
    Return one answer per prompt, in the order of the prompts.

    Args:
        model: A causal language model of transformers. It is in evaluation mode during the call.
        prompt_token_ids: The prompts as token ids, including the generation prompt. Prompts of similar length share a batch.
        max_new_tokens: Answers are cut at this many tokens; `ended_by_eos` is then `False`.
        temperature, top_p, top_k: The defaults are the protocol's
            ([`~trl_crisp.evaluation.settings.EvaluationSettings`]). Temperature 0 is greedy.
        seed: With a prompt's place it determines the random numbers.
        batch_size: Rows at once. The default is ours and fits most models; more rows are faster if the memory allows.
        eos_token_ids: The ids that end an answer; by default those of the model's generation config.
        places: One number per prompt, which determines its random numbers; by default 0, 1, 2 ... A part of a larger call gets the
            same answers if it gives the same places.
        progress: Called about once per second, and at the end of each batch.
        on_completion: Receives a prompt's index and its answer, as soon as the answer has ended.

    Raises:
        ValueError: If a prompt is empty, a cap or a batch size is below 1, a temperature is below 0, or the eos is not known.
    """
    for name, value, least in (("max_new_tokens", max_new_tokens, 1), ("batch_size", batch_size, 1)):
        if value < least:
            raise ValueError(f"{name} is {value}: it has to be at least {least}.")
    if temperature < 0:
        raise ValueError(f"temperature is {temperature}: give 0 for greedy answers, or a positive number.")
    empty = [index for index, ids in enumerate(prompt_token_ids) if not len(ids)]
    if empty:
        raise ValueError(f"The prompt at place {empty[0]} has no tokens: render it with the chat template first.")
    eos = torch.tensor(
        sorted(eos_token_ids if eos_token_ids is not None else eos_token_ids_of(model.generation_config))
    )

    results: list[Completion | None] = [None] * len(prompt_token_ids)
    order = sorted(range(len(prompt_token_ids)), key=lambda index: len(prompt_token_ids[index]))
    start_s = last_report_s = time.monotonic()
    tokens = 0

    def report(step: int, open_rows: int, batch_s: float, batches_left: int) -> None:
        if progress is None:
            return
        elapsed_s = time.monotonic() - start_s
        steps_left = (max_new_tokens - step) * bool(open_rows) + max_new_tokens * batches_left
        # The prompt's pass gives the first token
        pace_s = batch_s / (step - 1) if step > _PACE_STEPS else None
        progress(
            SamplingProgress(
                rows_done=sum(result is not None for result in results),
                rows=len(results),
                tokens=tokens,
                tokens_per_s=tokens / max(elapsed_s, 1e-9),
                left_at_most_s=0.0 if not steps_left else None if pace_s is None else pace_s * steps_left,
            )
        )

    was_training = model.training
    model.eval()
    batch_type: type[_Batch | _Alone] = _Batch
    try:
        if order and (problem := _problem_of_batches(model)):
            warnings.warn(
                f"{type(causal_model(model)).__name__} {problem}, so each prompt is answered alone and without a cache: the "
                "answers are right, but sampling is slow.",
                stacklevel=3,
            )
            batch_size, batch_type = 1, _Alone
        for first in range(0, len(order), batch_size):
            batch = order[first : first + batch_size]
            batches_left = (len(order) - 1) // batch_size - first // batch_size
            seeds = [[seed, index if places is None else places[index]] for index in batch]
            state = batch_type(model, [prompt_token_ids[index] for index in batch], batch, seeds, max_new_tokens)
            batch_start_s = time.monotonic()
            for step in range(1, max_new_tokens + 1):
                ids = next_tokens(
                    state.logits, state.uniforms[:, step - 1], temperature=temperature, top_p=top_p, top_k=top_k
                )
                ended = torch.isin(ids.cpu(), eos)
                for row, (token_id, end) in enumerate(zip(ids.tolist(), ended.tolist(), strict=True)):
                    index = state.indices[row]
                    if results[index] is not None:
                        continue
                    tokens += 1
                    state.tokens[index].append(token_id)
                    if end or step == max_new_tokens:
                        completion = Completion(state.tokens[index], end)
                        results[index] = completion
                        if on_completion is not None:
                            on_completion(index, completion)
                open_rows = [row for row, index in enumerate(state.indices) if results[index] is None]
                now_s = time.monotonic()
                if now_s - last_report_s > 1 or not open_rows:
                    report(step, len(open_rows), now_s - batch_start_s, batches_left)
                    last_report_s = now_s
                if not open_rows:
                    break
                state.advance(ids, open_rows)
    finally:
        model.train(was_training)
    return [result for result in results if result is not None]


class _Batch:
    """The open rows of a batch: their cache, attention mask, next logits and random numbers."""

    def __init__(
        self,
        model: Any,
        prompts: list[Sequence[int]],
        indices: list[int],
        seeds: list[list[int]],
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.indices = indices
        self.tokens: dict[int, list[int]] = {index: [] for index in indices}
        device = model.get_input_embeddings().weight.device
        width_tokens = max(len(ids) for ids in prompts)
        # The id of the padding has no effect; 0 exists in every vocabulary
        input_ids = torch.zeros((len(prompts), width_tokens), dtype=torch.long)
        self.mask = torch.zeros_like(input_ids)
        for row, ids in enumerate(prompts):
            input_ids[row, width_tokens - len(ids) :] = torch.tensor(ids)
            self.mask[row, width_tokens - len(ids) :] = 1
        self.uniforms = _uniforms(seeds, max_new_tokens, device)
        self.mask = self.mask.to(device)
        self.cache = _new_cache(model)
        # Some models' forward has no logits_to_keep or no position_ids
        self.keep = {"logits_to_keep": 1} if takes(model, "logits_to_keep") else {}
        self.takes_positions = takes(causal_model(model), "position_ids")
        self.logits = self._forward(input_ids.to(device), positions_of(self.mask))

    def _forward(self, input_ids: torch.Tensor, position_ids: torch.Tensor) -> torch.Tensor:
        positions = {"position_ids": position_ids} if self.takes_positions else {}
        output = self.model(
            input_ids=input_ids,
            attention_mask=self.mask,
            past_key_values=self.cache,
            use_cache=True,
            **positions,
            **self.keep,
        )
        return output.logits[:, -1]

    def advance(self, ids: torch.Tensor, open_rows: list[int]) -> None:
        """Feed the drawn `ids`, [rows], and compute the next logits. Finished rows leave if they are enough."""
        rows = len(self.indices)
        if rows - len(open_rows) >= max(1, rows * _COMPACT_SHARE):
            keep = torch.tensor(open_rows, device=ids.device)
            self.indices = [self.indices[row] for row in open_rows]
            self.mask, self.uniforms, ids = self.mask[keep], self.uniforms[keep], ids[keep]
            layers: list[Any] = self.cache.layers
            for layer in layers:
                # Layers with recurrent states can only select rows by reordering
                select = layer.reorder_cache if hasattr(layer, "recurrent_states") else layer.batch_select_indices
                select(keep)
        self.mask = torch.cat([self.mask, self.mask.new_ones((len(self.indices), 1))], dim=1)
        self.logits = self._forward(ids.unsqueeze(1), self.mask.sum(dim=1, keepdim=True) - 1)


class _Alone:
    """Like [`_Batch`], for one row and without a cache: each step computes all tokens."""

    def __init__(
        self,
        model: Any,
        prompts: list[Sequence[int]],
        indices: list[int],
        seeds: list[list[int]],
        max_new_tokens: int,
    ) -> None:
        self.model = model
        self.indices = indices
        self.tokens: dict[int, list[int]] = {index: [] for index in indices}
        device = model.get_input_embeddings().weight.device
        self.uniforms = _uniforms(seeds, max_new_tokens, device)
        self.input_ids = torch.tensor([list(prompts[0])], device=device)
        self.logits = self._forward()

    def _forward(self) -> torch.Tensor:
        mask = torch.ones_like(self.input_ids)
        return self.model(input_ids=self.input_ids, attention_mask=mask, use_cache=False).logits[:, -1]

    def advance(self, ids: torch.Tensor, open_rows: list[int]) -> None:
        """Feed the drawn `ids`, [1], and compute the next logits."""
        self.input_ids = torch.cat([self.input_ids, ids.unsqueeze(1)], dim=1)
        self.logits = self._forward()


def _uniforms(seeds: list[list[int]], max_new_tokens: int, device: torch.device) -> torch.Tensor:
    uniforms = [np.random.default_rng(row_seed).random(max_new_tokens) for row_seed in seeds]
    return torch.tensor(np.stack(uniforms), dtype=torch.float32).clamp_(max=1 - 2**-24).to(device)


def _problem_of_batches(model: Any) -> str | None:
    # Three rows of different lengths get a further token, and one row leaves. The other two must have the logits that each has alone.
    vocab_size = model.config.get_text_config().vocab_size
    ids = [(i + 1) * vocab_size // (_TRIED_TOKENS + 1) for i in range(_TRIED_TOKENS)]
    prompts: list[Sequence[int]] = [ids[:4], ids[:6], ids]
    seeds = [[0]] * len(prompts)
    try:
        batch = _Batch(model, prompts, [0, 1, 2], seeds, 1)
        batch.advance(torch.full_like(batch.logits[:, 0], ids[-1], dtype=torch.long), [0, 1])
    except Exception as error:
        return f"has a cache that rows cannot be taken out of ({type(error).__name__}: {error})"
    alone = torch.cat([_Alone(model, [[*prompt, ids[-1]]], [0], seeds, 1).logits for prompt in prompts[:2]])
    is_same = difference(batch.logits, alone) <= tolerance_of(model, alone)
    return None if is_same else "gives other answers in a padded batch with a cache than alone"
