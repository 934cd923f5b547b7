"""Measures accuracy and length during training, with the functions of `trl-crisp eval`, and finds the best checkpoint."""

import math
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from transformers import Trainer, TrainerControl, TrainerState, TrainingArguments

from trl_crisp.evaluation.comparison import compare
from trl_crisp.evaluation.engines import Engine
from trl_crisp.evaluation.evaluating import load_asked
from trl_crisp.evaluation.grading import require_math_verify
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.prompts import prompt_token_ids
from trl_crisp.evaluation.protocol import describe_grading, describe_sampling
from trl_crisp.evaluation.results import SamplingPace, load_results, write_results
from trl_crisp.evaluation.sample_file import Sample, SampleFile
from trl_crisp.evaluation.sampling import BATCH_ROWS
from trl_crisp.evaluation.scoring import score_samples
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.failures import SavesFirst, measure_on_first
from trl_crisp.health.judge import choose_judge, has_labels
from trl_crisp.health.run_engine import can_answer, check_lengths, engine_name
from trl_crisp.health.student_answers import log_values, sample_student, tokenizer_of
from trl_crisp.health.sweet_spot import Measurement, check_sole_owner, find_best, offer_best, qualified
from trl_crisp.run.resume_checks import ChecksResume

_CAP = "eval_benchmark_max_new_tokens"
# Ours: if more of the base's answers are cut than this share, lengths and accuracy say more about the cap than about the model
_MUCH_CUT = 0.1


@dataclass
class BenchmarkArguments:
    """
    Arguments of the training script for measuring accuracy and tokens during training.

    Parameters:
        eval_benchmark (`str`, *optional*):
            A name or a file with question and answer, as in `trl-crisp eval --benchmark`. Nothing is measured if unset.
        eval_benchmark_file (`str`, *optional*):
            A local copy of a named benchmark's rows.
        eval_benchmark_steps (`int`, defaults to `50`; the paper's M, so that each teacher is measured before the next):
            Optimizer steps between two measurements. The base is measured too, before the first step, and so is the last step.
        eval_benchmark_limit (`int`, *optional*, defaults to `100`; ours, to save time):
            Measure only this many problems, from the first.
        eval_benchmark_samples (`int`, defaults to `1`; ours, to save time; the paper has 8 after training):
            Answers per problem.
        eval_benchmark_max_new_tokens (`int`, defaults to `30000`, the paper's):
            An answer is cut at this many tokens. A cut answer is usually wrong, so with a cap that cuts the base's answers, accuracy
            would rise as answers get shorter.
        eval_benchmark_batch_size (`int`, defaults to `32`; ours):
            Answers at once on each process.
        eval_benchmark_max_accuracy_drop (`float`, defaults to `0.01`; ours, a point is within the noise of the paper's own figures):
            How far the best checkpoint's accuracy may be below the base's, as a share of all answers: 0.01 is a point.
    """

    eval_benchmark: str | None = field(
        default=None,
        metadata={"help": "Measure accuracy and tokens during training: a name or a file, as in `trl-crisp eval`."},
    )
    eval_benchmark_file: str | None = field(default=None, metadata={"help": "A local copy of the benchmark's rows."})
    eval_benchmark_steps: int = field(default=50, metadata={"help": "Optimizer steps between two measurements."})
    eval_benchmark_limit: int | None = field(
        default=100, metadata={"help": "Measure only this many problems, from the first."}
    )
    eval_benchmark_samples: int = field(default=1, metadata={"help": "Answers per problem."})
    eval_benchmark_max_new_tokens: int = field(
        default=EvaluationSettings.max_new_tokens, metadata={"help": "An answer is cut at this many tokens."}
    )
    eval_benchmark_batch_size: int = field(default=BATCH_ROWS, metadata={"help": "Answers at once on each process."})
    eval_benchmark_max_accuracy_drop: float = field(
        default=0.01,
        metadata={"help": "How far the best checkpoint's accuracy may be below the base's; 0.01 is a point."},
    )

    def __post_init__(self) -> None:
        if self.eval_benchmark_steps < 1:
            raise ValueError(
                f"eval_benchmark_steps={self.eval_benchmark_steps} must be at least 1. Leave eval_benchmark unset to measure nothing."
            )
        if not 0 <= self.eval_benchmark_max_accuracy_drop <= 1:
            raise ValueError(
                f"eval_benchmark_max_accuracy_drop={self.eval_benchmark_max_accuracy_drop} is a share of all answers: give a "
                "number from 0 to 1, such as 0.01 for a point."
            )


