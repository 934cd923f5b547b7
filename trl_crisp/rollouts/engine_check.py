"""Is the engine the student? Compares vLLM's log-probabilities of the tokens that it sampled with the student's.

Shape suffixes: B rollouts, T completion positions, N compared tokens, H hidden width, V vocabulary.
"""

import math
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from trl_crisp.loss.divergence import OutputHead, evenly_spaced, logits_of

# Our choice: an engine that never got the weights, or that another template feeds, shows in the first step; one that goes stale, later.
FIRST_STEPS = 3
EVERY_STEPS = 25
# Tokens of a micro-batch that are compared. Our choice: the paper's step then has 4,096, and their logits exist at once
COMPARED_TOKENS = 256
# Our choice, between the gaps of an engine in bfloat16 or 8 bits and those of one in 4 bits or without the chat template
# (benchmarks/engine_gap.py)
MEAN_GAP_LIMIT_NATS = 0.3
OFF_SHARE_LIMIT = 0.05
OFF_NATS = 1.0
# Parameters of vLLM's sampling that do not change the distribution of the next token
_NEUTRAL = {
    *(
        "seed",
        "stop",
        "stop_token_ids",
        "include_stop_str_in_output",
        "ignore_eos",
        "max_tokens",
        "logprobs",
        "output_kind",
    ),
    *("detokenize", "skip_special_tokens", "spaces_between_special_tokens"),
}


class Sampling(NamedTuple):
    """How the engine turns logits into the distribution that it samples from; 0 or 1 turns a truncation off."""

    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0


class Gap(NamedTuple):
    """Sums over the compared tokens: their absolute differences in nats, how many differ by more than a nat, and how many there are."""

    nats: torch.Tensor
    off: torch.Tensor
    tokens: torch.Tensor


class EngineCheck:
    """
    Compares in the first 3 steps of a run, also of a resumed one, and then in every 25th.

    Args:
        generation: TRL's `VLLMGeneration`. Its log-probabilities are those of the distribution that it samples from; a server has to be
            started with `--logprobs-mode processed_logprobs`, as TRL asks for.
    """

    def __init__(self, generation: Any) -> None:
        self._generation = generation
        self._first_step: int | None = None
        self._sums = [0.0, 0.0, 0.0]
        self.sampling, unknown = _sampling_of(generation)
        self._is_comparable = not unknown
        if unknown:
            warnings.warn(
                f"vLLM's log-probabilities are not compared with the student's, because of {', '.join(unknown)}: what that does to the "
                "distribution of the next token is not known here.",
                stacklevel=4,
            )

    def begin_run(self) -> None:
        """Tell the check that a run begins: its first steps are compared."""
        self._first_step = None

    def is_due(self, step: int) -> bool:
        """Return whether optimizer step `step`, counted from 1, is compared."""
        if self._first_step is None:
            self._first_step = step
        return self._is_comparable and (step - self._first_step < FIRST_STEPS or step % EVERY_STEPS == 0)

    @contextmanager
    def recording(self) -> Iterator["Recorded"]:
        """Make the engine return the log-probabilities of its tokens, which TRL discards, and record them."""
        generation, recorded = self._generation, Recorded()
        generate, generation.generate = (
            generation.generate,
            lambda *args, **kwargs: recorded.take(generate, *args, **kwargs),
        )
        log_probs, generation.logprobs = generation.logprobs, 0
        try:
            yield recorded
        finally:
            generation.generate, generation.logprobs = generate, log_probs

    def add(self, nats: float, off: float, tokens: float) -> None:
        """Add the sums of a micro-batch, over all processes."""
        self._sums = [total + one for total, one in zip(self._sums, (nats, off, tokens), strict=True)]

    def judge(self, step: int) -> dict[str, float]:
        """
        Return what is logged of a step, by name: the mean gap in nats and the share of tokens that are off by more than a nat.

        Raises:
            RuntimeError: If one of them is above its limit.
        """
        (nats, off, tokens), self._sums = self._sums, [0.0, 0.0, 0.0]
        if not tokens:
            return {}
        mean_gap_nats, off_share = nats / tokens, off / tokens
        # Also true for NaN
        if not (mean_gap_nats <= MEAN_GAP_LIMIT_NATS and off_share <= OFF_SHARE_LIMIT):
            raise RuntimeError(
                f"vLLM does not sample from the student: over {tokens:.0f} tokens of step {step} its log-probabilities and the student's "
                f"differ by {mean_gap_nats:.3g} nats on average (at most {MEAN_GAP_LIMIT_NATS:g}), and {off_share:.1%} of them by more "
                f"than a nat (at most {OFF_SHARE_LIMIT:.0%}). {self._causes()} The step was not taken; resume from the last checkpoint."
            )
        return {"vllm/mean_gap_nats": mean_gap_nats, "vllm/off_share": off_share}

    def _causes(self) -> str:
        causes = [
            "stale weights (an update did not reach the engine, or another run uses it)",
            "another prompt (another chat template, or a first token that one side adds)",
            "quantization (the engine holds the weights, or the keys and values, in another precision)",
        ]
        if self._generation.mode == "server":
            causes.append(
                "a server that was not started with --logprobs-mode processed_logprobs, or with another model"
            )
        elif self._generation.enable_sleep_mode:
            causes.append("an engine that is asleep (try vllm_enable_sleep_mode=False)")
        return f"Likely causes: {'; '.join(causes)}."


