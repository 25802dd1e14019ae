import copy
import pickle

import pytest
import torch
from torch import nn

from cleave.architectures import CutError, DevicePart, SplitNetwork, create_backbone, cut, profile
from cleave.architectures.inserts.calibration import calibrate_range
from cleave.architectures.inserts.quantizer import UniformQuantizer, Unquantized
from cleave.deployment import CodecError, ImageInput

SAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return create_backbone("cifar", "resnet20", num_classes=10).network


def split(**settings) -> SplitNetwork:
    settings = {"at": "layer2", "sample": SAMPLE} | settings
    return SplitNetwork(backbone(), **settings)


def test_the_tail_is_the_backbones_and_nothing_is_shared():
    original = backbone()
    network = SplitNetwork(original, "layer2", SAMPLE).eval()
    stages = cut(original.eval(), at=["layer2"], sample=SAMPLE)
    feature = stages.features(SAMPLE, at=["layer2"])["layer2"]
    assert torch.equal(network.tail(feature), original(SAMPLE))
    own, theirs = ({p.data_ptr() for p in m.parameters()} for m in (network, original))
    assert not own & theirs


@pytest.mark.parametrize("bits", [2, 8, 32])
@pytest.mark.parametrize("form", ["replace", "insert"])
def test_forward_is_the_chain_of_its_parts(form, bits):
    network = split(form=form, codec={"bits": bits}).train()
    network(SAMPLE)
    network.eval()
    x = SAMPLE if network.head is None else network.head(SAMPLE)
    z = network.encoder(x)
    assert tuple(z.shape[1:]) == network.shape
    assert torch.equal(network(SAMPLE), network.tail(network.decoder(network.quantizer(z))))
    assert isinstance(network.quantizer, Unquantized) == (bits == 32)
    assert (network.head is None) == (form == "replace")


def test_features_stop_at_the_last_name_and_are_left_alone():
    network = split(observe=["layer3"]).eval()
    calls = []
    for i, stage in enumerate(network.tail):
        stage.register_forward_hook(lambda *_, i=i: calls.append(i))
    assert list(network.features(SAMPLE, at=["layer2"])) == ["layer2"]
    assert calls == []
    found = network.features(SAMPLE, at=["layer3", "layer2"])
    assert calls == [0]
    assert torch.equal(found["layer2"], network.decode(network.encode(SAMPLE)))
    assert torch.equal(network.tail[1](network.tail[0](found["layer2"])), network(SAMPLE))


def test_codes_decode_to_what_forward_uses():
    for codec in ({"bits": 4}, {"bits": 3, "range": "sample"}, {"bits": 5, "range": "learned"}, {"bits": 32}):
        network = split(codec=codec).train()
        network(SAMPLE)
        network.eval()
        payloads = network.codec.encode(network.codes(SAMPLE))
        received = network.codec.decode(payloads)
        torch.testing.assert_close(network.receive(received), network(SAMPLE), atol=0, rtol=0)
        values = 8 * 16 * 16
        expected = values * codec["bits"] // 8 + (8 if codec.get("range") == "sample" else 0)
        assert {len(p) for p in payloads} == {expected}


def test_the_device_normalises_as_the_data_do():
    network = split(codec={"bits": 32}).eval()
    spec = ImageInput(height=32, width=32, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.7))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(DevicePart(network, spec).eval()(images), network.encode(spec.normalize(images)))


def test_copies_are_whole():
    network = split().train()
    network(SAMPLE)
    network.eval()
    for twin in (copy.deepcopy(network), pickle.loads(pickle.dumps(network))):  # noqa: S301 our own bytes
        assert torch.equal(twin(SAMPLE), network(SAMPLE))


