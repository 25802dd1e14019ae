"""Ranges, priors and statistics that NaN, infinity and constant batches must not spoil."""

import math

import pytest
import torch
from torch import nn

from cleave.architectures import Bottleneck, EntropyBottleneck, UniformQuantizer, recalibrate_batchnorm
from cleave.architectures.inserts.calibrating.calibration import METHODS, calibrate_range
from cleave.architectures.inserts.finite import NumberError, learned_names, not_finite
from cleave.deployment import CodecError, UniformCodec

SHARED = ("learned", "observed")
BROKEN = (math.nan, math.inf, -math.inf, 3e38)


def noise(seed=0, scale=1.0):
    return scale * torch.randn(8, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8, 16])
@pytest.mark.parametrize("constant", [0.0, 5.0, -3e4, 1e-12, 1e30])
@pytest.mark.parametrize("kind", SHARED)
def test_a_constant_batch_is_not_the_first(kind, constant, bits):
    quantizer, fresh = UniformQuantizer(bits, kind), UniformQuantizer(bits, kind)
    for _ in range(3):
        quantizer(torch.full((8, 16), constant))
    with pytest.raises(NumberError, match="everywhere: its encoder is dead"):
        quantizer.check_measured()
    quantizer(noise())
    fresh(noise())
    assert quantizer.fixed_range == fresh.fixed_range
    quantizer.check_measured()


@pytest.mark.parametrize("least", [1e-9, 1e-8])
def test_a_batch_narrower_than_a_step_is_constant(least):
    quantizer = UniformQuantizer(4, "learned")
    quantizer(noise(scale=least))
    quantizer(noise())
    assert quantizer.fixed_range == pytest.approx((noise().min().item(), noise().max().item()), rel=1e-5)


def test_a_learned_range_learns_after_a_dead_start():
    """The issue's own case: fed zeros and then noise, it stayed where it was for ever."""
    quantizer = UniformQuantizer(4, range="learned")
    quantizer(torch.zeros(8, 16))
    optimizer = torch.optim.SGD(quantizer.parameters(), lr=0.1)
    moved = torch.zeros(2)
    for step in range(50):
        optimizer.zero_grad()
        z = noise(step)
        loss = (quantizer(z) - z).square().mean()
        loss.backward()
        moved += torch.stack([parameter.grad.abs() for parameter in quantizer.parameters()])
        optimizer.step()
    assert (moved > 0).all()
    assert loss < 0.05


def test_all_but_one_dead_channel_give_a_range():
    z = torch.zeros(8, 16)
    z[:, 3] = noise()[:, 3]
    quantizer = UniformQuantizer(4, "learned")
    quantizer(z)
    assert quantizer.fixed_range == pytest.approx((z.min().item(), z.max().item()), rel=1e-5)


@pytest.mark.parametrize("constant", [0.0, 7.0])
@pytest.mark.parametrize("kind", SHARED)
def test_a_dead_encoder_may_recover(kind, constant):
    """While all is one value it passes, and so does its gradient."""
    quantizer = UniformQuantizer(4, kind)
    z = torch.full((8, 16), constant, requires_grad=True)
    out = quantizer(z)
    torch.testing.assert_close(out, z)
    out.sum().backward()
    assert torch.equal(z.grad, torch.ones_like(z))


@pytest.mark.parametrize("value", BROKEN)
@pytest.mark.parametrize("kind", SHARED)
@pytest.mark.parametrize("first", [True, False])
def test_a_batch_that_overflowed_moves_no_range(kind, value, first):
    quantizer, untouched = UniformQuantizer(4, kind), UniformQuantizer(4, kind)
    broken = noise(1)
    broken[2, 3] = value
    batches = [broken, noise(2), noise(3)] if first else [noise(2), broken, noise(3)]
    for batch in batches:
        quantizer(batch)
    for batch in (noise(2), noise(3)):
        untouched(batch)
    assert quantizer.fixed_range == untouched.fixed_range
    quantizer.check_measured()