class Recorded:
    """What an engine returned while it was recorded."""

    def __init__(self) -> None:
        self._first: tuple[list[list[int]], list[list[float]]] | None = None
        self._is_recorded = False

    def take(self, generate: Any, *args: Any, **kwargs: Any) -> tuple:
        """Call the engine's `generate`, and keep the log-probabilities of the first call. The others continue rollouts after a tool."""
        output = generate(*args, **kwargs)
        if not self._is_recorded:
            self._is_recorded = True
            _, completions, log_probs, token_ids = output
            if log_probs is None:
                warnings.warn(
                    "vLLM returned no log-probabilities, so it was not checked whether it samples from the student.",
                    stacklevel=2,
                )
            else:
                rows = zip(completions, log_probs, token_ids or log_probs, strict=True)
                values = [_of_sampled(*row, token_ids is not None) for row in rows]
                # Copies, because TRL puts what a tool and the model write later into the same lists
                self._first = [list(ids) for ids in completions], values
        return output

    def log_probs(self, completion_ids_BT: torch.Tensor) -> torch.Tensor | None:
        """
        Return the engine's log-probabilities, [B, T] in float32, NaN where it has none: under padding, and from a tool's first token on.

        Args:
            completion_ids_BT: The rollouts, padded on the right.
        """
        if self._first is None:
            return None
        values_BT = torch.full(completion_ids_BT.shape, torch.nan)
        for row, (ids, values) in enumerate(zip(*self._first, strict=True)):
            count = min(len(ids), completion_ids_BT.size(1))
            assert completion_ids_BT[row, :count].tolist() == list(ids[:count]), (
                "the rollouts are in another order now"
            )
            values_BT[row, :count] = torch.tensor(values[:count])
        return values_BT.to(completion_ids_BT.device)


