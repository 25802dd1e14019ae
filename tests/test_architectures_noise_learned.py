"""Noise whose size is learned, masks over channels, and representations that are drawn in inference too."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy import stats
from torch.nn import functional as F

from cleave.architectures import ChannelMask, Cloak, Shredder, split_network
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.datamodules import Digits
from cleave.deployment import Pipeline, load_bundle
from cleave.lightning_modules import CrossEntropy, Term
from cleave.losses import NoiseScaleLoss

from .training_helpers import bundle_outputs

SHAPE = (6, 5, 4)
pytestmark = pytest.mark.usefixtures("same_draws")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def made(noise, shape=SHAPE, **kwargs):
    noise.build(shape, **kwargs)
    return noise


def split(layer="layer1", **settings):
    torch.manual_seed(0)
    backbone = CifarResNet(8, in_channels=1)
    codec = {"bits": 8, "range": "sample"}
    return split_network(backbone, layer, torch.randn(2, 1, 8, 8), codec=codec, **settings)


def test_shredder_lays_a_learned_tensor_in_training():
    noise = made(Shredder(tensors=3, initial=2.0))
    z = drawn(3000, *SHAPE)
    torch.manual_seed(0)
    laid = (noise(z) - z) / noise.unit
    assert float(noise.unit) == pytest.approx(float(z.double().std(correction=0)), rel=1e-5)
    distances = (laid[:, None] - noise.noises).flatten(2).abs().amax(2)
    nearest, place = distances.min(1)
    assert nearest.max() < 1e-3
    assert stats.chisquare(np.bincount(place, minlength=3)).pvalue > 1e-4
    # They begin as Laplace numbers of the scale that was asked for.
    found = made(Shredder(tensors=200, initial=2.0)).noises.detach().double().flatten().numpy()
    assert stats.kstest(found, stats.laplace(scale=2).cdf).pvalue > 1e-4


def test_shredder_draws_new_numbers_in_the_learned_order():
    noise = made(Shredder(tensors=1, initial=1.0)).train()
    with torch.no_grad():
        noise.noises.mul_(3).add_(0.7)
    noise.observe(drawn(8, *SHAPE))
    noise.eval()
    torch.manual_seed(0)
    z = torch.zeros(400, *SHAPE)
    laid = (noise(z) / noise.unit).flatten(1).detach()
    learned = noise.noises.detach().flatten()
    expected = learned.argsort()
    assert all(torch.equal(each.argsort(), expected) for each in laid)
    assert not torch.equal(laid[0], laid[1])
    middle = learned.median()
    fitted = stats.laplace(float(middle), float((learned - middle).abs().mean()))
    assert stats.kstest(laid.double().flatten().numpy(), fitted.cdf).pvalue > 1e-4


def test_cloak_lays_noise_of_the_learned_scale():
    noise = made(Cloak(most=4.0, initial=0.5))
    with torch.no_grad():
        noise.rho.copy_(torch.linspace(-2, 2, noise.rho.numel()).reshape(SHAPE))
    z = 3 * drawn(4000, *SHAPE)
    torch.manual_seed(0)
    laid = ((noise(z) - z) / noise.unit).double().detach()
    sigma = 4 * (1 + noise.rho.double().tanh()) / 2
    off = laid.std(0) / sigma - 1
    assert off.abs().max() < 5 / np.sqrt(2 * 4000)
    torch.testing.assert_close(noise.magnitude(z).double(), sigma.expand(4000, *SHAPE))
    assert float(made(Cloak(most=4.0, initial=0.5)).magnitude(z).detach().mean()) == pytest.approx(0.5, rel=1e-5)


@pytest.mark.parametrize("noise", [Shredder(tensors=2), Cloak()])
def test_the_unit_is_the_spread_of_the_first_training_batch(noise):
    made(noise)
    with pytest.raises(ValueError, match="has seen no training batch yet"):
        noise.check_measured()
    noise.eval()(drawn(8, *SHAPE))
    assert noise.unit == 0
    noise.train()(2 * drawn(8, *SHAPE))
    before = noise.unit.clone()
    noise(50 * drawn(8, *SHAPE))
    assert torch.equal(noise.unit, before)
    noise.check_measured()


@pytest.mark.parametrize("measure", ["l1", "log"])
def test_the_reward_of_large_noise_is_its_formula_and_its_gradient(measure):
    for noise in (made(Shredder(tensors=3)), made(Cloak())):
        noise.double()
        loss = NoiseScaleLoss(measure)
        found = loss(noise.magnitude(torch.zeros(7, *SHAPE, dtype=torch.float64)))
        scale = noise.noises.abs().mean(0) if isinstance(noise, Shredder) else 2.5 * (1 + noise.rho.tanh())
        expected = -scale.sum() if measure == "l1" else -scale.log().mean()
        assert float(found.detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
        weight = next(noise.parameters())
        ours, theirs = torch.autograd.grad(found, weight)[0], torch.autograd.grad(expected, weight)[0]
        torch.testing.assert_close(ours, theirs)
        assert ours.abs().max() > 0


def test_the_reward_stops_at_its_target():
    scale = torch.full((2, 4), 0.5, requires_grad=True)
    (reached,) = torch.autograd.grad(NoiseScaleLoss("l1", target=0.5)(scale), scale)
    (short,) = torch.autograd.grad(NoiseScaleLoss("l1", target=0.51)(scale), scale)
    assert (reached == 0).all()
    assert (short < 0).all()
    assert NoiseScaleLoss("l1", target=0.1)(scale) == NoiseScaleLoss("l1")(scale)


@pytest.mark.parametrize(("shape", "axis"), [((6, 5, 4), 0), ((9, 6), -1), ((6,), -1)])
def test_a_mask_leaves_out_whole_channels_along_their_axis(shape, axis):
    mask = made(ChannelMask(0.5), shape, axis=axis)
    with torch.no_grad():
        mask.scores.copy_(torch.tensor([0.1, 0.5, -0.2, 0.3, 0.0, 0.9]))
    z = drawn(4, *shape) + 10
    found = mask(z).movedim(axis + 1 if axis >= 0 else axis, -1)
    kept = torch.tensor([False, True, False, True, False, True])
    assert (found[..., ~kept] == 0).all()
    assert torch.equal(found[..., kept], z.movedim(axis + 1 if axis >= 0 else axis, -1)[..., kept])
    assert (made(ChannelMask(0.0), shape, axis=axis)(z) == z).all()


def test_a_mask_learns_which_channels_serve():
    torch.manual_seed(0)
    mask = made(ChannelMask(0.75), (8,))
    optimizer = torch.optim.SGD(mask.parameters(), lr=0.1)
    for _ in range(60):
        z = torch.randn(64, 8)
        loss = F.mse_loss(mask(z)[:, 5] + 2 * mask(z)[:, 6], z[:, 5] + 2 * z[:, 6])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert mask.mask().detach().nonzero().flatten().tolist() == [5, 6]


@pytest.mark.parametrize("noise", [Shredder(tensors=3), Cloak(initial=0.3), ChannelMask(0.5), "sampled"])
def test_a_bundle_draws_as_the_network_does(noise, tmp_path):
    data = Digits(image_size=8)
    settings = {"bottleneck": {"variance": 0.5, "sampled": True}} if noise == "sampled" else {"noise": noise}
    network = split(**settings)
    network(torch.randn(32, 1, 8, 8))  # in train mode: the unit
    network.eval()
    bundle_outputs(network, data, tmp_path / "bundle")  # through the gate
    bundle = load_bundle(tmp_path / "bundle")
    bundle.self_test()
    names = {"Shredder": ["layer1.pick", "layer1.noise"], "Cloak": ["layer1.noise"], "ChannelMask": []}
    assert [each.name for each in bundle.manifest.draws] == names.get(type(noise).__name__, ["layer1.sample"])
    images = data.sample_batch("test", 1)["images"].expand(400, -1, -1, -1)
    with torch.no_grad():
        ours = network(data.input.normalize(images))
    theirs = Pipeline(bundle).run(images).outputs["logits"]
    if isinstance(noise, ChannelMask):
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        return
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4
    assert theirs.std(0).min() > 0


def test_only_the_noise_of_a_frozen_network_learns():
    network = split(noise=Shredder(tensors=2))
    reward = Term(NoiseScaleLoss(), of=["student/layer1/noise_scale"], weight=0.01)
    settings = {"loss": torch.nn.CrossEntropyLoss(), "train": ["noise", "quantizer"]}
    task = CrossEntropy(network, extra_terms={"noise": reward}, **settings)
    assert [name for name, weight in task.network.named_parameters() if weight.requires_grad] == [
        "at:layer1.bottleneck.noise.noises"
    ]


def test_what_is_drawn_in_inference_is_the_encoders_distribution():
    network = split(bottleneck={"variance": "learned", "sampled": True}).eval()
    x = torch.randn(1, 1, 8, 8).expand(3000, -1, -1, -1)
    torch.manual_seed(0)
    with torch.no_grad():
        found = network.outputs(x, ["layer1/z", "layer1/mean", "layer1/log_variance"])
    z, mean, spread = found["layer1/z"].double(), found["layer1/mean"][0], (0.5 * found["layer1/log_variance"][0]).exp()
    assert ((z.mean(0) - mean) / spread).abs().max() < 6 / np.sqrt(3000)
    assert (z.std(0) / spread - 1).abs().max() < 6 / np.sqrt(6000)
    plain = split(bottleneck={"variance": "learned"}).eval()
    with torch.no_grad():
        assert torch.equal(plain(x[:2])[0], plain(x[:2])[1])


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: Shredder(tensors=0), "tensors must be a whole number of at least 1, got 0"),
        (lambda: Shredder(initial=0), "initial must be a positive finite number, got 0"),
        (lambda: Cloak(most=-1), "most must be a positive finite number, got -1"),
        (lambda: Cloak(most=1, initial=1), "initial must lie between 0 and most=1, got 1"),
        (lambda: ChannelMask(1.0), "share must be at least 0 and below 1, got 1.0"),
        (lambda: NoiseScaleLoss("l2"), "measure must be l1 or log, got 'l2'"),
        (lambda: NoiseScaleLoss(target=0), "target must be a positive finite number, got 0"),
        (lambda: split(bottleneck={"sampled": True}), "sampled=True draws from a stochastic encoder; give variance"),
    ],
)
def test_bad_settings_are_refused_by_name(build, told):
    with pytest.raises(ValueError, match=told):
        build()
