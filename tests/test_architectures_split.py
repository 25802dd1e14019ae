import copy
import pickle

import pytest
import torch
from torch import nn

from architectures import CutError, DevicePart, SplitNetwork, create_backbone, cut, profile
from architectures.quantizer import Unquantized
from deployment import ImageInput

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
