from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DistributedSampler, TensorDataset

from cleave.datamodules.drawing import draw, mix, sample_seeds, stream_seed
from cleave.datamodules.sampling import EpochLoader, EpochSampler, ShardSampler, even_batch_size


def numbers(count: int) -> TensorDataset:
    return TensorDataset(torch.arange(count))


def epoch_keys(count: int, epoch: int, **options: int | bool) -> list[tuple[int, int]]:
    settings = {"seed": 0, "drop_last": False, **options}
    sampler = EpochSampler(numbers(count), **settings)
    sampler.set_epoch(epoch)
    return list(sampler)


def test_mix_is_the_published_splitmix64() -> None:
    # The first outputs of SplitMix64 seeded with 1234567, as Vigna's reference code prints them.
    golden = 0x9E3779B97F4A7C15
    states = np.array([(1234567 + step * golden) % 2**64 for step in range(3)], dtype=np.uint64)
    assert mix(states).tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]


def test_mix_keeps_distinct_values_distinct() -> None:
    assert len(np.unique(mix(np.arange(200_000, dtype=np.uint64)))) == 200_000


def test_seeds_do_not_collide_by_addition() -> None:
    keys = [(epoch, index) for epoch in range(20) for index in range(500)]
    seeds = np.concatenate([sample_seeds(seed, keys) for seed in range(5)])
    assert len(np.unique(seeds)) == 50_000
    assert stream_seed(1, 0) != stream_seed(0, 1)
    assert stream_seed(1, 23) != stream_seed(12, 3)


def test_seeds_depend_on_the_key_and_not_on_its_company() -> None:
    keys = [(3, 7), (0, 7), (3, 8)]
    assert sample_seeds(5, keys)[1:2] == sample_seeds(5, [(0, 7)])
    assert len(set(sample_seeds(5, keys).tolist())) == 3


def test_streams_of_a_sample_are_uniform_and_unrelated() -> None:
    seeds = sample_seeds(0, [(0, index) for index in range(20_000)])
    first, second = draw(seeds, 0) / 2**64, draw(seeds, 1) / 2**64
    assert abs(first.mean() - 0.5) < 0.01
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.02


def test_an_epoch_serves_every_image_once_in_another_order_each_time() -> None:
    first, second = epoch_keys(50, epoch=0), epoch_keys(50, epoch=1)
    assert sorted(first) == [(0, index) for index in range(50)]
    assert sorted(second) == [(1, index) for index in range(50)]
    assert [index for _, index in first] != [index for _, index in second]
    assert first == epoch_keys(50, epoch=0)
    assert first != epoch_keys(50, epoch=0, seed=1)


def test_seed_and_epoch_do_not_add_up() -> None:
    # torch's DistributedSampler seeds with seed + epoch: its epoch 1 of seed 0 is epoch 0 of seed 1.
    assert [i for _, i in epoch_keys(50, epoch=1, seed=0)] != [i for _, i in epoch_keys(50, epoch=0, seed=1)]


@pytest.mark.parametrize(("drop_last", "total"), [(True, 48), (False, 52)])
def test_ranks_share_an_epoch(drop_last: bool, total: int) -> None:
    shares = [epoch_keys(50, 2, num_replicas=4, rank=rank, drop_last=drop_last) for rank in range(4)]
    served = [index for share in shares for _, index in share]
    assert [len(share) for share in shares] == [total // 4] * 4
    assert len(set(served)) == min(total, 50)


def test_more_ranks_than_images_still_fill_every_rank() -> None:
    assert [len(epoch_keys(2, 0, num_replicas=5, rank=rank)) for rank in range(5)] == [1] * 5


def test_evaluation_shards_cover_every_image_once() -> None:
    shards = [ShardSampler(numbers(11), num_replicas=3, rank=rank) for rank in range(3)]
    assert sorted(index for shard in shards for index in shard) == list(range(11))
    assert [len(shard) for shard in shards] == [len(list(shard)) for shard in shards] == [4, 4, 3]


def test_lightning_replaces_neither_sampler() -> None:
    assert issubclass(EpochSampler, DistributedSampler)
    assert issubclass(ShardSampler, DistributedSampler)


@pytest.mark.parametrize("ranks", [2, 3, 8])
@pytest.mark.parametrize("batch_size", [1, 2, 7, 64])
def test_all_ranks_run_equally_many_evaluation_batches(ranks: int, batch_size: int) -> None:
    for length in range(ranks, 200):
        size = even_batch_size(length, ranks, batch_size)
        shares = [len(range(rank, length, ranks)) for rank in range(ranks)]
        assert len({-(-share // size) for share in shares}) == 1
        assert all((length // ranks) % smaller == 0 for smaller in range(batch_size, size))


class Keys(TensorDataset):
    """Returns the keys it is asked for."""

    def __getitem__(self, key: tuple[int, int]) -> tuple[int, int]:
        return key


def loader(batch_size: int = 4, epoch: int = 1, consumed: int = 0) -> EpochLoader:
    data = Keys(torch.arange(12))
    sampler = EpochSampler(data, seed=0, drop_last=True)
    sampler.set_epoch(epoch)
    return EpochLoader(
        data, sampler=sampler, batch_size=batch_size, collate_fn=list, progress=lambda: (epoch, consumed)
    )


def test_a_restored_loader_skips_once_what_was_consumed() -> None:
    resumed = loader(consumed=2)
    whole = list(loader())
    resumed.load_state_dict(resumed.state_dict())
    assert list(resumed) == whole[2:]
    assert len(resumed) == len(whole) == 3
    assert list(resumed) == whole


def test_a_restored_loader_takes_the_trainers_epoch() -> None:
    resumed = loader(epoch=4)
    resumed.load_state_dict(resumed.state_dict())
    resumed.sampler.set_epoch(5)
    assert list(resumed) == list(loader(epoch=4))


def test_a_loader_that_was_not_restored_ignores_the_trainers_position() -> None:
    # Batch-norm recalibration in the middle of an epoch asks for a loader of its own.
    assert list(loader(consumed=2)) == list(loader())


def test_iterating_is_lazy_so_that_the_epoch_may_be_set_later() -> None:
    late = loader(epoch=0)
    batches = iter(late)
    late.sampler.set_epoch(3)
    assert list(batches) == list(loader(epoch=3))


def test_resuming_inside_an_epoch_with_another_batch_size_is_refused() -> None:
    resumed = loader(batch_size=3, consumed=2)
    resumed.load_state_dict(loader(batch_size=4).state_dict())
    with pytest.raises(ValueError, match=r"'batch_size': 4.*'batch_size': 3"):
        next(iter(resumed))


def test_resuming_at_an_epochs_end_with_another_batch_size_is_fine() -> None:
    resumed = loader(batch_size=3, consumed=0)
    resumed.load_state_dict(loader(batch_size=4).state_dict())
    assert list(resumed) == list(loader(batch_size=3))
