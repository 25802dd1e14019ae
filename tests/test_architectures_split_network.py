from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from cleave.architectures import (
    BitErrors,
    CutError,
    PacketLoss,
    StagedNetwork,
    UniformQuantizer,
    Unquantized,
    calibrate_range,
    count_macs,
    count_params,
    create_backbone,
    cut,
    entropy_codec,
    split_network,
)
from cleave.architectures.backbones.zoo import CifarResNet
from cleave.architectures.normalize import Normalize
from cleave.deployment import CodecError, ImageInput

from .tiny_networks import made_once

SAMPLE = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def backbone() -> nn.Module:
    torch.manual_seed(0)
    return CifarResNet(8)


def split(**settings: Any) -> StagedNetwork:
    return made_once(_split, settings)


def _split(settings: dict[str, Any]) -> StagedNetwork:
    return split_network(backbone(), **{"at": "layer2", "sample": SAMPLE} | settings)


def measured(**settings: Any) -> StagedNetwork:
    """A network whose range is that of one batch."""
    network = split(**settings).train()
    network(SAMPLE)
    return network.eval()


def through_bytes(network: StagedNetwork, inputs: Tensor = SAMPLE) -> tuple[Tensor, list[bytes]]:
    """Logits of what was sent as bytes, and these."""
    sent: list[list[bytes]] = []

    def link(at: str, codec: Any, tensors: dict[str, Tensor]) -> Any:
        sent.append(codec.encode(tensors))
        return codec.decode(sent[-1])

    return network.outputs(inputs, ["logits"], link=link)["logits"], sent[0]


def test_the_tail_is_the_backbones_and_nothing_is_shared() -> None:
    original = backbone()
    network = split_network(original, "layer2", SAMPLE).eval()
    stages = cut(original.eval(), at=["layer2"], sample=SAMPLE)
    feature = stages.features(SAMPLE, at=["layer2"])["layer2"]
    assert torch.equal(network.outputs(None, ["logits"], given={"layer2": feature})["logits"], original(SAMPLE))
    own, theirs = ({p.data_ptr() for p in m.parameters()} for m in (network, original))
    assert not own & theirs


@pytest.mark.parametrize("bits", [2, 8, 32])
@pytest.mark.parametrize("form", ["replace", "insert"])
def test_forward_is_the_chain_of_its_parts(form: str, bits: int) -> None:
    network = measured(form=form, codec={"bits": bits})
    bottleneck = network.bottlenecks["layer2"]
    x = SAMPLE if form == "replace" else network.stages[0](SAMPLE)
    z = bottleneck.encoder(x)
    assert tuple(z.shape[1:]) == bottleneck.shape
    assert torch.equal(network(SAMPLE), network.stages[1](bottleneck.decoder(bottleneck.quantizer(z))))
    assert isinstance(bottleneck.quantizer, Unquantized) == (bits == 32)
    assert network.replaced == (form == "replace")
    assert ("head" in network.parts()) == (form == "insert")
    feature = bottleneck(x)
    assert torch.equal(feature, network.outputs(SAMPLE, ["layer2"])["layer2"])


def test_features_stop_at_the_last_name_and_are_left_alone() -> None:
    network = split(cuts=["layer3"]).eval()
    calls: list[int] = []
    for i, stage in enumerate(network.stages):
        stage.register_forward_hook(lambda *_, i=i: calls.append(i))
    assert list(network.outputs(SAMPLE, at=["layer2"])) == ["layer2"]
    assert calls == []
    found = network.outputs(SAMPLE, at=["layer3", "layer2"])
    assert calls == [1]
    assert torch.equal(found["layer2"], network.bottlenecks["layer2"](SAMPLE))
    assert torch.equal(network.stages[2](network.stages[1](found["layer2"])), network(SAMPLE))


def test_codes_decode_to_what_forward_uses() -> None:
    for codec in ({"bits": 4}, {"bits": 3, "range": "sample"}, {"bits": 5, "range": "learned"}, {"bits": 32}):
        network = measured(codec=codec)
        logits, payloads = through_bytes(network)
        torch.testing.assert_close(logits, network(SAMPLE), atol=0, rtol=0)
        values = 8 * 16 * 16
        expected = values * codec["bits"] // 8 + (8 if codec.get("range") == "sample" else 0)
        assert {len(p) for p in payloads} == {expected}
        bottleneck = network.bottlenecks["layer2"]
        z = network.outputs(SAMPLE, ["layer2/z"])["layer2/z"]
        assert bottleneck.codec.encode(bottleneck.send(z)) == payloads
        received = bottleneck.receive(bottleneck.codec.decode(payloads))
        assert torch.equal(received, network.outputs(SAMPLE, ["layer2/sent"])["layer2/sent"])