def test_the_width_can_change_after_training():
    network = split(codec={"bits": 4}).train()
    network(SAMPLE)
    network.eval()
    network.set_bits(2)
    assert {len(p) for p in network.codec.encode(network.codes(SAMPLE))} == {8 * 16 * 16 // 4}
    network.set_bits(32)
    assert torch.equal(network(SAMPLE), network.tail(network.decoder(network.encode(SAMPLE))))
    with pytest.raises(ValueError, match="knows no range"):
        network.set_bits(8)
    with pytest.raises(ValueError, match="bits"):
        network.set_bits(1)


def test_profile_adds_up():
    network = split(form="insert")
    costs = network.profile()
    assert list(costs) == ["head", "encoder", "decoder", "tail"]
    whole = profile(backbone(), (3, 32, 32))["whole"]
    assert costs["head"]["macs"] + costs["tail"]["macs"] == whole["macs"]
    assert costs["head"]["params"] + costs["tail"]["params"] == whole["params"]
    convolutions = [m for m in network.encoder if isinstance(m, nn.Conv2d)]
    assert costs["encoder"]["macs"] == sum(m.weight.numel() * 16 * 16 for m in convolutions)
    assert network.training
    assert network.sizes() == {"input": 3 * 32 * 32, "feature": 4 * 32 * 16 * 16}


@pytest.mark.parametrize(
    ("name", "at", "size"),
    [("swin_tiny_patch4_window7_224", "layers.1", 224), ("vit_tiny_patch16_224", "blocks.2", 224)],
)
def test_transformers_take_an_inserted_bottleneck(name, at, size):
    network = create_backbone("timm", name, num_classes=10).network
    sample = torch.randn(1, 3, size, size)
    built = SplitNetwork(network, at, sample, form="insert", bottleneck={"channels": 6}).eval()
    assert built(sample).shape == (1, 10)
    channels = built.shape[0] if name.startswith("swin") else built.shape[-1]
    assert channels == 6


def test_swin_maps_take_a_bottleneck_in_place_of_the_head():
    network = create_backbone("timm", "swin_tiny_patch4_window7_224", num_classes=10).network
    sample = torch.randn(1, 3, 224, 224)
    built = SplitNetwork(network, "layers.1", sample, bottleneck={"channels": 6}).eval()
    assert built.features(sample, at=["layers.1"])["layers.1"].shape == (1, 28, 28, 192)


def test_an_unknown_layer_lists_near_matches():
    with pytest.raises(CutError, match="layer2"):
        split(at="layer22")
    with pytest.raises(CutError, match="layer3"):
        split(observe=["layer3"]).features(SAMPLE, at=["layer33"])


def test_bits_and_range_are_checked():
    for bits in (1, 17, 31):
        with pytest.raises(ValueError, match="bits"):
            split(codec={"bits": bits})
    with pytest.raises(ValueError, match="learned, observed or sample|learned, observed, sample"):
        split(codec={"range": "fixed"})


# --- features -----------------------------------------------------------------------------------------------------


def test_the_names_of_every_output_are_known() -> None:
    assert split(observe=["layer2", "layer3"]).available == ("layer2", "layer3", "logits")
    assert split(form="insert").available == ("layer2", "logits", "head")
    assert split(bottleneck={"variance": 0.1}).available == ("layer2", "logits", "mean", "log_variance")
    assert split(codec={"kind": "entropy"}).available == ("layer2", "logits", "likelihoods")


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("likelihoods", "codec=entropy"),
        ("mean", r"bottleneck\.variance=learned"),
        ("log_variance", r"bottleneck\.variance=learned"),
        ("head", r"split\.form=insert"),
        ("layer3", r"Did you mean 'layer2'.*split\.observe"),
    ],
)
def test_a_feature_that_is_not_there_says_how_to_get_it(name: str, hint: str) -> None:
    network = split()
    for ask in (network.check_names, lambda names: network.features(SAMPLE, names)):
        with pytest.raises(CutError, match=f"no feature '{name}'; it has layer2, logits.*{hint}"):
            ask([name])


def test_a_heads_output_may_be_given_in_place_of_images() -> None:
    network = split(form="insert", observe=["layer3"]).eval()
    names = ["head", "layer2", "layer3", "logits"]
    whole = network.features(SAMPLE, names)
    network.head.register_forward_hook(lambda *_: pytest.fail("the head ran"))
    alone = network.features(None, names, head=whole["head"])
    assert list(alone) == names
    assert all(torch.equal(alone[name], whole[name]) for name in names)


def test_likelihoods_are_those_of_what_is_decoded() -> None:
    network = split(codec={"kind": "entropy"}).train()
    torch.manual_seed(0)
    found = network.features(SAMPLE, ["likelihoods", "layer2"])
    torch.manual_seed(0)
    z_hat = network.quantizer(network.encode(SAMPLE))
    assert torch.equal(found["likelihoods"], network.quantizer.likelihoods(z_hat))
    torch.testing.assert_close(found["layer2"], network.decoder(z_hat))
    assert list(network.features(SAMPLE, ["likelihoods"])) == ["likelihoods"]


