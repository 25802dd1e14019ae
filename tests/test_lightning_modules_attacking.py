"""The adversary against what is known beforehand: full leaks, none, noise, and the search for an image."""

import pytest
import torch

from cleave.architectures import GaussianMechanism, entropy_codec, multi_exit_network, split_network, staged_network
from cleave.architectures.attacking.decoders import inversion_decoder
from cleave.architectures.partitions import network_partitions
from cleave.datamodules import Digits
from cleave.deployment import OutputSpec, Pipeline, TensorInput, build_policy, export_bundle
from cleave.lightning_modules.attacking.releases import BundleReleases, NetworkReleases
from cleave.lightning_modules.attacking.training import Schooling, error_of, rebuilt, school
from cleave.lightning_modules.attacking.white_box import passed_through, total_variation, white_box
from cleave.reports.attacks.metrics import intervals, per_image

from .tiny_networks import Tiny

HOW = Schooling(epochs=8, batch_size=32, lr=5e-3)


@pytest.fixture(scope="module")
def digits():
    data = Digits(image_size=8)
    return data, {split: data.sample_batch(split, 10**6)["images"] for split in ("train", "val", "test")}


@pytest.fixture(scope="module")
def true(digits):
    return {split: images.float() / 255 for split, images in digits[1].items()}


def learned(family, sent, true, how=HOW, redrawn=True, strength="small"):
    """A decoder trained on what ``sent`` makes of images."""
    torch.manual_seed(0)
    first = sent(true["train"])
    decoder = inversion_decoder(family, strength, first, true["train"].mean(0))
    payloads = (lambda: sent(true["train"])) if redrawn else (lambda: first)
    return school([decoder], payloads, true["train"], sent(true["val"]), true["val"], how)[0]


def explained(images, true):
    figures = per_image(images, true["test"])
    mean = true["train"].mean(0).expand_as(true["test"])
    return intervals(figures, per_image(mean, true["test"])["mse"], 200)["explained"]


@pytest.mark.parametrize(("family", "strength"), [("residual", "small"), ("linear", "large")])
def test_the_raw_input_is_a_full_leak(true, family, strength):
    schooled = learned(family, lambda images: images, true, redrawn=False, strength=strength)
    assert explained(rebuilt(schooled.decoder, true["test"]), true).value > 0.99


@pytest.mark.parametrize("family", ["linear", "conv", "residual"])
def test_of_pure_noise_no_decoder_beats_the_mean_image_by_more_than_its_interval(true, family):
    few = {**true, "train": true["train"][:200]}
    noise = torch.Generator().manual_seed(3)

    def sent(images):
        return torch.randn(len(images), 2, 4, 4, generator=noise)

    schooled = learned(family, sent, few, Schooling(epochs=3, batch_size=32))
    found = explained(rebuilt(schooled.decoder, sent(true["test"])), true)
    assert found.low <= 0
    assert found.value < 0.01


def test_who_trains_without_the_noise_looks_weaker_and_who_averages_releases_is_stronger(true):
    noise = torch.Generator().manual_seed(3)

    def noisy(images, times=1):
        return images + 0.7 / times**0.5 * torch.randn(images.shape, generator=noise)

    met = noisy(true["test"])
    strong = {"strength": "large"}
    aware, unaware = (learned("linear", sent, true, **strong) for sent in (noisy, lambda images: images))
    averaging = learned("linear", lambda images: noisy(images, 8), true, **strong)
    found = [explained(rebuilt(each.decoder, met), true) for each in (unaware, aware)]
    found.append(explained(rebuilt(averaging.decoder, noisy(true["test"], 8)), true))
    assert found[0].high < found[1].low
    assert found[1].high < found[2].low


def test_noise_is_drawn_once_an_epoch_and_the_best_epoch_is_kept(true):
    drawn = []

    def sent(images):
        drawn.append(len(images))
        return images + torch.randn_like(images)

    schooled = learned("linear", sent, true, Schooling(epochs=3, batch_size=64, lr=1.0))
    assert drawn.count(len(true["train"])) == 1 + 3
    assert schooled.epoch <= 3
    assert not schooled.decoder.training
    begun = (true["train"].mean(0) - true["val"]).double().square().mean().item()
    assert schooled.val_mse <= begun  # such a rate diverges: the mean image is better than that


