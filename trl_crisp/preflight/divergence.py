"""The reverse KL between the plain and the concise prompt on the plain prompt's own answers: what step 0 of training would log."""

from collections.abc import Callable, Sequence
from typing import Any

import torch

from trl_crisp.loss.divergence import output_head, per_token_divergence
from trl_crisp.models.hidden_states import evaluation_mode, last_hidden_state

# Ours: tokens of a batch, padding included. Only hidden states of so many are kept at once
_BATCH_TOKENS = 16_384


@torch.no_grad()
def mean_reverse_kl(
    model: Any,
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[Sequence[int]]],
    completions: Sequence[Sequence[int]],
    pass_positions: bool,
    on_rows: Callable[[int], None] = lambda done: None,
) -> list[float]:
    """
    Return KL(student || teacher) over the full vocabulary, for each kind of teacher prompt, in nats: the mean over all completion tokens.

    Student and teacher are the same weights, as at the first step of training, and the loss temperature is 1. If these completions are
    one micro-batch, the trainer's first logged `reverse_kl` is this number.

    Args:
        model: A causal language model of transformers.
        student_prompts: The token ids of each row's plain prompt.
        teacher_prompts: Those of its teacher prompts, [kinds][rows].
        completions: Those of the row's answer, including the eos token that ended it.
        pass_positions: See [`~trl_crisp.models.checks.needs_positions`].
        on_rows: Receives how many rows are done.
    """
    device = model.get_input_embeddings().weight.device
    totals = [0.0] * len(teacher_prompts)

    def hidden(prompts: list[Sequence[int]], answers: list[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
        ids, mask, answers_mask = _padded(prompts, answers)
        hidden_BTH = last_hidden_state(model, ids.to(device), mask.to(device), pass_positions)
        # The last position predicts a token after the answer
        return hidden_BTH[:, :-1][:, -answers_mask.shape[1] :], answers_mask.to(device)

    done = 0
    with evaluation_mode(model):
        for rows in _batches(student_prompts, teacher_prompts, completions):
            answers = [completions[row] for row in rows]
            student_BTH, mask_BT = hidden([student_prompts[row] for row in rows], answers)
            head = output_head(model, student_BTH.dtype)
            for kind, prompts in enumerate(teacher_prompts):
                teacher_BTH, _ = hidden([prompts[row] for row in rows], answers)
                sides = (student_BTH.to(head.weight_VH.device), head, teacher_BTH.to(head.weight_VH.device), head)
                divergence_BT, _ = per_token_divergence(*sides, mask_BT.to(head.weight_VH.device), 1.0, 1.0)
                totals[kind] += divergence_BT.double().sum().item()
            done += len(rows)
            on_rows(done)
    tokens = sum(map(len, completions))
    return [total / tokens for total in totals]


def _batches(
    student_prompts: Sequence[Sequence[int]],
    teacher_prompts: Sequence[Sequence[Sequence[int]]],
    completions: Sequence[Sequence[int]],
) -> list[list[int]]:
    """Return rows of similar length together."""
    lengths = [
        max(len(prompts[row]) for prompts in (student_prompts, *teacher_prompts)) + len(completions[row])
        for row in range(len(completions))
    ]
    batches: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda row: lengths[row]):
        # Rows come in order of length, so this one is the widest
        if not batches or (len(batches[-1]) + 1) * lengths[row] > _BATCH_TOKENS:
            batches.append([])
        batches[-1].append(row)
    return batches


def _padded(
    prompts: Sequence[Sequence[int]], answers: Sequence[Sequence[int]]
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return ids and mask of rows with the padding of a rollout (prompts on their left, answers on their right), and the answers' mask."""
    prompt_width, answer_width = max(map(len, prompts)), max(map(len, answers))
    # The id of the padding has no effect; 0 exists in every vocabulary
    ids = torch.zeros((len(prompts), prompt_width + answer_width), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, (prompt, answer) in enumerate(zip(prompts, answers, strict=True)):
        start = prompt_width - len(prompt)
        ids[row, start : prompt_width + len(answer)] = torch.tensor([*prompt, *answer])
        mask[row, start : prompt_width + len(answer)] = 1
    return ids, mask, mask[:, prompt_width:]
