import pytest
import torch
import torchvision
from torch import nn

from cleave.architectures.backbones.surgery import (
    find_classifier,
    find_input_convolution,
    replace_classifier,
    use_grey_input,
)

TORCHVISION = torchvision.models.list_models(module=torchvision.models)
NAMES = [name for name in TORCHVISION if not name.startswith("regnet")] + ["regnet_y_400mf"]
# Of each family the first; the others differ in size.
FAMILIES = {torchvision.models.get_model_builder(name).__module__: name for name in reversed(NAMES)}


@pytest.mark.parametrize("name", FAMILIES.values())
def test_torchvision_classifier_and_input_are_found(name):
    check_classifier_and_input(name)


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in NAMES if name not in FAMILIES.values()])
def test_torchvision_classifier_and_input_are_found_at_every_size(name):
    check_classifier_and_input(name)


def check_classifier_and_input(name):
    options = {"aux_logits": False, "init_weights": False} if name in ("googlenet", "inception_v3") else {}
    # RegNets compute their widths with tensors, so they cannot be built without data.
    with torch.device("cpu" if name.startswith("regnet") else "meta"):
        five, seven = (torchvision.models.get_model(name, num_classes=n, **options) for n in (5, 7))
        classifier = find_classifier(five, 5)
        shapes = {key: value.shape for key, value in seven.state_dict().items()}
        differing = {key.rpartition(".")[0] for key, value in five.state_dict().items() if value.shape != shapes[key]}
        assert differing == {classifier}
        replace_classifier(five, classifier, 7)
        assert {key: value.shape for key, value in five.state_dict().items()} == shapes
        name = find_input_convolution(five)
        colours = five.get_submodule(name).weight
        assert colours.shape[1] == 3
        use_grey_input(five)
        assert five.get_submodule(name).weight.shape == (colours.shape[0], 1, *colours.shape[2:])


def test_grey_input_gives_the_same_response():
    network = torchvision.models.resnet18(num_classes=3).eval()
    grey = torch.randn(2, 1, 40, 40)
    with torch.no_grad():
        expected = network(grey.expand(-1, 3, -1, -1))
        use_grey_input(network)
        torch.testing.assert_close(network(grey), expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(ValueError, match="no RGB input convolution"):
        use_grey_input(network)


def test_replace_classifier_refuses_other_layers():
    with pytest.raises(ValueError, match="'0' is ReLU"):
        replace_classifier(nn.Sequential(nn.ReLU()), "0", 3)
    assert find_classifier(nn.Sequential(nn.ReLU())) is None
    assert find_input_convolution(nn.Sequential(nn.Conv2d(16, 4, 1))) is None
