"""Backbones from any importable class, and all sources through their Hydra configs."""

from pathlib import Path

import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.utils import instantiate
from torch import nn

from cleave.architectures.backbones import Backbone, create_backbone
from cleave.architectures.backbones.zoo import CifarResNet

CONFIG = str(Path(__file__).parents[1] / "conf")
CUSTOM = """
from torch import nn

class Net(nn.Module):
    def __init__(self, num_classes, in_channels=3, width=4):
        super().__init__()
        self.stem = nn.Conv2d(in_channels, width, 3)
        self.head = nn.Linear(width, num_classes)
        self.stem.eval()

    def forward(self, x):
        return self.head(self.stem(x).mean((2, 3)))

class Fixed(nn.Module):
    def __init__(self, **kwargs):
        super().__init__()
        self.net = Net(5)

    def forward(self, x):
        return self.net(x)

class Pair(Net):
    def forward(self, x):
        return super().forward(x), x

class Lazy(nn.Module):
    def __init__(self, num_classes):
        super().__init__()
        self.head = nn.Sequential(nn.Flatten(), nn.LazyLinear(num_classes))

    def forward(self, x):
        return self.head(x)

def no_module(num_classes):
    return "a string"

CONSTANT = 3
"""


def run(backbone: Backbone, batch: int = 2) -> torch.Tensor:
    with torch.no_grad():
        return backbone.network.eval()(torch.randn(batch, *backbone.input.shape))


@pytest.fixture
def mine(tmp_path, monkeypatch):
    (tmp_path / "mine.py").write_text(CUSTOM)
    monkeypatch.syspath_prepend(tmp_path)
    return "mine"


# --- custom ------------------------------------------------------------------------------------------------------

SIZE = {"height": 16, "width": 16}


def test_custom_by_name(mine):
    backbone = create_backbone("custom", "mine.Net", 6, in_channels=1, image_input=SIZE, kwargs={"width": 9})
    assert run(backbone).shape == (2, 6)
    assert backbone.network.stem.weight.shape == (9, 1, 3, 3)
    assert backbone.input.shape == (1, 16, 16)
    assert backbone.classifier == ("head",)


@pytest.mark.filterwarnings("ignore:Lazy modules are a new feature:UserWarning")
def test_custom_materialises_lazy_layers_and_keeps_train_mode(mine):
    network = create_backbone("custom", "mine.Lazy", 6, image_input=SIZE).network
    assert network.head[1].weight.shape == (6, 3 * 16 * 16)
    assert all(module.training for module in network.modules())


def test_custom_open_ended_function():
    backbone = create_backbone("custom", "torchvision.models.resnet18", 6, image_input=SIZE)
    assert run(backbone).shape == (2, 6)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("mine.Fixed", {}, r"logits \(2, 6\), got \(2, 5\)"),
        ("mine.Pair", {}, "got tuple"),
        ("mine.Net", {"kwargs": {"depth": 3}}, "cannot be built with.*depth"),
        ("mine.Net", {"kwargs": {"width": -3}}, "cannot be built with.*width"),
        ("mine.Net", {"image_input": {"height": 2, "width": 2}}, r"fails on images \(2, 3, 2, 2\)"),
        ("mine.Net", {"image_input": {"height": 2}}, "needs image_input.width in pixels"),
        ("mine.Net", {"image_input": None}, "needs image_input.height and image_input.width"),
        ("mine.Net", {"pretrained": True}, "no weights to download"),
        ("mine.Lazy", {"in_channels": 1, "kwargs": {"in_channels": 1}}, "cannot be built"),
        ("mine.no_module", {}, "must give an nn.Module, got str"),
        ("mine.Missing", {}, "cannot be imported"),
        ("nowhere.Net", {}, "cannot be imported"),
        ("Net", {}, "cannot be imported"),
        ("mine.CONSTANT", {}, "is not a class or function but int"),
        ("mine.Net", {"network": nn.ReLU()}, "_partial_: true"),
        ("mine.Net", {"network": 3}, "got int"),
    ],
)
def test_custom_mistakes(mine, name, options, message):
    with pytest.raises(ValueError, match=message):
        create_backbone("custom", name, 6, **{"image_input": SIZE, **options})


# --- Hydra -------------------------------------------------------------------------------------------------------


def hydra_backbone(source: str, *overrides: str, num_classes: int = 10) -> Backbone:
    with initialize_config_dir(CONFIG, version_base="1.3"):
        cfg = compose(config_name=f"backbone/{source}", overrides=list(overrides))
    return instantiate(cfg.backbone, num_classes=num_classes)


def test_hydra_cifar_with_weights(tmp_path):
    torch.save(CifarResNet(32, in_channels=1).state_dict(), tmp_path / "w.pt")
    overrides = ["backbone.name=resnet32", f"backbone.weights={tmp_path}/w.pt", "backbone.in_channels=1"]
    backbone = hydra_backbone("cifar", *overrides)
    assert backbone.pretrained == f"{tmp_path}/w.pt"
    assert run(backbone).shape == (2, 10)


def test_hydra_timm_and_torchvision():
    overrides = ["backbone.kwargs={drop_path_rate: 0.1, img_size: 32}", "backbone.name=vit_tiny_patch16_224"]
    backbone = hydra_backbone("timm", *overrides)
    assert backbone.input.height == 32
    assert run(backbone).shape == (2, 10)
    backbone = hydra_backbone(
        "torchvision", "backbone.name=squeezenet1_1", "backbone.image_input={height: 64, width: 64}"
    )
    assert run(backbone).shape == (2, 10)


def test_hydra_custom(mine):
    backbone = hydra_backbone(
        "custom", "backbone.network._target_=mine.Net", "+backbone.network.width=6", "backbone.image_input.height=24"
    )
    assert backbone.network.stem.weight.shape == (6, 3, 3, 3)
    assert backbone.input.shape == (3, 24, 32)


def test_hydra_custom_needs_a_target():
    with pytest.raises(Exception, match=r"backbone\.network\._target_"):
        hydra_backbone("custom")