class BenchmarkCallback(SavesFirst, ChecksResume):
    """
    Measures accuracy and tokens on a benchmark: of the base before the first step, every `every_steps` steps, and at the last step. A run that
    resumes from such a step without its measurement, because that failed, measures first.

    The log gets `eval_{name}_accuracy`, `eval_{name}_mean_tokens`, `eval_{name}_reduction` (the share of the base's tokens that is
    saved), `eval_{name}_truncated` and `eval_{name}_runtime` (seconds). `output_dir/evaluation/{name}/step-N` gets the files that
    `trl-crisp eval` writes. If another run begins in the same `output_dir`, this run's base goes to `step-0-RUN_ID`, and comes back when
    this run resumes. The random numbers of the training are not touched: training with this callback gives the same weights
    as without it. If vLLM samples the run's rollouts, it answers here too, else the model does. With several processes each one
    answers its share of the problems.

    The best checkpoint is the measured step with the fewest mean tokens. It needs fewer than the base has, and an accuracy of at most
    `max_accuracy_drop` below the base's. Each new best checkpoint is saved, kept by `save_total_limit`, and named in
    `trainer_state.json` (`best_model_checkpoint`, with the tokens as `best_metric`).

    Args:
        trainer: Its model is measured.
        settings: What to measure; `model` names the model that the training starts from.
        every_steps: See [`BenchmarkArguments`].
        max_accuracy_drop: See [`BenchmarkArguments`].
        progress: Makes a context manager for the first process; it gives the function that receives the progress.

    Raises:
        ValueError: If the model is sharded by FSDP and vLLM does not answer, if the benchmark or the settings do not fit, or if
            [`~trl_crisp.health.attach.attach_health`] was called before.
        FileNotFoundError, PermissionError, ConnectionError: If the problems cannot be loaded.
        ImportError: If math-verify is not installed.
    """

    def __init__(
        self,
        trainer: Trainer,
        settings: EvaluationSettings,
        every_steps: int = BenchmarkArguments.eval_benchmark_steps,
        max_accuracy_drop: float = BenchmarkArguments.eval_benchmark_max_accuracy_drop,
        progress: Callable[[], AbstractContextManager[Tell]] = lambda: nullcontext(lambda *args: None),
    ) -> None:
        for name in ("engine", "instruction", "tensor_parallel_size"):
            if (value := getattr(settings, name)) != getattr(EvaluationSettings, name):
                raise ValueError(
                    f"{name}={value!r} has no effect during training: the student answers the plain prompt, with the run's own engine. "
                    "Leave it out, and measure checkpoints with `trl-crisp eval`."
                )
        if getattr(trainer, "is_watched", False):
            raise ValueError(
                "a BenchmarkCallback was made after attach_health(trainer), so both would choose the best checkpoint. Make and add it before that "
                "call, which then decides by the benchmark."
            )
        check_sole_owner(trainer.args, "eval_benchmark")
        if not can_answer(trainer):
            raise ValueError(
                "eval_benchmark: answers cannot be sampled from a model that FSDP has sharded. Leave it unset and measure the "
                "checkpoints with `trl-crisp eval`, or set use_vllm, or train with DeepSpeed."
            )
        require_math_verify()
        self.trainer, self.settings = trainer, replace(settings, engine=engine_name(trainer))
        self.every_steps, self.margin, self.progress = every_steps, max_accuracy_drop, progress
        # Only the best one: a run that only reports a benchmark writes as many checkpoints as its config says
        self.saves_held = False
        self.benchmark = load_asked(settings)
        self.name = Path(settings.benchmark).stem
        self.subject = f"accuracy on {self.name}"
        self._tokenizer = tokenizer_of(trainer)
        self._prompts = prompt_token_ids(
            self.benchmark.problems, "", self._tokenizer, settings.chat_template_kwargs, settings.system
        )
        check_lengths(trainer, self.benchmark.problems, self._prompts, settings.max_new_tokens, _CAP)
        self._first_prompt = str(self._tokenizer.decode(self._prompts[0]))

    def describe_start(self) -> str:
        """Return how the answers are graded, and the first prompt."""
        return (
            f"During training {self.name} is measured: {len(self.benchmark.problems)} problems, graded as {self.benchmark.kind} "
            f"({self.benchmark.kind_reason}). The first prompt:\n{self._first_prompt}"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if self.trainer.is_world_process_zero():
            self._put_base_in_place(args)
        if state.global_step == 0 and state.max_steps > 0:
            self._measure(args, state)
        elif state.global_step > 0 and self._is_missing(state):
            with self.measures_late(state):
                self._measure(args, state)
        # Otherwise what decides may be the monitor, and it finds the best by that
        if not getattr(self.trainer, "is_watched", False):
            find_best(self.trainer, args, state, self)
        if self.measured(state) and (why := self.why_not(state)) is not None:
            monitored, stops = self.trainer.args.is_monitored, self.trainer.args.stop_at_sweet_spot
            effect = " No step is the best." if not monitored else ""
            effect += " stop_at_sweet_spot does not end the run." if stops and not monitored else ""
            self.trainer.accelerator.print(f"Whether the answers hold is not judged by {self.subject}: {why}.{effect}")

    def check_resume(self, run_id: str | None, state: TrainerState) -> None:
        """Check that the run's base was measured, and as this run measures."""
        if not any(point["step"] == 0 for point in self.measured(state)):
            raise ValueError(
                f"this run resumes after step {state.global_step}, and its base was not measured on {self.name} before the first "
                "step, so there is nothing to compare with. Leave eval_benchmark as it was, and measure checkpoints with "
                "`trl-crisp eval`."
            )
        args = self.trainer.args
        kept = self._kept_base(args, run_id)
        path = kept if kept.is_dir() else self._directory(args, 0)
        base = load_results(path)
        if (other := base["protocol"].get("run_id")) != run_id:
            raise ValueError(
                f"{path}: this is the base that run {other} measured on {self.name}, and this is run {run_id}, whose own is not there. Put it at "
                f"{kept} (it was written where the run began), or start again in another output_dir."
            )
        settings = {**asdict(self.settings), "benchmark_revision": self.benchmark.revision}
        settings |= {**describe_grading(self.settings, self.benchmark), "limit": len(self.benchmark.problems)}
        before = {**base["protocol"], "samples": base["samples"], "limit": base["protocol"]["problems"]}
        names = (
            "benchmark_revision",
            "engine",
            "limit",
            "samples",
            "max_new_tokens",
            "temperature",
            "top_p",
            "top_k",
            "seed",
            "chat_template_kwargs",
            "prompt_template",
            "system",
            "kind",
            "grader",
        )
        if differing := [name for name in names if before[name] != settings[name]]:
            listed = "".join(f"\n  {name}: {before[name]!r} before, {settings[name]!r} now" for name in differing)
            raise ValueError(
                f"this run measured its base in another way, so the measurements could not be compared:{listed}\nLeave these as "
                "they were, or start again in another output_dir."
            )

    def _directory(self, args: TrainingArguments, step: int) -> Path:
        return Path(args.output_dir or ".", "evaluation", self.name, f"step-{step}")

    def _kept_base(self, args: TrainingArguments, run_id: str | None) -> Path:
        place = self._directory(args, 0)
        return place.with_name(f"{place.name}-{run_id}")

    def _put_base_in_place(self, args: TrainingArguments) -> None:
        """Put this run's base, if it is measured, where its results are read, and keep another run's beside it."""
        place, own = self._directory(args, 0), self._kept_base(args, self.trainer.run_id)
        other = _run_of(place)
        if other not in (None, self.trainer.run_id):
            place.rename(self._kept_base(args, other))
        if own.is_dir():
            # What is left there is of no run: its measurement was cut off
            if place.is_dir():
                shutil.rmtree(place)
            own.rename(place)

    def is_due(self, step: int) -> bool:
        """Return whether it measures after this step."""
        return step % self.every_steps == 0

    def _is_missing(self, state: TrainerState) -> bool:
        """Whether the run resumes from a step that is due and was not measured."""
        is_due = self.is_due(state.global_step) or state.global_step == state.max_steps
        return is_due and all(point["step"] != state.global_step for point in self.measured(state))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if not (self.is_due(state.global_step) or state.global_step == state.max_steps):
            return
        with self.saves_first(control):
            self._measure(args, state)
            offer_best(args, state, control, self.measurements(state)[-1], self.margin)

    def measured(self, state: TrainerState) -> list[dict[str, float]]:
        """Return step, accuracy and mean_tokens of each measurement so far, the base's first."""
        keys = {key: f"eval_{self.name}_{key}" for key in ("accuracy", "mean_tokens")}
        return [
            {"step": log["step"], **{key: log[name] for key, name in keys.items()}}
            for log in state.log_history
            if keys["accuracy"] in log
        ]

    def why_not(self, state: TrainerState) -> str | None:
        """Return why accuracy cannot say whether the answers hold, in words, or `None` if it can ([`~trl_crisp.health.judge`])."""
        problems = len(self.benchmark.problems)
        if (base := next(iter(self.measured(state)), None)) is None:
            return "the base was not measured"
        if choose_judge(problems, problems, base["accuracy"], None, self.margin) == "accuracy":
            return None
        if not has_labels(problems, problems):
            return "one problem is too few"
        return f"the base's own, {base['accuracy']:.1%}, is not above the margin of {100 * self.margin:g} points, so it cannot fall by more"

    def measurements(self, state: TrainerState) -> list[Measurement]:
        """Return what was measured so far, without the base's own. If accuracy cannot judge ([`why_not`]), no change is known."""
        base, *others = self.measured(state) or [{}]
        key = f"eval_{self.name}_accuracy_change_high"
        highs = {log["step"]: log[key] for log in state.log_history if key in log}
        judges = self.why_not(state) is None
        return [
            Measurement(
                int(point["step"]),
                point["mean_tokens"],
                1 - point["mean_tokens"] / base["mean_tokens"],
                point["accuracy"] - base["accuracy"] if judges else math.nan,
                highs.get(point["step"], math.nan) if judges else math.nan,
            )
            for point in others
        ]

    def describe_best(self, state: TrainerState) -> str:
        """Return a sentence about the best checkpoint and the rule."""
        measured = {point["step"]: point for point in self.measured(state)}
        points = f"{100 * self.margin:g} points"
        rule = f"fewest mean tokens on {self.name}, fewer than the base, with at most {points} of accuracy below it"
        if 0 not in measured:
            return f"Nothing was measured on {self.name}."
        base = measured[0]
        cut = next(log[key] for log in state.log_history if (key := f"eval_{self.name}_truncated") in log)
        warning = ""
        if cut > _MUCH_CUT:
            warning = (
                f" {cut:.0%} of the base's answers were cut at {self.settings.max_new_tokens:,} tokens, so these numbers say little: "
                "raise eval_benchmark_max_new_tokens."
            )
        was = f"the base had {base['accuracy']:.1%} with {base['mean_tokens']:,.0f} tokens"
        if (why := self.why_not(state)) is not None:
            return f"No measured step can be the best checkpoint by {self.subject}: {why}.{warning}"
        if state.best_global_step is not None:
            step, which = state.best_global_step, state.best_model_checkpoint
        elif found := qualified(self.measurements(state), self.margin):
            step, which = found[0].step, f"that of step {found[0].step}, which no longer exists"
        else:
            return f"No measured step qualifies as the best checkpoint ({rule}; {was}).{warning}"
        best = measured[step]
        return (
            f"The best checkpoint is {which} ({rule}): {best['accuracy']:.1%} with "
            f"{best['mean_tokens']:,.0f} tokens; {was}.{warning}"
        )

    def _measure(self, args: TrainingArguments, state: TrainerState) -> None:
        trainer, start_s = self.trainer, time.monotonic()
        directory = self._directory(args, state.global_step)
        first = trainer.is_world_process_zero()
        with self.progress() if first else nullcontext(None) as on_progress:  # type: ignore[attr-defined]
            engine, samples, wall_s = sample_student(
                trainer, self._tokenizer, self.benchmark.problems, self._prompts, self.settings, on_progress
            )

            def score() -> dict[str, Any]:
                base = load_results(self._directory(args, 0)) if state.global_step else None
                # An earlier run, or one that was killed, may have left samples of other weights
                if directory.is_dir():
                    shutil.rmtree(directory)
                results = self._score_and_write(engine, samples, wall_s, state.global_step, directory, on_progress)
                budget = self.settings.max_new_tokens
                change = compare(base, results, budget)["accuracy_change"] if base is not None else None
                return {**results["summary"][str(budget)]["all"], "change": change}

            summary = measure_on_first(trainer, score)
        base_tokens = next((point["mean_tokens"] for point in self.measured(state)), summary["mean_tokens"])
        values = {
            "accuracy": summary["accuracy"],
            "mean_tokens": summary["mean_tokens"],
            "reduction": 1 - summary["mean_tokens"] / base_tokens,
            "truncated": summary["truncated"],
            **_interval_of(summary["change"]),
            "runtime": time.monotonic() - start_s,
        }
        log_values(trainer, {f"eval_{self.name}_{key}": value for key, value in values.items()})

    def _score_and_write(
        self,
        engine: Engine,
        samples: list[Sample],
        wall_s: float,
        step: int,
        directory: Path,
        on_progress: Tell | None,
    ) -> dict[str, Any]:
        accelerator, settings, problems = self.trainer.accelerator, self.settings, self.benchmark.problems
        about_model = {
            "trained_from": settings.model,
            "run_id": self.trainer.run_id,
            "step": step,
            # The weights stay float32 under mixed precision, so `dtype` does not tell it
            "mixed_precision": accelerator.mixed_precision,
            "processes": accelerator.num_processes,
        }
        name = f"{settings.model} at step {step}"
        sampling_protocol = describe_sampling(settings, "", self.benchmark, engine, name, about_model)
        file = SampleFile(directory / "samples.jsonl", sampling_protocol)
        for sample in samples:
            file.add(sample)
        return write_results(
            directory,
            settings,
            {**sampling_protocol, **describe_grading(settings, self.benchmark)},
            self._first_prompt,
            score_samples(problems, file.samples, settings, self._tokenizer, on_progress),
            SamplingPace(sum(len(sample.token_ids) for sample in samples), wall_s),
        )


def _run_of(directory: Path) -> str | None:
    """Return the run that measured results, or `None` if there are no whole ones, or they do not say it."""
    try:
        return load_results(directory)["protocol"].get("run_id")
    except (FileNotFoundError, ValueError):
        return None


def _interval_of(change: dict[str, float] | None) -> dict[str, float]:
    # One problem has no interval
    if change is None:
        return {}
    names = {"accuracy_change": "estimate", "accuracy_change_low": "low", "accuracy_change_high": "high"}
    return {name: change[field] for name, field in names.items()}
