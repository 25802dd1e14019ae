import copy
import io
from collections.abc import Iterable

import pytest
import torch
import torchvision
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from cleave.architectures.backbones.zoo import CIFAR_NETWORKS, CifarMobileNet, CifarResNet, CifarVGG
from cleave.architectures.backbones.zoo.resnet import SubsampleShortcut


def deep_slow(names: Iterable[str]) -> list[object]:
    """Names of networks, of which the deepest, a ResNet as the others are, is tried by `make test-full` alone."""
    return [pytest.param(name, marks=[pytest.mark.slow] * (name == "resnet110")) for name in sorted(names)]


def count(network: nn.Module) -> int:
    return sum(p.numel() for p in network.parameters())


def macs(network: nn.Module, pixels: int = 32) -> int:
    counter = FlopCounterMode(display=False)
    with counter, torch.no_grad():
        network.eval()(torch.zeros(1, 3, pixels, pixels))
    return counter.get_total_flops() // 2


def resnet_key_shapes(blocks: int, num_classes: int) -> dict[str, tuple[int, ...]]:
    """Keys of the public CIFAR ResNet files, written out from the paper's table, without BatchNorm's counters."""

    def norm(name: str, channels: int) -> dict[str, tuple[int, ...]]:
        return {f"{name}.{part}": (channels,) for part in ("weight", "bias", "running_mean", "running_var")}

    shapes: dict[str, tuple[int, ...]] = {"conv1.weight": (16, 3, 3, 3), **norm("bn1", 16)}
    previous = 16
    for stage, channels in enumerate((16, 32, 64), start=1):
        for block in range(blocks):
            at = f"layer{stage}.{block}"
            shapes |= {f"{at}.conv1.weight": (channels, previous, 3, 3), **norm(f"{at}.bn1", channels)}
            shapes |= {f"{at}.conv2.weight": (channels, channels, 3, 3), **norm(f"{at}.bn2", channels)}
            previous = channels
    return shapes | {"linear.weight": (num_classes, 64), "linear.bias": (num_classes,)}


@pytest.mark.parametrize(
    ("name", "millions", "exact"),
    [  # He et al. 2016, table 6, and the counts printed by the public implementation whose files we load
        ("resnet20", 0.27, 269_722),
        ("resnet32", 0.46, 464_154),
        ("resnet44", 0.66, 658_586),
        ("resnet56", 0.85, 853_018),
        ("resnet110", 1.7, 1_727_962),
    ],
)
def test_resnet_parameters_match_the_paper(name, millions, exact):
    found = count(CIFAR_NETWORKS[name](num_classes=10))
    assert found == exact
    assert found / 1e6 == pytest.approx(millions, rel=0.02)


def test_resnet20_macs():
    per_stage = [1024 * 144 * 16 * 6, 256 * 144 * 32 + 256 * 288 * 32 * 5, 64 * 288 * 64 + 64 * 576 * 64 * 5]
    assert macs(CIFAR_NETWORKS["resnet20"]()) == 1024 * 27 * 16 + sum(per_stage) + 640
    assert macs(CIFAR_NETWORKS["resnet20"]()) == pytest.approx(40.8e6, rel=0.01)


@pytest.mark.parametrize(("name", "blocks"), [("resnet20", 3), ("resnet32", 5)])
def test_resnet_loads_the_public_keys_strictly(name, blocks):
    state = {key: torch.randn(shape) for key, shape in resnet_key_shapes(blocks, 10).items()}
    network = CIFAR_NETWORKS[name](num_classes=10)
    network.load_state_dict(state, strict=True)
    assert torch.equal(network.layer2[0].conv1.weight, state["layer2.0.conv1.weight"])


@pytest.mark.parametrize("size", [(8, 8), (7, 5)])
def test_option_a_shortcut_subsamples_and_pads(size):
    x = torch.randn(2, 16, *size)
    out = SubsampleShortcut(16)(x)
    strided = nn.functional.conv2d(x, torch.eye(16)[:, :, None, None], stride=2)
    assert out.shape == (2, 32, *strided.shape[2:])
    assert torch.equal(out[:, 8:24], strided)
    assert not out[:, :8].any()
    assert not out[:, 24:].any()


def test_resnet_block_adds_the_shortcut_to_the_residual():
    block = CifarResNet(8).layer2[0].eval()
    with torch.no_grad():
        block.bn2.weight.zero_()  # leaves the shortcut alone
        x = torch.randn(1, 16, 8, 8)
        assert torch.equal(block(x), block.shortcut(x).relu())


