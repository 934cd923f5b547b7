"""From the prompts of problems to samples: which answers are drawn, in which order and with which random numbers."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.sample_file import Sample, sha256_of_ids
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.prompts.thinking import count_thinking_tokens, find_think_ids

if TYPE_CHECKING:
    from trl_crisp.evaluation.engines import Engine
    from trl_crisp.evaluation.sampling import Completion

# Ours: no benchmark has as many problems, so a larger limit does not change the random numbers of the problems before it
_MAX_PROBLEMS = 1_000_000


@dataclass(frozen=True)
class Draw:
    """
    One answer to draw.

    Attributes:
        row: The problem's index in the benchmark.
        number: The sample's number among those of the problem, from 0.
    """

    row: int
    number: int

    @property
    def random_place(self) -> int:
        """The number that, with the seed, determines the answer's random numbers."""
        return self.number * _MAX_PROBLEMS + self.row


def all_draws(problems: int, samples: int) -> list[Draw]:
    """Return all answers in the order of sampling: the first one of every problem, then the second one of every problem, and so on."""
    return [Draw(row, number) for number in range(samples) for row in range(problems)]


def sample_problems(
    engine: "Engine",
    problems: Sequence[Problem],
    prompts: Sequence[Sequence[int]],
    draws: Sequence[Draw],
    settings: EvaluationSettings,
    on_sample: Callable[[int, Sample], None],
    on_progress: Callable[[int, str], None],
) -> None:
    """
    Draw answers to problems.

    Args:
        engine: Generates the answers.
        problems: The benchmark's problems.
        prompts: The token ids of each problem's prompt.
        draws: The answers to draw.
        settings: How to sample.
        on_sample: Receives the index of a draw and its sample, as soon as the answer has ended.
        on_progress: Receives how many answers have ended, and a note with the pace and the time left.
    """
    if not draws:
        return
    think_ids = find_think_ids(engine.tokenizer)

    def keep(index: int, completion: "Completion") -> None:
        draw, ids = draws[index], completion.token_ids
        prompt_ids = prompts[draw.row]
        sample = Sample(
            problem=problems[draw.row].id,
            number=draw.number,
            text=str(engine.tokenizer.decode(ids[:-1] if completion.ended_by_eos else ids)),
            token_ids=list(ids),
            thinking_tokens=count_thinking_tokens(prompt_ids, ids, [1] * len(ids), think_ids),
            ended_by_eos=completion.ended_by_eos,
            prompt_sha256=sha256_of_ids(prompt_ids),
        )
        on_sample(index, sample)

    engine.generate(
        [prompts[draw.row] for draw in draws],
        [draw.random_place for draw in draws],
        keep,
        on_progress,
        **settings.sampling,
    )
