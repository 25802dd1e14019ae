from __future__ import annotations

from typing import Any

import pytest
import torch

from cleave.architectures import ExitHead


@pytest.mark.parametrize("pooling", ["average", "max", "mix"])
def test_a_head_pools_as_it_says(pooling: str) -> None:
    head = ExitHead((3, 4, 4), "NCHW", classes=5, pooling=pooling, grid=2, size=None, convs=0).eval()
    x = torch.randn(6, 3, 4, 4)
    cells = x.reshape(6, 3, 2, 2, 2, 2).permute(0, 1, 2, 4, 3, 5).reshape(6, 3, 2, 2, 4)
    average, maximum = cells.mean(-1).flatten(1), cells.amax(-1).flatten(1)
    expected = {"average": average, "max": maximum, "mix": 0.25 * maximum + 0.75 * average}[pooling]
    if pooling == "mix":
        head.pool.mix.data = torch.tensor(1 / 3).log()  # a sigmoid of 1/4
    torch.testing.assert_close(head(x), expected @ head.classifier.weight.T + head.classifier.bias)


def test_large_maps_are_averaged_down_before_anything_is_learned() -> None:
    head = ExitHead((3, 16, 16), "NCHW", classes=5, size=4, convs=2, width=7)
    assert head.reduce(torch.randn(2, 3, 16, 16)).shape == (2, 3, 4, 4)
    assert not list(head.reduce.parameters())
    assert head.hidden[0].weight.shape == (7, 3, 3, 3)
    assert head.hidden[3].weight.shape == (7, 7, 3, 3)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"pooling": "mean"}, "pooling must be one of average, max, mix, got 'mean'"),
        ({"convs": 3}, "convs must be 0, 1 or 2"),
        ({"convs": -1}, "convs must be a whole number of at least 0"),
        ({"grid": 0}, "grid must be a whole number of at least 1"),
        ({"size": 2.5}, "size must be a whole number of at least 1"),
        ({"width": True}, "width must be a whole number of at least 1"),
        ({"kernel": 2}, "kernel must be odd, got 2; use 1 or 3"),
        ({"kernel": 0}, "kernel must be a whole number of at least 1"),
        ({"layout": "other"}, "no exit fits the feature"),
    ],
)
def test_bad_arguments_are_named(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ExitHead(**({"shape": (3, 4, 4), "layout": "NCHW", "classes": 5} | settings))


def test_an_exit_of_a_cascade_needs_the_logits_before_it() -> None:
    head = ExitHead((3, 4, 4), "NCHW", classes=5, cascade=True)
    with pytest.raises(ValueError, match="reads the logits of the exit before it, got none"):
        head(torch.randn(2, 3, 4, 4))
    assert head(torch.randn(2, 3, 4, 4), torch.randn(2, 5)).shape == (2, 5)
