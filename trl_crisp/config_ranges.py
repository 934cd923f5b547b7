"""The numbers of TRL's and transformers' fields that no training can have; they would fail late, or change the run without a word."""

import math
from dataclasses import dataclass
from typing import Any

from transformers import GenerationConfig

_MAX_SEED = 2**32 - 1


@dataclass(frozen=True)
class _Range:
    """From `low` to `high`, both included unless `is_open_*`; `advice` says what the number does, or what to give."""

    low: float
    high: float
    advice: str
    is_whole: bool = False
    is_open_low: bool = False
    is_open_high: bool = False

    def has(self, value: float) -> bool:
        # All comparisons are false for NaN
        above = value > self.low if self.is_open_low else value >= self.low
        below = value < self.high if self.is_open_high or self.high == math.inf else value <= self.high
        return above and below and not (self.is_whole and value % 1)

    def in_words(self) -> str:
        number = "a whole number" if self.is_whole else "a number"
        low = f"above {self.low:g}" if self.is_open_low else f"of at least {self.low:g}"
        if self.high == math.inf:
            return f"{number} {low}"
        return f"{number} {low} and {'below' if self.is_open_high else 'at most'} {self.high:,g}"


def _at_least(low: int, advice: str) -> _Range:
    return _Range(low, math.inf, advice, is_whole=True)


_RANGES = {
    "learning_rate": _Range(0, math.inf, "The paper's is 1e-6; with LoRA try 2e-5."),
    "weight_decay": _Range(0, math.inf, "0 switches it off; the paper's is 0.01."),
    "max_grad_norm": _Range(0, math.inf, "0 switches clipping off; the paper's is 1."),
    "adam_beta1": _Range(0, 1, "The default is 0.9.", is_open_high=True),
    "adam_beta2": _Range(0, 1, "The default is 0.999.", is_open_high=True),
    "adam_epsilon": _Range(0, math.inf, "The default is 1e-8."),
    "per_device_train_batch_size": _at_least(1, "It counts the rollouts of one pass on one device."),
    "per_device_eval_batch_size": _at_least(1, "It counts the rollouts of one pass on one device."),
    "gradient_accumulation_steps": _at_least(1, "It counts the passes of one step; 1 is no accumulation."),
    "max_completion_length": _at_least(1, "It is the longest rollout in tokens; the paper's is 8,192."),
    "min_p": _Range(0, 1, "0 or None switches it off."),
    "repetition_penalty": _Range(0, math.inf, "1 is no penalty.", is_open_low=True),
    "seed": _Range(0, _MAX_SEED, "Any such number will do.", is_whole=True),
    "data_seed": _Range(0, _MAX_SEED, "None takes `seed`.", is_whole=True),
}
# Rows would have several rollouts, or `generate` would return no tensor of tokens
_COUNTS = ("num_return_sequences", "n", "best_of")


def check_ranges(args: Any) -> None:
    """
    Check the numbers that a training cannot have.

    Args:
        args: A [`~trl_crisp.CRISPConfig`].

    Raises:
        ValueError: If one is out of its range. The message names it, and says what to give.
    """
    for name, allowed in _RANGES.items():
        value = getattr(args, name)
        if value is not None and not allowed.has(value):
            raise ValueError(f"{name}={value} must be {allowed.in_words()}. {allowed.advice}")
    if args.max_steps != -1 and not (args.max_steps >= 1 and not args.max_steps % 1):
        raise ValueError(
            f"max_steps={args.max_steps} must be a whole number of at least 1, or -1 for num_train_epochs passes over the rows."
        )
    if args.max_steps == -1 and not 0 < args.num_train_epochs < math.inf:
        raise ValueError(
            f"num_train_epochs={args.num_train_epochs} must be a number above 0: that many times the run passes over the rows. Or set "
            "max_steps."
        )
    # vLLM switches it off with -1 too
    least = -1 if args.use_vllm else 0
    if args.top_k is not None and (args.top_k < least or args.top_k % 1):
        raise ValueError(
            f"top_k={args.top_k} must be a whole number of at least 0, which switches it off; the paper samples from all tokens."
        )
    _check_generation_kwargs(args.generation_kwargs or {}, args.use_vllm)
    _check_accelerator_config(args.accelerator_config)


def _check_generation_kwargs(given: dict[str, Any], uses_vllm: bool) -> None:
    for name in _COUNTS:
        if (count := given.get(name)) not in (None, 1):
            raise ValueError(
                f"generation_kwargs has {name}={count}, but each row of a batch has one rollout. For more rollouts of each prompt repeat the rows, "
                "or raise num_train_epochs."
            )
    if given.get("return_dict_in_generate"):
        raise ValueError(
            "generation_kwargs has return_dict_in_generate=True, but the trainer reads the tokens alone. Remove it."
        )
    if not uses_vllm and (unknown := sorted(set(given) - set(GenerationConfig().to_dict()))):
        raise ValueError(
            f"generation_kwargs has {', '.join(unknown)}, which transformers' GenerationConfig does not have, so nothing would read it. Correct the "
            "name, or remove it."
        )


def _check_accelerator_config(accelerator_config: Any) -> None:
    if getattr(accelerator_config, "dispatch_batches", None):
        raise ValueError(
            "accelerator_config has dispatch_batches=True, but rows have texts, which cannot be sent from one process to the others. Leave it "
            "unset: each process reads its own rows."
        )
    if getattr(accelerator_config, "split_batches", None):
        raise ValueError(
            "accelerator_config has split_batches=True, but per_device_train_batch_size counts the rollouts of one device. Leave it unset, and "
            "divide the batch size yourself."
        )
