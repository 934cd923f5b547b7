"""The fields of a CRISP run, the source of each default, and the checks of their combinations."""

import math
import warnings
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import torch
from transformers import SchedulerType
from transformers.integrations.integration_utils import (
    INTEGRATION_TO_CALLBACK,
    get_available_reporting_integrations,
)
from transformers.utils import is_torch_bf16_gpu_available, is_torch_xla_available
from trl import DistillationConfig

from trl_crisp.config_ranges import check_ranges
from trl_crisp.prompts.chat_template_flags import check_chat_template_kwargs
from trl_crisp.prompts.instructions import DAPO_OPENING_SENTENCE

InstructionRole = Literal["user", "system"]
TeacherModelKind = Literal["periodic", "base", "ema", "live"]
LossNormalization = Literal["sequence", "token"]
MonitorGrader = Literal["math", "choice", "text"]
RefreshGate = Literal["agreement"]

PAPER_GLOBAL_BATCH_SIZE = 32
PAPER_TEACHER_SYNC_STEPS = 50
PAPER_LEARNING_RATE = 1e-6
# Ours: with fewer prompts the mean agreement says nothing
MIN_MONITOR_PROMPTS = 8
# Of fewer answers the base's own level is biased by more than a point (benchmarks/README, Accuracy without labels, Power)
FEW_BASE_SAMPLES = 4
# Fields of the monitor that count something, and what to give
_MONITOR_COUNTS = {
    "monitor_prompts": 128,
    "monitor_samples": 5,
    "monitor_base_samples": 16,
    "monitor_max_new_tokens": 1024,
    "monitor_steps": PAPER_TEACHER_SYNC_STEPS,
}
# Each tracker and the package that it needs
_TRACKER_PACKAGES = {
    **{
        name: name
        for name in ("wandb", "trackio", "tensorboard", "mlflow", "clearml", "codecarbon", "dagshub", "dvclive")
    },
    **{"comet_ml": "comet_ml", "neptune": "neptune", "swanlab": "swanlab", "azure_ml": "azureml-sdk"},
}


