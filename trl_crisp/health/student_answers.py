"""Samples the student's answers during training, on all processes, and logs what was measured of them."""

import copy
import time
import warnings
from collections.abc import Sequence
from typing import Any

from transformers import Trainer

from trl_crisp.evaluation.engines import Engine
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.sample_file import Sample
from trl_crisp.evaluation.sample_problems import all_draws, sample_problems
from trl_crisp.evaluation.sampling import BATCH_ROWS
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.failures import measure_on_all
from trl_crisp.health.run_engine import can_answer, run_engine

# Fields that shape the rollouts and that the evaluation's sampler does not have, with their values that change nothing
_UNUSED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}


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

    Raises:
        MeasurementError: If one of several processes fails.
    """
    with run_engine(trainer, tokenizer) as (engine, share):
        start_s = time.monotonic()
        draws = all_draws(len(prompts), settings.samples)
        mine = range(share.number, len(draws), share.of)

        def tell(done: int, note: str) -> None:
            if on_progress is not None:
                on_progress("sampling", done, len(mine), note)

        def sample_mine() -> list[tuple[int, Sample]]:
            own: list[tuple[int, Sample]] = []
            sample_problems(
                engine,
                problems,
                prompts,
                [draws[index] for index in mine],
                settings,
                lambda index, sample: own.append((mine[index], sample)),
                tell,
            )
            return own if share.keeps else []

        found = measure_on_all(trainer, sample_mine)
        samples = [sample for _, sample in sorted(found, key=lambda pair: pair[0])]
        return engine, samples, time.monotonic() - start_s


def check_sampling(trainer: Any) -> None:
    """
    Check that answers to monitor prompts can be sampled as the rollouts are; warn of fields that shape the rollouts only.

    Raises:
        ValueError: If FSDP shards the model, or the rollouts call tools.
    """
    if not can_answer(trainer):
        raise ValueError(
            "monitor_prompts: answers cannot be sampled from a model that FSDP has sharded. Leave it unset, set use_vllm, or train with "
            "DeepSpeed."
        )
    if trainer.tools:
        raise ValueError(
            "monitor_prompts: answers that call tools cannot be sampled here, so agreement would be measured on other answers than the "
            "rollouts. Leave it unset."
        )
    if ignored := [name for name, plain in _UNUSED_SAMPLING.items() if getattr(trainer.args, name) not in plain]:
        warnings.warn(
            f"{', '.join(ignored)} has no effect on the answers to monitor prompts, of the base and of the student; it shapes the rollouts only.",
            stacklevel=4,
        )


def answers_at_once(args: Any) -> int:
    """Return how many answers need no more memory than the rollouts of a step do, which the run has room for."""
    rollouts = args.per_device_train_batch_size * args.gradient_accumulation_steps
    longer = max(1.0, args.monitor_max_new_tokens / args.max_completion_length)
    return max(1, min(BATCH_ROWS, int(rollouts / longer)))


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
