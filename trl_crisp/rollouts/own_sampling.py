"""Rollouts are sampled by the run's own settings; the model's generation_config has no say in them."""

from collections.abc import Iterator
from contextlib import contextmanager

from accelerate.utils import is_peft_model
from torch import nn
from transformers import GenerationConfig


@contextmanager
def own_sampling(model: nn.Module) -> Iterator[None]:
    """
    Take the model's own generation config away while rollouts are sampled; what is saved later has it again.

    `generate` fills every value that the run leaves unset (min_p, no_repeat_ngram_size, suppress_tokens ...) from the model's
    own generation config. Rollouts shaped by it would not be the student's distribution, which the loss assumes. The run's
    special tokens, and the values that TRL's config sets, are passed to `generate` by TRL.

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
