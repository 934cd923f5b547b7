"""CRISPTrainer: rollouts -> teacher's inputs -> loss. TRL's `DistillationTrainer` does the rest."""

import math
import textwrap
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, TypeAlias

import torch
from accelerate.utils import is_peft_model
from datasets import Dataset, IterableDataset
from peft import PeftConfig, PeftModel
from torch.utils.data import DataLoader
from transformers import (
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    ProcessorMixin,
    TrainerCallback,
)
from transformers.integrations import TrackioCallback
from transformers.trainer_utils import TrainOutput

from trl_crisp._upstream import pad
from trl_crisp.config import PAPER_LEARNING_RATE, CRISPConfig
from trl_crisp.loss.divergence import Diagnostic, OutputHead, gathered, output_head, sampled_topk_overlap
from trl_crisp.loss.kernel import fused_loss
from trl_crisp.loss.weighting import count_loss_items, loss_token_weights
from trl_crisp.models.adapter_checks import check_adapters_of
from trl_crisp.models.checks import check_config, needs_positions
from trl_crisp.models.hidden_states import evaluation_mode, has_dropout, last_hidden_state, left_aligned
from trl_crisp.models.origin import describe_origin
from trl_crisp.prompts.instructions import Prompt, looks_like_math, resolve_instruction, speaks_of_math
from trl_crisp.prompts.pairs import PromptPairs, PromptReport, check_columns, check_row
from trl_crisp.prompts.thinking import count_thinking_tokens, find_think_ids
from trl_crisp.publish.publishing import PublishingTrainer
from trl_crisp.rollouts.adapter_push import prepare_pushes
from trl_crisp.rollouts.engine_check import EngineCheck, Gap, engine_gap
from trl_crisp.rollouts.engine_limits import check_engine_limits
from trl_crisp.rollouts.own_sampling import own_sampling
from trl_crisp.rollouts.packing import sort_and_trim
from trl_crisp.rollouts.text_measures import epistemic_words, repeats_itself
from trl_crisp.rows.hub import cached_commit
from trl_crisp.run.identity import describe_run
from trl_crisp.run.precision import check_step_size
from trl_crisp.run.profile import StepProfile
from trl_crisp.teacher import Teacher, make_teacher

# The mean completion length of the first 5 steps is the baseline of `completions/relative_length`. Our choice: at the paper's
# batch these are 160 rollouts, which is enough for a mean, and the model has hardly changed by then.
BASELINE_STEPS = 5
# Number of prompts that decide whether the rows look like math. Our choice: enough to estimate a share, and quick to read.
SAMPLED_PROMPTS = 100

DatasetLike: TypeAlias = Dataset | IterableDataset