def test_mobilenet_sizes_match_the_paper():
    # Howard et al. 2017, table 6: ImageNet's 1000 classes
    for width, millions in ((1.0, 4.2), (0.75, 2.6), (0.5, 1.3), (0.25, 0.5)):
        assert count(CifarMobileNet(1000, width=width)) / 1e6 == pytest.approx(millions, abs=0.06)
    assert count(CifarMobileNet(10)) == 3_217_226


@pytest.mark.parametrize(("name", "exact"), [("vgg11_bn", 9_231_114), ("vgg16_bn", 14_728_266)])
def test_vgg_convolutions_are_the_published_ones(name, exact):
    with torch.device("meta"):
        ours, theirs = CIFAR_NETWORKS[name](), torchvision.models.get_model(name)
    assert {k: v.shape for k, v in ours.features.state_dict().items()} == {
        k: v.shape for k, v in theirs.features.state_dict().items()
    }
    assert count(ours) == exact


def test_alexnet_convolutions_are_the_published_ones():
    with torch.device("meta"):
        ours, theirs = CIFAR_NETWORKS["alexnet"](), torchvision.models.alexnet()
    shapes = [[m.weight.shape for m in net.modules() if isinstance(m, nn.Conv2d)] for net in (ours, theirs)]
    assert shapes[0][1:] == shapes[1][1:]
    assert shapes[0][0] == (64, 3, 5, 5)


@pytest.mark.parametrize("name", deep_slow(CIFAR_NETWORKS))
@pytest.mark.parametrize("pixels", [8, 15, 32, 64])
def test_takes_any_image_size(name, pixels):
    network = CIFAR_NETWORKS[name](num_classes=7, in_channels=1).eval()
    with torch.no_grad():
        assert network(torch.randn(2, 1, pixels, pixels)).shape == (2, 7)


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_traces_copies_and_pickles(name):
    network = CIFAR_NETWORKS[name]().eval()
    x = torch.randn(3, 3, 16, 16)
    buffer = io.BytesIO()
    torch.save(network, buffer)
    buffer.seek(0)
    with torch.no_grad():
        expected = network(x)
        assert torch.equal(torch.fx.symbolic_trace(network)(x), expected)
        assert torch.equal(copy.deepcopy(network)(x), expected)
        assert torch.equal(torch.load(buffer, weights_only=False)(x), expected)


@pytest.mark.parametrize("name", deep_slow(CIFAR_NETWORKS.keys() - {"resnet32", "resnet44", "resnet56"}))
# torch deprecates TorchScript, which devices still run
@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning", "ignore:.*torch.jit:FutureWarning")
def test_torchscript_at_another_batch_size(name):
    network = CIFAR_NETWORKS[name]().eval()
    traced = torch.jit.trace(network, torch.randn(2, 3, 16, 16))
    x = torch.randn(5, 3, 16, 16)
    with torch.no_grad():
        torch.testing.assert_close(traced(x), network(x))


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_every_parameter_learns(name):
    torch.manual_seed(0)
    network = CIFAR_NETWORKS[name]()
    nn.functional.cross_entropy(network(torch.randn(4, 3, 16, 16)), torch.tensor([0, 1, 2, 3])).backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []
    assert not any(getattr(module, "inplace", False) for module in network.modules())


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: CifarResNet(21), "depth must be 6n"),
        (lambda: CifarResNet(2), "depth must be 6n"),
        (lambda: CifarVGG(12), "depth must be one of"),
        (lambda: CifarMobileNet(width=0), "width must be positive"),
    ],
)
def test_refuses_sizes_that_do_not_exist(build, message):
    with pytest.raises(ValueError, match=message):
        build()


def test_a_width_scales_every_convolution_of_alexnet():
    whole, half = (CIFAR_NETWORKS["alexnet"](width=width) for width in (1.0, 0.5))
    channels = [[m.out_channels for m in n.modules() if isinstance(m, nn.Conv2d)] for n in (whole, half)]
    assert channels == [[64, 192, 384, 256, 256], [32, 96, 192, 128, 128]]
    assert macs(whole) / macs(half) == pytest.approx(4, rel=0.05)
    assert CIFAR_NETWORKS["alexnet"](width=0.001)(torch.zeros(2, 3, 8, 8)).shape == (2, 10)
    for width in (0, -1.0, float("nan"), float("inf"), True, "2"):
        with pytest.raises(ValueError, match="width must be a positive number, got"):
            CIFAR_NETWORKS["alexnet"](width=width)
