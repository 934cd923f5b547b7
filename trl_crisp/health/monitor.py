"""Measures during training how often the student still gives the base's own majority answers: accuracy seen without labels."""

import json
import random
import time
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
from accelerate.utils import broadcast_object_list
from datasets import Dataset
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from trl_crisp.evaluation.grading import Grader, require_math_verify
from trl_crisp.evaluation.problems import Problem
from trl_crisp.evaluation.progress import Tell
from trl_crisp.evaluation.prompts import check_positions
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.reference import (
    Reference,
    agrees,
    compare_agreement,
    count_votes,
    find_reference,
    write_references,
)
from trl_crisp.health.student_answers import log_values, sample_student, tokenizer_of

# Ours: if fewer prompts have a reference, the task has no answers that can be compared
MIN_SHARE_WITH_REFERENCE = 0.5
_PREFIX = "eval_agreement"
# Fields that shape the rollouts and that the evaluation's sampler does not have, with their values that change nothing
_UNUSED_SAMPLING: dict[str, tuple[Any, ...]] = {
    "min_p": (None, 0.0),
    "repetition_penalty": (1.0,),
    "generation_kwargs": (None, {}),
}


class AgreementMonitor(TrainerCallback):
    """
    Measures agreement with the base's own majority answers, and decides about due refreshes by it.

    Before the first step the base answers each monitor prompt `monitor_samples` times, and the majority is the prompt's reference
    ([`~trl_crisp.health.reference`]). The references are in `output_dir/agreement/reference.jsonl`, which `trl-crisp eval --benchmark`
    reads. Every `monitor_steps` steps the student answers the same prompts, at the rollouts' temperature, top_p, top_k and cap. The log
    gets `eval_agreement` (a share), `eval_agreement_change` from the base's own level with the ends of its paired 95% interval
    (`_change_low`, `_change_high`), `eval_agreement_mean_tokens`, `eval_agreement_reduction` and `eval_agreement_runtime` (seconds).

    The monitor prompts are taken from the training rows and left out of them. If fewer than half of them get a reference, nothing
    more is measured, and a gate allows each refresh, with a message.

    The rule of the gate: a due refresh is postponed while the last `eval_agreement_change` is below `-monitor_margin`.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`]; use [`attach_monitor`].
        answer_of: Returns the final answer of a text, or `None`. It replaces `monitor_grader`.
        progress: As in [`~trl_crisp.health.measuring.BenchmarkCallback`].

    Raises:
        ValueError: If the rows are a stream or too few, the model is sharded by FSDP, or the rollouts call tools.
        ImportError: If math-verify is needed and not installed.
    """

    def __init__(
        self,
        trainer: Any,
        answer_of: Callable[[str], str | None] | None = None,
        progress: Callable[[], AbstractContextManager[Tell]] = lambda: nullcontext(lambda *args: None),
    ) -> None:
        args = trainer.args
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "monitor_prompts: answers cannot be sampled from a model that FSDP has sharded. Leave it unset, or train with DeepSpeed."
            )
        if trainer.tools:
            raise ValueError(
                "monitor_prompts: answers that call tools cannot be sampled here, so agreement would be measured on other answers than the "
                "rollouts. Leave it unset."
            )
        if ignored := [name for name, plain in _UNUSED_SAMPLING.items() if getattr(args, name) not in plain]:
            warnings.warn(
                f"{', '.join(ignored)} has no effect on the answers to monitor prompts, of the base and of the student; it shapes the rollouts only.",
                stacklevel=3,
            )
        if answer_of is None and args.monitor_grader == "math":
            require_math_verify()
        self.trainer, self.answer_of, self.progress = trainer, answer_of, progress
        prompts = self._take_prompts(trainer, args)
        self._tokenizer = tokenizer_of(trainer)
        self.settings = EvaluationSettings(
            model=trainer.model.config._name_or_path,
            benchmark="agreement",
            samples=args.monitor_samples,
            temperature=args.temperature,
            top_p=args.top_p,
            top_k=args.top_k or 0,
            max_new_tokens=args.max_completion_length,
            seed=args.seed,
        )
        self._problems = [Problem(str(i), prompt, "", is_whole_prompt=True) for i, prompt in enumerate(prompts)]
        self._token_ids = trainer.prompt_pairs.tokenize_students(prompts, 0)
        check_positions(trainer.model.config, self._problems, self._token_ids, self.settings.max_new_tokens)
        # By the number of the monitor prompt
        self.references: dict[int, Reference] = {}
        self.is_on = True
        if args.teacher_refresh_gate == "agreement":
            trainer.teacher.refresh_gate = self.allows_refresh

    def _take_prompts(self, trainer: Any, args: Any) -> list[Any]:
        dataset = trainer.train_dataset
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"monitor_prompts={args.monitor_prompts} are taken from the training rows, and a stream has no rows to leave out. Load the "
                "rows without streaming, or leave it unset."
            )
        keys = [json.dumps(prompt, sort_keys=True) for prompt in dataset["prompt"]]
        distinct = list({key: row for row, key in reversed(list(enumerate(keys)))}.values())
        if len(distinct) <= args.monitor_prompts:
            raise ValueError(
                f"monitor_prompts={args.monitor_prompts}: the training rows have {len(distinct)} different prompts, so none would be left to "
                "train on. Give more rows, or fewer monitor prompts."
            )
        rows = sorted(random.Random(args.seed).sample(sorted(distinct), args.monitor_prompts))
        taken = {keys[row] for row in rows}
        prompts = [dataset[row]["prompt"] for row in rows]
        trainer.train_dataset = dataset.select([row for row, key in enumerate(keys) if key not in taken])
        return prompts

    def describe_start(self) -> str:
        """Return what is measured."""
        return (
            f"During training, agreement with the base's majority answers is measured: {len(self._problems)} prompts, left out of the "
            f"training rows, {self.settings.samples} answers each."
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        path = Path(args.output_dir or ".", "agreement", "reference.jsonl")
        if state.global_step == 0:
            if state.max_steps > 0:
                self._ask_base(path)
        else:
            self._read_references(path, state)

    def _ask_base(self, path: Path) -> None:
        start_s = time.monotonic()
        texts, lengths_tokens = self._sample(range(len(self._problems)), self.settings.seed)
        found: list[Reference | None] = []
        if self.trainer.is_world_process_zero():
            found = [
                find_reference(votes) for votes in count_votes(texts, self.trainer.args.monitor_grader, self.answer_of)
            ]
            write_references(path, [problem.prompt for problem in self._problems], found)
        found = self._from_first(found)
        self.references = {i: reference for i, reference in enumerate(found) if reference is not None}
        self._turn_off_without_references()
        if not self.is_on:
            return
        log_values(
            self.trainer,
            {
                _PREFIX: float(np.mean([one.base_agreement for one in self.references.values()])),
                f"{_PREFIX}_mean_tokens": float(np.mean([np.mean(lengths_tokens[i]) for i in self.references])),
                f"{_PREFIX}_runtime": time.monotonic() - start_s,
            },
        )

    def _read_references(self, path: Path, state: TrainerState) -> None:
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: this run resumes after step {state.global_step}, and the base's answers are not there, so there is nothing to "
                "compare with. Put the file back, or start again in another output_dir."
            )
        lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.references = {
            int(line["id"]): Reference(line["answer"], line["votes"], line["base_agreement"]) for line in lines
        }
        for line in lines:
            if int(line["id"]) >= len(self._problems) or self._problems[int(line["id"])].prompt != line["prompt"]:
                raise ValueError(
                    f"{path}: prompt {line['id']} is not the one that this run leaves out of its rows. The rows or the seed have changed: set "
                    "them back, or start again in another output_dir."
                )
        self._turn_off_without_references()

    def _turn_off_without_references(self) -> None:
        share = len(self.references) / len(self._problems)
        self.is_on = share >= MIN_SHARE_WITH_REFERENCE and len(self.references) > 1
        if not self.is_on:
            self.trainer.accelerator.print(
                f"The base has a majority answer to only {len(self.references)} of {len(self._problems)} monitor prompts, so agreement is "
                "not measured and no refresh is postponed. The task may have no final answers that can be compared."
            )

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        steps = self.trainer.args.monitor_steps
        if self.is_on and ((state.global_step + 1) % steps == 0 or state.global_step == state.max_steps):
            self._measure(state)

    def _measure(self, state: TrainerState) -> None:
        start_s = time.monotonic()
        asked = sorted(self.references)
        texts, lengths_tokens = self._sample(asked, self.settings.seed + state.global_step)
        values: dict[str, float] = {}
        if self.trainer.is_world_process_zero():
            agreed = self._agreed(texts, [self.references[i] for i in asked])
            change = compare_agreement([self.references[i] for i in asked], agreed)
            base_tokens = next(
                log[f"{_PREFIX}_mean_tokens"] for log in state.log_history if f"{_PREFIX}_mean_tokens" in log
            )
            mean_tokens = float(np.mean([np.mean(row) for row in lengths_tokens]))
            values = {
                _PREFIX: float(np.mean(agreed)),
                f"{_PREFIX}_change": change.estimate,
                f"{_PREFIX}_change_low": change.low,
                f"{_PREFIX}_change_high": change.high,
                f"{_PREFIX}_mean_tokens": mean_tokens,
                f"{_PREFIX}_reduction": 1 - mean_tokens / base_tokens,
            }
        values = self._from_first(values)
        log_values(self.trainer, {**values, f"{_PREFIX}_runtime": time.monotonic() - start_s})

    def _sample(self, asked: Any, seed: int) -> tuple[list[list[str]], list[list[int]]]:
        """Return the texts and the lengths in tokens of the answers to some of the prompts, both [prompts, samples]."""
        settings = EvaluationSettings(**{**vars(self.settings), "seed": seed})
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
            [[len(sample.token_ids) for sample in by_prompt[i]] for i in asked],
        )

    def _agreed(self, texts: list[list[str]], references: list[Reference]) -> list[list[bool]]:
        if self.answer_of is not None:
            return [
                [self.answer_of(text) == reference.answer for text in row]
                for row, reference in zip(texts, references, strict=True)
            ]
        pairs = [(text, reference.answer) for row, reference in zip(texts, references, strict=True) for text in row]
        kind = self.trainer.args.monitor_grader
        with Grader() as grader:
            grades = iter(grader.grade_all(pairs, kind))
        return [[agrees(next(grades), kind) for _ in row] for row in texts]

    def _from_first(self, value: Any) -> Any:
        if self.trainer.accelerator.num_processes == 1:
            return value
        return broadcast_object_list([value])[0]

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


def attach_monitor(
    trainer: Any,
    answer_of: Callable[[str], str | None] | None = None,
    progress: Callable[[], AbstractContextManager[Tell]] = lambda: nullcontext(lambda *args: None),
) -> AgreementMonitor:
    """
    Attach agreement, and the gate if `teacher_refresh_gate` is set, to a trainer. Call it before `train`.

    Args:
        trainer, answer_of, progress: See [`AgreementMonitor`].

    Raises:
        ValueError: As [`AgreementMonitor`], and if `monitor_prompts` is unset.
    """
    if trainer.args.monitor_prompts is None:
        raise ValueError("monitor_prompts is unset, so there is nothing to measure. Set it in the config, such as 64.")
    monitor = AgreementMonitor(trainer, answer_of, progress)
    trainer.add_callback(monitor)
    trainer.accelerator.print(monitor.describe_start())
    return monitor