def test_a_step_that_a_gradient_scaler_skips_moves_no_range():
    quantizer = UniformQuantizer(4, "observed")
    linear = nn.Linear(16, 16)
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**16)
    quantizer(linear(noise()))
    before, weight = quantizer.fixed_range, linear.weight.detach().clone()
    x = noise(1)
    x[0, 0] = math.inf
    scaler.scale((quantizer(linear(x)) * noise(2)).sum()).backward()
    scaler.step(optimizer)
    scaler.update()
    assert torch.equal(linear.weight, weight)
    assert quantizer.fixed_range == before


@pytest.mark.parametrize("kind", SHARED)
def test_a_range_that_diverged_is_named_with_its_layer(kind):
    bottleneck = Bottleneck(nn.Identity(), UniformQuantizer(4, kind), nn.Identity(), shape=(16,))
    bottleneck.place("layer1", [])
    bottleneck(noise())
    with torch.no_grad():
        bottleneck.quantizer.low.fill_(math.nan)
    for what in (bottleneck.check_measured, lambda: bottleneck.codec, lambda: bottleneck.send(noise())):
        with pytest.raises(NumberError, match=r"layer1: the range of the codes is \[nan, .*diverged"):
            what()


@pytest.mark.parametrize("quantizer", [UniformQuantizer(4, "sample"), UniformQuantizer(4, "observed")])
@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_representation_that_is_no_number_is_named_with_its_layer(quantizer, value):
    bottleneck = Bottleneck(nn.Identity(), quantizer, nn.Identity(), shape=(16,))
    bottleneck.place("layer1", [])
    bottleneck(noise())
    z = noise()
    z[1, 1] = value
    with pytest.raises(NumberError, match="layer1: the representation holds NaN or infinity: the network has diverged"):
        bottleneck.send(z)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [2.0, math.nan, math.inf, 3e38])
def test_calibration_says_what_happened_and_where(method, value):
    bottleneck = Bottleneck(nn.Identity(), UniformQuantizer(4, "sample"), nn.Identity(), shape=(16,))
    bottleneck.place("layer1", [])
    z = torch.full((8, 16), 2.0)
    z[0, 0] = value
    told = "layer1: the representation is 2 everywhere" if value == 2 else "layer1: the representation .*diverged"
    with pytest.raises(NumberError, match=told):
        bottleneck.calibrate([z], 4, method)
    with pytest.raises(NumberError):
        calibrate_range([z], 4, method)


def test_a_prior_that_diverged_is_named():
    bottleneck = Bottleneck(nn.Identity(), EntropyBottleneck(16, axis=-1), nn.Identity(), shape=(4, 16)).eval()
    bottleneck.place("layer2", [])
    with torch.no_grad():
        bottleneck.quantizer.biases[0][0] = math.nan
    bottleneck.train().eval()
    for what in (bottleneck.check_measured, lambda: bottleneck.codec):
        with pytest.raises(NumberError, match="layer2: the learned prior holds NaN or infinity.*diverged"):
            what()


def test_statistics_measured_again_must_be_finite():
    network = nn.Sequential(nn.BatchNorm1d(16))
    with pytest.raises(NumberError, match="BatchNorm statistic .* diverged"):
        recalibrate_batchnorm(network, network, [torch.full((8, 16), math.inf)])


@pytest.mark.parametrize("ends", [(-3e38, 3e38), (0.0, 3e38), (-2e38, 0.0)])
def test_a_range_that_float32_cannot_span_is_refused(ends):
    low, high = ends
    with pytest.raises(ValueError, match="at most"):
        UniformQuantizer(4).set_range(low, high)
    with pytest.raises(CodecError, match="within"):
        UniformCodec((2,), 4, low, high)


def test_what_learns_must_be_finite_and_a_mask_need_not():
    network = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2), UniformQuantizer(4))
    network.register_buffer("mask", torch.full((2,), -math.inf))
    state = network.state_dict()
    assert not_finite(state, learned_names(network)) == []
    state["1.running_var"][0], state["0.weight"][0, 0], state["2.high"] = math.nan, math.inf, torch.tensor(math.nan)
    assert set(not_finite(state, learned_names(network))) == {"0.weight", "1.running_var", "2.high"}
