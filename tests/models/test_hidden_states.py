"""Rows that are moved to the left, so that attention needs no mask."""

import pytest
import torch

from tests.helpers import made_up_rollouts, make_trainer
from trl_crisp.models.hidden_states import backbone, left_aligned

pytestmark = pytest.mark.filterwarnings("ignore:The global batch is", "ignore:teacher_sync_steps=")


@pytest.mark.parametrize(
    ("ids", "mask", "multiple_of", "expected_ids", "expected_mask", "first"),
    [
        # Both sides, cut to the longest
        (
            [[0, 0, 1, 2, 0], [0, 3, 4, 5, 0]],
            [[0, 0, 1, 1, 0], [0, 1, 1, 1, 0]],
            None,
            [[1, 2, 0], [3, 4, 5]],
            None,
            [2, 1],
        ),
        ([[1, 2, 3]], [[1, 1, 1]], None, [[1, 2, 3]], None, [0]),
        ([[0, 0, 7]], [[0, 0, 1]], None, [[7]], None, [2]),
        # The width of a multiple; behind a row comes whatever was there
        ([[0, 1, 2, 3], [4, 5, 6, 0]], [[0, 1, 1, 1], [1, 1, 1, 0]], 4, [[1, 2, 3, 3], [4, 5, 6, 0]], None, [1, 0]),
        ([[0, 0, 0, 1], [0, 0, 2, 0]], [[0, 0, 0, 1], [0, 0, 1, 0]], 2, [[1, 1], [2, 0]], None, [3, 2]),
        # A zero between tokens is no padding, and stays
        ([[0, 1, 9, 2, 0]], [[0, 1, 0, 1, 0]], None, [[1, 9, 2]], [[1, 0, 1]], [1]),
    ],
)
def test_rows_begin_with_their_first_token(ids, mask, multiple_of, expected_ids, expected_mask, first):
    ids, mask, first_B = left_aligned(torch.tensor(ids), torch.tensor(mask), multiple_of)
    assert ids.tolist() == expected_ids
    assert mask.tolist() == (expected_mask or torch.ones_like(ids).tolist())
    assert first_B.tolist() == first


@pytest.mark.parametrize("kind", ["llama", "qwen3", "gemma"])
@pytest.mark.parametrize("multiple_of", [None, 8])
def test_ragged_rollouts_reach_attention_without_padding_in_the_mask(tmp_path, kind, multiple_of):
    """Both models; each pass is as wide as its longest row."""
    trainer = make_trainer(tmp_path, kind, pad_to_multiple_of=multiple_of)
    batch, plain = made_up_rollouts(trainer.model.config.vocab_size, [9, 2, 5, 1])
    if multiple_of is not None:
        for key, value in batch.items():
            side = (-value.size(1) % multiple_of, 0) if "prompt" in key else (0, -value.size(1) % multiple_of)
            batch[key] = torch.nn.functional.pad(value, side)
    seen = []

    def record(body, args, kwargs):
        seen.append((kwargs["input_ids"].size(1), bool(kwargs["attention_mask"].all())))

    with trainer.teacher.serving() as teacher:
        for model in (teacher, trainer.model):
            backbone(model).register_forward_pre_hook(record, with_kwargs=True)
    trainer.model.train()
    trainer.compute_loss(trainer.model, batch | {"num_items_in_batch": torch.tensor(4)})
    longest = [
        max(len(prompt) + len(own) for prompt, own in zip(plain[side], plain["completions"], strict=True))
        for side in ("teachers", "students")
    ]
    step = multiple_of or 1
    assert seen == [(-(-width // step) * step, True) for width in longest]
