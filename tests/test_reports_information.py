"""Bounds on information: payload bits, KL and a critic against what is known beforehand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from cleave.architectures import GaussianEncoder, entropy_codec, split_network
from cleave.architectures.attacking.critic import Critic
from cleave.architectures.partitions import network_partitions
from cleave.datamodules import Digits
from cleave.deployment import ENVELOPE_BYTES, OutputSpec, export_bundle
from cleave.lightning_modules.attacking.critics import batches, bounds, ceiling, train_critic
from cleave.lightning_modules.attacking.releases import BundleReleases, NetworkReleases
from cleave.lightning_modules.attacking.training import Schooling
from cleave.reports.attacks.information import ABOVE, Bound, Information, bound_of, payload_bits, print_information
from cleave.reports.attacks.metrics import Interval

from .tiny_networks import Tiny


@pytest.fixture(scope="module")
def digits():
    data = Digits(image_size=8)
    return data, data.sample_batch("test", 12)["images"]


def releases_of(digits, bottleneck=None, codec=None):
    data, images = digits
    torch.manual_seed(0)
    inputs = data.input.normalize(images)
    coders = {"channels": 2, "width": 8, **(bottleneck or {})}
    network = split_network(Tiny(), "layer1", inputs, bottleneck=coders, codec=codec)
    network.train()(inputs)  # an observed range is measured in training
    return NetworkReleases(network.eval(), data.input)


@pytest.mark.parametrize("bits", [8, 4, 3])
@pytest.mark.parametrize(("range_", "ends"), [("observed", 0), ("sample", 8)])  # its ends go along with each sample
def test_payload_bits_are_those_of_the_uniform_codec(digits, bits, range_, ends):
    found = releases_of(digits, codec={"bits": bits, "range": range_})
    elements = math.prod(found.bottleneck.shape)
    lengths = found.payload_bytes(digits[1])
    assert lengths == [math.ceil(elements * bits / 8) + ends] * 12
    assert payload_bits(lengths).tolist() == [8.0 * lengths[0]] * 12


def test_a_bundle_sends_as_much_with_its_envelope_apart(digits, tmp_path):
    data, images = digits
    found = releases_of(digits, codec={"bits": 4})
    parts = network_partitions(found.network, data.input)
    outputs = [OutputSpec("logits", "logits", found.network.shapes["logits"], ("a", "b", "c", "d"))]
    more = {"draws": parts.draws, "exits": parts.exits, "images": images}
    bundle = export_bundle(tmp_path, parts.parts, parts.edges, input=data.input, outputs=outputs, **more)
    theirs = BundleReleases(bundle)
    assert theirs.payload_bytes(images) == found.payload_bytes(images)
    sent = theirs._sent(images).payloads[theirs.at]
    assert [len(each) - ENVELOPE_BYTES for each in sent] == found.payload_bytes(images)


def test_where_lengths_differ_the_length_itself_is_counted():
    lengths = [0, 2]  # a mean of 1: a geometric length of that mean has the entropy log2(1 + 1) + 1·log2(1 + 1/1) = 2
    assert payload_bits(lengths).mean().item() == pytest.approx(8 + math.log2(2 * math.e))
    assert math.log2(2 * math.e) > 2
    assert payload_bits([3]).tolist() == [24.0]


def test_the_rate_is_that_of_the_prior_and_near_the_bytes_that_are_sent(digits):
    pytest.importorskip("constriction")
    found = releases_of(digits, codec=entropy_codec)
    rate = found.rate(digits[1])
    z = found(digits[1])
    likelihoods = found.bottleneck.quantizer.likelihoods(z)
    assert torch.allclose(rate, -likelihoods.log2().flatten(1).sum(1))
    lengths = torch.tensor(found.payload_bytes(digits[1]))
    assert (8 * lengths > rate - 8).all()
    assert releases_of(digits, codec={"bits": 4}).rate(digits[1]) is None


def test_the_divergence_is_the_closed_form(digits):
    found = releases_of(digits, bottleneck={"variance": 0.25})
    assert isinstance(found.bottleneck.encoder, GaussianEncoder)
    own = found.divergence(digits[1])
    mean = found.network.outputs(digits[0].input.normalize(digits[1]), ["layer1/mean"])["layer1/mean"].detach().double()
    # KL(N(μ, σ²) ‖ N(0, 1)) = ½·Σ(μ² + σ² − 1 − ln σ²)
    expected = 0.5 * (mean.square() + 0.25 - 1 - math.log(0.25)).flatten(1).sum(1)
    assert torch.allclose(own.double(), expected, rtol=1e-5)
    assert releases_of(digits).divergence(digits[1]) is None


def gaussians(count, correlation, seed):
    draw = torch.randn(2, count, 2, generator=torch.Generator().manual_seed(seed))
    z = correlation * draw[0] + math.sqrt(1 - correlation**2) * draw[1]
    return draw[0].reshape(count, 1, 1, 2), z


@pytest.mark.parametrize("correlation", [0.0, 0.7])
def test_a_trained_critic_stays_below_the_information_of_gaussian_pairs_and_comes_near(correlation):
    torch.manual_seed(0)
    true = -math.log2(1 - correlation**2)  # two independent pairs of −½·log2(1 − ρ²) each
    images, payloads = gaussians(2000, correlation, 1)
    val, held = gaussians(500, correlation, 2), gaussians(4000, correlation, 3)
    critic = Critic(images, payloads)
    how = Schooling(epochs=4, batch_size=64, lr=5e-3)
    trained, _ = train_critic(critic, lambda: payloads, images, val[1], val[0], how)
    values = torch.stack(bounds(trained, *held, 64, 0))
    error = (values.std() / len(values) ** 0.5).item()
    assert values.mean().item() <= true + 3 * error
    assert values.mean().item() >= true - 0.35 - 3 * error
    assert values.max().item() <= ceiling(4000, 64) == 6


def test_a_critic_that_never_improves_is_kept_as_it_began():
    images, payloads = torch.rand(40, 1, 8, 8), torch.rand(40, 3)
    critic = Critic(images, payloads)
    before = [weight.clone() for weight in critic.parameters()]
    how = Schooling(epochs=1, batch_size=8, lr=1e-12)
    kept, epoch = train_critic(critic, lambda: payloads, images, torch.zeros(6, 3), torch.zeros(6, 1, 8, 8), how)
    assert epoch == 0
    assert all(torch.equal(one, other) for one, other in zip(before, kept.parameters(), strict=True))
    assert not kept.training


def test_batches_are_whole_and_a_small_set_is_one():
    assert [len(each) for each in batches(10, 4, 0)] == [4, 4]
    assert [len(each) for each in batches(3, 4, 0)] == [3]
    assert ceiling(3, 4) == math.log2(3)


def test_a_payload_that_never_changes_scores_alike():
    critic = Critic(torch.rand(6, 1, 8, 8), torch.ones(6, 3))
    scores = critic(torch.rand(5, 1, 8, 8), torch.ones(5, 3))
    assert torch.isfinite(scores).all()
    assert torch.equal(scores, scores[:1].expand(5, 5))


def test_a_large_image_is_taken_in_by_strides():
    critic = Critic(torch.rand(4, 3, 33, 20), torch.rand(4, 2, 3, 3))
    convolutions = [layer for layer in critic.of_image if isinstance(layer, nn.Conv2d)]
    assert len(convolutions) == 3
    assert critic(torch.rand(2, 3, 33, 20), torch.rand(2, 2, 3, 3)).shape == (2, 2)


def test_the_table_names_sides_and_the_ceiling(capsys):
    bound = bound_of("payload_bits", "payload, envelope apart", ABOVE, torch.tensor([100.0, 300.0]), 50, 0)
    assert bound.bits.value == 200
    assert bound.bits.low < 200 < bound.bits.high
    below = Bound("infonce_bits", "InfoNCE", "at least", Interval(6.5, 6.4, 6.6), ceiling=7.0)
    correlation = {"value": 0.5, "spread": 0.125, "batches": 3, "batch": 32}
    print_information(Information((bound, below), correlation))
    told = capsys.readouterr().out
    assert all(word in told for word in ("at most", "at least", "ceiling", "200", "6.5", "spread 0.125 over 3 batches"))
