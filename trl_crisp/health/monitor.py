"""Measures during training how often the student still gives the base's own majority answers: accuracy seen without labels."""

import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset
from transformers import TrainerControl, TrainerState, TrainingArguments

from trl_crisp.evaluation.grading import Grader, require_math_verify
from trl_crisp.evaluation.metrics import Interval, paired_bootstrap_difference
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.prompts import check_positions
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.base_answers import Base, base_path, read_base, write_references
from trl_crisp.health.distance import ConciseBaseDistance, teacher_prompts_of
from trl_crisp.health.failures import SavesFirst, measure_on_first
from trl_crisp.health.judge import Judge, choose_judge, has_labels
from trl_crisp.health.measuring import BenchmarkCallback
from trl_crisp.health.monitor_prompts import find_unreadable, take_prompts
from trl_crisp.health.reference import (
    Reference,
    agrees,
    checked,
    compare_agreement,
    count_votes,
    final_texts,
    find_reference,
)
from trl_crisp.health.run_engine import check_lengths, engine_name
from trl_crisp.health.student_answers import answers_at_once, check_sampling, log_values, sample_student, tokenizer_of
from trl_crisp.health.sweet_spot import Measurement
from trl_crisp.prompts.thinking import count_thinking_tokens, find_think_ids
from trl_crisp.run.resume_checks import ChecksResume

# Ours: if fewer prompts have a reference, the task has no answers that can be compared
MIN_SHARE_WITH_REFERENCE = 0.5
_PREFIX = "eval_agreement"
_CAP = "monitor_max_new_tokens (max_completion_length if unset)"
# Ours: in the lab, 9% of cut answers make the change of agreement look 7 points better than it is, and 54% 20 points
MAX_CUT_SHARE = 0.05
_SUBJECTS: dict[Judge | None, str] = {
    "accuracy": "accuracy on the monitor prompts",
    "agreement": "agreement with the base's majority answers",
    None: "agreement with the base's majority answers",
}


