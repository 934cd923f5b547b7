"""Samples rollouts with the run's settings only, without the model's generation_config."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import is_peft_model
from torch import nn
from transformers import GenerationConfig


@contextmanager
def own_sampling(model: nn.Module) -> Iterator[None]:
    """
    Replace the model's own generation config with an empty one while rollouts are sampled, and restore it afterwards.

    `generate` fills every value that the run leaves unset (min_p, no_repeat_ngram_size, suppress_tokens ...) from the model's
    own generation config. Such rollouts would not follow the student's distribution, which the loss assumes. TRL passes the run's
    special tokens and the values of its own config to `generate`.

    Args:
        model: The unwrapped student, with or without adapters.
    """
    base = model.get_base_model() if is_peft_model(model) else model  # type: ignore[operator]
    models_own = base.generation_config
    base.generation_config = GenerationConfig()  # type: ignore[assignment]
    try:
        yield
    finally:
        base.generation_config = models_own
