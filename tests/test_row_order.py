"""A later epoch's order follows from its number."""

from trl.trainer.utils import RepeatSampler

from trl_crisp.row_order import EpochOrder


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


def test_without_shuffling_it_is_the_datasets():
    assert order(0, shuffle=False) == order(5, shuffle=False) == list(range(12))