def test_one_image_is_no_batch_and_an_error_is_the_mean_over_all(true):
    few = {**true, "train": true["train"][:33]}
    schooled = learned("conv", lambda images: images, few, Schooling(epochs=1, batch_size=32))
    by_hand = (schooled.decoder(true["val"]) - true["val"]).double().square().mean().item()
    assert error_of(schooled.decoder, true["val"], true["val"]) == pytest.approx(by_hand)


@pytest.mark.parametrize(("key", "value"), [("epochs", 0), ("batch_size", True), ("lr", 0.0)])
def test_training_out_of_range_is_refused(key, value):
    with pytest.raises(ValueError, match=f"{key} must be .*got {value}"):
        Schooling(**{key: value})


# --- the deployed path ------------------------------------------------------------------------------------------------


def split(data, noise=None, bits=4, codec=None):
    torch.manual_seed(1)
    sample = data.input.normalize(data.sample_batch("train", 64)["images"])
    more = {} if noise is None else {"noise": noise}
    network = split_network(
        Tiny(),
        "layer1",
        sample,
        bottleneck={"channels": 2, "width": 8},
        codec={"bits": bits, "range": "sample"},
        **more,
    )
    return network.eval()


def bundle_of(network, data, folder, policy=None):
    found = network_partitions(network, data.input, policy=policy)
    outputs = [OutputSpec("logits", "logits", network.shapes["logits"], ("a", "b", "c", "d"))]
    more = {
        "draws": found.draws,
        "exits": found.exits,
        "policy": policy,
        "images": data.sample_batch("test", 4)["images"],
    }
    return export_bundle(folder, found.parts, found.edges, input=data.input, outputs=outputs, **more)


def test_a_bundle_releases_what_its_network_does(digits, tmp_path):
    data, images = digits
    network = split(data)
    ours = NetworkReleases(network, data.input)
    theirs = BundleReleases(bundle_of(network, data, tmp_path / "bundle"))
    some = images["test"][:40]
    assert not ours.draws(some)
    assert not theirs.draws(some)
    torch.testing.assert_close(theirs(some), ours(some), rtol=0, atol=1e-5)
    torch.testing.assert_close(theirs.answers(some), ours.answers(some), rtol=0, atol=1e-4)
    levels = {len(each.unique()) for each in ours(some)}
    assert max(levels) <= 16  # what came through the bytes, not the representation


@pytest.mark.parametrize("codec", [{"bits": 32}, {"bits": 5, "range": "sample", "coding": "sparse"}, entropy_codec])
def test_payloads_of_every_kind_are_what_the_network_receives(codec, digits, tmp_path):
    data, images = digits
    network = split(data, codec=codec)
    ours = NetworkReleases(network, data.input)(images["test"][:20]).double()
    theirs = BundleReleases(bundle_of(network, data, tmp_path / "bundle"))(images["test"][:20]).double()
    # A learned prior's codes are the representation in another unit, which decoders standardise anyway.
    unit = (theirs * ours).sum() / (theirs * theirs).sum() if codec is entropy_codec else 1.0
    torch.testing.assert_close(unit * theirs, ours, rtol=0, atol=1e-4)


def test_images_that_a_policy_would_answer_on_the_device_are_sent_all_the_same(digits, tmp_path):
    data, images = digits
    torch.manual_seed(1)
    sample = data.input.normalize(data.sample_batch("train", 64)["images"])
    coders = {"bottleneck": {"channels": 2, "width": 8}, "codec": {"bits": 4, "range": "sample"}}
    network = multi_exit_network(Tiny(), sample, at=["layer1"], split="layer2", **coders).eval()
    policy = build_policy("confidence", 0.0, exits=2)  # everybody leaves at once
    bundle = bundle_of(network, data, tmp_path / "bundle", policy)
    some = images["test"][:20]
    assert Pipeline(bundle).run(some).exits.tolist() == [0] * 20
    releases, ours = BundleReleases(bundle), NetworkReleases(network, data.input)
    torch.testing.assert_close(releases(some), ours(some), rtol=0, atol=1e-5)
    torch.testing.assert_close(releases.answers(some), ours.answers(some), rtol=0, atol=1e-4)


