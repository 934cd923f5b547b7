"""Training runs of a few steps on tiny models, the same alone and as one of several processes."""

import re
import zlib
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl.distributed import DistributedBackend
from trl.generation.vllm_generation import VLLMGeneration

from tests.tiny_models import tiny_llama, tiny_tokenizer
from trl_crisp import CRISPConfig, CRISPTrainer
from trl_crisp.health.sweet_spot import Measurement, SweetSpot
from trl_crisp.rollouts.adapter_push import prepare_pushes

ROLLOUTS = 8
# The rollouts of these rows are a tool's from end to end: in the loss of none, and not counted
TOOL_ROWS = frozenset({3})
# Of the head: far from uniform, so that the gradients stand out of float32 rounding
SCALE = 64.0
LORA = {"r": 4, "lora_alpha": 8, "lora_dropout": 0.0, "target_modules": ["q_proj", "v_proj", "down_proj"]}


@dataclass(frozen=True)
class Run:
    """A run: how a global batch of 8 rollouts is split on one process, and what is trained."""

    batch: int = ROLLOUTS
    accumulation: int = 1
    normalization: str = "sequence"
    lora: bool = False
    kind: str = "periodic"
    teacher_sync_steps: int = 50
    steps: int = 1
    # Of SGD: a gradient that is wrong by a factor shows, which Adam would hide, and so would clipping of each run
    learning_rate: float = 0.1
    max_grad_norm: float = 0.0
    crafted: bool = True
    tool_rows: frozenset[int] = TOOL_ROWS
    # The process whose rollouts are all a tool's
    masked_rank: int | None = None
    optimizer: str = "sgd"
    # Steps between two checkpoints; 0 saves none
    save_steps: int = 0
    # A directory to load the student from; None makes it in memory
    model: str | None = None

    @property
    def works_under_zero3(self) -> bool:
        """Whether the teacher has modules of its own."""
        return not self.lora and self.kind != "live"


@dataclass
class Outcome:
    """What a run left. Parameters are by name, gathered where they are partitioned."""

    losses: list[float]
    # At each step: entropy, reverse_kl and teacher_entropy, in nats per token
    per_token: list[float]
    # The trained parameters' difference to those of the start
    change: dict[str, torch.Tensor]
    # At the end: the teacher's parameters, and those that the student had when the teacher was refreshed last
    teacher: dict[str, torch.Tensor]
    student_at_refresh: dict[str, torch.Tensor]
    refreshes: int
    # Of the random stream that the rollouts are sampled with, before the first
    random_state: torch.Tensor
    # How often ZeRO-3 gathered an output head for the loss and its backward, of each micro-batch
    head_gathers: list[int]
    # What vLLM would receive, by name
    pushed: dict[str, torch.Tensor]
    # The rows of the first step whose rollouts were a tool's, of all processes
    masked_rows: frozenset[int]


class CraftedTrainer(CRISPTrainer):
    """Rollouts that depend on the prompt alone: 1 to 12 tokens, and those of some rows, or of a process, from a tool."""

    tool_rows = TOOL_ROWS
    masked_rank: int | None = None
    masked_rows: frozenset[int] = frozenset()

    def _generate_single_turn(self, prompt_ids, *args, **kwargs):
        rollouts = []
        for ids in prompt_ids:
            generator = torch.Generator().manual_seed(zlib.crc32(bytes(str(ids), "ascii")))
            length = int(torch.randint(1, 13, (), generator=generator))
            rollouts.append(torch.randint(0, 256, (length,), generator=generator).tolist())
        return rollouts

    def _generate(self, prompts):
        prompt_ids, completion_ids, _, images, tool_images = super()._generate(prompts)
        numbers = [int(re.search(r"number (\d+)", prompt[0]["content"])[1]) for prompt in prompts]
        is_tools = [n in self.tool_rows or self.accelerator.process_index == self.masked_rank for n in numbers]
        tool_mask = [[int(not one)] * len(ids) for one, ids in zip(is_tools, completion_ids, strict=True)]
        if not self.masked_rows:
            masked = gather_object([n for n, one in zip(numbers, is_tools, strict=True) if one])
            self.masked_rows = frozenset(masked)
        return prompt_ids, completion_ids, tool_mask, images, tool_images


class StudentAtRefresh(TrainerCallback):
    """Keeps the student's weights as they are when a refresh is due: at the start of the step, after the last update."""

    def __init__(self) -> None:
        self.trainer: CRISPTrainer | None = None
        self.weights: dict[str, torch.Tensor] = {}

    def on_step_begin(self, args, state, control, **kwargs):
        assert self.trainer is not None
        if self.trainer.teacher.is_due(state.global_step + 1):
            self.weights = full_weights(self.trainer.teacher.student)


