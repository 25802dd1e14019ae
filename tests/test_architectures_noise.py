from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from scipy import stats

from cleave.architectures import (
    GaussianMechanism,
    LaplaceMechanism,
    MagnitudeNullification,
    RandomNullification,
    gaussian_sigma,
    split_network,
)
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.datamodules import Digits
from cleave.deployment import Pipeline, load_bundle

from .training_helpers import bundle_outputs

NOISES = {
    "laplace": LaplaceMechanism(epsilon=200, bound=4.0),
    "gaussian": GaussianMechanism(epsilon=200, bound=4.0),
    "by its scale": GaussianMechanism(sigma=0.1, bound=None),
    "nullification": RandomNullification(0.3),
    "by magnitude": MagnitudeNullification(0.3),
}
pytestmark = pytest.mark.usefixtures("same_draws")


def drawn(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(("kind", "order"), [(LaplaceMechanism, 1), (GaussianMechanism, 2)])
def test_norms_are_clipped_and_what_is_below_the_bound_stays(kind, order):
    noise = kind(epsilon=1, bound=5.0)
    z = drawn(50, 3, 4) * torch.logspace(-2, 2, 50)[:, None, None]
    found = noise.lay(z, torch.zeros_like(z))
    norms = [np.linalg.norm(each.flatten(), order) for each in z.double()]
    for before, after, norm in zip(z, found, norms, strict=True):
        expected = before if norm <= 5 else before * (5 / norm)
        torch.testing.assert_close(after, expected.float())
    assert min(norms) < 5 < max(norms)


def test_the_scales_are_those_of_the_mechanisms():
    torch.manual_seed(0)
    z = torch.zeros(2000, 50)
    found = LaplaceMechanism(epsilon=4, bound=3.0)(z).double().flatten().numpy()
    assert stats.kstest(found, stats.laplace(scale=2 * 3 / 4).cdf).pvalue > 1e-4
    noise = GaussianMechanism(epsilon=4, delta=1e-6, bound=3.0)
    found = noise(z).double().flatten().numpy()
    assert stats.kstest(found, stats.norm(scale=gaussian_sigma(4, 1e-6, 6.0)).cdf).pvalue > 1e-4
    found = GaussianMechanism(sigma=0.7, bound=None)(z + 2)
    assert stats.kstest(found.double().flatten().numpy(), stats.norm(2, 0.7).cdf).pvalue > 1e-4


def test_the_bound_learns_the_median_norm_and_rests_in_evaluation():
    torch.manual_seed(0)
    noise = GaussianMechanism(epsilon=100)
    with pytest.raises(ValueError, match="waits for its first training batch"):
        noise.check_measured()
    for _ in range(300):
        noise(torch.randn(64, 30) * 2 + 1)
    norms = np.linalg.norm(np.random.default_rng(0).normal(1, 2, (100_000, 30)), axis=1)
    assert float(noise.bound) == pytest.approx(np.median(norms), rel=0.05)
    noise.check_measured()
    before = noise.bound.clone()
    noise.eval()(torch.randn(64, 30) * 100)
    assert torch.equal(noise.bound, before)


def test_nullification_at_random_and_by_magnitude():
    torch.manual_seed(0)
    z = drawn(1000, 20) + 5
    found = RandomNullification(0.3)(z)
    assert float((found == 0).float().mean()) == pytest.approx(0.3, abs=4 * math.sqrt(0.21 / 20_000))
    assert torch.equal(found[found != 0], z[found != 0])
    found = MagnitudeNullification(0.25)(z)
    assert ((found == 0).sum(1) == 5).all()
    for before, after in zip(z, found, strict=True):
        assert before[after == 0].abs().max() <= before[after != 0].abs().min()


@pytest.mark.parametrize("name", NOISES)
def test_a_bundle_with_noise_passes_the_gate_and_is_as_noisy_as_the_network(name, tmp_path):
    torch.manual_seed(0)
    data, backbone = Digits(image_size=8), CifarResNet(8, in_channels=1)
    codec = {"bits": 8, "range": "sample"}
    network = split_network(backbone, "layer1", torch.randn(2, 1, 8, 8), codec=codec, noise=NOISES[name]).eval()
    parts = network.inserts_at("layer1")[0]
    assert "noise" in parts.parts()
    bundle_outputs(network, data, tmp_path / "bundle")  # through the gate
    bundle = load_bundle(tmp_path / "bundle")
    bundle.self_test()
    assert len(bundle.manifest.draws) == (name != "by magnitude")
    images = data.sample_batch("test", 1)["images"].expand(400, -1, -1, -1)
    with torch.no_grad():
        inputs = data.input.normalize(images)
        ours = network(inputs)
    theirs = Pipeline(bundle).run(images).outputs["logits"]
    if name == "by magnitude":
        torch.testing.assert_close(theirs, ours, rtol=1e-3, atol=1e-3)
        return
    # The same picture, disturbed anew each time: one distribution, class by class.
    for a, b in zip(ours.T, theirs.T, strict=True):
        assert stats.ks_2samp(a.numpy(), b.numpy()).pvalue > 1e-4
    assert theirs.std(0).min() > 0


def test_noise_is_laid_once_and_before_the_quantiser():
    torch.manual_seed(0)
    backbone = CifarResNet(8, in_channels=1)
    noise = GaussianMechanism(sigma=0.5, bound=None)
    network = split_network(
        backbone, "layer1", torch.randn(2, 1, 8, 8), codec={"bits": 6, "range": "sample"}, noise=noise
    ).eval()
    names = ["layer1/z", "layer1/noised", "layer1/sent", "logits"]
    with torch.no_grad():
        found = network.outputs(torch.randn(8, 1, 8, 8), names)
    assert (found["layer1/noised"] - found["layer1/z"]).std() == pytest.approx(0.5, rel=0.1)
    step = (found["layer1/noised"].flatten(1).amax(1) - found["layer1/noised"].flatten(1).amin(1)) / 63
    off = (found["layer1/sent"] - found["layer1/noised"]).flatten(1).abs().amax(1)
    assert (off <= step * 0.51).all()


@pytest.mark.parametrize(
    ("build", "told"),
    [
        (lambda: LaplaceMechanism(epsilon=0), "epsilon must be a positive finite number, got 0"),
        (lambda: GaussianMechanism(epsilon=-1), "epsilon must be a positive finite number, got -1"),
        (lambda: GaussianMechanism(epsilon=1, delta=1), "delta must lie between 0 and 1, got 1"),
        (lambda: GaussianMechanism(epsilon=2, classic=True), "epsilon below 1, got 2"),
        (lambda: GaussianMechanism(epsilon=2, bound=0), "bound must be a positive finite number, .*got 0"),
        (lambda: LaplaceMechanism(epsilon=2, bound="mean"), "bound must be a number above 0, median, .*got 'mean'"),
        (lambda: LaplaceMechanism(epsilon=2, bound=None), "epsilon=2 is promised of clipped representations alone"),
        (lambda: LaplaceMechanism(), "give either epsilon, .* or scale"),
        (lambda: GaussianMechanism(epsilon=1, sigma=1), "give either epsilon, .* or sigma"),
        (lambda: RandomNullification(1.0), "share must be at least 0 and below 1, got 1.0"),
        (lambda: MagnitudeNullification(-0.1), "share must be at least 0 and below 1, got -0.1"),
    ],
)
def test_bad_settings_are_refused_by_name(build, told):
    with pytest.raises(ValueError, match=told):
        build()
