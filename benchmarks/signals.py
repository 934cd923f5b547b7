"""
Measures the seconds that the signals of health add to a step, against those of its training half (teacher, student, backward, optimizer).

They are the measures of the rollouts' texts, the two models' common top tokens, and the verdict at each log entry. Entropies and the
reverse KL come with the loss. Rollouts are made up, so the seconds of sampling, which would make the share smaller, are left out.
"""

import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

from benchmarks.environment import REPOSITORY
from benchmarks.part_of_step import ROLLOUTS, config_of, parser_of, record_of
from benchmarks.steps import Case, make_up_completions, rows
from trl_crisp.run.files import write_json
from trl_crisp.run.profile import TRAINING_PARTS

RESULT = REPOSITORY / "benchmarks" / "results" / "signals.json"
COMPLETION_TOKENS = (128, 512)
PARTS = ("texts", "top tokens", "verdict")


@contextmanager
def timed_signals(trainer: Any, health: Any) -> Iterator[list[dict[str, float]]]:
    """Give a list that gets the seconds of each part for every step that is logged."""
    import trl_crisp.trainer as module

    seconds = dict.fromkeys(PARTS, 0.0)
    steps: list[dict[str, float]] = []

    def timed(part: str, function: Callable) -> Callable:
        def call(*args: Any, **kwargs: Any) -> Any:
            start_s = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                seconds[part] += time.perf_counter() - start_s

        return call

    def judge(*args: Any, **kwargs: Any) -> None:
        timed("verdict", on_log)(*args, **kwargs)
        if "loss" in kwargs["logs"]:
            steps.append(dict(seconds))
            seconds.update(dict.fromkeys(PARTS, 0.0))

    on_log = health.signals.on_log
    with (
        patch.object(module, "sampled_topk_overlap", timed("top tokens", module.sampled_topk_overlap)),
        patch.object(trainer, "_record_texts", timed("texts", trainer._record_texts)),
        patch.object(health.signals, "on_log", judge),
    ):
        yield steps


def train(model: str, tokens: int, steps: int) -> list[dict[str, float]]:
    """Train, and return the seconds of each step by part, and of its training half. The first step, a warm-up, is left out."""
    from datasets import Dataset

    from trl_crisp import CRISPTrainer
    from trl_crisp.health.attach import attach_health

    with tempfile.TemporaryDirectory() as directory:
        args = config_of(directory, 1 + steps, tokens)
        trainer = CRISPTrainer(model=model, args=args, train_dataset=Dataset.from_list(rows(ROLLOUTS * (1 + steps))))
        make_up_completions(trainer, "crisp", Case("cpu", model, ROLLOUTS, tokens))
        with timed_signals(trainer, attach_health(trainer)) as found:
            trainer.train()
    halves = [
        sum(log[f"profile/{part}_s"] for part in TRAINING_PARTS) for log in trainer.state.log_history if "loss" in log
    ]
    return [
        {**{f"{part}_s": value for part, value in one.items()}, "training_half_s": half}
        for one, half in list(zip(found, halves, strict=True))[1:]
    ]


def shares_of(steps: list[dict[str, float]]) -> dict[str, float]:
    """Return the median over steps of each part's share of the training half, and of all parts together."""
    keys = [f"{part}_s" for part in PARTS]
    shares = {
        part: statistics.median(one[key] / one["training_half_s"] for one in steps)
        for part, key in zip(PARTS, keys, strict=True)
    }
    return {
        **shares,
        "all": statistics.median(sum(one[key] for key in keys) / one["training_half_s"] for one in steps),
    }


def table_of(record: dict[str, Any]) -> str:
    """Return the Markdown table: medians."""
    columns = [*PARTS, "all"]
    lines = [f"| tokens of a rollout | training half, s | {' | '.join(columns)} |", "|" + "---|" * (2 + len(columns))]
    for tokens, case in record["cases"].items():
        half_s = statistics.median(one["training_half_s"] for one in case["steps"])
        shares = " | ".join(f"{case['shares'][name]:.2%}" for name in columns)
        lines.append(f"| {tokens} | {half_s:.1f} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    """Measure, print the table and write the JSON."""
    args = parser_of("benchmarks.signals", __doc__, RESULT, rounds=7).parse_args()
    record = record_of("signals 1", args)
    for tokens in COMPLETION_TOKENS:
        steps = train(args.model, tokens, args.rounds)
        record["cases"][str(tokens)] = {"steps": steps, "shares": shares_of(steps)}
        write_json(args.json, record)
    print(table_of(record))


if __name__ == "__main__":
    main()
