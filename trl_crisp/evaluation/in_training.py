"""Accuracy and length along a training run, by the code of `trl-crisp eval`, and which checkpoint is the best."""

import copy
import shutil
import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from accelerate.utils import broadcast_object_list, gather_object
from transformers import Trainer, TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from trl_crisp._upstream import unwrap_model_for_generation
from trl_crisp.evaluation.engines import TransformersEngine
from trl_crisp.evaluation.evaluating import (
    EvaluationSettings,
    Tell,
    check_positions,
    in_sampling_order,
    load_asked,
    measure,
    prompt_token_ids,
    random_place,
)
from trl_crisp.evaluation.grading import require_math_verify
from trl_crisp.evaluation.results import load_results
from trl_crisp.evaluation.sampling import Completion

# Ours: with more of the base's answers cut than this, lengths and accuracy are those of the cap
_MUCH_CUT = 0.1


@dataclass
class BenchmarkArguments:
    """
    Arguments of the training script that measure accuracy and tokens along the run.

    Parameters:
        eval_benchmark (`str`, *optional*):
            As in `trl-crisp eval --benchmark`: a name, or a file with question and answer. Nothing is measured if unset.
        eval_benchmark_file (`str`, *optional*):
            A local copy of a named benchmark's rows.
        eval_benchmark_steps (`int`, defaults to `50`; the paper's M, so that each teacher is measured before the next):
            Optimizer steps between two measurements. The base, before the first step, and the last step are measured too.
        eval_benchmark_limit (`int`, *optional*, defaults to `100`; ours, for the time it takes):
            The first so many problems.
        eval_benchmark_samples (`int`, defaults to `1`; ours, for the time it takes, the paper has 8 after training):
            Answers a problem.
        eval_benchmark_max_new_tokens (`int`, defaults to `30000`, the paper's):
            An answer is cut there, and a cut answer is most often a wrong one: with a cap that cuts the base's answers, accuracy
            would rise as answers get shorter.
        eval_benchmark_batch_size (`int`, defaults to `32`; ours):
            Answers at once on each process.
        eval_benchmark_max_accuracy_drop (`float`, defaults to `0.01`; ours, a point is within the noise of the paper's own figures):
            How far the best checkpoint's accuracy may lie below the base's, as a share of all answers: 0.01 is a point.
    """

    eval_benchmark: str | None = field(
        default=None,
        metadata={"help": "Measure accuracy and tokens along the run: a name or a file, as in `trl-crisp eval`."},
    )
    eval_benchmark_file: str | None = field(default=None, metadata={"help": "A local copy of its rows."})
    eval_benchmark_steps: int = field(default=50, metadata={"help": "Optimizer steps between two measurements."})
    eval_benchmark_limit: int | None = field(default=100, metadata={"help": "The first so many problems."})
    eval_benchmark_samples: int = field(default=1, metadata={"help": "Answers a problem."})
    eval_benchmark_max_new_tokens: int = field(default=30_000, metadata={"help": "An answer is cut there."})
    eval_benchmark_batch_size: int = field(default=32, metadata={"help": "Answers at once on each process."})
    eval_benchmark_max_accuracy_drop: float = field(
        default=0.01,
        metadata={"help": "How far the best checkpoint's accuracy may lie below the base's; 0.01 is a point."},
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


class BenchmarkCallback(TrainerCallback):
    """
    Measures accuracy and tokens on a benchmark: of the base before the first step, every so many steps, and at the end.

    The log gets `eval_{name}_accuracy`, `eval_{name}_mean_tokens`, `eval_{name}_reduction` (against the base), `eval_{name}_truncated`
    and `eval_{name}_runtime`; `output_dir/evaluation/{name}/step-N` gets what `trl-crisp eval` writes. The random numbers of the
    training are left alone: a run with this callback trains the same weights as one without. Under several processes each
    answers its share of the problems.

    The best checkpoint is the measured step with the fewest mean tokens, fewer than the base's, among those whose accuracy is at most
    `max_accuracy_drop` below the base's. It is saved whenever there is a new one, kept by `save_total_limit`, and named in
    `trainer_state.json` (`best_model_checkpoint`, with the tokens as `best_metric`), as transformers does with its own.

    Args:
        trainer: Whose model is measured; FSDP is refused.
        settings: Of the measurement; `model` is for the record.
        every_steps: See [`BenchmarkArguments`].
        max_accuracy_drop: See [`BenchmarkArguments`].
        progress: Makes a context manager that gives a function (stage, done, total, note), for the first process.

    Raises:
        ValueError: Under FSDP, and for a benchmark or settings that cannot be.
        FileNotFoundError, PermissionError, ConnectionError: Where the problems cannot be had.
        ImportError: Where math-verify is not installed.
    """

    def __init__(
        self,
        trainer: Trainer,
        settings: EvaluationSettings,
        every_steps: int = 50,
        max_accuracy_drop: float = 0.01,
        progress: Callable[[], AbstractContextManager[Tell]] = lambda: nullcontext(lambda *args: None),
    ) -> None:
        for name, value in (("engine", settings.engine), ("instruction", settings.instruction)):
            if value != EvaluationSettings.__dataclass_fields__[name].default:
                raise ValueError(
                    f"{name}={value!r} has no effect along a run, where the student answers the plain prompt by transformers. Leave it "
                    "out, and measure checkpoints with `trl-crisp eval`."
                )
        if trainer.args.load_best_model_at_end or trainer.args.metric_for_best_model:
            raise ValueError(
                "eval_benchmark finds the best checkpoint by a rule of its own, and so do load_best_model_at_end and "
                "metric_for_best_model. Leave out the one or the other."
            )
        if trainer.is_fsdp_enabled:
            raise ValueError(
                "eval_benchmark: answers cannot be sampled from a model that FSDP has sharded. Leave it unset and measure the "
                "checkpoints with `trl-crisp eval`, or train with DeepSpeed."
            )
        require_math_verify()
        self.trainer, self.settings = trainer, settings
        self.every_steps, self.max_accuracy_drop, self.progress = every_steps, max_accuracy_drop, progress
        self.benchmark = load_asked(settings)
        self.name = Path(settings.benchmark).stem
        tokenizer: Any = self._tokenizer()
        model: Any = trainer.model
        prompts = prompt_token_ids(
            self.benchmark.problems, "", tokenizer, settings.chat_template_kwargs, settings.system
        )
        check_positions(model.config, self.benchmark.problems, prompts, settings.max_new_tokens)
        self._first_prompt = str(tokenizer.decode(prompts[0]))

    def describe_start(self) -> str:
        """Return how the answers are graded, and the first prompt."""
        return (
            f"Along the run {self.name} is measured: {len(self.benchmark.problems)} problems, graded as {self.benchmark.kind} "
            f"({self.benchmark.kind_reason}). The first prompt:\n{self._first_prompt}"
        )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if args.save_total_limit == 1:
            # At the end of a training transformers would delete all but the best, and with them the last, which can be resumed
            args.save_total_limit = 2
        if state.global_step == 0:
            if state.max_steps > 0:
                self._measure(args, state)
        elif not any(point["step"] == 0 for point in self.measured(state)):
            raise ValueError(
                f"this run goes on after step {state.global_step}, and its base was not measured on {self.name} before the first "
                "step, so there is nothing to compare with. Leave eval_benchmark as it was, and measure checkpoints with "
                "`trl-crisp eval`."
            )
        else:
            self._check_protocol(args)

    def _check_protocol(self, args: TrainingArguments) -> None:
        path = self._directory(args, 0) / "results.json"
        if not path.is_file():
            return
        base = load_results(path)
        settings = {**asdict(self.settings), "benchmark_revision": self.benchmark.revision}
        before = {**base["protocol"], "samples": base["samples"], "limit": base["protocol"]["problems"]}
        settings["limit"] = len(self.benchmark.problems)
        names = ("benchmark_revision", "limit", "samples", "max_new_tokens", "temperature", "top_p", "top_k", "seed")
        if differing := [name for name in names if before[name] != settings[name]]:
            listed = "".join(f"\n  {name}: {before[name]!r} before, {settings[name]!r} now" for name in differing)
            raise ValueError(
                f"this run measured its base in another way, so the points of its curve could not be compared:{listed}\nLeave these as "
                "they were, or start anew in another output_dir."
            )

    def _directory(self, args: TrainingArguments, step: int) -> Path:
        return Path(args.output_dir or ".", "evaluation", self.name, f"step-{step}")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        if state.global_step % self.every_steps and state.global_step != state.max_steps:
            return
        accuracy, mean_tokens = self._measure(args, state)
        base = self.measured(state)[0]
        # As far as sums of floats tell a point from a point
        enough = accuracy >= base["accuracy"] - self.max_accuracy_drop - 1e-9
        shortest = base["mean_tokens"] if state.best_metric is None else state.best_metric
        if enough and mean_tokens < shortest:
            state.best_metric, state.best_global_step = mean_tokens, state.global_step
            state.best_model_checkpoint = str(
                Path(args.output_dir or ".", f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}")
            )
            control.should_save = True

    def measured(self, state: TrainerState) -> list[dict[str, float]]:
        """Return step, accuracy and mean_tokens of each measurement so far, the base's first."""
        keys = {key: f"eval_{self.name}_{key}" for key in ("accuracy", "mean_tokens")}
        return [
            {"step": log["step"], **{key: log[name] for key, name in keys.items()}}
            for log in state.log_history
            if keys["accuracy"] in log
        ]

    def describe_best(self, state: TrainerState) -> str:
        """Return a sentence about the best checkpoint and the rule."""
        measured = {point["step"]: point for point in self.measured(state)}
        points = f"{100 * self.max_accuracy_drop:g} points"
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
        if state.best_global_step is None:
            return f"No measured step is fit to be the best checkpoint ({rule}; {was}).{warning}"
        best = measured[state.best_global_step]
        which = state.best_model_checkpoint or f"that of step {state.best_global_step}, which is no longer there"
        return (
            f"The best checkpoint is {which} ({rule}): {best['accuracy']:.1%} with "
            f"{best['mean_tokens']:,.0f} tokens; {was}.{warning}"
        )

    def _measure(self, args: TrainingArguments, state: TrainerState) -> tuple[float, float]:
        trainer, start_s = self.trainer, time.monotonic()
        directory = self._directory(args, state.global_step)
        # Of a run before this one, or of one that was killed: other weights may have written it
        first = trainer.is_world_process_zero()
        if first and directory.is_dir():
            shutil.rmtree(directory)
        model: Any = trainer.model
        was_training = model.training
        with self.progress() if first else nullcontext(None) as on_progress:  # type: ignore[attr-defined]
            with unwrap_model_for_generation(
                trainer.model_wrapped,  # type: ignore[arg-type]
                trainer.accelerator,
                gradient_checkpointing_kwargs=args.gradient_checkpointing_kwargs,  # type: ignore[arg-type]
            ) as unwrapped:
                engine = TransformersEngine(unwrapped, self._tokenizer())  # type: ignore[arg-type]
                sampling_start_s = time.monotonic()
                sampled = _Sampled(engine, self._sample(engine, on_progress))
                sampled_in_s = time.monotonic() - sampling_start_s
            shared: list[dict[str, float] | None] = [None]
            if first:
                about = {
                    "model": f"{self.settings.model} at step {state.global_step}",
                    "trained_from": self.settings.model,
                    "step": state.global_step,
                    # Its weights are float32 under mixed precision too
                    "mixed_precision": trainer.accelerator.mixed_precision,
                    "processes": trainer.accelerator.num_processes,
                }
                results = measure(
                    sampled,
                    self.settings,
                    "",
                    self.benchmark,
                    directory,
                    on_progress,
                    about=about,
                    sampled_in_s=sampled_in_s,
                )
                shared = [results["summary"][str(self.settings.max_new_tokens)]["all"]]
        if trainer.accelerator.num_processes > 1:
            shared = broadcast_object_list(shared)
        summary = shared[0]
        assert summary is not None
        base_tokens = next((point["mean_tokens"] for point in self.measured(state)), summary["mean_tokens"])
        values = {
            "accuracy": summary["accuracy"],
            "mean_tokens": summary["mean_tokens"],
            "reduction": 1 - summary["mean_tokens"] / base_tokens,
            "truncated": summary["truncated"],
            "runtime": time.monotonic() - start_s,
        }
        # In evaluation mode the trainer does not take the line for one of the training's
        model.eval()
        should_log = trainer.control.should_log
        trainer.log({f"eval_{self.name}_{key}": value for key, value in values.items()})
        # It counts any line as the one that was due
        trainer.control.should_log = should_log
        model.train(was_training)
        return values["accuracy"], values["mean_tokens"]

    def _tokenizer(self) -> Any:
        tokenizer: Any = copy.copy(self.trainer.processing_class)
        # The one that the rollouts have, where it is not the tokenizer's own
        tokenizer.chat_template = getattr(self.trainer, "chat_template", None) or tokenizer.chat_template
        return tokenizer

    def _sample(self, engine: TransformersEngine, on_progress: Tell | None) -> list[Completion]:
        """Answer this process's share, and return everyone's answers in the order of sampling."""
        settings, accelerator = self.settings, self.trainer.accelerator
        prompts = prompt_token_ids(
            self.benchmark.problems, "", engine.tokenizer, settings.chat_template_kwargs, settings.system
        )
        check_positions(engine.config, self.benchmark.problems, prompts, settings.max_new_tokens)
        order = in_sampling_order(len(prompts), settings.samples)
        mine = range(accelerator.process_index, len(order), accelerator.num_processes)
        completions: list[tuple[int, Completion]] = []

        def tell(done: int, note: str) -> None:
            if on_progress is not None:
                on_progress("sampling", done, len(mine), note)

        if mine:
            engine.generate(
                [prompts[order[index][0]] for index in mine],
                [random_place(*order[index]) for index in mine],
                lambda place, completion: completions.append((mine[place], completion)),
                tell,
                **settings.sampling,
            )
        everyones = gather_object(completions) if accelerator.num_processes > 1 else completions
        return [completion for _, completion in sorted(everyones, key=lambda pair: pair[0])]


class _Sampled(TransformersEngine):
    """An engine whose answers are there already."""

    def __init__(self, engine: TransformersEngine, completions: list[Completion]) -> None:
        super().__init__(engine.model, engine.tokenizer)
        self._completions = completions

    def generate(self, prompt_token_ids, places, on_completion, on_progress, **sampling) -> None:
        for index, completion in enumerate(self._completions):
            on_completion(index, completion)
