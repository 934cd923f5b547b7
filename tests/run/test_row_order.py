"""A later epoch's order follows from its number."""

import random
import warnings

import pytest
import torch
from transformers import TrainerCallback
from trl.trainer.utils import RepeatSampler

from tests.helpers import make_trainer, parameters_of, rows
from trl_crisp.run.row_order import EpochOrder


def order(epoch: int, shuffle: bool = True, seed: int = 3) -> list[int]:
    sampler = EpochOrder(RepeatSampler(list(range(12)), mini_repeat_count=1, batch_size=4, shuffle=shuffle, seed=seed))
    sampler.set_epoch(epoch)
    return list(sampler)


def test_each_epoch_has_its_own_order_whatever_came_before():
    assert sorted(order(0)) == sorted(order(1)) == list(range(12))
    assert order(0) != order(1)
    sampler = EpochOrder(RepeatSampler(list(range(12)), mini_repeat_count=1, batch_size=4, seed=3))
    for epoch in (0, 1, 2, 1):
        sampler.set_epoch(epoch)
        assert list(sampler) == order(epoch)
    assert len(sampler) == 12


def test_without_shuffling_the_order_is_the_datasets():
    assert order(0, shuffle=False) == order(5, shuffle=False) == list(range(12))


STREAM = {"max_steps": 8}
WORKERS = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "max_steps": 8}


@pytest.mark.parametrize(
    ("options", "saved_at_step"),
    # Of five steps a pass; a checkpoint inside the second pass, and one where the first ends
    [(STREAM, 7), (STREAM, 5), (WORKERS, 7), (WORKERS, 5)],
    ids=["stream-inside", "stream-end", "workers-inside", "workers-end"],
)
def test_a_run_resumes_in_its_second_pass(tmp_path, options, saved_at_step):
    def trainer(name: str):
        dataset = rows(10).to_iterable_dataset() if options is STREAM else rows(10)
        saving = {"save_strategy": "steps", "save_steps": saved_at_step}
        return make_trainer(tmp_path / name, dataset=dataset, per_device_train_batch_size=2, **saving, **options)

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / f"checkpoint-{saved_at_step}"))
    for name, value in parameters_of(whole.model).items():
        assert torch.equal(parameters_of(resumed.model)[name], value), name
    assert resumed.state.epoch == whole.state.epoch > 1


def test_a_stream_trains_and_is_evaluated_beside_persistent_workers(tmp_path):
    """TRL reads streams without workers, and torch refuses both settings then."""
    workers = {"dataloader_num_workers": 1, "dataloader_persistent_workers": True, "dataloader_prefetch_factor": 2}
    trainer = make_trainer(tmp_path, dataset=rows(10).to_iterable_dataset(), max_steps=1, **workers)
    trainer.train()
    assert trainer.state.global_step == 1
    mapped = make_trainer(tmp_path, max_steps=1, **workers)
    mapped.train()
    assert "eval_loss" in mapped.evaluate(rows(2).to_iterable_dataset())
    assert mapped.args.dataloader_persistent_workers


def test_rows_that_a_transform_draws_are_drawn_once_and_again_by_a_run_that_resumes(tmp_path):
    def trainer(**options):
        drawn = rows()
        drawn.set_transform(
            lambda batch: {
                "prompt": [[{"role": "user", "content": f"Add {random.random()}."}] for _ in batch["prompt"]]
            }
        )
        with pytest.warns(UserWarning, match=r"makes its rows on access \(set_transform .* applied once"):
            return make_trainer(tmp_path, dataset=drawn, **options)

    trainers = [trainer(), trainer()]
    prompts = [[row["prompt"] for row in one.train_dataset] for one in trainers]
    assert prompts[0] == prompts[1]
    assert prompts[0][0] != prompts[0][1]
    for row in trainers[0].train_dataset:
        # The pair of the same draw
        assert row["prompt"][0]["content"] in row["teacher_prompt"][0]["content"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*on access")
        make_trainer(tmp_path, dataset=rows().with_format("python"))


class StopFirstEpoch(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_epoch_stop = state.global_step == 1


def test_an_epoch_that_was_stopped_counts_as_it_was(tmp_path):
    def trainer(name: str):
        return make_trainer(
            tmp_path / name,
            dataset=rows(12),
            num_train_epochs=3,
            max_steps=-1,
            save_strategy="steps",
            save_steps=3,
            callbacks=[StopFirstEpoch()],
        )

    whole, resumed = trainer("whole"), trainer("resumed")
    whole.train()
    resumed.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-3"))
    assert resumed.state.global_step == whole.state.global_step == 7
    for name, value in parameters_of(whole.model).items():
        assert torch.equal(parameters_of(resumed.model)[name], value), name
