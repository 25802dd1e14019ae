"""Networks that run at one size alone are built for the images' own, and no others."""

import json

import pytest
import timm
import torch
from safetensors.torch import save_file
from torchvision.models import vision_transformer

from cleave.architectures import create_backbone
from cleave.architectures.backbones import factory

SMALL = {"embed_dim": 16, "depth": 1, "num_heads": 2}
NEED = {
    "vit_tiny_patch16_224": SMALL,
    "deit_tiny_patch16_224": SMALL,
    "beit_base_patch16_224": SMALL,
    "swin_tiny_patch4_window7_224": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)},
    "swinv2_tiny_window8_256": {"embed_dim": 8, "depths": (1, 1), "num_heads": (1, 2)},
    "mixer_s16_224": {},
    "cait_xxs24_224": {**SMALL, "depth_token_only": 1},
    "visformer_tiny": {},
    "pit_ti_224": {},
}


def built_sizes(monkeypatch, name: str, size: tuple[int, int], **kwargs) -> tuple[list[object], factory.Backbone]:
    """Which sizes a network was built for, first to last, and the backbone."""
    asked: list[object] = []
    create = timm.create_model

    def spy(*args, **options):
        asked.append(options.get("img_size"))
        return create(*args, **options)

    monkeypatch.setattr(timm, "create_model", spy)
    return asked, create_backbone("timm", name, num_classes=3, image_size=size, kwargs=kwargs)


@pytest.mark.parametrize("name", NEED)
@pytest.mark.parametrize("size", [(64, 64), (64, 96)])
def test_a_network_of_one_size_is_built_for_that_of_the_images(name, size, monkeypatch):
    if name == "pit_ti_224" and size[0] != size[1]:
        pytest.skip("its pooling knows squares")
    asked, backbone = built_sizes(monkeypatch, name, size, **NEED[name])
    assert asked == [None, size]
    assert backbone.input.shape == (3, *size)
    assert backbone.network(torch.zeros(2, 3, *size)).shape == (2, 3)


@pytest.mark.parametrize("name", ["resnet18", "mobilevit_xxs", "pvt_v2_b0", "crossvit_tiny_240"])
def test_a_network_that_runs_at_any_size_is_left_alone(name, monkeypatch):
    torch.manual_seed(0)
    asked, backbone = built_sizes(monkeypatch, name, (64, 64))
    assert asked == [None]
    monkeypatch.undo()
    torch.manual_seed(0)
    alone = create_backbone("timm", name, num_classes=3)
    assert backbone.input == alone.input  # the data resizes to what it says itself
    weights = zip(alone.network.state_dict().values(), backbone.network.state_dict().values(), strict=True)
    assert all(torch.equal(one, other) for one, other in weights)
    assert backbone.network.training


def test_what_the_user_says_stands(monkeypatch):
    asked, _ = built_sizes(monkeypatch, "vit_tiny_patch16_224", (64, 64), img_size=32, **SMALL)
    assert asked == [32]
    monkeypatch.undo()
    asked, _ = built_sizes(monkeypatch, "vit_tiny_patch16_224", (64, 64), dynamic_img_size=True, **SMALL)
    assert asked == [None]
    monkeypatch.undo()
    asked, _ = built_sizes(monkeypatch, "vit_tiny_patch16_224", (224, 224), **SMALL)
    assert asked == [None]


def test_a_network_that_can_be_built_for_no_other_size_is_refused_in_words():
    with pytest.raises(ValueError, match=r"runs at 224x224 pixels alone, not at 64x64 .*data\.image_size"):
        create_backbone("timm", "levit_128s", num_classes=3, image_size=(64, 64))


def test_a_size_among_the_fields_of_the_input_counts_as_well():
    size = {"height": 64, "width": 96}
    backbone = create_backbone("timm", "vit_tiny_patch16_224", num_classes=3, image_input=size, kwargs=SMALL)
    assert backbone.network(torch.zeros(1, *backbone.input.shape)).shape == (1, 3)
    assert backbone.input.shape == (3, 64, 96)


def test_torchvisions_transformers_are_built_for_the_size_too(monkeypatch):
    build = vision_transformer.VisionTransformer
    monkeypatch.setattr(
        vision_transformer, "VisionTransformer", lambda **settings: build(**settings | {"num_layers": 1})
    )
    backbone = create_backbone("torchvision", "vit_b_32", num_classes=3, image_size=(64, 64))
    assert backbone.input.shape == (3, 64, 64)
    assert backbone.network.image_size == 64
    with pytest.raises(ValueError, match=r"vit_b_32 was built for 64x96 pixels and does not run at them"):
        create_backbone("torchvision", "vit_b_32", num_classes=3, image_size=(64, 96))


@pytest.mark.parametrize("pretrained", [True, False])
def test_names_that_timm_looks_up_itself_pass_through(pretrained, tmp_path):
    network = timm.create_model("resnet10t", num_classes=4)
    save_file(network.state_dict(), tmp_path / "model.safetensors")
    config = {"num_classes": 4, "input_size": [3, 176, 176], "tag": "mine", "first_conv": "conv1.0", "classifier": "fc"}
    (tmp_path / "config.json").write_text(json.dumps({"architecture": "resnet10t", "pretrained_cfg": config}))
    backbone = create_backbone("timm", f"local-dir:{tmp_path}", num_classes=4, pretrained=pretrained)
    assert backbone.input.shape == (3, 176, 176)
    assert torch.equal(backbone.network.fc.weight, network.fc.weight) == pretrained
    assert backbone.pretrained == (f"timm local-dir:{tmp_path}" if pretrained else None)


@pytest.mark.parametrize("prefix", ["hf_hub:", "hf-hub:"])
def test_a_name_on_the_hub_reaches_timm(prefix, monkeypatch):
    def hub(name, **options):
        raise OSError(f"no network for {name}")

    monkeypatch.setattr(timm, "create_model", hub)
    with pytest.raises(ValueError, match=rf"no network for {prefix}timm/resnet18\.a1_in1k"):
        create_backbone("timm", f"{prefix}timm/resnet18.a1_in1k", num_classes=4)
