"""Checks before the first step that the model can be saved; a failure at the end would lose the training."""

import copy
import tempfile
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from accelerate.utils import is_peft_model
from transformers import PreTrainedTokenizerBase, ProcessorMixin
from transformers.utils import logging


def check_can_be_saved(model: Any, processing_class: PreTrainedTokenizerBase | ProcessorMixin) -> None:
    """
    Write everything that a save writes, except the weights, into a temporary directory.

    transformers loads a generation config with sampling values and without `do_sample`, but refuses to write it. Such a config
    gets `do_sample=True`, with a warning.

    Args:
        model: The student, before it is wrapped.
        processing_class: The tokenizer, which is saved with the model.

    Raises:
        ValueError: If its library refuses to write the model, a config or the tokenizer; the message gives the library's reason.
    """
    is_adapter = is_peft_model(model)
    if not is_adapter:
        _complete_generation_config(model)
    with tempfile.TemporaryDirectory() as directory, _without_progress_bars():
        try:
            what = "model"
            if is_adapter:
                what = "adapter's config"
                model.peft_config[model.active_adapters[0]].save_pretrained(directory)
            else:
                model.save_pretrained(directory, state_dict={})
            what = "tokenizer"
            processing_class.save_pretrained(directory)
        except Exception as error:
            way_out = (
                "Correct its generation_config before the training: `model.generation_config.do_sample = True`, or the file "
                "generation_config.json of a local copy."
                if "GenerationConfig" in str(error)
                else "Correct it before the training."
            )
            raise ValueError(
                f"the {what} cannot be saved as it is, so a checkpoint, and the trained model, would be lost. "
                f"{type(error).__name__}: {error} {way_out}"
            ) from error


@contextmanager
def _without_progress_bars() -> Iterator[None]:
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


def _complete_generation_config(model: Any) -> None:
    config = model.generation_config
    if config is None or config.do_sample is not None or _is_valid(config):
        return
    sampling = copy.deepcopy(config)
    sampling.do_sample = True
    if _is_valid(sampling):
        config.do_sample = True
        warnings.warn(
            "the model's generation_config has sampling values (such as temperature) but no do_sample. transformers does not "
            "write such a config, so the trained model is saved with do_sample=True.",
            stacklevel=4,
        )


def _is_valid(config: Any) -> bool:
    try:
        config.validate(strict=True)
    except ValueError:
        return False
    return True