def test_a_stochastic_encoder_samples_in_training_alone() -> None:
    network = split(bottleneck={"variance": "learned"}, codec={"bits": 32}).train()
    assert not torch.equal(*(network.encode(SAMPLE) for _ in range(2)))
    network.eval()
    found = network.features(SAMPLE, ["mean", "log_variance", "layer2"])
    assert torch.equal(found["mean"], network.encode(SAMPLE))
    assert torch.equal(network.device_encoder()(SAMPLE), found["mean"])
    assert torch.equal(found["layer2"], network.decoder(found["mean"]))
    assert found["log_variance"].shape == found["mean"].shape
    assert not any("log_variance" in name for name, _ in network.device_encoder().named_parameters())


class InPlace(nn.Module):
    """A tail that begins by writing over the feature it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.end(self.body(self.act(self.stem(x))))


@pytest.mark.parametrize("form", ["replace", "insert"])
def test_a_tail_that_works_in_place_does_not_reach_what_was_returned(form: str) -> None:
    network = SplitNetwork(InPlace(), "stem", SAMPLE, form=form, observe=["body"]).eval()
    found = network.features(SAMPLE, ["stem", "body", "logits"])
    assert torch.equal(found["stem"], network.decode(network.encode(SAMPLE)))
    assert torch.equal(found["body"], network.tail[0](found["stem"].clone()))
    assert min(found[name].min() for name in ("stem", "body")) < 0
    assert torch.equal(found["logits"], network(SAMPLE))


# --- no bottleneck ------------------------------------------------------------------------------------------------


def test_without_a_bottleneck_the_feature_itself_is_sent() -> None:
    original = backbone()
    network = SplitNetwork(original, "layer2", SAMPLE, form="none", codec={"bits": 32}).eval()
    assert network.shape == network.feature_shape == (32, 16, 16)
    assert torch.equal(network(SAMPLE), original.eval()(SAMPLE))
    payloads = network.codec.encode(network.codes(SAMPLE))
    assert {len(payload) for payload in payloads} == {network.sizes()["feature"]}
    assert network.profile()["encoder"] == {"macs": 0, "params": 0}
    with pytest.raises(ValueError, match="add bottleneck=null"):
        split(form="none", bottleneck={"channels": 4})


def test_calibration_gives_a_range_to_what_was_trained_in_float() -> None:
    network = split(form="none", codec={"bits": 32}).train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    low, high = network.calibrate(images.split(4), bits=4)
    assert (low, high) == calibrate_range([network.eval().encode(part) for part in images.split(4)], 4)
    assert isinstance(network.quantizer, UniformQuantizer)
    assert network.quantizer.fixed_range == (low, high)
    assert network.bits == 4
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    network = split(form="none", codec={"bits": 32}).train()
    network.calibrate([images], bits=4)
    assert [module.training for module in network.modules()] == modes
    network.eval()
    received = network.codec.decode(network.codec.encode(network.codes(images)))
    torch.testing.assert_close(network.receive(received), network(images), atol=0, rtol=0)


# --- codecs, widths and links -------------------------------------------------------------------------------------


def test_what_cannot_be_coded_is_told_when_the_network_is_built() -> None:
    for codec, message in (
        ({"kind": "entropic"}, "codec.kind must be one of uniform, entropy, got 'entropic'.*Did you mean 'entropy'"),
        ({"coding": "tiled_pgn"}, "Did you mean 'tiled_png'"),
        ({"bits": 12, "coding": "tiled_png"}, "bits must be 2 to 8"),
        ({"bits": 32, "coding": "sparse"}, r"codec.coding=sparse codes integers, but codec.bits=32"),
        ({"coding": "packed", "quality": 50}, "quality=50 has no meaning"),
        ({"coding": "tiled_jpeg"}, "quality"),
        ({"bitz": 4}, "bitz"),
        ({"bits": 32, "range": "fixed"}, "codec.range"),
        ({"kind": "entropy", "bits": 4}, "codec.bits has no meaning for codec.kind=entropy, which takes filters"),
        ({"kind": "entropy", "coding": "sparse"}, "codec.coding has no meaning for codec.kind=entropy"),
        ({"kind": "entropy", "widths": [2, 4]}, "codec.widths has no meaning for codec.kind=entropy"),
    ):
        with pytest.raises(ValueError, match=message):
            split(codec=codec)
    for codec in ({"widths": [2, 4]}, {"bits": 32, "widths": [2, 4]}):
        with pytest.raises(ValueError, match=r"codec.bits=\w+ must be one of codec.widths=\[2, 4\]"):
            split(codec=codec)
    with pytest.raises(ValueError, match="two or more different widths"):
        split(codec={"bits": 4, "widths": [4]})


def test_a_learned_prior_has_no_width() -> None:
    network = split(codec={"kind": "entropy"})
    with pytest.raises(CodecError, match="a learned prior has no width"):
        network.set_bits(4)


def test_every_part_of_a_switchable_network_runs_at_the_networks_width() -> None:
    network = split(codec={"bits": 4, "widths": [4, 2]}).train()
    assert network.widths == (2, 4)
    for bits in (2, 4):
        network.set_bits(bits)
        for _ in range(3):
            network(SAMPLE)
    norms = {name for name in network.state_dict() if ".sets." in name and "num_batches_tracked" in name}
    assert {name.split(".")[0] for name in norms} == {"decoder", "tail"}
    assert {network.state_dict()[name].item() for name in norms} == {3}
    network.eval()
    outputs = {}
    for bits in (2, 4):
        network.set_bits(bits)
        outputs[bits] = network(SAMPLE)
        received = network.codec.decode(network.codec.encode(network.codes(SAMPLE)))
        torch.testing.assert_close(network.receive(received), outputs[bits], atol=0, rtol=0)
    network.set_bits(2)
    assert torch.equal(network(SAMPLE), outputs[2])
    assert not torch.equal(outputs[2], outputs[4])


@pytest.mark.parametrize("when", ["train", "eval", "always", "never"])
def test_the_link_stands_between_quantizer_and_decoder(when: str) -> None:
    network = split(channel={"kind": "packet_loss", "rate": 0.5, "packet_bytes": 16, "when": when}).train()
    network(SAMPLE)
    for mode in ("train", "eval"):
        network.train(mode == "train")
        torch.manual_seed(0)
        feature = network.features(SAMPLE, ["layer2"])["layer2"]
        torch.manual_seed(0)
        z_hat = network.quantizer(network.encode(SAMPLE))
        arrived = network.channel(z_hat, network.quantizer)
        assert torch.equal(arrived, z_hat) == (when not in (mode, "always"))
        torch.testing.assert_close(feature, network.decoder(arrived), atol=1e-5, rtol=1e-5)
    # The server, too, gets what the link has left over.
    received = network.codec.decode(network.codec.encode(network.codes(SAMPLE)))
    torch.manual_seed(0)
    logits = network.receive(received)
    network.set_channel(None)
    assert network.channel is None
    assert torch.equal(network.receive(received), logits) == (when in ("train", "never"))


def test_a_link_that_cannot_carry_the_codes_is_refused_when_the_network_is_built() -> None:
    for codec, channel in (
        ({"bits": 32}, {"kind": "bit_errors", "rate": 0.1}),
        ({"kind": "entropy"}, {"kind": "bit_errors", "rate": 0.1}),
        ({"kind": "entropy"}, {"kind": "packet_loss", "rate": 0.1, "packet_bytes": 32}),
        ({"bits": 16}, {"kind": "packet_loss", "rate": 0.1, "packet_bytes": 1}),
    ):
        with pytest.raises(ValueError, match="channel"):
            split(codec=codec, channel=channel)
    network = split(codec={"bits": 32})
    with pytest.raises(ValueError, match="bit_errors"):
        network.set_channel({"kind": "bit_errors", "rate": 0.1})


def test_a_layer_before_the_split_cannot_be_observed() -> None:
    with pytest.raises(CutError, match=r"\(layer1\) must stand behind the split at 'layer2'"):
        split(observe=["layer1"])
    with pytest.raises(ValueError, match="split.form must be one of replace, insert or none, got 'inject'"):
        split(form="inject")