@dataclass
class CRISPConfig(DistillationConfig):
    r"""
    Configuration of [`CRISPTrainer`]: TRL's `DistillationConfig` with the paper's defaults (arXiv 2603.05433) and the
    fields that CRISP adds.

    What differs from `DistillationConfig`:

    - `temperature` applies to the rollouts only. TRL also divides the logits of the loss by it; here `loss_temperature` does
      that.
    - `teacher_model_init_kwargs` takes one key, `dtype`, because the teacher is a copy of the student and is not loaded.
      `teacher_model_name_or_path` and `teacher_model_revision` are refused.

    Parameters with the paper's default (Table "Hyperparameters", unless another source is named):
        learning_rate (`float`, defaults to `1e-6`):
            For full fine-tuning. This rate hardly changes a LoRA adapter, which needs about 10x to 100x as much.
        lr_scheduler_type (`str`, defaults to `"constant"`), weight_decay (`float`, defaults to `0.01`), max_grad_norm
        (`float`, defaults to `1.0`), num_train_epochs (`float`, defaults to `1`):
            As in the paper.
        per_device_train_batch_size (`int`, defaults to `2`), gradient_accumulation_steps (`int`, defaults to `16`):
            The paper's micro-batch and, on one process, its global batch of 32 rollouts. Any other global batch gives a warning.
        temperature (`float`, defaults to `1.0`), top_p (`float`, defaults to `1.0`), max_completion_length (`int`,
        defaults to `8192`, in tokens):
            How rollouts are sampled. Truncated rollouts stay in the loss (Sec. 4.5.5).
        beta (`float`, defaults to `1.0`):
            TRL's field: 1 is the reverse KL (Eq. 1), 0 is the forward KL, and values between them give the generalized JSD.

    Parameters that CRISP adds:
        instruction (`str`, defaults to `"v2"`, the paper's default):
            What the teacher is told: a name from the catalogue ([`~trl_crisp.INSTRUCTIONS`]: v1 to v5, general, or
            percent:N, words:N), the text itself, or the path of a .txt file. `""` gives both models the same prompt.
        instruction_replaces (`str` or `None`, defaults to the opening sentence of DAPO-Math-17k's prompts, Figure 2):
            The student's own instruction. If the user's text starts with it, it is removed from the teacher's prompt. `None` or
            `""` removes nothing.
        instruction_role (`str`, defaults to `"user"`, as in the paper):
            Where the instruction goes: the first `"user"` message, or the `"system"` message.
        teacher_model_kind (`str`, defaults to `"periodic"`, Eq. 2):
            Which weights the teacher has, in the words of TRL's SDFT: `"periodic"` (refreshed from the student every
            `teacher_sync_steps`), `"base"` (the student's weights at step 0), `"ema"` (a moving average of the student's
            weights, kept in float32), `"live"` (the student's current weights).
        teacher_sync_steps (`int`, *optional*):
            Optimizer steps between two updates of the teacher. If unset: 50 for `"periodic"` (the paper's M), 1 for `"ema"` (the
            paper's appendix). The teacher is updated at the start of step k, counted from 1, if k is a multiple of this value
            (Algorithm 1).
        teacher_update_rate (`float`, *optional*):
            The student's share in the moving average at each update of `"ema"`. If unset: 0.005 (the paper's appendix: decay
            0.99 to 0.999).
        teacher_offload (`bool`, defaults to `False`; ours, because the copies cost time):
            Keep the teacher's copy in the host's memory, for full fine-tuning on GPUs. It comes to the device while the rollouts are sampled,
            computes its hidden states of all micro-batches of the step, and leaves the device before the student trains. Its output head
            stays. Not for DeepSpeed and FSDP, whose own offload holds for the teacher.
        monitor_prompts (`int`, *optional*):
            Number of training prompts that the base answers before the first step and that are left out of training. The majority
            of its answers to a prompt is the reference, and how often the student still gives it is measured during training
            ([`~trl_crisp.health.monitor.AgreementMonitor`]). Nothing is measured if unset. We recommend 128: 64 prompts give 4% false
            alarms instead of 1% with 16 answers of the base (benchmarks/README). The training script measures by itself; in Python,
            call [`~trl_crisp.health.attach.attach_health`].
        monitor_file (`str`, *optional*):
            A .jsonl, .json, .parquet or .csv file with prompts of its own to measure on, in the form of the training rows, instead of
            training prompts. With `monitor_prompts`, its first ones; else all.
        monitor_samples (`int`, defaults to `5`; ours, as in the lab's runs that the rule was tested on):
            Answers per monitor prompt at each measurement.
        monitor_base_samples (`int`, *optional*):
            Answers of the base per monitor prompt, before the first step. If unset: `monitor_samples`. We recommend 16: the base is measured
            once, and its noise is in all changes of the run (benchmarks/README). Fewer than 4 warn: the base's level is then biased.
        monitor_max_new_tokens (`int`, *optional*):
            The longest answer to a monitor prompt. If unset: `max_completion_length`. Give more if that cuts the base's answers: prompts
            whose answers are cut have no reference, and agreement then looks better than accuracy is.
        monitor_steps (`int`, *optional*):
            Optimizer steps between two measurements. If unset: `teacher_sync_steps` of a `"periodic"` teacher, 50 with any other. Step k is
            measured if k + 1 is a multiple, just before a refresh is due; so is the last step.
        monitor_grader (`str`, defaults to `"math"`):
            How two final answers are compared: `"math"`, `"choice"` or `"text"`, as in `trl-crisp eval`. Texts need an answer line, and agree
            by all of its words.
        monitor_margin (`float`, defaults to `0.03`; ours: 1% false alarms of a measurement with 128 prompts and 16
        answers of the base, 2.5% with 5; benchmarks/README):
            How far agreement may be below the base's own before it counts as fallen: 0.03 is three points.
        monitor_distance (`bool`, defaults to `False`; ours, because it costs two passes over the answers):
            Also measure how many nats an answer of the student is more likely than under the base told to be concise
            ([`~trl_crisp.health.distance.ConciseBaseDistance`]). With LoRA it costs no memory; in full fine-tuning the initial weights are
            kept in the CPU's memory. Refused under FSDP and DeepSpeed ZeRO-3.
        teacher_refresh_gate (`str`, *optional*):
            `"agreement"` postpones a due refresh while agreement is below the base's own by more than `monitor_margin`. If unset, each
            due refresh happens, as in the paper.
        stop_at_sweet_spot (`bool`, defaults to `False`):
            End the run when accuracy (with `eval_benchmark`, or if half of the monitor prompts have right answers that the base can give), else
            agreement, has fallen: two measurements in a row are below the base by more than the margin, with a paired 95% interval below
            zero. The result of the run is its best checkpoint, the shortest that holds ([`~trl_crisp.health.sweet_spot.SweetSpot`]). Needs `monitor_prompts`,
            `monitor_file` or `eval_benchmark`.
        target_reduction (`float`, *optional*):
            End the run when the answers to the monitor prompts, or to `eval_benchmark`, are shorter than the base's by this share. The paper's
            sweet spot is about 0.5. Nothing ends it if unset.
        loss_normalization (`str`, defaults to `"sequence"`, Algorithm 1):
            `"sequence"`: the mean over each rollout's tokens, then over the global batch of rollouts. `"token"`: one mean over
            all tokens of the global batch, as in TRL.
        loss_temperature (`float`, defaults to `1.0`, as in the authors' code):
            Softmax temperature of both distributions in the divergence and in the logged entropies.
        profile_steps (`bool`, defaults to `False`; ours, because measuring costs some speed):
            Log the seconds of each step's parts, and the share of the hardware's limit that training reaches
            ([`~trl_crisp.run.profile.StepProfile`]).
        max_prompt_length (`int` or `None`, defaults to `1024`, in tokens):
            Rows with a longer student or teacher prompt are dropped before training, counted and reported. Prompts are never
            truncated. `None` keeps all rows.
        resume_from_checkpoint (`str`, *optional*, TRL's field):
            For the training script: a checkpoint's path, or `"true"` to resume from the run's last whole checkpoint in
            `output_dir`. If there is no such checkpoint, `"true"` starts afresh.
        allow_changed_resume (`bool`, defaults to `False`; ours, because a silent change trains toward another target):
            Resume from a checkpoint of a run whose instruction, teacher schedule, gate, adapter or model differs from this run's, or that
            answers monitor prompts in another way, or that is another run than `output_dir`'s.
        collapse_guard (`bool`, defaults to `True`; ours, because training on a lost model costs time and saves it as the result):
            For the training script: stop a run that its signals call lost ([`~trl_crisp.health.guard.CollapseGuard`]), save no final
            model, do not push it, and exit with status 3. In Python, [`~trl_crisp.health.attach.attach_health`] attaches it.
    """

    lr_scheduler_type: SchedulerType | str = field(
        default="constant", metadata={"help": "Schedule of the learning rate. The paper's is constant."}
    )
    weight_decay: float = field(default=0.01, metadata={"help": "Weight decay of AdamW. The paper's is 0.01."})
    num_train_epochs: float = field(default=1.0, metadata={"help": "Number of epochs. The paper's is 1."})
    per_device_train_batch_size: int = field(
        default=2, metadata={"help": "Rollouts per micro-batch on each process. The paper's is 2."}
    )
    gradient_accumulation_steps: int = field(
        default=16,
        metadata={"help": "Micro-batches per optimizer step; 16 of 2 rollouts make the paper's 32 on one process."},
    )
    max_completion_length: int | None = field(
        default=8192, metadata={"help": "Maximum length of a rollout in tokens. The paper's is 8192."}
    )
    temperature: float = field(
        default=1.0,
        metadata={"help": "Sampling temperature of the rollouts; the loss uses loss_temperature. The paper's is 1."},
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "true resumes from the run's last whole checkpoint in output_dir, if any; or give a checkpoint's path."
        },
    )
    instruction: str = field(
        default="v2",
        metadata={
            "help": "What the teacher is told: v1, v2, v3, v4, v5, general, percent:N, words:N, the text itself, or the "
            "path of a .txt file. '' gives both models the same prompt."
        },
    )
    instruction_replaces: str | None = field(
        default=DAPO_OPENING_SENTENCE,
        metadata={
            "help": "The student's own instruction; if the user's text starts with it, it is removed from the teacher's prompt."
        },
    )
    instruction_role: str = field(
        default="user",
        metadata={
            "help": "Role of the message that gets the instruction.",
            "choices": list(get_args(InstructionRole)),
        },
    )
    teacher_model_kind: str = field(
        default="periodic",
        metadata={"help": "Which weights the teacher uses.", "choices": list(get_args(TeacherModelKind))},
    )
    teacher_sync_steps: int | None = field(
        default=None,
        metadata={"help": "Optimizer steps between two updates of the teacher: 50 for periodic, 1 for ema if unset."},
    )
    teacher_update_rate: float | None = field(
        default=None,
        metadata={"help": "The student's share in the moving average at each update of ema: 0.005 if unset."},
    )
    teacher_offload: bool = field(
        default=False,
        metadata={"help": "Keep the teacher's copy in the host's memory while the student trains (full fine-tuning)."},
    )
    monitor_prompts: int | None = field(
        default=None,
        metadata={
            "help": "Training prompts that are left out to measure agreement with the base's own majority answers."
        },
    )
    monitor_file: str | None = field(
        default=None, metadata={"help": "A file with prompts to measure agreement on, instead of training prompts."}
    )
    monitor_samples: int = field(default=5, metadata={"help": "Answers per monitor prompt at each measurement."})
    monitor_base_samples: int | None = field(
        default=None,
        metadata={"help": "Answers of the base per monitor prompt, better 16: monitor_samples if unset."},
    )
    monitor_max_new_tokens: int | None = field(
        default=None, metadata={"help": "The longest answer to a monitor prompt: max_completion_length if unset."}
    )
    monitor_steps: int | None = field(
        default=None,
        metadata={
            "help": "Steps between two measurements of agreement. If unset: teacher_sync_steps of a periodic teacher, else 50."
        },
    )
    monitor_grader: str = field(
        default="math",
        metadata={"help": "How final answers are compared.", "choices": list(get_args(MonitorGrader))},
    )
    monitor_margin: float = field(
        default=0.03, metadata={"help": "How far agreement may be below the base's own; 0.03 is three points."}
    )
    monitor_distance: bool = field(
        default=False,
        metadata={"help": "Also measure how far the student's answers are from the base told to be concise, in nats."},
    )
    teacher_refresh_gate: str | None = field(
        default=None,
        metadata={
            "help": "agreement postpones a due refresh while the student agrees less with the base's majority answers.",
            "choices": list(get_args(RefreshGate)),
        },
    )
    stop_at_sweet_spot: bool = field(
        default=False,
        metadata={
            "help": "End the run when accuracy or agreement has fallen; its result is the best checkpoint measured."
        },
    )
    target_reduction: float | None = field(
        default=None,
        metadata={
            "help": "End the run when the measured answers are shorter than the base's by this share, such as 0.5."
        },
    )
    loss_normalization: str = field(
        default="sequence",
        metadata={
            "help": "sequence averages the loss over each rollout's tokens, then over rollouts; token over all tokens at once.",
            "choices": list(get_args(LossNormalization)),
        },
    )
    loss_temperature: float = field(
        default=1.0, metadata={"help": "Softmax temperature of both distributions in the divergence."}
    )
    profile_steps: bool = field(
        default=False,
        metadata={"help": "Log the seconds of each step's parts and the share of the hardware's limit (profile/*)."},
    )
    max_prompt_length: int | None = field(
        default=1024,
        metadata={"help": "Rows with a longer student or teacher prompt, in tokens, are dropped before training."},
    )
    allow_changed_resume: bool = field(
        default=False,
        metadata={"help": "Resume from a checkpoint of a run with another instruction, schedule, adapter or model."},
    )
    collapse_guard: bool = field(
        default=True,
        metadata={
            "help": "Stop a run that is lost by its logged signals, with exit status 3; save and push no final model."
        },
    )

    def __post_init__(self) -> None:
        self._check_device()
        super().__post_init__()
        self._check_trackers()
        check_chat_template_kwargs(self.chat_template_kwargs)
        check_ranges(self)
        self._check_choices()
        self._check_training_loop()
        self._check_instruction()
        self._check_teacher_source()
        self._resolve_schedule()
        self._check_monitor()
        self._warn_off_paper()

    def _check_device(self) -> None:
        # If bf16 is unset and fp16 is off, bf16 is used
        wants_bf16 = bool(self.bf16 or self.bf16_full_eval) or (self.bf16 is None and not self.fp16)
        if wants_bf16 and not (self.use_cpu or is_torch_bf16_gpu_available() or is_torch_xla_available()):
            raise ValueError(
                "bf16=True, the default, needs a GPU that computes in bfloat16, and this machine has none. On a CPU add "
                "`--bf16 false --use_cpu true`; on an older GPU `--bf16 false`."
            )

    def _check_trackers(self) -> None:
        available = get_available_reporting_integrations()
        for name in self.report_to or []:
            if name not in INTEGRATION_TO_CALLBACK:
                raise ValueError(
                    f"report_to={name!r} is not a tracker that transformers knows; it knows {', '.join(sorted(INTEGRATION_TO_CALLBACK))}."
                )
            # transformers finds the other trackers in other ways, so only these are checked by package
            if name in _TRACKER_PACKAGES and name not in available:
                package = _TRACKER_PACKAGES[name]
                raise ValueError(
                    f"report_to={name!r}: the package {package} is not installed (or switched off by an environment variable). "
                    f"Install it with `pip install {package}`, or set report_to to none."
                )

    def _check_training_loop(self) -> None:
        if self.auto_find_batch_size:
            raise ValueError(
                "auto_find_batch_size=True is not supported: after a failed attempt the trainer would reuse that attempt's "
                "completions and draw rows twice. Instead, set per_device_train_batch_size lower and gradient_accumulation_steps "
                "higher, with the same product; the loss is the same."
            )
        schedule = getattr(self.lr_scheduler_type, "value", self.lr_scheduler_type)
        if schedule == "constant":
            if self.warmup_steps:
                self._warn(
                    f"warmup_steps={self.warmup_steps} has no effect with lr_scheduler_type='constant', the default here. Set "
                    "lr_scheduler_type to 'constant_with_warmup' to warm up."
                )
            if self.lr_scheduler_kwargs:
                self._warn(
                    f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} has no effect with lr_scheduler_type='constant', the "
                    "default here. Set lr_scheduler_type to the schedule that they belong to."
                )
        elif schedule == "constant_with_warmup" and self.lr_scheduler_kwargs:
            self._warn(f"lr_scheduler_kwargs={self.lr_scheduler_kwargs} has no effect with {schedule!r}.")
        # The loss is a divergence, without labels, and `shuffle_dataset` sets the order of the rows
        for name, value in (("label_smoothing_factor", 0.0), ("train_sampling_strategy", "random")):
            if getattr(self, name, value) != value:
                self._warn(
                    f"{name}={getattr(self, name)!r} has no effect: CRISP's loss reads no labels, and its sampler keeps "
                    "the rows of a step together."
                )
        if self.torch_compile:
            self._warn(
                "torch_compile=True has no effect: it compiles the whole model's forward, and the loss reads the hidden states of "
                "the part inside."
            )
        if not self.use_vllm:
            defaults = DistillationConfig.__dataclass_fields__
            if changed := [n for n in defaults if n.startswith("vllm_") and getattr(self, n) != defaults[n].default]:
                self._warn(f"{', '.join(changed)} has no effect without use_vllm=True.")
        elif self.vllm_mode == "colocate" and self.vllm_max_model_length is not None:
            # One token at least, if max_prompt_length keeps all rows
            needed = (self.max_prompt_length or 1) + self.max_completion_length  # type: ignore[operator]
            if self.vllm_max_model_length < needed:
                raise ValueError(
                    f"vllm_max_model_length={self.vllm_max_model_length} is less than max_prompt_length={self.max_prompt_length} and "
                    f"max_completion_length={self.max_completion_length} together, so vLLM would cut rollouts short. Set it to {needed}, or "
                    "lower the other two."
                )

    def _check_choices(self) -> None:
        for name, choices in (
            ("instruction_role", get_args(InstructionRole)),
            ("teacher_model_kind", get_args(TeacherModelKind)),
            ("loss_normalization", get_args(LossNormalization)),
        ):
            if (value := getattr(self, name)) not in choices:
                raise ValueError(f"{name}={value!r} is unknown. Choose one of {', '.join(map(repr, choices))}.")
        # Also false for NaN
        if not 0 < self.loss_temperature < math.inf:
            raise ValueError(
                f"loss_temperature={self.loss_temperature} must be a number above 0: the logits of the loss are divided by it. "
                "The paper's is 1."
            )
        if not 0 < self.temperature < math.inf:
            raise ValueError(
                f"temperature={self.temperature} must be a number above 0: the logits of the rollouts are divided by it. The "
                "paper's is 1."
            )
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must be from 0 to 1. The paper's is 1, the reverse KL.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1, which samples from all tokens.")
        if self.max_prompt_length is not None and self.max_prompt_length < 1:
            raise ValueError(
                f"max_prompt_length={self.max_prompt_length} would drop every row. Give a number of tokens of at least "
                "1, or None to keep all."
            )

    def _check_instruction(self) -> None:
        if not isinstance(self.instruction, str):
            raise ValueError(
                f"instruction={self.instruction!r} is not a text. Give a name from the catalogue, the text itself or the path of "
                "a .txt file. If both models should get the same prompt, give ''."
            )
        # A YAML block ends in a line break, which does not follow the sentence in a user's text
        self.instruction_replaces = (self.instruction_replaces or "").strip() or None
        if not self.instruction.strip():
            if self.instruction_role != "user":
                self._warn(f"instruction_role={self.instruction_role!r} has no effect with instruction=''.")
            if self.instruction_replaces not in (None, DAPO_OPENING_SENTENCE):
                self._warn(f"instruction_replaces={self.instruction_replaces!r} has no effect with instruction=''.")

    def _check_teacher_source(self) -> None:
        for name in ("teacher_model_name_or_path", "teacher_model_revision"):
            if (value := getattr(self, name)) is not None:
                raise ValueError(
                    f"{name}={value!r}: CRISP's teacher is the student itself with an instruction, so no teacher is loaded. "
                    "Leave it unset, or use trl.DistillationTrainer to learn from another model."
                )
        init_kwargs: dict[str, Any] = self.teacher_model_init_kwargs or {}  # type: ignore[assignment]
        if unknown := sorted(set(init_kwargs) - {"dtype"}):
            raise ValueError(
                f"teacher_model_init_kwargs has {', '.join(unknown)}: the teacher is a copy of the student, not loaded, "
                "so only 'dtype' has an effect. Remove the rest."
            )
        dtype = init_kwargs.get("dtype")
        if isinstance(dtype, str) and dtype != "auto" and not isinstance(getattr(torch, dtype, None), torch.dtype):
            raise ValueError(
                f"teacher_model_init_kwargs has dtype={dtype!r}, which is not a dtype of torch. Give 'bfloat16', 'float16', "
                "'float32', or 'auto' for the student's dtype."
            )
        if self.teacher_model_kind == "live":
            for name in ("teacher_model_init_kwargs", "teacher_offload"):
                if getattr(self, name):
                    self._warn(f"{name} has no effect with teacher_model_kind='live': no copy is made.")

    def _resolve_schedule(self) -> None:
        kind = self.teacher_model_kind
        if self.teacher_sync_steps is not None:
            if not self.teacher_sync_steps >= 1 or self.teacher_sync_steps % 1:
                raise ValueError(
                    f"teacher_sync_steps={self.teacher_sync_steps} must be a whole number of at least 1. For a teacher that is never "
                    "refreshed use teacher_model_kind='base'."
                )
            if kind in ("base", "live"):
                self._warn(f"teacher_sync_steps has no effect with teacher_model_kind={kind!r}.")
        elif kind in ("periodic", "ema"):
            self.teacher_sync_steps = PAPER_TEACHER_SYNC_STEPS if kind == "periodic" else 1

        if self.teacher_update_rate is not None:
            if not 0 < self.teacher_update_rate <= 1:
                raise ValueError(
                    f"teacher_update_rate={self.teacher_update_rate} must be above 0 and at most 1: it is the student's "
                    "share in the moving average."
                )
            if kind != "ema":
                self._warn(f"teacher_update_rate has no effect with teacher_model_kind={kind!r}, only with 'ema'.")
        elif kind == "ema":
            self.teacher_update_rate = 0.005

    @property
    def rollouts_per_step(self) -> int:
        """How many rows an optimizer step reads, on all processes: the global batch."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps * self.world_size

    @property
    def is_monitored(self) -> bool:
        """Whether agreement is measured."""
        return self.monitor_prompts is not None or self.monitor_file is not None

    def _check_monitor(self) -> None:
        if self.teacher_refresh_gate not in (None, *get_args(RefreshGate)):
            raise ValueError(
                f"teacher_refresh_gate={self.teacher_refresh_gate!r} is unknown. Set 'agreement', or leave it unset to refresh "
                "whenever that is due."
            )
        if self.monitor_grader not in get_args(MonitorGrader):
            raise ValueError(
                f"monitor_grader={self.monitor_grader!r} is unknown. Choose one of {', '.join(map(repr, get_args(MonitorGrader)))}."
            )
        if self.target_reduction is not None and not 0 < self.target_reduction < 1:
            raise ValueError(
                f"target_reduction={self.target_reduction} is a share of the base's tokens: give a number between 0 and 1, such as 0.5, or "
                "leave it unset."
            )
        if not self.is_monitored:
            if self.teacher_refresh_gate is not None:
                raise ValueError(
                    f"teacher_refresh_gate={self.teacher_refresh_gate!r} decides by the answers to monitor prompts, and there are none. Set "
                    "monitor_prompts, such as 128, or monitor_file."
                )
            defaults = CRISPConfig.__dataclass_fields__
            names = (
                *("monitor_samples", "monitor_base_samples", "monitor_max_new_tokens", "monitor_steps"),
                *("monitor_grader", "monitor_margin", "monitor_distance"),
            )
            if changed := [name for name in names if getattr(self, name) != defaults[name].default]:
                self._warn(f"{', '.join(changed)} has no effect without monitor_prompts or monitor_file.")
            return
        self._check_monitor_values()
        if self.teacher_refresh_gate is not None:
            self._check_gate()

    def _check_monitor_values(self) -> None:
        for name, example in _MONITOR_COUNTS.items():
            # The remainder of NaN and infinity is NaN
            if (value := getattr(self, name)) is not None and value % 1:
                raise ValueError(f"{name}={value} must be a whole number, such as {example}.")
        if self.monitor_prompts is not None and self.monitor_prompts < MIN_MONITOR_PROMPTS:
            raise ValueError(
                f"monitor_prompts={self.monitor_prompts}: the agreement on so few prompts says nothing. Give at least "
                f"{MIN_MONITOR_PROMPTS}, better 128, or leave it unset to measure nothing."
            )
        if self.monitor_samples < 2:
            raise ValueError(
                f"monitor_samples={self.monitor_samples}: a majority needs at least 2 answers to a prompt. Give 5, or more."
            )
        is_set = self.monitor_base_samples is not None
        if self.monitor_base_samples is None:
            self.monitor_base_samples = self.monitor_samples
        if self.monitor_base_samples < 2:
            raise ValueError(
                f"monitor_base_samples={self.monitor_base_samples}: a majority needs at least 2 answers to a prompt. Give 16, or leave it "
                "unset for as many as monitor_samples."
            )
        if self.monitor_base_samples < FEW_BASE_SAMPLES:
            self._warn(
                f"{'monitor_base_samples' if is_set else 'monitor_samples'}={self.monitor_base_samples}: of so few answers of the base its own level "
                "is wrong, so agreement says little. In the lab a healthy model seems to lose 7 points with 2, and to gain 3 with 3. Set "
                f"monitor_base_samples to 16, or to at least {FEW_BASE_SAMPLES}."
            )
        if self.monitor_max_new_tokens is None:
            self.monitor_max_new_tokens = self.max_completion_length
        if self.monitor_max_new_tokens < 1:  # type: ignore[operator]
            raise ValueError(
                f"monitor_max_new_tokens={self.monitor_max_new_tokens} must be at least 1. Leave it unset for max_completion_length."
            )
        if not 0 <= self.monitor_margin < 1:
            raise ValueError(
                f"monitor_margin={self.monitor_margin} is a share of all answers: give a number from 0 to below 1, such as 0.03 for three "
                "points."
            )
        if self.monitor_steps is None:
            has_steps = self.teacher_model_kind == "periodic"
            self.monitor_steps = self.teacher_sync_steps if has_steps else PAPER_TEACHER_SYNC_STEPS
        if self.monitor_steps < 1:  # type: ignore[operator]
            raise ValueError(f"monitor_steps={self.monitor_steps} must be at least 1.")

    def _check_gate(self) -> None:
        if self.teacher_model_kind != "periodic":
            raise ValueError(
                f"teacher_refresh_gate={self.teacher_refresh_gate!r} is for teacher_model_kind='periodic': a {self.teacher_model_kind!r} "
                "teacher has no refreshes to postpone. Leave one of the two out."
            )
        if self.teacher_sync_steps % self.monitor_steps:  # type: ignore[operator]
            raise ValueError(
                f"teacher_refresh_gate needs a measurement before each refresh: teacher_sync_steps={self.teacher_sync_steps} is not a "
                f"multiple of monitor_steps={self.monitor_steps}. Leave monitor_steps unset, or set a divisor."
            )

    def _warn_off_paper(self) -> None:
        global_batch_size = self.rollouts_per_step
        if global_batch_size != PAPER_GLOBAL_BATCH_SIZE:
            self._warn(
                f"The global batch is {global_batch_size} rollouts ({self.per_device_train_batch_size} per device x "
                f"{self.gradient_accumulation_steps} accumulation steps x {self.world_size} processes); the paper's is "
                f"{PAPER_GLOBAL_BATCH_SIZE}, and its learning rate and teacher_sync_steps were chosen for that."
            )
        kind, sync_steps = self.teacher_model_kind, self.teacher_sync_steps
        if kind == "live" or (kind == "periodic" and sync_steps == 1):
            self._warn(
                "The teacher follows the student at every step. In the paper this collapses (M = 1, Qwen3-8B: MATH-500 "
                "60.8 instead of 95.7, AIME 2024 6.7 instead of 76.2, and the responses grow)."
            )
        elif kind == "periodic" and sync_steps is not None and sync_steps < 10:
            self._warn(
                f"teacher_sync_steps={sync_steps} refreshes the teacher more often than the paper found safe (Qwen3-8B, "
                "AIME 2024: 76.2 before training, 49.6 with M = 10, 6.7 with M = 1)."
            )

    def _warn(self, message: str) -> None:
        if self.process_index == 0:
            # stacklevel 5 points at the caller of the dataclass's __init__
            warnings.warn(message, UserWarning, stacklevel=5)