def rows() -> Dataset:
    """Return the prompts of one optimizer step."""
    return Dataset.from_list(
        [{"prompt": [{"role": "user", "content": f"Say {'so ' * i}number {i}."}]} for i in range(ROLLOUTS)]
    )


def make_trainer(run: Run, directory: str | Path) -> CRISPTrainer:
    """Make a run's trainer, with everything that is not the run's the same."""
    # Before the config, with which a launch under ZeRO-3 begins to partition every new model
    model = run.model or tiny_llama(scale=SCALE)
    args = CRISPConfig(
        str(directory),
        use_cpu=True,
        per_device_train_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulation,
        max_steps=run.steps,
        optim=run.optimizer,
        # Of AdamW: values whose gradient is rounding alone hardly move
        adam_epsilon=1e-6,
        learning_rate=run.learning_rate,
        weight_decay=0.0,
        max_grad_norm=run.max_grad_norm,
        instruction="Be brief.",
        loss_normalization=run.normalization,
        teacher_model_kind=run.kind,
        teacher_sync_steps=None if run.kind == "live" else run.teacher_sync_steps,
        max_completion_length=8,
        generation_kwargs={"do_sample": False, "temperature": None, "top_p": None, "top_k": None},
        gradient_checkpointing=False,
        bf16=False,
        logging_steps=1,
        save_strategy="steps" if run.save_steps else "no",
        save_steps=run.save_steps or 500,
        report_to="none",
        disable_tqdm=True,
        seed=0,
    )
    trainer_class = CraftedTrainer if run.crafted else CRISPTrainer
    at_refresh = StudentAtRefresh()
    trainer = trainer_class(
        model=model,
        args=args,
        train_dataset=rows(),
        processing_class=tiny_tokenizer(),
        peft_config=LoraConfig(**LORA) if run.lora else None,
        callbacks=[at_refresh],
    )
    at_refresh.trainer = trainer
    trainer.tool_rows, trainer.masked_rank = run.tool_rows, run.masked_rank
    return trainer


def train(run: Run, directory: str | Path, checkpoint: str | None = None) -> Outcome:
    """Train, from a checkpoint where there is one, and return what that did."""
    trainer = make_trainer(run, directory)
    random_state = torch.get_rng_state()
    student, teacher = trainer.model, trainer.teacher
    before = full_weights(student)
    with counted_head_gathers(trainer) as head_gathers:
        trainer.train(resume_from_checkpoint=checkpoint)
    after = full_weights(student)
    if run.lora:
        # Of one adapter and the other, under one name
        at_the_end = {name.replace(".teacher.", ".default."): w for name, w in after.items() if ".teacher." in name}
    else:
        at_the_end = full_weights(getattr(teacher, "_model", student))
    return Outcome(
        losses=[log["loss"] for log in trainer.state.log_history if "loss" in log],
        per_token=[
            log[name]
            for log in trainer.state.log_history
            for name in ("entropy", "reverse_kl", "teacher_entropy")
            if name in log
        ],
        change={name: after[name] - before[name] for name, p in student.named_parameters() if p.requires_grad},
        teacher=at_the_end,
        student_at_refresh=next(
            callback.weights
            for callback in trainer.callback_handler.callbacks
            if isinstance(callback, StudentAtRefresh)
        ),
        refreshes=teacher.refreshes,
        random_state=random_state,
        head_gathers=head_gathers,
        pushed=pushed_weights(student, trainer.accelerator),
        masked_rows=getattr(trainer, "masked_rows", frozenset()),
    )


def pushed_weights(student: torch.nn.Module, accelerator: Any) -> dict[str, torch.Tensor]:
    """Return what TRL would send to vLLM, by name. All processes call it."""
    generation = VLLMGeneration.__new__(VLLMGeneration)
    generation.model, generation.accelerator = student, accelerator
    generation._dist = DistributedBackend(accelerator)
    prepare_pushes(generation, student)
    return {name: tensor.detach().clone() for name, tensor in generation._iter_named_params()}


class BestIsTheFirst:
    """Measurements that are given: the first step is the shortest that holds."""

    margin, subject, every_steps, saves_held = 0.03, "agreement", 1, True

    def measurements(self, state):
        tokens = {1: 50, 2: 60, 3: 70}
        return [Measurement(s, n, 1 - n / 100, 0.0, 0.0) for s, n in tokens.items() if s <= state.global_step]

    def why_not(self, state):
        return None

    def is_due(self, step):
        return True