class CRISPTrainer(PublishingTrainer):
    """
    Trains a model to reason as concisely as it does under a conciseness instruction (CRISP, arXiv 2603.05433).

    What differs from [`~trl.DistillationTrainer`]:

    - The teacher is the model itself with the instruction in its prompt ([`~trl_crisp.teacher.Teacher`]), its weights
      refreshed from the student every `teacher_sync_steps`. With LoRA both share one base model.
    - The rollouts of a step are sorted by length, and each micro-batch is trimmed to its own longest
      ([`~trl_crisp.rollouts.packing.sort_and_trim`]). Values per token are logged as means over the step's tokens.
    - Student and teacher see the same completion token ids after different prompts, so each has its own inputs.
    - The loss is averaged over each rollout's tokens and then over rollouts (`loss_normalization`), and its softmax has its
      own temperature (`loss_temperature`).

    In addition to the parent's metrics it logs

    - `reverse_kl` and `teacher_entropy` (nats per token, at `loss_temperature`, like `entropy`), and `topk_overlap` (a share:
      [`~trl_crisp.loss.divergence.topk_overlap_of`]);
    - `teacher/age_steps`, `teacher/refreshes`, with a gate `teacher/postponed`, and `skipped_steps`;
    - `completions/relative_length` (relative to the mean of the first 5 steps) and `completions/p95_length` (tokens);
    - the shares `completions/repeats` ([`~trl_crisp.rollouts.text_measures.repeats_itself`]) and `completions/empty` (the first
      token ends the rollout), and `completions/epistemic_words` (words of doubt per 1,000 tokens);
    - if vLLM samples the rollouts, in the first steps and then now and then `vllm/mean_gap_nats` and `vllm/off_share`, how far its
      log-probabilities are from the student's ([`~trl_crisp.rollouts.engine_check.EngineCheck`]);
    - if the chat template has thinking tokens, `completions/mean_thinking_length` and `completions/mean_answer_length` (tokens).

    Args:
        model: A model, a PEFT model with a LoRA adapter, or the id or path of a model.
        args: A [`CRISPConfig`]. If `None`, one with the defaults.
        train_dataset: Rows with `prompt`, a string or a list of messages. If a row has a `teacher_prompt` of the same type, the
            teacher gets that prompt instead of the instruction.
        eval_dataset: Rows for the evaluation loss: one dataset, or a dict of datasets.
        processing_class: The tokenizer. If `None`, the model's own.
        callbacks, optimizers, quantization_config, peft_config, tools: As in the parent.

    Raises:
        ValueError: If the rows, the model, the adapter, the precision or the inputs (vision) would train something other than
            what was asked for. Each message says what to do.

    Example:

    ```python
    from datasets import load_dataset
    from trl_crisp import CRISPConfig, CRISPTrainer

    trainer = CRISPTrainer(
        model="Qwen/Qwen3-0.6B",
        args=CRISPConfig(output_dir="Qwen3-0.6B-CRISP", instruction="v2"),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    ```
    """

    _tag_names = ["trl", "crisp"]  # noqa: RUF012 (the parent's attribute)
    _name = "CRISP"
    _paper = {  # noqa: RUF012 (the parent's attribute)
        "title": "CRISP: Compressed Reasoning via Iterative Self-Policy Distillation",
        "id": "2603.05433",
        # docstyle-ignore
        "citation": textwrap.dedent("""\
            @article{sang2026crisp,
                title   = {{CRISP: Compressed Reasoning via Iterative Self-Policy Distillation}},
                author  = {Sang and Xu and Zhou and He and Wang and Sun},
                year    = 2026,
                journal = {arXiv preprint arXiv:2603.05433},
            }"""),
    }

    args: CRISPConfig
    prompt_pairs: PromptPairs
    # What was found in the training rows, and how many tokens at the end of each prompt open the model's turn
    prompt_report: PromptReport
    turn_tokens: int
    teacher: Teacher

    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        args: CRISPConfig | None = None,
        train_dataset: DatasetLike | None = None,
        eval_dataset: DatasetLike | dict[str, DatasetLike] | None = None,
        processing_class: PreTrainedTokenizerBase | ProcessorMixin | None = None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None] = (None, None),
        quantization_config: BitsAndBytesConfig | None = None,
        peft_config: PeftConfig | None = None,
        tools: list[Callable] | None = None,
    ) -> None:
        if args is None:
            name = model if isinstance(model, str) else model.config._name_or_path
            args = CRISPConfig(f"{name.rstrip('/').split('/')[-1] or 'model'}-CRISP")
        instruction = resolve_instruction(args.instruction)
        if train_dataset is None:
            raise ValueError("CRISPTrainer needs a `train_dataset` with a column 'prompt'. Pass the rows to train on.")
        eval_datasets = eval_dataset if isinstance(eval_dataset, dict) else {"eval": eval_dataset}
        for name, dataset in {"train": train_dataset, **eval_datasets}.items():
            if dataset is not None:
                check_columns(dataset, name)
        check_adapters_of(model, peft_config)
        if args.use_vllm:
            # The engine starts in the parent, which takes minutes
            check_engine_limits(
                model,
                args.model_init_kwargs,
                args.trust_remote_code,
                args.vllm_max_model_length if args.vllm_mode == "colocate" else None,
                args.max_prompt_length,
                args.max_completion_length,
            )

        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            processing_class=processing_class,
            callbacks=callbacks,
            optimizers=optimizers,
            quantization_config=quantization_config,
            peft_config=peft_config,
            tools=tools,
        )
        if self._is_vlm:
            raise ValueError(
                "the processing class is a vision processor: vision inputs are not supported, because the teacher's prompt "
                "would need its own image tokens and nobody has tried that. To train a model on text, pass its tokenizer "
                "as `processing_class`."
            )
        check_config(self.model)
        self._check_learning_rate()
        self.prompt_pairs = PromptPairs(
            instruction,
            args.instruction_replaces,
            args.instruction_role,  # type: ignore[arg-type]
            lambda prompts: self._tokenize_prompts(prompts)[0],
            args.max_prompt_length,
        )
        self._select_rows()
        init_kwargs: dict[str, Any] = args.model_init_kwargs or {}  # type: ignore[assignment]
        revision = cached_commit(self.model.config._name_or_path, init_kwargs.get("revision"))
        self.run_description = describe_run(self.model, args, instruction, revision)
        # Before the training, because a model's directory may go
        self.origin = describe_origin(self.model.config._name_or_path, revision, self.model.config.model_type)
        self.teacher = make_teacher(self.model, args, self.accelerator)
        self._engine_check: EngineCheck | None = None
        self._has_dropout = has_dropout(self.model)
        if self.use_vllm:
            prepare_pushes(self.vllm_generation, self.model)
            self._engine_check = self._make_engine_check()
        # Whether padded rows need position ids. One answer serves both models, because they have the same architecture
        self._passes_positions = self._check_model()

        # Set by the call that attaches what the config's monitor fields ask for
        self.is_watched = False
        self._baseline_lengths_tokens: list[float] = []
        # Mean entropies (student, teacher) of each micro-batch of the current optimizer step
        self._step_entropies_nats: list[tuple[float, float]] = []
        # Of the current step's micro-batches: loss tokens, over all processes, relative to their mean. `None` weighs all alike
        self._token_shares: list[float] | None = None
        # For the wrapped forward: the teacher's hidden states and head, if its pass came before
        self._teacher_output: tuple[torch.Tensor, OutputHead] | None = None
        # Filled inside the wrapped forward, which must not run a collective operation; compute_loss reads it afterwards
        self._diagnostics: dict[str, Diagnostic] | None = None
        self._engine_gap: Gap | None = None
        self._think_ids = find_think_ids(self._tokenizer, self.chat_template)
        if args.profile_steps:
            StepProfile(self)

    def _make_engine_check(self) -> EngineCheck | None:
        plugin = self.accelerator.state.deepspeed_plugin
        if self._has_dropout and plugin is not None and plugin.zero_stage == 3:
            warnings.warn(
                "vLLM's log-probabilities are not compared with the student's: the student has dropout, so it would have to run once more "
                "without it, which breaks the parameter trace of ZeRO-3. Use ZeRO-2 or FSDP2, or set the model's dropout to 0.",
                stacklevel=3,
            )
            return None
        return EngineCheck(self.vllm_generation)

    def _check_learning_rate(self) -> None:
        rate = self.args.learning_rate
        if self.optimizer is not None:
            rate = max(group["lr"] for group in self.optimizer.param_groups)
        # DeepSpeed and FSDP keep float32 masters of parameters of a lower precision
        if not (self.is_deepspeed_enabled or self.is_fsdp_enabled):
            check_step_size(self.model, rate)
        if is_peft_model(self.model) and 0 < rate <= PAPER_LEARNING_RATE:
            warnings.warn(
                f"learning_rate={rate} is the paper's value for full fine-tuning; a LoRA adapter hardly moves at it. Set one for "
                "LoRA, such as 1e-5 to 1e-4.",
                stacklevel=3,
            )

    def _check_model(self) -> bool:
        with self.teacher.serving() as teacher:
            return needs_positions(
                teacher,
                self.teacher.wrapped_model,
                self._forward_redirection,
                self._tokenizer.pad_token_id,
                self.accelerator,
            )

    def _select_rows(self) -> None:
        args = self.args
        first = next(iter(self.train_dataset), None)
        if first is None:
            raise ValueError("the train dataset is empty. Check its split and filters.")
        check_row(first, 0)
        self.turn_tokens = turn_tokens = self.prompt_pairs.count_turn_tokens(
            first["prompt"], self._tokenize_without_turn
        )
        self.train_dataset, report = self.prompt_pairs.select(self.train_dataset, turn_tokens)
        if isinstance(self.eval_dataset, dict):
            self.eval_dataset = {
                name: self.prompt_pairs.select(dataset, turn_tokens, name)[0]
                for name, dataset in self.eval_dataset.items()
            }
        elif self.eval_dataset is not None:
            self.eval_dataset, _ = self.prompt_pairs.select(self.eval_dataset, turn_tokens, "eval")

        self.prompt_report = report
        self.accelerator.print(f"CRISP: {report.describe(args.max_prompt_length)}")
        teacher_prompt, _ = self.prompt_pairs.teacher_prompt(first)
        (student_ids, teacher_ids), *_ = self._tokenize_prompts([first["prompt"], teacher_prompt])
        self.accelerator.print(
            "The first row, as each model reads it.\n"
            f"--- student ---\n{self._tokenizer.decode(student_ids)}\n"
            f"--- teacher ---\n{self._tokenizer.decode(teacher_ids)}\n---"
        )
        self._warn_of_other_tasks()
        # The default text is for DAPO's rows, and other rows rarely have it. A text that the user set should occur
        is_users = args.instruction_replaces not in (None, CRISPConfig.instruction_replaces)
        if report.rows and is_users and self.prompt_pairs.instruction and not report.replaced:
            warnings.warn(
                f"instruction_replaces={args.instruction_replaces!r} has no effect: no user text starts with it.",
                stacklevel=3,
            )

    def _warn_of_other_tasks(self) -> None:
        if not speaks_of_math(self.prompt_pairs.instruction) or not isinstance(self.train_dataset, Dataset):
            return
        prompts = self.train_dataset[:SAMPLED_PROMPTS]["prompt"]
        share = sum(map(looks_like_math, prompts)) / len(prompts)
        if share < 0.5:
            warnings.warn(
                f"instruction={self.args.instruction!r} speaks of a math problem, but only {share:.0%} of the first {len(prompts)} "
                "prompts look like one. Set instruction='general', or your own text.",
                stacklevel=4,
            )

    def _tokenize_without_turn(self, prompt: Prompt) -> list[int]:
        return self.processing_class.apply_chat_template(  # type: ignore[union-attr,return-value]
            prompt,
            tools=self.tools or None,
            chat_template=self.chat_template,
            add_generation_prompt=False,
            tokenize=True,
            return_dict=False,
            **self.chat_template_kwargs,
        )

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        columns: list[str] = self._signature_columns  # type: ignore[assignment]
        if "teacher_prompt_ids" not in columns:  # otherwise remove_unused_columns drops it
            columns.append("teacher_prompt_ids")

    def get_eval_dataloader(self, eval_dataset: "str | DatasetLike | None" = None) -> DataLoader:
        # Rows that the user passes to `evaluate` have no teacher prompts yet
        is_raw = isinstance(eval_dataset, Dataset | IterableDataset)
        if is_raw and "teacher_prompt_ids" not in (eval_dataset.column_names or []):
            check_columns(eval_dataset, "eval")
            eval_dataset, _ = self.prompt_pairs.select(eval_dataset, self.turn_tokens, "eval")
        if eval_dataset is None or isinstance(eval_dataset, str):
            return super().get_eval_dataloader(eval_dataset)
        # With persistent workers transformers keeps the first loader, and answers with it for any other rows
        kept = getattr(self, "_eval_dataloaders", {})
        self._eval_dataloaders: dict[str, DataLoader] = {}
        try:
            return super().get_eval_dataloader(eval_dataset)
        finally:
            self._eval_dataloaders = kept

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        # Trackio ends its run when training ends, but TRL writes to that run during every evaluation
        for callback in self.callback_handler.callbacks:
            if isinstance(callback, TrackioCallback) and not callback._initialized:
                callback.setup(self.args, self.state, self.model)
        return super().evaluation_loop(*args, **kwargs)

    def _prepare_inputs(self, generation_batch: Any) -> dict[str, Any]:
        if self.model.training and self._step % self.args.gradient_accumulation_steps == 0:
            # Before the rollout, because Algorithm 1 refreshes at the start of a step
            self.teacher.begin_step(self.state.global_step + 1)
            self._step_entropies_nats.clear()
        before = self._buffered_inputs
        inputs = super()._prepare_inputs(generation_batch)
        if self._buffered_inputs is not before:
            # The parent has padded, shuffled and split the rollouts of a new step
            self._buffered_inputs = sort_and_trim(self._buffered_inputs, self.pad_to_multiple_of)
            self._token_shares = self._count_token_shares(self._buffered_inputs)
            if self.teacher.is_offloaded:
                outputs = self._teacher_passes(self._buffered_inputs)
                for micro_batch, output in zip(self._buffered_inputs, outputs, strict=True):
                    micro_batch["teacher_output"] = output
            inputs = self._buffered_inputs[self._step % self.args.gradient_accumulation_steps]
        return inputs

    def _count_token_shares(self, micro_batches: list[dict[str, Any]]) -> list[float] | None:
        if len(micro_batches) == 1:
            return None
        counts = torch.stack([(self.get_loss_mask(inputs) != 0).sum() for inputs in micro_batches])
        counts = self.accelerator.reduce(counts, "sum")
        return (counts * len(counts) / counts.sum()).tolist() if counts.any() else None

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        if not (self.use_vllm and self.args.vllm_enable_sleep_mode):
            # A vLLM that sleeps needs the memory while it is awake
            self.teacher.fetch()
        check = self._engine_check if self.model.training else None
        is_compared = check is not None and check.is_due(self.state.global_step + 1)
        with own_sampling(self.model), check.recording() if is_compared else nullcontext() as recorded:
            output = super()._generate_and_score_completions(inputs)
        if recorded is not None and (log_probs := recorded.log_probs(output["completion_ids"])) is not None:
            output["engine_log_probs"] = log_probs
        teacher_ids = [torch.tensor(row["teacher_prompt_ids"]) for row in inputs]
        for key, rows, value in (
            ("teacher_prompt_ids", teacher_ids, self._tokenizer.pad_token_id),
            ("teacher_prompt_mask", [torch.ones_like(ids) for ids in teacher_ids], 0),
        ):
            output[key] = pad(
                rows, padding_value=value, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of
            ).to(self.accelerator.device)
        num_items = count_loss_items(self.get_loss_mask(output), self.args.loss_normalization)  # type: ignore[arg-type]
        output["num_items_in_batch"] = self.accelerator.gather(num_items).sum()
        self._record_rollouts(output)
        self._record_texts(output)
        return output

    def get_loss_mask(self, inputs: dict[str, Any]) -> torch.Tensor:
        """
        Return the loss mask of the completions, [B, T]: 1 for a token in the loss, else 0. A subclass may leave out more tokens.

        Args:
            inputs: The rollouts, including `completion_ids` and `completion_mask`, both [B, T].
        """
        # Tokens that a tool wrote are context for both models, but are not in the loss
        mask = inputs["completion_mask"]
        return mask * inputs["tool_mask"] if "tool_mask" in inputs else mask

    def _record_rollouts(self, output: dict[str, Any]) -> None:
        mode = "train" if self.model.training else "eval"
        metrics = self._metrics[mode]
        if mode == "train":
            metrics["teacher/age_steps"] = [self.teacher.age_steps]
            metrics["teacher/refreshes"] = [self.teacher.refreshes]
            if self.teacher.refresh_gate is not None:
                metrics["teacher/postponed"] = [self.teacher.postponed]
            metrics["skipped_steps"] = [self._nonfinite.skipped_steps]
            mean_length = metrics["completions/mean_length"][-1]
            if len(self._baseline_lengths_tokens) < BASELINE_STEPS:
                self._baseline_lengths_tokens.append(mean_length)
            baseline = sum(self._baseline_lengths_tokens) / len(self._baseline_lengths_tokens)
            metrics["completions/relative_length"].append(mean_length / baseline)
        if self._think_ids is None:
            return
        thinking, answer = [], []
        for prompt_ids, completion_ids, mask in zip(
            output["prompt_ids"].tolist(),
            output["completion_ids"].tolist(),
            self.get_loss_mask(output).tolist(),
            strict=True,
        ):
            thinking.append(count_thinking_tokens(prompt_ids, completion_ids, mask, self._think_ids))
            answer.append(sum(mask) - thinking[-1])
        for name, lengths in (("thinking", thinking), ("answer", answer)):
            lengths_B = torch.tensor(lengths, device=self.accelerator.device, dtype=torch.float32)
            metrics[f"completions/mean_{name}_length"].append(self.accelerator.gather(lengths_B).mean().item())

    def _record_texts(self, output: dict[str, Any]) -> None:
        # Not the loss mask, because a subclass may leave whole rollouts out of the loss
        own_BT = output["completion_mask"]
        if "tool_mask" in output:
            own_BT = own_BT * output["tool_mask"]
        own_ids = [
            [token for token, is_own in zip(ids, mask, strict=True) if is_own]
            for ids, mask in zip(output["completion_ids"].tolist(), own_BT.tolist(), strict=True)
        ]
        texts = self._tokenizer.batch_decode(own_ids, skip_special_tokens=True)
        measures = [
            (len(ids), repeats_itself(text), not ids or ids[0] in self.eos_token_ids, epistemic_words(text))
            for ids, text in zip(own_ids, texts, strict=True)
        ]
        # One gather for all four
        measures_B4 = torch.tensor(measures, device=self.accelerator.device, dtype=torch.float32)
        length_B, repeats_B, empty_B, words_B = self.accelerator.gather(measures_B4).unbind(dim=1)
        metrics = self._metrics["train" if self.model.training else "eval"]
        metrics["completions/p95_length"].append(length_B.quantile(0.95).item())
        metrics["completions/repeats"].append(repeats_B.mean().item())
        metrics["completions/empty"].append(empty_B.mean().item())
        metrics["completions/epistemic_words"].append(1000 * words_B.sum().item() / max(length_B.sum().item(), 1.0))

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        # Taken out of the inputs, which stay until the next step
        self._teacher_output = inputs.pop("teacher_output", None)
        loss = super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        assert self._diagnostics is not None
        means = self._means_over_processes(self._diagnostics)
        self._diagnostics = None
        metrics = self._metrics["train" if self.model.training else "eval"]
        if self._engine_gap is not None:
            self._judge_engine(self._engine_gap)
        if self.model.training and means["teacher_entropy"] is not None:
            self._step_entropies_nats.append((metrics["entropy"][-1], means["teacher_entropy"]))
            self._check_teacher_is_not_uniform()
        share = None
        if self.model.training and self._token_shares is not None:
            # The log averages over micro-batches, and those of short rollouts have fewer tokens
            share = self._token_shares[self._step % self.args.gradient_accumulation_steps]
            metrics["entropy"][-1] *= share
        for name, mean in means.items():
            if share is not None:
                metrics[name].append(mean * share if mean is not None else 0.0)
            elif mean is not None:
                metrics[name].append(mean)
        return loss

    def _judge_engine(self, gap: Gap) -> None:
        sums, self._engine_gap = self.accelerator.gather(torch.stack([x.double() for x in gap])[None]), None
        self._engine_check.add(*sums.sum(dim=0).tolist())
        micro_batches = self.args.gradient_accumulation_steps
        if self._step % micro_batches == micro_batches - 1:
            for name, value in self._engine_check.judge(self.state.global_step + 1).items():
                self._metrics["train"][name].append(value)

    def _means_over_processes(self, diagnostics: dict[str, Diagnostic]) -> dict[str, float | None]:
        # One gather for all, and one wait for the device
        sums_D2 = torch.stack([torch.stack(diagnostic).float() for diagnostic in diagnostics.values()])
        totals = self.accelerator.gather_for_metrics(sums_D2[None]).sum(dim=0).tolist()
        return {
            name: total / num_tokens if num_tokens else None
            for name, (total, num_tokens) in zip(diagnostics, totals, strict=True)
        }

    def _get_last_hidden_state(self, unwrapped_model, input_ids, attention_mask, logits_to_keep):
        ids_BW, mask_BW, first_B = left_aligned(input_ids, attention_mask, self.pad_to_multiple_of)
        hidden_BWH = last_hidden_state(unwrapped_model, ids_BW, mask_BW, self._passes_positions)
        # A completion token is predicted at the position before it. Padding behind a row may be cut off
        start_B = input_ids.size(1) - logits_to_keep - 1 - first_B
        index_BT = start_B[:, None] + torch.arange(logits_to_keep, device=first_B.device)
        index_BT = index_BT.clamp(max=ids_BW.size(1) - 1).to(hidden_BWH.device)
        return hidden_BWH[torch.arange(len(index_BT), device=index_BT.device)[:, None], index_BT]

    def _teacher_passes(self, micro_batches: list[dict[str, Any]]) -> list[tuple[torch.Tensor, OutputHead]]:
        """Return, for each micro-batch, the teacher's hidden states of the tokens in the loss, [N, H], and its head."""
        outputs = []
        # An autocast of its own, because autocast keeps the weights that it has converted, here without a gradient
        with torch.no_grad(), self.accelerator.autocast(), self.teacher.serving() as teacher:
            for inputs in micro_batches:
                teacher_inputs = _model_inputs(inputs, "teacher_prompt")
                if self.teacher.wrapped_model is None:
                    hidden_BTH = self._get_last_hidden_state(teacher, *teacher_inputs)
                else:
                    hidden_BTH = self._forward_redirection(
                        self.teacher.wrapped_model, teacher, self._get_last_hidden_state, teacher, *teacher_inputs
                    )
                tokens_N = _tokens_in_loss(self.get_loss_mask(inputs)).to(hidden_BTH.device)
                # A copy, so that those of the prompt and of the padding are freed
                hidden_NH = hidden_BTH.flatten(0, 1)[tokens_N]
                if torch.is_autocast_enabled(hidden_NH.device.type):
                    # As the loss will read them. A norm with float32 weights gives twice as much
                    hidden_NH = hidden_NH.to(torch.get_autocast_dtype(hidden_NH.device.type))
                outputs.append((hidden_NH, output_head(teacher, hidden_BTH.dtype)))
                del hidden_BTH
        return outputs

    def _compute_loss(self, unwrapped_student, inputs, num_items_in_batch):
        args = self.args
        loss_mask_BT = self.get_loss_mask(inputs)
        # Before the student's graph exists, so that the activations of the two passes are not in memory at once
        teacher_hidden_NH, teacher_head = self._teacher_output or self._teacher_passes([inputs])[0]
        self._teacher_output = None
        # The forward redirection bypasses the autocast that accelerate adds to the model's own forward
        with self.accelerator.autocast():
            student_hidden_BTH = self._get_last_hidden_state(unwrapped_student, *_model_inputs(inputs, "prompt"))
            student_head = output_head(unwrapped_student, student_hidden_BTH.dtype)
            # If a model is split across devices, its backbone may end on a different device than its head
            device = student_head.weight_VH.device
            loss_mask_BT = loss_mask_BT.to(device)
            # Indices and not a mask, because each use of a mask waits for the device
            tokens_N = _tokens_in_loss(loss_mask_BT)
            student_hidden_BTH = student_hidden_BTH.to(device)
            sides = (
                student_hidden_BTH.flatten(0, 1)[tokens_N],
                student_head,
                teacher_hidden_NH.to(device),
                teacher_head,
            )
            if num_items_in_batch is None:
                num_items_in_batch = count_loss_items(loss_mask_BT, args.loss_normalization).clamp(min=1)
            if "engine_log_probs" not in inputs:
                # The states of the prompt's last token and of the padding need not outlive the selection
                student_hidden_BTH = None
            weights_BT = loss_token_weights(loss_mask_BT, args.loss_normalization, num_items_in_batch)
            with gathered(student_head, teacher_head):
                loss, values = fused_loss(
                    *sides,
                    inputs["completion_ids"].to(device).flatten()[tokens_N],
                    weights_BT.flatten()[tokens_N],
                    args.beta,
                    args.loss_temperature,
                )
                topk_overlap = sampled_topk_overlap(*sides, args.loss_temperature)
                if "engine_log_probs" in inputs:
                    self._engine_gap = self._compare_engine(
                        unwrapped_student, inputs, student_hidden_BTH, student_head
                    )

        num_tokens = torch.full((), len(tokens_N), device=device)
        self._diagnostics = {
            "reverse_kl": Diagnostic(values.reverse_kl.sum(), num_tokens),
            "teacher_entropy": Diagnostic(values.teacher_entropy.sum(), num_tokens),
            "topk_overlap": topk_overlap,
        }
        return loss, values.student_entropy.sum(), num_tokens

    def _compare_engine(
        self, student: Any, inputs: dict[str, torch.Tensor], hidden_BTH: torch.Tensor, head: OutputHead
    ) -> Gap:
        if self._has_dropout:
            # The engine has none
            with torch.no_grad(), evaluation_mode(student):
                hidden_BTH = self._get_last_hidden_state(student, *_model_inputs(inputs, "prompt")).to(
                    hidden_BTH.device
                )
        ids_BT, log_probs_BT = (inputs[key].to(hidden_BTH.device) for key in ("completion_ids", "engine_log_probs"))
        return engine_gap(hidden_BTH, head, ids_BT, log_probs_BT, self._engine_check.sampling)

    def train(
        self,
        resume_from_checkpoint: str | bool | None = None,
        trial: Any = None,
        ignore_keys_for_eval: list[str] | None = None,
    ) -> TrainOutput:
        """
        Train, from the start or from a checkpoint; see [`~trl_crisp.run.resumable.ResumableTrainer.train`].

        Raises:
            ValueError: As in the parent, if there are fewer rows than a step needs, and if the config asks for measurements and none is attached.
        """
        watched = ("monitor_prompts", "monitor_file", "teacher_refresh_gate", "stop_at_sweet_spot", "target_reduction")
        unattached = [f"{name}={value!r}" for name in watched if (value := getattr(self.args, name))]
        if unattached and not self.is_watched:
            raise ValueError(
                f"{', '.join(unattached)}: nothing measures this trainer, so it has no effect. Call "
                "trl_crisp.health.attach.attach_health(trainer) before training."
            )
        if self._engine_check is not None:
            self._engine_check.begin_run()
        if self.use_vllm:
            # The parent updates vLLM if the step is another than at the last update, but a run may begin at that very step
            self._last_loaded_step = -1
        output = super().train(resume_from_checkpoint, trial, ignore_keys_for_eval)
        if self.state.global_step == 0 < self.state.max_steps:
            raise ValueError(
                f"the rows ended before the first step: of {self.prompt_report.rows} rows read, {self.prompt_report.dropped} were dropped "
                f"because a prompt has more than max_prompt_length={self.args.max_prompt_length} tokens, and a step needs "
                f"{self.args.train_batch_size * self.args.gradient_accumulation_steps * self.accelerator.num_processes} rows. "
                "Give more rows, a smaller batch, or a larger max_prompt_length."
            )
        return output

    # The teacher is part of a run's state, like the optimizer: every checkpoint that can be resumed contains it. It is loaded
    # after the student's weights

    def save_own_state(self, directory: str) -> dict[str, Any]:
        self.teacher.save(directory, write=self.args.should_save)
        return {"baseline_lengths_tokens": self._baseline_lengths_tokens}

    def start_own_state(self) -> None:
        self.teacher.begin_run()

    def load_own_state(self, directory: str, record: dict[str, Any]) -> None:
        self.teacher.load(directory, self.args.allow_changed_resume)
        self._baseline_lengths_tokens = record["baseline_lengths_tokens"]

    def _check_teacher_is_not_uniform(self) -> None:
        if len(self._step_entropies_nats) < self.args.gradient_accumulation_steps:
            return
        uniform_nats = math.log(self.model.config.get_text_config().vocab_size)
        students, teachers = (
            [entropy >= 0.99 * uniform_nats for entropy in side]
            for side in zip(*self._step_entropies_nats, strict=True)
        )
        if all(teachers) and not all(students):
            raise RuntimeError(
                f"the teacher's entropy was within 1% of that of a uniform distribution (ln V = {uniform_nats:.2f} nats) for "
                f"the whole of step {self.state.global_step + 1}, and the student's was not. The student cannot learn from such a "
                "teacher. Check that the teacher's weights are loaded and what else handles them (sleep mode, offload), and resume from "
                "the last checkpoint."
            )


def _model_inputs(inputs: dict[str, Any], prompt: str) -> tuple[torch.Tensor, torch.Tensor, int]:
    return (
        torch.cat([inputs[f"{prompt}_ids"], inputs["completion_ids"]], dim=1),
        torch.cat([inputs[f"{prompt}_mask"], inputs["completion_mask"]], dim=1),
        inputs["completion_ids"].size(1),
    )


def _tokens_in_loss(loss_mask_BT: torch.Tensor) -> torch.Tensor:
    """Return the places, [N], of the tokens in the loss in the flattened mask."""
    return loss_mask_BT.flatten().nonzero().squeeze(1)
