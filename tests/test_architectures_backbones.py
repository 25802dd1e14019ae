import logging
from urllib.error import URLError

import numpy as np
import pytest
import timm
import torch
import torchvision
from PIL import Image

from cleave.architectures.backbones import Backbone, create_backbone
from cleave.architectures.backbones.weights import WeightsError
from cleave.architectures.backbones.zoo import CIFAR_NETWORKS, CifarResNet

PICTURE = Image.fromarray(np.random.default_rng(0).integers(0, 256, (301, 420, 3), dtype=np.uint8))


def run(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return backbone.network.eval()(torch.randn(batch, *backbone.input.shape))


# --- sources -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", CIFAR_NETWORKS)
def test_cifar(name):
    backbone = create_backbone("cifar", name, 7)
    assert run(backbone).shape == (2, 7)
    assert backbone.input.shape == (3, 32, 32)
    assert backbone.input.resize is None
    assert (backbone.pretrained, backbone.reinitialised) == (None, ())
    assert backbone.network.get_submodule(backbone.classifier[0]).weight.shape[0] == 7


HUBS = [
    ("timm", "resnet18", {"drop_path_rate": 0.1}),
    ("timm", "vit_tiny_patch16_224", {"img_size": 32}),
    ("timm", "resnet18.tv_in1k", {}),
    ("torchvision", "resnet18", {}),
    ("torchvision", "squeezenet1_1", {"dropout": 0.1}),
    ("torchvision", "vit_b_32", {"image_size": 64}),
]


@pytest.mark.parametrize(
    ("source", "name", "kwargs", "in_channels"),
    [  # grey and colour by turns in `make test`
        pytest.param(*hub, channels, marks=[pytest.mark.slow] * (channels != (1, 3)[number % 2]))
        for number, hub in enumerate(HUBS)
        for channels in (1, 3)
    ],
)
def test_hubs_build_without_network(source, name, kwargs, in_channels):
    backbone = create_backbone(source, name, 6, in_channels=in_channels, kwargs=kwargs)
    assert backbone.network.training
    assert backbone.input.channels == in_channels
    assert run(backbone, 1).shape == (1, 6)
    assert backbone.pretrained is None


def test_constructor_arguments_are_passed_on():
    rates = [
        m.drop_prob
        for m in create_backbone("timm", "resnet18", 4, kwargs={"drop_path_rate": 0.1}).network.modules()
        if isinstance(m, timm.layers.DropPath)
    ]
    assert max(rates) == pytest.approx(0.1)
    assert create_backbone("cifar", "vgg11_bn", 4, kwargs={"dropout": 0.3}).network.dropout.p == 0.3


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0", "swin_t", "vit_b_16", "inception_v3"])
def test_torchvision_input_is_the_presets(name):
    weights = torchvision.models.get_model_weights(name).DEFAULT
    backbone = create_backbone("torchvision", name, 3)
    preset = weights.transforms()
    cropped = preset(PICTURE) * torch.tensor(preset.std).view(3, 1, 1) + torch.tensor(preset.mean).view(3, 1, 1)
    assert torch.equal(backbone.input(PICTURE), (cropped * 255).round().to(torch.uint8))
    if name != "inception_v3":
        torch.testing.assert_close(backbone.input.normalize(backbone.input(PICTURE)), preset(PICTURE))


@pytest.mark.parametrize(
    "name", ["resnet18.a1_in1k", "resnet18.tv_in1k", "vit_tiny_patch16_224", "convnext_atto", "swinv2_cr_tiny_ns_224"]
)
def test_timm_input_is_its_evaluation_transform(name):
    backbone = create_backbone("timm", name, 3)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(backbone.network), is_training=False)
    torch.testing.assert_close(backbone.input.normalize(backbone.input(PICTURE)), transform(PICTURE))