@torch.no_grad()
def engine_gap(
    hidden_BTH: torch.Tensor,
    head: OutputHead,
    token_ids_BT: torch.Tensor,
    engine_log_probs_BT: torch.Tensor,
    sampling: Sampling,
) -> Gap:
    """
    Return how far the engine's log-probabilities are from the student's, over at most 256 tokens, evenly spaced.

    Args:
        hidden_BTH, head: The student's last hidden states that predict the tokens, and its output head, gathered.
        token_ids_BT: The sampled tokens.
        engine_log_probs_BT: Of the same tokens, NaN where there is none.
        sampling: The distribution that the engine sampled from. The loss has a temperature of its own, so its values do not serve.
    """
    tokens_N = evenly_spaced((~engine_log_probs_BT.isnan()).flatten().nonzero().squeeze(1), COMPARED_TOKENS)
    logits_NV = logits_of(hidden_BTH.flatten(0, 1)[tokens_N][None], head)[0]
    student_N = sampled_log_probs(logits_NV, token_ids_BT.flatten()[tokens_N], sampling)
    gap_N = (engine_log_probs_BT.flatten()[tokens_N] - student_N).abs()
    # A NaN of the student counts as off
    is_off_N = ~(gap_N <= OFF_NATS)
    return Gap(gap_N.sum(), is_off_N.sum(), torch.tensor(len(gap_N), device=gap_N.device))


def sampled_log_probs(logits_NV: torch.Tensor, token_ids_N: torch.Tensor, sampling: Sampling) -> torch.Tensor:
    """
    Return the log-probabilities of sampled tokens, [N], in the distribution that is sampled from.

    The logits are divided by the temperature, and the mass is that of the tokens which the truncations keep, in vLLM's order: min_p, top_k,
    top_p. A sampled token counts as kept: if two computations round otherwise, a token at the border is kept by one of them only.
    """
    log_probs_NV = (logits_NV.float() / sampling.temperature).log_softmax(dim=-1)
    sampled_N = log_probs_NV.gather(1, token_ids_N[:, None]).squeeze(1)
    if sampling.top_p >= 1 and sampling.top_k <= 0 and sampling.min_p <= 0:
        return sampled_N
    kept_NV = log_probs_NV.exp()
    sorted_NV = kept_NV.sort(dim=-1, descending=True).values
    if sampling.min_p > 0:
        sorted_NV = sorted_NV.masked_fill(sorted_NV < sampling.min_p * sorted_NV[:, :1], 0.0)
    if sampling.top_k > 0:
        sorted_NV = sorted_NV[:, : sampling.top_k]
    if sampling.top_p < 1:
        # The most likely tokens up to the first one with which the mass reaches top_p
        before_NV = sorted_NV.cumsum(dim=-1) - sorted_NV
        sorted_NV = sorted_NV.masked_fill(before_NV >= sampling.top_p * sorted_NV.sum(dim=-1, keepdim=True), 0.0)
    return sampled_N - sorted_NV.sum(dim=-1).log()


def _of_sampled(
    completion: Sequence[int], log_probs: Sequence[Sequence], token_ids: Sequence[Sequence], has_ids: bool
) -> list[float]:
    """Return the log-probability of each sampled token; the engine may return those of the most likely ones too."""
    values = []
    for token, of_position, ids in zip(completion, log_probs, token_ids, strict=True):
        index = list(ids).index(token) if has_ids else 0
        value = of_position[index]
        # TRL writes None for NaN. Here NaN is for no value, and this one counts as off
        values.append(-math.inf if value is None or math.isnan(value) else float(value))
    return values


def _sampling_of(generation: Any) -> tuple[Sampling, list[str]]:
    """Return the engine's distribution, and the settings that change it in a way that is not known here."""
    given = {name: getattr(generation, name) for name in (*Sampling._fields, "repetition_penalty")}
    # As in TRL, these override the others
    given |= generation.generation_kwargs
    values = {name: default if (value := given.pop(name)) is None else value for name, default in _OFF.items()}
    unknown = [
        f"{name}={value!r}" for name, value in given.items() if name not in _NEUTRAL and value != _INERT.get(name)
    ]
    if generation.structured_outputs_regex is not None:
        unknown.append(f"structured_outputs_regex={generation.structured_outputs_regex!r}")
    if not values["temperature"] > 0:
        unknown.append(f"temperature={values['temperature']!r}")
    return Sampling(**values), unknown


_OFF = Sampling()._asdict()
_INERT = {"repetition_penalty": 1.0, "frequency_penalty": 0.0, "presence_penalty": 0.0, "n": 1, "min_tokens": 0}
