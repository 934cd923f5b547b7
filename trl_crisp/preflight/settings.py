"""What a preflight measures. The rollouts' and the rows' fields are those of training, with training's defaults."""

import warnings
from dataclasses import dataclass, replace
from typing import Any, get_args

from trl_crisp.config import FEW_BASE_SAMPLES, MIN_MONITOR_PROMPTS, CRISPConfig, InstructionRole
from trl_crisp.evaluation.grading import KINDS, Kind
from trl_crisp.evaluation.settings import EvaluationSettings
from trl_crisp.health.reference import MIN_SAMPLES
from trl_crisp.rows.arguments import CRISPScriptArguments

# dtypes that a model can be trained in
DTYPES = ("float32", "bfloat16")


@dataclass(frozen=True)
class PreflightSettings:
    """
    What to measure.

    Attributes:
        model: A Hub id or a directory of a model or an adapter.
        dataset: The rows to train on, as `dataset_name` of training: a Hub id, a file, or `reasoning-gym:TASK`.
        instructions: What the teacher is told, each as in [`~trl_crisp.CRISPConfig`]. The default is the paper's two.
        prompts: How many prompts are asked, drawn from the rows (ours: a few dozen show a large effect within minutes).
        samples: Answers to each prompt, plain and under each instruction (ours: the least that gives a majority of more than two).
        margin: How far accuracy or agreement may fall and the answers still hold, as `monitor_margin`: 0.03 is three points.
        temperature, top_p, top_k, max_completion_length, chat_template_kwargs, instruction_replaces, instruction_role,
        max_prompt_length: As in training, and so are the defaults.
        seed: Of the draw of the prompts and of the sampling.
        grader: How final answers are compared: `"math"`, `"choice"` or `"text"`. If `None`: found from the rows' answers, as
            `trl-crisp eval` does, and `"math"` without them.
        engine, batch_size: As in `trl-crisp eval`.
        dataset_config, dataset_train_split, prompt_column, teacher_prompt_column, prompt_template, dataset_size, dataset_seed: As in
            training ([`~trl_crisp.data.CRISPScriptArguments`]).
        per_device_train_batch_size, gradient_accumulation_steps, max_steps: The run that tokens and memory are estimated for; one epoch
            if `max_steps` is `None`.
        lora_r, lora_target_modules: The adapter that memory is estimated for. The defaults are those of our LoRA config.
        dtype: The dtype of the weights in the run.

    Raises:
        ValueError: If a value is out of its range.
    """

    model: str
    dataset: str
    instructions: tuple[str, ...] = ("v1", "v2")
    prompts: int = 32
    samples: int = 4
    margin: float = CRISPConfig.monitor_margin
    temperature: float = CRISPConfig.temperature
    top_p: float = CRISPConfig.top_p
    top_k: int = CRISPConfig.top_k
    max_completion_length: int = CRISPConfig.max_completion_length  # type: ignore[assignment]
    max_prompt_length: int | None = CRISPConfig.max_prompt_length
    chat_template_kwargs: dict[str, Any] | None = None
    instruction_replaces: str | None = CRISPConfig.instruction_replaces
    instruction_role: str = CRISPConfig.instruction_role
    seed: int = 42
    grader: Kind | None = None
    engine: str = EvaluationSettings.engine
    batch_size: int | None = None
    dataset_config: str | None = None
    dataset_train_split: str = CRISPScriptArguments.dataset_train_split
    prompt_column: str = CRISPScriptArguments.prompt_column
    teacher_prompt_column: str | None = None
    prompt_template: str | None = None
    dataset_size: int = CRISPScriptArguments.dataset_size
    dataset_seed: int = CRISPScriptArguments.dataset_seed
    per_device_train_batch_size: int = CRISPConfig.per_device_train_batch_size
    gradient_accumulation_steps: int = CRISPConfig.gradient_accumulation_steps
    max_steps: int | None = None
    lora_r: int = 32
    lora_target_modules: tuple[str, ...] = ("all-linear",)
    dtype: str = "float32"

    def __post_init__(self) -> None:
        if self.prompts < MIN_MONITOR_PROMPTS:
            raise ValueError(
                f"prompts={self.prompts}: so few prompts say nothing about a model. Give at least {MIN_MONITOR_PROMPTS}, better "
                f"{PreflightSettings.prompts} or more."
            )
        if self.samples < MIN_SAMPLES:
            raise ValueError(
                f"samples={self.samples}: a majority needs at least {MIN_SAMPLES} answers to a prompt. Give {PreflightSettings.samples}, or more."
            )
        if self.samples < FEW_BASE_SAMPLES:
            warnings.warn(
                f"samples={self.samples}: of so few answers the plain prompt's own agreement is wrong, so where no labels judge, verdicts are too. "
                f"Give {PreflightSettings.samples}, or more.",
                stacklevel=3,
            )
        if not 0 <= self.margin < 1:
            raise ValueError(
                f"margin={self.margin} is a share of all answers: give a number from 0 to below 1, such as 0.03 for three points."
            )
        if not self.instructions:
            raise ValueError("there is no instruction to measure. Give one or more, such as v1 v2.")
        if self.instruction_role not in get_args(InstructionRole):
            raise ValueError(
                f"instruction_role={self.instruction_role!r} is unknown. Choose one of {', '.join(map(repr, get_args(InstructionRole)))}."
            )
        if self.grader is not None and self.grader not in KINDS:
            raise ValueError(f"grader={self.grader!r} is unknown. Choose one of {', '.join(map(repr, KINDS))}.")
        if self.dtype not in DTYPES:
            raise ValueError(f"dtype={self.dtype!r} is unknown. Choose one of {', '.join(map(repr, DTYPES))}.")
        for name in (
            "max_prompt_length",
            "max_completion_length",
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "max_steps",
            "lora_r",
        ):
            if (value := getattr(self, name)) is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1.")
        if self.temperature == 0:
            raise ValueError(
                "temperature=0.0 gives the same answer each time, so there is no majority. Give training's temperature, such as 1."
            )
        # Checks the rest
        _ = self.sampling

    @property
    def sampling(self) -> EvaluationSettings:
        """How the plain prompt is answered, in the evaluation's words."""
        return EvaluationSettings(
            model=self.model,
            benchmark=self.dataset,
            samples=self.samples,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_completion_length,
            seed=self.seed,
            batch_size=self.batch_size,
            engine=self.engine,
            chat_template_kwargs=self.chat_template_kwargs,
        )

    @property
    def told_sampling(self) -> EvaluationSettings:
        """
        How an instruction's prompts are answered: with other random numbers than the plain prompt.

        With the same ones, an answer that the instruction does not change would be compared with a majority that counts it.
        """
        return replace(self.sampling, seed=self.seed + 1)

    @property
    def rows(self) -> CRISPScriptArguments:
        """Which rows, as training reads them."""
        return CRISPScriptArguments(
            dataset_name=self.dataset,
            dataset_config=self.dataset_config,
            dataset_train_split=self.dataset_train_split,
            prompt_column=self.prompt_column,
            teacher_prompt_column=self.teacher_prompt_column,
            prompt_template=self.prompt_template,
            dataset_size=self.dataset_size,
            dataset_seed=self.dataset_seed,
        )

    @property
    def rollouts_per_step(self) -> int:
        """The rollouts of a step on one process."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps
