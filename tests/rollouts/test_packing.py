"""Rollouts sorted by length and trimmed: what a micro-batch holds, how many tokens that computes, and what it trains."""

import itertools
import random

import numpy as np
import pytest
import torch
from trl.trainer.utils import shuffle_sequence_dict, split_tensor_dict

from tests.distributed.runs import CraftedTrainer, Run, full_weights, make_trainer
from tests.helpers import make_trainer as make_plain_trainer
from tests.helpers import rows
from trl_crisp.rollouts.packing import padded_length, sort_and_trim

PAD = 999


def padded(sequences: list[list[int]], side: str, value: int, multiple: int = 1) -> torch.Tensor:
    """Pad as TRL does, in loops."""
    width = max(len(sequence) for sequence in sequences)
    while width % multiple:
        width += 1
    fill = [[value] * (width - len(sequence)) for sequence in sequences]
    return torch.tensor([f + s if side == "left" else s + f for s, f in zip(sequences, fill, strict=True)])


def drawn_rollouts(count: int, seed: int, longest: int = 20) -> list[dict[str, list[int]]]:
    """Rollouts whose parts all have lengths of their own, and ids that occur once."""
    draw, ids = random.Random(seed), itertools.count()

    def sequence() -> list[int]:
        return [1000 + next(ids) for _ in range(draw.randint(1, longest))]

    rollouts = [{"prompt": sequence(), "teacher_prompt": sequence(), "completion": sequence()} for _ in range(count)]
    return [row | {"tool": [draw.randint(0, 1) for _ in row["completion"]]} for row in rollouts]


def as_trl_splits(rollouts, count: int, multiple: int = 1) -> list[dict]:
    """The micro-batches that TRL makes of a step's rollouts, with more tensors than it has itself."""
    step = {}
    for part, side in (("prompt", "left"), ("teacher_prompt", "left"), ("completion", "right")):
        step[f"{part}_ids"] = padded([row[part] for row in rollouts], side, PAD, multiple)
        step[f"{part}_mask"] = padded([[1] * len(row[part]) for row in rollouts], side, 0, multiple)
    step["tool_mask"] = padded([row["tool"] for row in rollouts], "right", 1, multiple)
    step["own_per_token"] = step["completion_ids"][:, :, None].float() + torch.tensor([0.25, 0.5])
    step["own_per_row"] = step["completion_ids"][:, 0]
    step["num_items_in_batch"] = torch.tensor(len(rollouts))
    step["nothing"] = None
    return split_tensor_dict(shuffle_sequence_dict(step), count)


def rollouts_of(batch) -> list[dict[str, list[int]]]:
    """Undo the padding, with a loop over each row."""
    found = []
    for i in range(len(batch["completion_ids"])):
        row = {}
        for part in ("prompt", "teacher_prompt", "completion"):
            ids, mask = batch[f"{part}_ids"][i].tolist(), batch[f"{part}_mask"][i].tolist()
            row[part] = [token for token, is_token in zip(ids, mask, strict=True) if is_token]
            assert all(token == PAD for token, is_token in zip(ids, mask, strict=True) if not is_token)
        row["tool"] = batch["tool_mask"][i].tolist()[: len(row["completion"])]
        # They went with their row
        assert batch["own_per_row"][i] == row["completion"][0]
        assert batch["own_per_token"][i, : len(row["completion"]), 1].tolist() == [t + 0.5 for t in row["completion"]]
        found.append(row)
    return found


def computed_tokens(rows: list[dict[str, list[int]]], multiple: int = 1) -> int:
    """What the two models compute of each row of a micro-batch, in loops: as much as of its longest."""
    total = 0
    for prompt in ("prompt", "teacher_prompt"):
        longest = max(len(row[prompt]) + len(row["completion"]) for row in rows)
        while longest % multiple:
            longest += 1
        total += longest
    return total


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "split", "multiple"), [(12, 6, 1), (12, 3, 1), (8, 4, 8), (6, 6, 1), (9, 3, 4)])
def test_the_same_rollouts_in_as_many_micro_batches_each_as_wide_as_its_longest(count, split, multiple, seed):
    rollouts = drawn_rollouts(count, seed)
    given = as_trl_splits(rollouts, split, multiple)
    before = torch.get_rng_state()
    packed = sort_and_trim(given, multiple if multiple > 1 else None)
    assert torch.equal(torch.get_rng_state(), before), "a draw would change the rollouts that follow"
    assert len(packed) == split
    everything, computed = [], []
    for batch in packed:
        assert list(batch) == list(given[0])
        assert batch["num_items_in_batch"] == count
        assert batch["nothing"] is None
        inside = rollouts_of(batch)
        assert len(inside) == count // split
        everything += inside
        width = {}
        for part in ("prompt", "teacher_prompt", "completion"):
            longest = max(len(row[part]) for row in inside)
            width[part] = next(w for w in range(longest, longest + multiple) if w % multiple == 0)
            assert batch[f"{part}_ids"].shape == batch[f"{part}_mask"].shape == (count // split, width[part])
        assert batch["tool_mask"].shape == batch["completion_ids"].shape == batch["own_per_token"].shape[:2]
        computed.append(computed_tokens(inside, multiple))
    assert sorted(computed, reverse=True) == computed, "the one with the most tokens does not come first"
    assert sorted(everything, key=str) == sorted(rollouts, key=str)
    as_given = sum(computed_tokens(rollouts_of(batch), multiple) for batch in given)
    assert sum(computed) <= as_given, "more tokens than without sorting"


@pytest.mark.parametrize("ragged", ["prompt", "completion"])
@pytest.mark.parametrize("seed", range(3))
def test_pairs_compute_the_fewest_tokens_that_any_pairing_does(ragged, seed):
    """Of six rollouts that differ in one part, by trying all pairings."""
    rollouts = drawn_rollouts(6, seed)
    for row in rollouts:
        for part in {"prompt", "teacher_prompt", "completion"} - {ragged}:
            row[part] = (row[part] * 4)[:4]
        row["tool"] = [1] * len(row["completion"])
    packed = sort_and_trim(as_trl_splits(rollouts, 3))
    lengths = [len(row[ragged]) for row in rollouts]
    fewest = min(
        sum(2 * max(lengths[a], lengths[b]) for a, b in zip(order[::2], order[1::2], strict=True))
        for order in itertools.permutations(range(6))
    )
    assert sum(batch[f"{ragged}_ids"].numel() for batch in packed) == fewest


def test_nothing_to_trim_leaves_every_bit_and_the_order():
    rollouts = drawn_rollouts(8, seed=0)
    for row in rollouts:
        for part in ("prompt", "teacher_prompt", "completion", "tool"):
            row[part] = (row[part] * 5)[:5]
    given = as_trl_splits(rollouts, 4)
    for batch, same in zip(sort_and_trim(given), given, strict=True):
        for key, value in same.items():
            assert value is batch[key] is None or torch.equal(batch[key], value), key


def test_one_micro_batch_is_returned_as_it_is():
    given = as_trl_splits(drawn_rollouts(8, seed=0), 1)
    assert sort_and_trim(given) is given


def test_rollouts_without_a_token_keep_one_column():
    """A width of 0 would make `[:, -0:]` the whole row."""
    batch = {
        "prompt_ids": torch.tensor([[1, 2], [1, 2], [1, 2]]),
        "prompt_mask": torch.ones(3, 2, dtype=torch.long),
        "completion_ids": torch.tensor([[PAD, PAD], [5, 6], [PAD, PAD]]),
        "completion_mask": torch.tensor([[0, 0], [1, 1], [0, 0]]),
    }
    packed = sort_and_trim(split_tensor_dict(batch, 3), None)
    assert [one["completion_ids"].tolist() for one in packed] == [[[5, 6]], [[PAD]], [[PAD]]]


def test_a_zero_among_the_tokens_is_no_padding():
    batch = {
        "prompt_ids": torch.tensor([[PAD, 1, 2, 3], [PAD, 4, 5, 6]]),
        "prompt_mask": torch.tensor([[0, 1, 0, 1], [0, 1, 1, 1]]),
        "completion_ids": torch.tensor([[1, 2, 3, PAD], [7, PAD, PAD, PAD]]),
        "completion_mask": torch.tensor([[1, 0, 1, 0], [1, 0, 0, 0]]),
    }
    first, second = sort_and_trim(split_tensor_dict(batch, 2))
    assert first["prompt_mask"].tolist() == [[1, 0, 1]]
    assert first["completion_mask"].tolist() == [[1, 0, 1]]
    assert second["completion_ids"].tolist() == [[7]]


# What a step computes


@pytest.mark.parametrize(
    ("mean", "cap", "sigma", "today", "trimmed", "sorted_"),
    [(200, 512, 0.8, 2.71, 1.39, 1.04), (4000, 8192, 0.69, 2.21, 1.33, 1.03), (1500, 8192, 0.93, 4.22, 1.47, 1.07)],
)
def test_tokens_computed_to_tokens_real(mean, cap, sigma, today, trimmed, sorted_):
    """Of 32 rollouts with log-normal lengths in micro-batches of 2, the mean of 400 draws."""
    draw = np.random.default_rng(0)
    ratios = []
    for _ in range(400):
        lengths = np.clip(np.rint(draw.lognormal(np.log(mean) - sigma**2 / 2, sigma, 32)), 1, cap).astype(int).tolist()

        def computed(order):
            return sum(2 * padded_length(order[i : i + 2]) for i in range(0, 32, 2))

        parts = (32 * padded_length(lengths), computed(lengths), computed(sorted(lengths)))
        ratios.append([part / sum(lengths) for part in parts])
    assert np.mean(ratios, axis=0) == pytest.approx([today, trimmed, sorted_], rel=0.02)


@pytest.mark.parametrize(
    ("lengths", "multiple", "width"), [([3, 7], None, 7), ([3, 7], 4, 8), ([8], 4, 8), ([0], 4, 4)]
)
def test_padded_length(lengths, multiple, width):
    assert padded_length(lengths, multiple) == width


@pytest.mark.parametrize("teacher_has_more", [(40, 41), (0, 80)], ids=["one instruction", "instructions of their own"])
@pytest.mark.parametrize("prompts", [(60, 61), (30, 90), (100, 500), (100, 1000)], ids=str)
def test_tokens_that_a_packed_step_computes(prompts, teacher_has_more):
    """Of both models' inputs to their real tokens: completions as above (mean 200), prompts of even spread, 20 draws."""
    draw = np.random.default_rng(1)
    computed = real = 0
    for _ in range(20):
        completion_lengths = np.clip(np.rint(draw.lognormal(np.log(200) - 0.32, 0.8, 32)), 1, 512).astype(int)
        rollouts = [
            {"prompt": [1] * p, "teacher_prompt": [1] * (p + more), "completion": [1] * n, "tool": [1] * n}
            for p, more, n in zip(
                draw.integers(*prompts, 32), draw.integers(*teacher_has_more, 32), completion_lengths, strict=True
            )
        ]
        for batch in sort_and_trim(as_trl_splits(rollouts, 16)):
            read = [batch[f"{part}_mask"].sum(1) for part in ("prompt", "teacher_prompt", "completion")]
            computed += sum(2 * int((prompt + read[2]).max()) for prompt in read[:2])
        real += sum(len(row["prompt"]) + len(row["teacher_prompt"]) + 2 * len(row["completion"]) for row in rollouts)
    assert 1 < computed / real < (1.05 if teacher_has_more == (40, 41) else 1.08)


# What a run trains


class ToolTrainer(CraftedTrainer):
    """Crafted rollouts, in which a tool wrote every third token, and one that is a tool's from end to end."""

    def _generate(self, prompts):
        prompt_ids, completion_ids, tool_mask, images, tool_images = super()._generate(prompts)
        tool_mask = [[is_own * int(t % 3 != 1) for t, is_own in enumerate(row)] for row in tool_mask]
        return prompt_ids, completion_ids, tool_mask, images, tool_images


def trained(path, run: Run, monkeypatch, today: bool = False, multiple: int | None = None, checkpoint=None):
    """Train with the rollouts as TRL splits them, or packed; returns what it did to the weights, logs, and the shapes and computed tokens of the inputs."""
    if today:
        monkeypatch.setattr("trl_crisp.trainer.sort_and_trim", lambda micro_batches, _: micro_batches)
    monkeypatch.setattr("tests.distributed.runs.CraftedTrainer", ToolTrainer)
    trainer = make_trainer(run, path)
    trainer.pad_to_multiple_of = multiple
    shapes, computed = [], []
    compute = trainer._compute_loss

    def recorded(model, inputs, num_items):
        shapes.append({key: tuple(value.shape) for key, value in inputs.items()})
        read = [inputs[f"{part}_mask"].sum(1) for part in ("prompt", "teacher_prompt", "completion")]
        computed.append(sum(len(prompt) * int((prompt + read[2]).max()) for prompt in read[:2]))
        return compute(model, inputs, num_items)

    trainer._compute_loss = recorded
    before = full_weights(trainer.model)
    trainer.train(resume_from_checkpoint=checkpoint)
    monkeypatch.undo()
    change = {name: weight - before[name] for name, weight in full_weights(trainer.model).items()}
    return change, [log for log in trainer.state.log_history if "loss" in log], shapes, computed


def without_times(log: dict) -> dict:
    return {key: value for key, value in log.items() if "time" not in key}


@pytest.mark.parametrize(
    ("normalization", "lora", "multiple"),
    [("sequence", False, None), ("token", False, 8), ("sequence", True, 8), ("token", True, None)],
)
@pytest.mark.parametrize(("batch", "accumulation"), [(8, 1), (4, 2), (2, 4)])
def test_a_run_trains_as_with_the_split_of_trl(
    tmp_path, monkeypatch, batch, accumulation, normalization, lora, multiple
):
    """Bit for bit without accumulation, to rounding with it; ragged prompts and rollouts, and tokens of a tool."""
    run = Run(batch=batch, accumulation=accumulation, normalization=normalization, lora=lora, steps=2)
    before, logs_before, shapes_before, computed_before = trained(
        tmp_path / "a", run, monkeypatch, today=True, multiple=multiple
    )
    after, logs, shapes, computed = trained(tmp_path / "b", run, monkeypatch, multiple=multiple)
    assert [log.keys() for log in logs] == [log.keys() for log in logs_before]
    assert len(shapes) == len(shapes_before) == 2 * accumulation
    if accumulation == 1:
        assert shapes == shapes_before
        assert list(map(without_times, logs)) == list(map(without_times, logs_before))
        assert all(torch.equal(after[name], change) for name, change in before.items())
        return
    assert sum(computed) < sum(computed_before)
    if multiple is not None:
        assert all(shape[1] % multiple == 0 for one in shapes for key, shape in one.items() if "ids" in key)
    for log, log_before in zip(logs, logs_before, strict=True):
        assert log["loss"] == pytest.approx(log_before["loss"], rel=1e-4)
        assert log["grad_norm"] == pytest.approx(log_before["grad_norm"], rel=1e-4)
        assert log["completions/mean_length"] == log_before["completions/mean_length"]
    for name, change in before.items():
        # The head is scaled by 64, and with it float32's rounding; that of the weights themselves is 2e-8
        torch.testing.assert_close(after[name], change, rtol=1e-4, atol=1e-4 * change.abs().max().item() + 2e-8)


@pytest.mark.parametrize("normalization", ["sequence", "token"])
def test_logged_values_per_token_do_not_depend_on_the_split(tmp_path, monkeypatch, normalization):
    """Micro-batches of short rollouts have fewer tokens, and the log averages over micro-batches."""
    logs = {
        accumulation: trained(
            tmp_path / str(accumulation),
            Run(batch=8 // accumulation, accumulation=accumulation, normalization=normalization),
            monkeypatch,
        )[1][0]
        for accumulation in (1, 2, 4, 8)
    }
    for accumulation in (2, 4, 8):
        for name in ("entropy", "reverse_kl", "teacher_entropy"):
            assert logs[accumulation][name] == pytest.approx(logs[1][name], rel=1e-4), (name, accumulation)


def test_a_step_without_a_token_in_the_loss_logs_what_one_micro_batch_does(tmp_path):
    """No mean is there, and none is made up."""

    def logs(batch, accumulation):
        trainer = make_plain_trainer(
            tmp_path, per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=1
        )
        trainer.get_loss_mask = lambda inputs: inputs["completion_mask"] * 0
        trainer.train()
        return without_times(next(log for log in trainer.state.log_history if "loss" in log))

    assert logs(2, 2).keys() == logs(4, 1).keys()
    assert "teacher_entropy" not in logs(2, 2)


def test_the_micro_batch_with_the_most_tokens_comes_first(tmp_path, monkeypatch):
    _, _, _, computed = trained(tmp_path, Run(batch=1, accumulation=8, steps=2), monkeypatch)
    for step in (computed[:8], computed[8:]):
        assert step == sorted(step, reverse=True)
        assert step[0] > step[-1]


def test_evaluation_is_left_alone(tmp_path, monkeypatch):
    def evaluated(today: bool):
        if today:
            monkeypatch.setattr("trl_crisp.trainer.sort_and_trim", lambda micro_batches, _: micro_batches)
        trainer = make_plain_trainer(
            tmp_path, eval_dataset=rows(6), gradient_accumulation_steps=2, per_device_eval_batch_size=3
        )
        inputs, compute = [], trainer._compute_loss

        def recorded(model, batch, num_items):
            inputs.append(batch)
            return compute(model, batch, num_items)

        trainer._compute_loss = recorded
        torch.manual_seed(0)
        metrics = trainer.evaluate()
        monkeypatch.undo()
        return inputs, {key: value for key, value in metrics.items() if "loss" in key}

    (inputs, metrics), (inputs_before, metrics_before) = evaluated(False), evaluated(True)
    assert metrics == metrics_before
    for batch, before in zip(inputs, inputs_before, strict=True):
        assert batch.keys() == before.keys()
        assert all(torch.equal(batch[key], before[key]) for key in batch)


@pytest.mark.parametrize("in_the_same_process", [False, True])
@pytest.mark.parametrize("stopped_in_micro_batch", [0, 1, 3])
def test_a_run_that_stops_inside_an_accumulation_resumes_as_the_uninterrupted_one(
    tmp_path, monkeypatch, stopped_in_micro_batch, in_the_same_process
):
    """From the checkpoint before that step: weights and logs, bit for bit. As in a notebook, also with the same trainer."""
    run = Run(batch=2, accumulation=4, steps=4, save_steps=2, teacher_sync_steps=2)
    monkeypatch.setattr("tests.distributed.runs.CraftedTrainer", ToolTrainer)
    whole, stopped = (make_trainer(run, tmp_path / name) for name in ("whole", "stopped"))
    whole.train()
    step = stopped.training_step

    def stops(*args):
        if stopped.state.global_step == 2 and stopped._step % 4 == stopped_in_micro_batch:
            raise KeyboardInterrupt
        return step(*args)

    stopped.training_step = stops
    with pytest.raises(KeyboardInterrupt):
        stopped.train()
    checkpoint = tmp_path / "stopped" / "checkpoint-2"
    assert {path.name for path in checkpoint.iterdir()} == {
        path.name for path in (tmp_path / "whole" / "checkpoint-2").iterdir()
    }
    if in_the_same_process:
        stopped.training_step = step
    else:
        stopped = make_trainer(run, tmp_path / "stopped")
    stopped.train(resume_from_checkpoint=str(checkpoint))
    for name, weight in full_weights(whole.model).items():
        assert torch.equal(full_weights(stopped.model)[name], weight), name
    logs = [[without_times(log) for log in trainer.state.log_history if "loss" in log] for trainer in (whole, stopped)]
    assert logs[0] == logs[1]