def test_noise_is_drawn_for_each_release_and_averages_out(digits, tmp_path):
    data, images = digits
    network = split(data, GaussianMechanism(bound=None, sigma=0.3), bits=8)
    some = images["test"][:30]
    ours, clean = NetworkReleases(network, data.input), NetworkReleases(network, data.input, noise=False)
    theirs = BundleReleases(bundle_of(network, data, tmp_path / "bundle"))
    assert not clean.draws(some)
    for releases in (ours, theirs):
        assert releases.draws(some)
        one, many = (((releases(some, times) - clean(some)) ** 2).mean().sqrt().item() for times in (1, 16))
        assert one == pytest.approx(0.3, rel=0.1)
        assert many == pytest.approx(0.3 / 4, rel=0.2)


def test_what_sends_nothing_and_what_is_not_sent_is_refused(digits, tmp_path):
    data, _ = digits
    sample = data.input.normalize(data.sample_batch("train", 8)["images"])
    with pytest.raises(ValueError, match=r"is not split.*split.at=LAYER"):
        NetworkReleases(staged_network(Tiny(), sample), data.input)
    network = split(data)
    with pytest.raises(ValueError, match="at='layer2' is not sent by the device; it sends layer1"):
        NetworkReleases(network, data.input, at="layer2")
    bundle = bundle_of(network, data, tmp_path / "bundle")
    with pytest.raises(ValueError, match="at='layr1' is not sent.*Did you mean 'layer1'"):
        BundleReleases(bundle, at="layr1")


# --- the white box ----------------------------------------------------------------------------------------------------


def test_the_gradient_passes_the_rounding_unchanged(digits):
    data, images = digits
    network = split(data, bits=2)
    releases = NetworkReleases(network, data.input)
    one = (images["test"][:3].float() / 255).requires_grad_()
    passed = passed_through(releases, one)
    torch.testing.assert_close(passed, releases(images["test"][:3]))
    weight = torch.randn(passed.shape)
    (found,) = torch.autograd.grad((weight * passed).sum(), one)
    (z,) = network.outputs(data.input.normalize(255 * one), ["layer1/z"]).values()
    (expected,) = torch.autograd.grad((weight * z).sum(), one)
    torch.testing.assert_close(found, expected)


def test_the_search_finds_the_images_behind_a_fine_payload(digits):
    data, images = digits
    network = split(data, bits=12)
    releases = NetworkReleases(network, data.input)
    before = [weight.requires_grad for weight in network.parameters()]
    some = images["test"][:8]
    payloads = releases(some)
    start = images["train"].float().mean(0) / 255
    found = white_box(releases, payloads, start, steps=200, lr=0.05, tv=0.0, scale=payloads.std())
    true = some.float() / 255
    assert (found - true).square().mean() < 0.2 * (start - true).square().mean()
    assert found.min() >= 0
    assert found.max() <= 1
    assert [weight.requires_grad for weight in network.parameters()] == before
    smooth = white_box(releases, payloads, start, steps=200, lr=0.05, tv=10.0, scale=payloads.std())
    assert (total_variation(smooth) < total_variation(found)).all()


def test_total_variation_is_the_mean_step_between_neighbours():
    image = torch.tensor([[[[0.0, 1.0], [0.5, 0.5]]]])
    assert total_variation(image).tolist() == pytest.approx([(0.5 + 0.5 + 1.0 + 0.0) / 4])


def test_a_bundle_that_takes_no_images_is_refused():
    bundle = type("Bundle", (), {"input": TensorInput((3,), name="tokens")})()
    with pytest.raises(ValueError, match="takes tokens, no images"):
        BundleReleases(bundle)