class WeightsBySteps(TrainerCallback):
    """Keeps the student's weights after each step."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.weights.append(full_weights(model))


def end_with_the_best(run: Run, directory: str | Path) -> list[dict[str, torch.Tensor]]:
    """Train with `stop_at_sweet_spot`, and return the student's weights after each step, and at the end."""
    trainer = make_trainer(run, directory)
    trainer.args.stop_at_sweet_spot = trainer.is_watched = True
    by_steps, spot = WeightsBySteps(), SweetSpot(trainer, BestIsTheFirst())
    trainer.add_callback(by_steps)
    trainer.add_callback(spot)
    trainer.train()
    assert spot.loaded_step == 1
    return [*by_steps.weights, full_weights(trainer.model)]


@contextmanager
def counted_head_gathers(trainer: CRISPTrainer):
    """Count into a list, one number for each micro-batch. Modules' own gathers, and those of generation and refreshes, are left out."""
    import deepspeed

    counts: list[int] = []
    is_counting = False
    original, compute_loss, backward = (
        deepspeed.zero.GatheredParameters,
        trainer.compute_loss,
        trainer.accelerator.backward,
    )
    head_shape = tuple(getattr(trainer.model.get_output_embeddings().weight, "ds_shape", ()))

    class Counting(original):
        def __init__(self, params, *args, **kwargs):
            super().__init__(params, *args, **kwargs)
            if is_counting:
                counts[-1] += sum(tuple(p.ds_shape) == head_shape for p in params)

    def counting(function, begins_micro_batch: bool):
        def call(*args, **kwargs):
            nonlocal is_counting
            if begins_micro_batch:
                counts.append(0)
            is_counting = True
            try:
                return function(*args, **kwargs)
            finally:
                is_counting = False

        return call

    deepspeed.zero.GatheredParameters = Counting
    trainer.compute_loss = counting(compute_loss, True)
    trainer.accelerator.backward = counting(backward, False)
    try:
        yield counts
    finally:
        deepspeed.zero.GatheredParameters = original


def full_weights(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Return copies of a model's parameters by name, gathered from the processes where they are partitioned."""
    weights = {}
    for name, parameter in model.named_parameters():
        with _gathered(parameter):
            weights[name] = parameter.detach().clone()
    return weights


@contextmanager
def _gathered(parameter: torch.nn.Parameter):
    if not hasattr(parameter, "ds_id"):
        yield
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters([parameter]):
        yield


# For two processes; alone, twice the batch makes the same global batch. On the same rollouts, whatever the weights
RECORDED_RUNS = {
    "full": Run(batch=2, accumulation=2),
    "full-token": Run(batch=2, accumulation=2, normalization="token"),
    "lora": Run(batch=2, accumulation=2, lora=True, teacher_sync_steps=1, steps=2),
    "lora-token": Run(batch=2, accumulation=2, normalization="token", lora=True, teacher_sync_steps=1, steps=2),
    "adamw": Run(batch=2, accumulation=2, optimizer="adamw_torch", learning_rate=1e-3),
    "ema": Run(batch=2, accumulation=2, kind="ema", teacher_sync_steps=1, steps=2),
    "live": Run(batch=2, accumulation=2, kind="live"),
    "masked": Run(batch=2, accumulation=2, masked_rank=1),
    "masked-token": Run(batch=2, accumulation=2, masked_rank=1, normalization="token"),
    "masked-lora": Run(batch=2, accumulation=2, masked_rank=1, lora=True),
}
# DeepSpeed takes longer to start each
ZERO_RUNS = {name: run for name, run in RECORDED_RUNS.items() if name not in ("masked-token", "masked-lora")}
# With clipping, because the gradients' norm is that of all processes
ZERO_RUN = Run(
    batch=2,
    accumulation=2,
    teacher_sync_steps=2,
    steps=3,
    learning_rate=1e-3,
    max_grad_norm=0.5,
    crafted=False,
)
# Saved after the refresh and before the last step
SAVING_RUN = replace(ZERO_RUN, save_steps=2)
# Four rollouts a step make two steps of an epoch: saved inside the second
_LATER_EPOCH_RUN = replace(ZERO_RUN, accumulation=1, steps=4, save_steps=3)
LATER_EPOCH_RUNS = {"full": _LATER_EPOCH_RUN, "lora": replace(_LATER_EPOCH_RUN, lora=True)}


def alone(run: Run) -> Run:
    """Return the run for one process that has the global batch of two."""
    return replace(run, batch=2 * run.batch)
