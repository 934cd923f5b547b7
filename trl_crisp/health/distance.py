"""Measures during training how far the student's answers are from what the base gives when it is told to be concise.

Shape suffixes: B answers of a batch, T positions, N tokens of the answers, H hidden width, V vocabulary.
"""

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.utils import is_peft_model
from datasets import Dataset
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn

from trl_crisp.health.failures import measure_on_all
from trl_crisp.loss.divergence import logits_of, output_head
from trl_crisp.models.hidden_states import evaluation_mode, last_hidden_state

# Tokens whose logits exist at once. Ours: with 150,000 tokens of vocabulary they are 150 MB, and more are not faster
LOGIT_TOKENS = 256


class ConciseBaseDistance:
    """
    Measures the mean of log pi_student(y|x) - log pi_base(y|x, c) over the student's own sampled answers y, in nats per answer.

    x is the prompt, and (x, c) the teacher's prompt, with the instruction. The base has the weights that the run began with. Both
    probabilities are those of the whole distribution at the rollouts' temperature, without top_p and top_k.

    The base is not a model of its own: while it runs, the trained parameters have the values of the start. With LoRA these are the start's
    adapter, which is also kept on disk, because its initial values are random. In full fine-tuning they are in the CPU's memory, and during a
    measurement the student's are too. A resumed run has them from the model that it loads before the checkpoint.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`], with the weights that the run begins with.
        prompts: The token ids of each prompt, as the student has it.
        teacher_prompts: The token ids of each prompt, as the teacher has it ([`teacher_prompts_of`]).

    Raises:
        ValueError: If DeepSpeed ZeRO-3 or FSDP partitions the weights.
    """

    def __init__(
        self, trainer: Any, prompts: Sequence[Sequence[int]], teacher_prompts: Sequence[Sequence[int]]
    ) -> None:
        plugin = trainer.accelerator.state.deepspeed_plugin
        by = "FSDP" if trainer.is_fsdp_enabled else "DeepSpeed ZeRO-3" if plugin and plugin.zero_stage == 3 else None
        if by is not None:
            raise ValueError(
                f"monitor_distance: {by} partitions the weights, so those of the start cannot be put in their place. Use ZeRO-2 "
                "(examples/accelerate/zero2.yaml), or leave it unset."
            )
        self.trainer, self._prompts, self._teacher_prompts = trainer, prompts, teacher_prompts
        self._model: nn.Module = trainer.model
        self._start = self._trained_values()

    def begin_run(self, directory: Path) -> None:
        """
        Take the weights as they are now for the base's, at the start of a run.

        Args:
            directory: The start's adapter is written here.
        """
        self._start = self._trained_values()
        if is_peft_model(self._model) and self.trainer.is_world_process_zero():
            directory.mkdir(parents=True, exist_ok=True)
            values = {name: value.cpu().contiguous() for name, value in self._start.items()}
            save_file(values, adapter_path(directory, self.trainer.run_id))

    def check_resume(self, directory: Path, run_id: str | None) -> None:
        """
        Check that the start's adapter can be read.

        Args:
            directory: See [`begin_run`].
            run_id: Of the run to resume.

        Raises:
            FileNotFoundError: If it is not there.
            ValueError: If it is damaged.
        """
        self._read_start(directory, run_id)

    def resume_run(self, directory: Path) -> None:
        """Take the start's adapter for the base's; as [`check_resume`]."""
        self._start = self._read_start(directory, self.trainer.run_id)

    def _read_start(self, directory: Path, run_id: str | None) -> dict[str, torch.Tensor]:
        if not is_peft_model(self._model):
            return self._start
        path = adapter_path(directory, run_id)
        if not path.is_file():
            raise FileNotFoundError(
                f"{path}: monitor_distance measures from the weights that the run began with, and its first adapter is not there: the run began "
                "without monitor_distance, or in another output_dir. Put the file there, leave monitor_distance unset, or start again in "
                "another output_dir."
            )
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(
                f"{path}: monitor_distance measures from the weights that the run began with, and this file of its first adapter is damaged "
                f"({error}). Put the file back, leave monitor_distance unset, or start again in another output_dir."
            ) from error

    def measure(self, numbers: Sequence[int], answers: Sequence[Sequence[Sequence[int]]]) -> tuple[float, float]:
        """
        Return the distance of the student as it is now, and its standard error over prompts; both in nats per answer. All processes call it.

        The modes, the random numbers and the weights of the training do not change.

        Args:
            numbers: The numbers of at least two prompts.
            answers: The token ids of the answers to each of them, [prompts, answers], with as many answers to each.

        Raises:
            MeasurementError: If one of several processes fails.
        """
        accelerator = self.trainer.accelerator
        asked = [(number, answer) for number, own in zip(numbers, answers, strict=True) for answer in own]
        # Each process gets answers of all lengths
        order = sorted(range(len(asked)), key=lambda i: len(self._prompts[asked[i][0]]) + len(asked[i][1]))
        mine = order[accelerator.process_index :: accelerator.num_processes]
        own_answers = [asked[i][1] for i in mine]

        def measure_mine() -> list[tuple[int, float]]:
            student = self._log_probs([self._prompts[asked[i][0]] for i in mine], own_answers)
            with self._start_weights():
                base = self._log_probs([self._teacher_prompts[asked[i][0]] for i in mine], own_answers)
            return [(i, ours - bases) for i, ours, bases in zip(mine, student, base, strict=True)]

        found = measure_on_all(self.trainer, measure_mine)
        by_prompt = np.reshape([nats for _, nats in sorted(found)], (len(numbers), -1)).mean(axis=1)
        return float(by_prompt.mean()), float(by_prompt.std(ddof=1) / np.sqrt(len(numbers)))

    def _log_probs(self, prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]) -> list[float]:
        longest = max((len(prompt) + len(answer) for prompt, answer in zip(prompts, answers, strict=True)), default=0)
        device = self.trainer.accelerator.device
        # The context of autocast ends with each pass, because it keeps casts of the weights, which change between the passes.
        # Some kernels draw random numbers even if they do not use them
        with (
            evaluation_mode(self._model),
            self.trainer.accelerator.autocast(),
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            return answer_log_probs(
                self._model,
                prompts,
                answers,
                self.trainer.args.temperature,
                # As many as in a micro-batch of training, which also has gradients
                self.trainer.args.per_device_train_batch_size * longest,
            )

    def _trained_values(self) -> dict[str, torch.Tensor]:
        # An adapter is small. The weights of a whole model are not kept on the accelerator
        is_adapter = is_peft_model(self._model)
        return {
            name: parameter.detach().to(parameter.device if is_adapter else "cpu", copy=True)
            for name, parameter in self._model.named_parameters()
            if parameter.requires_grad
        }

    @contextmanager
    def _start_weights(self) -> Iterator[None]:
        own = self._trained_values()
        try:
            self._write(self._start)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]) -> None:
        parameters = dict(self._model.named_parameters())
        for name, value in values.items():
            parameters[name].copy_(value)