def test_timm_squash_without_crop_resizes_straight(monkeypatch):
    config = {"input_size": (3, 48, 48), "crop_pct": 1.0, "crop_mode": "squash", "interpolation": "bicubic"}
    config |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr("cleave.architectures.backbones.inputs.resolve_model_data_config", lambda network: config)
    spec = create_backbone("timm", "resnet18", 3).input
    transform = timm.data.create_transform(**config, is_training=False)
    torch.testing.assert_close(spec.normalize(spec(PICTURE)), transform(PICTURE))


@pytest.mark.parametrize("config", [{"crop_mode": "border"}, {"crop_pct": 1.15}, {"crop_mode": "squash"}])
def test_timm_evaluation_without_counterpart_is_said(monkeypatch, caplog, config):
    base = {"input_size": (3, 64, 64), "crop_pct": 0.9, "crop_mode": "center", "interpolation": "bicubic"}
    base |= {"mean": (0.5,) * 3, "std": (0.5,) * 3}
    monkeypatch.setattr(
        "cleave.architectures.backbones.inputs.resolve_model_data_config", lambda network: base | config
    )
    with caplog.at_level(logging.WARNING, logger="cleave.architectures.backbones.inputs"):
        spec = create_backbone("timm", "resnet18", 3).input
    assert "timm evaluates resnet18 with" in caplog.text
    assert spec(PICTURE).shape == (3, 64, 64)


@pytest.mark.parametrize("name", ["googlenet", "inception_v3"])
def test_transform_input_is_moved_into_the_input(name):
    torch.manual_seed(0)
    backbone = create_backbone("torchvision", name, 3)
    network = backbone.network.eval().double()
    images = torch.randint(0, 256, (2, 3, 96, 96))
    mean, std = torch.tensor([[0.485, 0.456, 0.406], [0.229, 0.224, 0.225]]).double().view(2, 3, 1, 1)
    shift, scale = (torch.tensor(value).double().view(3, 1, 1) for value in (backbone.input.mean, backbone.input.std))
    with torch.no_grad():
        ours = network((images / 255.0 - shift) / scale)
        network.transform_input = True
        theirs = network((images / 255.0 - mean) / std)
    torch.testing.assert_close(ours, theirs, atol=0, rtol=1e-5)
    assert not [key for key in network.state_dict() if "aux" in key.lower()]


# --- input -------------------------------------------------------------------------------------------------------


def test_grey_statistics_are_averaged():
    spec = create_backbone("cifar", "resnet20", 10, in_channels=1).input
    assert spec.color_mode == "L"
    assert spec.mean == pytest.approx([0.449], abs=1e-3)
    assert spec.std == pytest.approx([0.226], abs=1e-3)


def test_input_overrides_scale_the_resize():
    spec = create_backbone("torchvision", "resnet18", 5, image_input={"height": 112, "width": 112}).input
    assert (spec.height, spec.resize) == (112, 128)  # the preset resizes to 256 for 224
    spec = create_backbone("timm", "resnet18", 5, image_input={"height": 64, "width": 64, "resize": None}).input
    assert (spec.height, spec.width, spec.resize) == (64, 64, None)
    spec = create_backbone("timm", "vit_tiny_patch16_224", 5, kwargs={"img_size": 64}).input
    assert (spec.height, spec.width, spec.resize) == (64, 64, 71)  # timm crops 90 %
    spec = create_backbone("cifar", "resnet20", 5, image_input={"mean": [0.5] * 3}).input
    assert spec.mean == (0.5, 0.5, 0.5)


