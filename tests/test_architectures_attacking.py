"""Decoders of an adversary: shapes, where they begin, and how large they get."""

import pytest
import torch
from torch import nn

from cleave.architectures.attacking.decoders import FAMILIES, STRENGTHS, dense, inversion_decoder

SENT = {"maps": (4, 2, 2), "large maps": (3, 12, 10), "odd": (2, 3, 5), "vector": (7,), "tokens": (5, 6)}


@pytest.mark.parametrize("sent", SENT.values(), ids=SENT)
@pytest.mark.parametrize("strength", STRENGTHS)
@pytest.mark.parametrize("family", FAMILIES)
def test_each_decoder_begins_at_the_mean_image_and_learns_in_every_layer(family, strength, sent):
    torch.manual_seed(0)
    payloads, mean_image = torch.randn(6, *sent), torch.rand(2, 8, 9)
    decoder = inversion_decoder(family, strength, payloads, mean_image)
    torch.testing.assert_close(decoder.eval()(payloads), mean_image.expand(6, 2, 8, 9))
    optimizer = torch.optim.SGD(decoder.parameters(), lr=0.1)
    for _ in range(2):  # in the first step the last layer alone has a gradient
        optimizer.zero_grad()
        (decoder.train()(payloads) - torch.rand(6, 2, 8, 9)).square().sum().backward()
        optimizer.step()
    assert all(weight.grad is not None and weight.grad.abs().sum() > 0 for weight in decoder.parameters())


def test_payloads_are_standardised_and_what_never_changes_is_left_out():
    payloads = 1000 + 50 * torch.randn(200, 2, 4, 4)
    payloads[:, 1] = 3.0
    seen = []

    class Watch(nn.Module):
        def forward(self, x):
            seen.append(x)
            return torch.zeros(len(x), 1, 8, 8)

    decoder = inversion_decoder("conv", "small", payloads, torch.rand(1, 8, 8))
    decoder.network = Watch()
    decoder(payloads)
    assert seen[0][:, 0].std().item() == pytest.approx(1, abs=0.01)
    assert seen[0].mean(0).abs().max() < 1e-4
    assert not seen[0][:, 1].any()


def test_images_are_clipped_in_evaluation_alone():
    decoder = inversion_decoder("linear", "large", torch.randn(4, 3), torch.zeros(1, 2, 2))
    decoder.network = nn.Sequential(nn.Linear(3, 4), nn.Unflatten(1, (1, 2, 2)))
    nn.init.constant_(decoder.network[0].bias, -5.0)
    assert (decoder.train()(torch.zeros(1, 3)) < 0).any()
    assert (decoder.eval()(torch.zeros(1, 3)) >= 0).all()


def test_a_linear_layer_that_would_be_too_large_is_narrow_in_the_middle():
    assert isinstance(dense(10, 20, 200), nn.Linear)
    narrow = dense(10, 20, 199)
    assert [tuple(layer.weight.shape) for layer in narrow] == [(6, 10), (20, 6)]
    assert sum(weight.numel() for name, weight in narrow.named_parameters() if name.endswith("weight")) <= 199


@pytest.mark.parametrize(
    ("family", "strength", "told"),
    [
        ("residul", "small", "family must be one of linear, conv, residual, got 'residul'.*Did you mean 'residual'"),
        ("conv", "huge", "strength must be one of small, medium, large, got 'huge'"),
    ],
)
def test_unknown_decoders_are_refused(family, strength, told):
    with pytest.raises(ValueError, match=told):
        inversion_decoder(family, strength, torch.randn(4, 3), torch.zeros(1, 2, 2))