def adapter_path(directory: Path, run_id: str | None) -> Path:
    """Return where the first adapter of a run is kept, beside those of other runs."""
    return directory / f"start_adapter-{run_id}.safetensors"


@torch.no_grad()
def answer_log_probs(
    model: nn.Module,
    prompts: Sequence[Sequence[int]],
    answers: Sequence[Sequence[int]],
    temperature: float,
    tokens_at_once: int,
) -> list[float]:
    """
    Return the log-probability of each answer after its prompt, in nats, summed over its tokens in float64.

    Args:
        model: An unwrapped transformers model, or a PEFT model, in evaluation mode.
        prompts: The token ids of each answer's prompt.
        answers: The token ids of each answer, with the token that ended it. An empty one has 0 nats.
        temperature: The logits are divided by it.
        tokens_at_once: Tokens of a batch, with padding. A longer answer is a batch of its own.
    """
    device = model.get_input_embeddings().weight.device  # type: ignore[operator]
    # The last token predicts nothing
    sequences = [[*prompt, *answer[:-1]] for prompt, answer in zip(prompts, answers, strict=True)]
    log_probs = [0.0] * len(sequences)
    for batch in _batches([len(ids) for ids in sequences], tokens_at_once):
        width = max(len(sequences[i]) for i in batch)
        # Padding on the right changes neither the positions nor, in a causal model, the outputs
        ids_BT = torch.tensor([sequences[i] + [0] * (width - len(sequences[i])) for i in batch], device=device)
        mask_BT = torch.tensor(
            [[1] * len(sequences[i]) + [0] * (width - len(sequences[i])) for i in batch], device=device
        )
        hidden_BTH = last_hidden_state(model, ids_BT, mask_BT, pass_positions=False)
        head = output_head(model, hidden_BTH.dtype)
        starts = [len(prompts[i]) - 1 for i in batch]
        hidden_NH = torch.cat(
            [
                hidden_BTH[row, start : start + len(answers[i])]
                for row, (i, start) in enumerate(zip(batch, starts, strict=True))
            ]
        )
        ids_N = torch.tensor(
            [token for i in batch for token in answers[i]], dtype=torch.long, device=head.weight_VH.device
        )
        log_probs_N = []
        for hidden_part_NH, ids_part_N in zip(
            hidden_NH.to(ids_N.device).split(LOGIT_TOKENS), ids_N.split(LOGIT_TOKENS), strict=True
        ):
            logits_NV = logits_of(hidden_part_NH[None], head)[0] / temperature
            log_probs_N.append(logits_NV.gather(1, ids_part_N[:, None])[:, 0] - logits_NV.logsumexp(dim=-1))
        for i, own_N in zip(batch, torch.cat(log_probs_N).split([len(answers[i]) for i in batch]), strict=True):
            log_probs[i] = own_N.double().sum().item()
    return log_probs


def _batches(lengths: Sequence[int], tokens_at_once: int) -> Iterator[list[int]]:
    """Yield the places of sequences of similar lengths, the longest first."""
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch and (len(batch) + 1) * lengths[batch[0]] > tokens_at_once:
            yield batch
            batch = []
        batch.append(i)
    if batch:
        yield batch


def teacher_prompts_of(trainer: Any, rows: Dataset) -> list[list[int]]:
    """
    Return the token ids of the teacher's prompt of each monitored row.

    Args:
        trainer: A [`~trl_crisp.CRISPTrainer`].
        rows: Training rows, or rows of `monitor_file` with `prompt` and optionally `teacher_prompt`.

    Raises:
        ValueError: If a row of the file has no valid pair of prompts, or if only the training rows have teacher prompts of their own.
    """
    if trainer.args.monitor_file is None:
        return list(rows["teacher_prompt_ids"])
    if trainer.prompt_report.given and "teacher_prompt" not in rows.column_names:
        raise ValueError(
            f"monitor_distance: the training rows have teacher prompts of their own, and monitor_file={trainer.args.monitor_file!r} has none, "
            "so the distance would be from another teacher's prompt. Add them to the file, or leave monitor_distance unset."
        )
    # No prompt is left out for its length: agreement is measured on all of them
    pairs = copy.copy(trainer.prompt_pairs)
    pairs.max_prompt_tokens = None
    try:
        paired, _ = pairs.select(rows, trainer.turn_tokens, "monitor")
    except ValueError as error:
        raise ValueError(f"monitor_file={trainer.args.monitor_file!r}: {error}") from error
    return list(paired["teacher_prompt_ids"])