def test_the_device_normalises_as_the_data_do() -> None:
    spec = ImageInput(height=32, width=32, mean=(0.1, 0.5, 0.9), std=(0.2, 0.3, 0.7))
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    assert torch.equal(Normalize(spec)(images), spec.normalize(images))


def test_the_width_can_change_after_training() -> None:
    network = measured(codec={"bits": 4})
    network.set_bits(2)
    assert {len(p) for p in through_bytes(network)[1]} == {8 * 16 * 16 // 4}
    network.set_bits(32)
    bottleneck = network.bottlenecks["layer2"]
    assert torch.equal(network(SAMPLE), network.stages[1](bottleneck.decoder(bottleneck.encoder(SAMPLE))))
    with pytest.raises(ValueError, match="knows no range"):
        network.set_bits(8)
    with pytest.raises(ValueError, match="bits"):
        network.set_bits(1)


def test_costs_add_up() -> None:
    network = split(form="insert")
    costs = {(cost.kind, cost.name): cost for cost in network.costs()}
    assert list(costs) == [("stage", "layer2"), ("encoder", "layer2"), ("decoder", "layer2"), ("stage", "final")]
    whole = backbone()
    assert network.backbone_macs == count_macs(whole, SAMPLE[:1])
    assert sum(cost.macs for cost in network.costs() if cost.kind == "stage") == network.backbone_macs
    assert sum(cost.params for cost in network.costs() if cost.kind == "stage") == count_params(whole)
    encoder = network.bottlenecks["layer2"].encoder
    convolutions = [m for m in encoder if isinstance(m, nn.Conv2d)]
    assert costs["encoder", "layer2"].macs == sum(m.weight.numel() * 16 * 16 for m in convolutions)
    assert network.training
    assert network.sizes("layer2") == {"input": 3 * 32 * 32, "feature": 4 * 32 * 16 * 16}
    replaced = split()
    assert replaced.backbone_macs == network.backbone_macs
    assert replaced.replaced_macs == costs["stage", "layer2"].macs
    assert [cost.kind for cost in replaced.costs()] == ["encoder", "decoder", "stage"]


@pytest.mark.parametrize(
    ("name", "at", "small"),
    [
        ("swin_tiny_patch4_window7_224", "layers.1", {"img_size": 64, "window_size": 4, "depths": (1, 1, 1)}),
        ("vit_tiny_patch16_224", "blocks.2", {"img_size": 64, "depth": 4}),
    ],
)
def test_transformers_take_an_inserted_bottleneck(name: str, at: str, small: dict[str, Any]) -> None:
    network = create_backbone("timm", name, num_classes=10, kwargs=small).network
    sample = torch.randn(1, 3, 64, 64)
    built = split_network(network, at, sample, form="insert", bottleneck={"channels": 6}).eval()
    assert built(sample).shape == (1, 10)
    shape = built.bottlenecks[at].shape
    assert (shape[0] if name.startswith("swin") else shape[-1]) == 6


def test_swin_maps_take_a_bottleneck_in_place_of_the_head() -> None:
    small = {"img_size": 64, "window_size": 4, "depths": (1, 1, 1)}
    network = create_backbone("timm", "swin_tiny_patch4_window7_224", num_classes=10, kwargs=small).network
    sample = torch.randn(1, 3, 64, 64)
    built = split_network(network, "layers.1", sample, bottleneck={"channels": 6}).eval()
    assert built.outputs(sample, at=["layers.1"])["layers.1"].shape == (1, 8, 8, 192)


def test_an_unknown_layer_lists_near_matches() -> None:
    with pytest.raises(CutError, match="layer2"):
        split(at="layer22")
    with pytest.raises(CutError, match="layer3"):
        split(cuts=["layer3"]).outputs(SAMPLE, at=["layer33"])


def test_bits_and_range_are_checked() -> None:
    for bits in (1, 17, 31):
        with pytest.raises(ValueError, match="bits"):
            split(codec={"bits": bits})
    with pytest.raises(ValueError, match="learned, observed, sample"):
        split(codec={"range": "fixed"})


# --- outputs ------------------------------------------------------------------------------------------------------


def test_the_names_of_every_output_are_known() -> None:
    own = ("layer2/z", "layer2/sent", "layer2/received", "layer2")
    assert split(cuts=["layer2", "layer3"]).emits == (*own, "layer3/input", "layer3", "logits")
    assert split(form="insert").emits == ("layer2/input", *own, "logits")
    stochastic = ("layer2/z", "layer2/mean", "layer2/log_variance", *own[1:])
    assert split(bottleneck={"variance": 0.1}).emits == (*stochastic, "logits")
    prior = ("layer2/z", "layer2/sent", "layer2/likelihoods", "layer2/received", "layer2")
    assert split(codec=entropy_codec).emits == (*prior, "logits")


def test_a_heads_output_may_be_given_in_place_of_images() -> None:
    network = split(form="insert", cuts=["layer3"]).eval()
    names = ["layer2/input", "layer2", "layer3", "logits"]
    whole = network.outputs(SAMPLE, names)
    network.stages[0].register_forward_hook(lambda *_: pytest.fail("the head ran"))
    alone = network.outputs(None, names, given={"layer2/input": whole["layer2/input"]})
    assert list(alone) == names
    assert all(torch.equal(alone[name], whole[name]) for name in names)


def test_likelihoods_are_those_of_what_is_decoded() -> None:
    network = split(codec=entropy_codec).train()
    bottleneck = network.bottlenecks["layer2"]
    torch.manual_seed(0)
    found = network.outputs(SAMPLE, ["layer2/likelihoods", "layer2"])
    torch.manual_seed(0)
    z_hat = bottleneck.quantizer(bottleneck.encoder(SAMPLE))
    assert torch.equal(found["layer2/likelihoods"], bottleneck.quantizer.likelihoods(z_hat))
    torch.testing.assert_close(found["layer2"], bottleneck.decoder(z_hat))
    assert list(network.outputs(SAMPLE, ["layer2/likelihoods"])) == ["layer2/likelihoods"]


def test_a_stochastic_encoder_samples_in_training_alone() -> None:
    network = split(bottleneck={"variance": "learned"}, codec={"bits": 32}).train()
    bottleneck = network.bottlenecks["layer2"]
    assert not torch.equal(*(network.outputs(SAMPLE, ["layer2/z"])["layer2/z"] for _ in range(2)))
    network.eval()
    found = network.outputs(SAMPLE, ["layer2/z", "layer2/mean", "layer2/log_variance", "layer2"])
    assert torch.equal(found["layer2/mean"], found["layer2/z"])
    assert torch.equal(bottleneck.device_encoder()(SAMPLE), found["layer2/mean"])
    assert torch.equal(found["layer2"], bottleneck.decoder(found["layer2/mean"]))
    assert found["layer2/log_variance"].shape == found["layer2/mean"].shape
    assert not any("log_variance" in name for name, _ in bottleneck.device_encoder().named_parameters())


def test_in_eval_mode_a_variance_that_nobody_asks_for_is_not_computed() -> None:
    network = split(bottleneck={"variance": "learned"}).eval()
    ran: list[int] = []
    network.bottlenecks["layer2"].encoder.log_variance.register_forward_hook(lambda *_: ran.append(1))
    network.outputs(SAMPLE, ["layer2", "layer2/z"])
    assert not ran
    network.outputs(SAMPLE, ["layer2/log_variance"])
    assert ran


class InPlace(nn.Module):
    """A tail that begins by writing over the feature it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.act = nn.ReLU(inplace=True)
        self.body = nn.Conv2d(8, 8, 3, padding=1)
        self.end = nn.Sequential(nn.ReLU(inplace=True), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 10))

    def forward(self, x: Tensor) -> Tensor:
        return self.end(self.body(self.act(self.stem(x))))


@pytest.mark.parametrize("form", ["replace", "insert"])
def test_a_tail_that_works_in_place_does_not_reach_what_was_returned(form: str) -> None:
    network = split_network(InPlace(), "stem", SAMPLE, form=form, cuts=["body"]).eval()
    found = network.outputs(SAMPLE, ["stem", "body", "logits"])
    x = SAMPLE if form == "replace" else network.stages[0](SAMPLE)
    assert torch.equal(found["stem"], network.bottlenecks["stem"](x))
    assert torch.equal(found["body"], network.stages[1](found["stem"].clone()))
    assert min(found[name].min() for name in ("stem", "body")) < 0
    assert torch.equal(found["logits"], network(SAMPLE))


# --- no bottleneck ------------------------------------------------------------------------------------------------


def test_without_a_bottleneck_the_feature_itself_is_sent() -> None:
    original = backbone()
    network = split_network(original, "layer2", SAMPLE, form="none", codec={"bits": 32}).eval()
    assert network.bottlenecks["layer2"].shape == network.shapes["layer2"] == (32, 16, 16)
    assert torch.equal(network(SAMPLE), original.eval()(SAMPLE))
    assert {len(payload) for payload in through_bytes(network)[1]} == {network.sizes("layer2")["feature"]}
    assert [(c.macs, c.params) for c in network.costs() if c.kind == "encoder"] == [(0, 0)]
    with pytest.raises(ValueError, match="form=none sends the feature itself; leave bottleneck None"):
        split(form="none", bottleneck={"channels": 4})


def test_calibration_gives_a_range_to_what_was_trained_in_float() -> None:
    network = split(form="none", codec={"bits": 32}).train()
    images = torch.randn(8, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    modes = [module.training for module in network.modules()]
    before = {name: value.clone() for name, value in network.state_dict().items()}
    low, high = network.calibrate(images.split(4), at="layer2", bits=4)
    network.eval()
    representations = [network.outputs(part, ["layer2/z"])["layer2/z"] for part in images.split(4)]
    assert (low, high) == calibrate_range(representations, 4)
    quantizer = network.bottlenecks["layer2"].quantizer
    assert isinstance(quantizer, UniformQuantizer)
    assert quantizer.fixed_range == (low, high)
    assert network.bits() == network.bits("layer2") == 4
    assert all(torch.equal(network.state_dict()[name], value) for name, value in before.items())
    network = split(form="none", codec={"bits": 32}).train()
    network.calibrate([images], at="layer2", bits=4)
    assert [module.training for module in network.modules()] == modes
    network.eval()
    torch.testing.assert_close(through_bytes(network, images)[0], network(images), atol=0, rtol=0)


def test_calibration_keeps_the_coding_and_the_widths_of_codes() -> None:
    network = split(codec={"bits": 4, "coding": "sparse", "widths": [2, 4]}).eval()
    network.calibrate([SAMPLE], at="layer2", bits=3, method="minmax")
    bottleneck = network.bottlenecks["layer2"]
    assert (network.bits(), bottleneck.widths, bottleneck.codec.kind) == (3, (2, 4), "sparse")
    z = network.outputs(SAMPLE, ["layer2/z"])["layer2/z"]
    assert bottleneck.quantizer.fixed_range == (z.min().item(), z.max().item())
    network.set_channel(BitErrors(0.1))
    network.calibrate([SAMPLE], at="layer2", bits=4)
    with pytest.raises(CodecError, match="bits=4: a learned prior has no width"):
        split(codec=entropy_codec).calibrate([SAMPLE], at="layer2", bits=4)


# --- codecs, widths and links -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("codec", "message"),
    [
        ({"coding": "tiled_pgn"}, "Did you mean 'tiled_png'"),
        ({"bits": 12, "coding": "tiled_png"}, "bits must be 2 to 8"),
        ({"bits": 32, "coding": "sparse"}, "coding=sparse codes integers, but bits=32"),
        ({"coding": "packed", "quality": 50}, "quality=50 has no meaning"),
        ({"coding": "tiled_jpeg"}, "quality"),
        ({"bits": 32, "range": "fixed"}, "range must be one of"),
        ({"widths": [2, 4]}, r"bits=8 must be one of widths=\[2, 4\]"),
        ({"bits": 32, "widths": [2, 4]}, r"bits=32 must be one of widths=\[2, 4\]"),
        ({"bits": 4, "widths": [4]}, "two or more different widths"),
    ],
)
def test_what_cannot_be_coded_is_refused_when_the_network_is_built(codec: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        split(codec=codec)


def test_unknown_arguments_of_codec_and_bottleneck_are_named() -> None:
    for settings in ({"codec": {"bitz": 4}}, {"bottleneck": {"chanels": 4}}):
        with pytest.raises(TypeError, match="bitz|chanels"):
            split(**settings)


def test_a_learned_prior_has_no_width() -> None:
    network = split(codec=entropy_codec)
    with pytest.raises(CodecError, match="a learned prior has no width"):
        network.set_bits(4)


def test_a_network_of_several_widths_has_no_float() -> None:
    with pytest.raises(ValueError, match=r"bits=32: .* was trained for widths=\[2, 4\] and has no BatchNorm"):
        split(codec={"bits": 4, "widths": [4, 2]}).set_bits(32)


def test_every_part_of_a_switchable_network_runs_at_the_networks_width() -> None:
    network = split(codec={"bits": 4, "widths": [4, 2]}).train()
    assert network.widths == {"layer2": (2, 4)}
    for bits in (2, 4):
        network.set_bits(bits)
        for _ in range(3):
            network(SAMPLE)
    norms = {name for name in network.state_dict() if ".sets." in name and "num_batches_tracked" in name}
    assert {name.split(".")[0] for name in norms} == {"at:layer2", "layer3"}
    assert all(".decoder." in name for name in norms if name.startswith("at:"))
    assert {network.state_dict()[name].item() for name in norms} == {3}
    network.eval()
    outputs = {}
    for bits in (2, 4):
        network.set_bits(bits)
        outputs[bits] = network(SAMPLE)
        torch.testing.assert_close(through_bytes(network)[0], outputs[bits], atol=0, rtol=0)
    network.set_bits(2)
    assert torch.equal(network(SAMPLE), outputs[2])
    assert not torch.equal(outputs[2], outputs[4])


@pytest.mark.parametrize("when", ["train", "eval", "always", "never"])
def test_the_link_stands_between_quantizer_and_decoder(when: str) -> None:
    channel = PacketLoss(0.5, packet_bytes=16, when=when)
    network = split(channel=channel).train()
    bottleneck = network.bottlenecks["layer2"]
    assert bottleneck.channel is not channel  # each network's own
    network(SAMPLE)
    for mode in ("train", "eval"):
        network.train(mode == "train")
        torch.manual_seed(0)
        found = network.outputs(SAMPLE, ["layer2", "layer2/received"])
        torch.manual_seed(0)
        z_hat = bottleneck.quantizer(bottleneck.encoder(SAMPLE))
        arrived = bottleneck.channel(z_hat, bottleneck.quantizer)
        assert torch.equal(arrived, z_hat) == (when not in (mode, "always"))
        torch.testing.assert_close(found["layer2/received"], arrived, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(found["layer2"], bottleneck.decoder(arrived), atol=1e-5, rtol=1e-5)
    # The server, too, gets what the link has left over.
    torch.manual_seed(0)
    logits = through_bytes(network)[0]
    network.set_channel(None)
    assert bottleneck.channel is None
    assert torch.equal(through_bytes(network)[0], logits) == (when in ("train", "never"))


def test_a_link_that_cannot_carry_the_codes_is_refused_when_the_network_is_built() -> None:
    for codec, channel, words in (
        ({"bits": 32}, BitErrors(0.1), "bit errors"),
        (entropy_codec, BitErrors(0.1), "bit errors"),
        (entropy_codec, PacketLoss(0.1, packet_bytes=32), "packet_bytes=32 needs codes of a fixed width"),
        ({"bits": 16}, PacketLoss(0.1, packet_bytes=1), "packet_bytes=1 is too short"),
    ):
        with pytest.raises(ValueError, match=words):
            split(codec=codec, channel=channel)
    network = split(codec={"bits": 32})
    with pytest.raises(ValueError, match="bit errors"):
        network.set_channel(BitErrors(0.1))
    assert network.bottlenecks["layer2"].channel is None


@pytest.mark.parametrize("kind", ["observed", "learned", "sample"])
def test_codes_whose_range_nobody_has_measured_are_refused(kind: str) -> None:
    bottleneck = split(codec={"bits": 4, "range": kind}).bottlenecks["layer2"]
    if kind != "sample":
        with pytest.raises(ValueError, match=f"range={kind} is measured in training"):
            bottleneck.check_measured()
        bottleneck = measured(codec={"bits": 4, "range": kind}).bottlenecks["layer2"]
    bottleneck.check_measured()


@pytest.mark.parametrize(
    ("settings", "error", "words"),
    [
        ({"cuts": ["layer1"]}, CutError, r"\(layer1\) must stand behind the split at 'layer2'"),
        ({"form": "inject"}, ValueError, "form must be one of replace, insert or none, got 'inject'"),
        ({"at": ["layer2", "layer2"]}, CutError, "split names 'layer2' twice"),
        ({"at": "layer3.0.conv1"}, CutError, "crossed by 2 tensors"),
        ({"cuts": "layer3"}, ValueError, r"got the string 'layer3'; write cuts=\['layer3'\]"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        split(**settings)
