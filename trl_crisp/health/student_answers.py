"""Samples the student's answers during training, on all processes, and logs what was measured of them."""

import copy
import time
from collections.abc import Sequence
from typing import Any

from accelerate.utils import gather_object
from transformers import Trainer

from trl_crisp.evaluation.engines import Engine
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.sample_file import Sample
from trl_crisp.evaluation.sample_problems import all_draws, sample_problems
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.run_engine import run_engine


def sample_student(
    trainer: Trainer,
    tokenizer: Any,
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    settings: EvaluationSettings,
    on_progress: Tell | None,
) -> tuple[Engine, list[Sample], float]:
    """
    Sample answers of the model that is trained. The random numbers of the training are not touched. All processes call it.

    Args:
        trainer: Its model answers.
        tokenizer: From [`tokenizer_of`].
        problems: What is asked.
        prompts: The token ids of each problem's prompt.
        settings: How many answers, and how they are sampled.
        on_progress: Receives the progress of this process; `None` on all but the first.

    Returns:
        The engine, the samples of all processes in the order of sampling, and the seconds that sampling took.
    """
    accelerator = trainer.accelerator
    with run_engine(trainer, tokenizer) as (engine, share):
        start_s = time.monotonic()
        draws = all_draws(len(prompts), settings.samples)
        mine = range(share.number, len(draws), share.of)
        own: list[tuple[int, Sample]] = []

        def tell(done: int, note: str) -> None:
            if on_progress is not None:
                on_progress("sampling", done, len(mine), note)

        sample_problems(
            engine,
            problems,
            prompts,
            [draws[index] for index in mine],
            settings,
            lambda index, sample: own.append((mine[index], sample)),
            tell,
        )
        kept = own if share.keeps else []
        everyones = gather_object(kept) if accelerator.num_processes > 1 else kept
        samples = [sample for _, sample in sorted(everyones, key=lambda pair: pair[0])]
        return engine, samples, time.monotonic() - start_s


def log_values(trainer: Trainer, values: dict[str, float]) -> None:
    """Log values at once, as an evaluation's, without the training's metrics."""
    model: Any = trainer.model
    was_training = model.training
    # In training mode the trainer would log its training metrics with these values
    model.eval()
    should_log = trainer.control.should_log
    trainer.log(values)
    # trainer.log resets it, and the training's own line would be left out
    trainer.control.should_log = should_log
    model.train(was_training)


def tokenizer_of(trainer: Trainer) -> Any:
    """Return the trainer's tokenizer, with the chat template that the rollouts have."""
    tokenizer: Any = copy.copy(trainer.processing_class)
    tokenizer.chat_template = getattr(trainer, "chat_template", None) or tokenizer.chat_template
    return tokenizer