@pytest.mark.parametrize(
    ("image_input", "message"),
    [
        ({"hight": 3}, "no field 'hight'.*height"),
        ({"color_mode": "L", "mean": [0.5], "std": [0.5]}, "color_mode='L' has 1 channels, not 3"),
        ({"height": 0}, "height must be"),
    ],
)
def test_bad_input_overrides(image_input, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("cifar", "resnet20", 5, image_input=image_input)


def test_torchvision_vit_is_built_for_the_size_of_its_default_weights():
    with torch.device("meta"):  # 632 million parameters
        backbone = create_backbone("torchvision", "vit_h_14", 5)
    assert backbone.network.image_size == backbone.input.height == 518


# --- hub weights -------------------------------------------------------------------------------------------------


def test_torchvision_hub_weights_keep_all_but_the_classifier(monkeypatch):
    hub = torchvision.models.resnet18()
    monkeypatch.setattr("torchvision.models._api.WeightsEnum.get_state_dict", lambda self, **kwargs: hub.state_dict())
    backbone = create_backbone("torchvision", "resnet18", 5, pretrained=True)
    assert backbone.pretrained == "torchvision ResNet18_Weights.IMAGENET1K_V1"
    assert backbone.reinitialised == ("fc.weight", "fc.bias")
    found = backbone.network.state_dict()
    assert all(torch.equal(found[k], v) for k, v in hub.state_dict().items() if not k.startswith("fc."))
    assert found["fc.weight"].shape == (5, 512)
    whole = create_backbone("torchvision", "resnet18", 1000, pretrained="IMAGENET1K_V1")
    assert whole.reinitialised == ()
    assert torch.equal(whole.network.fc.weight, hub.fc.weight)


def test_timm_hub_weights_keep_all_but_the_classifier(monkeypatch):
    hub = timm.create_model("resnet18")
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", lambda *a, **k: dict(hub.state_dict()))
    backbone = create_backbone("timm", "resnet18.a1_in1k", 5, pretrained=True)
    assert backbone.pretrained == "timm resnet18.a1_in1k"
    assert backbone.reinitialised == ("fc.weight", "fc.bias")
    assert torch.equal(backbone.network.layer4[1].conv2.weight, hub.layer4[1].conv2.weight)
    assert create_backbone("timm", "resnet18", 1000, pretrained=True).reinitialised == ()
    grey = create_backbone("timm", "resnet18", 5, pretrained=True, in_channels=1).network
    torch.testing.assert_close(grey.conv1.weight, hub.conv1.weight.sum(1, keepdim=True))


def offline(*args: object, **kwargs: object) -> None:
    raise URLError("Name or service not known")


@pytest.mark.parametrize("source", ["timm", "torchvision"])
def test_failed_download_is_one_clear_error(monkeypatch, source):
    monkeypatch.setattr("timm.models._builder.load_state_dict_from_hf", offline)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", offline)
    with pytest.raises(WeightsError, match=rf"{source} 'resnet18' could not be downloaded.*backbone\.weights=FILE"):
        create_backbone(source, "resnet18", 5, pretrained=True)


# --- local weights -----------------------------------------------------------------------------------------------


def test_local_weights_for_other_classes_and_grey_images(tmp_path):
    source = CifarResNet(20)
    state = {f"module.{key}": value for key, value in source.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.th")
    backbone = create_backbone("cifar", "resnet20", 4, weights=tmp_path / "w.th", in_channels=1)
    assert backbone.pretrained == str(tmp_path / "w.th")
    assert backbone.reinitialised == ("linear.weight", "linear.bias")
    assert torch.equal(backbone.network.layer3[2].conv2.weight, source.layer3[2].conv2.weight)
    torch.testing.assert_close(backbone.network.conv1.weight, source.conv1.weight.sum(1, keepdim=True))


def test_local_weights_of_another_architecture(tmp_path):
    torch.save(CifarResNet(32).state_dict(), tmp_path / "w.th")
    with pytest.raises(
        WeightsError, match=r"w\.th is not a checkpoint of cifar resnet20.*\n  \d+ unexpected: layer1\.3"
    ):
        create_backbone("cifar", "resnet20", 10, weights=tmp_path / "w.th")


def test_torchvisions_own_files_load(tmp_path):
    """GoogLeNet's files hold auxiliary heads, DenseNet's the module names of old versions."""
    file = tmp_path / "w.pth"
    source = torchvision.models.densenet121(num_classes=1000)
    old = {k.replace(".norm1.", ".norm.1.").replace(".norm2.", ".norm.2."): v for k, v in source.state_dict().items()}
    old = {k.replace(".conv1.", ".conv.1.").replace(".conv2.", ".conv.2."): v for k, v in old.items()}
    torch.save(old, file)
    backbone = create_backbone("torchvision", "densenet121", 5, weights=file)
    assert backbone.reinitialised == ("classifier.weight", "classifier.bias")
    assert torch.equal(
        backbone.network.features.denseblock1.denselayer1.conv2.weight,
        source.features.denseblock1.denselayer1.conv2.weight,
    )
    source = torchvision.models.GoogLeNet(init_weights=False)
    torch.save(source.state_dict(), file)
    assert create_backbone("torchvision", "googlenet", 1000, weights=file).reinitialised == ()


def test_timm_distilled_classifiers_are_both_replaced(tmp_path):
    options = {"embed_dim": 24, "depth": 1, "num_heads": 1, "img_size": 32}
    source = timm.create_model("deit_tiny_distilled_patch16_224", num_classes=9, **options)
    torch.save(source.state_dict(), tmp_path / "w.pt")
    backbone = create_backbone("timm", "deit_tiny_distilled_patch16_224", 5, kwargs=options, weights=tmp_path / "w.pt")
    assert set(backbone.reinitialised) == {"head.weight", "head.bias", "head_dist.weight", "head_dist.bias"}


# --- mistakes ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "options", "message"),
    [
        (("tim", "resnet18", 10), {}, "source must be one of timm, .*'timm'"),
        (("timm", "resnet81", 10), {}, "timm has no model 'resnet81'.*'resnet18'"),
        (("torchvision", "resnet81", 10), {}, "no classification model 'resnet81'.*'resnet18'"),
        (("torchvision", "fcn_resnet50", 10), {}, "no classification model 'fcn_resnet50'"),
        (("cifar", "resnet21", 10), {}, "cifar has no network 'resnet21'.*'resnet20'"),
        (("timm", "resnet18.a9_in1k", 10), {}, "timm has no weights 'resnet18.a9_in1k'; .*resnet18.a1_in1k"),
        (("timm", "resnet18", 10), {"pretrained": "a1_in1k"}, "name='resnet18.a1_in1k' with pretrained=true"),
        (("timm", "cspresnet50d", 10), {"pretrained": True}, "no weights to download for 'cspresnet50d'"),
        (("torchvision", "resnet18", 10), {"pretrained": "V9"}, "no weights 'V9' for resnet18; known: IMAGENET1K_V1"),
        (("torchvision", "vit_b_16", 10), {"pretrained": "IMAGENET1K_SWAG_E2E_V1"}, r"give kwargs\.image_size=384 too"),
        (("cifar", "resnet20", 10), {"pretrained": True}, "'cifar' has no weights to download"),
        (("cifar", "resnet20", 10), {"network": CifarResNet}, "network is a constructor for source 'custom'"),
        (("timm", "resnet18", 10), {"pretrained": True, "weights": "w.pt"}, "either pretrained=True or weights='w.pt'"),
        (("cifar", "resnet20", 1), {}, "num_classes must be a whole number of at least 2, got 1"),
        (("cifar", "resnet20", 2.5), {}, "num_classes must be a whole number"),
        (("cifar", "resnet20", 10), {"in_channels": 4}, r"in_channels must be 3 \(RGB\) or 1"),
        (("cifar", "resnet20", 10), {"weights": "nowhere.pt"}, r"no weights file at nowhere\.pt"),
        (("cifar", "resnet20", 10), {"kwargs": {"dropout": 1}}, "cifar 'resnet20' cannot be built with {'dropout': 1}"),
        (("timm", "resnet18", 10), {"kwargs": {"img_size": 32}}, "timm 'resnet18' cannot be built with"),
        (("torchvision", "resnet18", 10), {"kwargs": {"depth": 3}}, "torchvision 'resnet18' cannot be built with"),
    ],
)
def test_mistakes_are_named(arguments, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone(*arguments, **options)
