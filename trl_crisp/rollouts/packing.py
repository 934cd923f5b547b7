"""Sorts the rollouts of an optimizer step by length and trims each micro-batch to its own longest.

TRL pads the rollouts of a step to the longest of them and splits them at random. With lengths that differ as those of reasoning
models do, more than half of the tokens that student and teacher then compute are padding.

Shape suffixes: B rollouts, T positions.
"""

from collections.abc import Sequence
from typing import Any

import torch

# What a row consists of: the prefix of its keys, and whether it is padded on the left. Each model reads a prompt and the completion
_IS_LEFT_PADDED = {"prompt": True, "teacher_prompt": True, "completion": False}

Batch = dict[str, Any]


def sort_and_trim(micro_batches: list[Batch], pad_to_multiple_of: int | None = None) -> list[Batch]:
    """
    Return the same rollouts in as many micro-batches of the same size, with less padding.

    A model computes as many tokens of each row as the longest row has, prompt and completion together
    ([`~trl_crisp.models.hidden_states.left_aligned`]). So rollouts are sorted by what the student reads, and those of about one length
    by what the teacher reads. How large the steps of "about" are is chosen so that the fewest tokens are computed. Then the padding
    that no row of a micro-batch needs is cut off. The micro-batch with the most tokens comes first: if the memory is too small, this
    shows at once, the allocator can serve the later ones from the blocks of the first, and processes that wait for each other compute
    about as much at the same time.

    Args:
        micro_batches: The rollouts of one optimizer step on this process, as TRL has padded and split them. Prompts are padded on
            the left, [B, T], completions on the right. A tensor [B, T, ...] of any other name whose T is that of the completions is
            cut as they are. One micro-batch alone is padded to its own longest already, and is returned as it is.
        pad_to_multiple_of: Each width stays a multiple of it.

    Returns:
        Micro-batches with the same keys. Scalars are those of the step.
    """
    if len(micro_batches) == 1:
        return micro_batches
    step = {key: _joined([batch[key] for batch in micro_batches]) for key in micro_batches[0]}
    parts = [part for part in _IS_LEFT_PADDED if f"{part}_mask" in step]
    lengths = {part: _lengths_tokens(step[f"{part}_mask"], _IS_LEFT_PADDED[part]) for part in parts}
    completions = lengths["completion"]
    read = [[p + c for p, c in zip(lengths[part], completions, strict=True)] for part in parts if part != "completion"]
    count = len(completions)
    size = count // len(micro_batches)

    def widths_of(rows: Sequence[int]) -> dict[str, int]:
        return {part: padded_length([lengths[part][row] for row in rows], pad_to_multiple_of) for part in parts}

    def computed(rows: Sequence[int]) -> int:
        return sum(padded_length([model[row] for row in rows], pad_to_multiple_of) for model in read)

    # The order as it is first, so that it stays if no other computes fewer tokens
    orders = [list(range(count))]
    bins = _bin_sizes_tokens(max(read[0]))
    orders += [_sorted_rows(read[0], read[-1], completions, bin_tokens) for bin_tokens in bins]
    splits = [[order[start : start + size] for start in range(0, count, size)] for order in orders]
    best = min(splits, key=lambda split: sum(map(computed, split)))
    return [_take(step, rows, widths_of(rows)) for rows in sorted(best, key=computed, reverse=True)]


def padded_length(lengths_tokens: Sequence[int], multiple_of: int | None = None) -> int:
    """Return the width of a batch: its longest length, at least 1, rounded up to a multiple."""
    width = max([1, *lengths_tokens])
    return width if multiple_of is None else -(-width // multiple_of) * multiple_of


def _bin_sizes_tokens(longest_tokens: int) -> list[int]:
    sizes = [1]
    while sizes[-1] <= longest_tokens:
        sizes.append(2 * sizes[-1])
    return sizes


def _sorted_rows(
    student_tokens: list[int], teacher_tokens: list[int], completions_tokens: list[int], bin_tokens: int
) -> list[int]:
    # In turns by shorter and by longer ones of the teacher, so that rows at the border of two bins are alike. Of rows with the same
    # number of tokens the completion decides, so that few orders depend on TRL's shuffle
    def key(row: int) -> tuple[int, int, int]:
        index = student_tokens[row] // bin_tokens
        return index, teacher_tokens[row] if index % 2 else -teacher_tokens[row], completions_tokens[row]

    return sorted(range(len(student_tokens)), key=key)


def _joined(values: list[Any]) -> Any:
    if isinstance(values[0], list):
        return [one for value in values for one in value]
    is_per_row = isinstance(values[0], torch.Tensor) and values[0].ndim > 0
    return torch.cat(values) if is_per_row else values[0]


def _lengths_tokens(mask_BT: torch.Tensor, on_the_left: bool) -> list[int]:
    # Up to the outermost token, so that a zero among the tokens is no padding
    count, width = mask_BT.shape
    if width == 0:
        return [0] * count
    distance_T = torch.arange(1, width + 1, device=mask_BT.device)
    if on_the_left:
        distance_T = distance_T.flip(0)
    return ((mask_BT != 0) * distance_T).amax(dim=1).tolist()


def _take(step: Batch, rows: Sequence[int], widths: dict[str, int]) -> Batch:
    full_widths = {part: step[f"{part}_mask"].size(1) for part in widths}
    # One copy to the device, not one for each key
    devices = {value.device for value in step.values() if isinstance(value, torch.Tensor) and value.ndim}
    rows_on = {device: torch.tensor(rows, device=device) for device in devices}

    def take(key: str, value: Any) -> Any:
        if isinstance(value, list):
            return [value[row] for row in rows]
        if not isinstance(value, torch.Tensor) or value.ndim == 0:
            return value
        taken = value[rows_on[value.device]]
        for part, width in widths.items():
            if _IS_LEFT_PADDED[part] and key in (f"{part}_ids", f"{part}_mask"):
                return taken[:, full_widths[part] - width :]
        is_per_token = value.ndim > 1 and value.size(1) == full_widths["completion"]
        return taken[:, : widths["completion"]] if is_per_token else taken

    return {key: take(key, value) for key, value in step.items()}
