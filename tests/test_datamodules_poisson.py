"""Batches drawn at random as DP-SGD draws them, and parts of the training images."""

import math

import numpy as np
import pytest
import torch

from cleave.datamodules import Digits
from cleave.datamodules.contents import contents, contents_of
from cleave.datamodules.sampling import PoissonSampler
from cleave.datamodules.sources import ArraySource


def sampler(length=400, **settings):
    return PoissonSampler(range(length), **{"seed": 3, "batch_size": 20, "drop_last": True, **settings})


def test_each_image_is_drawn_with_the_same_probability_in_each_batch():
    drawn = sampler()
    counts, sizes = torch.zeros(400), []
    for epoch in range(60):
        drawn.set_epoch(epoch)
        for keys in drawn:
            assert {e for e, _ in keys} <= {epoch}
            sizes.append(len(keys))
            counts[[index for _, index in keys]] += 1
    batches = 60 * len(drawn)
    assert (drawn.rate, len(drawn), len(sizes)) == (0.05, 20, batches)
    rate = 0.05
    # Binomial: sizes have mean n·q and variance n·q·(1 − q); so do the counts of single images over all batches.
    assert abs(np.mean(sizes) - 20) < 4 * math.sqrt(400 * rate * (1 - rate) / batches)
    assert np.var(sizes) == pytest.approx(400 * rate * (1 - rate), rel=0.15)
    assert abs(counts - batches * rate).max() < 5 * math.sqrt(batches * rate * (1 - rate))
    assert counts.var().item() == pytest.approx(batches * rate * (1 - rate), rel=0.3)


def test_a_resumed_epoch_goes_on_with_the_batches_that_were_left():
    whole, rest = list(sampler()), sampler()
    rest.start = 7
    assert list(rest) == whole[7:]
    other = sampler()
    other.salt = "secret"
    assert list(other) != whole
    other.salt = ""
    assert list(other) == whole == [[(0, i) for i in other.batch(n)] for n in range(20)]


def test_batches_without_an_image_keep_their_parts():
    data = Digits(batch_size=2, sampling="poisson", drop_last=False)
    loader = data.train_dataloader()
    assert len(loader) == math.ceil(1259 / 2)
    batches = list(loader)
    empty = [batch for batch in batches if len(batch["labels"]) == 0]
    assert empty
    assert len(batches) == len(loader)
    assert empty[0]["images"].shape == (0, 1, 8, 8)
    assert {batch["images"].shape[1:] for batch in batches} == {(1, 8, 8)}


@pytest.mark.parametrize("workers", [0, 1])
def test_workers_serve_the_same_batches(workers):
    data = Digits(batch_size=400, sampling="poisson", num_workers=workers)
    labels = [batch["labels"].tolist() for batch in data.train_dataloader()]
    alone = Digits(batch_size=400, sampling="poisson").train_dataloader()
    assert labels == [batch["labels"].tolist() for batch in alone]


def test_batches_are_refused_that_cannot_be_drawn():
    with pytest.raises(ValueError, match=r"sampling must be one of shuffled, poisson, got 'uniform'"):
        Digits(sampling="uniform")
    with pytest.raises(ValueError, match=r"batch_size=2000 of 1259 training images"):
        Digits(batch_size=2000, sampling="poisson").train_dataloader()


def test_parts_are_even_disjoint_and_the_rest_is_what_they_leave():
    data = [Digits(part=f"{k}/3", augment="none") for k in (1, 2, 3)]
    sizes = [len(each.split("train")) for each in data]
    assert sizes == [420, 420, 419]
    whole = contents(Digits().sample_batch("train", 2000)["images"])
    found = [contents(each.sample_batch("train", 2000)["images"]) for each in data]
    assert sorted(found[0] + found[1] + found[2]) == sorted(whole)
    rest = contents(data[0].sample_batch("rest", 2000)["images"])
    assert sorted(rest) == sorted(found[1] + found[2])
    assert contents_of(data[0], "train") == set(found[0])
    labels = np.bincount(data[0].split("train").labels, minlength=10)
    assert labels.min() > 25  # random, not sorted by class


def test_another_seed_divides_otherwise_and_other_splits_stay():
    one, other = Digits(part="1/2"), Digits(part="1/2", part_seed=1)
    assert not np.array_equal(one.split("train").pixels, other.split("train").pixels)
    assert np.array_equal(one.split("test").pixels, Digits().split("test").pixels)
    again = Digits(part="1/2", seed=9)
    assert np.array_equal(one.split("train").pixels, again.split("train").pixels)


@pytest.mark.parametrize("part", ["0/2", "3/2", "1/1", "half", "1/2/3", 0.5])
def test_parts_that_are_none_are_refused(part):
    with pytest.raises(ValueError, match=r"part must be one of several even parts.*1/2.*got"):
        Digits(part=part)


def test_a_rest_needs_a_part_and_enough_images():
    with pytest.raises(ValueError, match=r"without part, such as part='1/2'"):
        Digits().sample_batch("rest", 5)
    from cleave.datamodules.parts import part_of

    few = ArraySource(np.zeros((2, 4, 4), np.uint8), [0, 1], "few")
    with pytest.raises(ValueError, match=r"part=1/3 divides 2 training images"):
        part_of(few, "1/3", 0)