class AgreementMonitor(SavesFirst, ChecksResume):
    """
    Measures agreement with the base's own majority answers, and decides about due refreshes by it.

    Before the first step the base answers each monitor prompt `monitor_base_samples` times, and the majority is the prompt's reference
    ([`~trl_crisp.health.reference`]). The references are in `output_dir/agreement/reference.jsonl`, which `trl-crisp eval --benchmark`
    reads. Every `monitor_steps` steps the student answers the prompts that have one `monitor_samples` times. Temperature, top_p and top_k are
    the rollouts', and `monitor_max_new_tokens` is the longest answer.
    Once, the log gets how many prompts have a reference (`eval_agreement_references`). At each measurement it gets `eval_agreement` over these
    prompts (a share), `eval_agreement_change` from the base's own level with the ends of its paired 95% interval (`_change_low`,
    `_change_high`), `eval_agreement_mean_tokens`, `eval_agreement_reduction` and `eval_agreement_runtime` (seconds). If half of the prompts
    have right answers, the student answers these too, and the log gets `eval_agreement_accuracy` over them, with its change and interval in
    the same way.
    With `monitor_distance` it gets `eval_agreement_distance_nats` ([`~trl_crisp.health.distance.ConciseBaseDistance`]) and the standard error
    over prompts, `eval_agreement_distance_standard_error_nats`.

    The monitor prompts are taken from the training rows and left out of them, or are those of `monitor_file`. If fewer than half of them
    get a reference, agreement is not measured, and a gate allows each refresh, with a message.

    Accuracy judges whether the answers hold, unless the base's own is not above the margin; then agreement does
    ([`~trl_crisp.health.judge.choose_judge`]). A line after the base's answers says so. The base's answers are also in
    `output_dir/agreement/base-RUN_ID.json`, for a resume.

    The rule of the gate: a due refresh is postponed while the last `eval_agreement_change` is below `-monitor_margin`. A run that resumes from
    a due step without its measurement, because that failed, measures first.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`]; use [`~trl_crisp.health.attach.attach_health`].
        answer_of: Returns the final answer of a text, or `None`. It replaces `monitor_grader`. Of several right answers any one is right.
        progress: As in [`~trl_crisp.health.measuring.BenchmarkCallback`].
        monitor_dataset: See [`~trl_crisp.health.monitor_prompts.take_prompts`].

    Attributes:
        references: By the number of the monitor prompt.
        is_on: Whether agreement is measured.
        margin, subject, every_steps, saves_held, is_due: See [`~trl_crisp.health.sweet_spot.Source`].

    Raises:
        ValueError: If the rows are a stream or too few, a monitor prompt is trained on, FSDP shards the model and vLLM does not answer, or
            the rollouts call tools.
        FileNotFoundError: If there is no `monitor_file`.
        ImportError: If math-verify is needed and not installed.
    """

    def __init__(
        self,
        trainer: Any,
        answer_of: Callable[[str], str | None] | None = None,
        progress: Callable[[], AbstractContextManager[Tell]] = lambda: nullcontext(lambda *args: None),
        monitor_dataset: Dataset | None = None,
    ) -> None:
        args = trainer.args
        check_sampling(trainer)
        if answer_of is None and args.monitor_grader == "math":
            require_math_verify()
        self.trainer, self.progress = trainer, progress
        self.answer_of = None if answer_of is None else checked(answer_of)
        self.margin: float = args.monitor_margin
        self.every_steps: int = args.monitor_steps
        self.saves_held = True
        taken = take_prompts(args, trainer.train_dataset, monitor_dataset)
        prompts = taken.prompts
        self._golds = self._usable(taken.golds, taken.why_no_golds)
        self.subject = _SUBJECTS[None]
        self._tokenizer = tokenizer_of(trainer)
        self.settings = EvaluationSettings(
            model=trainer.model.config._name_or_path,
            benchmark="agreement",
            engine=engine_name(trainer),
            samples=args.monitor_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            # vLLM's -1 is off too
            top_k=max(args.top_k or 0, 0),
            max_new_tokens=args.monitor_max_new_tokens,
            seed=args.seed,
            batch_size=answers_at_once(args),
        )
        self._problems = [Problem(str(i), prompt, "", is_whole_prompt=True) for i, prompt in enumerate(prompts)]
        self._token_ids = trainer.prompt_pairs.tokenize_students(prompts, 0)
        check_lengths(trainer, self._problems, self._token_ids, self.settings.max_new_tokens, _CAP)
        self._distance: ConciseBaseDistance | None = None
        if args.monitor_distance:
            told = teacher_prompts_of(trainer, taken.monitored)
            check_positions(trainer.model.config, self._problems, told, self.settings.max_new_tokens, _CAP)
            self._distance = ConciseBaseDistance(trainer, self._token_ids, told)
        self.references: dict[int, Reference] = {}
        self._base_accuracies: Mapping[int, float] = {}
        self.is_on = True
        # The trainer changes last, so that it is as it was if something above is refused
        trainer.train_dataset = taken.rows
        if args.teacher_refresh_gate == "agreement":
            trainer.teacher.refresh_gate = self.allows_refresh

    def _usable(self, found: list[str | list[str] | None], why_no_golds: str | None) -> dict[int, str | list[str]]:
        """Return the right answers by the number of the prompt; none if they are too few or cannot be graded, and print why."""
        golds = {number: gold for number, gold in enumerate(found) if gold is not None}
        if not golds:
            if why_no_golds is not None:
                self.trainer.accelerator.print(
                    f"Accuracy is not measured beside agreement: {why_no_golds}. Mend the column, or rename it if it has no right answers."
                )
            return {}
        if not has_labels(len(found), len(golds)):
            self.trainer.accelerator.print(
                f"Only {len(golds)} of {len(found)} monitor prompts have a right answer, and half of them need one, so accuracy is not measured "
                "beside agreement."
            )
            return {}
        kind = self.trainer.args.monitor_grader
        # The user's own function finds an answer, and any text can be equal to it
        unreadable = None if self.answer_of is not None else find_unreadable(list(golds.values()), kind)
        if unreadable is None:
            return golds
        number, gold = list(golds.items())[unreadable]
        self.trainer.accelerator.print(
            f"The monitor prompts' answers cannot be graded as {kind!r}, so accuracy is not measured beside agreement: that of prompt "
            f"{number} is {str(gold)[:80]!r}."
        )
        return {}

    def describe_start(self) -> str:
        """Return what is measured."""
        accuracy = ""
        if self._golds:
            is_all = len(self._golds) == len(self._problems)
            accuracy = (
                ", and their accuracy"
                if is_all
                else f", and the accuracy of the {len(self._golds)} that have a right answer"
            )
        unchecked = ""
        if not isinstance(self.trainer.train_dataset, Dataset):
            unchecked = (
                " The training rows are a stream, so whether one of these prompts is trained on was not checked: what is trained on cannot be held "
                "out."
            )
        where = "left out of the training rows" if self.trainer.args.monitor_file is None else "of monitor_file"
        return (
            f"During training, agreement with the base's majority answers is measured: {len(self._problems)} prompts, {where}, "
            f"{self.trainer.args.monitor_base_samples} answers of the base to each, {self.settings.samples} at each "
            f"measurement{accuracy}.{unchecked}"
        )

    @property
    def _files(self) -> Path:
        return Path(self.trainer.args.output_dir or ".", "agreement")

    def check_resume(self, run_id: str | None, state: TrainerState) -> None:
        """Check that the run's base is there, and that it monitors what it monitored when it began."""
        self._read_base(run_id, state)
        if self._distance is not None:
            self._distance.check_resume(self._files, run_id)

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.global_step == 0:
            if state.max_steps > 0:
                if self._distance is not None:
                    self._distance.begin_run(self._files)
                self._ask_base()
        else:
            base = self._read_base(self.trainer.run_id, state)
            self._take_base(base.references, base.accuracies)
            self._tell_base(state)
            if self._distance is not None:
                self._distance.resume_run(self._files)
            if self._measures and self._is_missing(state):
                with self.measures_late(state):
                    self._measure(state)

    def _is_missing(self, state: TrainerState) -> bool:
        """Whether the run resumes from a step that is due and was not measured. The gate must not decide by an older one."""
        step = state.global_step
        measured = [log["step"] for log in state.log_history if f"{_PREFIX}_mean_tokens" in log]
        return (self.is_due(step) or step == state.max_steps) and step not in measured

    def _ask_base(self) -> None:
        start_s = time.monotonic()
        numbers = range(len(self._problems))
        texts, answers = self._sample(numbers, self.settings.seed, self.trainer.args.monitor_base_samples)
        found, accuracies = measure_on_first(self.trainer, lambda: self._write_base(texts, answers))
        self._take_base(found, accuracies)
        self._warn_of_cut_answers(answers)
        asked = self._asked
        # Always, because a resumed run may need it
        values = {
            f"{_PREFIX}_mean_tokens": _mean_tokens([answers[i] for i in asked]),
            f"{_PREFIX}_references": float(len(self.references)),
        }
        values |= self._measure_distance(asked, [answers[i] for i in asked])
        if self.is_on:
            values[_PREFIX] = float(np.mean([one.base_agreement for one in self.references.values()]))
        if self._base_accuracies:
            values[f"{_PREFIX}_accuracy"] = float(np.mean(list(self._base_accuracies.values())))
        log_values(self.trainer, {**values, f"{_PREFIX}_runtime": time.monotonic() - start_s})
        self._tell_base(self.trainer.state)

    def _write_base(
        self, texts: list[list[str]], answers: list[list[list[int]]]
    ) -> tuple[list[Reference | None], dict[int, float]]:
        """Return the references and the accuracies of the base's answers, and write them."""
        kind = self.trainer.args.monitor_grader
        final = self._final_texts(range(len(self._problems)), texts, answers)
        found = [find_reference(votes) for votes in count_votes(final, kind, self.answer_of)]
        right = self._right([texts[i] for i in self._golds]) if self._golds else []
        accuracies = {i: float(np.mean(row)) for i, row in zip(self._golds, right, strict=True)}
        base = Base([problem.prompt for problem in self._problems], found, self._golds, accuracies)
        base.write(base_path(self._files, self.trainer.run_id))
        write_references(self._files / "reference.jsonl", base.prompts, found)
        return found, accuracies

    def _warn_of_cut_answers(self, answers: list[list[list[int]]]) -> None:
        cap = self.settings.max_new_tokens
        # An answer that ends with the cap's last token is counted too
        share = float(np.mean([len(ids) >= cap for row in answers for ids in row]))
        if share > MAX_CUT_SHARE:
            warnings.warn(
                f"{share:.0%} of the base's answers to the monitor prompts were cut at monitor_max_new_tokens={cap} tokens. Prompts whose answers "
                "are cut have no reference or a wrong answer, and shorter answers are cut less, so agreement and accuracy rise as answers get "
                "shorter. Raise monitor_max_new_tokens, or do not trust a gate or a stop.",
                stacklevel=2,
            )

    def _read_base(self, run_id: str | None, state: TrainerState) -> Base:
        path = base_path(self._files, run_id)
        base = read_base(path, state.global_step)
        base.check(path, [problem.prompt for problem in self._problems], self._golds)
        return base

    def _take_base(self, references: Sequence[Reference | None], accuracies: Mapping[int, float]) -> None:
        self.references = {i: reference for i, reference in enumerate(references) if reference is not None}
        self._base_accuracies = accuracies
        share = len(self.references) / len(self._problems)
        self.is_on = share >= MIN_SHARE_WITH_REFERENCE and len(self.references) > 1

    def _tell_base(self, state: TrainerState) -> None:
        """Print which levels of the base were measured, and what judges by them."""
        args, count, known = self.trainer.args, len(self._problems), len(self.references)
        base, judged_by = self._base_of(state), self.judged_by(state)
        self.subject = _SUBJECTS[judged_by]
        # A benchmark judges before this, if it can
        is_judge = not self._benchmark_judges(state)
        stops = args.stop_at_sweet_spot and is_judge
        parts = []
        if self.is_on:
            parts += [f"{known} of {count} have a majority answer of the base's (agreement {base[_PREFIX]:.1%})"]
        if self._golds:
            parts += [
                f"{len(self._golds)} of {count} have a right answer (accuracy {base[f'{_PREFIX}_accuracy']:.1%})"
            ]
        told = [f"Monitor prompts: {', '.join(parts)}."] if parts else []
        can_postpone = self.is_on and base[_PREFIX] > self.margin
        effects = [] if self.is_on else ["agreement is not measured"]
        effects += ["no refresh is postponed"] if args.teacher_refresh_gate is not None and not can_postpone else []
        effects += ["stop_at_sweet_spot does not end the run"] if stops and judged_by is None else []
        if not self.is_on:
            told += [
                f"The base has a majority answer to only {known} of {count} monitor prompts, so {' and '.join(effects)}. The task may have no "
                "final answers that can be compared."
            ]
        elif not can_postpone:
            told += [
                f"Agreement is not above the margin of {100 * self.margin:g} points, so it cannot fall by more"
                f"{''.join(f', and {effect}' for effect in effects)}."
            ]
        if self._golds and judged_by != "accuracy":
            told += [
                f"Accuracy is not above the margin of {100 * self.margin:g} points, so it cannot fall by more, and it does not judge. Check that "
                "monitor_grader reads these answers."
            ]
        if judged_by is not None and is_judge:
            told += [f"Whether the answers hold is judged by {self.subject}."]
        self.trainer.accelerator.print(" ".join(told))

    def _benchmark_judges(self, state: TrainerState) -> bool:
        callbacks = self.trainer.callback_handler.callbacks
        return any(isinstance(one, BenchmarkCallback) and one.why_not(state) is None for one in callbacks)

    def _base_of(self, state: TrainerState) -> dict[str, float]:
        """Return the log entry of the base; an empty one before it is measured."""
        return next((log for log in state.log_history if f"{_PREFIX}_mean_tokens" in log), {})

    def judged_by(self, state: TrainerState) -> Judge | None:
        """Return which measure judges, from the log alone; `None` if none does."""
        base = self._base_of(state)
        levels = base.get(f"{_PREFIX}_accuracy"), base.get(_PREFIX)
        return choose_judge(len(self._problems), len(self._golds), *levels, self.margin)

    @property
    def _measures(self) -> bool:
        # Lengths and distances need no reference
        args = self.trainer.args
        return self.is_on or bool(self._golds) or args.target_reduction is not None or self._distance is not None

    @property
    def _asked(self) -> list[int]:
        return sorted(self.references.keys() | self._golds.keys()) if self.is_on else list(range(len(self._problems)))

    def is_due(self, step: int) -> bool:
        """Return whether it measures after this step: just before a refresh that is due every `monitor_steps` steps."""
        return (step + 1) % self.every_steps == 0

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if self._measures and (self.is_due(state.global_step) or state.global_step == state.max_steps):
            with self.saves_first(control):
                self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        start_s = time.monotonic()
        asked = self._asked
        texts, answers = self._sample(asked, self.settings.seed + state.global_step, self.settings.samples)
        distance = self._measure_distance(asked, answers)
        values = measure_on_first(self.trainer, lambda: self._values(state, asked, texts, answers)) | distance
        log_values(self.trainer, {**values, f"{_PREFIX}_runtime": time.monotonic() - start_s})

    def _values(
        self, state: TrainerState, asked: Sequence[int], texts: list[list[str]], answers: list[list[list[int]]]
    ) -> dict[str, float]:
        """Return lengths, agreement and accuracy of the student's answers, against the base's."""
        mean_tokens = _mean_tokens(answers)
        base_tokens = self._base_of(state)[f"{_PREFIX}_mean_tokens"]
        values = {f"{_PREFIX}_mean_tokens": mean_tokens, f"{_PREFIX}_reduction": 1 - mean_tokens / base_tokens}
        texts_of = dict(zip(asked, texts, strict=True))
        final_of = dict(zip(asked, self._final_texts(asked, texts, answers), strict=True))
        if self.is_on:
            numbers = sorted(self.references)
            references = [self.references[i] for i in numbers]
            final = [final_of[i] for i in numbers]
            agreed = self._grade(final, [one.answer for one in references], by_answer_line=True)
            values |= _with_change(_PREFIX, agreed, compare_agreement(references, agreed))
        if self._golds:
            right = self._right([texts_of[i] for i in self._golds])
            base = [self._base_accuracies[i] for i in self._golds]
            change = paired_bootstrap_difference(base, [float(np.mean(row)) for row in right])
            values |= _with_change(f"{_PREFIX}_accuracy", right, change)
        return values

    def why_not(self, state: TrainerState) -> str | None:
        """Return why neither accuracy nor agreement can say whether the answers hold, in words, or `None` if one can."""
        if self.judged_by(state) is not None:
            return None
        return "neither accuracy nor agreement is above the margin" if self.is_on else "agreement is not measured"

    def measurements(self, state: TrainerState) -> list[Measurement]:
        """Return what was measured so far, with the change of what judges ([`judged_by`])."""
        judged_by = self.judged_by(state)
        key = {"accuracy": f"{_PREFIX}_accuracy", "agreement": _PREFIX, None: "none"}[judged_by]
        return [
            Measurement(
                int(log["step"]),
                log[f"{_PREFIX}_mean_tokens"],
                log[f"{_PREFIX}_reduction"],
                log.get(f"{key}_change", math.nan),
                log.get(f"{key}_change_high", math.nan),
            )
            for log in state.log_history
            if f"{_PREFIX}_reduction" in log
        ]

    def _measure_distance(self, asked: Sequence[int], answers: Sequence[Sequence[Sequence[int]]]) -> dict[str, float]:
        if self._distance is None:
            return {}
        nats, standard_error_nats = self._distance.measure(asked, answers)
        return {
            f"{_PREFIX}_distance_nats": nats,
            f"{_PREFIX}_distance_standard_error_nats": standard_error_nats,
        }

    def _sample(
        self, asked: Sequence[int], seed: int, samples_per_prompt: int
    ) -> tuple[list[list[str]], list[list[list[int]]]]:
        """Return the texts and the token ids of the answers to some of the prompts, both [prompts, samples]."""
        settings = EvaluationSettings(**{**vars(self.settings), "seed": seed, "samples": samples_per_prompt})
        first = self.trainer.is_world_process_zero()
        with self.progress() if first else nullcontext(None) as on_progress:  # type: ignore[attr-defined]
            _, samples, _ = sample_student(
                self.trainer,
                self._tokenizer,
                [self._problems[i] for i in asked],
                [self._token_ids[i] for i in asked],
                settings,
                on_progress,
            )
        by_prompt: dict[int, list[Any]] = {i: [] for i in asked}
        for sample in samples:
            by_prompt[int(sample.problem)].append(sample)
        return (
            [[sample.text for sample in by_prompt[i]] for i in asked],
            [[sample.token_ids for sample in by_prompt[i]] for i in asked],
        )

    def _final_texts(
        self, numbers: Sequence[int], texts: list[list[str]], answers: Sequence[Sequence[Sequence[int]]]
    ) -> list[list[str]]:
        """Return what the texts say after their thinking. The user's own function gets them whole."""
        if self.answer_of is not None:
            return texts
        think_ids = find_think_ids(self._tokenizer)
        is_all_thinking = [
            [
                0 < len(ids) == count_thinking_tokens(self._token_ids[number], ids, [1] * len(ids), think_ids)
                for ids in row
            ]
            for number, row in zip(numbers, answers, strict=True)
        ]
        return final_texts(texts, is_all_thinking)

    def _right(self, texts: Sequence[Sequence[str]]) -> list[list[bool]]:
        """Return whether the texts are right, [prompts with a right answer, samples]."""
        return self._grade(texts, list(self._golds.values()), by_answer_line=False)

    def _grade(
        self, texts: Sequence[Sequence[str]], golds: Sequence[str | list[str]], by_answer_line: bool
    ) -> list[list[bool]]:
        """Return whether each text gives the gold answer of its prompt, [prompts, samples]."""
        if self.answer_of is not None:
            right = [[gold] if isinstance(gold, str) else gold for gold in golds]
            return [[self.answer_of(text) in one for text in row] for row, one in zip(texts, right, strict=True)]
        kind = self.trainer.args.monitor_grader
        with Grader() as grader:
            grades = iter(
                grader.grade_all([(text, gold) for row, gold in zip(texts, golds, strict=True) for text in row], kind)
            )
        # A text's first sentence may be right, but no two samples have the same one
        return [
            [agrees(g, str(gold), kind) if by_answer_line else g.correct for g in itertools.islice(grades, len(row))]
            for row, gold in zip(texts, golds, strict=True)
        ]

    def allows_refresh(self, step: int) -> bool:
        """Return whether a refresh that is due at the start of a step may happen; print why, if it may not."""
        if not self.is_on:
            return True
        changes = [log[f"{_PREFIX}_change"] for log in self.trainer.state.log_history if f"{_PREFIX}_change" in log]
        margin = self.trainer.args.monitor_margin
        # Nothing is measured before the first step is complete. Rounding must not turn a drop of exactly the margin into more
        if not changes or changes[-1] >= -margin - 1e-9:
            return True
        self.trainer.accelerator.print(
            f"step {step}: the refresh of the teacher is postponed: agreement with the base's majority answers is {100 * changes[-1]:+.1f} "
            f"points from the base's own, and monitor_margin allows {-100 * margin:.1f}."
        )
        return False


def _mean_tokens(answers: Sequence[Sequence[Sequence[int]]]) -> float:
    return float(np.mean([np.mean([len(ids) for ids in row]) for row in answers]))


def _with_change(name: str, flags: Sequence[Sequence[bool]], change: Interval) -> dict[str, float]:
    return {
        name: float(np.mean(flags)),
        f"{name}_change": change.estimate,
        f"{name}_change_low": change.low,
        f"{name}_change_high": change.high,
    }
